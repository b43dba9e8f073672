"""Which files a user means by a path: one rule for all that reads folders and patterns, on a disk and in a store.

- A path that exists is itself, whatever characters it has. A folder stands for the data files in it and below it.
- One that does not exist, and has `*`, `?` or `[…]`, is a pattern. `*` and `?` do not match `/`, and `**` matches any
  folders. It stands for the files that match, and for the data files of folders that do.
- A name that begins with `_` or `.` is hidden: of a job's notes, of a copy under way. Hidden files, and what lies in
  hidden folders, are left out, unless the path itself names them: by a part that begins with that character.
- Files come in the order of their paths, folder by folder.
"""

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

_WILD = set("*?[")
_HIDING = ("_", ".")


def is_hidden(name: str) -> bool:
    """Whether a name in a folder, or one of the folders that it lies in, begins with `_` or `.`."""
    return any(part.startswith(_HIDING) for part in name.split("/"))


def split_pattern(path: str) -> tuple[str, list[str]]:
    """The folder before the first part with a wildcard, and the parts from there on; none if there is no wildcard."""
    scheme, mark, rest = path.rpartition("://")
    parts = rest.split("/")
    wild = next((number for number, part in enumerate(parts) if set(part) & _WILD), None)
    if wild is None:
        return path, []
    folder = "/".join(parts[:wild])
    if not folder and not mark:
        folder = "/" if rest.startswith("/") else "."
    return scheme + mark + folder, parts[wild:]


def meant(name: str, pattern: Sequence[str], suffixes: Sequence[str]) -> tuple[str, str] | None:
    """Whether the file `name` of a folder is one that a pattern, or the folder itself (no parts), stands for.

    Args:
        name: path in the folder, with `/`.
        suffixes: of data files.

    Returns:
        What the pattern matches, the file or a folder above it, and the path from there; None if it is not meant.
    """
    parts = name.split("/")
    for length in range(len(parts)):
        above, below = parts[:length], "/".join(parts[length:])
        if name.endswith(tuple(suffixes)) and not is_hidden(below) and _matches(above, pattern):
            return "/".join(above), below
    return (name, "") if _matches(parts, pattern) else None


def walk(folder: Path, pattern: Sequence[str] = ()) -> Iterator[str]:
    """Names of all files in `folder` and below that may be meant, and, with `/` at the end, of folders that match.

    Links are followed, but in no circle.
    """
    yield from _walk(folder, [], pattern, set())


def in_order(name: str) -> list[str]:
    """A key to sort names by."""
    return name.split("/")


def _walk(folder: Path, parts: list[str], pattern: Sequence[str], above: set[tuple[int, int]]) -> Iterator[str]:
    found = os.stat(folder)
    here = (found.st_dev, found.st_ino)
    if here in above:
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = [*parts, entry.name]
        if entry.is_dir():
            if _matches(name, pattern):
                yield "/".join(name) + "/"
            if _may_lead_to(name, pattern):
                yield from _walk(Path(entry.path), name, pattern, above | {here})
        elif entry.is_file():
            yield "/".join(name)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if _matches(parts, pattern[1:]):
            return True
        return bool(parts) and not is_hidden(parts[0]) and _matches(parts[1:], pattern)
    return bool(parts) and _part_matches(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _may_lead_to(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a file below the folder `parts` may be meant."""
    if not pattern:
        return not any(map(is_hidden, parts))
    if not parts:
        return True
    if pattern[0] == "**":
        return _may_lead_to(parts, pattern[1:]) or (not is_hidden(parts[0]) and _may_lead_to(parts[1:], pattern))
    return _part_matches(parts[0], pattern[0]) and _may_lead_to(parts[1:], pattern[1:])


def _part_matches(part: str, pattern: str) -> bool:
    return fnmatchcase(part, pattern) and (not is_hidden(part) or pattern.startswith(part[0]))
