"""The files of a published version on this machine: verified, and for a remote registry copied first.

A file that was verified once is not read again until it changes: a *receipt* keeps its size, inode and times. Any write
to a file moves its change time, which no program can set back.
"""

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "TORCHREC_CCE_CACHE"


def default_cache() -> Path:
    """Where this machine keeps copies and receipts if nobody says otherwise."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else user_cache_path("torchrec_cce")
