"""Power cuts, modelled: what a disk may hold if it loses power before any call that opens or changes a file.

What was forced to the disk is there: a file's content by `fsync` of the file, its name by `fsync` of its folder. Of all
else some may be there and some not, in any order: names that lead to files that are empty, cut short or full of zeros;
old names; no names. A rename is done or not done.
"""

import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.failing_calls import Scene
from tests.support.file_calls import watched
from torchrec_cce.errors import CCEError

_open = os.open


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Folders and files by their inodes."""

    root: int
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    """Folder → its names; also of folders that were removed since."""
    contents: dict[int, bytes] = field(default_factory=dict)
    """File → its content."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A moment at which the power may go."""

    before: str
    """The call that was about to be done."""
    now: Tree
    durable: Tree
    """What is on the disk for certain."""

    def disks(self, tries: int, seed: int) -> Iterator["Disk"]:
        """What may be there afterwards: the least, all names without what was not forced, and others by chance."""
        yield Disk(self, "least", random.Random(seed))
        yield Disk(self, "names", random.Random(seed))
        for number in range(tries):
            yield Disk(self, "some", random.Random(seed + number))


class Disk:
    """What a disk holds after a cut."""

    def __init__(self, cut: Cut, mode: str, rng: random.Random) -> None:
        self._cut, self._mode, self._rng = cut, mode, rng

    def __str__(self) -> str:
        return f"cut before {self._cut.before}, {self._mode}"

    def write(self, folder: Path) -> None:
        """To a folder that is not there yet."""
        self._write(self._cut.now.root, folder)

    def _write(self, inode: int, path: Path) -> None:
        now, durable = self._cut.now, self._cut.durable
        if inode in now.contents:
            path.write_bytes(self._content(durable.contents.get(inode, b""), now.contents[inode]))
            return
        path.mkdir()
        old, new = durable.names.get(inode, {}), now.names.get(inode, {})
        for names in _steps(old, new):
            chosen = new if self._is_done() else old
            for name in sorted(names & chosen.keys()):
                self._write(chosen[name], path / name)

    def _is_done(self) -> bool:
        return self._mode == "names" or (self._mode == "some" and self._rng.random() < 0.5)

    def _content(self, old: bytes, new: bytes) -> bytes:
        if old == new or self._mode != "some":
            return old
        torn = new[: self._rng.randrange(len(new) + 1)]
        return self._rng.choice([old, new, torn, torn + bytes(len(new) - len(torn))])


def _steps(old: Mapping[str, int], new: Mapping[str, int]) -> list[set[str]]:
    """The names of a folder, those together that one rename has changed."""
    groups: list[tuple[set[str], set[int]]] = []
    for name in sorted(old.keys() | new.keys()):
        names, inodes = {name}, {each[name] for each in (old, new) if name in each}
        if old.get(name) != new.get(name):
            for group in [group for group in groups if group[1] & inodes]:
                groups.remove(group)
                names, inodes = names | group[0], inodes | group[1]
        groups.append((names, inodes))
    return [names for names, _ in groups]


class Recorder:
    """Records the moments at which the power may go while something is done in the folder `root`.

    Args:
        root: all that is in it is on the disk when this is made.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kept: dict[int, int] = {}  # inode → a descriptor, so that no later file gets its number
        self._last = Tree(root=0)
        self._durable = self._scan()
        self.cuts: list[Cut] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While entered, record; the last moment is that of the end."""
        with watched(self._root, self._before):
            yield
        self.cuts.append(Cut(before="the end", now=self._scan(), durable=self._durable))

    def close(self) -> None:
        for descriptor in self._kept.values():
            os.close(descriptor)

    def _before(self, kind: str, path: Path) -> None:
        now = self._scan()
        self.cuts.append(Cut(before=f"{kind} of {path.relative_to(self._root)}", now=now, durable=self._durable))
        if kind == "fsync":
            inode = path.stat().st_ino
            part = {inode: now.names[inode]} if inode in now.names else {}
            content = {inode: now.contents[inode]} if inode in now.contents else {}
            self._durable = Tree(
                root=now.root, names=self._durable.names | part, contents=self._durable.contents | content
            )

    def _scan(self) -> Tree:
        # Also what was there before: a name on the disk may lead to it still.
        tree = Tree(root=self._root.stat().st_ino, names=dict(self._last.names), contents=dict(self._last.contents))
        self._visit(self._root, tree)
        self._last = tree
        return tree

    def _visit(self, path: Path, tree: Tree) -> None:
        try:
            descriptor = _open(path, os.O_RDONLY)
        except FileNotFoundError:  # another thread has just removed it
            return
        stat = os.fstat(descriptor)
        inode = stat.st_ino
        if inode in self._kept:
            os.close(descriptor)
        else:
            self._kept[inode] = descriptor
        if path.is_dir():
            tree.names[inode] = {}
            for entry in os.scandir(path):
                tree.names[inode][entry.name] = entry.inode()
                self._visit(Path(entry.path), tree)
        else:
            tree.contents[inode] = os.pread(self._kept[inode], stat.st_size, 0)


def cut_at_every_call(scene: Scene, scratch: Path, *, tries: int, seed: int, step: int = 1) -> tuple[int, list[str]]:
    """Do something once, and look at what disks may hold if the power goes at every `step`-th call or at the end.

    Args:
        tries: disks by chance for each cut, beside the two that are always looked at.

    Returns:
        How many disks were looked at, and what was wrong with them.
    """
    folder = scratch / "done"
    shutil.copytree(scene.prepared, folder)
    recorder = Recorder(folder)
    with recorder.recording():
        scene.act(folder)
    recorder.close()
    looked, wrong = 0, []
    ends = len(recorder.cuts) - 1
    for number, cut in enumerate(recorder.cuts):
        if number % step and number != ends:
            continue
        for disk in cut.disks(tries, seed + number):
            found = scratch / f"disk-{looked}"
            disk.write(found)
            looked += 1
            try:
                wrong += [f"{disk}: {each}" for each in scene.wrong(found, number == ends)]
                scene.act(found)
                wrong += [f"{disk}, after the next try: {each}" for each in scene.wrong(found, True)]
            except (CCEError, OSError) as error:
                wrong.append(f"{disk}: {error}")
            shutil.rmtree(found)
    return looked, wrong
