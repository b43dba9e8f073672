"""Writes a distributed checkpoint and hashes its files meanwhile."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from torchrec_cce.sharding.digests import TENSORS, FileDigest

_PIECE_BYTES = 1 << 20


class HashingWriter(FileSystemWriter):
    """PyTorch's writer, which also has the digests of this rank's files of tensors in the end.

    A thread reads each file again while it is written and flushed, from the system's memory and not from the disk.
    """

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
        with ThreadPoolExecutor(1) as thread, _FollowedFile(path) as file:
            digest = thread.submit(_digest_of, Path(path), file.written)
            try:
                yield file
            finally:
                file.written.put(None)
            self._digests[Path(path).name] = digest.result()


class _FollowedFile(FileIO):
    """A new file that tells how many more bytes were written, and None in the end."""

    def __init__(self, path: Any) -> None:
        super().__init__(path, "wb")
        self.written: SimpleQueue[int | None] = SimpleQueue()

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        start = 0
        while start < len(whole):
            count = super().write(whole[start : start + _PIECE_BYTES])
            self.written.put(count)
            start += count
        return len(whole)


def _digest_of(path: Path, written: "SimpleQueue[int | None]") -> FileDigest:
    """The digest of a file that grows; `written` says by how much."""
    content, num_bytes = hashlib.sha256(), 0
    piece = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while (left := written.get()) is not None:
            num_bytes += left
            while left:
                length = file.readinto(piece[: min(left, _PIECE_BYTES)])
                if not length:
                    raise OSError(f"{path}: cut short by somebody else while it was written")
                content.update(piece[:length])
                left -= length
    return FileDigest(sha256=content.hexdigest(), num_bytes=num_bytes)
