"""BCE and AUC against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from torchrec_cce.training.metrics import quality

ROWS = st.lists(st.tuples(st.integers(-40, 40), st.booleans()), min_size=1, max_size=300)


@given(rows=ROWS, scale=st.sampled_from([0.01, 0.1, 0.5]))
def test_equals_scikit_learn(rows: list[tuple[int, bool]], scale: float) -> None:
    """Integers make ties."""
    logits = np.array([logit for logit, _ in rows]) * scale
    labels = np.array([label for _, label in rows]).astype(np.float32)
    assume(0 < labels.sum() < len(labels))
    found = quality(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    assert found.rows == len(rows)
    assert found.auc == pytest.approx(roc_auc_score(labels, logits), abs=1e-6)
    assert found.bce == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits))), rel=1e-6, abs=1e-6)


def test_a_million_rows() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(1_000_000) < 0.03).astype(np.float32)
    logits = (rng.standard_normal(len(labels)) + 0.7 * labels).astype(np.float32)
    found = quality(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found.auc == pytest.approx(roc_auc_score(labels, logits), abs=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 5])
def test_one_class_has_no_auc(label: float, rows: int) -> None:
    found = quality(torch.linspace(-1, 1, rows), torch.full((rows,), label))
    assert math.isnan(found.auc)
    assert math.isfinite(found.bce)


def test_a_model_that_diverged_has_neither() -> None:
    found = quality(torch.tensor([0.5, torch.nan, 1.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert math.isnan(found.auc)
    assert math.isnan(found.bce)


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows to evaluate"):
        quality(torch.empty(0), torch.empty(0))
