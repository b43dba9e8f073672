"""The models that the embeddings feed, TorchRec's DLRM, and GMF for logs of users and items; what embeddings cost,
pointers counted, and how much that is less than full tables.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torchrec import KeyedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS

from torchrec_cce.methods.table import CompressedConfig
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.interaction import FlatInteraction
from torchrec_cce.training.rowwise import Bits, row_bytes


class DLRMClicks(nn.Module):
    """TorchRec's DLRM on a `Batch`. A log without dense features gets one that is always zero, as DLRM needs one."""

    def __init__(self, collection: CCEEmbeddingBagCollection, num_dense: int, config: RunConfig) -> None:
        super().__init__()
        self._num_dense = num_dense
        self.dlrm = DLRM(
            collection,
            dense_in_features=max(1, num_dense),
            dense_arch_layer_sizes=[*config.model.bottom, config.embedding.dim],
            over_arch_layer_sizes=[*config.model.top, 1],
        )
        self.dlrm.inter_arch = FlatInteraction(self.dlrm.inter_arch.F)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits `[B]`."""
        dense = batch.dense_features
        if self._num_dense == 0:
            dense = dense.new_zeros((len(dense), 1))
        logits: torch.Tensor = self.dlrm(dense, batch.sparse_features)
        return logits.squeeze(1)


class GMFClicks(nn.Module):
    """Generalised matrix factorisation (He et al. 2017): a weighted inner product of a user and an item embedding."""

    def __init__(self, collection: CCEEmbeddingBagCollection, dim: int) -> None:
        super().__init__()
        self.collection = collection
        self.output = nn.Linear(dim, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits `[B]`."""
        embeddings: KeyedTensor = self.collection(batch.sparse_features)
        user, item = (embeddings[key] for key in embeddings.keys())  # noqa: SIM118  a KeyedTensor is no mapping
        return self.output(user * item).squeeze(1)  # type: ignore[no-any-return]


def build_model(config: RunConfig, *, num_dense: int, device: torch.device) -> nn.Module:
    """The model that `config` describes, its weights drawn from `config.seed`."""
    torch.manual_seed(config.seed)
    collection = CCEEmbeddingBagCollection(tables=config.table_configs(), device=device)
    if config.model.name == "gmf":
        return GMFClicks(collection, config.embedding.dim).to(device)
    return DLRMClicks(collection, num_dense, config).to(device)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of all embedding tables of a model."""

    full_parameters: int
    """`Σ n·d`: what full tables would train."""
    parameters: int
    """Trained parameters."""
    full_bytes: int
    """Bytes of full tables."""
    table_bytes: int
    """Bytes of the tables, as they are served; they are on the accelerator, if there is one. A CCE table that does not
    use its helper still has the helper's rows, which are not trained."""
    pointer_bytes: int
    """Bytes of pointers in host memory: those of CCE's maps."""
    device_pointer_bytes: int = 0
    """Bytes of pointers beside the tables: those of computed tables."""
    resident_bytes: int = 0
    """Bytes of residents while they train, and never served: rows, the state of row-wise Adagrad, ages and slots."""
    training_bytes: int = 0
    """The most bytes that are held to train them, see `Footprint`; 0 where nobody said."""
    largest_table: str
    """The table that would be the largest if all were full."""
    largest_factor: float
    """Parameters of this table if it were full, over its trained parameters."""

    @property
    def parameter_factor(self) -> float:
        """Compression over all tables, as the paper measures it: without the pointers."""
        return self.full_parameters / self.parameters

    @property
    def byte_factor(self) -> float:
        """Compression of total bytes, pointers counted."""
        return self.full_bytes / self.total_bytes

    @property
    def total_bytes(self) -> int:
        return self.table_bytes + self.pointer_bytes + self.device_pointer_bytes


def sizes_of(collections: Iterable[CCECollection], *, training_bytes: int = 0, bits: Bits | None = None) -> Sizes:
    """The sizes of all tables in `collections`, with the maps that are attached now.

    Args:
        training_bytes: see `Sizes`.
        bits: of the numbers in full tables, if these are quantized row by row.
    """
    full: dict[str, int] = {}
    trained: dict[str, int] = {}
    full_bytes = table_bytes = pointer_bytes = device_pointer_bytes = resident_bytes = 0
    for collection in collections:
        pointer_bytes += sum(collection.pointer_map(table).nbytes for table in collection.cce_tables())
        resident_bytes += sum(table.resident_bytes for table in collection.configs_with_residents())
        for table in collection.configs():
            bytes_per_value = DATA_TYPE_NUM_BITS[table.data_type] // 8
            full[table.name] = trained[table.name] = held = table.num_embeddings * table.embedding_dim
            if isinstance(table, CompressedConfig):
                trained[table.name], held = table.num_parameters, table.num_physical_parameters
                device_pointer_bytes += table.pointer_bytes
            full_bytes += full[table.name] * bytes_per_value
            if bits is None or isinstance(table, CompressedConfig):
                table_bytes += held * bytes_per_value
            else:
                table_bytes += table.num_embeddings * row_bytes(table.embedding_dim, bits)
    largest = max(full, key=lambda name: full[name])
    return Sizes(
        full_parameters=sum(full.values()),
        parameters=sum(trained.values()),
        full_bytes=full_bytes,
        table_bytes=table_bytes,
        pointer_bytes=pointer_bytes,
        device_pointer_bytes=device_pointer_bytes,
        resident_bytes=resident_bytes,
        training_bytes=training_bytes,
        largest_table=largest,
        largest_factor=full[largest] / trained[largest],
    )
