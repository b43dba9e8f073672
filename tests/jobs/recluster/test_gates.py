"""Gates on figures of pointers that are what they are meant to catch, and of pointers that are fine."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.errors import ConfigError
from torchrec_cce.jobs.recluster.gates import Gate, TableFigures, judge
from torchrec_cce.jobs.recluster.thresholds import Thresholds

N, K, C = 20_000, 50, 4
Pointers = npt.NDArray[np.uint16]


def random_pointers() -> Pointers:
    return np.random.default_rng(0).integers(0, K, (N, C)).astype(np.uint16)


def learned_pointers() -> Pointers:
    """Of clusters of unequal sizes."""
    shares = np.arange(1, K + 1) / np.arange(1, K + 1).sum()
    return np.random.default_rng(0).choice(K, (N, C), p=shares).astype(np.uint16)


def figures(pointers: Pointers, **changes: Any) -> TableFigures:
    good: dict[str, Any] = {
        "table": "t",
        "num_ids": len(pointers),
        "num_columns": pointers.shape[1],
        "num_rows": K,
        "generation": 3,
        "entropies": pointer_entropies(pointers, K),
        "error": 0.2,
        "parent_error": 0.3,
        "variance": 1.0,
        "churn": 0.4,
        "unseen": 0.1,
    }
    return TableFigures(**good | changes)


def closed(one: TableFigures, thresholds: Thresholds | None = None, **arguments: Any) -> set[str]:
    return {gate.threshold for gate in judge([one], thresholds or Thresholds(), **arguments) if not gate.passed}


def of(one: TableFigures, threshold: str) -> Gate:
    return next(gate for gate in judge([one], Thresholds()) if gate.threshold == threshold)


def test_a_good_clustering_passes() -> None:
    gates = judge([figures(learned_pointers())], Thresholds(), bce=(0.5, 0.501))
    assert all(gate.passed for gate in gates)
    assert [gate.value for gate in gates if gate.value is None] == []
    assert {gate.threshold for gate in gates} == set(vars(Thresholds()))


def test_pointers_of_a_hash_are_refused() -> None:
    assert closed(figures(random_pointers())) == {"min_learned"}


def test_all_ids_in_few_rows_is_a_collapse() -> None:
    assert closed(figures(learned_pointers() // 10)) == {"min_h1"}


@pytest.mark.parametrize("same", [2, 3, 4])
def test_columns_that_follow_from_each_other_are_a_collapse(same: int) -> None:
    """As in circular clustering: one column is another with its rows renumbered."""
    pointers = learned_pointers()
    for column in range(1, same):
        pointers[:, column] = np.random.default_rng(column).permutation(K)[pointers[:, 0]]
    assert closed(figures(pointers)) == {"min_h2_gain"}


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"error": 0.9, "parent_error": 0.95}, "max_error"),
        ({"error": 0.3, "parent_error": 0.28}, "max_objective_ratio"),
        ({"churn": 0.9}, "max_churn"),
        ({"unseen": 0.95}, "max_unseen"),
        ({"churn": math.nan}, "max_churn"),
    ],
)
def test_each_figure_has_its_gate(change: dict[str, float], gate: str) -> None:
    assert closed(figures(learned_pointers(), **change)) == {gate}


def test_validation() -> None:
    one = figures(learned_pointers())
    assert closed(one, bce=(0.5, 0.52)) == {"max_bce_ratio"}
    assert closed(one, bce=(0.5, math.nan)) == {"max_bce_ratio"}
    assert closed(one, Thresholds(max_bce_ratio=1.1), bce=(0.5, 0.52)) == set()


def test_a_threshold_is_itself_good_enough() -> None:
    one = figures(learned_pointers())
    value = of(one, "min_h1").value
    assert value is not None
    assert closed(one, Thresholds(min_h1=value, max_churn=0.4)) == set()
    assert closed(one, Thresholds(min_h1=math.nextafter(value, 1))) == {"min_h1"}


def test_what_says_nothing_closes_no_gate() -> None:
    first = figures(learned_pointers(), generation=1, churn=0.99, error=0.3, parent_error=0.1, unseen=None)
    assert closed(first) == set()
    notes = {gate.threshold: gate.note for gate in judge([first], Thresholds()) if gate.value is None}
    assert notes == {
        "max_objective_ratio": "first clustering",
        "max_churn": "first clustering",
        "max_unseen": "not counted",
        "max_bce_ratio": "no sample",
    }
    few = learned_pointers()[: 9 * K]
    assert of(figures(few), "min_learned").note == "few IDs a row"
    assert of(figures(few[:, :1]), "min_h2_gain").note == "one column"
    own = np.stack([np.random.default_rng(column).permutation(K) for column in range(C)], axis=1).astype(np.uint16)
    assert of(figures(own), "min_h2_gain").note == "one column tells the IDs apart"
    assert closed(figures(own)) == set()
    assert of(replace(figures(few * 0), num_rows=1), "min_h1").note == "one row or one ID"


def test_embeddings_that_their_words_give_exactly() -> None:
    """Clustered twice without training in between: rounding is no reason to refuse."""
    assert closed(figures(learned_pointers(), error=1e-15, parent_error=0.0, churn=0.0)) == set()


def test_thresholds_are_numbers() -> None:
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="min_h1="):
            Thresholds(min_h1=value)
