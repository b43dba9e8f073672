"""Optional dependencies, imported where they are used."""

import importlib
from types import ModuleType

from torchrec_cce.errors import MissingExtraError


def require(module: str, *extras: str) -> ModuleType:
    """Import `module`, or say which extra of this package brings it.

    Args:
        module: dotted name, e.g. `"faiss"`.
        extras: those that bring it, each as in `pip install torchrec-cce[extra]`.

    Raises:
        MissingExtraError: `module` cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        choices = " or ".join(f"torchrec-cce[{extra}]" for extra in extras)
        raise MissingExtraError(
            f"{module} is needed here and cannot be imported ({error}); install {choices}"
        ) from error
