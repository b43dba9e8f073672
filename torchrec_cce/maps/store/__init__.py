"""Named objects on a disk or in an object store: the little that a registry and a job ask of either."""

import re
from pathlib import Path
from typing import Any

from torchrec_cce.errors import RegistryError
from torchrec_cce.maps.store.local_store import LocalStore
from torchrec_cce.maps.store.object_store import ObjectStore
from torchrec_cce.maps.store.store import Store

__all__ = ["Store", "open_store"]

_SLASHES_MISSING = re.compile(r"(s3a?|gs|az|azure|adl|abfss?|https?|memory|file):(?!//)", re.IGNORECASE)


def open_store(url: str | Path, **options: Any) -> Store:
    """The store behind a URL: one class for each kind of back end.

    Args:
        url: a local path, or `file://`, `s3://`, `gs://`, `az://` and whatever else obstore knows. Credentials and
            endpoints come from the environment, as each cloud's own tools read them. What comes after a bucket is the
            key, letter by letter: `%20` is no space. (`file://` and `https://` are URLs, in which it is one.)
        options: for an object store, as obstore's `from_url` takes them: `config`, `client_options`, `retry_config`,
            `credential_provider`. A local folder has none.

    Raises:
        RegistryError: no store of this kind, a URL with less than two slashes, or it cannot be set up.
        MissingExtraError: obstore, which all but a folder needs, is not installed.
    """
    text = str(url)
    short = _SLASHES_MISSING.match(text)
    if short is not None:
        rest, root = text[short.end() :].lstrip("/"), "/" * (short[1].lower() == "file")
        raise RegistryError(
            f"{text}: a URL has two slashes there, {short[0]}//{root}{rest}; a folder of this name is ./{text}"
        )
    is_local = "://" not in text or text.startswith("file://")
    return LocalStore(text) if is_local else ObjectStore(text, **options)
