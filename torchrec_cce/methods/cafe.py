"""CAFE (Zhang et al., SIGMOD 2024): rows of their own for hot IDs, found by a sketch, a hashed row for the others."""

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import term_hash
from torchrec_cce.kernels.hot_sketch import NO_ID, NO_ROW, add_weights
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.table import MethodSpec, Sizing
from torchrec_cce.methods.tensor_hash import TensorHash

_BUCKET_SLOTS = 4
_SLOTS_A_ROW = 2
_SLOT_BYTES = 8 + 4 + 4
"""An ID, its score, its row."""
_COUNTER_BYTES = 8


@dataclass(kw_only=True)
class CafeEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """`num_hot` rows that belong to one ID each, and `num_shared` rows, one of which each other ID reads by a hash.

    Which IDs are hot is found by a sketch (the paper's HotSketch): buckets of four slots, in which IDs collect the
    norms of their embeddings' gradients, and the lightest makes room. Every `interval` batches the hottest get the
    rows: one that turns hot begins with the values of its shared row, one that turns cold goes back to that. Then all
    scores decay.

    The paper moves an ID as soon as its score passes a threshold; here the threshold is what the rows suffice for. A
    row's optimizer state stays with the row. The sketch is of one process: more ranks are refused.
    """

    num_hot: int
    num_shared: int
    interval: int = 10
    """Batches from one choice of the hot IDs to the next."""
    decay: float = 0.98
    """What scores are multiplied by then, above 0 and at most 1."""

    def __post_init__(self) -> None:
        self._check_positive(num_hot=self.num_hot, num_shared=self.num_shared, interval=self.interval)
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ConfigError(f"table {self.name!r}: decay={self.decay} is not above 0 and at most 1; 0.98 is usual")

    @property
    def num_parameters(self) -> int:
        return int((self.num_hot + self.num_shared) * self.embedding_dim)

    @property
    def has_rows(self) -> bool:
        return True

    @property
    def num_buckets(self) -> int:
        """Of four slots, two for each hot row."""
        return -(-_SLOTS_A_ROW * self.num_hot // _BUCKET_SLOTS)

    @property
    def pointer_bytes(self) -> int:
        """Of the sketch."""
        return self.num_buckets * _BUCKET_SLOTS * _SLOT_BYTES + _COUNTER_BYTES

    def build(self, device: torch.device | None = None) -> "Cafe":
        return Cafe(self, device)


class Cafe(ComputedTable):
    """Rows `0 … num_hot − 1` belong to hot IDs, those after them are shared."""

    ids: torch.Tensor
    """[buckets, 4] int64: the raw IDs in the slots of the sketch, -1 for none."""
    scores: torch.Tensor
    """[buckets, 4] float32."""
    rows: torch.Tensor
    """[buckets, 4] int32: the own row of each, -1 for none."""
    lookups: torch.Tensor
    """[] int64: of features, in training."""

    def __init__(self, config: CafeEmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__(config)
        self._init, self._num_hot, self._decay = config.init_fn, config.num_hot, config.decay
        self._lookups_between = config.interval * len(config.feature_names)
        self._shared = TensorHash(term_hash(self._seed, 0, num_columns=1, num_rows=config.num_shared))
        self._bucket = self._hash("buckets", num_functions=1, num_rows=config.num_buckets)
        self.weight = parameter(config.num_hot + config.num_shared, config.embedding_dim, device=device)
        shape = (config.num_buckets, _BUCKET_SLOTS)
        self.register_buffer("ids", torch.empty(shape, dtype=torch.int64, device=device))
        self.register_buffer("scores", torch.empty(shape, device=device))
        self.register_buffer("rows", torch.empty(shape, dtype=torch.int32, device=device))
        self.register_buffer("lookups", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rows by the configuration's `init_fn`, and an empty sketch."""
        if self.weight.is_meta:
            return
        self._init(self.weight)
        for buffer, value in ((self.ids, NO_ID), (self.scores, 0), (self.rows, NO_ROW), (self.lookups, 0)):
            buffer.fill_(value)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self._begin_lookup()
        embeddings = embedding(self._rows_of(ids), self.weight)
        if learns and embeddings.requires_grad:
            embeddings.register_hook(lambda gradients: self._weigh(ids, gradients))
        return embeddings

    def _rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """[N] int64: the row that each ID reads."""
        buckets = self._bucket(ids)[:, 0]
        own = torch.where(self.ids[buckets] == ids[:, None], self.rows[buckets], NO_ROW).amax(dim=1)
        return torch.where(own == NO_ROW, self._num_hot + self._shared(ids)[:, 0], own.to(torch.int64))

    def _weigh(self, ids: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add the norms of `gradients: [N, d]` to the scores of `ids: [N]`."""
        on_cpu = [each.cpu() for each in (self.ids, self.scores.float(), self.rows)]
        weights = gradients.float().norm(dim=1)
        buckets = self._bucket(ids)[:, 0]
        add_weights(*(each.cpu().numpy() for each in (ids, buckets, weights)), *(each.numpy() for each in on_cpu))
        for mine, changed in zip((self.ids, self.scores, self.rows), on_cpu, strict=True):
            mine.copy_(changed)

    @torch.no_grad()
    def _begin_lookup(self) -> None:
        """Between two batches, choose the hot IDs anew where that is due."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                f"method='cafe' trains in one process: its sketch would be another on each of the "
                f"{torch.distributed.get_world_size()} ranks"
            )
        if self.lookups > 0 and self.lookups % self._lookups_between == 0:
            self._choose()
            self.scores *= self._decay
        self.lookups += 1

    def _choose(self) -> None:
        """Give the rows to the IDs with the highest scores; of equal ones, to those in the first slots."""
        ids, scores, rows = self.ids.view(-1), self.scores.view(-1), self.rows.view(-1)
        hottest = scores.sort(descending=True, stable=True).indices[: self._num_hot]
        is_hot = torch.zeros_like(ids, dtype=torch.bool)
        is_hot[hottest] = True
        is_hot &= ids != NO_ID
        rows[~is_hot] = NO_ROW
        is_taken = torch.zeros(self._num_hot, dtype=torch.bool, device=ids.device)
        is_taken[rows[is_hot & (rows != NO_ROW)].long()] = True
        new = (is_hot & (rows == NO_ROW)).nonzero()[:, 0]
        free = (~is_taken).nonzero()[: len(new), 0]
        rows[new] = free.to(rows.dtype)
        self.weight[free] = self.weight[self._num_hot + self._shared(ids[new])[:, 0]]


_HOT_SHARE = 0.7
"""Of the rows, as in the paper."""


def _cafe(sizing: Sizing) -> EmbeddingBagConfig:
    d = sizing.table.embedding_dim
    rows = sizing.at_least(sizing.max_parameters // d, 2, needed=2 * d)
    num_hot = min(rows - 1, max(1, round(_HOT_SHARE * rows)))
    return sizing.make(CafeEmbeddingBagConfig, num_hot=num_hot, num_shared=rows - num_hot)


METHODS = (MethodSpec(name="cafe", family="hashing", size=_cafe),)
