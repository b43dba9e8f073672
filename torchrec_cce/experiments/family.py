"""Families of methods: what is drawn together, so that a panel can be read."""

from collections.abc import Sequence

from torchrec_cce.experiments.chart import in_panels
from torchrec_cce.experiments.curve import FULL, Curve
from torchrec_cce.methods.registry import FAMILIES

OVERVIEW = ("hashing_trick", "hash_embeddings", "ce_concat", "dhe", "robe", "tensor_train", "pq", "cce")
"""A method of each kind: those of Figure 4, and what the paper's authors have in their library."""
_OTHERS = "others"


def family_of(method: str) -> str:
    return next((name for name, methods in FAMILIES.items() if method in methods), FULL if method == FULL else _OTHERS)


def overview(curves: Sequence[Curve]) -> list[Curve]:
    """Of each method in `OVERVIEW` that was run, the entry that was run first."""
    firsts = {curve.method: curve for curve in reversed(curves)}
    return [firsts[method] for method in OVERVIEW if method in firsts]


def panels(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Title → curves that are drawn together: a family, or a part of one that is too large for a panel."""
    found: dict[str, list[Curve]] = {}
    for family, members in _by_family(curves).items():
        parts = in_panels(members)
        for number, part in enumerate(parts, start=1):
            found[family if len(parts) == 1 else f"{family}, {number} of {len(parts)}"] = list(part)
    return found


def _by_family(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {family: [] for family in (*FAMILIES, _OTHERS, FULL)}
    for curve in curves:
        groups[family_of(curve.method)].append(curve)
    return {family: members for family, members in groups.items() if members}
