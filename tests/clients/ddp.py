"""A collection that is not sharded, in plain DDP: `torchrun --nproc_per_node 2 -m tests.clients.ddp`."""

import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from tests.clients.clicks import BATCH_SIZE, TABLES, Clicks, batches, collate, dlrm
from torchrec_cce import CCEEmbeddingBagCollection, tables_under_cap


def train() -> None:
    log = Clicks()
    sampler: DistributedSampler[Clicks] = DistributedSampler(log, shuffle=False)
    loader = DataLoader(log, batch_size=BATCH_SIZE // dist.get_world_size(), sampler=sampler, collate_fn=collate)
    ebc = CCEEmbeddingBagCollection(tables=tables_under_cap(TABLES, method="cce", max_parameters=1_000))
    model = DistributedDataParallel(dlrm(ebc))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for epoch in range(2):
        alone = copy.deepcopy(model.module)  # trains on whole batches, in this process
        its_optimizer = torch.optim.SGD(alone.parameters(), lr=1.0)
        for mine, whole in zip(loader, batches(), strict=True):
            for each, batch, descent in ((model, mine, optimizer), (alone, whole, its_optimizer)):
                descent.zero_grad()
                loss, _ = each(batch)
                loss.backward()
                descent.step()
        for (name, value), its_value in zip(model.module.named_parameters(), alone.parameters(), strict=True):
            assert torch.allclose(value, its_value, rtol=0, atol=1e-6), (name, epoch)
        ebc.recluster(seed=epoch, optimizer=optimizer)
        digests: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, ebc.pointer_map("t_user").identity)
        assert len(set(digests)) == 1, digests


def main() -> None:
    dist.init_process_group("gloo")
    train()  # lets go of DDP, which hangs now and then if it outlives the group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
