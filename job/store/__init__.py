"""Object storage: what we ask of a bucket (`base`), and who answers (`local`, `gcs`, `s3`, `azure`)."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

from job.code_version import how_to_install
from job.exits import BadConfigError, BadRequestError
from job.progress import note
from job.stop import Stop
from job.store.base import ConflictError, Entry, ObjectExistsError, ObjectMissingError, Store
from job.store.retry import Retry, away_limit_seconds

# Without these the client asks, for traces, about a bucket's metadata, which a trainer may not read;
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
# and gcsfs imports its file system of zonal buckets, which asks by gRPC about the bucket.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

__all__ = ["ConflictError", "Entry", "ObjectExistsError", "ObjectMissingError", "Retry", "Store"]
"""They lie in the modules below, and are imported from here."""

_SECRET_OPTION = re.compile("key|secret|token|pass|sas|credential|connection_string")
_MISLEADING = {
    *("reference", "memory", "data", "filecache", "simplecache", "blockcache", "cached"),
    *("local", "dir", "generic", "async_wrapper", "asyncwrapper"),
}
"""Their content lies elsewhere than their URL says, fills the disk, or has a plain path."""
_ADDRESS = re.compile(r"\[[0-9a-fA-F:.]*\]")
"""Of IPv6."""
_CHAIN = re.compile(r"((?:zip|tar)://[^:]*)::(.+)", re.DOTALL | re.IGNORECASE)
WEB = ("http", "https")
_LOCAL = ("localhost", "127.0.0.1", "::1")
_GOOGLE, _AZURE = ("gcs", "GcsStore", "gs"), ("azure", "AzureStore", "az")
_BACKENDS = {"gs": _GOOGLE, "gcs": _GOOGLE, "s3": ("s3", "S3Store", "s3"), "az": _AZURE, "abfs": _AZURE}
"""By scheme: module, class and extra."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def open_store(uri: str, retry: Retry | None = None) -> Store:
    """Opens `gs://`, `s3://` or `az://BUCKET[/PREFIX]`, `file:///PATH` or a plain path, and touches none of them.

    Backends are imported only when asked for, so that a local run needs no cloud library.

    Args:
        uri: where the objects lie; a path may be relative to the working folder or begin with `~`.
        retry: the patience of all operations; they give up after `retry.PATIENCE_SECONDS` if not given.

    Raises:
        BadRequestError: a scheme nobody here speaks, a name no bucket can have, or a backend whose extra is missing.
        NoPermissionError: no credentials for the bucket were found.
    """
    retry = retry or Retry()
    if not is_remote(uri):
        from job.store.local import LocalStore

        return LocalStore(_local_root(uri), retry)
    scheme, bucket, prefix = _bucket_of(uri)
    module, name, extra = _BACKENDS[scheme]
    try:
        with fsspec_configured():
            store: Store = getattr(import_module(f"job.store.{module}"), name)(bucket, retry)
    except ModuleNotFoundError as error:
        raise BadRequestError(f"{scheme}:// needs more than is installed ({error}): {how_to_install(extra)}") from None
    return store.sub(prefix) if prefix else store


def open_bucket(uri: str, stop: Stop) -> Store:
    """Opens a store as `open_store` does, for a command: it waits while the bucket is away, and until `stop`."""
    return open_store(uri, Retry(away_limit_seconds(), stop, note))


def open_to_read(uri: str, retry: Retry | None = None) -> Store:
    """As `open_store`, and whatever an installed fsspec file system reads: see `job.store.foreign`."""
    if not is_foreign(uri):
        return open_store(uri, retry)
    with fsspec_configured():
        from job.store.foreign import ForeignStore

        return ForeignStore(uri, retry or Retry())


@contextmanager
def fsspec_configured() -> Iterator[None]:
    """In it fsspec may be imported, which reads its configuration, and a file system be made by that.

    Raises:
        BadConfigError: something in there makes no sense.
    """
    try:
        with warnings.catch_warnings():
            # It would print two lines, and go on without the variable.
            warnings.filterwarnings("error", module=r"fsspec\.config")
            yield
    except (ValueError, TypeError, AttributeError, UserWarning) as error:
        # Their words may repeat a secret.
        where = "fsspec's configuration (~/.config/fsspec/*.json, FSSPEC_… variables)"
        raise BadConfigError(f"{where} makes no sense ({type(error).__name__}): correct it") from None


def is_foreign(uri: str) -> bool:
    """Whether a URI is for fsspec alone: no bucket and no path."""
    return is_remote(uri) and uri.partition("://")[0].lower() not in _BACKENDS


def check_source(uri: str) -> None:
    """Returns if something may be read from a URL of `is_foreign`.

    Raises:
        BadRequestError: it holds a password, anybody on the way could change it, or it leads elsewhere.
    """
    scheme = re.split("://|::", uri, maxsplit=1)[0].lower()
    if scheme in ("zip", "tar"):
        raise BadRequestError(f"{scheme}://: a chain is {scheme}://FOLDER::ARCHIVE, and only `data pack` takes one")
    if scheme in _MISLEADING or "::" in _ADDRESS.sub("", uri):
        raise BadRequestError(f"{scheme}:// may lead anywhere: name what it would read")
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018 -- it raises if the port is text, which may be a part of a password
    except ValueError:
        raise BadRequestError("a source that is no URL, or holds a user and password: name a host") from None
    # github://org:repo@ref/path looks as if it had them.
    if scheme != "github" and (parts.password or (parts.username and scheme in WEB)):
        raise BadRequestError("a source must not hold a user and password: lists and logs would show them")
    if not is_safe(uri):
        raise BadRequestError(f"{without_queries(uri)}: anybody on the way could change it: use https://")


def is_safe(url: str) -> bool:
    """Whether the content of a URL cannot be changed on the way."""
    parts = urlsplit(url)
    return parts.scheme.lower() not in ("http", "ftp") or parts.hostname in _LOCAL


def without_queries(uri: str) -> str:
    """A URL for people and records: a query may be a signature."""
    inside, archive = split_chain(uri)
    if inside:
        return f"{inside}::{without_queries(archive)}"
    return uri.partition("?")[0] if is_web(uri) else uri


def is_web(uri: str) -> bool:
    """Whether a URI has a query behind its `?`, where others have a name."""
    return uri.partition("://")[0].lower() in WEB


def split_chain(uri: str) -> tuple[str, str]:
    """A part of an archive, and where that lies: of `zip://train/*.jpg::gs://theirs/all.zip` the two halves.

    The first one is empty for any other URI.
    """
    chain = _CHAIN.fullmatch(uri)
    return (chain[1], chain[2]) if chain else ("", uri)


def split_uri(uri: str) -> tuple[str, str]:
    """The folder of an object, as `open_to_read` takes it, with the query of its URL, and its name."""
    path, mark, query = uri.partition("?") if is_web(uri) else (uri, "", "")
    folder, _, name = path.rpartition("/")
    return f"{folder or '/'}{'/' * folder.endswith(':/')}{mark}{query}", name


def set_storage_options(settings: Iterable[str]) -> None:
    """Adds to fsspec's configuration of this process and its children, before it opens a bucket.

    Args:
        settings: `SCHEME.OPTION=VALUE`, such as `gs.requester_pays=my-project`; a value is JSON, or else text.

    Raises:
        BadRequestError: a setting of another form, or a secret, which lists of processes would show.
    """
    for setting in settings:
        name, _, text = setting.partition("=")
        scheme, _, option = name.partition(".")
        if not (text and option.isidentifier() and scheme.isalnum()):
            raise BadRequestError(f"{name!r}: write SCHEME.OPTION=VALUE, such as gs.requester_pays=my-project")
        if text.lstrip().startswith(("{", "[")):
            raise BadRequestError(f"{name} may hold a secret, which lists would show: it goes into ~/.config/fsspec")
        if (_SECRET_OPTION.search(option.lower()) or {"?", "@"} & {*text}) and text != "anon":
            raise BadRequestError(
                f"{name} is a secret, which lists would show: it goes into ~/.config/fsspec/conf.json"
            )
        os.environ[f"FSSPEC_{scheme}_{option}".upper()] = text


def is_remote(uri: str) -> bool:
    """Whether `uri` lies in a bucket, and not on a disk of this machine."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme.lower() != "file"


def check_uri(uri: str) -> None:
    """Returns if `uri` can be a bucket; needs neither its library nor credentials.

    Raises:
        BadRequestError: as `open_store`.
    """
    if is_remote(uri):
        _bucket_of(uri)
    else:
        _local_root(uri)


def _local_root(uri: str) -> Path:
    """The folder that a path or a `file://` URI names."""
    _, separator, rest = uri.partition("://")
    path = unquote(rest.removeprefix("localhost")) if separator else uri
    # There may be no such user as in `~user`.
    with suppress(RuntimeError):
        if path and "\0" not in path and (path.startswith("/") or not separator):
            return Path(os.path.normpath((Path(path) if separator else Path(path).expanduser()).absolute()))
    raise BadRequestError(f"{uri!r} names no folder: use file:///PATH or a path")


def _bucket_of(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and prefix of a URI that is no folder's."""
    scheme, _, rest = uri.partition("://")
    if (scheme := scheme.lower()) not in _BACKENDS:
        first = "download it first (curl -LO), or " if scheme in ("http", "https") else ""
        use = f"{first}use gs://, s3:// or az://BUCKET, or a path"
        raise BadRequestError(f"{_without_secrets(uri)!r}: nobody here speaks {scheme}://; {use}")
    bucket, _, prefix = rest.strip("/").partition("/")
    if not _BUCKET.fullmatch(bucket) or re.search(r"\?.*=", prefix):
        named = f"use {scheme}://BUCKET[/FOLDER], without a user, password or signature"
        raise BadRequestError(f"{_without_secrets(uri)} names no bucket: {named}")
    return scheme, bucket, prefix


def _without_secrets(uri: str) -> str:
    """The URI for a message: without user and password, and without a query, which may be a signature."""
    return re.sub(r"://.*@", "://…@", re.sub(r"\?.*", "?…", uri))
