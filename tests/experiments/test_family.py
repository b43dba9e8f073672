"""Every method has its place, and no panel too many curves."""

from collections import Counter

from tests.support.experiment_results import results, row
from torchrec_cce.experiments.chart import MAX_SERIES
from torchrec_cce.experiments.curve import curves_of
from torchrec_cce.experiments.family import FAMILIES, OVERVIEW, family_of, overview, panels
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
