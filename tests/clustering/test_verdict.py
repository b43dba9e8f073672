"""Verdicts on pointers that were made to deserve them."""

import numpy as np
import pytest

from torchrec_cce.clustering.entropy import (
    Verdict,
    h1_share,
    h2_gain,
    learned_share,
    pointer_entropies,
    random_entropies,
    verdict,
)
from torchrec_cce.clustering.settings import MIN_H1, MIN_H2_GAIN, MIN_LEARNED
from torchrec_cce.jobs.recluster.gates import TableFigures, judge
from torchrec_cce.jobs.recluster.thresholds import Thresholds

IDS, ROWS = 50_000, 64


def learned(rng: np.random.Generator, skew: float = 1.0) -> np.ndarray:
    """[n, 3] uint8: independent columns, some rows more wanted than others."""
    weights = np.arange(1, ROWS + 1) ** -skew
    return rng.choice(ROWS, size=(IDS, 3), p=weights / weights.sum()).astype(np.uint8)


def judged(pointers: np.ndarray, pq: np.ndarray | None = None) -> Verdict:
    return verdict(
        pointer_entropies(pointers, ROWS),
        random_entropies(IDS, ROWS, 3),
        num_ids=IDS,
        num_rows=ROWS,
        pq=None if pq is None else pointer_entropies(pq, ROWS),
    )


def test_hashes_and_learned_pointers() -> None:
    rng = np.random.default_rng(0)
    assert judged(rng.integers(ROWS, size=(IDS, 3)).astype(np.uint8)) == "as random as a hash"
    assert judged(learned(rng)) == "learned"


def test_one_row_has_nearly_all_or_a_column_is_that_of_another() -> None:
    rng = np.random.default_rng(0)
    few, copied = learned(rng), learned(rng)
    few[rng.random(IDS) < 0.9, 1] = 0
    copied[:, 2] = (copied[:, 0] + 1) % ROWS  # Appendix G: a permutation of another column
    assert judged(few) == "collapsed"
    assert judged(copied) == "collapsed"
    assert judged(copied, pq=copied) == "collapsed"


def test_beside_product_quantization() -> None:
    rng = np.random.default_rng(0)
    usual = learned(rng)
    assert judged(usual, pq=learned(rng)) == "like PQ"
    assert judged(usual, pq=learned(rng, skew=0.3)) == "less even than PQ"
    assert judged(learned(rng, skew=0.3), pq=usual) == "more even than PQ"


def test_figures_by_hand() -> None:
    assert h1_share((2.0, 3.0), num_ids=1000, num_rows=8) == pytest.approx(2 / np.log(8))
    assert h1_share((0.5,), num_ids=2, num_rows=8) == pytest.approx(0.5 / np.log(2))
    assert h2_gain((2.0, 3.0), (2.0, 4.0), num_ids=1000) == pytest.approx(0.5)
    assert h2_gain((2.0, 2.1), (2.0, 4.0), num_ids=10) == pytest.approx(0.1 / (np.log(10) - 2))
    assert learned_share((1.9, 3.9), (2.0, 4.0), num_ids=1000, num_rows=8) == pytest.approx(0.05)


def test_what_says_nothing_closes_nothing() -> None:
    assert h1_share((0.0,), num_ids=9, num_rows=1) == "one row or one ID"
    assert h2_gain((1.0,), (2.0,), num_ids=9) == "one column"
    assert h2_gain((2.0, 2.0), (2.0, 2.02), num_ids=9) == "one column tells the IDs apart"
    assert learned_share((1.0,), (1.0,), num_ids=9, num_rows=8) == "few IDs a row"
    assert verdict((0.0,), (0.0,), num_ids=1, num_rows=1) == "learned"
    assert verdict((float("nan"),), (1.0,), num_ids=100, num_rows=8) == "collapsed"


def test_gates_are_by_the_same_limits() -> None:
    limits = Thresholds()
    assert (limits.min_h1, limits.min_h2_gain, limits.min_learned) == (MIN_H1, MIN_H2_GAIN, MIN_LEARNED)
    rng = np.random.default_rng(0)
    pointers = [rng.integers(ROWS, size=(IDS, 3)).astype(np.uint8), learned(rng), learned(rng, skew=3.0)]
    for each in pointers:
        one = TableFigures(
            table="t",
            num_ids=IDS,
            num_columns=3,
            num_rows=ROWS,
            generation=1,
            entropies=pointer_entropies(each, ROWS),
            error=0.1,
            parent_error=0.1,
            variance=1.0,
            churn=0.0,
            unseen=None,
        )
        closed = {gate.threshold for gate in judge([one], limits) if not gate.passed}
        assert (judged(each) == "learned") == (not closed)
        assert (judged(each) == "collapsed") == bool(closed & {"min_h1", "min_h2_gain"})
