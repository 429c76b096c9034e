"""Object storage: the operations of a bucket (`base`), the table of its kinds, and the meaning of a URI."""

from __future__ import annotations

import configparser
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from urllib.parse import unquote, urlsplit

from job.exits import BadConfigError, BadRequestError, needs_extra
from job.progress import note
from job.stop import Stop
from job.store.base import READ_BYTES, ConflictError, Entry, ObjectExistsError, ObjectMissingError, Store
from job.store.retry import Retry, away_limit_seconds

# Without these the client reads the bucket's metadata for traces, which a trainer may not read;
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
# and gcsfs imports its file system of zonal buckets, which reads them by gRPC.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

__all__ = ["READ_BYTES", "ConflictError", "Entry", "ObjectExistsError", "ObjectMissingError", "Retry", "Store"]
"""Names of the modules below that other rooms import from here."""

_MISLEADING = {
    *("reference", "memory", "data", "filecache", "simplecache", "blockcache", "cached"),
    *("local", "dir", "generic", "async_wrapper", "asyncwrapper"),
}
"""File systems whose URL does not name the location of the content, that fill the disk, or that have a plain path."""
_ADDRESS = re.compile(r"\[[0-9a-fA-F:.]*\]")
"""An IPv6 address in a URL."""
_CHAIN = re.compile(r"((?:zip|tar)://[^:]*)::(.+)", re.DOTALL | re.IGNORECASE)
WEB = ("http", "https")
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Kind:
    """A kind of bucket. Its client library is imported when a bucket is opened, and not for what is declared here.

    Attributes:
        schemes: of its URIs; the first one is in messages.
        extra: installs the client library.
        store: the class that opens a bucket, as `MODULE:CLASS`.
        files: the default paths of credential files, by the variable that names another path.
        variables: settings without a secret, which a container gets as well.
        secret: a variable with a secret, which a container does not get.
    """

    schemes: tuple[str, ...]
    extra: str
    store: str
    files: Mapping[str, str]
    variables: tuple[str, ...]
    secret: str = ""

    def credential_files(self) -> dict[str, Path]:
        """Returns the credential files that exist on this machine, by the variable that names the path."""
        found = {}
        for variable, usual in (dict(self.files) | _FSSPEC_FOLDER).items():
            # As google.auth looks for it.
            usual = usual.replace("~/.config/gcloud", os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud")
            path = os.path.expanduser(os.environ.get(variable) or usual)  # noqa: PTH111 -- a user may have no home
            if os.path.exists(path):  # noqa: PTH110 -- the user may not look there
                found[variable] = Path(path).absolute()
        return found


_FSSPEC_FOLDER = {"FSSPEC_CONFIG_DIR": "~/.config/fsspec"}
"""The folder of fsspec's configuration, which may hold credentials for every kind."""
_GOOGLE_FILES = {"GOOGLE_APPLICATION_CREDENTIALS": "~/.config/gcloud/application_default_credentials.json"}
_AWS_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
_AWS = ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_GOOGLE = ("GOOGLE_CLOUD_PROJECT", "STORAGE_EMULATOR_HOST")
KINDS = (
    Kind(("gs", "gcs"), "gs", "job.store.gcs:GcsStore", _GOOGLE_FILES, _GOOGLE),
    Kind(("s3",), "s3", "job.store.objects:S3Store", _AWS_FILES, _AWS, "AWS_SECRET_ACCESS_KEY"),
    Kind(("az", "abfs"), "az", "job.store.objects:AzureStore", {}, ("AZURE_STORAGE_ACCOUNT_NAME",)),
)
_BY_SCHEME = {scheme: kind for kind in KINDS for scheme in kind.schemes}
URIS = " or ".join(", ".join(f"{kind.schemes[0]}://" for kind in KINDS).rsplit(", ", 1))
"""The schemes of all kinds, for messages."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def open_store(uri: str, retry: Retry | None = None) -> Store:
    """Opens `gs://`, `s3://` or `az://BUCKET[/PREFIX]`, `file:///PATH` or a plain path, without any request.

    A backend is imported when it is opened, so that a local run needs no cloud library.

    Args:
        uri: where the objects lie; a path may be relative to the working folder or begin with `~`.
        retry: how operations are repeated; by default they give up after `retry.PATIENCE_SECONDS`.

    Raises:
        BadRequestError: an unsupported scheme, an impossible bucket name, or a backend whose extra is missing.
        NoPermissionError: no credentials for the bucket were found.
    """
    retry = retry or Retry()
    if not is_remote(uri):
        from job.store.local import LocalStore

        return LocalStore(_local_root(uri), retry)
    scheme, bucket, prefix = _bucket_of(uri)
    kind = _BY_SCHEME[scheme]
    with needs_extra(kind.extra, f"{scheme}://"), fsspec_configured():
        store: Store = resolve_name(kind.store)(bucket, retry)
    return store.sub(prefix) if prefix else store


def open_bucket(uri: str, stop: Stop) -> Store:
    """Opens a store as `open_store` does, for a command: it waits while the bucket is away, and until `stop`."""
    return open_store(uri, Retry(away_limit_seconds(), stop, note))


def open_to_read(uri: str, retry: Retry | None = None) -> Store:
    """Opens what `open_store` does, and everything that an installed fsspec file system reads, see `sources`."""
    if not is_foreign(uri):
        return open_store(uri, retry)
    with fsspec_configured():
        from job.store.sources import SourceStore

        return SourceStore(uri, retry or Retry())


@contextmanager
def fsspec_configured() -> Iterator[None]:
    """Reports errors in fsspec's configuration, which is read when fsspec is imported and a file system is made.

    Raises:
        BadConfigError: the configuration is not valid.
    """
    try:
        with warnings.catch_warnings():
            # fsspec would print two lines, and ignore the variable.
            warnings.filterwarnings("error", module=r"fsspec\.config")
            yield
    except (ValueError, TypeError, AttributeError, UserWarning, configparser.Error) as error:
        # The error's text may repeat a secret.
        where = "fsspec's configuration (~/.config/fsspec/*.json, FSSPEC_… variables)"
        raise BadConfigError(f"{where} is not valid ({type(error).__name__}): correct it") from None


def is_foreign(uri: str) -> bool:
    """Returns whether only fsspec can read a URI, which is neither a bucket's nor a path."""
    return is_remote(uri) and kind_of(uri) is None


def kind_of(uri: str) -> Kind | None:
    """Returns the kind of a bucket; None for a folder, and for a URI that only fsspec can read."""
    scheme, separator, _ = uri.partition("://")
    return _BY_SCHEME.get(scheme.lower()) if separator else None


def check_source(uri: str) -> None:
    """Checks a URI of `is_foreign` before it is read.

    Raises:
        BadRequestError: it holds a password, can be changed in transit, or does not name the location of its content.
    """
    scheme = re.split("://|::", uri, maxsplit=1)[0].lower()
    if scheme in ("zip", "tar"):
        raise BadRequestError(f"{scheme}://: a chain is {scheme}://FOLDER::ARCHIVE, and only `data pack` takes one")
    if scheme in _MISLEADING or "::" in _ADDRESS.sub("", uri):
        raise BadRequestError(f"{scheme}:// may read any other location: name that location")
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018 -- it raises if the port is text, which may be a part of a password
    except ValueError:
        raise BadRequestError("the source is not a valid URL, or holds a user and password: name a host") from None
    # In github://org:repo@ref/path the same characters have another meaning.
    if scheme != "github" and (parts.password or (parts.username and scheme in WEB)):
        raise BadRequestError("a source must not hold a user and password: lists and logs would show them")
    if not is_safe(uri):
        raise BadRequestError(f"{without_queries(uri)}: its content could be changed in transit: use https://")


def is_safe(url: str) -> bool:
    """Returns whether the content of a URL cannot be changed in transit."""
    parts = urlsplit(url)
    return parts.scheme.lower() not in ("http", "ftp") or parts.hostname in _LOCAL


def without_queries(uri: str) -> str:
    """Returns a URI for messages and records, without query and fragment, which may be a signature."""
    inside, archive = split_chain(uri)
    return f"{inside}::{without_queries(archive)}" if inside else split_query(uri)[0]


def split_query(uri: str) -> tuple[str, str]:
    """Splits a URI in front of its query or fragment; those of other schemes have `?` and `#` in their names."""
    at = re.search("[?#]|$", uri) if uri.partition("://")[0].lower() in WEB else None
    return (uri[: at.start()], uri[at.start() :]) if at else (uri, "")


def redacted(uri: str) -> str:
    """Returns a refused URI for messages, without user, password, query and fragment, which are secret."""
    return re.sub(r"://.*@", "://…@", re.sub(r"([?#]).*", r"\1…", uri))


def split_chain(uri: str) -> tuple[str, str]:
    """Splits `zip://train/*.jpg::gs://theirs/all.zip` into the part of an archive, and the URI of the archive.

    The first half is empty for any other URI.
    """
    chain = _CHAIN.fullmatch(uri)
    return (chain[1], chain[2]) if chain else ("", uri)


def split_uri(uri: str) -> tuple[str, str]:
    """Splits the URI of an object into its folder, which keeps the query of a URL, and its name."""
    path, query = split_query(uri)
    folder, _, name = path.rpartition("/")
    return f"{folder or '/'}{'/' * folder.endswith(':/')}{query}", name


def is_remote(uri: str) -> bool:
    """Returns whether `uri` does not lie on a disk of this machine."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme.lower() != "file"


def check_uri(uri: str) -> None:
    """Checks the URI of a bucket, without its library and credentials.

    Raises:
        BadRequestError: as `open_store`.
    """
    if is_remote(uri):
        _bucket_of(uri)
    else:
        _local_root(uri)


def _local_root(uri: str) -> Path:
    """Returns the folder that a path or a `file://` URI names."""
    _, separator, rest = uri.partition("://")
    path = unquote(rest.removeprefix("localhost")) if separator else uri
    # The user in `~user` may not exist.
    with suppress(RuntimeError):
        if path and "\0" not in path and (path.startswith("/") or not separator):
            return Path(os.path.normpath((Path(path) if separator else Path(path).expanduser()).absolute()))
    raise BadRequestError(f"{uri!r} names no folder: use file:///PATH or a path")


def _bucket_of(uri: str) -> tuple[str, str, str]:
    """Splits a bucket's URI into scheme, bucket and prefix."""
    scheme, _, rest = uri.partition("://")
    shown = redacted(uri)
    if (scheme := scheme.lower()) not in _BY_SCHEME:
        first = "download it first (curl -LO), or " if scheme in WEB else ""
        use = f"{first}use {URIS}BUCKET, or a path"
        raise BadRequestError(f"{shown!r}: {scheme}:// is not supported; {use}")
    bucket, _, prefix = rest.strip("/").partition("/")
    if not _BUCKET.fullmatch(bucket) or re.search(r"\?.*=", prefix):
        named = f"use {scheme}://BUCKET[/FOLDER], without a user, password or signature"
        raise BadRequestError(f"{shown} names no bucket: {named}")
    return scheme, bucket, prefix
