"""Object storage: what we ask of a bucket (`base`), and who answers (`local`, `gcs`, `s3`)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from job.exits import BadRequestError
from job.store.base import Blob, ConflictError, Entry, ObjectExistsError, ObjectMissingError, Store
from job.store.retry import Retry

__all__ = [
    "Blob",
    "ConflictError",
    "Entry",
    "ObjectExistsError",
    "ObjectMissingError",
    "Retry",
    "Store",
    "check_uri",
    "is_remote",
    "open_store",
]

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def open_store(uri: str, retry: Retry | None = None) -> Store:
    """Opens `gs://` or `s3://BUCKET[/PREFIX]`, `file:///PATH` or a plain path, without touching any of them.

    Backends are imported only when asked for, so that a local run needs no cloud library.

    Args:
        uri: where the objects lie; a path may be relative to the working folder or begin with `~`.
        retry: the patience of all operations; they give up after `retry.DEADLINE_SECONDS` if not given.

    Raises:
        BadRequestError: a scheme nobody here speaks, a name no bucket can have, or a backend whose extra is missing.
        NoPermissionError: no credentials for the bucket were found.
    """
    retry = retry or Retry()
    scheme, separator, rest = uri.partition("://")
    match scheme.lower() if separator else "file":
        case "file":
            return _open_local(unquote(rest.removeprefix("localhost")) if separator else uri, uri, retry)
        case "gs":
            return _open_gcs(rest, retry)
        case "s3":
            return _open_s3(rest, retry)
        case _:
            raise _unknown_scheme(scheme, uri)


def is_remote(uri: str) -> bool:
    """Whether `uri` lies in a bucket, and not on a disk of this machine."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme.lower() != "file"


def check_uri(uri: str) -> None:
    """Returns if `uri` can be a bucket; needs neither its library nor credentials.

    Raises:
        BadRequestError: as `open_store`.
    """
    scheme, _, rest = uri.partition("://")
    if not is_remote(uri):
        open_store(uri)
    elif scheme.lower() in ("gs", "s3"):
        _bucket_and_prefix(scheme.lower(), rest)
    else:
        raise _unknown_scheme(scheme, uri)


def _open_local(path: str, uri: str, retry: Retry) -> Store:
    from job.store.local import LocalStore

    if not path or "\0" in path or (path != uri and not path.startswith("/")):
        raise BadRequestError(f"{uri!r} names no folder: use file:///PATH or a path")
    try:
        path = str(Path(path).expanduser()) if path == uri else path
    except RuntimeError:
        raise BadRequestError(f"{uri!r}: this user has no home folder here: write the path out") from None
    return LocalStore(Path(os.path.normpath(Path(path).absolute())), retry)


def _open_gcs(rest: str, retry: Retry) -> Store:
    name, prefix = _bucket_and_prefix("gs", rest)
    try:
        from job.store.gcs import GcsStore
    except ModuleNotFoundError as error:
        raise _extra_missing("gs", error) from None
    store = GcsStore(name, retry)
    return store.sub(prefix) if prefix else store


def _open_s3(rest: str, retry: Retry) -> Store:
    name, prefix = _bucket_and_prefix("s3", rest)
    try:
        from job.store.s3 import S3Store
    except ModuleNotFoundError as error:
        raise _extra_missing("s3", error) from None
    store = S3Store(name, retry)
    return store.sub(prefix) if prefix else store


def _bucket_and_prefix(scheme: str, rest: str) -> tuple[str, str]:
    bucket, _, prefix = rest.strip("/").partition("/")
    if not _BUCKET.fullmatch(bucket) and "@" in rest:
        raise BadRequestError(
            f"{_without_secrets(f'{scheme}://{rest}')} has a user or password in it, which every log would repeat: "
            "leave it out, and give credentials as the provider's own tools take them"
        )
    if not _BUCKET.fullmatch(bucket):
        raise BadRequestError(f"{scheme}://{rest} names no bucket: use {scheme}://BUCKET or {scheme}://BUCKET/FOLDER")
    return bucket, prefix


def _unknown_scheme(scheme: str, uri: str) -> BadRequestError:
    return BadRequestError(
        f"{_without_secrets(uri)!r}: nobody here speaks {scheme}://; use gs://BUCKET, s3://BUCKET, "
        "file:///PATH or a path"
    )


def _without_secrets(uri: str) -> str:
    """The URI for a message: without user and password, and without a query, which may be a signature."""
    return re.sub(r"://.*@", "://…@", re.sub(r"\?.*", "?…", uri))


def _extra_missing(scheme: str, error: ModuleNotFoundError) -> BadRequestError:
    return BadRequestError(f"{scheme}:// needs more than is installed ({error}): pip install 'ddpm-job[{scheme}]'")
