"""A Google Cloud Storage bucket.

google-cloud-storage does all but the moving of large content: streams of our own hear of a stop between two blocks,
hold no chunks in memory, compute the checksum on the way, and are twice as fast at reading.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

# Without this every process asks, for traces that nobody wants, about a bucket's metadata that a trainer may not read.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")

import google.auth
import requests
import urllib3
from google.api_core.exceptions import GoogleAPIError, NotFound, from_http_response
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage
from requests.adapters import HTTPAdapter

from job.exits import JobError, NoPermissionError
from job.store.base import Entry
from job.store.remote import CONNECTIONS, ByteRange, RemoteStore, Watched, cause, content_type, damaged, one_line
from job.store.retry import Retry

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_BLOCK_BYTES = 64 << 10
"""Is on its way within seconds on the slowest of networks."""

_UNREACHABLE = (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)
_CLIENT = (GoogleAPIError, GoogleAuthError, *_UNREACHABLE)
_GOOGLE_PERMISSION = re.compile(r"storage\.[a-z]+\.[a-zA-Z]+")
_DAMAGED = "doesn't match calculated CRC32C"
_REQUEST = re.compile(r"^\d{3} [A-Z]+ \S+: ")


class GcsStore(RemoteStore):
    """Objects of a bucket whose names begin with a prefix. Versions are generations."""

    def __init__(self, bucket: str, retry: Retry) -> None:
        """Finds credentials, but sends nothing yet; with `STORAGE_EMULATOR_HOST` set it needs none.

        Raises:
            NoPermissionError: there are no credentials.
        """
        super().__init__(f"gs://{bucket}", retry)
        self._bucket_uri = self.uri
        self._roles = f"roles/storage.objectUser on {self.uri}"
        self._make = f"gcloud storage buckets create {self.uri}"
        try:
            emulated = "STORAGE_EMULATOR_HOST" in os.environ
            credentials = AnonymousCredentials() if emulated else google.auth.default(scopes=[_SCOPE])[0]
        except DefaultCredentialsError as error:
            raise self._no_credentials(str(error)) from error
        self._session = AuthorizedSession(credentials)
        for scheme in ("http://", "https://"):
            # More threads than connections would make urllib3 throw connections away, and complain of it.
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS))
        self._client = storage.Client(project=None, credentials=credentials, _http=self._session)
        self._bucket = self._client.bucket(bucket)
        self._was_seen = threading.Event()

    def _head(self, key: str) -> tuple[int, str]:
        blob = self._blob(key)
        blob.reload(**self._once)
        return int(blob.size), str(blob.generation)

    def _fetch(self, key: str, consume: Callable[[bytes], object], part: ByteRange | None = None) -> str:
        with self._session.get(
            f"{self._client.api_endpoint}/download/storage/v1{self._blob(key).path}",
            params={"alt": "media"} | ({"generation": part.version} if part else {}),
            headers={"Range": part.header} if part else {},
            stream=True,
            timeout=self.retry.silence_seconds,
        ) as answer:
            _checked(answer)
            size_bytes, crc32c = self._consume(key, answer.raw.read, consume)
        kept = f"crc32c={crc32c}" in answer.headers["X-Goog-Hash"]
        if not (size_bytes == part.stop - part.start if part else kept):
            raise damaged(self.uri_of(key))
        return answer.headers["X-Goog-Generation"]

    def _send(self, key: str, content: Watched, over: str | None) -> str | None:
        # Google refuses what arrives with another checksum.
        about = {"name": self._prefix + key, "contentType": content_type(key), "crc32c": content.crc32c}
        body = _TwoParts(about, content)
        answer = self._session.post(
            f"{self._client.api_endpoint}/upload/storage/v1{self._bucket.path}/o",
            params={"uploadType": "multipart"} | ({} if over is None else {"ifGenerationMatch": over or "0"}),
            headers={"Content-Type": f"multipart/related; boundary={body.boundary}"},
            data=body,
            timeout=self.retry.silence_seconds,
        )
        return None if answer.status_code == 412 else str(_checked(answer).json()["generation"])

    def _list(self, prefix: str) -> Sequence[Entry]:
        blobs = self._pages(prefix, fields="items(name,size),nextPageToken")
        return [Entry(blob.name.removeprefix(self._prefix), blob.size) for blob in blobs]

    def _folders(self, prefix: str) -> Sequence[str]:
        pages = self._pages(prefix, fields="prefixes,nextPageToken", delimiter="/")
        # The prefixes are gathered while the items, of which none are asked for, go by.
        list(pages)
        return [folder.removeprefix(self._prefix + prefix).removesuffix("/") for folder in pages.prefixes]

    def _delete(self, key: str) -> None:
        self._blob(key).delete(**self._once)

    def _pages(self, prefix: str, **asked: Any) -> Any:
        return self._client.list_blobs(self._bucket.name, prefix=self._prefix + prefix, **asked, **self._once)

    @property
    def _once(self) -> dict[str, Any]:
        """How a request is sent, as arguments of google-cloud-storage: its own retries know nothing of ours."""
        return {"timeout": self.retry.silence_seconds, "retry": None}

    def _blob(self, key: str) -> storage.Blob:
        return self._bucket.blob(self._prefix + key)

    def _bucket_exists(self) -> bool:
        """As far as can be known: a missing bucket is answered like a missing object."""
        if not self._was_seen.is_set():
            # Who may not list cannot tell. Nor may the role that trains read a bucket's own metadata.
            with suppress(*_UNREACHABLE, GoogleAuthError, GoogleAPIError):
                try:
                    any(self._pages("", max_results=1))
                except NotFound:
                    return False
                self._was_seen.set()
        return True

    def _told(self, error: Exception, uri: str) -> JobError | None:
        if not isinstance(error, _CLIENT) or isinstance(error, requests.JSONDecodeError):
            return super()._told(error, uri)
        if _DAMAGED in str(error):
            return damaged(uri)
        code = getattr(error, "code", None)
        reason = one_line(_REQUEST.sub("", str(error))) if code else cause(error)
        if isinstance(error, GoogleAuthError) and not (error.retryable or isinstance(error, TransportError)):
            return self._no_credentials(reason)
        if code == 404 and not self._bucket_exists():
            return self._no_bucket()
        permission = _GOOGLE_PERMISSION.search(str(error))
        return self._told_by_status(uri, int(code) if code else None, reason, permission[0] if permission else "")

    def _no_credentials(self, reason: str) -> NoPermissionError:
        return NoPermissionError(
            f"{self._bucket_uri}: no usable Google credentials ({reason}): run `gcloud auth application-default "
            "login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
        )


class _TwoParts:
    """The body of an upload: what the object is, and its content, read while it is sent."""

    def __init__(self, about: dict[str, str], content: Watched) -> None:
        # No file holds it.
        self.boundary = secrets.token_hex(16)
        parts = ("application/json", json.dumps(about)), (about["contentType"], "")
        before = (f"\r\n--{self.boundary}\r\nContent-Type: {kind}\r\n\r\n{text}" for kind, text in parts)
        self._before = "".join(before).encode()
        self._after = f"\r\n--{self.boundary}--".encode()
        self._content = content

    def __len__(self) -> int:
        return len(self._before) + self._content.size_bytes + len(self._after)

    def __iter__(self) -> Iterator[bytes]:
        # It is sent again if the credentials had to be refreshed.
        self._content.seek(0)
        yield self._before
        while block := self._content.read(_BLOCK_BYTES):
            yield block
        yield self._after


def _checked(answer: requests.Response) -> requests.Response:
    if not answer.ok:
        raise from_http_response(answer)
    return answer
