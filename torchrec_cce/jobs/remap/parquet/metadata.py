"""What a Parquet file says of itself, by the names of `parquet.thrift` in the Apache Parquet format.

Fields and numbers that are not used here have no name here; a struct keeps them all the same.
"""

from enum import IntEnum

from torchrec_cce.jobs.remap.parquet.thrift import (
    BINARY,
    I32,
    OptionalField,
    Struct,
    binary,
    flag,
    i32,
    i64,
    items,
    nested,
    structs,
)


class Type(IntEnum):
    INT32 = 1
    INT64 = 2


class Repetition(IntEnum):
    """`FieldRepetitionType`."""

    OPTIONAL = 1


class Encoding(IntEnum):
    PLAIN = 0
    PLAIN_DICTIONARY = 2
    RLE = 3
    BIT_PACKED = 4
    RLE_DICTIONARY = 8


class PageType(IntEnum):
    DATA_PAGE = 0
    DICTIONARY_PAGE = 2
    DATA_PAGE_V2 = 3


CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
"""Number of a `CompressionCodec` → pyarrow's name. The deprecated LZ4 (5) and LZO (3) are left to pyarrow's reader."""


class Statistics(Struct):
    null_count = OptionalField(i64(3))


class DataPageHeader(Struct):
    num_values = i32(1)
    encoding = i32(2)
    definition_level_encoding = i32(3)
    statistics = OptionalField(nested(5, Statistics))


class DictionaryPageHeader(Struct):
    num_values = i32(1)


class DataPageHeaderV2(Struct):
    num_values = i32(1)
    num_nulls = i32(2)
    encoding = i32(4)
    definition_levels_byte_length = i32(5)
    repetition_levels_byte_length = i32(6)
    is_compressed = OptionalField(flag(7))
    """True if absent."""
    statistics = OptionalField(nested(8, Statistics))


class PageHeader(Struct):
    type = i32(1)
    uncompressed_page_size = i32(2)
    compressed_page_size = i32(3)
    data_page_header = OptionalField(nested(5, DataPageHeader))
    dictionary_page_header = OptionalField(nested(7, DictionaryPageHeader))
    data_page_header_v2 = OptionalField(nested(8, DataPageHeaderV2))


class SchemaElement(Struct):
    type = OptionalField(i32(1))
    repetition_type = OptionalField(i32(3))
    num_children = OptionalField(i32(5))


class KeyValue(Struct):
    key = binary(1)
    value = binary(2)


class SortingColumn(Struct):
    column_idx = i32(1)


class ColumnMetaData(Struct):
    type = i32(1)
    encodings = items(2, I32)
    path_in_schema = items(3, BINARY)
    codec = i32(4)
    num_values = i64(5)
    total_uncompressed_size = i64(6)
    total_compressed_size = i64(7)
    data_page_offset = OptionalField(i64(9))
    """Never absent from a whole file."""
    index_page_offset = OptionalField(i64(10))
    dictionary_page_offset = OptionalField(i64(11))
    statistics = OptionalField(nested(12, Statistics))
    encoding_stats = OptionalField(structs(13, Struct))
    bloom_filter_offset = OptionalField(i64(14))
    bloom_filter_length = OptionalField(i32(15))


class ColumnChunk(Struct):
    file_path = OptionalField(binary(1))
    file_offset = i64(2)
    meta_data = nested(3, ColumnMetaData)
    crypto_metadata = OptionalField(nested(8, Struct))
    encrypted_column_metadata = OptionalField(binary(9))


class RowGroup(Struct):
    columns = structs(1, ColumnChunk)
    total_byte_size = i64(2)
    num_rows = i64(3)
    sorting_columns = OptionalField(structs(4, SortingColumn))
    file_offset = OptionalField(i64(5))
    total_compressed_size = OptionalField(i64(6))


class ColumnOrder(Struct):
    TYPE_ORDER = nested(1, Struct)


class FileMetaData(Struct):
    schema = structs(2, SchemaElement)
    num_rows = i64(3)
    row_groups = structs(4, RowGroup)
    key_value_metadata = OptionalField(structs(5, KeyValue))
    column_orders = OptionalField(structs(7, ColumnOrder))
