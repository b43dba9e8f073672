"""Real logs, remapped whole and proved row by row."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support.remap_cases import make_snapshot
from torchrec_cce.data.arrow import to_column
from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.parquet import write_parquet
from torchrec_cce.data.remapped_format import RemappedFormat, codes_of
from torchrec_cce.data.tsv import CATEGORICAL_FEATURES, DENSE_FEATURES
from torchrec_cce.data.vocabulary import build_vocabulary
from torchrec_cce.jobs.remap.check import expected_codes
from torchrec_cce.jobs.remap.job import remap
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.registry import Registry


def publish(registry: Path, log: Path, features: list[str]) -> dict[str, PointerMap]:
    """Maps of the frequent IDs of each feature's column; the others are hashed."""
    rng = np.random.default_rng(0)
    maps = {}
    for number, feature in enumerate(features):
        vocabulary = build_vocabulary(log, columns=[feature], min_frequency=3, num_threads=2).vocabulary
        start = PointerMap.hashed(
            num_ids=vocabulary.num_ids, num_columns=4, num_rows=1000, seed=number, vocabulary=vocabulary, unseen="hash"
        )
        pointers = rng.integers(0, 1000, (vocabulary.num_ids, 4)).astype(np.uint16)
        maps[feature] = start.clustered(pointers, start.next_helper_hash(1))
    Registry(registry).publish({f"t_{name}": make_snapshot(one, name) for name, one in maps.items()})
    return maps


def prove(log: Path, new: Path, maps: dict[str, PointerMap]) -> None:
    """Every ID of the log against plain numpy, every other column as it was."""
    raw, found = pq.ParquetFile(log), pq.ParquetFile(new)
    remapped = RemappedFormat.of_schema(found.schema_arrow, str(new))
    assert found.num_row_groups == raw.num_row_groups
    others = [name for name in raw.schema_arrow.names if name not in maps]
    for group in range(raw.num_row_groups):
        before, after = raw.read_row_group(group), found.read_row_group(group)
        assert after.select(others).equals(before.select(others))
        for name, one in maps.items():
            feature = remapped.features[name]
            array = before.column(name).combine_chunks()
            codebook, helper = expected_codes(one, to_column(array).values)
            for columns, codes in ((feature.pointers, codebook), (feature.helpers, helper)):
                arrays = [after.column(column).combine_chunks() for column in columns]
                assert arrays[0].is_null().equals(array.is_null())
                np.testing.assert_array_equal(codes_of([a.drop_null() for a in arrays], feature, "words"), codes)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "registry"


def test_globo(real_data: Path, registry: Path, tmp_path: Path) -> None:
    log = real_data / "globo" / "globo_ctr.parquet"
    maps = publish(registry, log, ["user", "article"])
    report = remap(
        str(log), str(tmp_path / "out"), registry=str(registry), helper="store", num_workers=2, inverse_check=True
    )
    assert report.num_rows == pq.read_metadata(log).num_rows
    assert report.checked_rows > 0
    prove(log, tmp_path / "out" / log.name, maps)


def test_criteo(real_data: Path, registry: Path, tmp_path: Path) -> None:
    """26 columns, with a row group boundary inside, in a folder by days."""
    features = list(CATEGORICAL_FEATURES)
    log = tmp_path / "raw" / "day=0" / "log.parquet"
    log.parent.mkdir(parents=True)
    write_parquet(log, read_criteo(real_data / "criteo_80k" / "criteo_80k.tsv.gz"), dense=DENSE_FEATURES)
    maps = publish(registry, log, features)
    report = remap(
        str(tmp_path / "raw"), str(tmp_path / "out"), registry=str(registry), helper="store", num_workers=1,
        inverse_check=True,
    )  # fmt: skip
    assert report.num_rows == 80_000
    prove(log, tmp_path / "out" / "day=0" / "log.parquet", maps)
