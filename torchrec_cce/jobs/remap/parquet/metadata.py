"""What a Parquet file says of itself, by the names of `parquet.thrift` in the Apache Parquet format.

Fields and numbers that are not used here have no name here; a struct keeps them all the same.
"""

from enum import IntEnum

from torchrec_cce.jobs.remap.parquet.thrift import BINARY, I32, I64, LIST, STRUCT, Raw, Struct, field

MAGIC = b"PAR1"
"""The first bytes of a file, and the last."""


class Type(IntEnum):
    INT32 = 1
    INT64 = 2


class Repetition(IntEnum):
    """`FieldRepetitionType`."""

    OPTIONAL = 1
    REPEATED = 2


class Encoding(IntEnum):
    PLAIN = 0
    PLAIN_DICTIONARY = 2
    RLE = 3
    BIT_PACKED = 4
    RLE_DICTIONARY = 8


class PageType(IntEnum):
    DATA_PAGE = 0
    INDEX_PAGE = 1
    DICTIONARY_PAGE = 2
    DATA_PAGE_V2 = 3


DATA_PAGES = (PageType.DATA_PAGE, PageType.DATA_PAGE_V2)

CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
"""Number of a `CompressionCodec` → pyarrow's name. The deprecated LZ4 (5) and LZO (3) are left to pyarrow's reader."""


class Statistics(Struct):
    null_count: int | None = field(3, I64, optional=True)


class SchemaElement(Struct):
    type: int | None = field(1, I32, optional=True)
    repetition_type: int | None = field(3, I32, optional=True)
    name: bytes = field(4, BINARY)
    num_children: int | None = field(5, I32, optional=True)


class KeyValue(Struct):
    key: bytes = field(1, BINARY)
    value: bytes = field(2, BINARY)


class SortingColumn(Struct):
    column_idx: int = field(1, I32)


class ColumnMetaData(Struct):
    type: int = field(1, I32)
    encodings: list[int] = field(2, LIST, items=I32)
    path_in_schema: list[bytes] = field(3, LIST, items=BINARY)
    codec: int = field(4, I32)
    num_values: int = field(5, I64)
    total_uncompressed_size: int = field(6, I64)
    total_compressed_size: int = field(7, I64)
    data_page_offset: int = field(9, I64)
    index_page_offset: int | None = field(10, I64, optional=True)
    dictionary_page_offset: int | None = field(11, I64, optional=True)
    statistics: Statistics | None = field(12, STRUCT, Statistics, lazy=True)
    encoding_stats: Raw | None = field(13, LIST, optional=True)
    bloom_filter_offset: int | None = field(14, I64, optional=True)
    bloom_filter_length: int | None = field(15, I32, optional=True)


class ColumnChunk(Struct):
    file_path: bytes | None = field(1, BINARY, optional=True)
    file_offset: int = field(2, I64)
    meta_data: ColumnMetaData = field(3, STRUCT, ColumnMetaData)
    crypto_metadata: Raw | None = field(8, STRUCT, optional=True)
    encrypted_column_metadata: bytes | None = field(9, BINARY, optional=True)


class RowGroup(Struct):
    COLUMNS = 1
    """The number of the field `columns`."""

    columns: list[ColumnChunk] = field(COLUMNS, LIST, ColumnChunk, items=STRUCT)
    total_byte_size: int = field(2, I64)
    num_rows: int = field(3, I64)
    sorting_columns: list[SortingColumn] | None = field(4, LIST, SortingColumn, items=STRUCT, optional=True)
    file_offset: int | None = field(5, I64, optional=True)
    total_compressed_size: int | None = field(6, I64, optional=True)


class ColumnOrder(Struct):
    TYPE_ORDER: Struct = field(1, STRUCT, Struct)


class FileMetaData(Struct):
    ROW_GROUPS = 4
    """The number of the field `row_groups`."""

    version: int = field(1, I32)
    schema: list[SchemaElement] = field(2, LIST, SchemaElement, items=STRUCT)
    num_rows: int = field(3, I64)
    row_groups: list[RowGroup] = field(ROW_GROUPS, LIST, RowGroup, items=STRUCT)
    key_value_metadata: list[KeyValue] | None = field(5, LIST, KeyValue, items=STRUCT, optional=True)
    column_orders: list[ColumnOrder] | None = field(7, LIST, ColumnOrder, items=STRUCT, optional=True)
