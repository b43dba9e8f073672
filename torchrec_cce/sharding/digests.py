"""The digests of a checkpoint: the SHA-256 of each of its files, written into it before it gets its name, and compared
before anything of it is used.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, NonNegativeInt, StringConstraints, TypeAdapter
from pydantic.dataclasses import dataclass

from torchrec_cce.errors import DataFileError, MapFileError
from torchrec_cce.files.atomic import atomic_path
from torchrec_cce.maps.sealed import parse, seal, sha256_of

DIGESTS = "digests.json"
_FORMAT: Literal[1] = 1
_STRICT = ConfigDict(extra="forbid")
TENSORS = ".distcp"
"""What names of files of tensors end in."""
_MAPS = "maps/"
"""Their manifests have digests, too, which whoever opens them compares, and the weights are stamped with theirs; a
checkpoint may also do without them where a registry has them."""
_ARRAYS = ".arrow"
"""So have those of residents, whose manifest is compared here."""
_log = logging.getLogger(__name__)


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name!r} is no file of the folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FileDigest:
    """What a file holds."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    num_bytes: NonNegativeInt

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Of a file, read whole. Raises OSError if it cannot be read, or is no file at all."""
        if not path.is_file():  # a pipe has no end
            raise FileNotFoundError(f"{path}: no such file")
        return cls(sha256=sha256_of(path), num_bytes=path.stat().st_size)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Digests:
    """The digests of a checkpoint."""

    format: Literal[1] = _FORMAT
    files: dict[FileName, tuple[FileDigest, ...]]
    """File, relative to the checkpoint → what it may hold: before and after, while it is replaced."""
    run: dict[FileName, FileDigest] = field(default_factory=dict)
    """File of the run's folder that the checkpoint cannot be understood without → what it held."""

    @property
    def weights(self) -> dict[str, str]:
        """File that has tensors → its SHA-256."""
        return {name: each[0].sha256 for name, each in self.files.items() if name.endswith(TENSORS)}


_ADAPTER = TypeAdapter(Digests)


def digests_of(folder: Path, known: Mapping[str, FileDigest], *, but: str | None = None) -> dict[str, FileDigest]:
    """File → digest, of the files of a folder; those that are not `known` are read, some at a time.

    Args:
        but: what the names of files end in that are left out.
    """
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {DIGESTS}
    wanted = sorted(name for name in names if but is None or not name.endswith(but))
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: known.get(name) or FileDigest.of(folder / name), wanted)
    return dict(zip(wanted, found, strict=True))


def write_digests(folder: Path, files: Mapping[str, FileDigest], run: Mapping[str, FileDigest]) -> None:
    """Write the digests of a checkpoint into it; see `Digests`."""
    _write(folder, Digests(files={name: (each,) for name, each in files.items()}, run=dict(run)))


def renew_digests(folder: Path) -> None:
    """After files of a checkpoint that nobody else reads yet were added and replaced; those of tensors never are."""
    before = read_digests(folder)
    known = {} if before is None else {name: before.files[name][0] for name in before.weights}
    write_digests(folder, digests_of(folder, known), {} if before is None else before.run)


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, which is whole at any moment: also if this is killed half way."""
    digests = read_digests(folder)
    if digests is not None:
        new = FileDigest(sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
        either = (new, FileDigest.of(folder / name))
        _write(folder, Digests(files={**digests.files, name: either}, run=digests.run))
    with atomic_path(folder / name) as temporary:
        temporary.write_bytes(content)


def read_digests(folder: Path) -> Digests | None:
    """The digests of a checkpoint; None if it was written before there were any.

    Raises:
        DataFileError: they are damaged.
    """
    path = folder / DIGESTS
    try:
        return parse(_ADAPTER, path.read_bytes(), str(path), newest_format=_FORMAT)
    except FileNotFoundError:
        return None
    except MapFileError as error:
        raise DataFileError(f"{error}; copy the checkpoint again") from error


def find_damage(folder: Path, digests: Digests, run_dir: Path | None) -> list[str]:
    """What is wrong with each damaged file of a checkpoint, one line a file. All of it is read.

    Args:
        run_dir: the folder of its run, if it is in one.
    """
    return list(filter(None, _compared(folder, digests, run_dir, list(digests.files))))


def check_digests(folder: Path, run_dir: Path | None, *, rank: int = 0, world_size: int = 1) -> None:
    """Compare the files of a checkpoint with its digests before it is used.

    Maps and residents are compared with their manifests when they are opened, and only then. A checkpoint that was
    written before there were digests passes, with a warning.

    Args:
        run_dir: the folder of its run, if it is in one.
        rank, world_size: of the ranks that each call this and compare a part of the files.

    Raises:
        DataFileError: a file is missing or damaged, or of another checkpoint.
    """
    digests = read_digests(folder)
    if digests is None:
        if rank == 0:
            _log.warning("%s: written before checkpoints had digests, so that damage to it may not be noticed", folder)
        return
    names = sorted(name for name in digests.files if not name.startswith(_MAPS) and not name.endswith(_ARRAYS))
    by_size = sorted(names, key=lambda name: digests.files[name][0].num_bytes)
    for wrong in _compared(folder, digests, run_dir, by_size[rank::world_size]):
        if wrong is not None:
            raise DataFileError(f"{wrong}; copy the checkpoint again")


def _compared(folder: Path, digests: Digests, run_dir: Path | None, names: list[str]) -> Iterator[str | None]:
    """What is wrong with each file, or None."""
    of_run = {} if run_dir is None else {run_dir / name: (each,) for name, each in digests.run.items()}
    wanted = {**of_run, **{folder / name: digests.files[name] for name in names}}
    with ThreadPoolExecutor() as pool:
        yield from pool.map(_wrong_with, wanted.keys(), wanted.values())


def _wrong_with(path: Path, wanted: tuple[FileDigest, ...]) -> str | None:
    try:
        found = FileDigest.of(path)
    except OSError as error:
        return f"{path}: missing, or it cannot be read ({error.strerror or 'no such file'})"
    if found in wanted:
        return None
    return (
        f"{path}: damaged, or of another checkpoint: {found.num_bytes} bytes with SHA-256 {found.sha256[:12]}, "
        f"recorded are {wanted[0].num_bytes} with {wanted[0].sha256[:12]}"
    )


def _write(folder: Path, digests: Digests) -> None:
    content: dict[str, Any] = _ADAPTER.dump_python(digests, mode="json")
    with atomic_path(folder / DIGESTS) as temporary:
        temporary.write_bytes(seal(content))
