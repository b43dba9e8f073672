"""The files of a version: round trips, alignment, golden files, and whatever can be wrong with them."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.snapshots import assert_same, snapshot, tables
from torchrec_cce.errors import ConfigError, MapFileError
from torchrec_cce.maps import bundle
from torchrec_cce.maps.arrow_file import ALIGNMENT, numbers, read_array, write_array
from torchrec_cce.maps.bundle import read_folder, write_folder
from torchrec_cce.maps.manifest import MANIFEST, FileEntry, Manifest, Provenance
from torchrec_cce.maps.pointer_format import PointerFormat
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.sealed import seal, unseal
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary

GOLDEN = Path(__file__).parent / "golden"
PROVENANCE = Provenance(code_version="0.1.0", checkpoint="runs/first", config_digest="0" * 64)


def test_round_trip_is_a_memory_map(tmp_path: Path) -> None:
    written = tables()
    write_folder(tmp_path / "v", written, provenance=PROVENANCE)
    allocated = pa.total_allocated_bytes()
    manifest, back = read_folder(tmp_path / "v")
    assert pa.total_allocated_bytes() - allocated < 4096
    assert list(back) == list(written)
    for name, table in written.items():
        assert_same(back[name], table)
        assert manifest.tables[name].map_digest == table.pointer_map.digest
        # The digest that the manifest vouches for is the one that the mapped content has.
        again = PointerMap(**{f: getattr(back[name].pointer_map, f) for f in PointerMap.__dataclass_fields__})
        assert again.digest == table.pointer_map.digest
    weights = back["t_user"].weights
    assert weights is not None
    assert not weights.flags.writeable


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, np.float32])
def test_numbers_are_a_view(dtype: type) -> None:
    array = pa.array(np.arange(10).astype(dtype))
    for one in (array, array.slice(3, 4), array.slice(10), pa.array([], array.type)):
        view = numbers(one)
        assert view.dtype == dtype
        assert view.tolist() == one.to_pylist()
        assert len(one) == 0 or not view.flags.writeable
    assert numbers(array.slice(2)).ctypes.data == array.buffers()[1].address + 2 * np.dtype(dtype).itemsize


def test_opening_does_not_wait_for_pandas(tmp_path: Path) -> None:
    """Which pyarrow would import, if it is installed."""
    write_folder(tmp_path / "v", tables(), provenance=PROVENANCE)
    program = (
        "import sys; from pathlib import Path; from torchrec_cce.maps.bundle import read_folder\n"
        "maps = [one.pointer_map for one in read_folder(Path(sys.argv[1]))[1].values()]\n"
        "assert any(one.stored_view.any() for one in maps if one.stored is not None)\n"
        "assert 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "v"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@given(
    num_values=st.integers(0, 70),
    width=st.integers(1, 33),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32, np.int64, np.float32]),
    skip=st.integers(0, 5),
)
def test_any_array_begins_at_a_multiple_of_64_bytes(
    tmp_path_factory: pytest.TempPathFactory, num_values: int, width: int, dtype: Any, skip: int
) -> None:
    values = np.arange((num_values + skip) * width).astype(dtype)
    array = pa.FixedSizeListArray.from_arrays(pa.array(values), width)[skip:]
    path = tmp_path_factory.mktemp("aligned") / "a.arrow"
    with path.open("wb") as sink:
        write_array(sink, "name", array)
    back = read_array(path, "name", array.type, num_values)
    assert back.equals(array)
    if num_values:
        assert back.values.buffers()[1].address % ALIGNMENT == 0, (
            "a mapping begins at a page, so this is the file's offset"
        )


def test_writing_hands_on_small_pieces_of_the_callers_memory() -> None:
    """What bounds the memory of publishing: no sink ever sees, and so may copy, a whole map at once."""
    sizes = []
    array = pa.array(np.zeros(10 << 20, np.uint8))

    class Sink:
        def write(self, data: memoryview) -> None:
            sizes.append(len(data))

    allocated = pa.total_allocated_bytes()
    write_array(Sink(), "zeros", array)
    assert sum(sizes) > 10 << 20
    assert max(sizes) <= 4 << 20
    assert pa.total_allocated_bytes() - allocated < 1 << 20


def golden_tables() -> dict[str, Any]:
    return {"t_user": tables()["t_user"], "t/ключ": tables()["t/ключ"]}


def test_golden_version_of_format_2() -> None:
    """Written by the first reader's contemporary; every later one reads it, to the same lookups."""
    manifest, back = read_folder(GOLDEN / "format-2")
    assert (manifest.format, manifest.version, manifest.parent) == (2, 3, 2)
    assert manifest.created == datetime(2026, 11, 25, 12, 0, tzinfo=timezone.utc)
    assert manifest.provenance == PROVENANCE
    assert manifest.tables["t_user"].churn == 0.5
    for name, table in golden_tables().items():
        assert_same(back[name], table)
        assert back[name].pointer_map.version == 3
    known = back["t/ключ"].pointer_map
    ids = np.array([-1, 5, 10**12, 77])
    assert known.positions(ids).tolist() == [1, 3, 5, -1]


def tables_of_4_bits() -> dict[str, TableSnapshot]:
    """An odd number of columns, and 16; codes that fill their 4 bits, and that do not; one with a vocabulary."""
    tables = {}
    for name, num_columns, num_rows, keys in (("t_odd", 5, 11, None), ("t/16", 16, 16, np.arange(70) ** 9)):
        vocabulary = None if keys is None else Vocabulary.build(keys)
        start = PointerMap.hashed(
            num_ids=70, num_columns=num_columns, num_rows=num_rows, seed=7, vocabulary=vocabulary, unseen="hash"
        )
        rng = np.random.default_rng(num_columns)
        pointers = PointerFormat(num_columns=num_columns, bits=4).encode(rng.integers(0, num_rows, (70, num_columns)))
        tables[name] = TableSnapshot(
            pointer_map=start.clustered(pointers, start.next_helper_hash(1)),
            num_embeddings=70,
            embedding_dim=2 * num_columns,
            feature_names=(name,),
            pooling="sum",
            weights=rng.random((2 * num_columns * num_rows, 2), np.float32),
        )
    return tables


def test_golden_version_of_format_3() -> None:
    """The first that had pointers of 4 bits; the codes also by Python's arithmetic on the bytes of the file."""
    manifest, back = read_folder(GOLDEN / "format-3")
    assert (manifest.format, manifest.version, manifest.parent) == (3, 3, 2)
    for name, table in tables_of_4_bits().items():
        assert manifest.tables[name].pointer_dtype == "uint4"
        assert_same(back[name], table)
        entry = manifest.tables[name].pointers
        assert entry is not None
        with pa.ipc.open_file(GOLDEN / "format-3" / entry.name) as file:
            assert file.schema.metadata[b"pointer_bits"] == b"4"
            rows = file.get_batch(0).column("pointers").to_pylist()
        c = table.pointer_map.num_columns
        codes = [[row[j // 2] // 16 ** (j % 2) % 16 for j in range(c)] for row in rows]
        assert codes == table.pointer_map.pointers.to_pylist()


@pytest.mark.parametrize(
    ("name", "made"), [("format-2", golden_tables), ("format-3", tables_of_4_bits)], ids=["format 2", "format 3"]
)
def test_the_format_has_not_changed(tmp_path: Path, name: str, made: Callable[[], dict[str, TableSnapshot]]) -> None:
    """What is written now is the golden manifest. Only the files' own bytes may follow the version of pyarrow."""
    with mock.patch.object(
        bundle, "datetime", mock.Mock(now=lambda _: datetime(2026, 11, 25, 12, 0, tzinfo=timezone.utc))
    ):
        bundle.write_bundle(
            lambda name: (tmp_path / name).open("wb"),
            made(),
            provenance=PROVENANCE,
            version=3,
            parent=2,
            churn={"t_user": 0.5} if name == "format-2" else {},
        )
    for path in (GOLDEN / name).glob("*.arrow"):
        schemas = [pa.ipc.open_file(folder / path.name).schema for folder in (tmp_path, GOLDEN / name)]
        assert schemas[0].equals(schemas[1])
        said = [{key: value for key, value in one.metadata.items() if key != b"padding"} for one in schemas]
        assert said[0] == said[1]
    contents = [unseal((folder / MANIFEST).read_bytes(), "") for folder in (tmp_path, GOLDEN / name)]
    for content in contents:
        for table in content["tables"].values():
            for entry in (
                table["pointers"],
                table["weights"],
                table["frequencies"],
                (table["vocabulary"] or {}).get("file"),
            ):
                if entry is not None:
                    entry.pop("sha256"), entry.pop("num_bytes")
    assert contents[0] == contents[1]


# what can be wrong


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "v"
    write_folder(folder, tables(), provenance=PROVENANCE)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def resealed(folder: Path, content: dict[str, Any]) -> None:
    (folder / MANIFEST).write_bytes(seal(content))


def test_a_missing_manifest_and_a_missing_file(copy: Path) -> None:
    next(copy.glob("*.weights.arrow")).unlink()
    with pytest.raises(MapFileError, match=r"weights\.arrow: no such file, but the manifest names it"):
        read_folder(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError):
        read_folder(copy)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.arrow",
        "/etc/passwd",
        "a/../../b.arrow",
        "sub/a.arrow",
        "..",
        ".arrow",
        "a.txt",
        "C:\\a.arrow",
        "a\n.arrow",
        "",
    ],
)
def test_paths_cannot_leave_the_folder(copy: Path, name: str) -> None:
    content = unseal((copy / MANIFEST).read_bytes(), "")
    content["tables"]["t_user"]["pointers"]["name"] = name
    resealed(copy, content)
    with pytest.raises(MapFileError, match=r"tables\.t_user\.pointers\.name"):
        read_folder(copy)


@pytest.mark.parametrize(
    ("number", "message"),
    [(4, "format 4 was written by a later torchrec_cce"), (1, "format 1 is older than 2, .*; train or publish anew")],
)
def test_a_format_that_is_not_read_says_what_to_do(copy: Path, number: int, message: str) -> None:
    content = unseal((copy / MANIFEST).read_bytes(), "")
    resealed(copy, {**content, "format": number, "something": "else"})
    with pytest.raises(MapFileError, match=message):
        read_folder(copy)


def test_a_manifest_of_format_2_has_no_pointers_of_4_bits(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format-3", tmp_path / "copy")
    content = unseal((tmp_path / "copy" / MANIFEST).read_bytes(), "")
    resealed(tmp_path / "copy", {**content, "format": 2})
    with pytest.raises(MapFileError, match="format=2 has no pointers of 4 bits; they came with format 3"):
        read_folder(tmp_path / "copy")
    content["tables"]["t_odd"]["pointer_dtype"] = "uint8"
    resealed(tmp_path / "copy", content)
    with pytest.raises(MapFileError, match=r"of fixed_size_list<item: uint8>\[3\] with 0 nulls, not 70 of .*\[5\]"):
        read_folder(tmp_path / "copy")


def test_two_entries_cannot_share_a_file(copy: Path) -> None:
    content = unseal((copy / MANIFEST).read_bytes(), "")
    tables = content["tables"]
    tables["t_new"]["weights"] = tables["t_user"]["weights"]
    resealed(copy, content)
    with pytest.raises(MapFileError, match="names one twice"):
        read_folder(copy)


CHANGES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["uint8", "uint64", "hash", "first_row", "../x.arrow", "0000.pointers.arrow", "0" * 64]),
    st.just([]),
    st.just({}),
)


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [place for key, child in items for place in [(*prefix, key), *paths_of(child, (*prefix, key))]]


def read_or_refused(folder: Path) -> dict[str, TableSnapshot] | MapFileError:
    """Its tables, or our error; any other one fails the test."""
    try:
        return read_folder(folder)[1]
    except MapFileError as error:
        return error
    finally:
        shutil.rmtree(folder)


@settings(max_examples=1000)
@given(data=st.data())
def test_fuzzed_manifests(written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A manifest with anything in any place, sealed as if it were meant: our error, or maps that can be looked up."""
    content = unseal((written / MANIFEST).read_bytes(), "")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(paths_of(content)))
        parent = content
        for key in place[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[place[-1]] = data.draw(CHANGES)
        elif isinstance(parent, dict):
            del parent[place[-1]]
        else:
            parent.pop(place[-1])
        if not paths_of(content):
            break
    try:
        document = seal(content)
    except ValueError:  # NaN cannot be written
        return
    folder = tmp_path_factory.mktemp("fuzz") / "v"
    shutil.copytree(written, folder)
    (folder / MANIFEST).write_bytes(document)
    found = read_or_refused(folder)
    if isinstance(found, MapFileError):
        assert str(folder) in str(found)
        return
    original = tables()
    for name, table in found.items():
        one = table.pointer_map
        if one.num_ids:
            codes = one.codes(np.arange(min(one.num_ids, 100)))
            assert codes.min() >= 0
            assert codes.max() < max(one.num_rows, 50)
        if name in original and one.digest == original[name].pointer_map.digest:
            assert one.stored == original[name].pointer_map.stored


@settings(max_examples=700)
@given(data=st.data())
def test_files_cut_short_or_overwritten(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Damage to an Arrow file, with a manifest that vouches for the damage: our error, never a crash."""
    path = data.draw(st.sampled_from(sorted(written.glob("*.arrow"))))
    original = path.read_bytes()
    content = bytearray(original)
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        start = data.draw(st.integers(0, min(len(content) - 1, 700)))  # where Arrow's own structure is
        noise = data.draw(st.binary(min_size=1, max_size=16))
        content[start : start + len(noise)] = noise
    folder = tmp_path_factory.mktemp("cut") / "v"
    shutil.copytree(written, folder)
    (folder / path.name).write_bytes(content)
    manifest = unseal((folder / MANIFEST).read_bytes(), "")
    for place in paths_of(manifest):
        entry = manifest
        for key in place:
            entry = entry[key]
        if isinstance(entry, dict) and entry.get("name") == path.name:
            entry.update(sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
    resealed(folder, manifest)
    found = read_or_refused(folder)
    if isinstance(found, MapFileError):
        assert str(folder) in str(found)
        return
    assert {name: table.pointer_map.num_ids for name, table in found.items()} == {
        "t_user": 1000,
        "t_new": 1000,
        "t/ключ": 100,
    }


@settings(max_examples=300)
@given(data=st.data())
def test_any_change_to_a_document_is_found(written: Path, data: st.DataObject) -> None:
    document = bytearray((written / MANIFEST).read_bytes())
    at = data.draw(st.integers(0, len(document) - 1))
    document[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MapFileError, match=r"m\.json"):
        Manifest.from_json(bytes(document), "m.json")
    with pytest.raises(MapFileError, match=r"m\.json"):
        Manifest.from_json(bytes(document[:at]), "m.json")


@pytest.mark.parametrize("document", [b"", b"{}", b"[]", b"null", b'{"content": 3}', b"\xff\xfe", b"[" * 100_000])
def test_documents_of_other_kinds(document: bytes) -> None:
    with pytest.raises(MapFileError, match=r"m\.json"):
        Manifest.from_json(document, "m.json")


def test_snapshots_check_their_arrays() -> None:
    with pytest.raises(ConfigError, match=r"weights are float64 \[400, 4\], not float32 \[400, 4\]"):
        snapshot(weights=np.zeros((400, 4)))
    with pytest.raises(ConfigError, match=r"frequencies are int64 \[999\], not int64 \[1000\]"):
        snapshot(frequencies=np.zeros(999, np.int64))


def test_manifest_numbers_must_fit(written: Path) -> None:
    manifest, _ = read_folder(written)
    table = manifest.tables["t_user"]
    entry = table.weights
    assert isinstance(entry, FileEntry)
    with pytest.raises(ValueError, match="weights has 7 values, not 400"):
        replace(table, weights=replace(entry, num_values=7))
    with pytest.raises(ValueError, match="hash functions for"):
        replace(table, num_columns=2)
    assert json.loads((written / MANIFEST).read_bytes())["content"]["format"] == 2
