import numpy as np
import pytest

from torchrec_cce.experiments.theory import factorize

pytest.importorskip("faiss")


def test_sparse_times_dense_is_near_the_matrix() -> None:
    rng = np.random.default_rng(0)
    centres, groups = rng.standard_normal((6, 5)).astype(np.float32), rng.integers(0, 6, 300)
    matrix = centres[groups] + rng.normal(0, 0.01, (300, 5)).astype(np.float32)
    factors = factorize(matrix, 6, seed=3)
    assert factors.sparse.shape == (300, 6)
    np.testing.assert_array_equal(np.diff(factors.sparse.indptr), 1)
    np.testing.assert_array_equal(factors.sparse.data, 1)
    np.testing.assert_array_equal(factors.product(), factors.dense[factors.sparse.indices])
    assert np.abs(factorize(matrix, 40, seed=3).product() - matrix).max() < 0.1
