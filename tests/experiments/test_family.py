"""Every method has its place, no panel has too many curves, and which CCE entries are strategies."""

from collections import Counter

from tests.support.experiment_results import results, row
from torchrec_cce.charts.chart import MAX_SERIES
from torchrec_cce.experiments.curve import curves_of
from torchrec_cce.experiments.quality_charts import FAMILIES, OVERVIEW, family_of, overview, panels, strategies_of
from torchrec_cce.methods.registry import METHODS


def test_every_method_is_of_one_family() -> None:
    members = Counter(method for methods in FAMILIES.values() for method in methods)
    assert members == Counter(method for method in METHODS if method != "full")
    assert set(OVERVIEW) <= set(METHODS)
    assert len(OVERVIEW) <= MAX_SERIES
    assert (family_of("pq"), family_of("full"), family_of("new")) == (
        "pointers learned after training",
        "full",
        "others",
    )


def test_a_large_family_has_several_panels() -> None:
    rows = [row("cce", name=f"cce {number}", cap=8000) for number in range(MAX_SERIES + 1)]
    curves = curves_of(results(row("dhe", cap=8000), *rows, row("new", cap=8000, config="{}")).trials)
    found = panels(curves)
    assert {title: len(members) for title, members in found.items()} == {
        "quotients and computed tables": 1,
        "CCE, 1 of 2": 5,
        "CCE, 2 of 2": 4,
        "others": 1,
    }
    assert [curve.name for curve in overview(curves)] == ["dhe", "cce 0"]


def cce(name: str, ct: int, cf: int, **changes: object) -> dict[str, object]:
    section = {name: changes.pop(name) for name in ("helper_init", "rest") if name in changes}
    return row("cce", name=name, cap=8000, recluster={"ct": ct, "cf": cf, **section}, **changes)


def test_entries_that_differ_in_their_clusterings_alone() -> None:
    rows = [
        cce("late", 2, 200, source="full-seed0"),
        cce("early", 1, 50, seed=3, learning_rate=0.1, source="full-seed3"),
        cce("not derived", 1, 50),
        cce("wide", 2, 200, embedding={"num_columns": 8}),
        row("ce_concat", cap=8000),
    ]
    (group,) = strategies_of(curves_of(results(*rows).trials))
    assert list(group.curves) == ["ct=1 cf=50", "ct=2 cf=200"]
    assert [curve.name for curve in group.curves.values()] == ["early", "late"]
    assert group.title == "2 ways to cluster early"


def test_other_settings_of_clusterings_are_named_where_they_differ() -> None:
    rows = [cce("a", 2, 100), cce("b", 2, 100, helper_init="residual"), cce("c", 2, 100, helper_init="residual")]
    (group,) = strategies_of(curves_of(results(*rows).trials))
    assert list(group.curves) == [
        "ct=2 cf=100 helper_init=None",
        "ct=2 cf=100 helper_init=residual (b)",
        "ct=2 cf=100 helper_init=residual (c)",
    ]


def test_many_are_drawn_apart() -> None:
    rows = [cce(str(ct), ct, 10) for ct in range(MAX_SERIES + 2)]
    first, second = strategies_of(curves_of(results(*rows).trials))
    assert (len(first.curves), len(second.curves)) == (5, 5)


def test_one_entry_is_no_comparison() -> None:
    assert strategies_of(curves_of(results(cce("a", 2, 100)).trials)) == []
