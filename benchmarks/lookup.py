"""Speed of the packed lookup: a training step's embeddings against uncompressed tables in TBE and against a C loop, and
the latency of requests. One thread, CPU time, interleaved, medians: `python -m benchmarks.lookup`.

A step is forward, backward and rowwise Adagrad of 26 tables of 10⁴ to 10⁷ IDs, as in a click log; raw IDs are Zipf's.
Pointers are random, which costs more cache misses than learned ones. Of the grid of widths, columns, batches and bags,
STEPS has those that differ in kind.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from benchmarks.figure import race, report
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from torchrec_cce.kernels.lookup.update import rowwise_adagrad

VOCABULARY = [10_000] * 8 + [100_000] * 8 + [1_000_000] * 9 + [10_000_000]
REQUESTS = [10_000] * 8 + [100_000] * 18
RATE, EPSILON = 0.01, 1e-8
SCRAMBLE = 2_654_435_761


class Step(NamedTuple):
    """A training step, and how many times as fast as uncompressed TBE it is to be."""

    num_columns: int
    num_rows: int
    batch_size: int
    bag: int
    target: float | None


STEPS: dict[int, list[Step]] = {
    16: [
        Step(4, 1024, 8192, 1, 2.0),
        Step(4, 1024, 2048, 1, 2.0),
        Step(4, 1024, 2048, 20, 2.0),
        Step(8, 256, 2048, 1, 2.0),
        Step(16, 256, 2048, 1, 2.0),
    ],
    64: [
        Step(4, 1024, 8192, 1, 1.2),
        Step(4, 1024, 2048, 20, 2.0),
        Step(8, 256, 8192, 1, 1.2),
        Step(16, 256, 2048, 1, 1.2),
    ],
    128: [Step(4, 1024, 2048, 1, None), Step(4, 1024, 512, 20, None)],
}
"""By width. Rows are what their pointers of 16 and 8 bits can tell apart, or a fourth of it."""


def features_of(sizes: Sequence[int], batch_size: int, bag: int, rng: np.random.Generator) -> KeyedJaggedTensor:
    """Bags of so many IDs of each feature, Zipf's with exponent 1, the frequent ones all over the universe."""
    values = []
    for n in sizes:
        ranks = np.exp(rng.random(batch_size * bag) * np.log(n)).astype(np.int64) - 1
        values.append(np.clip(ranks, 0, n - 1) * SCRAMBLE % n)
    return KeyedJaggedTensor.from_lengths_sync(
        keys=[f"f{i}" for i in range(len(sizes))],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.full((len(sizes) * batch_size,), bag, dtype=torch.int32),
    )


def clustered(sizes: Sequence[int], dim: int, num_columns: int, num_rows: int) -> CCEEmbeddingBagCollection:
    """CCE tables after a clustering that has given every ID random pointers."""
    rng = np.random.default_rng(0)
    collection = CCEEmbeddingBagCollection(
        [
            CCEEmbeddingBagConfig(
                name=f"t{i}",
                num_embeddings=n,
                embedding_dim=dim,
                feature_names=[f"f{i}"],
                num_rows=num_rows,
                num_columns=num_columns,
            )
            for i, n in enumerate(sizes)
        ]
    )
    for config in collection.cce_configs():
        start = collection.pointer_map(config.name)
        pointers = rng.integers(0, num_rows, (config.num_embeddings, num_columns), dtype=config.pointer_dtype)
        collection.attach_pointer_map(config.name, start.clustered(pointers, start.next_helper_hash(1)))
    return collection


def uncompressed(
    sizes: Sequence[int], dim: int, device: torch.device | None = None
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """Full tables of so many rows, on the CPU unless a GPU is given."""
    on_gpu = device is not None and device.type == "cuda"
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(n, dim, *place) for n in sizes],
        device=device,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=RATE,
        eps=EPSILON,
        pooling_mode=PoolingMode.SUM,
    )
    # Pages that were never written would all be one, which lies in a cache.
    for weights in tables.split_embedding_weights():
        weights.fill_(0.01)
    return tables


class CLoop:
    """The loops of lookup.c on copies of a collection's weights."""

    def __init__(self, library: ctypes.CDLL, collection: CCEEmbeddingBagCollection, step: Step, dim: int) -> None:
        self._library, self._step = library, step
        maps = [collection.pointer_map(table) for table in collection.cce_tables()]
        self._width, self._count = dim // step.num_columns, step.batch_size * step.bag
        self._weights = [weight.detach().numpy().copy() for weight in collection.parameters()]
        self._states = [np.zeros(len(weight), np.float32) for weight in self._weights]
        self._pointers = [each.packed for each in maps]
        self._a, self._b = (
            np.concatenate([getattr(each.helper_hash, name) for each in maps]) for name in ("multipliers", "offsets")
        )
        self._words = np.empty((len(maps) * self._count, 2), np.uint64)
        self._out = np.empty((step.batch_size, len(maps) * dim), np.float32)
        self._gradient = np.empty(2 * step.num_rows * self._width, np.float32)
        self._offsets = np.arange(len(maps) * step.batch_size + 1) * step.bag

    def __call__(self, features: KeyedJaggedTensor, gradient: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        step, ids = self._step, features.values().numpy()
        size, number = ctypes.c_int64, len(self._weights)
        offsets = None if step.bag == 1 else _address(self._offsets)
        of_tables = (size(step.num_rows), step.num_columns)
        self._library.pack(
            number, _address(ids), size(self._count), _addresses(self._pointers), _address(self._a), _address(self._b),
            *of_tables, _address(self._words),
        )  # fmt: skip
        of_bags = (*of_tables, self._width, _address(self._words), offsets, size(step.batch_size))
        self._library.pool(number, _addresses(self._weights), *of_bags, _address(self._out))
        rates = ctypes.c_float(RATE), ctypes.c_float(EPSILON)
        self._library.train(
            number, _addresses(self._weights), _addresses(self._states), _address(self._gradient), *of_bags,
            _address(gradient), *rates,
        )  # fmt: skip
        return self._out


def _address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _addresses(arrays: Sequence[npt.NDArray[Any]]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def compile_c(folder: Path) -> ctypes.CDLL:
    library = folder / "lookup.so"
    source = Path(__file__).with_suffix(".c")
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, source, "-o", library, "-lm"], check=True)
    return ctypes.CDLL(str(library))


class Trained:
    """A step of a collection, and rowwise Adagrad on the rows it touched."""

    def __init__(self, collection: CCEEmbeddingBagCollection) -> None:
        self._collection = collection
        self._weights = list(collection.parameters())
        self._states = [np.zeros(len(weight), np.float32) for weight in self._weights]

    def __call__(self, features: KeyedJaggedTensor, gradient: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self._collection(features).values()
        pooled.backward(gradient)
        rates = np.float32(RATE), np.float32(EPSILON)
        for weight, state in zip(self._weights, self._states, strict=True):
            assert weight.grad is not None
            rowwise_adagrad(weight.detach().numpy(), weight.grad.numpy(), state, *rates, (None,) * weight.shape[1])
            weight.grad = None
        return pooled


def step_figures(dim: int, step: Step, tables: SplitTableBatchedEmbeddingBagsCodegen, library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(1)
    collection = clustered(VOCABULARY, dim, step.num_columns, step.num_rows)
    batches = [features_of(VOCABULARY, step.batch_size, step.bag, rng) for _ in range(4)]
    gradient = torch.randn(step.batch_size, len(VOCABULARY) * dim) * 1e-3
    offsets = batches[0].offsets().long()
    turns = dict.fromkeys(("ours", "TBE", "C"), 0)

    def next_batch(name: str) -> KeyedJaggedTensor:
        turns[name] += 1
        return batches[turns[name] % len(batches)]

    in_c = CLoop(library, collection, step, dim) if step.num_columns < 16 else None
    ours = Trained(collection)
    if in_c is not None:
        found = ours(batches[0], gradient).detach().numpy()
        np.testing.assert_allclose(found, in_c(batches[0], gradient.numpy()), rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(collection.parameters(), in_c._weights, strict=True):
            np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=1e-4, atol=1e-5)
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(next_batch("ours"), gradient),
        "TBE": lambda: tables(next_batch("TBE").values(), offsets).backward(gradient),
    }
    if in_c is not None:
        candidates["C"] = lambda: in_c(next_batch("C"), gradient.numpy())
    seconds = race(candidates, rounds=7 if step.bag == 1 else 3)
    shape = f"d = {dim}, c = {step.num_columns}, batch {step.batch_size}, bags of {step.bag}"
    nanoseconds = {name: each / len(batches[0].values()) * 1e9 for name, each in seconds.items()}
    ratio = seconds["TBE"] / seconds["ours"]
    report(
        f"a step's lookup, {shape}, times as fast",
        ratio,
        target=None if step.target is None else f"≥ {step.target}",
        holds=None if step.target is None else ratio >= step.target,
        against=f"uncompressed TBE with rowwise Adagrad, which takes {nanoseconds['TBE']:.0f} ns an ID; ours "
        f"{nanoseconds['ours']:.0f}",
    )
    if in_c is not None:
        report(
            f"a step's lookup, {shape}, of the speed",
            seconds["C"] / seconds["ours"],
            target="≥ 0.8",
            holds=seconds["C"] / seconds["ours"] >= 0.8,
            against=f"a C loop, which takes {nanoseconds['C']:.0f} ns an ID",
        )


def request_figures(batch_size: int, target: float) -> None:
    """Serving: 26 features of one ID, d = 16, from a KeyedJaggedTensor made of a request to the embeddings."""
    rng = np.random.default_rng(0)
    ours = clustered(REQUESTS, 16, 4, 1024).eval()
    stock = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=f"t{i}", num_embeddings=n, embedding_dim=16, feature_names=[f"f{i}"])
            for i, n in enumerate(REQUESTS)
        ]
    ).eval()
    given = features_of(REQUESTS, batch_size, 1, rng)
    repeats = 100 if batch_size == 1 else 10

    def serve(collection: torch.nn.Module) -> None:
        with torch.inference_mode():
            for _ in range(repeats):
                collection(KeyedJaggedTensor(keys=given.keys(), values=given.values(), lengths=given.lengths()))

    def serve_arrays() -> None:
        for _ in range(repeats):
            ours.look_up(keys, values, offsets)

    keys, values, offsets = given.keys(), given.values(), given.offsets().long()
    seconds = race(
        {"ours": lambda: serve(ours), "stock": lambda: serve(stock), "ours without KeyedJaggedTensor": serve_arrays}
    )
    ratio = seconds["ours"] / seconds["stock"]
    report(
        f"a request of {batch_size}, of the time",
        ratio,
        target=f"≤ {target}",
        holds=ratio <= target,
        against="the stock EmbeddingBagCollection; "
        + ", ".join(f"{name} {each / repeats * 1e6:.0f} µs" for name, each in seconds.items()),
    )
    if batch_size == 1:
        microseconds = seconds["ours without KeyedJaggedTensor"] / repeats * 1e6
        report(
            "a request of 1 without a KeyedJaggedTensor, µs",
            microseconds,
            target="≤ 100",
            holds=microseconds <= 100,
            against="`look_up` of raw IDs and offsets, 26 features",
        )


def thread_figures(dim: int = 64, batch_size: int = 4096, num_threads: int = 2) -> None:
    """Wall time, and so only on a machine that does nothing else: forward and backward of bags of 20."""
    rng = np.random.default_rng(2)
    collection = clustered(REQUESTS, dim, 4, 1024)
    features = features_of(REQUESTS, batch_size, 20, rng)
    gradient = torch.randn(batch_size, len(REQUESTS) * dim) * 1e-3

    def step(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        collection.zero_grad()
        pooled: torch.Tensor = collection(features).values()
        pooled.backward(gradient)
        return [pooled.detach(), *(weight.grad for weight in collection.parameters() if weight.grad is not None)]

    equal = all(map(torch.equal, [each.clone() for each in step(1)], step(num_threads)))
    seconds = race({"1": lambda: step(1), "more": lambda: step(num_threads)}, rounds=5, clock=time.perf_counter)
    torch.set_num_threads(1)
    ratio = seconds["1"] / seconds["more"]
    report(
        f"lookup and gradients on {num_threads} threads, d = {dim}, batch {batch_size}, bags of 20, times as fast",
        ratio,
        target="≥ 1.7",
        holds=ratio >= 1.7 and equal,
        against=f"1 thread, wall time, {'the same' if equal else 'OTHER'} bits; {os.cpu_count()} cores with a load of "
        f"{os.getloadavg()[0]:.1f} before",
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    request_figures(1, 0.5)
    request_figures(512, 0.9)
    thread_figures()
    with tempfile.TemporaryDirectory() as folder:
        library = compile_c(Path(folder))
        for dim, steps in STEPS.items():
            tables = uncompressed(VOCABULARY, dim)
            for step in steps:
                step_figures(dim, step, tables, library)
            del tables


if __name__ == "__main__":
    main()
