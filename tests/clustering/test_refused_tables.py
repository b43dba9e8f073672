"""What cannot be clustered is refused, before anything is done."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.cce_tables import Table, recluster
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import ClusteringError, ConfigError

pytest.importorskip("faiss")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_is_an_error_before_anything_is_done(value: float) -> None:
    table = Table.random(n=100)
    table.weights[2, 1, 7, 0] = value
    table.weights[2, 1, 8, 3] = value

    def fail(_: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        raise AssertionError("asked for codes first")

    options: dict[str, Any] = {"old_codes": fail, "new_helper_codes": fail, "pointer_dtype": np.uint8, "seed": 0}
    with pytest.raises(ClusteringError, match=r"2 of 240 values of weights .* column 2, helper row 7"):
        recluster(weights=table.weights, num_ids=100, **options)
    table.row_states["sum"][0, 0, 3] = value
    table.weights[...] = 0
    with pytest.raises(ClusteringError, match=r"1 of 60 values of row_states\['sum'\] .* column 0, codebook row 3"):
        recluster(weights=table.weights, num_ids=100, row_states=table.row_states, **options)


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        (np.zeros(100), "all 100 frequencies are zero"),
        (np.arange(100) - 2, "2 of 100 frequencies are negative"),
        (np.full(100, np.nan), "100 of 100 frequencies are negative, NaN"),
        (np.ones(99), r"shape \[99\], not \[100\]"),
        (np.ones((100, 1)), r"shape \[100, 1\], not \[100\]"),
    ],
)
def test_frequencies_that_cannot_be(frequencies: npt.NDArray[np.float64], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Table.random(n=100).recluster(frequencies=frequencies)


@pytest.mark.parametrize(
    ("dtype", "message"), [(np.int64, "not an unsigned"), (np.uint8, "pass pointer_dtype='uint16'")]
)
def test_pointer_dtypes_that_cannot_be(dtype: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Table.random(n=10, k=257).recluster(dtype=dtype)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((3, 2, 10), 10), r"codes 10\.\.10, outside 0\.\.9"),
        (np.full((3, 2, 10), -1), r"codes -1\.\.-1"),
        (np.zeros((3, 10), np.int64), r"not int64 \[3, 2, 10\]"),
        (np.zeros((3, 2, 10), np.int32), "int32"),
    ],
)
def test_codes_that_cannot_be(codes: npt.NDArray[np.int64], message: str) -> None:
    table = Table.random(n=10)
    with pytest.raises(ConfigError, match=f"old_codes returned .*{message}"):
        recluster(
            weights=table.weights,
            num_ids=10,
            old_codes=lambda _: codes,
            new_helper_codes=lambda ids: table.helper_codes[:, ids],
            pointer_dtype=np.uint8,
            seed=0,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.zeros((3, 3, 10, 4), np.float32)}, r"not \[c, 2, k, w\]"),
        ({"weights": np.zeros((3, 2, 10, 4))}, "weights are float64"),
        ({"row_states": {"m": np.zeros((3, 2, 9), np.float32)}}, r"row_states\['m'\] are float32 \[3, 2, 9\]"),
        ({"num_ids": 0}, "num_ids=0"),
    ],
)
def test_tables_that_cannot_be(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "weights": np.zeros((3, 2, 10, 4), np.float32),
        "num_ids": 5,
        "old_codes": lambda ids: np.zeros((3, 2, len(ids)), np.int64),
        "new_helper_codes": lambda ids: np.zeros((3, len(ids)), np.int64),
        "pointer_dtype": np.uint8,
        "seed": 0,
    }
    with pytest.raises(ConfigError, match=message):
        recluster(**(arguments | change))


@pytest.mark.parametrize("name", ["points_per_centroid", "num_iterations", "chunk_size", "num_threads"])
def test_config_refuses_what_is_not_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0"):
        ReclusterConfig(**{name: 0})


def test_config_refuses_another_helper() -> None:
    with pytest.raises(ConfigError, match="helper_init='mean' is not one of"):
        ReclusterConfig(helper_init="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="backend='torch' is not one of"):
        ReclusterConfig(backend="torch")  # type: ignore[arg-type]
