"""The back end of k-means that a run asks for."""

import sys
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.runs import train
from torchrec_cce.clustering import column
from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.settings import Backend
from torchrec_cce.errors import MissingExtraError


@pytest.mark.parametrize(("backend", "module"), [("faiss", "faiss"), ("sklearn", "sklearn.cluster")])
def test_a_missing_one_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    log = runs.write_criteo_log(tmp_path / "log.tsv")
    with pytest.raises(MissingExtraError, match=rf"{module} is needed here .* install torchrec-cce\["):
        train(runs.criteo_config(log, recluster={"backend": backend}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not train(runs.criteo_config(log, recluster={"backend": backend, "ct": 0}), tmp_path / "run").interrupted


def test_it_clusters_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    asked = []

    def spy(*args, **options):  # type: ignore[no-untyped-def]
        asked.append(options["backend"])
        return kmeans(*args, **options)

    monkeypatch.setattr(column, "kmeans", spy)
    log = runs.write_criteo_log(tmp_path / "log.tsv")
    config = runs.criteo_config(log, recluster={"backend": "sklearn"})
    train(config, tmp_path / "run")
    # Two clusterings of two tables of four columns.
    assert asked == ["sklearn"] * 16
