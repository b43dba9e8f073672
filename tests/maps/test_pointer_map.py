"""Maps: sizes, digests, versions, and the file they live in."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from torchrec_cce.errors import ConfigError, MapFileError, MapMismatchError
from torchrec_cce.maps.files import read_pointer_map, write_pointer_map
from torchrec_cce.maps.pointer_map import PointerMap


def hashed(num_ids: int = 1000, seed: int = 3) -> PointerMap:
    return PointerMap.hashed(num_ids=num_ids, num_columns=4, num_rows=50, seed=seed)


def clustered(dtype: type = np.uint8) -> PointerMap:
    start = hashed()
    pointers = np.random.default_rng(0).integers(0, 50, (1000, 4)).astype(dtype)
    return start.clustered(pointers, start.next_helper_hash(1))


def test_unclustered_map_computes_its_pointers() -> None:
    pointer_map = hashed()
    assert pointer_map.nbytes == 0
    assert isinstance(pointer_map.pointers, pa.FixedSizeListArray)
    codes = pointer_map.codes(np.arange(1000))
    assert codes.shape == (4, 2, 1000)
    np.testing.assert_array_equal(pointer_map.pointers.values.to_numpy().reshape(1000, 4).T, codes[:, 0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_clustered_map_stores_its_pointers(dtype: type) -> None:
    pointer_map = clustered(dtype)
    assert pointer_map.version == 1
    assert pointer_map.nbytes == 4000 * np.dtype(dtype).itemsize
    assert pointer_map.stored_view.dtype == dtype
    np.testing.assert_array_equal(pointer_map.codes(np.arange(1000))[:, 0].T, pointer_map.stored_view)


def test_every_version_has_a_fresh_helper_hash() -> None:
    first = hashed()
    second = first.clustered(clustered().stored_view, first.next_helper_hash(1))
    third = second.clustered(second.stored_view, second.next_helper_hash(1))
    helpers = {m.helper_hash.multipliers.tobytes() for m in (first, second, third)}
    assert len(helpers) == 3


def test_digest_covers_all_that_decides_a_lookup() -> None:
    one = clustered()
    same = hashed().clustered(one.stored_view.copy(), one.helper_hash)
    flipped = one.stored_view.copy()
    flipped[999, 3] ^= 1
    others = [
        hashed(),
        hashed(seed=4),
        hashed(num_ids=1001),
        hashed().clustered(flipped, one.helper_hash),
        hashed().clustered(one.stored_view, hashed().next_helper_hash(2)),
        clustered(np.uint16),
    ]
    assert one.digest == same.digest
    assert len({one.digest, *(m.digest for m in others)}) == 1 + len(others)


def test_a_slice_of_a_larger_arrow_array_is_read_in_place() -> None:
    flat = pa.array(np.arange(40, dtype=np.uint8))
    stored = pa.FixedSizeListArray.from_arrays(flat, 4)[3:8]
    base = PointerMap.hashed(num_ids=5, num_columns=4, num_rows=50, seed=0)
    sliced = PointerMap(num_ids=5, codebook_hash=base.codebook_hash, helper_hash=base.helper_hash, stored=stored)
    assert sliced.stored_view[0].tolist() == [12, 13, 14, 15]


def test_wrong_pointers_are_refused() -> None:
    start = hashed()
    with pytest.raises(ConfigError, match=r"50 is not in 0\.\.49"):
        start.clustered(np.full((1000, 4), 50, np.uint8), start.helper_hash)
    with pytest.raises(ConfigError, match="length 999"):
        start.clustered(np.zeros((999, 4), np.uint8), start.helper_hash)
    with pytest.raises(MapMismatchError, match=r"1000 IDs, 4 columns, 50 rows.* 7 IDs"):
        PointerMap.hashed(num_ids=7, num_columns=4, num_rows=50, seed=0).check_sizes(
            table="t", num_ids=1000, num_columns=4, num_rows=50
        )


def test_copies_share_and_pickles_keep_a_map() -> None:
    one = clustered()
    assert copy.deepcopy(one) is one
    assert pickle.loads(pickle.dumps(one)).digest == one.digest


@pytest.mark.parametrize("one", [hashed(), clustered(), clustered(np.uint32)], ids=["hashed", "uint8", "uint32"])
def test_file_round_trip_is_a_memory_map(one: PointerMap, tmp_path: Path) -> None:
    write_pointer_map(tmp_path / "t.arrow", one)
    allocated = pa.total_allocated_bytes()
    back = read_pointer_map(tmp_path / "t.arrow")
    assert (back.digest, back.version, back.nbytes) == (one.digest, one.version, one.nbytes)
    assert pa.total_allocated_bytes() - allocated < 4096
    assert [p.name for p in tmp_path.iterdir()] == ["t.arrow"]


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    write_pointer_map(path, clustered())
    good = path.read_bytes()
    start = good.index(clustered().stored_view[:4].tobytes())
    for at in (start, start + 1999, start + 3999):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(MapFileError, match="digest"):
            read_pointer_map(path)


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    write_pointer_map(path, clustered())
    good = path.read_bytes()
    for length in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(MapFileError, match=r"t\.arrow"):
            read_pointer_map(path)
    with pa.ipc.new_file(str(path), pa.schema([("x", pa.int8())])):
        pass
    with pytest.raises(MapFileError, match="not a pointer map"):
        read_pointer_map(path)
    with pytest.raises(FileNotFoundError):
        read_pointer_map(tmp_path / "absent.arrow")


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    write_pointer_map(path, clustered())
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from torchrec_cce.atomic import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(path)], check=False).returncode == -9
    assert read_pointer_map(path).digest == clustered().digest
