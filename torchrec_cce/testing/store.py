"""What every store must do, as a pytest class: a new back end passes it by subclassing it.

class TestMyStore(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return MyStore("mine://an-empty-folder")
"""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from torchrec_cce.errors import RegistryError
from torchrec_cce.maps.store.store import Store

LARGE = np.random.default_rng(0).bytes(10_000_000)
"""More than a writer sends at a time, and not a multiple of any block."""


def write(store: Store, name: str, content: bytes, *, piece: int = 3_000_000) -> None:
    """Write an object front to back, in pieces."""
    with store.writer(name) as sink:
        for start in range(0, len(content), piece):
            sink.write(memoryview(content)[start : start + piece])


def names(store: Store, folder: str = "", after: str | None = None) -> list[str]:
    return [stored.name for stored in store.objects(folder, after=after)]


class StoreTests(ABC):
    """The contract of `torchrec_cce.maps.store.Store`. A subclass gives the fixture `store`, and what goes beyond."""

    @abstractmethod
    def store(self) -> Store:
        """A fixture: an empty store, to which nobody else writes. Its folder is there to be read from."""

    def another(self, store: Store) -> Store:
        """A second connection to the same objects, as of another process; the same one where there can be no other."""
        return store

    def test_what_is_created_is_read_by_all(self, store: Store) -> None:
        assert store.create("a/one.json", b"{}")
        other = self.another(store)
        assert other.exists
        assert other.url == store.url
        assert other.read("a/one.json") == b"{}"
        assert not other.create("a/one.json", b"another")
        assert store.read("a/one.json") == b"{}"
        assert store.create("empty", b"")
        assert store.read("empty") == b""

    def test_of_many_that_create_one_object_one_does(self, store: Store) -> None:
        others = [self.another(store) for _ in range(8)]
        with ThreadPoolExecutor(len(others)) as pool:
            for step in range(5):
                contents = [f"{number} in step {step}".encode() for number in range(len(others))]
                created = list(pool.map(lambda other, content: other.create(f"log/{step}", content), others, contents))  # noqa: B023
                assert Counter(created) == {True: 1, False: len(others) - 1}
                assert store.read(f"log/{step}") == contents[created.index(True)]
        assert names(store) == [f"log/{step}" for step in range(5)]

    @pytest.mark.parametrize("content", [b"", b"small", LARGE], ids=["empty", "small", "large"])
    def test_an_object_of_any_size(self, store: Store, content: bytes, tmp_path: Path) -> None:
        digest = hashlib.sha256(content).hexdigest()
        write(store, "versions/1/data", content)
        store.flush("versions/1/data")
        store.flush("versions/1")
        other = self.another(store)
        assert other.sha256("versions/1/data") == digest
        assert other.download("versions/1/data", tmp_path / "copy") == digest
        assert (tmp_path / "copy").read_bytes() == content
        (listed,) = other.objects("versions")
        assert (listed.name, listed.num_bytes) == ("versions/1/data", len(content))
        path = other.path("versions/1/data")
        assert path is None or path.read_bytes() == content
        assert other.leftovers() == []

    def test_a_file_is_read_at_any_place(self, store: Store) -> None:
        write(store, "data", LARGE)
        with self.another(store).open_file("data") as file:
            assert file.size() == len(LARGE)
            for start, length in ((0, 5), (len(LARGE) - 5, 9), (4_999_999, 100_000), (3, 0)):
                file.seek(start)
                assert file.tell() == start
                assert file.read(length) == LARGE[start : start + length]
            file.seek(len(LARGE) - 7)
            assert file.read() == LARGE[-7:]

    def test_an_object_appears_when_it_is_complete(self, store: Store) -> None:
        with store.writer("data") as sink:
            sink.write(memoryview(LARGE)[:9_000_000])
            assert names(self.another(store)) == []
            assert store.find("data") is None
            sink.write(memoryview(LARGE)[9_000_000:])
        assert store.sha256("data") == hashlib.sha256(LARGE).hexdigest()

    @pytest.mark.parametrize("written", [5, len(LARGE)])
    def test_a_writer_that_fails_leaves_no_object(self, store: Store, written: int) -> None:
        def fail_after(num_bytes: int) -> None:
            with store.writer("data") as sink:
                sink.write(memoryview(LARGE)[:num_bytes])
                raise KeyError

        with pytest.raises(KeyError):
            fail_after(written)
        assert store.find("data") is None
        assert names(store) == []
        write(store, "data", b"after all")
        assert store.read("data") == b"after all"

    def test_a_writer_takes_the_place_of_an_object(self, store: Store) -> None:
        write(store, "data", b"what was there before")
        write(store, "data", b"new")
        assert self.another(store).read("data") == b"new"
        assert [stored.num_bytes for stored in store.objects("")] == [3]

    def test_a_writer_says_in_our_words_what_goes_wrong(self, store: Store) -> None:
        with pytest.raises(RegistryError) as error, store.writer("data"):
            raise OSError("no room\nat all")
        assert str(error.value) == f"{store.url}: cannot write data: no room"
        with pytest.raises(RegistryError) as error, store.writer("data"):
            raise RegistryError("our own error")
        assert str(error.value) == "our own error"

    def test_objects_of_a_folder_in_order(self, store: Store) -> None:
        for name in ("b/2", "a/9", "a/10", "a", "ab/1", "b/c/1"):
            if name != "a" or store.path() is None:  # on a disk it cannot be beside the folder `a`
                write(store, name, name.encode())
        assert names(store, "a") == ["a/10", "a/9"]
        assert names(store, "b") == ["b/2", "b/c/1"]
        assert names(store, "none") == []
        assert [name for name in names(store) if name != "a"] == ["a/10", "a/9", "ab/1", "b/2", "b/c/1"]
        assert names(store, "a", after="a/10") == ["a/9"]
        assert names(store, "a", after="a/9") == []

    def test_an_object_is_found_with_its_size_and_time(self, store: Store) -> None:
        began = datetime.now(timezone.utc)
        store.create("day=1/a b é%20.parquet", b"12345")
        found = store.find("day=1/a b é%20.parquet")
        assert found is not None
        assert (found.name, found.num_bytes) == ("day=1/a b é%20.parquet", 5)
        assert abs(found.modified - began) < timedelta(minutes=1)
        (listed,) = store.objects("day=1")
        assert (listed.name, listed.num_bytes) == (found.name, 5)
        assert found.etag in (None, listed.etag)
        assert store.read(found.name) == b"12345"

    def test_what_is_not_there(self, store: Store, tmp_path: Path) -> None:
        store.create("there", b"")
        assert store.find("a/none") is None
        for missing in (
            lambda: store.read("a/none"),
            lambda: store.sha256("a/none"),
            lambda: store.download("a/none", tmp_path / "copy"),
            lambda: store.open_file("a/none"),
        ):
            with pytest.raises(FileNotFoundError):
                missing()

    def test_objects_and_folders_are_deleted(self, store: Store) -> None:
        for name in ("a/1", "a/b/2", "ab", "c"):
            store.create(name, b"content")
        store.delete("c")
        store.delete("a")
        assert names(self.another(store)) == ["ab"]
        assert store.find("a/1") is None
        store.delete("a")
        store.delete("none")
        assert store.create("a/1", b"again")
        assert names(store) == ["a/1", "ab"]
        assert store.leftovers() == []
