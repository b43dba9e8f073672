"""Product and residual quantization against what they are by definition, and the collapse of circular clustering."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.quantize import Quantized, quantize
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import ClusteringError, ConfigError

SETTINGS = ReclusterConfig(num_iterations=10)


def points(n: int = 2000, d: int = 8, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def rebuilt(found: Quantized) -> npt.NDArray[np.float32]:
    """[n, d]: what pointers and words say, one ID at a time."""
    n, c, t = found.pointers.shape
    return np.stack(
        [
            np.concatenate([sum(found.codewords[j, p, found.pointers[i, j, p]] for p in range(t)) for j in range(c)])
            for i in range(n)
        ]
    )


@given(
    num_columns=st.sampled_from([1, 2, 4]),
    num_terms=st.integers(1, 3),
    num_rows=st.sampled_from([1, 3, 16, 300]),
    n=st.integers(1, 150),
    seed=st.integers(0, 1000),
)
def test_every_pointer_names_the_nearest_word_to_what_is_left(
    num_columns: int, num_terms: int, num_rows: int, n: int, seed: int
) -> None:
    embeddings = points(n, seed=seed)
    found = quantize(
        embeddings, num_columns=num_columns, num_terms=num_terms, num_rows=num_rows, seed=seed, settings=SETTINGS
    )
    left = embeddings.astype(np.float64).reshape(n, num_columns, -1)
    for p in range(num_terms):
        for j in range(num_columns):
            words, codes = found.codewords[j, p].astype(np.float64), found.pointers[:, j, p]
            distances = np.square(left[:, j, None] - words).sum(axis=2)
            used = np.unique(codes)
            chosen = distances[np.arange(n), codes]
            assert (chosen <= distances[:, used].min(axis=1) + 1e-5).all()
            left[:, j] -= words[codes]
    np.testing.assert_allclose(rebuilt(found), embeddings - left.reshape(n, -1), atol=1e-5)


def test_more_words_come_nearer() -> None:
    embeddings = points()
    errors = []
    for t in (1, 2, 3):
        found = quantize(embeddings, num_columns=1, num_terms=t, num_rows=16, seed=0, settings=SETTINGS)
        errors.append(np.square(rebuilt(found) - embeddings).mean())
    assert all(more < 0.9 * fewer for fewer, more in pairwise(errors))


def test_few_distinct_embeddings_are_kept_exactly() -> None:
    embeddings = np.repeat(points(5), 7, axis=0)
    found = quantize(embeddings, num_columns=2, num_terms=1, num_rows=9, seed=0, settings=SETTINGS)
    assert np.array_equal(rebuilt(found), embeddings)
    assert not found.codewords[:, :, 5:].any()


def test_circular_clustering_collapses() -> None:
    """Columns that have nothing to do with each other: product quantization's pointers neither, circular ones do,
    because two columns are clustered by what they have in common, the others."""
    embeddings = points(20_000)
    sizes = {"num_columns": 4, "num_terms": 1, "num_rows": 16, "seed": 0, "settings": SETTINGS}
    plain, circular = (quantize(embeddings, circular=one, **sizes) for one in (False, True))
    of_plain, of_circular = (
        pointer_entropies(found.pointers[:, :, 0].astype(np.uint8), 16) for found in (plain, circular)
    )
    assert of_plain[1] > 2 * of_plain[0] - 0.02  # independent
    assert of_circular[1] < 2 * of_circular[0] - 0.3
    assert of_circular[3] < of_plain[3] - 0.8
    means = np.stack([embeddings[circular.pointers[:, 0, 0] == code, :2].mean(axis=0) for code in range(16)])
    np.testing.assert_allclose(circular.codewords[0, 0], means, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_columns": 3, "num_terms": 1}, "num_columns=3 does not divide the 8 dimensions"),
        ({"num_columns": 1, "num_terms": 1, "circular": True}, "num_columns=1, num_terms=1: circular"),
        ({"num_columns": 2, "num_terms": 2, "circular": True}, "num_columns=2, num_terms=2: circular"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(points(), num_rows=4, seed=0, settings=SETTINGS, **sizes)


def test_nan_is_an_error() -> None:
    embeddings = points()
    embeddings[7, 3] = np.nan
    every = ReclusterConfig(points_per_centroid=500)
    with pytest.raises(ClusteringError, match="1 of 2000"):
        quantize(embeddings, num_columns=1, num_terms=1, num_rows=4, seed=0, settings=every)
