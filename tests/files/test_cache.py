"""Files without a name, in the cache folder and elsewhere."""

from pathlib import Path

import numpy as np
import pytest

from torchrec_cce.files import cache
from torchrec_cce.files.cache import scratch_array, scratch_copy, scratch_file


def test_an_array_is_zero_can_be_written_and_leaves_nothing(tmp_path: Path) -> None:
    array = scratch_array(tmp_path / "new", (1000, 3), np.uint16)
    assert (array.shape, array.dtype, array.any()) == ((1000, 3), np.uint16, False)
    array[7] = 1, 2, 3
    assert array.sum() == 6
    assert not list((tmp_path / "new").iterdir())


def test_more_than_the_disk_has_is_an_error_that_names_bytes_and_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"{1 << 60} bytes are needed there: .*{tmp_path.name}"):
        scratch_file(tmp_path, 1 << 60)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [0, 1, 10, 11])
def test_a_copy_is_of_its_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_COPIED_BYTES", 5 * 8)
    array = np.arange(1, length + 1)
    copy = scratch_copy(array)
    array[:] = 0
    np.testing.assert_array_equal(copy, np.arange(1, length + 1))
    assert copy.dtype == np.int64
    assert not list(tmp_path.glob("cache/live/*"))
