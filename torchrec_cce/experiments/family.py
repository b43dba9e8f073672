"""What is drawn together, so that a panel can be read: families of methods, and strategies for CCE.

Strategies are CCE entries that differ in nothing but when and how they are clustered (Appendix E).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchrec_cce.charts.chart import in_panels
from torchrec_cce.experiments.curve import FULL, Curve
from torchrec_cce.methods.registry import FAMILIES

OVERVIEW = ("hashing_trick", "hash_embeddings", "ce_concat", "dhe", "robe", "tensor_train", "pq", "cce")
"""A method of each kind: those of Figure 4, and what the paper's authors have in their library."""
_OTHERS = "others"
_VARYING = {"embedding": "max_parameters", "optimizer": "embedding_learning_rate", "derive": "run"}
"""Section → what differs from trial to trial of one entry."""


@dataclass(frozen=True, kw_only=True)
class Strategies:
    """CCE entries that may be compared for their clusterings."""

    title: str
    curves: dict[str, Curve]
    """`ct` and `cf`, and what else differs among the entries → curve; no more than a panel holds."""


def family_of(method: str) -> str:
    """The name of the family that a method belongs to."""
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


def strategies_of(curves: Sequence[Curve]) -> list[Strategies]:
    """Groups of two entries or more whose configurations are equal but for `[recluster]`, by `ct` and `cf`."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        if curve.method == "cce":
            groups.setdefault(_what_else(curve), []).append(curve)
    found = []
    for members in groups.values():
        if len(members) < 2:
            continue
        members.sort(key=lambda curve: (_section(curve).get("ct", 0), _section(curve).get("cf", 0)))
        title = f"{len(members)} ways to cluster {members[0].name}"
        named = list(zip(_names(members), members, strict=True))
        found += [Strategies(title=title, curves=dict(part)) for part in in_panels(named)]
    return found


def _by_family(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {family: [] for family in (*FAMILIES, _OTHERS, FULL)}
    for curve in curves:
        groups[family_of(curve.method)].append(curve)
    return {family: members for family, members in groups.items() if members}


def _section(curve: Curve) -> dict[str, Any]:
    section: dict[str, Any] = curve.points[0].first.config.get("recluster", {})
    return section


def _what_else(curve: Curve) -> str:
    """The configuration without its clusterings, and without what differs from trial to trial of one entry."""
    config = {name: value for name, value in curve.points[0].first.config.items() if name not in ("recluster", "seed")}
    for section, varying in _VARYING.items():
        values = config.get(section)
        if values is not None:
            config[section] = {name: value for name, value in values.items() if name != varying}
    return json.dumps(config, sort_keys=True)


def _names(members: Sequence[Curve]) -> list[str]:
    sections = [_section(curve) for curve in members]
    every = {name for section in sections for name in section}
    differing = sorted(name for name in every if len({json.dumps(section.get(name)) for section in sections}) > 1)
    shown = ["ct", "cf", *(name for name in differing if name not in ("ct", "cf"))]
    names = [" ".join(f"{name}={section.get(name)}" for name in shown) for section in sections]
    # Two entries with one section, say of a repeated experiment, keep their own names.
    return [
        name if names.count(name) == 1 else f"{name} ({curve.name})" for name, curve in zip(names, members, strict=True)
    ]
