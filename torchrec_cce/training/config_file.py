"""A run's configuration as a TOML file: what is wrong with one is said in one line, with the line that is at fault."""

import json
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError

from torchrec_cce.errors import ConfigError
from torchrec_cce.training.config import RunConfig, TableConfig, parse_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN_CONFIG = "config.json"
"""In a run's folder: what it was started with."""

_KEY = r"""(?:"[^"]*"|'[^']*'|[\w-]+)"""
_DOTTED = rf"({_KEY}(?:\s*\.\s*{_KEY})*)"


def read_config(path: str | Path) -> RunConfig:
    """Read and check a TOML file.

    Raises:
        ConfigError: one line, `path:line: key: what is wrong`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        return parse_config(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        at = line.group(1) if line else max(1, len(text.splitlines()))
        raise ConfigError(f"{path}:{at}: not TOML: {error}") from error
    except ValidationError as error:
        keys, message = _explain(error)
        raise ConfigError(f"{path}:{_line_of(text, keys)}: {'.'.join(keys) or 'config'}: {message}") from error


def read_run_config(run_dir: Path) -> RunConfig:
    """The configuration that the run in `run_dir` was started with.

    Raises:
        ConfigError: one line; there is no run, or its configuration is not one of this version.
    """
    path = run_dir / RUN_CONFIG
    if not path.exists():
        raise ConfigError(f"{run_dir}: no {RUN_CONFIG}, so there is no run in this folder")
    try:
        return parse_config(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        keys, message = _explain(error)
        raise ConfigError(f"{path}: {'.'.join(keys) or 'config'}: {message}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def _explain(error: ValidationError) -> tuple[list[str], str]:
    """Where the first error is, and what is wrong there."""
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"] if part != "[key]"]
    message, kind = first["msg"], first["type"]
    if kind == "unexpected_keyword_argument":
        message = f"unknown key; allowed: {', '.join(_allowed(keys[:-1]))}"
    elif kind == "missing":
        message = "is required"
    elif kind == "value_error":
        message = message.removeprefix("Value error, ")
        # Our own messages name the value found as `key=value`.
        named = re.search(r"\b(\w+)=", message)
        keys += _path_to(named.group(1), keys) if named else []
    elif isinstance(first["input"], str | int | float):
        message = f"{message}; found {first['input']!r}"
    return keys, message


def _allowed(keys: list[str]) -> list[str]:
    """The keys of the section at `keys`."""
    if keys[:1] == ["tables"]:
        return [one.name for one in fields(TableConfig)]
    section: Any = RunConfig
    for key in keys:
        hint = get_type_hints(section)[key]
        section = next((part for part in get_args(hint) if is_dataclass(part)), hint)
    return [one.name for one in fields(section)]


def _path_to(name: str, keys: list[str]) -> list[str]:
    """From the section at `keys` to its own key `name` or that of a section in it; empty if there is none."""
    if name in _allowed(keys):
        return [name]
    sections = [one.name for one in fields(RunConfig) if is_dataclass(one.type)] if not keys else []
    return next(([section, name] for section in sections if name in _allowed([section])), [])


def _line_of(text: str, keys: list[str]) -> int:
    """The line of the TOML `text` that sets `keys`, or else of the innermost table that should have."""
    best_line, best_depth = 1, 0
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(rf"\s*\[\s*{_DOTTED}\s*\]", line)
        assignment = re.match(rf"\s*{_DOTTED}\s*=", line)
        if header:
            path = table = _parts(header.group(1))
        elif assignment:
            path = [*table, *_parts(assignment.group(1))]
        else:
            continue
        if len(path) > best_depth and path == keys[: len(path)]:
            best_line, best_depth = number, len(path)
    return best_line


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_KEY, dotted)]
