"""What a dry run says of a clustering."""

from pathlib import Path

import pytest

from tests.jobs.recluster.test_cluster import MEMORY, SETTINGS
from torchrec_cce.errors import ConfigError
from torchrec_cce.jobs.recluster.cluster import TableSource
from torchrec_cce.jobs.recluster.estimate import estimate


def test_an_estimate_counts_tasks_and_bytes_and_is_quick(
    sources: list[TableSource],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path))
    few = estimate(sources[:1], SETTINGS, num_workers=2, memory_bytes=MEMORY)
    found = estimate(sources, SETTINGS, num_workers=2, memory_bytes=MEMORY)
    assert {stage: one.tasks for stage, one in found.stages.items()} == {
        "k-means": 3 + 2 + 4 + 2,
        "pairs": 1 + 1,
        "assignment": 3 + 2 + 2 + 1,
        "digest": 4,
    }
    assert all(one.seconds > 0 for one in found.stages.values())
    assert few.stages["assignment"].seconds < found.stages["assignment"].seconds
    pointers = 150_000 * 3 + 90_000 * 2 * 2 + 70_000 * 4 + 500 * 2 * 2
    assert found.disk_bytes == pointers + 16 * (3 * 64**2 + 4 * 40**2) + 16 * 70_500
    assert few.memory_bytes < found.memory_bytes <= MEMORY
    with pytest.raises(ConfigError, match="memory_bytes=1 is too little"):
        estimate(sources, SETTINGS, num_workers=2, memory_bytes=1)
    assert estimate([], SETTINGS, num_workers=2, memory_bytes=MEMORY).stages["k-means"].tasks == 0
