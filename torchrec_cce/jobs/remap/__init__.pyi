from .job import (
    RemapReport as RemapReport,
    remap as remap,
)
from .progress import Progress as Progress
