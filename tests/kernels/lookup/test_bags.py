"""Pooling and its gradients against plain numpy, on any number of threads."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from tests.support.lookup_references import addresses, reference_gradients, reference_pooled, reference_words
from torchrec_cce.kernels.lookup.layout import FeatureTable, Layout
from torchrec_cce.kernels.lookup.lookup import Lookup
from torchrec_cce.kernels.lookup.pack import Packer

# Widths and terms. Few, because each is compiled by itself; the last is wider than what is taken at a time.
_SHAPES = ((1, 1), (4, 2), (4, 3), (67, 1))


@dataclass
class Case:
    """Features of some tables, their IDs' codes, and bags."""

    features: list[FeatureTable]
    tables: list[npt.NDArray[np.float32]]
    codes: list[npt.NDArray[np.int64]]
    """[t, c, N] of each feature."""
    lengths: list[npt.NDArray[np.int64]]
    """[B] of each source."""
    weights: npt.NDArray[np.float32] | None

    @property
    def lookup(self) -> Lookup:
        return Lookup(Layout.of(self.features), Packer([]))

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        return np.cumsum(np.concatenate([[0], *self.lengths]))

    @property
    def words(self) -> npt.NDArray[np.uint64]:
        layout, bounds = self.lookup.layout, self.bounds
        words = np.full((layout.num_words, bounds[-1]), 2**64 - 1, np.uint64)
        for feature, first, codes in zip(self.features, layout.first_words, self.codes, strict=True):
            mine = slice(bounds[feature.source], bounds[feature.source + 1])
            words[first : first + feature.num_words, mine] = reference_words(codes, feature.bits)
        return words

    @property
    def bounds(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(length.sum() for length in self.lengths)])

    @property
    def of_features(self) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.float32]]]:
        """Lengths and weights of each feature."""
        bounds = self.bounds
        weights = np.ones(bounds[-1], np.float32) if self.weights is None else self.weights
        return [self.lengths[f.source] for f in self.features], [
            weights[bounds[f.source] : bounds[f.source + 1]] for f in self.features
        ]


def random_case(seed: int, *, num_tables: int, batch_size: int, single: bool, weighted: bool) -> Case:
    """Tables of any shape, of which one is read by two features, and one feature reads two tables."""
    rng = np.random.default_rng(seed)
    features, tables, codes = [], [], []
    lengths = [
        np.ones(batch_size, np.int64) if single else rng.integers(0, 4, batch_size) for _ in range(num_tables + 1)
    ]
    for table in range(num_tables):
        bits = int(rng.choice([4, 8, 16, 32, 64]))
        num_columns = int(rng.integers(1, 3 if bits == 64 else 33))
        width, num_terms = _SHAPES[rng.integers(0, len(_SHAPES))]
        k = int(rng.integers(1, min(2**bits, 50) + 1))
        tables.append(rng.standard_normal((num_columns * num_terms * k, width), np.float32))
        num_codes = len(tables[table]) if bits == 64 else k  # a code is a row
        sources = (table, table + 1) if table == 0 else (table,)
        is_mean = bool(rng.integers(0, 2)) and not weighted
        for source in sources:
            features.append(
                FeatureTable(
                    table=table,
                    source=source,
                    num_columns=num_columns,
                    num_terms=num_terms,
                    bits=bits,
                    width=width,
                    table_rows=len(tables[table]),
                    column_rows=0 if bits == 64 else num_terms * k,
                    term_rows=0 if bits == 64 else k,
                    is_mean=is_mean,
                )
            )
            codes.append(rng.integers(0, num_codes, (num_terms, num_columns, lengths[source].sum())))
    weights = rng.standard_normal(sum(map(sum, lengths))).astype(np.float32) if weighted else None
    return Case(features, tables, codes, lengths, weights)


@given(
    seed=st.integers(0, 2**32),
    num_tables=st.integers(1, 3),
    batch_size=st.integers(0, 40),
    single=st.booleans(),
    weighted=st.booleans(),
)
def test_pooling_and_gradients_equal_the_reference(
    seed: int, num_tables: int, batch_size: int, single: bool, weighted: bool
) -> None:
    case = random_case(seed, num_tables=num_tables, batch_size=batch_size, single=single, weighted=weighted)
    lengths, weights = case.of_features
    lookup, words, offsets = case.lookup, case.words, case.offsets
    out = np.full((batch_size, lookup.layout.dim), np.nan, np.float32)
    lookup.pool(addresses(case.tables), words, offsets, case.weights, out)
    arguments = case.features, case.tables, case.codes, lengths, weights
    np.testing.assert_allclose(out, reference_pooled(*arguments), rtol=1e-5, atol=1e-5)
    gradients = [np.full_like(table, np.nan) for table in case.tables]
    lookup.sum_gradients(addresses(gradients), words, offsets, case.weights, out)
    for found, expected in zip(gradients, reference_gradients(*arguments, out), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 2**32), num_tables=st.integers(1, 3), weighted=st.booleans())
def test_any_number_of_threads_gives_the_same_bits(seed: int, num_tables: int, weighted: bool) -> None:
    case = random_case(seed, num_tables=num_tables, batch_size=3000, single=seed % 2 == 0, weighted=weighted)
    lookup, words, offsets = case.lookup, case.words, case.offsets
    found = []
    for num_threads in (1, 2, 3):
        out = np.empty((3000, lookup.layout.dim), np.float32)
        lookup.pool(addresses(case.tables), words, offsets, case.weights, out, num_threads=num_threads)
        gradients = [np.full_like(table, np.nan) for table in case.tables]
        lookup.sum_gradients(addresses(gradients), words, offsets, case.weights, out, num_threads=num_threads)
        found.append([out.tobytes(), *(each.tobytes() for each in gradients)])
    assert found[0] == found[1] == found[2]


def test_a_table_whose_gradient_is_not_wanted_is_left_out() -> None:
    case = random_case(1, num_tables=2, batch_size=8, single=False, weighted=False)
    gradients = [np.zeros_like(table) for table in case.tables]
    wanted = addresses(gradients)
    wanted[0] = 0
    ones = np.ones((8, case.lookup.layout.dim), np.float32)
    case.lookup.sum_gradients(wanted, case.words, case.offsets, None, ones)
    assert not gradients[0].any()
    assert gradients[1].any()
