"""Lines of Criteo's TSV, and the rows that they are."""

import gzip
from pathlib import Path

import numpy as np

from torchrec_cce.data.rows import Column, Rows, log_transform
from torchrec_cce.data.tsv import CATEGORICAL_FEATURES

GOOD = b"\t".join([b"1", *[b"%d" % i for i in range(13)], *[b"%x" % (1000 * i) for i in range(26)]])

ParsedLine = tuple[int, list[int], list[int]]


def line_with(position: int, cell: bytes) -> bytes:
    cells = GOOD.split(b"\t")
    cells[position] = cell
    return b"\t".join(cells)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def expected_rows(lines: list[ParsedLine]) -> Rows:
    dense = np.array([[number or 0 for number in integers] for _, integers, _ in lines], dtype=np.float32)
    log_transform(dense)
    ids = np.array([[key or 0 for key in keys] for _, _, keys in lines], dtype=np.int64)
    return Rows(
        labels=np.array([label for label, _, _ in lines], dtype=np.float32),
        dense=dense,
        ids={name: Column(values=ids[:, i].copy()) for i, name in enumerate(CATEGORICAL_FEATURES)},
    )
