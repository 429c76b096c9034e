"""The bucket of a campaign: a given one, or one of a real server that starts for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KINDS = {
    "file": "a folder",
    "gs": "a new fake-gcs-server",
    "s3": "a new SeaweedFS",
    "s3-moto": "a new moto server",
    "az": "a new Azurite",
}


@contextmanager
def bucket(wanted: str, folder: Path) -> Iterator[str]:
    """Yields the URI of a bucket, whose server runs while the context lasts.

    Args:
        wanted: one of `KINDS`, or the URI of a bucket.
        folder: the folder for the data and logs of a server.
    """
    from tests.servers import SERVERS, new_bucket

    kind = wanted.removesuffix("://")
    if kind not in KINDS:
        yield wanted
        return
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        yield f"file://{folder.resolve()}"
        return
    server = SERVERS[kind]
    with server.start(folder) as url, _variables(**server.variables(url)):
        yield new_bucket(kind, url)


@contextmanager
def _variables(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
