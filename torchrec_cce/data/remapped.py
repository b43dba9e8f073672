"""Reads remapped data: index pointers in place of raw IDs, as batches that need no map."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_cce.data.arrow import BadCell, check_columns, to_column
from torchrec_cce.data.files import PathLike, files_of
from torchrec_cce.data.record_batches import Part, read_parts, read_schema
from torchrec_cce.data.remapped_format import HelperPolicy, RemappedFeature, RemappedFormat, is_id_list
from torchrec_cce.data.rows import Column, Rows, bound, log_transform
from torchrec_cce.errors import ConfigError, DataFileError, MapMismatchError
from torchrec_cce.kernels.packed import hashed_words, num_words, pack
from torchrec_cce.kernels.rows import coded_rows, helper_rows
from torchrec_cce.maps.pointer_format import PointerFormat
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.remap import Remap

_SUFFIXES = (".parquet", ".arrow")


def read_remapped(
    paths: PathLike | Sequence[PathLike],
    *,
    remap: Remap,
    label: str,
    columns: Mapping[str, str] | None = None,
    universes: Mapping[str, int] | None = None,
    dense: Sequence[str] = (),
    dense_transform: Literal["none", "log1p"] = "none",
    skip_rows: int = 0,
    max_rows: int | None = None,
    chunk_rows: int = 16384,
) -> Iterator[Rows]:
    """Stream files of remapped data as one log of the rows of a model's physical tables.

    `to_batch(rows, remap.row_keys)` is what `remap` makes of the raw log, bit by bit, and passes through it unchanged.
    No pointer of a map is read: its digest is compared, and its helper hash used where files keep raw IDs.

    Args:
        paths: a file, a folder (its `*.parquet` and `*.arrow`, in subfolders too, sorted by path, but none whose name
            begins with `_` or `.`), or several of both, in this order.
        remap: the model's, `CCECollection.remap`, with the maps that the data was remapped with.
        label, dense, dense_transform, skip_rows, max_rows: as `read_parquet`.
        columns: feature → raw column, of features of tables without a map; by default of the feature's name.
        universes: feature → size, of such features whose raw IDs are taken modulo it.
        chunk_rows: the most rows in a chunk.

    Raises:
        DataFileError: while iterating. A file is missing or damaged, holds no remapped data, or not all features.
        MapMismatchError: while iterating. A file's pointers are of another version of a map; the message names both.
        ConfigError: a file's policy for the helper does not fit the tables, or see `read_parquet`.
    """
    log = RemappedLog(
        remap, label=label, columns=columns, universes=universes, dense=dense, dense_transform=dense_transform
    )
    packed = log.read(paths, skip_rows=skip_rows, max_rows=max_rows, chunk_rows=chunk_rows)
    return map(log.to_rows, packed)


class RemappedLog:
    """`read_remapped` in two steps, so that batches are cut while pointers are packed: `read`, then `to_rows` or, for a
    collection that `takes_words`, `to_words`.

    Args: those of `read_remapped`.
    """

    def __init__(
        self,
        remap: Remap,
        *,
        label: str,
        columns: Mapping[str, str] | None = None,
        universes: Mapping[str, int] | None = None,
        dense: Sequence[str] = (),
        dense_transform: Literal["none", "log1p"] = "none",
    ) -> None:
        if dense_transform not in ("none", "log1p"):
            raise ConfigError(f'dense_transform={dense_transform!r} is not one of "none", "log1p"')
        if remap.makes_weights:
            raise ConfigError("remapped data has no weights of rows, which weighted bags and signed tables need")
        self._remap = remap
        self._label, self._dense, self._log = label, list(dense), dense_transform == "log1p"
        self._mapped = [
            (table, feature) for table, feature in remap.table_features if isinstance(remap.config(table), CCEConfig)
        ]
        """(table, feature) of the tables that have a map."""
        others = [feature for table, feature in remap.table_features if (table, feature) not in self._mapped]
        self._raw = {feature: (columns or {}).get(feature, feature) for feature in others}
        self._universes = {feature: size for feature, size in (universes or {}).items() if feature in others}

    def check(self, paths: PathLike | Sequence[PathLike]) -> None:
        """Look at the schema of every file. Raises what reading them would."""
        check = self._checker()
        for path in remapped_files(paths):
            check(path, read_schema(path))

    def read(
        self,
        paths: PathLike | Sequence[PathLike],
        *,
        skip_rows: int = 0,
        max_rows: int | None = None,
        chunk_rows: int = 65536,
    ) -> Iterator[Rows]:
        """The rows of the log with pointers packed: 64-bit words in place of IDs, a column for each word of an ID.

        Arguments and errors are those of `read_remapped`.
        """
        check = self._checker()
        formats: dict[Path, RemappedFormat] = {}

        def columns_of(path: Path, schema: pa.Schema) -> list[str]:
            formats[path] = remapped = check(path, schema)
            features = self._features(remapped, path)
            pointers = [name for feature in features for name in (*feature.pointers, *feature.helpers)]
            kept = [feature.column for feature in features if remapped.helper == "keep-raw"]
            return list(dict.fromkeys([self._label, *self._dense, *self._raw.values(), *pointers, *kept]))

        parts = read_parts(
            remapped_files(paths), columns_of, skip_rows=skip_rows, max_rows=max_rows, chunk_rows=chunk_rows
        )
        for part in parts:
            remapped = formats[part.path]
            ids = {name: part.column(column, to_column) for name, column in self._raw.items()}
            for feature in self._features(remapped, part.path):
                ids.update(_packed(part, remapped, feature, self._remap.pointer_map(feature.table).word_format))
            rows = Rows(labels=part.labels(self._label), dense=part.dense(self._dense), ids=ids)
            if self._log:
                log_transform(rows.dense)
            yield rows

    def to_rows(self, packed: Rows) -> Rows:
        """`packed`, or consecutive rows of it, with the rows of the physical tables in place of words and raw IDs.

        Raises:
            InvalidIDError: a raw ID outside the universe of a table that has no map.
        """
        bounded = bound(packed, self._universes)
        keys = iter(self._remap.row_keys)
        ids: dict[str, Column] = {}
        for table, feature in self._remap.row_features:
            config = self._remap.config(table)
            if isinstance(config, CCEConfig):
                lengths, rows = self._mapped_rows(bounded, table, feature, config)
            else:
                column = bounded.ids[feature]
                lengths, rows = column.lengths, self._remap.look_up(table, feature, column.values)
            if rows.shape[2] > 1:
                lengths = np.int32(rows.shape[2]) * (np.ones(len(packed), np.int32) if lengths is None else lengths)
            ids.update({next(keys): Column(values=own.reshape(-1), lengths=lengths) for own in rows})
        return Rows(labels=packed.labels, dense=packed.dense, ids=ids)

    def to_words(self, packed: Rows) -> Rows:
        """`packed`, or consecutive rows of it, as words that a collection looks up as they are: see `Remap.word_form`.

        `to_batch(rows, remap.word_form.keys)` is a batch that it takes. Less is copied and looked up than of `to_rows`.

        Raises:
            InvalidIDError: as `to_rows`.
            ConfigError: the collection has residents, whose rows are found by raw IDs.
        """
        form = self._remap.word_form
        if form is None:
            raise ConfigError("tables with residents take no words; read rows, by to_rows")
        bounded = bound(packed, self._universes)
        by_feature: list[list[Column]] = []
        for feature in form.features:
            words: list[Column] = []
            for table in form.tables_of(feature):
                if (table, feature) in self._mapped:
                    words += self._mapped_words(bounded, table, feature)
                else:
                    ids = bounded.ids[feature]
                    found = self._remap.look_up_words(table, feature, ids.values, form.shape(table, feature))
                    words += [Column(values=word.view(np.int64), lengths=ids.lengths) for word in found]
            nobody_reads = words[:1] * (form.layout.num_words - len(words))
            by_feature.append(words + nobody_reads)
        columns = (words[number] for number in range(form.layout.num_words) for words in by_feature)
        return Rows(labels=packed.labels, dense=packed.dense, ids=dict(zip(form.keys, columns, strict=True)))

    def _mapped_words(self, packed: Rows, table: str, feature: str) -> list[Column]:
        """Of the pointers of a CCE table, and of its helper if it uses that."""
        pointer_map = self._remap.pointer_map(table)
        config, bits = self._remap.config(table), pointer_map.word_format.bits
        assert isinstance(config, CCEConfig)
        numbers = range(num_words(config.num_columns, bits))
        words = [packed.ids[_word_key(table, feature, "pointers", number)] for number in numbers]
        raw = packed.ids.get(_raw_key(table, feature))
        if raw is not None:
            hashes = hashed_words(raw.values, pointer_map.helper_hash, bits)
            return words + [Column(values=word.view(np.int64), lengths=raw.lengths) for word in hashes]
        if config.use_helper:
            words += [packed.ids[_word_key(table, feature, "helpers", number)] for number in numbers]
        return words

    def _mapped_rows(
        self, packed: Rows, table: str, feature: str, config: CCEConfig
    ) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.int64]]:
        """Lengths and rows [c, N, t] of one feature of a CCE table."""
        first = packed.ids[_word_key(table, feature, "pointers", 0)]
        form = self._remap.pointer_map(table).word_format
        rows = np.empty((config.num_columns, len(first.values), config.num_codewords), np.int64)

        def codes(kind: str) -> npt.NDArray[np.unsignedinteger]:
            numbers = range(num_words(config.num_columns, form.bits))
            words = [packed.ids[_word_key(table, feature, kind, number)] for number in numbers]
            return _as_stored(words, form)

        coded_rows(codes("pointers"), config.num_rows, 0, rows, form.nibbles)
        raw = packed.ids.get(_raw_key(table, feature))
        if raw is not None:
            hashes = self._remap.pointer_map(table).helper_hash
            helper_rows(raw.values, hashes.multipliers, hashes.offsets, config.num_rows, rows)
        elif config.use_helper:
            coded_rows(codes("helpers"), config.num_rows, 1, rows, form.nibbles)
        return first.lengths, rows

    def _checker(self) -> Callable[[Path, pa.Schema], RemappedFormat]:
        """A check of one file after another; all must agree in what they keep for the helper."""
        first: list[tuple[Path, HelperPolicy]] = []

        def check(path: Path, schema: pa.Schema) -> RemappedFormat:
            remapped = RemappedFormat.of_schema(schema, str(path))
            features = self._features(remapped, path)
            for feature in features:
                self._check_feature(path, remapped, feature)
            kept = [feature.column for feature in features if remapped.helper == "keep-raw"]
            check_columns(path, schema, [self._label, *self._dense], [*self._raw.values(), *kept])
            first.append((path, remapped.helper))
            if remapped.helper != first[0][1]:
                raise DataFileError(
                    f"{path}: its helper policy is {remapped.helper!r}, that of {first[0][0]} is {first[0][1]!r}; "
                    "remap all files of a log with one"
                )
            return remapped

        return check

    def _features(self, remapped: RemappedFormat, path: Path) -> list[RemappedFeature]:
        """The columns of all features of tables that have a map, in their order."""
        features = []
        for table, feature in self._mapped:
            found = remapped.find(feature, table)
            if found is None:
                there = ", ".join(f"{each.feature} ({each.table})" for each in remapped.features.values())
                raise DataFileError(
                    f"{path}: holds no pointers of feature {feature!r} of table {table!r}; there are those of {there}. "
                    f"Remap the raw data with this feature"
                )
            features.append(found)
        return features

    def _check_feature(self, path: Path, remapped: RemappedFormat, found: RemappedFeature) -> None:
        table, feature = found.table, found.feature
        config, pointer_map = self._remap.config(table), self._remap.pointer_map(table)
        assert isinstance(config, CCEConfig)
        if found.map_digest != pointer_map.digest:
            raise MapMismatchError(
                f"{path}: feature {feature!r} was remapped with version {remapped.version} (manifest "
                f"{remapped.manifest_sha256[:12]}, map digest {found.map_digest[:12]}); the map of table {table!r} is "
                f"{pointer_map.identity}. Start from version {remapped.version}, or remap the raw data with the other"
            )
        if remapped.layout == "words" and found.pointer_format != pointer_map.word_format:
            raise DataFileError(
                f"{path}: feature {feature!r} has pointers of {found.pointer_format.bits} bits, those of the map of "
                f"table {table!r} have {pointer_map.word_format.bits} in words; the file is damaged, remap it again"
            )
        if (remapped.helper != "drop") != config.use_helper:
            wanted = "needs use_helper=false" if remapped.helper == "drop" else "needs use_helper=true"
            raise ConfigError(
                f"{path}: its helper policy {remapped.helper!r} {wanted}, table {table!r} has use_helper="
                f"{str(config.use_helper).lower()}; change that, or remap the raw data with another policy"
            )
        if remapped.helper == "keep-raw" and pointer_map.unseen == "first_row":
            raise ConfigError(
                f"{path}: its helper policy 'keep-raw' cannot tell which raw IDs the map of table {table!r} does not "
                "know, as unseen='first_row' needs; remap the raw data with 'store'"
            )


def remapped_files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """The files that `paths` stands for; see `read_remapped`.

    Raises:
        DataFileError: a path that is not there, or a folder without such a file.
    """
    return files_of(paths, _SUFFIXES)


def _word_key(table: str, feature: str, kind: str, word: int) -> str:
    """Of a word of packed pointers, or of helper codes, in `Rows.ids`."""
    return f"{feature}#{table}.{kind}.{word}"


def _raw_key(table: str, feature: str) -> str:
    return f"{feature}#{table}.raw"


def _as_stored(words: Sequence[Column], form: PointerFormat) -> npt.NDArray[np.unsignedinteger]:
    """[N, ≥ width]: the codes in words, which are little-endian as the machine is. One word is not copied."""
    values = [word.values for word in words]
    whole = values[0][:, None] if len(values) == 1 else np.stack(values, axis=1)
    return whole.view(form.dtype)


def _packed(part: Part, remapped: RemappedFormat, feature: RemappedFeature, form: PointerFormat) -> dict[str, Column]:
    """The words of a feature's pointers and of its helper, or its raw IDs."""
    table, name = feature.table, feature.feature
    columns: dict[str, Column] = {}
    unchecked: list[tuple[str, list[Column]]] = []
    for kind, names in (("pointers", feature.pointers), ("helpers", feature.helpers)):
        if not names:
            continue
        if remapped.layout == "words":
            words = [part.column(column, to_column) for column in names]
            unchecked.append((names[0], words))
        else:
            words = part.column(names[0], partial(_packed_lists, feature=feature, form=form))
        columns.update({_word_key(table, name, kind, number): word for number, word in enumerate(words)})
    if remapped.helper == "keep-raw":
        columns[_raw_key(table, name)] = part.column(feature.column, to_column)
    first = columns[_word_key(table, name, "pointers", 0)]
    for column in columns.values():
        if not np.array_equal(column.dense_lengths(), first.dense_lengths()):
            raise DataFileError(
                f"{part.path}: the columns of feature {name!r} differ in the lengths of their bags, in rows "
                f"{part.row} to {part.row + part.batch.num_rows - 1}; the file is damaged, remap it again"
            )
    for column_name, words in unchecked:
        with part.at(column_name):
            _check_codes(form.decode(_as_stored(words, form)[:, : form.width]), words[0], feature)
    return columns


def _packed_lists(array: pa.Array, feature: RemappedFeature, form: PointerFormat) -> list[Column]:
    """The words, of codes in `form`, of a column of lists of `c` pointers, or of lists of such lists."""
    lengths: npt.NDArray[np.int32] | None = None
    if is_id_list(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int32)
        array = array.flatten()
    elif array.null_count:
        lengths = array.is_valid().to_numpy(zero_copy_only=False).astype(np.int32)
        array = array.drop_null()
    codes = array.flatten()
    if array.null_count or codes.null_count:
        raise BadCell(0, "and rows after it hold nulls among pointers; the file is damaged, remap it again")
    matrix = codes.to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    words = [Column(values=word.view(np.int64), lengths=lengths) for word in pack(form.encode(matrix))]
    _check_codes(matrix, words[0], feature)
    return words


def _check_codes(codes: npt.NDArray[np.unsignedinteger], bags: Column, feature: RemappedFeature) -> None:
    """Raise BadCell where one of `codes: [N, c]` is none of the table's: the lookup would read past its rows."""
    if not codes.size or int(codes.max()) < feature.num_rows:
        return
    position, column = np.argwhere(codes >= feature.num_rows)[0]
    raise BadCell(
        bags.row_of(int(position)),
        f"points at row {codes[position, column]} of column {column}, which has {feature.num_rows}; the file is "
        "damaged, remap it again",
    )
