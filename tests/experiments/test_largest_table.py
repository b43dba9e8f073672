"""The largest table of a configuration, against the table that is built of it."""

import pytest

from torchrec_cce.experiments.largest_table import LargestTable, largest_table


def config(method: str, cap: int | None, **embedding: object) -> dict[str, object]:
    return {
        "tables": {"day": {"num_embeddings": 7}, "item": {"num_embeddings": 100_000}, "user": {"num_embeddings": 900}},
        "embedding": {"method": method, "dim": 16, "max_parameters": cap, **embedding},
    }


@pytest.mark.parametrize(
    ("method", "cap", "columns", "rows", "bits"),
    [
        ("cce", 8192, 4, 256, 8),
        ("cce", 8224, 4, 257, 16),
        ("pq", 4096, 4, 256, 8),
        ("rq", 8192, 1, 256, 8),
        ("rq", 9000, 1, 281, 32),
    ],
)
def test_tables_with_learned_pointers(method: str, cap: int, columns: int, rows: int, bits: int) -> None:
    assert largest_table(config(method, cap)) == LargestTable(
        name="item", num_ids=100_000, num_columns=columns, num_rows=rows, pointer_bits=bits
    )


def test_columns_are_those_of_the_entry() -> None:
    table = largest_table(config("cce", 8192, num_columns=16))
    assert table is not None
    assert table.num_columns == 16


@pytest.mark.parametrize(
    "values", [{}, config("full", None), config("ce_concat", 8192), config("cce", 2_000_000), {"tables": {}}]
)
def test_tables_without(values: dict[str, object]) -> None:
    assert largest_table(values) is None
