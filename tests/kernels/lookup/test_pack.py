"""Words of raw IDs, of all kinds of tables in one pass, against plain numpy."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.lookup_references import reference_words
from torchrec_cce.hashing import UniversalHash
from torchrec_cce.kernels.lookup.layout import Layout
from torchrec_cce.kernels.lookup.lookup import Lookup
from torchrec_cce.kernels.lookup.pack import Codes, Packer
from torchrec_cce.maps.pointer_format import PointerFormat


def packed(
    packer: Packer, ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64], num_words: int, num_threads: int = 1
) -> tuple[npt.NDArray[np.uint64], tuple[int, int]]:
    words = np.full((num_words, len(ids)), 7, np.uint64)
    return words, Lookup(Layout.of([]), packer).pack(ids, bounds, words, num_threads=num_threads)


@given(
    num_columns=st.integers(1, 32),
    bits=st.sampled_from([4, 8, 16, 32]),
    clustered=st.booleans(),
    num_hashes=st.integers(0, 2),
    dtype=st.sampled_from([np.int32, np.int64]),
    seed=st.integers(0, 2**32),
)
def test_words_equal_the_reference(
    num_columns: int, bits: int, clustered: bool, num_hashes: int, dtype: type, seed: int
) -> None:
    """A full table, the table of these sizes on two features, and its hashes alone."""
    rng = np.random.default_rng(seed)
    bits = max(bits, 8) if num_columns == 1 else bits
    num_ids, num_rows = int(rng.integers(1, 3000)), int(rng.integers(1, min(2**bits, 2**20) + 1))
    codes = rng.integers(0, num_rows, (num_ids, num_columns))
    form = PointerFormat(num_columns=num_columns, bits=bits)
    pointers = np.ascontiguousarray(form.encode(codes)) if clustered else None
    hashes = [UniversalHash.from_seed(seed + i, num_columns=num_columns, num_rows=num_rows) for i in range(num_hashes)]
    is_code = not clustered and not hashes
    packer = Packer(
        [
            Codes(source=0, first_word=0, bits=64, num_ids=num_ids),
            *(
                Codes(source=source, first_word=1, bits=bits, num_ids=num_ids, pointers=pointers, hashes=hashes)
                for source in (0, 1)
            ),
        ]
    )
    bounds = np.cumsum([0, *rng.integers(0, 200, 2)])
    ids = rng.integers(0, num_ids, bounds[-1]).astype(dtype)
    terms = [codes[ids].T] * clustered + [each.numpy(ids.astype(np.int64)).T for each in hashes]
    expected = ids[None].astype(np.uint64) if is_code else reference_words(np.stack(terms), bits)
    words, outside = packed(packer, ids, bounds, 1 + len(expected))
    assert outside == (-1, -1)
    np.testing.assert_array_equal(words[1:], expected)
    np.testing.assert_array_equal(words[0, : bounds[1]], ids[: bounds[1]])
    assert (words[0, bounds[1] :] == 7).all()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("bad_id", [-1, 100, 2**63 - 1, -(2**63)])
def test_first_id_outside_is_reported(bad_id: int, num_threads: int) -> None:
    hashes = [UniversalHash.from_seed(0, num_columns=4, num_rows=9)]
    pointers = np.zeros((100, 4), np.uint8)
    kinds: list[dict[str, object]] = [{}, {"hashes": hashes}, {"pointers": pointers, "hashes": hashes}]
    for number, kind in enumerate(kinds):
        features = [
            Codes(source=i, first_word=0, bits=8 if kind else 64, num_ids=100, **kind)  # type: ignore[arg-type]
            for i in range(4)
        ]
        ids, bounds = np.arange(8000) % 100, np.arange(5) * 2000
        ids[[2000 + 17, 2000 + 39, 7999]] = bad_id
        _, outside = packed(Packer(features), ids, bounds, 2, num_threads)
        assert outside == (1, 17), number


def test_a_table_of_any_id() -> None:
    hashes = [UniversalHash.from_seed(0, num_columns=4, num_rows=9)]
    ids = np.array([-1, 2**63 - 1, -(2**63), 0])
    packer = Packer([Codes(source=0, first_word=0, bits=8, num_ids=None, hashes=hashes)])
    words, outside = packed(packer, ids, np.array([0, 4]), 1)
    assert outside == (-1, -1)
    np.testing.assert_array_equal(words, reference_words(hashes[0].numpy(ids).T[None], 8))
