"""Object stores: an S3 server, and memory."""

from collections.abc import Iterator
from itertools import count

import pytest

from tests.support.s3_server import Faults, S3Server, s3_server
from torchrec_cce.errors import RegistryError
from torchrec_cce.maps.store import Store, open_store
from torchrec_cce.testing.store import LARGE, StoreTests, write

_folders = count()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


class TestS3(StoreTests):
    @pytest.fixture
    def store(self, server: S3Server) -> Store:  # type: ignore[override]
        # The server takes longer than its clients' usual patience to put the parts of a large object together.
        self._options = {**server.options, "client_options": {"allow_http": True, "timeout": "30s"}}
        return open_store(server.url(f"store{next(_folders)}"), **self._options)

    def another(self, store: Store) -> Store:
        return open_store(store.url, **self._options)

    def test_what_the_server_refuses_is_one_line(self, store: Store, server: S3Server) -> None:
        store.create("a", b"content")
        server.fail(Faults(refused=1.0))
        try:
            for action, said in (
                (lambda: store.read("a"), "read a"),
                (lambda: store.create("b", b""), "create b"),
                (lambda: store.find("a"), "look for a"),
                (lambda: store.objects("x"), "list x"),
                (lambda: store.sha256("a"), "read a"),
                (lambda: store.open_file("a"), "read a"),
                (lambda: write(store, "b", LARGE), "write b"),
            ):
                with pytest.raises(RegistryError) as error:
                    action()
                assert str(error.value).startswith(f"{store.url}: cannot {said}: ")
                assert "\n" not in str(error.value)
        finally:
            server.recover()
        assert [stored.name for stored in store.objects("")] == ["a"]


class TestMemory(StoreTests):
    @pytest.fixture
    def store(self) -> Store:  # type: ignore[override]
        return open_store("memory:///")


def test_a_store_of_a_kind_that_there_is_not() -> None:
    with pytest.raises(RegistryError, match=r"^ftp://somewhere/registry: cannot set up: "):
        open_store("ftp://somewhere/registry")
