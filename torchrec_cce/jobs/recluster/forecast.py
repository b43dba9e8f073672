"""What the reclustering job would do, and need."""

import os

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from torchrec_cce.jobs.recluster.cluster import TableSource
from torchrec_cce.jobs.recluster.estimate import Estimate, estimate
from torchrec_cce.jobs.recluster.request import ReclusterInput, ReclusterJob, Sizes
from torchrec_cce.jobs.recluster.thresholds import Thresholds


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Of a job that would be begun."""

    checkpoint: str
    output: str
    registry: str
    parent: int
    num_ids: dict[str, int]
    """Table → rows of its map."""
    use_helper: dict[str, bool]
    """Table → whether its helper words are used."""
    clustering: Estimate
    """Without the frequencies of IDs."""
    disk: Sizes
    thresholds: Thresholds

    def to_json(self) -> str:
        """One line."""
        return _ADAPTER.dump_json(self).decode()


_ADAPTER = TypeAdapter(Forecast)


def foresee(job: ReclusterJob) -> Forecast:
    """Check all that can be checked, and measure a little of the work. Nothing is written.

    Raises:
        As `recluster` before it begins to write.
    """
    given = ReclusterInput(job)
    parent = given.parent()
    given.check_room()
    sources = [
        TableSource(
            config=table.config,
            rows=given.checkpoint.read_rows(table),
            maps=table.maps,
            map_digest=table.snapshot.pointer_map.digest,
        )
        for table in given.tables
    ]
    return Forecast(
        checkpoint=given.source,
        output=str(given.job.output),
        registry=given.registry.url,
        parent=parent.version,
        num_ids={table.name: table.snapshot.pointer_map.num_ids for table in given.tables},
        use_helper={table.name: table.config.use_helper for table in given.tables},
        clustering=estimate(
            sources,
            given.settings,
            num_workers=job.num_workers or os.cpu_count() or 1,
            memory_bytes=job.memory_bytes,
        ),
        disk=given.sizes,
        thresholds=job.thresholds,
    )
