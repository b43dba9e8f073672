"""Speed of the gather: raw IDs to their stored pointers. One thread, CPU time, interleaved, medians.

The same pointers lie in an anonymous numpy array and in a memory-mapped Arrow file. Every candidate runs on both and is
compared with what ran on the same memory: how much of each lies in huge pages is the system's choice (it is printed),
and with small pages a random read also misses in the TLB. The limit is a C loop that only reads the words.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.figure import race, report
from torchrec_cce.kernels.packed import as_packed, gather_words
from torchrec_cce.maps.arrow_file import list_array, read_array, write_array

NUM_IDS, NUM_COLUMNS = 100_000_000, 4
LOOKUPS, CHUNK, ROUNDS = 5_000_000, 65_536, 11
TARGETS = {"C loop": 0.85, "numpy": 3.0, "numpy on words": 3.0, "pc.take": 1.8}
"""`numpy` indexes the `[n, 4]` pointers; `numpy on words` and `pc.take` are given our view of them as 64-bit words."""

IDs = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Pointers = npt.NDArray[np.uint16]
CLoop = Callable[[int, int, int, int, int], int]


def compile_c(folder: Path) -> tuple[CLoop, CLoop]:
    """The loops of gather.c: (address of the words, n, address of the IDs, address of the output, N) → bad position."""
    library = folder / "gather.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    address, integer = ctypes.c_void_p, ctypes.c_int64
    for function in (loaded.gather, loaded.read_only):
        function.argtypes, function.restype = [address, integer, address, address, integer], integer
    return loaded.gather, loaded.read_only


def map_file(pointers: Pointers, path: Path) -> Pointers:
    """Write `pointers: [n, c]` as a map's file; returns them memory-mapped, every page touched."""
    column = list_array(pointers)
    with path.open("wb") as sink:
        write_array(sink, "pointers", column)
    stored = read_array(path, "pointers", column.type, len(column))
    mapped: Pointers = stored.values.to_numpy(zero_copy_only=True).reshape(pointers.shape)
    assert np.array_equal(mapped, pointers)
    return mapped


def huge_share(array: npt.NDArray[np.generic]) -> float:
    """The share of the memory mapping around the middle of `array` that lies in huge pages."""
    middle = array.ctypes.data + array.nbytes // 2
    kilobytes: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # the line that starts a mapping: 7f0000000000-7f0000021000 rw-p …
            start, stop = (int(end, 16) for end in first.split("-"))
            inside = start <= middle < stop
        elif inside and rest[-1] == "kB":
            kilobytes[first] = int(rest[0])
    return (kilobytes["AnonHugePages:"] + kilobytes["FilePmdMapped:"]) / kilobytes["Rss:"]


def candidates(pointers: Pointers, ids: IDs, loops: tuple[CLoop, CLoop]) -> dict[str, Callable[[], object]]:
    """The gathers of `ids` in chunks; ours and the C loops write to one buffer, as a loader does."""
    words = cast(Words, as_packed(pointers))
    chunks = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
    out = np.empty(CHUNK, np.uint64)
    arrow_words, arrow_chunks = pa.array(words), [pa.array(chunk) for chunk in chunks]
    calls = [(words.ctypes.data, len(words), chunk.ctypes.data, out.ctypes.data, len(chunk)) for chunk in chunks]

    def ours() -> None:
        for chunk in chunks:
            assert gather_words(words, chunk, out[: len(chunk)]) == -1

    def run_c(loop: CLoop) -> None:
        for call in calls:
            assert loop(*call) == -1

    def numpy(source: Pointers | Words) -> None:
        for chunk in chunks:
            source[chunk]

    def pc_take() -> None:
        for chunk in arrow_chunks:
            pc.take(arrow_words, chunk)

    gather, read_only = loops
    for run in (ours, partial(run_c, gather)):
        run()
        assert np.array_equal(out[: len(chunks[-1])], words[chunks[-1]])
    return {
        "ours": ours,
        "C loop": partial(run_c, gather),
        "limit": partial(run_c, read_only),
        "numpy": partial(numpy, pointers),
        "numpy on words": partial(numpy, words),
        "pc.take": pc_take,
    }


def report_memory(memory: str, nanoseconds: Mapping[str, float]) -> None:
    ours = nanoseconds["ours"]
    where = f"{LOOKUPS:,} uniform IDs in chunks of {CHUNK:,}, map of {NUM_IDS:,} × {NUM_COLUMNS} uint16, one thread"
    for name, target in TARGETS.items():
        ratio, possible = nanoseconds[name] / ours, nanoseconds[name] / nanoseconds["limit"]
        report(
            f"gather from {memory}, {'share of the speed of' if target < 1 else 'times as fast as'} {name}",
            ratio,
            target=f"≥ {target:g}",
            holds=ratio >= target,
            against=f"{name} on the same memory; the limit would have {possible:.2f}; {where}",
        )
    others = ", ".join(f"{name} {nanoseconds[name]:.2f}" for name in ("limit", *TARGETS))
    report(f"gather from {memory}, ns per ID", ours, against=f"{others}; {where}")


def gather_figures() -> None:
    rng = np.random.default_rng(0)
    pointers = rng.integers(0, 2**16, (NUM_IDS, NUM_COLUMNS), np.uint16)
    ids = rng.integers(0, NUM_IDS, LOOKUPS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loops = compile_c(folder)
        sources = {
            "numpy array": pointers,
            "memory-mapped Arrow file": map_file(pointers, folder / "pointers.arrow"),
        }
        runs = {memory: candidates(source, ids, loops) for memory, source in sources.items()}
        # The memories alternate, so that no candidate finds in the cache what the one before it has just read.
        racers = {f"{name}, {memory}": runs[memory][name] for name in ("ours", "limit", *TARGETS) for memory in runs}
        seconds = race(racers, rounds=ROUNDS)
        for memory, source in sources.items():
            nanoseconds = {name: seconds[f"{name}, {memory}"] / LOOKUPS * 1e9 for name in ("ours", "limit", *TARGETS)}
            report_memory(f"{memory} ({huge_share(source):.0%} in huge pages)", nanoseconds)


if __name__ == "__main__":
    gather_figures()
