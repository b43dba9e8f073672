"""Kernels against plain numpy: all forms of tables, bags and codes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.lookup_references import reference_gradients, reference_pooled, reference_words
from torchrec_cce.kernels.lookup.layout import FeatureTable, Layout
from torchrec_cce.modules.device_lookup import DeviceLookup

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Form:
    """Of a table, and of the bags of its IDs."""

    bits: int
    num_columns: int
    num_terms: int
    width: int
    num_rows: int = 11
    """Of a term of a column: `k`."""
    is_mean: bool = False


FORMS = {
    "CCE": Form(bits=16, num_columns=4, num_terms=2, width=4),
    "CCE, one row has nearly all": Form(bits=8, num_columns=2, num_terms=2, width=16, num_rows=2),
    "4 bits, two words a term": Form(bits=4, num_columns=17, num_terms=2, width=1),
    "32 bits, mean": Form(bits=32, num_columns=3, num_terms=2, width=3, is_mean=True),
    "three terms": Form(bits=16, num_columns=1, num_terms=3, width=20),
    "full": Form(bits=64, num_columns=1, num_terms=1, width=8),
    "full and wide": Form(bits=64, num_columns=1, num_terms=1, width=130, is_mean=True),
}


def random_words(
    form: Form, codes: npt.NDArray[np.int64], others: int, rng: np.random.Generator
) -> npt.NDArray[np.uint64]:
    """Of `codes: [t, c, N]`, after so many `others`, with noise in all bits that are of no code."""
    words = reference_words(codes, form.bits)
    used = form.num_columns * form.bits % 64
    if used:
        of_a_term = len(words) // form.num_terms
        words[of_a_term - 1 :: of_a_term] |= rng.integers(0, 2**63, words.shape[1], np.uint64) << np.uint64(used)
    return np.concatenate([np.full((len(words), others), 2**64 - 1, np.uint64), words], axis=1)


@pytest.mark.parametrize("bags", ["of one ID", "of several or none, weighted"])
@pytest.mark.parametrize("name", FORMS)
def test_pooling_and_gradients_equal_the_reference(name: str, bags: str) -> None:
    """Of a feature that comes after another, whose IDs nobody looks up."""
    form, rng, batch, others = FORMS[name], np.random.default_rng(0), 37, 5
    weighted = bags.endswith("weighted")
    feature = FeatureTable(
        table=1,
        source=1,
        num_columns=form.num_columns,
        num_terms=form.num_terms,
        bits=form.bits,
        width=form.width,
        table_rows=form.num_columns * form.num_terms * form.num_rows,
        column_rows=form.num_terms * form.num_rows,
        term_rows=form.num_rows,
        is_mean=form.is_mean,
    )
    length = np.ones(batch, np.int64) if bags == "of one ID" else rng.integers(0, 4, batch)
    num_ids = length.sum()
    # Half of all codes are one, so that some blocks gather; others do not.
    codes = rng.integers(0, form.num_rows, (form.num_terms, form.num_columns, num_ids))
    codes[:, : form.num_columns // 2, rng.random(num_ids) < 0.9] = form.num_rows - 1
    weight = rng.standard_normal(num_ids).astype(np.float32) if weighted else np.ones(num_ids, np.float32)
    table = rng.standard_normal((form.num_columns * form.num_terms * form.num_rows, form.width), np.float32)
    words = torch.from_numpy(random_words(form, codes, others, rng).view(np.int64))
    offsets = torch.from_numpy(np.cumsum(np.concatenate([[0, others], np.zeros(batch - 1, np.int64), length])))
    weights = torch.from_numpy(np.concatenate([np.full(others, np.nan, np.float32), weight])) if weighted else None

    lookup = DeviceLookup(Layout.of([feature]), CPU)
    out = lookup.pool(addresses(None, table), words, offsets, weights, batch)
    arguments = [feature], [table, table], [codes], [length], [weight]
    np.testing.assert_allclose(out, reference_pooled(*arguments), rtol=1e-5, atol=1e-5)
    gradient = torch.from_numpy(rng.standard_normal(out.shape).astype(np.float32))
    found = np.zeros_like(table)
    lookup.add_gradients(addresses(None, found), words, offsets, weights, gradient)
    expected = reference_gradients(*arguments, gradient.numpy())[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_tables_of_several_forms_and_one_that_wants_no_gradient() -> None:
    """Two features read one table, and one feature two; the third table's gradient has no address."""
    rng, batch, k = np.random.default_rng(1), 20, 5
    common = {"num_terms": 2, "bits": 8, "column_rows": 2 * k, "term_rows": k}
    features = [
        FeatureTable(table=0, source=0, num_columns=2, width=2, table_rows=4 * k, **common),
        FeatureTable(table=1, source=1, num_columns=1, width=2, table_rows=2 * k, **common, is_mean=True),
        FeatureTable(table=0, source=1, num_columns=2, width=2, table_rows=4 * k, **common),
        FeatureTable(table=2, source=0, num_columns=1, width=5, table_rows=2 * k, **common),
    ]
    layout = Layout.of(features)
    tables = [rng.standard_normal((2 * k * columns, width), np.float32) for columns, width in ((2, 2), (1, 2), (1, 5))]
    lengths = [rng.integers(0, 3, batch) for _ in range(2)]
    bounds = np.cumsum([0, *(length.sum() for length in lengths)])
    words = np.full((layout.num_words, bounds[-1]), 2**64 - 1, np.uint64)
    codes = []
    for feature, first in zip(features, layout.first_words, strict=True):
        mine = slice(bounds[feature.source], bounds[feature.source + 1])
        codes.append(rng.integers(0, k, (2, feature.num_columns, mine.stop - mine.start)))
        words[first : first + feature.num_words, mine] = reference_words(codes[-1], 8)
    given = torch.from_numpy(words.view(np.int64)), torch.from_numpy(np.cumsum(np.concatenate([[0], *lengths])))
    lookup = DeviceLookup(layout, CPU)
    out = lookup.pool(addresses(*tables), *given, None, batch)
    of_features = [lengths[feature.source] for feature in features]
    ones = [np.ones(code.shape[2], np.float32) for code in codes]
    arguments = features, tables, codes, of_features, ones
    np.testing.assert_allclose(out, reference_pooled(*arguments), rtol=1e-5, atol=1e-5)
    found = [np.zeros_like(table) for table in tables]
    lookup.add_gradients(addresses(*found[:2], None), *given, None, out)
    for mine, expected in zip(found[:2], reference_gradients(*arguments, out.numpy())[:2], strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_no_bags_and_bags_of_no_ids() -> None:
    feature = FeatureTable(
        table=0,
        source=0,
        num_columns=2,
        num_terms=2,
        bits=8,
        width=2,
        table_rows=12,
        column_rows=6,
        term_rows=3,
        is_mean=True,
    )
    lookup, table = DeviceLookup(Layout.of([feature]), CPU), np.ones((12, 2), np.float32)
    nothing = torch.empty((2, 0), dtype=torch.int64)
    for batch in (0, 3):
        offsets = torch.zeros(batch + 1, dtype=torch.int64)
        out = lookup.pool(addresses(table), nothing, offsets, None, batch)
        assert torch.equal(out, torch.zeros(batch, 4))
        lookup.add_gradients(addresses(table), nothing, offsets, None, torch.ones_like(out))
    assert (table == 1).all()


def addresses(*arrays: npt.NDArray[np.float32] | None) -> npt.NDArray[np.uint64]:
    return np.array([0 if array is None else array.ctypes.data for array in arrays], np.uint64)
