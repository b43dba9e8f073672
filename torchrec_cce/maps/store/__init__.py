"""Named objects on a disk or in an object store: the little that a registry and a job ask of either."""

from pathlib import Path
from typing import Any

from torchrec_cce.maps.store.object_store import LocalStore, ObjectStore
from torchrec_cce.maps.store.store import Store

__all__ = ["Store", "open_store"]


def open_store(url: str | Path, **options: Any) -> Store:
    """The store behind a URL: one class for each kind of back end.

    Args:
        url: a local path, or `file://`, `s3://`, `gs://`, `az://` and whatever else obstore knows. Credentials and
            endpoints come from the environment, as each cloud's own tools read them.
        options: for an object store, as obstore's `from_url` takes them: `config`, `client_options`, `retry_config`,
            `credential_provider`. A local folder has none.

    Raises:
        RegistryError: no store of this kind, or it cannot be set up.
        MissingExtraError: obstore is not installed.
    """
    text = str(url)
    is_local = "://" not in text or text.startswith("file://")
    return LocalStore(text) if is_local else ObjectStore(text, **options)
