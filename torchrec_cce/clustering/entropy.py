"""How good a clustering is: the entropies of its pointers (Appendix G)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import poisson

from torchrec_cce.clustering.settings import MIN_H1, MIN_H2_GAIN, MIN_LEARNED
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_format import Codes

MAX_EXACT_COLUMNS = 4
"""Up to this many columns, every subset of them is counted; beyond, H3 and up follow a greedy chain."""
MAX_JOINT_IDS = 2**20
"""Joint histograms are taken over at most this many IDs, evenly spaced."""
_MAX_COUNTED_CELLS = 2**22
_MAX_KEY = 2**63


def pointer_entropies(pointers: Codes, num_rows: int) -> tuple[float, ...]:
    """H1 … Hc of `pointers: [n, c]` (any unsigned dtype, values below `num_rows`), in nats.

    H_m is the smallest, over the subsets of m columns, of the entropy of their joint histogram over the IDs. Near
    `random_entropies` nothing was learned; far below what product quantization of a full table gives is collapse.

    - H1 counts every ID. From H2 on, with more than `MAX_JOINT_IDS` IDs, that many evenly spaced ones are counted;
      such a value cannot exceed `log MAX_JOINT_IDS` = 13.9.
    - H1 and H2 are over all subsets, and so are the others up to `MAX_EXACT_COLUMNS` columns. With more columns, H3 …
      Hc extend the best pair by the one column that adds least, again and again: each an upper bound of the minimum.

    Raises:
        ConfigError: pointers of another shape or dtype, none at all, or a pointer that is not below `num_rows`.
    """
    if len(pointers.shape) != 2 or 0 in pointers.shape or not np.issubdtype(pointers.dtype, np.unsignedinteger):
        raise ConfigError(f"pointers are {pointers.dtype} {list(pointers.shape)}, not unsigned [n, c] with n, c ≥ 1")
    if pointers.max() >= num_rows:
        raise ConfigError(f"pointer {pointers.max()} is not below num_rows={num_rows}")
    num_ids, num_columns = pointers.shape
    single = min(_column_entropy(pointers, column, num_rows) for column in range(num_columns))
    sampled = pointers if num_ids <= MAX_JOINT_IDS else pointers[np.arange(MAX_JOINT_IDS) * num_ids // MAX_JOINT_IDS]
    columns = [_Cells.of(sampled[:, column].astype(np.int64), num_rows) for column in range(num_columns)]
    subsets = _all_subsets if num_columns <= MAX_EXACT_COLUMNS else _greedy_subsets
    return (single, *subsets(columns))


def random_entropies(num_ids: int, num_rows: int, num_columns: int) -> tuple[float, ...]:
    """H1 … Hc, in nats, that `pointer_entropies` is expected to give when every pointer is uniformly random.

    With `n` IDs thrown at `K = k^m` cells, a cell holds about Poisson(λ) IDs, `λ = n/K`, and the expected entropy is
    `log n − E[X log X]/λ = log n − E[log(1 + X)]`, X ~ Poisson(λ). It approaches `m log k` for `n ≫ K` and `log n` for
    `n ≪ K`. That is the expectation for one subset; the minimum over subsets lies a little lower.
    """
    values = []
    for size in range(1, num_columns + 1):
        counted = num_ids if size == 1 else min(num_ids, MAX_JOINT_IDS)
        log_rate = math.log(counted) - size * math.log(num_rows)
        value = math.log(counted) - _expected_log_of_one_more(math.exp(log_rate))
        values.append(max(0.0, min(value, math.log(counted), size * math.log(num_rows))))
    return tuple(values)


def _expected_log_of_one_more(rate: float) -> float:
    """E[log(1 + X)] for X ~ Poisson(rate)."""
    if rate > 1e4:
        return math.log(rate) + 0.5 / rate  # two terms of the expansion around the mean; the next is below 1e-8
    counts = np.arange(int(rate + 12 * math.sqrt(rate)) + 32)
    return float(np.sum(poisson.pmf(counts, rate) * np.log1p(counts)))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cells:
    """Which cell of a histogram each ID falls into, and the entropy of that histogram."""

    keys: npt.NDArray[np.int64]
    num_keys: int
    """All keys are below this."""
    entropy: float

    @classmethod
    def of(cls, keys: npt.NDArray[np.int64], num_keys: int) -> "_Cells":
        if num_keys <= _MAX_COUNTED_CELLS:
            counts = np.bincount(keys)
        else:
            # The lengths of the runs of equal keys: `np.unique` without building the values.
            ordered = np.sort(keys)
            edges = np.flatnonzero(np.diff(ordered)) + 1
            counts = np.diff(np.concatenate([[0], edges, [len(keys)]]))
        return cls(keys=keys, num_keys=num_keys, entropy=_entropy(counts))

    def join(self, other: "_Cells") -> "_Cells":
        left = self if self.num_keys * other.num_keys < _MAX_KEY else self.relabelled()
        return _Cells.of(left.keys * other.num_keys + other.keys, left.num_keys * other.num_keys)

    def relabelled(self) -> "_Cells":
        """The same cells, numbered without gaps."""
        values, keys = np.unique(self.keys, return_inverse=True)
        return _Cells(keys=keys.astype(np.int64), num_keys=len(values), entropy=self.entropy)


def _all_subsets(columns: list[_Cells]) -> Iterator[float]:
    """H2 … Hc over every subset, each subset joined to one more column."""
    joined: dict[tuple[int, ...], _Cells] = {(column,): cells for column, cells in enumerate(columns)}
    for size in range(2, len(columns) + 1):
        joined = {
            subset: joined[subset[:-1]].join(columns[subset[-1]]) for subset in combinations(range(len(columns)), size)
        }
        yield min(cells.entropy for cells in joined.values())


def _greedy_subsets(columns: list[_Cells]) -> Iterator[float]:
    """H2 over every pair, then one column more at a time."""
    pairs = combinations(range(len(columns)), 2)
    first, second = min(pairs, key=lambda pair: columns[pair[0]].join(columns[pair[1]]).entropy)
    chain = columns[first].join(columns[second])
    yield chain.entropy
    left = [cells for column, cells in enumerate(columns) if column not in (first, second)]
    most = math.log(len(chain.keys))
    while left:
        if chain.entropy < most:  # else every ID has its own cell already, and no column can add to that
            chain = chain.relabelled()
            candidates = [(chain.join(cells).entropy, column) for column, cells in enumerate(left)]
            chain = chain.join(left.pop(min(candidates)[1]))
        else:
            left.pop()
        yield chain.entropy


def _column_entropy(pointers: Codes, column: int, num_rows: int) -> float:
    """The entropy of one column over all IDs, a few at a time: `np.bincount` needs an int64 copy."""
    counts = np.zeros(num_rows, np.int64)
    for start in range(0, pointers.shape[0], MAX_JOINT_IDS):
        codes = pointers[start : start + MAX_JOINT_IDS, column]
        counts += np.bincount(codes.astype(np.int64), minlength=num_rows)
    return _entropy(counts)


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    """Σ p log(1/p), p = count / n, which is log n − Σ count log(count) / n."""
    total = int(counts.sum())
    several = counts[counts > 1].astype(np.float64)  # a cell of one adds 1 · log 1 = 0
    return max(0.0, math.log(total) - float(np.sum(several * np.log(several))) / total)


LIKE_PQ = 0.1
"""By which share of product quantization's H1 or H2 may differ from it and still be like it."""

_MIN_IDS_PER_ROW = 10
"""With fewer IDs a row, random pointers are spread less evenly than learned ones, and their entropies tell nothing."""
_MIN_ROOM = 0.05
"""Nats that a second column can add, at least, for that to be judged."""

Verdict = Literal["collapsed", "as random as a hash", "like PQ", "less even than PQ", "more even than PQ", "learned"]
"""The last where there is no product quantization to compare with."""


def h1_share(entropies: Sequence[float], *, num_ids: int, num_rows: int) -> float | str:
    """H1 as a share of what it can be at most; or why that says nothing."""
    most = math.log(min(num_rows, num_ids))
    return entropies[0] / most if most else "one row or one ID"


def h2_gain(entropies: Sequence[float], random: Sequence[float], *, num_ids: int) -> float | str:
    """H2 − H1 as a share of what it is for `random` pointers, or of the room there is; or why that says nothing."""
    if len(entropies) == 1:
        return "one column"
    h1, h2 = entropies[:2]
    room = min(random[1] - random[0], math.log(min(num_ids, MAX_JOINT_IDS)) - h1)
    return "one column tells the IDs apart" if room < _MIN_ROOM else (h2 - h1) / room


def learned_share(entropies: Sequence[float], random: Sequence[float], *, num_ids: int, num_rows: int) -> float | str:
    """How far H1 or H2 lies below that of `random` pointers, as a share of it; or why that says nothing."""
    if num_ids < _MIN_IDS_PER_ROW * num_rows or num_rows == 1:
        return "few IDs a row"
    return max(1 - found / expected for found, expected in zip(entropies[:2], random[:2], strict=True))


def verdict(
    entropies: Sequence[float],
    random: Sequence[float],
    *,
    num_ids: int,
    num_rows: int,
    pq: Sequence[float] | None = None,
) -> Verdict:
    """Judge `H1 … Hc` of a table's pointers, as the gates before publishing do by default.

    Args:
        random: the same of random pointers.
        pq: the same of product quantization of the trained full table, with as many rows and columns; None if unknown.
    """
    h1 = h1_share(entropies, num_ids=num_ids, num_rows=num_rows)
    gain = h2_gain(entropies, random, num_ids=num_ids)
    if _is_below(h1, MIN_H1) or _is_below(gain, MIN_H2_GAIN):
        return "collapsed"
    if _is_below(learned_share(entropies, random, num_ids=num_ids, num_rows=num_rows), MIN_LEARNED):
        return "as random as a hash"
    if pq is None:
        return "learned"
    shares = [found / expected - 1 for found, expected in zip(entropies[:2], pq[:2], strict=True) if expected > 0]
    furthest = max(shares, key=abs, default=0.0)
    if abs(furthest) <= LIKE_PQ:
        return "like PQ"
    return "less even than PQ" if furthest < 0 else "more even than PQ"


def _is_below(value: float | str, bound: float) -> bool:
    return not isinstance(value, str) and not value >= bound
