"""Unpacking many pages of a column chunk in one call, against one by one."""

import numpy as np
import pyarrow as pa
import pytest

from torchrec_cce.jobs.remap.parquet.header import Page
from torchrec_cce.jobs.remap.parquet.recoder import Recoder, are_frames


def chunk(contents: list[bytes], codec: str, sizes: list[int] | None = None) -> tuple[bytes, list[Page]]:
    """Pages with these contents, whose headers say that they have these sizes."""
    data, pages = b"", []
    for content, size in zip(contents, sizes or map(len, contents), strict=True):
        body = pa.Codec(codec).compress(content, asbytes=True)
        zeros = dict.fromkeys(Page._fields, 0)
        place = {"start": len(data), "body": len(data), "stop": len(data) + len(body)}
        pages.append(Page(**zeros | place | {"uncompressed_size": size, "is_compressed": 1}))
        data += body
    return data, pages


@pytest.mark.parametrize("codec", ["zstd", "snappy", "gzip", "lz4_raw"])
@pytest.mark.parametrize("sizes", [[30, 200, 255, 256, 257], [70_000, 1, 65_791, 65_792], [500], [300, 0, 400]])
def test_many_pages_at_once(codec: str, sizes: list[int]) -> None:
    """Of all the ways in which a frame says its size: in 1, 2 and 4 bytes."""
    rng = np.random.default_rng(1)
    contents = [rng.bytes(size) for size in sizes]
    data, pages = chunk(contents, codec)
    table = np.array(pages)
    content, parts = Recoder(data, codec, codec).all_unpacked(pages, table)
    assert [bytes(content[start:stop]) for start, stop in parts.tolist()] == contents
    assert are_frames(np.frombuffer(data, np.uint8), table) == (codec == "zstd" and min(sizes) > 1)


def test_sizes_that_are_right_only_in_sum() -> None:
    data, pages = chunk([b"a" * 100 + bytes(range(100)), b"b" * 50 + bytes(range(150))], "zstd", [199, 201])
    with pytest.raises((pa.ArrowException, OSError)):
        Recoder(data, "zstd", "zstd").all_unpacked(pages, np.array(pages))
