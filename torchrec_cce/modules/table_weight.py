"""The weights of a table, as long as no wrapper has made something else of them."""

from torch import nn
from torch.distributed.tensor import DTensor

from torchrec_cce.errors import ConfigError


def table_weight(collection: nn.Module, name: str) -> nn.Parameter:
    """The weights that a state dict of `collection` calls `name`, of a stock table.

    Raises:
        ConfigError: they are sharded by TorchRec, or quantized: their module is none of PyTorch's any more.
    """
    weight = _owner(collection, name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def whole_table_weight(collection: nn.Module, name: str) -> nn.Parameter:
    """The same, to be read and written as a whole.

    Raises:
        ConfigError: as `table_weight`, or they are sharded by PyTorch, whatever state they are in now: what is written
            to rows that were gathered for a forward pass is lost with these.
    """
    weight = table_weight(collection, name)
    if isinstance(weight, DTensor) or getattr(_owner(collection, name), "_is_fsdp_managed_module", False):
        raise ConfigError(
            f"{name!r} is sharded by PyTorch (fully_shard), which no clustering or map can read or write as a whole; "
            "leave the collection out, ignored_params=set(collection.parameters()), and let DistributedModelParallel "
            "shard it, or DDP replicate it"
        )
    return weight


def _owner(collection: nn.Module, name: str) -> nn.Embedding | nn.EmbeddingBag:
    owner = collection.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return owner
    if "weight" in dict(owner.named_buffers(recurse=False)):
        raise ConfigError(
            f"{name!r} is quantized, and neither read, trained nor written any more; do so with the model that it was "
            "quantized from, and quantize that anew"
        )
    raise ConfigError("the tables are sharded; use torchrec_cce.sharding, which gathers them from all ranks")
