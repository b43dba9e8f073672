"""Which CCE entries may be compared for their clusterings."""

from tests.support.experiment_results import results, row
from torchrec_cce.experiments.chart import MAX_SERIES
from torchrec_cce.experiments.curve import curves_of
from torchrec_cce.experiments.strategy import strategies_of


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
