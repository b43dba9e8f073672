from .job import (
    RemapProgress as RemapProgress,
    RemapReport as RemapReport,
    remap as remap,
)
from .output import (
    FinishedFile as FinishedFile,
    RemapManifest as RemapManifest,
    verify as verify,
)
