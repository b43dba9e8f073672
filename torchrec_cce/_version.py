"""The number itself stands in `pyproject.toml`."""

from importlib.metadata import version

__version__: str = version("torchrec-cce")
"""The version of the installed package."""
