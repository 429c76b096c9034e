"""A Google Cloud Storage bucket.

google-cloud-storage does all that needs a condition, a deadline or a listing, and uploads; gcsfs reads what is large.
Each is the faster of the two at what it does here.
"""

from __future__ import annotations

import base64
import io
import logging
import mimetypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

# Without this gcsfs asks every bucket for its layout over gRPC: a minute lost at an emulator, and a hang after a fork.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# Without this every process asks, for traces that nobody wants, about a bucket's metadata that a trainer may not read.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")

import aiohttp
import google.auth
from gcsfs.core import GCSFileSystem
from google.api_core.exceptions import NotFound, PreconditionFailed
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.adapters import HTTPAdapter

from job.store.base import (
    Blob,
    ConflictError,
    Entry,
    ObjectExistsError,
    ObjectMissingError,
    Store,
    folder_key,
    is_key,
    validated_key,
    validated_new_key,
)
from job.store.files import crc32c_of, os_errors, temporary_beside
from job.store.gcs_errors import REMOTE, GcsErrors, damaged, is_lost, is_passing, no_credentials

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_CONNECTIONS = 64
_CHUNK_BYTES = 128 << 20
_CHUNK_MULTIPLE_BYTES = 256 << 10
_RANGE_BYTES = 8 << 20
_SLOWEST_BYTES_PER_SECOND = 256 << 10

# It prints a traceback for every error that is translated here.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


class Bucket:
    """The connections to one bucket, which all stores in it share."""

    def __init__(self, name: str, deadline_seconds: float) -> None:
        """Finds credentials, but sends nothing yet; with `STORAGE_EMULATOR_HOST` set it needs none.

        Raises:
            NoPermissionError: there are no credentials.
        """
        try:
            emulated = "STORAGE_EMULATOR_HOST" in os.environ
            credentials = AnonymousCredentials() if emulated else google.auth.default(scopes=[_SCOPE])[0]
        except DefaultCredentialsError as error:
            raise no_credentials(f"gs://{name}", str(error)) from error
        self.name = name
        self.client = storage.Client(project=None, credentials=credentials)
        for scheme in ("http://", "https://"):
            # More threads than connections would make urllib3 throw connections away, and complain of it.
            self.client._http.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
        self.handle = self.client.bucket(name)
        # Half the deadline, so that a server that accepts and then keeps silent gets a second chance.
        self.silence_seconds = deadline_seconds / 2
        self.files = GCSFileSystem(
            token=credentials,
            use_listings_cache=False,
            skip_instance_cache=True,
            requests_timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self.silence_seconds, sock_read=self.silence_seconds
            ),
        )
        self.deadline_seconds = deadline_seconds
        self.patience = self.patience_for(0)
        self.errors = GcsErrors(name, deadline_seconds, self.exists)
        self._seen = False

    def exists(self) -> bool:
        """Whether the bucket is there. Asks by listing: the role that trains may not read a bucket's own metadata."""
        if not self._seen:
            try:
                any(self.client.list_blobs(self.name, max_results=1, fields="items(name)", **self.patience))
            except NotFound:
                return False
            self._seen = True
        return True

    def patience_for(self, size_bytes: int) -> dict[str, Any]:
        """How google-cloud-storage is to try again, as arguments of a call that sends `size_bytes`."""
        retry = DEFAULT_RETRY.with_delay(initial=0.25, maximum=8.0, multiplier=2.0)
        return {"timeout": self.silence_seconds, "retry": retry.with_timeout(self.transfer_seconds(size_bytes))}

    def transfer_seconds(self, size_bytes: int) -> float:
        """How long `size_bytes` may take with all attempts."""
        return self.deadline_seconds + size_bytes / _SLOWEST_BYTES_PER_SECOND


class GcsStore(Store):
    """Objects of a bucket whose names begin with a prefix. Versions are generations."""

    def __init__(self, bucket: Bucket, prefix: str = "") -> None:
        """The store of everything below the folder `prefix`."""
        super().__init__(f"gs://{bucket.name}/{prefix}")
        self._bucket = bucket
        self._prefix = folder_key(prefix)

    def sub(self, prefix: str) -> GcsStore:
        """A folder in the same bucket."""
        return GcsStore(self._bucket, f"{self._prefix}{validated_key(prefix)}")

    def read(self, key: str) -> Blob:
        """One request; the generation comes with the bytes."""
        with self._errors(key):
            blob = self._blob(key)
            data = blob.download_as_bytes(checksum="crc32c", **self._bucket.patience)
            return Blob(data, str(blob.generation))

    def create(self, key: str, data: bytes) -> str:
        """A write on the condition that there is no generation yet."""
        with self._errors(key):
            try:
                return self._write(key, data, if_generation_match=0)
            except PreconditionFailed:
                if version := self._own_write(key, data):
                    return version
                raise ObjectExistsError(f"{self.uri_of(key)} exists already: somebody else was first") from None

    def replace(self, key: str, data: bytes, version: str) -> str:
        """A write on the condition that the generation is `version`."""
        with self._errors(key):
            try:
                return self._write(key, data, if_generation_match=int(version))
            except PreconditionFailed:
                if own_version := self._own_write(key, data):
                    return own_version
                raise ConflictError(f"{self.uri_of(key)} has changed or is gone: somebody else wrote it") from None

    def put(self, key: str, data: bytes) -> None:
        """A write on no condition."""
        with self._errors(key):
            self._write(key, data)

    def upload(self, path: Path, key: str) -> None:
        """One resumable upload, in a single chunk up to 128 MiB; the bucket compares the crc32c declared with it."""
        blob = self._blob(validated_new_key(key))
        with os_errors(path):
            file, size_bytes = path.open("rb"), path.stat().st_size
        with file, os_errors(path), self._errors(key):
            blob.crc32c = crc32c = _encoded(crc32c_of(file))
            blob.chunk_size = min(_CHUNK_BYTES, (size_bytes // _CHUNK_MULTIPLE_BYTES + 1) * _CHUNK_MULTIPLE_BYTES)
            file.seek(0)
            arrived = False

            def is_to_be_repeated(error: Exception) -> bool:
                # An upload whose answer was lost cannot be repeated everywhere; that it arrived can be seen.
                nonlocal arrived
                arrived = is_lost(error) and self._holds(key, size_bytes, crc32c)
                return is_passing(error) and not arrived

            patience = self._bucket.patience_for(min(size_bytes, _CHUNK_BYTES))
            patience["retry"] = patience["retry"].with_predicate(is_to_be_repeated)
            try:
                blob.upload_from_file(
                    file,
                    size=size_bytes,
                    content_type=_content_type(key),
                    if_generation_match=0,
                    checksum="crc32c",
                    **patience,
                )
            except PreconditionFailed:
                blob.reload(**self._bucket.patience)
                if (blob.size, blob.crc32c) != (size_bytes, crc32c):
                    raise ObjectExistsError(
                        f"{self.uri_of(key)} exists already with other content: somebody else was first"
                    ) from None
            except Exception:
                if not arrived:
                    raise
                return
            if blob.crc32c != crc32c:
                blob.delete(if_generation_match=blob.generation, **self._bucket.patience)
                raise damaged(self.uri_of(key))

    def download(self, key: str, path: Path) -> None:
        """Fetches with gcsfs, and compares with the crc32c that the bucket keeps."""
        with os_errors(path), self._errors(key):
            blob = self._blob(key)
            blob.reload(**self._bucket.patience)
            with temporary_beside(path) as (temporary, file):
                self._bucket.files.get_file(
                    f"{self._bucket.name}/{blob.name}",
                    str(temporary),
                    # With headers of its own it streams; else it fetches ranges into memory, at half the speed.
                    headers={},
                    timeout=self._bucket.transfer_seconds(blob.size),
                )
                if _encoded(crc32c_of(file)) != blob.crc32c:
                    raise damaged(self.uri_of(key))
                temporary.replace(path)

    def open(self, key: str) -> BinaryIO:
        """Reads ranges of one generation: gcsfs's own files take hundreds of MB, and raise errors of their own."""
        with self._errors(key):
            blob = self._blob(key)
            blob.reload(**self._bucket.patience)

        def fetch(start: int, stop: int) -> bytes:
            with self._errors(key):
                return self._bucket.files.cat_file(
                    f"{self._bucket.name}/{blob.name}",
                    start=start,
                    end=stop,
                    generation=blob.generation,
                    timeout=self._bucket.transfer_seconds(stop - start),
                )

        return cast(BinaryIO, io.BufferedReader(_Ranges(fetch, blob.size), _RANGE_BYTES))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Pages of a thousand, fetched as they are needed."""
        start = f"{self._prefix}{folder_key(prefix)}"
        with self._bucket.errors.about(self.uri):
            for blob in self._bucket.client.list_blobs(
                self._bucket.name, prefix=start, fields="items(name,size),nextPageToken", **self._bucket.patience
            ):
                key = blob.name.removeprefix(self._prefix)
                if is_key(key):
                    yield Entry(key, blob.size)

    def folders(self, prefix: str = "") -> Sequence[str]:
        """What Google calls prefixes."""
        start = f"{self._prefix}{folder_key(prefix)}"
        with self._bucket.errors.about(self.uri):
            pages = self._bucket.client.list_blobs(
                self._bucket.name, prefix=start, delimiter="/", fields="prefixes,nextPageToken", **self._bucket.patience
            )
            # The prefixes are gathered while the items, of which none are asked for, go by.
            list(pages)
        names = (folder.removeprefix(start).removesuffix("/") for folder in pages.prefixes)
        return sorted(name for name in names if is_key(name))

    def delete(self, key: str) -> None:
        """Deletes whatever generation there is."""
        with suppress(ObjectMissingError), self._errors(key):
            self._blob(key).delete(**self._bucket.patience)

    def exists(self, key: str) -> bool:
        """Asks for nothing but the name."""
        with self._errors(key):
            if self._blob(key).exists(**self._bucket.patience):
                return True
        missing = self._bucket.errors.missing(self.uri_of(key))
        if isinstance(missing, ObjectMissingError):
            return False
        raise missing

    def _errors(self, key: str) -> AbstractContextManager[None]:
        return self._bucket.errors.about(self.uri_of(key))

    def _blob(self, key: str) -> storage.Blob:
        return self._bucket.handle.blob(f"{self._prefix}{validated_key(key)}")

    def _write(self, key: str, data: bytes, **condition: int) -> str:
        blob = self._blob(validated_new_key(key))
        blob.upload_from_string(
            data, content_type=_content_type(key), checksum="crc32c", **condition, **self._bucket.patience
        )
        return str(blob.generation)

    def _holds(self, key: str, size_bytes: int, crc32c: str) -> bool:
        """Whether the object is there with this content; one that cannot be asked about is not."""
        blob = self._blob(key)
        with suppress(*REMOTE):
            # Asked after each attempt at an upload: as long as that, it would double the deadline.
            blob.reload(timeout=self._bucket.silence_seconds / 2, retry=None)
        return (blob.size, blob.crc32c) == (size_bytes, crc32c)

    def _own_write(self, key: str, data: bytes) -> str | None:
        """The object's version if it holds `data`: a write whose answer was lost is refused when it is repeated."""
        with suppress(ObjectMissingError):
            there = self.read(key)
            return there.version if there.data == data else None
        return None


class _Ranges(io.RawIOBase):
    """A seekable file over a function that fetches the bytes from `start` to `stop`."""

    def __init__(self, fetch: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._fetch = fetch
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if origin + offset < 0:
            raise ValueError(f"negative seek position {origin + offset}")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        # What it inherits would send a request for every 8 KiB.
        return self._next(self._size_bytes)

    def _next(self, size_bytes: int) -> bytes:
        stop = min(self._position + size_bytes, self._size_bytes)
        data = self._fetch(self._position, stop) if stop > self._position else b""
        self._position += len(data)
        return data


def _encoded(crc32c: int) -> str:
    """The checksum as Google writes it."""
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def _content_type(key: str) -> str:
    """What a browser needs to show a report or a picture that somebody clicks on in the bucket."""
    return mimetypes.guess_type(key)[0] or "application/octet-stream"
