"""A layer between our code and files: it sees every call that opens or changes one, and may fail it.

It lies on Python's own functions and on those of obstore, below all of our error handling.
"""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import obstore

from torchrec_cce.sharding import hashing_writer

Before = Callable[[str, Path], object]
"""Told what is about to be done with which file. What it raises is raised in place of doing it."""
_OF_PATHS = ("open", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
_OF_DESCRIPTORS = ("fsync", "write", "writev", "pwrite", "ftruncate", "posix_fallocate", "sendfile")
_OF_STORES = ("get", "put", "head", "list", "delete", "open_writer", "open_reader")


@contextmanager
def watched(root: Path, before: Before) -> Iterator[None]:
    """While entered, `before` is told of each call on a file below `root`, and of all calls of obstore."""

    def tell(kind: str, path: Any) -> None:
        where = Path(path if isinstance(path, str | os.PathLike) else os.fsdecode(path))
        if where.is_relative_to(root):
            before(kind, where)

    with mock.patch.multiple(os, **_functions_of_os(tell)), _opening(tell), _stores(before, root):
        yield


def _functions_of_os(tell: Before) -> dict[str, Any]:
    def on_path(name: str) -> Any:
        real = getattr(os, name)

        def called(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> Any:
            if not isinstance(path, int):
                tell(name, path if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path))
            return real(path, *args, **kwargs) if dir_fd is None else real(path, *args, dir_fd=dir_fd, **kwargs)

        return called

    def on_descriptor(name: str) -> Any:
        real = getattr(os, name)

        def called(descriptor: int, *args: Any) -> Any:
            tell(name, os.readlink(f"/proc/self/fd/{descriptor}"))
            return real(descriptor, *args)

        return called

    return {name: on_path(name) for name in _OF_PATHS} | {name: on_descriptor(name) for name in _OF_DESCRIPTORS}


@contextmanager
def _opening(tell: Before) -> Iterator[None]:
    real, followed = io.open, hashing_writer._FollowedFile

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int):
            return real(file, mode, *args, **kwargs)
        tell("open", file)
        stream = real(file, mode, *args, **kwargs)
        return stream if set(mode) <= set("rbt") else _Writing(stream, lambda: tell("write", file))

    class Followed(followed):  # type: ignore[misc, valid-type]
        def __init__(self, path: Any) -> None:
            tell("open", path)
            super().__init__(path)

        def write(self, data: Any) -> int:
            tell("write", self.name)
            return int(super().write(data))

    with (
        mock.patch.object(io, "open", opened),
        mock.patch.object(builtins, "open", opened),
        mock.patch.object(hashing_writer, "_FollowedFile", Followed),
    ):
        yield


@contextmanager
def _stores(before: Before, root: Path) -> Iterator[None]:
    def on_store(name: str) -> Any:
        real = getattr(obstore, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            what = args[1] if len(args) > 1 and isinstance(args[1], str) else ""
            before(f"store.{name}", root / what)
            found = real(*args, **kwargs)
            return _Writing(found, lambda: before("store.write", root / what)) if name == "open_writer" else found

        return called

    with mock.patch.multiple(obstore, **{name: on_store(name) for name in _OF_STORES}):
        yield


class _Writing:
    """A file object that tells before each write, and before it is closed well."""

    def __init__(self, stream: Any, tell: Callable[[], object]) -> None:
        self._stream, self._tell = stream, tell

    def write(self, data: Any) -> Any:
        self._tell()
        return self._stream.write(data)

    def __enter__(self) -> "_Writing":
        self._stream.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        if kind is None:
            try:
                self._tell()
            except OSError as failure:
                self._stream.__exit__(type(failure), failure, failure.__traceback__)
                raise
        return self._stream.__exit__(kind, error, trace)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
