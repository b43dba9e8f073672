"""Click logs in Criteo's layout with planted clusters: what CCE should find, and a hash cannot.

Every ID of a large feature belongs to one of a few hidden clusters, whatever its number and its frequency. The logit of
a click is a sum of independent parts, each scaled to a given standard deviation over the rows of the log:

    logit = intercept + main(clusters) + interaction(clusters) + individual(IDs) + small(IDs) + dense + noise

A table that gives each cluster a row loses only `individual`. A table that gives random groups of IDs a row averages
`main` and `interaction` away.
"""

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.classification import binary_auroc

from torchrec_cce.data.tsv import CATEGORICAL_FEATURES, DENSE_FEATURES, MAX_LINE_BYTES, format_lines
from torchrec_cce.errors import ConfigError
from torchrec_cce.files.atomic import atomic_path

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_BLOCK_ROWS = 1 << 16
_GZIP_LEVEL = 3


@dataclass(frozen=True, kw_only=True)
class SyntheticLog:
    """What a synthetic log is like. Standard deviations are in units of the logit."""

    universes: tuple[int, ...] = (
        *(500, 300, 9_000, 7_000, 200, 12, 400, 150, 3, 450, 350, 8_000, 250),
        *(24, 420, 6_000, 10, 380, 320, 4, 10_000, 16, 14, 480, 60, 280),
    )
    """[26] number of IDs of C1..C26."""
    large: int = 1_000
    """A feature with at least this many IDs has clusters; the others are small."""
    clusters: int = 8
    """Hidden clusters of each large feature, equally likely for an ID."""
    vector_dim: int = 4
    """Dimension of the hidden vectors of the clusters, whose dot products are the interactions."""
    zipf: float = 0.8
    """The ID of popularity rank r = 1, 2, … has a probability proportional to r^-zipf; 0 is uniform."""
    main: float = 2.0
    """Standard deviation of the sum of the cluster effects."""
    interaction: float = 0.3
    """Standard deviation of the sum, over pairs of large features, of the dot products of their cluster vectors."""
    individual: float = 0.1
    """Standard deviation of the sum of what an ID of a large feature adds to its cluster's effect."""
    small: float = 0.3
    """Standard deviation of the sum of the effects of the small features' IDs."""
    dense: float = 0.3
    """Standard deviation of a linear function of `log(1 + x)` of the first four integers."""
    noise: float = 0.1
    """Standard deviation of what no feature shows."""
    click_rate: float = 0.25
    """Expected mean of the labels."""
    missing: float = 0.05
    """Probability that a cell of a small feature or an integer is empty, which reads as ID 0 or integer 0."""

    def __post_init__(self) -> None:
        if len(self.universes) != len(CATEGORICAL_FEATURES) or not all(1 <= n < 2**32 for n in self.universes):
            raise ConfigError(f"universes={self.universes} must be {len(CATEGORICAL_FEATURES)} sizes in 1..2^32 - 1")
        if not 1 <= self.clusters <= self.large or self.vector_dim < 1:
            raise ConfigError(
                f"clusters={self.clusters} must be in 1..{self.large} (large), vector_dim={self.vector_dim} at least 1"
            )
        deviations = (self.zipf, self.main, self.interaction, self.individual, self.small, self.dense, self.noise)
        if min(deviations) < 0 or not 0 < self.click_rate < 1 or not 0 <= self.missing < 1:
            raise ConfigError(
                f"{self}: zipf and the standard deviations must be at least 0, click_rate and missing within 0..1"
            )


@dataclass(frozen=True, kw_only=True)
class ClickLogTruth:
    """What is known of a synthetic log that was written."""

    universes: dict[str, int]
    """Feature → number of IDs; raw IDs lie in `[0, n)`."""
    click_rate: float
    """Mean of the labels."""
    bayes_auc: float
    """AUC of the true click probabilities given all features: no model can be expected to do better."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Rows as they are drawn."""

    integers: Integers
    """[N, 13] int64; -1 = empty cell."""
    ids: Integers
    """[26, N] int64; -1 = empty cell."""
    labels: Integers
    """[N] int64, 0 or 1."""
    logits: Floats
    """[N] float64: the true logit without noise."""


class ClickModel:
    """The hidden world of one `SyntheticLog` and seed.

    Block b of rows is drawn from a stream of its own, so that a longer log begins with the rows of a shorter one.
    """

    def __init__(self, log: SyntheticLog, seed: int) -> None:
        self.log, self.seed = log, seed
        rng = np.random.default_rng([seed, 0])
        self.large = [i for i, n in enumerate(log.universes) if n >= log.large]
        self.clusters = {i: rng.integers(log.clusters, size=log.universes[i]) for i in self.large}
        """Position of a large feature → [n] int64: the hidden cluster of each ID."""
        self._cumulative, self._by_rank = [], []
        for n in log.universes:
            weights = np.arange(1, n + 1, dtype=np.float64) ** -log.zipf
            self._cumulative.append(np.cumsum(weights) / weights.sum())
            self._by_rank.append(rng.permutation(n))
        self._main = {i: rng.standard_normal(log.clusters) for i in self.large}
        self._vectors = {i: rng.standard_normal((log.clusters, log.vector_dim)) for i in self.large}
        self._own = [rng.standard_normal(n) for n in log.universes]
        self._dense_mean = rng.uniform(0, 4, size=len(DENSE_FEATURES))
        self._dense_weights = rng.standard_normal(4)

        # The parts are scaled, and the intercept is found, on rows that are in no log.
        parts = self._parts(*self._features(rng, _BLOCK_ROWS))
        wanted = np.array([log.main, log.interaction, log.individual, log.small, log.dense], dtype=np.float64)
        deviation = parts.std(axis=1)
        self._scale = np.divide(wanted, deviation, out=np.zeros_like(wanted), where=deviation > 0)
        logits = self._scale @ parts + log.noise * rng.standard_normal(_BLOCK_ROWS)
        self._intercept = _intercept(logits, log.click_rate)

    def blocks(self, num_rows: int) -> Iterator[Block]:
        """The first `num_rows` rows of the log."""
        for block, start in enumerate(range(0, num_rows, _BLOCK_ROWS)):
            rng = np.random.default_rng([self.seed, 1, block])
            integers, ids = self._features(rng, _BLOCK_ROWS)
            logits = self._intercept + self._scale @ self._parts(integers, ids)
            noisy = logits + self.log.noise * rng.standard_normal(_BLOCK_ROWS)
            labels = (rng.random(_BLOCK_ROWS) < _sigmoid(noisy)).astype(np.int64)
            n = min(_BLOCK_ROWS, num_rows - start)
            yield Block(integers=integers[:n], ids=ids[:, :n], labels=labels[:n], logits=logits[:n])

    def _features(self, rng: np.random.Generator, num_rows: int) -> tuple[Integers, Integers]:
        """(integers [N, 13], IDs [26, N]), -1 where the cell is empty."""
        ids = np.empty((len(self.log.universes), num_rows), dtype=np.int64)
        for i, (cumulative, by_rank) in enumerate(zip(self._cumulative, self._by_rank, strict=True)):
            ids[i] = by_rank[np.searchsorted(cumulative[:-1], rng.random(num_rows), side="right")]
            if i not in self.clusters:
                ids[i, rng.random(num_rows) < self.log.missing] = -1
        spread = rng.standard_normal((num_rows, len(DENSE_FEATURES)))
        integers = np.exp(self._dense_mean + spread).astype(np.int64)
        integers[rng.random(integers.shape) < self.log.missing] = -1
        return integers, ids

    def _parts(self, integers: Integers, ids: Integers) -> Floats:
        """[5, N] float64: main, interaction, individual, small and dense, before they are scaled."""
        num_rows = ids.shape[1]
        parts = np.zeros((5, num_rows))
        vectors, squares = np.zeros((num_rows, self.log.vector_dim)), np.zeros(num_rows)
        for i, column in enumerate(np.maximum(ids, 0)):
            if i in self.clusters:
                cluster = self.clusters[i][column]
                vector = self._vectors[i][cluster]
                parts[0] += self._main[i][cluster]
                parts[2] += self._own[i][column]
                vectors += vector
                squares += (vector**2).sum(axis=1)
            else:
                parts[3] += self._own[i][column]
        # Σ_{i<j} v_i·v_j = (‖Σ v_i‖² − Σ ‖v_i‖²) / 2
        parts[1] = ((vectors**2).sum(axis=1) - squares) / 2
        parts[4] = np.log1p(np.maximum(integers[:, :4], 0)) @ self._dense_weights
        return parts


def write_click_log(
    path: str | os.PathLike[str], *, num_rows: int, seed: int, log: SyntheticLog | None = None
) -> ClickLogTruth:
    """Write a synthetic log in Criteo's TSV layout; `*.gz` is compressed. The same arguments give the same bytes.

    A raw ID is written as 8 hexadecimal digits. The rows are alike all along the log: any split of them is one of
    train and test within the same hidden world, while another seed is another world.

    Args:
        path: the file, which appears whole or not at all; an older one is replaced.
        num_rows: at least 1. A longer log of the same seed begins with the rows of a shorter one.
        seed: of everything that is drawn, not negative.
        log: what the log is like; None = the defaults of `SyntheticLog`.

    Raises:
        ConfigError: `num_rows < 1` or `seed < 0`.
    """
    if num_rows < 1 or seed < 0:
        raise ConfigError(f"num_rows={num_rows} must be at least 1, seed={seed} at least 0")
    path, log = Path(path), log or SyntheticLog()
    labels, logits = [], []
    buffer = np.empty(min(num_rows, _BLOCK_ROWS) * MAX_LINE_BYTES, dtype=np.uint8)
    with atomic_path(path) as temporary, _create(temporary, compress=path.suffix == ".gz") as file:
        for block in ClickModel(log, seed).blocks(num_rows):
            size = format_lines(block.labels, block.integers, block.ids, buffer)
            file.write(buffer[:size].data)
            labels.append(block.labels)
            logits.append(block.logits)
    return ClickLogTruth(
        universes=dict(zip(CATEGORICAL_FEATURES, log.universes, strict=True)),
        click_rate=float(np.concatenate(labels).mean()),
        bayes_auc=_bayes_auc(np.concatenate(labels), np.concatenate(logits)),
    )


@contextmanager
def _create(path: Path, *, compress: bool) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        if not compress:
            yield file
            return
        # Neither a name nor a time in the header: the bytes depend on the rows alone.
        with gzip.GzipFile("", "wb", compresslevel=_GZIP_LEVEL, fileobj=file, mtime=0) as compressed:
            yield cast(BinaryIO, compressed)


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def _intercept(logits: Floats, rate: float) -> float:
    """What to add to `logits` so that the mean probability is `rate`: bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logits + middle).mean() < rate else (low, middle)
    return (low + high) / 2


def _bayes_auc(labels: Integers, logits: Floats) -> float:
    """AUC of the true probabilities; NaN where all labels are equal."""
    if labels.min() == labels.max():
        return float("nan")
    return binary_auroc(torch.from_numpy(_sigmoid(logits)), torch.from_numpy(labels)).item()  # type: ignore[no-any-return]
