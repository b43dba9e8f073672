"""A folder on a disk as a store."""

from pathlib import Path

import pytest

from torchrec_cce.errors import RegistryError
from torchrec_cce.maps.store import Store, open_store
from torchrec_cce.maps.store.local_store import LocalStore
from torchrec_cce.testing.store import StoreTests, write


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:  # type: ignore[override]
        (tmp_path / "store").mkdir()
        return open_store(tmp_path / "store")

    def another(self, store: Store) -> Store:
        return open_store(store.url)

    def test_its_objects_are_files(self, store: Store, tmp_path: Path) -> None:
        assert isinstance(store, LocalStore)
        assert store.path() == store.root == tmp_path / "store"
        assert store.path("a/b") == tmp_path / "store" / "a" / "b"

    def test_leftovers_are_unfinished_files_and_empty_folders(self, store: Store) -> None:
        store.create("a/whole", b"")
        for name in ("a/data#1", "a/record.json#0badcafe"):
            store.path(name).write_bytes(b"12")  # type: ignore[union-attr]
        store.path("b/c").mkdir(parents=True)  # type: ignore[union-attr]
        found = {stored.name: stored.num_bytes for stored in store.leftovers()}
        assert found.pop("b/c") > 0
        assert found == {"a/data#1": 2, "a/record.json#0badcafe": 2}


def test_a_folder_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    strange = tmp_path / "a b%20#ü"
    open_store(strange).create("a", b"content")
    for url in (strange, str(strange), strange.as_uri(), strange.name):
        store = open_store(url)
        assert store.read("a") == b"content"
        assert store.url == strange.as_uri()
        assert [stored.name for stored in store.objects("")] == ["a"]
    assert {path.name for path in tmp_path.iterdir()} == {strange.name}


def test_a_folder_that_is_not_there_is_said_so_and_made_by_the_first_write(tmp_path: Path) -> None:
    for step, make in enumerate((lambda store: store.create("a", b""), lambda store: write(store, "a", b""))):
        store = open_store(tmp_path / "new" / f"store{step}")
        assert not store.exists
        assert store.find("a") is None
        assert store.leftovers() == []
        for read in (lambda: store.read("a"), lambda: store.objects("")):  # noqa: B023
            with pytest.raises(
                RegistryError, match=rf"store{step}: there is no such folder; .*`torchrec-cce maps publish`"
            ):
                read()
        assert not (tmp_path / "new" / f"store{step}").exists()
        make(store)
        assert store.exists


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = open_store(tmp_path / "file" / "store")
    with pytest.raises(RegistryError, match=r"^file://.*: cannot write a/b: .*Not a directory"), store.writer("a/b"):
        pass
    with pytest.raises(RegistryError, match=r"^file://.*: cannot create a/b: .*Not a directory"):
        store.create("a/b", b"")
