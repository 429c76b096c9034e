"""A Google Cloud Storage bucket, and what goes wrong between us and it, told as the errors a person can act on.

google-cloud-storage does all but the reading of content: a stream of our own hears of a stop between two blocks,
computes the checksum on the way, and is twice as fast.
"""

from __future__ import annotations

import base64
import io
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

# Without this every process asks, for traces that nobody wants, about a bucket's metadata that a trainer may not read.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")

import google.auth
import requests
import urllib3
from google.api_core.exceptions import GoogleAPIError, NotFound, PreconditionFailed, from_http_response
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from requests.adapters import HTTPAdapter

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.store.base import Blob, Entry, ObjectMissingError, Store, content_type, one_line, stream_of
from job.store.files import crc32c_of, temporary_beside
from job.store.retry import Retry

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_CONNECTIONS = 64
_CHUNK_BYTES = 64 << 20
_CHUNK_MULTIPLE_BYTES = 256 << 10

_REMOTE = (
    GoogleAPIError,
    GoogleAuthError,
    DataCorruption,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)
_PERMISSION = re.compile(r"storage\.[a-z]+\.[a-zA-Z]+")
_REQUEST = re.compile(r"^\d{3} [A-Z]+ \S+: ")


class GcsStore(Store):
    """Objects of a bucket whose names begin with a prefix. Versions are generations."""

    def __init__(self, bucket: str, retry: Retry) -> None:
        """Finds credentials, but sends nothing yet; with `STORAGE_EMULATOR_HOST` set it needs none.

        Raises:
            NoPermissionError: there are no credentials.
        """
        super().__init__(f"gs://{bucket}", retry)
        self._bucket_uri = self.uri
        try:
            emulated = "STORAGE_EMULATOR_HOST" in os.environ
            credentials = AnonymousCredentials() if emulated else google.auth.default(scopes=[_SCOPE])[0]
        except DefaultCredentialsError as error:
            raise self._no_credentials(str(error)) from error
        self._session = AuthorizedSession(credentials)
        for scheme in ("http://", "https://"):
            # More threads than connections would make urllib3 throw connections away, and complain of it.
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
        self._client = storage.Client(project=None, credentials=credentials, _http=self._session)
        self._bucket = self._client.bucket(bucket)
        self._is_there = threading.Event()
        """Set once the bucket was seen to be there."""

    def _read(self, key: str) -> Blob:
        content = io.BytesIO()
        headers = self._fetch(key, content.write)
        return Blob(content.getvalue(), headers["X-Goog-Generation"])

    def _write(self, key: str, data: bytes, version: str | None) -> str | None:
        try:
            return self._send(key, data, if_generation_match=int(version or 0))
        except PreconditionFailed:
            return None

    def _put(self, key: str, data: bytes) -> None:
        self._send(key, data)

    def _upload(self, key: str, path: Path) -> bool:
        # The bucket compares the crc32c that is declared.
        blob = self._blob(key)
        with path.open("rb") as file:
            blob.crc32c = crc32c = _encoded(crc32c_of(file))
            size_bytes = file.tell()
            blob.chunk_size = min(_CHUNK_BYTES, (size_bytes // _CHUNK_MULTIPLE_BYTES + 1) * _CHUNK_MULTIPLE_BYTES)
            file.seek(0)
            try:
                blob.upload_from_file(
                    file,
                    size=size_bytes,
                    content_type=content_type(key),
                    if_generation_match=0,
                    checksum="crc32c",
                    **self._once,
                )
            except PreconditionFailed:
                blob.reload(**self._once)
                return (blob.size, blob.crc32c) == (size_bytes, crc32c)
        if blob.crc32c != crc32c:
            blob.delete(if_generation_match=blob.generation, **self._once)
            raise _damaged(self.uri_of(key))
        return True

    def _download(self, key: str, path: Path) -> None:
        with temporary_beside(path) as (temporary, file):
            self._fetch(key, file.write)
            file.flush()
            temporary.replace(path)

    def _open(self, key: str) -> BinaryIO:
        blob = self._blob(key)
        blob.reload(**self._once)
        return stream_of(partial(self._attempt, self._range, key, blob.generation), blob.size)

    def _list(self, prefix: str) -> Sequence[Entry]:
        blobs = self._client.list_blobs(
            self._bucket.name, prefix=self._prefix + prefix, fields="items(name,size),nextPageToken", **self._once
        )
        return [Entry(blob.name.removeprefix(self._prefix), blob.size) for blob in blobs]

    def _folders(self, prefix: str) -> Sequence[str]:
        start = self._prefix + prefix
        pages = self._client.list_blobs(
            self._bucket.name, prefix=start, delimiter="/", fields="prefixes,nextPageToken", **self._once
        )
        # The prefixes are gathered while the items, of which none are asked for, go by.
        list(pages)
        return [folder.removeprefix(start).removesuffix("/") for folder in pages.prefixes]

    def _delete(self, key: str) -> None:
        self._blob(key).delete(**self._once)

    def _look(self, key: str) -> None:
        self._blob(key).reload(**self._once)

    @property
    def _once(self) -> dict[str, Any]:
        """How a request is sent, as arguments of google-cloud-storage: its own retries know nothing of ours."""
        return {"timeout": self.retry.silence_seconds, "retry": None}

    def _blob(self, key: str) -> storage.Blob:
        return self._bucket.blob(self._prefix + key)

    def _send(self, key: str, data: bytes, **condition: int) -> str:
        blob = self._blob(key)
        blob.upload_from_string(data, content_type=content_type(key), checksum="crc32c", **condition, **self._once)
        return str(blob.generation)

    def _range(self, key: str, generation: int, start: int, stop: int) -> bytes:
        content = io.BytesIO()
        self._fetch(key, content.write, generation=generation, start=start, stop=stop)
        return content.getvalue()

    def _fetch(
        self,
        key: str,
        consume: Callable[[bytes], object],
        *,
        generation: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Mapping[str, str]:
        """Streams the content, or the bytes from `start` to `stop`, and returns the headers of the answer.

        Raises:
            BucketAwayError: less arrived, or, of the whole content, something else than the bucket's crc32c says.
        """
        url, uri = f"{self._client.api_endpoint}/download/storage/v1{self._blob(key).path}", self.uri_of(key)
        parameters = {"alt": "media"} | ({"generation": str(generation)} if generation else {})
        headers = {"Range": f"bytes={start}-{stop - 1}"} if stop is not None else {}
        timeout = self.retry.silence_seconds
        with self._session.get(url, params=parameters, headers=headers, stream=True, timeout=timeout) as answer:
            if not answer.ok:
                raise from_http_response(answer)
            size_bytes, checksum = self._consume(key, answer.raw.read, consume)
            if stop is None:
                whole = f"crc32c={_encoded(checksum)}" in answer.headers["X-Goog-Hash"]
            else:
                whole = size_bytes == stop - start
            if not whole:
                raise _damaged(uri)
            return answer.headers

    def _told(self, error: Exception, uri: str) -> JobError | None:
        if not isinstance(error, _REMOTE):
            return None
        status, reason = _status(error), _reason(error)
        if status == 404:
            return self._missing(uri)
        if status in (401, 403):
            permission = _PERMISSION.search(str(error))
            return NoPermissionError(
                f"{uri}: no permission{f' {permission[0]}' if permission else ''} ({reason}): grant the account in use "
                f"roles/storage.objectUser on {self._bucket_uri}"
            )
        if isinstance(error, GoogleAuthError) and not (error.retryable or isinstance(error, TransportError)):
            return self._no_credentials(reason)
        if isinstance(error, DataCorruption):
            return _damaged(uri)
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            return BadRequestError(f"{uri}: Google Cloud Storage refused with {status}: {reason}")
        return BucketAwayError(f"{uri}: the bucket is away ({reason}): check the network")

    def _missing(self, uri: str) -> MissingInputError:
        """What a 404 about `uri` means: Google answers so for a missing bucket, too."""
        if not self._is_there.is_set():
            try:
                # By listing: the role that trains may not read a bucket's own metadata.
                any(self._client.list_blobs(self._bucket.name, max_results=1, fields="items(name)", **self._once))
                self._is_there.set()
            except NotFound:
                return MissingInputError(
                    f"no bucket {self._bucket_uri}: check the name, or make it with "
                    f"`gcloud storage buckets create {self._bucket_uri}`"
                )
            except _REMOTE:
                # Who may not list cannot tell; the object is missing all the same.
                pass
        return ObjectMissingError(f"no object at {uri}")

    def _no_credentials(self, reason: str) -> NoPermissionError:
        return NoPermissionError(
            f"{self._bucket_uri}: no usable Google credentials ({reason}): run `gcloud auth application-default "
            "login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
        )


def _damaged(uri: str) -> BucketAwayError:
    return BucketAwayError(f"{uri}: the bytes were damaged on the way (crc32c differs): check the network")


def _status(error: BaseException) -> int | None:
    """HTTP status of an answer; None if there was none."""
    response = getattr(error, "response", None)
    code = getattr(error, "code", None) or getattr(response, "status_code", None)
    return int(code) if code else None


def _reason(error: BaseException) -> str:
    """One short line: the server's own words, or the innermost cause (`Connection refused`, not a nest of classes)."""
    if _status(error) is not None:
        return one_line(_REQUEST.sub("", str(error)))
    while not isinstance(error, TimeoutError) and (inner := error.__cause__ or error.__context__):
        error = inner
    return "timed out" if isinstance(error, TimeoutError) else one_line(str(error) or type(error).__name__)


def _encoded(crc32c: int) -> str:
    """The checksum as Google writes it."""
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()
