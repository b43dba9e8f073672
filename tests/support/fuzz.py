"""Targets of fuzzing: what reads a kind of document, and whole documents that the fuzzer damages."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from tests.support import runs
from tests.support.damaged_parquet import whole_files
from tests.support.registries import Recipe
from torchrec_cce.data.remapped_format import RemappedFormat, format_of, remapped_feature
from torchrec_cce.errors import CCEError
from torchrec_cce.jobs.remap.input import reading
from torchrec_cce.jobs.remap.parquet.footer import read_footer
from torchrec_cce.jobs.remap.parquet.metadata import FileMetaData
from torchrec_cce.jobs.remap.parquet.page import read_chunk
from torchrec_cce.jobs.remap.parquet.thrift import read_struct, write_struct
from torchrec_cce.maps.arrow_file import read_array, write_array
from torchrec_cce.maps.bundle import write_folder
from torchrec_cce.maps.journal import Journal
from torchrec_cce.maps.manifest import MANIFEST, Manifest, Provenance
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.sealed import seal
from torchrec_cce.maps.store import open_store
from torchrec_cce.training.config_file import read_config

Read = Callable[[bytes, Path], object]
"""Read a document; the folder is an empty one, for readers of files."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of document. Whatever its bytes are, it is read, or refused by one of our errors of one line."""

    read: Read
    whole: list[bytes]
    is_sealed: bool = False
    """Whether it is JSON with a digest, which the fuzzer renews where it changes the content."""

    def documents(self) -> st.SearchStrategy[bytes]:
        damaged = st.builds(_damaged, st.sampled_from(self.whole), st.lists(_EDITS, max_size=6))
        if not self.is_sealed:
            return st.one_of(damaged, st.binary(max_size=200))
        return st.one_of(damaged, _resealed([json.loads(each)["content"] for each in self.whole]))

    def fault(self, document: bytes, folder: Path) -> str | None:
        """What is wrong with how a document is read."""
        try:
            self.read(document, folder)
        except CCEError as error:
            return None if "\n" not in str(error) else f"an error of several lines: {error}"
        except Exception as error:  # noqa: BLE001  that is what is looked for
            return f"{type(error).__name__}: {error}"
        return None


def targets(folder: Path) -> dict[str, Target]:
    """By their names. The folder is for making whole documents."""
    tables = Recipe(seed=1, num_ids=60).tables()
    Registry(folder / "registry", cache=folder / "cache").publish(tables)
    (record,) = (path.read_bytes() for path in (folder / "registry" / "log").iterdir())
    write_folder(folder / "bundle", tables, provenance=Provenance.of_this_code())
    footers, chunks = [], []
    for each in whole_files():
        footer, _ = read_footer(pa.BufferReader(each))
        footers.append(write_struct(footer))
        chunks.append(_first_chunk(each))
    array = io.BytesIO()
    write_array(array, "x", pa.array(range(100), pa.int64()))
    log = runs.write_criteo_log(folder / "log.tsv", num_rows=5)
    toml = runs.write_toml(folder / "run.toml", runs.criteo_config(log)).read_bytes()
    feature = remapped_feature(
        "a",
        table="t",
        column="a",
        layout="words",
        helper="drop",
        shared=False,
        map_digest="0" * 64,
        num_columns=4,
        num_rows=100,
        min_pointer_bits=8,
    )
    schema = RemappedFormat(
        format=format_of({"a": feature}),
        version=1,
        manifest_sha256="0" * 64,
        layout="words",
        helper="drop",
        features={"a": feature},
    )
    return {
        "thrift": Target(read=_thrift, whole=footers),
        "page headers": Target(read=_pages, whole=chunks),
        "manifests": Target(
            read=lambda document, _: Manifest.from_json(document, "m"),
            whole=[(folder / "bundle" / MANIFEST).read_bytes()],
            is_sealed=True,
        ),
        "journal": Target(read=_journal, whole=[record], is_sealed=True),
        "remapped schemas": Target(
            read=lambda document, _: RemappedFormat.from_json(document, "s"), whole=[schema.to_json()]
        ),
        "Arrow files": Target(read=_arrow, whole=[array.getvalue()]),
        "TOML": Target(read=_toml, whole=[toml]),
    }


def _thrift(document: bytes, _: Path) -> None:
    with reading("f"):
        read_struct(FileMetaData, document)


def _first_chunk(file: bytes) -> bytes:
    """The bytes of the first column chunk, behind the footer that says what it is."""
    footer, _ = read_footer(pa.BufferReader(file))
    head = write_struct(footer)
    return len(head).to_bytes(4, "little") + head + file


def _pages(document: bytes, _: Path) -> None:
    with reading("f"):
        size = int.from_bytes(document[:4], "little")
        footer, _end = read_struct(FileMetaData, document[4 : 4 + size])
        file = document[4 + size :]
        read_chunk(lambda size, start: file[start : start + size], footer.row_groups[0].columns[0].meta_data)


def _journal(document: bytes, folder: Path) -> None:
    (folder / "log").mkdir(exist_ok=True)
    (folder / "log" / f"{1:020d}.json").write_bytes(document)
    Journal(open_store(folder)).state()


def _arrow(document: bytes, folder: Path) -> None:
    (folder / "x.arrow").write_bytes(document)
    read_array(folder / "x.arrow", "x", pa.int64(), 100)


def _toml(document: bytes, folder: Path) -> None:
    (folder / "run.toml").write_bytes(document)
    read_config(folder / "run.toml")


_EDITS = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "double", "overwrite"]),
    st.integers(0, 1 << 20),
    st.integers(0, 255),
    st.binary(min_size=1, max_size=8),
)


def _damaged(document: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, where, number, part in edits:
        at = where % (len(document) + 1)
        before, after = document[:at], document[at:]
        match kind:
            case "flip" if after:
                document = before + bytes([after[0] ^ (number or 1)]) + after[1:]
            case "cut":
                document = before + after[number:]
            case "insert":
                document = before + part + after
            case "double":
                document = before + after[:number] + after
            case "overwrite":
                document = before + part + after[len(part) :]
    return document


_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), _FLOATS, st.text(max_size=20))
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def _resealed(draw: st.DrawFn, contents: list[dict[str, Any]]) -> bytes:
    """A document with some of its values replaced or left out, and the digest that it then has."""
    fresh = json.loads(json.dumps(draw(st.sampled_from(contents))))
    for _ in range(draw(st.integers(1, 3))):
        part = fresh
        while isinstance(part, dict | list) and part:
            key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            inner = part[key]
            if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                if isinstance(part, dict) and draw(st.booleans()):
                    del part[key]
                else:
                    part[key] = draw(_VALUES)
                break
            part = inner
    return seal(fresh)
