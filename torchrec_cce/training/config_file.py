"""A run's configuration as a TOML file. An error is one line that names the line of the file that is at fault."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from torchrec_cce.errors import ConfigError
from torchrec_cce.training.config import RunConfig, parse_config
from torchrec_cce.training.unused import find_unused

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN_CONFIG = "config.json"
"""The file in a run's folder with the configuration that it was started with."""

_KEY = r"""(?:"[^"]*"|'[^']*'|[\w-]+)"""
_DOTTED = rf"({_KEY}(?:\s*\.\s*{_KEY})*)"

T = TypeVar("T")


class WrongValue(ConfigError):
    """An impossible value in a configuration, and the keys that lead to it."""

    def __init__(self, keys: Sequence[str], message: str) -> None:
        super().__init__(f"{'.'.join(keys) or 'config'}: {message}")
        self.keys, self.message = list(keys), message

    @classmethod
    def first_of(cls, error: ValidationError, root: type) -> "WrongValue":
        """The first of pydantic's errors about a value of the dataclass `root`."""
        first = error.errors()[0]
        keys = [str(part) for part in first["loc"] if part != "[key]"]
        message, kind = first["msg"], first["type"]
        raised = first.get("ctx", {}).get("error")
        if isinstance(raised, WrongValue):
            return cls(keys + raised.keys, raised.message)
        if kind == "unexpected_keyword_argument":
            message = f"unknown key; allowed: {', '.join(_allowed(root, keys[:-1]))}"
        elif kind == "missing":
            message = "is required"
        elif kind == "value_error":
            message = message.removeprefix("Value error, ")
            # Our own messages name the value found as `key=value`.
            named = re.search(r"\b(\w+)=", message)
            keys += _path_to(root, named.group(1), keys) if named else []
        elif isinstance(first["input"], str | int | float):
            message = f"{message}; found {first['input']!r}"
        return cls(keys, message)


def read_config(path: str | Path) -> RunConfig:
    """Read and check a TOML file of a run that is to be started.

    Raises:
        ConfigError: one line, `path:line: key: what is wrong`.
    """
    return read_toml(path, _parse_new)


def read_toml(path: str | Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of a TOML file.

    Raises:
        ConfigError: one line, `path:line: key: what is wrong`; key and message are those of the `WrongValue`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        return parse(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        at = line.group(1) if line else max(1, len(text.splitlines()))
        raise ConfigError(f"{path}:{at}: not TOML: {error}") from error
    except WrongValue as error:
        raise ConfigError(f"{path}:{_line_of(text, error.keys)}: {error}") from error


def read_run_config(run_dir: Path) -> RunConfig:
    """The configuration that the run in `run_dir` was started with.

    Raises:
        ConfigError: one line; there is no run, or this version of the package cannot read its configuration.
    """
    path = run_dir / RUN_CONFIG
    if not path.exists():
        raise ConfigError(f"{run_dir}: no {RUN_CONFIG}, so there is no run in this folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__} is no configuration")
        return _parse(values)
    except WrongValue as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def _parse(values: dict[str, Any]) -> RunConfig:
    try:
        return parse_config(values)
    except ValidationError as error:
        raise WrongValue.first_of(error, RunConfig) from error


def _parse_new(values: dict[str, Any]) -> RunConfig:
    config = _parse(values)
    found = find_unused(config)
    if found is not None:
        raise WrongValue(*found)
    return config


def _allowed(root: type, keys: Sequence[str]) -> list[str]:
    """The keys of the section at `keys`."""
    section = _section(root, keys)
    return [field.name for field in fields(section)] if is_dataclass(section) else []


def _section(root: type, keys: Sequence[str]) -> Any:
    """The type of the section at `keys`; where that is a collection of dataclasses, the dataclass."""
    section: Any = root
    for key in keys:
        if is_dataclass(section):
            hint = get_type_hints(section).get(key)
            # In a dict or a tuple of sections, the next key chooses the section.
            section = hint if get_origin(hint) in (dict, tuple) else _dataclass_in(hint)
        else:
            section = _dataclass_in(section)
    return _dataclass_in(section)


def _dataclass_in(hint: Any) -> Any:
    return next((part for part in get_args(hint) if is_dataclass(part)), hint)


def _path_to(root: type, name: str, keys: Sequence[str]) -> list[str]:
    """The path from the section at `keys` to the key `name` in it or in one of its sections; empty if there is none."""
    if name in _allowed(root, keys):
        return [name]
    sections = (section for section in _allowed(root, keys) if is_dataclass(_section(root, [*keys, section])))
    return next(([section, name] for section in sections if name in _allowed(root, [*keys, section])), [])


def _line_of(text: str, keys: list[str]) -> int:
    """The line of the TOML `text` that sets `keys`, or else that of the innermost table that should set them."""
    best_line, best_depth = 1, 0
    table: list[str] = []
    elements: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        element = re.match(rf"\s*\[\[\s*{_DOTTED}\s*\]\]", line)
        header = re.match(rf"\s*\[\s*{_DOTTED}\s*\]", line)
        assignment = re.match(rf"\s*{_DOTTED}\s*=", line)
        if element:
            name = element.group(1)
            elements[name] = elements.get(name, -1) + 1
            path = table = [*_parts(name), str(elements[name])]
        elif header:
            path = table = _parts(header.group(1))
            if path[0] in elements:  # of the array's last element
                path.insert(1, str(elements[path[0]]))
        elif assignment:
            path = [*table, *_parts(assignment.group(1))]
        else:
            continue
        if len(path) > best_depth and path == keys[: len(path)]:
            best_line, best_depth = number, len(path)
    return best_line


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_KEY, dotted)]
