"""The folder that a job fills: files that appear whole or not at all, and `_remap`, which says what is finished.

Readers of folders pass over names that begin with `_`. `job.json` is there before the first file; a file's record is
created after the file; `manifest.json` comes when all are there. So a job that died goes on where it was.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import field, fields
from hashlib import sha256
from typing import Any, Literal, get_args

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from torchrec_cce.data.names import is_hidden
from torchrec_cce.data.remapped_format import RemappedFormat
from torchrec_cce.errors import CCEError, JobError
from torchrec_cce.files.atomic import atomic_path, hold
from torchrec_cce.files.lock import FolderLock
from torchrec_cce.jobs.remap.input import InputFile
from torchrec_cce.maps.manifest import Count, Sha256
from torchrec_cce.maps.sealed import parse, seal
from torchrec_cce.maps.store import Store, open_store
from torchrec_cce.maps.store.lease import Lease, check_lock, lock_folder

FORMAT: Literal[2] = 2
"""Of records and manifests. Format 1 has no digests of files."""
FOLDER = "_remap"
MANIFEST = f"{FOLDER}/manifest.json"

FileFormat = Literal["parquet", "arrow"]
Compression = Literal["zstd", "lz4", "snappy", "gzip", "none"]
FILE_FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)

_JOB_FORMAT: Literal[1] = 1
_JOB = f"{FOLDER}/job.json"
_CONFIG = ConfigDict(extra="forbid")
_WHAT = "is at work in this folder"
_DYING_S = 30.0
"""How long workers of a job that was killed may take to end."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RemapJob:
    """Everything that decides the bytes of the output."""

    format: Literal[1] = _JOB_FORMAT
    input: str
    """The folder of the raw files."""
    files: tuple[InputFile, ...]
    file_format: FileFormat
    compression: Compression
    remapped: RemappedFormat

    def output_name(self, file: InputFile) -> str:
        """Path of a file's output in the output folder."""
        return file.name if self.file_format == "parquet" else f"{file.name.removesuffix('.parquet')}.arrow"

    def differences(self, other: "RemapJob") -> list[str]:
        """What differs from another job, in words."""
        found = [
            f"{name} {_shown(getattr(mine, name))}, not {_shown(getattr(theirs, name))}"
            for mine, theirs in ((self, other), (self.remapped, other.remapped))
            for name in (field.name for field in fields(mine))
            if name not in ("files", "remapped", "features") and getattr(mine, name) != getattr(theirs, name)
        ]
        mine, theirs = (
            {name: (feature.column, feature.map_digest) for name, feature in job.remapped.features.items()}
            for job in (self, other)
        )
        found += [
            f"feature {name}" for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)
        ]
        files, others = ({file.name: file for file in job.files} for job in (self, other))
        for name in sorted(files.keys() | others.keys()):
            if files.get(name) != others.get(name):
                what = "has changed" if name in files and name in others else "is new" if name in files else "is gone"
                found.append(f"input file {name} {what}")
        return found


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class FinishedFile:
    """A file of the output."""

    format: Literal[1, 2] = FORMAT
    input: str
    """Name of the raw file."""
    name: str
    num_rows: Count
    num_bytes: Count
    sha256: Sha256 | None = None
    """Of its bytes; None in a record of format 1."""
    unseen: dict[str, Count] = field(default_factory=dict)
    """Key of a feature in the format → how many IDs of its column the map does not know, and has something for; no
    features of which it knows all."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RemapManifest:
    """What a complete output folder holds."""

    format: Literal[1, 2] = FORMAT
    complete: Literal[True] = True
    num_rows: Count
    num_bytes: Count
    unseen: dict[str, Count] = field(default_factory=dict)
    """Of all files."""
    files: tuple[FinishedFile, ...]
    remapped: RemappedFormat


_JOBS = TypeAdapter(RemapJob)
_FINISHED = TypeAdapter(FinishedFile)
_MANIFESTS = TypeAdapter(RemapManifest)


def read_manifest(storage: Store) -> RemapManifest:
    """The manifest of a complete output folder.

    Raises:
        JobError: there is none: the job has not finished.
        MapFileError: it is damaged.
    """
    try:
        document = storage.read(MANIFEST)
    except FileNotFoundError as error:
        raise JobError(f"{storage.url}/{MANIFEST}: there is none, the job has not finished; run it again") from error
    return parse(_MANIFESTS, document, f"{storage.url}/{MANIFEST}", newest_format=FORMAT)


def check_files(storage: Store, files: Iterable[FinishedFile]) -> None:
    """Read finished files, several at a time, and compare them with their records.

    Raises:
        JobError: one is gone, or other than it was written.
    """

    def check(file: FinishedFile) -> None:
        mend = f"restore it, or delete {_record_name(file.input)} and {MANIFEST} to have it made again"
        there = storage.find(file.name)
        if there is None or there.num_bytes != file.num_bytes:
            now = "is gone" if there is None else f"has {there.num_bytes}"
            raise JobError(f"{storage.url}/{file.name}: was finished with {file.num_bytes} bytes and now {now}; {mend}")
        if file.sha256 is not None and (found := storage.sha256(file.name)) != file.sha256:
            raise JobError(
                f"{storage.url}/{file.name}: was finished with SHA-256 {_shown(file.sha256)} and now has "
                f"{_shown(found)}: it has changed or is damaged; {mend}"
            )

    with ThreadPoolExecutor() as threads:
        for _ in threads.map(check, files):
            pass


def verify(output: str, options: Mapping[str, Any] | None = None) -> RemapManifest:
    """Read all files of a complete output folder, and compare them with what its manifest says.

    Files whose manifest is of format 1 have no digest: of those, only the sizes are compared.

    Args:
        output: the folder, on a disk or in an object store.
        options: of the object store, see `open_store`.

    Raises:
        JobError: the job has not finished; a file is gone, is other than it was written, or is none of the job's.
        MapFileError: the manifest is damaged.
        RegistryError: the store did not answer.
    """
    storage = open_store(output, **(options or {}))
    manifest = read_manifest(storage)
    names = {file.name for file in manifest.files}
    for found in storage.objects(""):
        is_data = found.name.endswith((".parquet", ".arrow")) and not is_hidden(found.name)
        if is_data and found.name not in names:
            raise JobError(f"{storage.url}/{found.name}: the job has not written it; readers take it for data, move it")
    check_files(storage, manifest.files)
    return manifest


class OutputFolder:
    """One job's output, on a disk or in an object store."""

    def __init__(self, storage: Store) -> None:
        self._storage = storage
        self.url = storage.url
        self.token = ""
        """Of the lock, while `begun` is entered."""

    @contextmanager
    def begun(self, job: RemapJob) -> Iterator[dict[str, FinishedFile]]:
        """Own the folder for `job`; yields the files that are finished already, by the names of their inputs.

        Nobody else can own it meanwhile. On a disk, what an earlier process left unfinished is removed. Where the lease
        of an object store is lost, both jobs write the same bytes until the loser notices, before its next record.

        Raises:
            JobError: the folder is another job's or holds other data, or a job is at work in it.
        """
        name = f"{self.url}/{_JOB}"
        if self._storage.find(_JOB) is None and self._other_data():
            raise JobError(f"{self.url}: holds other data than a remap job's; choose a new folder")
        if not self._storage.create(_JOB, seal(_JOBS.dump_python(job, mode="json"))):
            there = parse(_JOBS, self._storage.read(_JOB), name, newest_format=_JOB_FORMAT)
            different = job.differences(there)
            if different:
                more = f" and {len(different) - 3} more" if len(different) > 3 else ""
                raise JobError(
                    f"{self.url}: is the output of another job: {'; '.join(different[:3])}{more}. Choose a new folder, "
                    "or run the job that it is of"
                )
        with self._locked() as lock, nullcontext() if self._storage.path() is None else self._swept():
            self.token = lock.token
            yield self._finished(job)

    def at_work(self) -> AbstractContextManager[object]:
        """For a worker: while it writes, nobody takes its unfinished files for debris."""
        folder = self._storage.path(FOLDER)
        return nullcontext() if folder is None else hold(folder, shared=True)

    @contextmanager
    def file(self, name: str) -> Iterator[Callable[[Any], object]]:
        """A function to write a file with, which is there when the block ends well.

        Raises:
            JobError: it cannot be written, for example because the disk is full.
        """

        path = self._storage.path(name)
        if path is None:
            with self._storage.writer(name) as sink:
                yield self._guarded(name, lambda data: sink.write(memoryview(data).cast("B")))
            return
        with self._errors(name), atomic_path(path) as temporary, temporary.open("wb", 0) as file:
            sink = Gathered(file.fileno())
            yield self._guarded(name, sink.write)
            sink.flush()

    def _guarded(self, name: str, write: Callable[[Any], object]) -> Callable[[Any], object]:
        def guarded(data: Any) -> None:
            try:
                write(data)
            except CCEError:
                raise
            except OSError as error:
                raise self._failed(name, error) from error

        return guarded

    def record(self, file: FinishedFile, token: str) -> None:
        """Note that a file is finished.

        Raises:
            JobError: the folder's lock is no longer that of `token`: the job was taken for dead, and another goes on.
        """
        check_lock(self._storage, FOLDER, token, what=_WHAT)
        self._storage.create(_record_name(file.input), seal(_FINISHED.dump_python(file, mode="json")))

    def complete(self, job: RemapJob, files: list[FinishedFile]) -> RemapManifest:
        """Note that all files are finished: write the manifest. Raises JobError as `record`."""
        check_lock(self._storage, FOLDER, self.token, what=_WHAT)
        manifest = RemapManifest(
            num_rows=sum(file.num_rows for file in files),
            num_bytes=sum(file.num_bytes for file in files),
            unseen=dict(sorted(sum((Counter(file.unseen) for file in files), Counter()).items())),
            files=tuple(sorted(files, key=lambda file: file.name)),
            remapped=job.remapped,
        )
        self._storage.create(MANIFEST, seal(_MANIFESTS.dump_python(manifest, mode="json")))
        return manifest

    def _finished(self, job: RemapJob) -> dict[str, FinishedFile]:
        found = {}
        for file in job.files:
            name = _record_name(file.name)
            try:
                document = self._storage.read(name)
            except FileNotFoundError:
                continue
            found[file.name] = parse(_FINISHED, document, f"{self.url}/{name}", newest_format=FORMAT)
        check_files(self._storage, found.values())
        return found

    def _other_data(self) -> bool:
        root = self._storage.path()
        if root is None:
            return bool(self._storage.objects(""))
        return root.is_dir() and any(path.name != FOLDER for path in root.iterdir())

    def _locked(self) -> FolderLock | Lease:
        return lock_folder(self._storage, FOLDER, what=_WHAT)

    @contextmanager
    def _swept(self) -> Iterator[None]:
        """While entered, nobody else writes to the folder, and before and after it holds nothing unfinished."""
        # Workers outlive a job that was killed by a moment.
        deadline = time.monotonic() + _DYING_S
        while not self._remove_debris():
            if time.monotonic() > deadline:
                raise JobError(f"{self.url}: workers of an earlier job still write to this folder; end them")
            time.sleep(0.05)
        try:
            yield
        finally:
            self._remove_debris()  # of workers that were ended because another one failed

    def _remove_debris(self) -> bool:
        """Remove unfinished files; False, and nothing is removed, while a worker may be writing them."""
        root = self._storage.path()
        assert root is not None
        try:
            lock = hold(root / FOLDER)
        except BlockingIOError:
            return False
        with lock:
            for where, _, names in os.walk(root):
                for name in names:
                    unfinished = name.startswith(".") and name.endswith(".tmp")
                    if unfinished or ("#" in name and where.startswith(str(root / FOLDER))):
                        os.unlink(os.path.join(where, name))
        return True

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn what the operating system says while a file is written into a JobError of one line."""
        try:
            yield
        except CCEError:
            raise
        except OSError as error:
            raise self._failed(name, error) from error

    def _failed(self, name: str, error: OSError) -> JobError:
        return JobError(
            f"{self.url}/{name}: cannot be written ({error.strerror or error}); what is finished stays, make room "
            "and run the job again"
        )


def _record_name(name: str) -> str:
    return f"{FOLDER}/files/{sha256(name.encode()).hexdigest()[:32]}.json"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) != 64 else f"{text[:12]}…"


_ENOUGH_BYTES = 1 << 20
_MOST_PARTS = 512  # Linux takes 1024


class Gathered:
    """Writes to a file descriptor, front to back, many parts in one call.

    Python's own buffered file copies each part while it holds the interpreter's lock, for which other threads wait.
    A part that it was given must not change before `flush`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._parts: list[memoryview] = []
        self._num_bytes = 0

    def write(self, data: Any) -> None:
        """Take a part, of anything that has bytes. Raises OSError, now or later."""
        part = memoryview(data).cast("B")
        self._parts.append(part)
        self._num_bytes += len(part)
        if self._num_bytes >= _ENOUGH_BYTES or len(self._parts) == _MOST_PARTS:
            self.flush()

    def flush(self) -> None:
        """Write what was taken. Raises OSError."""
        left, self._parts, self._num_bytes = self._parts, [], 0
        while left:
            written = os.writev(self._descriptor, left)
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]
