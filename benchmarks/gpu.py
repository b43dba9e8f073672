"""Speed of the packed lookup on a GPU: training steps of embeddings against uncompressed tables in TBE, and what of the
card's bandwidth the kernels reach. Wall time, interleaved, medians; 4 minutes at most: `python -m benchmarks.gpu`.

26 tables of 10⁴ to 10⁷ IDs, Zipf's, in bags of one, as in `benchmarks.lookup`. A step begins with raw IDs in the memory
of the host and ends when the device has the new weights.
"""

import copy
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from benchmarks.figure import race, report
from benchmarks.lookup import EPSILON, RATE, VOCABULARY, clustered, features_of, uncompressed
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.modules.device_lookup import by_triton
from torchrec_cce.modules.lookup_operators import pool

DIMS, BATCHES = (64, 128), (8192, 65536)
NUM_COLUMNS, NUM_ROWS = 4, 1024
WORD_BYTES = 16
"""Of an ID: a word of pointers and a word of the helper's codes."""
ROUNDS = 15
COPIED = 1 << 30


class Ours:
    """Steps of a collection, whose gradients are dense, and of PyTorch's Adagrad."""

    def __init__(self, collection: CCEEmbeddingBagCollection, gradient: torch.Tensor) -> None:
        self._collection, self._gradient = collection, gradient
        self._optimizer = torch.optim.Adagrad(collection.parameters(), lr=RATE, eps=EPSILON, foreach=True)

    def __call__(self, features: KeyedJaggedTensor) -> torch.Tensor:
        self._optimizer.zero_grad()
        pooled: torch.Tensor = self._collection(features).values()
        pooled.backward(self._gradient)
        self._optimizer.step()
        return pooled


def finished(device: torch.device, step: Callable[[], object]) -> Callable[[], object]:
    """`step`, and all that it has the device do."""

    def do() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return do


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = race({"copy": finished(device, lambda: target.copy_(source))}, clock=time.perf_counter)
    return 2 * COPIED / seconds["copy"]


def by_rows(collection: CCEEmbeddingBagCollection) -> CCEEmbeddingBagCollection:
    """A copy that is looked up by rows in the stock collection, as where there is no Triton."""
    twin = copy.deepcopy(collection)
    stock = twin.ebc
    assert isinstance(stock, nn.Module)
    stock.register_forward_hook(lambda *_: None)
    return twin


def on_device(features: KeyedJaggedTensor, device: torch.device) -> KeyedJaggedTensor:
    return features.to(device, non_blocking=True)


def figures(device: torch.device, name: str, dim: int, batch_size: int, copied: float) -> None:
    """Of one shape.

    Args:
        name: of the device.
        copied: its bandwidth, bytes a second.
    """
    rng = np.random.default_rng(0)
    collection = clustered(VOCABULARY, dim, NUM_COLUMNS, NUM_ROWS).to(device)
    batches = [features_of(VOCABULARY, batch_size, 1, rng) for _ in range(4)]
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    gradient = torch.randn(batch_size, len(VOCABULARY) * dim, device=device) * 1e-3
    twin = by_rows(collection)
    ours, rows = Ours(collection, gradient), Ours(twin, gradient)
    tables = uncompressed(VOCABULARY, dim, device)
    offsets = batches[0].offsets().long().to(device)
    torch.testing.assert_close(
        ours(batches[0]), rows(on_device(batches[0], device)), rtol=1e-5, atol=1e-5, msg="not the embeddings by rows"
    )
    turn = iter(range(10**9))

    def next_batch() -> KeyedJaggedTensor:
        return batches[next(turn) // 3 % len(batches)]

    candidates = {
        "ours": lambda: ours(next_batch()),
        "rows": lambda: rows(on_device(next_batch(), device)),
        "TBE": lambda: tables(on_device(next_batch(), device).values(), offsets).backward(gradient),
    }
    seconds = race(
        {way: finished(device, step) for way, step in candidates.items()}, rounds=ROUNDS, clock=time.perf_counter
    )
    shape = f"{len(VOCABULARY)} tables, d = {dim}, {NUM_COLUMNS} columns, k = {NUM_ROWS}, batch {batch_size}"
    times = ", ".join(f"{way} {1e3 * each:.2f} ms" for way, each in seconds.items())
    report(
        f"a step on a GPU, {shape}: times as fast",
        seconds["TBE"] / seconds["ours"],
        against=f"uncompressed TBE with rowwise Adagrad on {name}; ours with Adagrad; {times}",
    )
    report(
        f"a step on a GPU, {shape}: times as fast as by rows",
        seconds["rows"] / seconds["ours"],
        against=f"the stock collection on {name}, which rows of 64 bytes an ID cross to",
    )
    kernel_figures(device, name, collection, batches[0], gradient, shape, copied)


def kernel_figures(
    device: torch.device,
    name: str,
    collection: CCEEmbeddingBagCollection,
    features: KeyedJaggedTensor,
    gradient: torch.Tensor,
    shape: str,
    copied: float,
) -> None:
    """Of words that are on the device, forward and backward: bytes that must be moved, over the time, over `copied`."""
    lookup = collection._packed["ebc"]._last
    assert lookup is not None
    ids, weights = features.values(), list[torch.Tensor](collection.parameters())
    offsets, batch_size = features.offsets().long(), features.stride()
    words, offsets = lookup.words(ids, offsets, batch_size), offsets.to(device)
    number, dim = lookup.number, lookup.dim
    pooled = [pool(words, offsets, None, weights, batch_size, number, dim)]

    def forward() -> None:
        pooled[0] = pool(words, offsets, None, weights, batch_size, number, dim)

    def backward() -> None:
        torch.autograd.grad(pooled[0], weights, gradient, retain_graph=True)

    seconds = race(
        {"forward": finished(device, forward), "backward": finished(device, backward)},
        rounds=ROUNDS,
        clock=time.perf_counter,
    )
    inputs = words.nbytes + offsets.nbytes
    of_weights = sum(weight.nbytes for weight in weights)
    # Weights are read once, their gradients set to zero, read and written.
    needed = {"forward": inputs + gradient.nbytes + of_weights, "backward": inputs + gradient.nbytes + 3 * of_weights}
    for way, each in needed.items():
        report(
            f"{way} on a GPU, {shape}: of the bandwidth",
            each / seconds[way] / copied,
            against=f"a copy on {name}, {copied / 1e9:.0f} GB/s; {each / 1e6:.0f} MB in {1e3 * seconds[way]:.3f} ms",
        )
    report(
        f"bytes of an ID that cross to a GPU, {shape}",
        words.nbytes / len(ids),
        target=f"≤ {WORD_BYTES}",
        holds=words.nbytes <= WORD_BYTES * len(ids),
        against="64 as rows; offsets of bags are as many bytes both ways",
    )


def main() -> None:
    if not torch.cuda.is_available():
        print("nothing was measured: torch.cuda.is_available() is false; see `make setup EXTRA=cuda` for a GPU")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if not by_triton(device):
        print("nothing was measured: Triton is not installed, which PyTorch's builds for CUDA bring on Linux")
        return
    torch.set_num_threads(os.cpu_count() or 1)  # which pack
    torch.manual_seed(0)
    name, copied = torch.cuda.get_device_name(device), bandwidth(device)
    for dim in DIMS:
        for batch_size in BATCHES:
            figures(device, name, dim, batch_size, copied)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
