"""Entropies of entries beside those of a hash and of product quantization with the same pointers."""

import json

import numpy as np
import pytest

from tests.support.experiment_results import results, row
from torchrec_cce.clustering.entropy import random_entropies
from torchrec_cce.experiments.collapse import Collapse, collapses
from torchrec_cce.experiments.curve import curves_of


def found(*rows: dict[str, object]) -> dict[str, Collapse]:
    return {one.name: one for one in collapses(curves_of(results(*rows).trials))}


def test_product_quantization_with_as_many_rows_stands_beside() -> None:
    usual = [0.9, 0.92, 0.95, 0.97]
    one = found(
        row("cce", cap=8000, learned=[0.88, 0.9, 0.95, 0.97]),
        row("cce", cap=8000, seed=1, learned=usual),
        row("pq", cap=4000, learned=usual),  # k·d of its parameters are k rows; CCE has 2·k·d
        row("pq", name="pq, then trained", cap=4000, learned=[0.5, 0.5, 0.5, 0.5]),
        row("pq", name="pq, larger", cap=8000),
        row("ce_concat", cap=8000, learned=[]),
    )
    random = random_entropies(100_000, 250, 4)
    assert list(one) == ["cce", "pq", "pq, then trained", "pq, larger"]
    cce = one["cce"]
    assert cce.random == pytest.approx(random)
    assert cce.entropies == pytest.approx(np.array(random) * [0.89, 0.91, 0.95, 0.97])
    assert cce.pq == pytest.approx(np.array(random) * usual)
    assert cce.verdict == "like PQ"
    assert cce.runs == ("cce-8000-0", "cce-8000-1")
    assert cce.pq_runs == ("pq-4000-0",)
    assert (one["pq"].pq, one["pq"].verdict) == (None, "learned")


@pytest.mark.parametrize(
    ("learned", "verdict"),
    [
        ([1.0, 1.0, 1.0, 1.0], "as random as a hash"),
        ([0.4, 0.8, 0.9, 0.9], "collapsed"),
        ([0.9, 0.49, 0.9, 0.9], "collapsed"),
        ([0.8, 0.8, 0.9, 0.9], "learned"),
    ],
)
def test_verdicts(learned: list[float], verdict: str) -> None:
    assert found(row("cce", cap=8000, learned=learned))["cce"].verdict == verdict


def test_circular_clustering_is_no_product_quantization() -> None:
    circular = row("pq", name="circular", cap=4000)
    circular["config"] = json.dumps(json.loads(str(circular["config"])) | {"derive": {"circular": True, "run": "full"}})
    one = found(row("cce", cap=8000), circular)
    assert one["cce"].pq is None
    assert "circular" in one


def test_without_table_sizes_there_is_no_verdict() -> None:
    one = found(row("cce", cap=8000, config="{}"))["cce"]
    assert (one.table, one.verdict) == (None, None)
