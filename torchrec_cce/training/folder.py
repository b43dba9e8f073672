"""The folder of a run: whose it is, and whether the run there is new or goes on."""

import json
from pathlib import Path
from typing import Literal

from torchrec_cce.atomic import atomic_path
from torchrec_cce.errors import ConfigError
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.config_file import RUN_CONFIG, read_run_config
from torchrec_cce.training.log import has_measured
from torchrec_cce.training.start import START

Start = Literal["new", "resume", "either"]
"""A new run; one to go on with from its newest checkpoint; or the second if there is one, else the first."""


def claim(run_dir: Path, config: RunConfig, start: Start) -> bool:
    """Make `run_dir` the folder of this configuration, or check that it is. Returns whether to resume.

    Raises:
        ConfigError: it is that of another run, or of another configuration; or there is nothing to resume.
    """
    if start == "new" and (has_measured(run_dir) or checkpoint.exists(run_dir)):  # a start that failed is no run
        raise ConfigError(f"{run_dir} holds a run already; resume it or choose another folder")
    if start == "new" or (start == "either" and not (run_dir / RUN_CONFIG).exists()):
        (run_dir / START).unlink(missing_ok=True)
        with atomic_path(run_dir / RUN_CONFIG) as temporary:
            temporary.write_text(json.dumps(config.as_dict(), indent=2))
        return False
    asked, started = config.as_dict(), read_run_config(run_dir).as_dict()
    changed = [name for name in asked if asked[name] != started[name]]
    if changed:
        raise ConfigError(f"{run_dir} was started with other values in {changed}; resume with the same configuration")
    return start == "resume" or checkpoint.exists(run_dir)
