"""What the libraries below us print to nobody's use: deprecations that only they can act on."""

import logging
import sys
import warnings

_LIBRARIES = r"(torch|torchrec|fbgemm_gpu|tensordict|torchmetrics)\b"


def quiet_libraries() -> None:
    """For a command, whose terminal belongs to its user; who asks by `python -W …` or PYTHONWARNINGS is still shown."""
    if sys.warnoptions:
        return
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    for name in ("torch.fx._symbolic_trace", "torchrec.distributed.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
