"""Writes a distributed checkpoint and hashes its files meanwhile."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from torchrec_cce.sharding.digests import TENSORS, FileDigest

_PIECE_BYTES = 4 << 20
_SMALL_BYTES = 1 << 16
"""Up to here it costs more to ask another thread than to hash."""


class HashingWriter(FileSystemWriter):
    """PyTorch's writer, which also has the digests of this rank's files of tensors in the end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.digests: dict[str, FileDigest] = {}
        """File → digest."""
        self.fs = _HashingFiles(self.digests)


class _HashingFiles(FileSystem):
    def __init__(self, digests: dict[str, FileDigest]) -> None:
        self._digests = digests

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if Path(path).suffix != TENSORS:
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with ThreadPoolExecutor(1) as thread, _HashedFile(path, thread) as file:
            yield file
            self._digests[Path(path).name] = FileDigest(sha256=file.sha256.hexdigest(), num_bytes=file.num_bytes)


class _HashedFile(FileIO):
    """A new file. What is written is hashed in `thread` at the same time."""

    def __init__(self, path: Any, thread: ThreadPoolExecutor) -> None:
        super().__init__(path, "wb")
        self._thread = thread
        self.sha256, self.num_bytes = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        pieces = [whole[start : start + _PIECE_BYTES] for start in range(0, len(whole), _PIECE_BYTES)]
        hashed: Future[None] | None = None
        if len(whole) > _SMALL_BYTES:
            hashed = self._thread.submit(self.sha256.update, whole)
        else:
            self.sha256.update(whole)
        try:
            for piece in pieces:
                while piece:
                    piece = piece[super().write(piece) :]
        finally:
            if hashed is not None:
                hashed.result()  # the data is the caller's again
        self.num_bytes += len(whole)
        return len(whole)
