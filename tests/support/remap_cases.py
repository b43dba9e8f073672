"""Maps, raw columns and Parquet files for the tests of the remap, and what a plain loop over IDs makes of them."""

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from torchrec_cce.data.remapped_format import (
    HelperPolicy,
    Layout,
    RemappedFeature,
    RemappedFormat,
    format_of,
    remapped_feature,
)
from torchrec_cce.hashing import UniversalHash
from torchrec_cce.jobs.remap.remapper import Remapper
from torchrec_cce.maps.arrow_file import list_array
from torchrec_cce.maps.pointer_format import PointerFormat
from torchrec_cce.maps.pointer_map import PointerMap, Unseen
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary

NUM_IDS = 50


def make_map(
    seed: int = 0,
    *,
    num_columns: int = 4,
    num_rows: int = 300,
    num_ids: int = NUM_IDS,
    clustered: bool = True,
    keys: bool = False,
    unseen: Unseen = "error",
    wide: bool = False,
    nibbles: bool = False,
) -> PointerMap:
    """A map of IDs `0..num_ids - 1`, or with `keys` of as many 64-bit numbers, small ones among them.

    Args:
        wide: pointers are stored as uint32, whatever `num_rows` needs.
        nibbles: pointers are stored in 4 bits, if `num_rows` and `num_columns` allow it.
    """
    rng = np.random.default_rng(seed)
    vocabulary = None
    if keys:
        found = np.unique(np.concatenate([np.arange(num_ids // 2), rng.integers(-(2**63), 2**63, num_ids)]))
        vocabulary = Vocabulary.build(rng.permutation(found)[:num_ids])
    pointers = rng.integers(0, num_rows, (num_ids, num_columns))
    form = PointerFormat.that_holds(num_rows, num_columns=num_columns, min_bits=4 if nibbles else 8)
    if wide:
        form = PointerFormat(num_columns=num_columns, bits=32)
    return PointerMap(
        num_ids=num_ids,
        codebook_hash=UniversalHash.from_seed(seed + 1, num_columns=num_columns, num_rows=num_rows),
        helper_hash=UniversalHash.from_seed(seed + 2, num_columns=num_columns, num_rows=num_rows),
        stored=list_array(form.encode(pointers)) if clustered else None,
        generation=int(clustered),
        vocabulary=vocabulary,
        unseen=unseen,
    )


def known_ids(pointer_map: PointerMap) -> list[int]:
    return (
        np.arange(pointer_map.num_ids) if pointer_map.vocabulary is None else pointer_map.vocabulary.keys()
    ).tolist()


def make_feature(
    pointer_map: PointerMap, *, layout: Layout = "words", helper: HelperPolicy = "store", column: str = "user"
) -> RemappedFeature:
    return remapped_feature(
        column,
        table=f"t_{column}",
        column=column,
        map_digest=pointer_map.digest,
        num_columns=pointer_map.num_columns,
        num_rows=pointer_map.num_rows,
        layout=layout,
        helper=helper,
        min_pointer_bits=pointer_map.min_pointer_bits,
    )


def make_remapper(maps: dict[str, PointerMap], *, layout: Layout = "words", helper: HelperPolicy = "store") -> Remapper:
    """Column → its map."""
    features = {c: make_feature(pointer_map, layout=layout, helper=helper, column=c) for c, pointer_map in maps.items()}
    remapped = RemappedFormat(
        format=format_of(features),
        version=1,
        manifest_sha256="b" * 64,
        layout=layout,
        helper=helper,
        features=features,
    )
    return Remapper(format=remapped, maps={f"t_{column}": pointer_map for column, pointer_map in maps.items()})


def make_snapshot(pointer_map: PointerMap, *features: str) -> TableSnapshot:
    c, k = pointer_map.num_columns, pointer_map.num_rows
    return TableSnapshot(
        pointer_map=pointer_map,
        num_embeddings=pointer_map.num_ids,
        embedding_dim=c,
        feature_names=features,
        pooling="sum",
        weights=np.zeros((2 * c * k, 1), np.float32),
    )


def plain_codes(pointer_map: PointerMap, raw: int) -> tuple[list[int], list[int]]:
    """The codebook codes and the helper codes of one raw ID, by the map's policy for unseen IDs."""
    ids = known_ids(pointer_map)
    raw = (raw + 2**63) % 2**64 - 2**63
    if raw not in ids and pointer_map.unseen == "error":
        raise KeyError(raw)
    if raw not in ids and pointer_map.unseen == "first_row":
        raw = ids[0]
    key = np.array([raw], np.int64)
    codebook = pointer_map.codebook_hash.numpy(key)[0].tolist()
    if pointer_map.stored is not None and raw in ids:
        codebook = pointer_map.pointers[ids.index(raw)].as_py()
    return codebook, pointer_map.helper_hash.numpy(key)[0].tolist()


def plain_columns(
    values: list[Any], pointer_map: PointerMap, feature: RemappedFeature, layout: Layout
) -> list[list[Any]]:
    """The new columns of raw `values` (IDs, lists of them, None) as Python values, pointers before helpers."""
    bits = int(feature.pointer_dtype.removeprefix("uint"))

    def item(raw: int, part: int, word: int) -> Any:
        codes = plain_codes(pointer_map, raw)[part]
        if layout == "lists":
            return codes
        unsigned = sum(code << (bits * j) for j, code in enumerate(codes)) >> (64 * word) & (2**64 - 1)
        return (unsigned + 2**63) % 2**64 - 2**63  # in a column of int64

    def cell(value: Any, part: int, word: int) -> Any:
        if isinstance(value, list):
            return [item(raw, part, word) for raw in value]
        return None if value is None else item(value, part, word)

    names = [(0, word) for word in range(len(feature.pointers))] + [(1, word) for word in range(len(feature.helpers))]
    return [[cell(value, part, word) for value in values] for part, word in names]


@st.composite
def maps(draw: st.DrawFn) -> PointerMap:
    return make_map(
        draw(st.integers(0, 9)),
        num_columns=draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16, 17])),
        num_rows=draw(st.sampled_from([1, 7, 16, 256, 257, 65536, 65537])),
        clustered=draw(st.booleans()),
        keys=draw(st.booleans()),
        unseen=draw(st.sampled_from(["error", "hash", "first_row"])),
        wide=draw(st.booleans()),
        nibbles=draw(st.booleans()),
    )


@st.composite
def columns(draw: st.DrawFn, pointer_map: PointerMap, *, lists: bool = True) -> pa.Array:
    """A raw column of any type with IDs that the map takes; at times a slice of a longer one."""
    kind = draw(
        st.sampled_from([pa.int64(), pa.uint64(), pa.int32(), pa.uint32(), pa.int16(), pa.uint8()]), label="type"
    )
    low, high = (
        (0, 2**kind.bit_width - 1)
        if str(kind)[0] == "u"
        else (-(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1)
    )
    known = [raw % 2**64 if str(kind) == "uint64" else raw for raw in known_ids(pointer_map)]
    ids = st.sampled_from([raw for raw in known if low <= raw <= high])
    if pointer_map.unseen != "error":
        ids |= st.integers(low, high)
    cells: st.SearchStrategy[Any] = ids
    if lists and draw(st.booleans(), label="lists"):
        cells = st.lists(ids, max_size=4)
        size = draw(st.sampled_from([None, 3]), label="fixed size")
        wide = draw(st.sampled_from([pa.list_, pa.large_list]))
        kind = wide(kind) if size is None else pa.list_(kind, size)
        cells = cells if size is None else st.lists(ids, min_size=size, max_size=size)
    if draw(st.booleans(), label="nulls"):
        cells = st.none() | cells
    array = pa.array(draw(st.lists(cells, min_size=0, max_size=30), label="values"), kind)
    if pa.types.is_integer(kind) and draw(st.booleans(), label="dictionary"):
        array = array.dictionary_encode()
    return array.slice(draw(st.sampled_from([0, 0, 1, 5])))
