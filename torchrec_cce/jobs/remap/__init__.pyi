from .job import (
    RemapProgress as RemapProgress,
    RemapReport as RemapReport,
    remap as remap,
)
