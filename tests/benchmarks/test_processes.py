"""The memory that benchmarks measure."""

import os
from pathlib import Path

import numpy as np

from benchmarks.processes import Peak, fresh, mapping_bytes, memory_bytes

MIB = 2**20


def test_memory_of_this_process_and_its_peak() -> None:
    with Peak("RssAnon", every=0.001) as memory:
        held = np.ones(64 * MIB, np.uint8)
        for _ in range(20):
            held += 1
    assert 60 * MIB < memory.grown < 200 * MIB
    assert memory_bytes("RssAnon", "RssShmem") >= memory_bytes("RssAnon") > 64 * MIB


def test_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    np.zeros(8 * MIB, np.uint8).tofile(path)
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped.sum() == 0
    sizes = mapping_bytes(str(path))
    assert sizes["Size"] == sizes["Rss"] == sizes["Pss"] == 8 * MIB
    assert mapping_bytes("no such file")["Size"] == 0


def test_a_fresh_process() -> None:
    assert fresh(os.getpid) != os.getpid()
