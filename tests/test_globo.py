"""Arbitrary 64-bit raw IDs of a real log: counted, looked up, clustered, published, and unseen tomorrow."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torchrec import KeyedJaggedTensor

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, ReclusterConfig, Registry
from torchrec_cce.data.vocabulary import BuiltVocabulary, build_vocabulary

ROWS = 400_000
FEATURES = ("user", "article")


@pytest.fixture(scope="module")
def days(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """The first clicks of the log as a file, and those after them."""
    rows = pq.ParquetFile(real_data / "globo" / "globo_ctr.parquet").iter_batches(ROWS, columns=list(FEATURES))
    today, tomorrow = (pa.Table.from_batches([next(rows)]) for _ in range(2))
    path = tmp_path_factory.mktemp("globo") / "today.parquet"
    pq.write_table(today, path, row_group_size=50_000)
    return path, tomorrow


@pytest.fixture(scope="module")
def built(days: tuple[Path, pa.Table]) -> dict[str, BuiltVocabulary]:
    return {name: build_vocabulary(days[0], columns=[name], min_frequency=3, num_threads=2) for name in FEATURES}


@pytest.mark.parametrize("name", FEATURES)
def test_vocabulary_equals_arrows_count(
    days: tuple[Path, pa.Table], built: dict[str, BuiltVocabulary], name: str
) -> None:
    counted = pc.value_counts(pq.read_table(days[0]).column(name).combine_chunks())
    expected = {key: n for key, n in zip(*(field.to_pylist() for field in counted.flatten()), strict=True) if n >= 3}
    one = built[name]
    assert dict(zip(one.vocabulary.keys().tolist(), one.frequencies.tolist(), strict=True)) == expected
    assert one.report.rows == ROWS
    assert one.report.kept == len(expected) < one.report.distinct
    assert 0.5 < one.report.coverage < 1


def test_clustered_published_and_met_by_the_ids_of_tomorrow(
    days: tuple[Path, pa.Table], built: dict[str, BuiltVocabulary], tmp_path: Path
) -> None:
    def collection() -> CCEEmbeddingBagCollection:
        torch.manual_seed(0)
        return CCEEmbeddingBagCollection(
            tables=[
                CCEEmbeddingBagConfig(
                    name=f"t_{name}", feature_names=[name], num_embeddings=10**6, embedding_dim=16, num_rows=64
                )
                for name in FEATURES
            ]
        )

    trained, serving = collection(), collection()
    for name in FEATURES:
        start = trained.pointer_map(f"t_{name}")
        trained.attach_pointer_map(f"t_{name}", start.with_vocabulary(built[name].vocabulary))
    frequencies = {f"t_{name}": built[name].frequencies for name in FEATURES}
    reports = trained.recluster(seed=0, frequencies=frequencies, settings=ReclusterConfig(num_iterations=5))
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    registry.publish(trained.snapshot(reports, frequencies))
    registry.open().attach(serving)

    ids = {name: days[1].column(name).to_numpy() for name in FEATURES}
    batch = KeyedJaggedTensor.from_lengths_sync(
        keys=list(FEATURES),
        values=torch.from_numpy(np.concatenate(list(ids.values()))),
        lengths=torch.ones(2 * ROWS, dtype=torch.int32),
    )
    assert torch.equal(serving(batch).values(), trained(batch).values())
    unseen = {f"t_{n}": int((~np.isin(ids[n], built[n].vocabulary.keys())).sum()) for n in FEATURES}
    assert serving.unseen_ids() == unseen
    assert all(0.02 * ROWS < count < ROWS for count in unseen.values()), "a log in time order has new IDs every day"
