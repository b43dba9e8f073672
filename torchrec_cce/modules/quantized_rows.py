"""`QuantizedRows`: the private rows of residents as float16 or int8 numbers, trained with stochastic rounding.

No stock table of TorchRec trains int8 numbers. Those of float16 numbers are rounded at random on GPUs alone; on a CPU,
whatever `stochastic_rounding` says, to the nearest, by which small updates are lost.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_cce.clustering.fold import ResidentRows, RowArray
from torchrec_cce.errors import ConfigError, GradientError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.kernels.quantized_rows import LARGEST, Numbers, QuantizedArray, pool_rows, round_rows, train_rows
from torchrec_cce.maps.residency import Residency
from torchrec_cce.methods.cce import CCEConfig

Floats = npt.NDArray[np.float32]
Number = TypeVar("Number", bound=np.generic)

_FIRST_STEPS = {torch.int8: 0.01, torch.float16: 1.0}
"""What 1 stands for until it is known how large rows become; of float16 numbers, always."""
_STEP = 0.04
"""The same, as a share of the root mean square of the rows of the phase before: 127 of them are five of those."""
_EPSILON = 1e-8
"""FBGEMM's."""
_LARGEST_GRADIENT = 2.0**60
"""Adagrad keeps sums of squares for good, which float32 has up to 2¹²⁸."""
_ROWS = 1 << 16
"""Of a table, at a time."""


class QuantizedRows(nn.Module):
    """Pooled sums of the rows of residents, as an `EmbeddingBagCollection` returns those of its own.

    A row is `d` numbers, and a float32 of row-wise Adagrad, by which it is trained in the backward pass: no gradient or
    optimizer is seen outside. An int8 number stands for itself times a step, which is the same for all rows of a table
    in a phase; what lies between two numbers is rounded up or down at random, so that the mean is right.

    Rows are in host memory, and every rank has a replica: gradients are exchanged between ranks, and averaged over them
    as those of all tables are. The draws come from the table's seed and the number of the update, so that all replicas
    stay equal, and a resumed run draws what an uninterrupted one would.

    Args:
        tables: configurations with `residents` of dtype float16 or int8.
        device: the meta device for rows that are not there yet; any other is of no concern.
    """

    def __init__(self, tables: Sequence[CCEConfig], *, device: torch.device | None) -> None:
        super().__init__()
        is_meta = device is not None and device.type == "meta"
        self.tables = nn.ModuleDict({table.resident_table: QuantizedTable(table, is_meta=is_meta) for table in tables})
        self._keys = [(table.resident_table, key) for table in tables for key in table.resident_feature_names()]
        self._dims = [table.embedding_dim for table in tables for _ in table.feature_names]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """`[B, Σ d]` float32 with one key `f#table#residents` a feature, from the slots under that key.

        Raises:
            ConfigError: a variable batch for each feature without inverse indices.
        """
        keys = [key for _, key in self._keys]
        bags = [_bags_of(features[key], table) for table, key in self._keys]
        inverse = features.inverse_indices_or_none()
        if inverse is None:
            heights = sorted({len(each.lengths) for each in bags})
            if len(heights) > 1:
                raise ConfigError(
                    f"features have {' and '.join(map(str, heights))} bags; give the variable batch inverse_indices"
                )
            (values,) = self._pool([bags], features.device())
        else:  # a variable batch for each feature
            names, indices = inverse
            parts = self._pool([[each] for each in bags], features.device())
            values = torch.cat([part[indices[names.index(key)]] for part, key in zip(parts, keys, strict=True)], dim=1)
        return KeyedTensor(keys=keys, length_per_key=self._dims, values=values)

    def _pool(self, blocks: list[list["_Bags"]], device: torch.device) -> list[torch.Tensor]:
        """`[B, Σ d]` on `device` of each block of features that have as many bags: their sums, side by side."""
        # Autograd goes back to where some input needs a gradient.
        start = torch.zeros(0, requires_grad=torch.is_grad_enabled())
        pooled: tuple[torch.Tensor, ...] = _Pool.apply(start, self.tables, blocks)  # type: ignore[no-untyped-call]
        return [block.to(device) for block in pooled]


class QuantizedSequences(QuantizedRows):
    """The rows of residents in sequences, each by itself, as an `EmbeddingCollection` returns those of its own."""

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """`f#table#residents` → `[R, d]` float32 of the R slots under that key, and the lengths of their bags."""
        sequences = {key: features[key] for _, key in self._keys}
        parts = self._pool(
            [[_bags_of(sequences[key], table).one_by_one()] for table, key in self._keys], features.device()
        )
        return {
            key: JaggedTensor(values=part, lengths=bags.lengths())
            for (key, bags), part in zip(sequences.items(), parts, strict=True)
        }


class QuantizedTable(nn.Module):
    """The rows of one table."""

    rows: torch.Tensor
    """[m, d] float16 or int8."""
    state: torch.Tensor
    """[m] float32."""
    step: torch.Tensor
    """[] float64: what 1 stands for."""
    updates: torch.Tensor
    """[] int64: how many there were."""

    def __init__(self, config: CCEConfig, *, is_meta: bool) -> None:
        super().__init__()
        assert config.residents is not None
        self.width = config.embedding_dim
        self.learning_rate, self.weight_decay = config.residents.learning_rate, config.residents.weight_decay
        self.seed = derive_seed(config.seed, config.resident_table)
        device = torch.device("meta" if is_meta else "cpu")
        shape = (config.max_residents, config.embedding_dim)
        dtype = torch.float16 if config.residents.dtype == "float16" else torch.int8
        self.register_buffer("rows", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("state", torch.zeros(shape[0], device=device))
        self.register_buffer("step", torch.tensor(_FIRST_STEPS[dtype], dtype=torch.float64, device=device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    def reset_parameters(self) -> None:
        """As before the first phase."""
        for buffer in (self.rows, self.state, self.updates):
            buffer.zero_()
        self.step.fill_(_FIRST_STEPS[self.rows.dtype])

    def numbers(self) -> Numbers:
        """The rows, as kernels take them."""
        numbers: Numbers = self.rows.numpy()
        return numbers.view(np.uint16) if self.rows.dtype == torch.float16 else numbers

    def pool(self, bags: "_Bags", first: int, stride: int, out: Floats) -> "_Members":
        """Write weighted sums to `out`; arguments as of `pool_rows`."""
        starts = np.empty(len(bags.slots), np.int64)
        step = np.float32(self.step.item())
        pool_rows(self.numbers(), step, bags.slots, bags.lengths, bags.weights, first, stride, out, starts)
        return _Members(bags.table, bags.slots, bags.weights, starts)

    def train_on(self, members: list["_Members"], gradients: Floats) -> None:
        """One update by the gradients of what members are part of; see `train_rows`."""
        slots = _joined([each.slots for each in members])
        seed = derive_seed(self.seed, int(self.updates))
        self.updates += 1
        train_rows(
            self.numbers(),
            self.state.numpy(),
            np.float32(self.step.item()),
            _stable_order(slots),
            slots,
            _joined([each.starts for each in members]),
            _joined([each.weights for each in members]),
            gradients,
            np.float32(self.learning_rate),
            np.float32(self.weight_decay),
            np.float32(_EPSILON),
            np.uint64(seed),
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedTable":  # noqa: ARG002
        """Stay in host memory, wherever a model is moved to; come to be there if it was on the meta device."""
        if self.rows.is_meta:
            for name, buffer in list(self.named_buffers()):
                setattr(self, name, torch.zeros_like(buffer, device="cpu"))
            self.reset_parameters()
        return self


def _stable_order(slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What sorts `slots`, below 2³¹, equal ones in their order. Numbers sort twice as fast as indices of them."""
    numbered = slots << 32 | np.arange(len(slots))
    numbered.sort()
    return numbered & 0xFFFF_FFFF


def _joined(parts: list[npt.NDArray[Number]]) -> npt.NDArray[Number]:
    """One array of all parts; a single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class QuantizedStore:
    """The rows of one table, as `ResidentStore` has those of a stock one. The same on every rank."""

    def __init__(self, table: nn.Module) -> None:
        assert isinstance(table, QuantizedTable)
        self._table = table

    def learned(self, residency: Residency) -> ResidentRows:
        rows = QuantizedArray(self._table.rows.numpy(), float(self._table.step))
        return ResidentRows(residency=residency, rows=rows, importances=self._table.state.numpy())

    def restart(self, parts: Iterable[tuple[int, Floats]]) -> None:
        table = self._table
        if table.rows.dtype == torch.int8:
            table.step *= _step_of(table.rows.numpy())
        table.rows.zero_()
        table.state.zero_()
        self.fill(parts)

    def fill(self, parts: Iterable[tuple[int, Floats]]) -> None:
        step = float(self._table.step)
        for first, rows in parts:
            self._table.rows[first : first + len(rows)] = _nearest(rows / step, self._table.rows.dtype)

    def rewrite(self, rows: RowArray) -> None:
        """The step stays, unless a value would not fit. Means stay what they are: between two numbers it is drawn."""
        table, parts = self._table, range(0, len(self._table.rows), _ROWS)
        if table.rows.dtype == torch.int8:
            largest = max(float(np.abs(rows[start : start + _ROWS]).max()) for start in parts)
            table.step.clamp_(min=largest / LARGEST)
        step, seed = np.float32(table.step.item()), derive_seed(table.seed, "rewritten", int(table.updates))
        for start in parts:
            out = table.numbers()[start : start + _ROWS]
            round_rows(rows[start : start + _ROWS], step, start, np.uint64(seed), out)


def _step_of(numbers: npt.NDArray[np.int8]) -> float:
    """What the step is to be multiplied by for the next phase, whose rows are taken to become as large as these."""
    squares = sum(float(np.square(part, dtype=np.float32).sum()) for part in np.array_split(numbers, 64))
    if squares == 0:
        return 1.0
    return float(_STEP * (squares / (np.count_nonzero(numbers.any(axis=1)) * numbers.shape[1])) ** 0.5)


def _nearest(values: Floats, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers of a type."""
    if dtype == torch.int8:
        return torch.from_numpy(np.clip(np.rint(values), -LARGEST, LARGEST)).to(dtype)
    largest = torch.finfo(dtype).max
    return torch.from_numpy(np.clip(values, -largest, largest)).to(dtype)


class _Bags(NamedTuple):
    """The residents in the bags of one feature."""

    table: str
    slots: npt.NDArray[np.int64]
    """[R]."""
    lengths: npt.NDArray[np.integer]
    """[B]."""
    weights: Floats
    """[R], or [0] where all are 1."""

    def one_by_one(self) -> "_Bags":
        """Each resident as a bag of its own."""
        return self._replace(lengths=np.ones(len(self.slots), np.int64))


def _bags_of(bags: JaggedTensor, table: str) -> _Bags:
    weights = bags.weights_or_none()
    return _Bags(
        table,
        bags.values().cpu().numpy(),
        bags.lengths().cpu().numpy(),
        np.empty(0, np.float32) if weights is None else weights.float().cpu().numpy(),
    )


class _Members(NamedTuple):
    """The residents of one feature, and where their sums are in an array of all."""

    table: str
    slots: npt.NDArray[np.int64]
    """[R]."""
    weights: Floats
    """[R], or [0] where all are 1."""
    starts: npt.NDArray[np.int64]
    """[R]."""


class _Pool(torch.autograd.Function):
    """Sums of rows, block by block; the backward pass trains them."""

    @staticmethod
    def forward(
        ctx: Any, _start: torch.Tensor, tables: nn.ModuleDict, blocks: list[list[_Bags]]
    ) -> tuple[torch.Tensor, ...]:
        shapes = [(len(block[0].lengths), sum(_table(tables, each.table).width for each in block)) for block in blocks]
        ends = list(accumulate(height * width for height, width in shapes))
        sums = np.empty(ends[-1], np.float32)
        ctx.tables, ctx.members = tables, []
        for block, first, (_, stride) in zip(blocks, [0, *ends], shapes, strict=False):
            for bags in block:
                table = _table(tables, bags.table)
                ctx.members.append(table.pool(bags, first, stride, sums))
                first += table.width
        parts = np.split(sums, ends[:-1])
        return tuple(torch.from_numpy(part.reshape(shape)) for part, shape in zip(parts, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        mine = ctx.members, _joined([block.contiguous().flatten().numpy() for block in gradients])
        everyones = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyones = [mine] * dist.get_world_size()
            dist.all_gather_object(everyones, mine)
        whole = _joined([of_sums for _, of_sums in everyones])
        if len(everyones) > 1:
            whole *= np.float32(1 / len(everyones))
        firsts = list(accumulate((len(of_sums) for _, of_sums in everyones[:-1]), initial=0))
        # Feature by feature, as one process has them: sums of floats depend on their order.
        of_features = [
            members._replace(starts=members.starts + first)
            for of_ranks in zip(*(members for members, _ in everyones), strict=True)
            for members, first in zip(of_ranks, firsts, strict=True)
        ]
        if not np.abs(whole).max(initial=0) < _LARGEST_GRADIENT:  # nor if it is NaN
            for members in of_features:
                _check_gradients(members, _table(ctx.tables, members.table).width, whole)
        for name, table in ctx.tables.items():
            table.train_on([members for members in of_features if members.table == name], whole)
        return None, None, None


def _check_gradients(members: _Members, width: int, gradients: Floats) -> None:
    of_members = gradients[members.starts[:, None] + np.arange(width)]
    bad = of_members[~(np.abs(of_members) < _LARGEST_GRADIENT)]
    if len(bad):
        raise GradientError(
            f"a gradient of the rows of table {members.table!r} is {bad[0]:g}; no row was changed. Look for NaN in the "
            "batch and the loss, or lower the learning rates"
        )


def _table(tables: nn.ModuleDict, name: str) -> QuantizedTable:
    table = tables[name]
    assert isinstance(table, QuantizedTable)
    return table
