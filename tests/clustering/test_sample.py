"""The IDs that k-means trains on: spread over all of them, or as frequent as they are in the log."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cce.clustering import sample as sample_module
from torchrec_cce.clustering.sample import Frequencies, training_sample


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), num_ids=st.integers(1, 10**12), max_ids=st.integers(1, 500))
def test_sample_without_frequencies_is_distinct_and_spread(seed: int, num_ids: int, max_ids: int) -> None:
    if num_ids > max_ids:
        ids, weights = training_sample(num_ids, max_ids, frequencies=None, seed=seed)
        assert len(ids) == max_ids
        assert (np.diff(ids) > 0).all()
        np.testing.assert_array_equal(ids * max_ids // num_ids - np.arange(max_ids) <= 1, True)
    else:
        ids, weights = training_sample(num_ids, max_ids, frequencies=None, seed=seed)
        np.testing.assert_array_equal(ids, np.arange(num_ids))
    assert ids[0] >= 0
    assert ids[-1] < num_ids
    np.testing.assert_array_equal(weights, 1)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), num_ids=st.integers(1, 300), max_ids=st.integers(1, 300))
def test_sample_is_proportional_to_frequency(seed: int, num_ids: int, max_ids: int) -> None:
    frequencies = np.random.default_rng(seed).integers(0, 5, num_ids).astype(np.float64)
    frequencies[-1] = 1
    ids, weights = training_sample(num_ids, max_ids, frequencies=Frequencies(frequencies, num_ids), seed=seed)
    assert len(ids) <= max_ids
    assert (np.diff(ids) > 0).all()
    assert (frequencies[ids] > 0).all()
    if np.count_nonzero(frequencies) <= max_ids:
        np.testing.assert_array_equal(weights, frequencies[ids])
    else:
        assert weights.sum() == max_ids
        # One draw in each range: a count is never two away from its expectation.
        assert (np.abs(weights - frequencies[ids] / frequencies.sum() * max_ids) < 2).all()


def test_frequencies_of_many_chunks_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, 1000)
    counts[:130], counts[-200:] = 0, 0
    np.save(tmp_path / "counts.npy", counts)
    mapped = np.load(tmp_path / "counts.npy", mmap_mode="r")
    monkeypatch.setattr(sample_module, "_CHUNK", 64)
    frequencies = Frequencies(mapped, 1000)
    assert (frequencies.total, frequencies.num_seen) == (counts.sum(), np.count_nonzero(counts))
    shares = np.sort(np.append(rng.random(5000), [0.0, np.nextafter(1, 0), 1.0]))
    expected = np.searchsorted(np.cumsum(counts), np.minimum(shares * counts.sum(), counts.sum() - 1e-9), side="right")
    np.testing.assert_array_equal(frequencies.at(shares), expected)
    np.testing.assert_array_equal(frequencies.seen()[0], np.flatnonzero(counts))
