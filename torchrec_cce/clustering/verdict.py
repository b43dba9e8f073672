"""What the entropies of learned pointers say (Appendix G): as random as a hash, collapsed, or something learned."""

import math
from collections.abc import Sequence
from typing import Literal

from torchrec_cce.clustering.entropy import MAX_JOINT_IDS
from torchrec_cce.clustering.limits import MIN_H1, MIN_H2_GAIN, MIN_LEARNED

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
