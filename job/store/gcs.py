"""A Google Cloud Storage bucket: gcsfs transfers content, google-cloud-storage makes all small requests.

These have separate connections, so that a lease is renewed in time during the upload of a checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, cast

import aiohttp
import google.auth
import requests
from fsspec.config import apply_config
from gcsfs.core import GCSFileSystem
from gcsfs.credentials import GoogleCredentials
from google.api_core import exceptions as api
from google.auth.credentials import AnonymousCredentials, Credentials, TokenState
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.auth.transport.requests import AuthorizedSession, Request
from google.cloud import storage
from requests.adapters import HTTPAdapter

from job.exits import JobError
from job.store.base import Entry
from job.store.files import COPY_BYTES
from job.store.remote import CONNECTIONS, Fetched, RemoteStore, Watched, cause, content_type, damaged, one_line
from job.store.retry import Retry, T, in_thread

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_BLOCK_BYTES = 256 << 10
"""Size of a block that is sent within seconds on the slowest network."""

_UNREACHABLE = (aiohttp.ClientError, requests.RequestException, ConnectionError, TimeoutError)
_CLIENT = (api.GoogleAPIError, GoogleAuthError, *_UNREACHABLE)
_GOOGLE_PERMISSION = re.compile(r"storage\.[a-z]+\.[a-zA-Z]+")
_DAMAGED = "doesn't match calculated CRC32C"
_CRC32C = re.compile(r"crc32c=([^,]+)")


class GcsStore(RemoteStore):
    """Objects of a bucket whose names begin with a prefix. Versions are generations."""

    _cloud, _roles, _make = "Google", "roles/storage.objectUser on {uri}", "gcloud storage buckets create gs://{name}"
    _login_by = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"

    def __init__(self, bucket: str, retry: Retry) -> None:
        """Finds credentials, without any request; an emulator (`STORAGE_EMULATOR_HOST`) needs none.

        Raises:
            NoPermissionError: no credentials were found.
        """
        super().__init__("gs", bucket, retry)
        try:
            self._login = _login()
        except Exception as error:
            # The text of any other error may repeat a token of fsspec's configuration.
            of_fsspec = f"fsspec's configuration: {type(error).__name__}"
            why = str(error) if isinstance(error, DefaultCredentialsError) else of_fsspec
            raise self._no_credentials(why) from None
        self._fs = _OneAttempt(
            token=self._login or "anon",
            version_aware=False,
            use_listings_cache=False,
            skip_instance_cache=True,
            session_kwargs={"auto_decompress": False, "headers": {"Accept-Encoding": "identity"}, "trust_env": True},
        )
        session = AuthorizedSession(self._login or AnonymousCredentials(), refresh_status_codes=())
        for scheme in ("http://", "https://"):
            # With more threads than connections urllib3 would close connections, and log each.
            session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS))
        client = storage.Client(
            project=None,
            credentials=session.credentials,
            _http=session,
            client_options={"api_endpoint": self._fs._location},
        )
        payer = self._fs.requester_pays
        self._bucket = client.bucket(bucket, user_project=self._fs.project if payer is True else payer or None)
        self._was_seen = threading.Event()

    def _sign_in(self, *, anew: bool = False) -> bool:
        if self._login and (token := self._login.coming(anew=anew)):
            self._in_time(token)
        return bool(self._login)

    def _get(self, key: str, start: int, stop: int | None, version: str = "") -> Future[Fetched]:
        def fetched(headers: Any, blocks: Sequence[bytes]) -> Fetched:
            got_bytes = sum(map(len, blocks))
            size_bytes = int(headers.get("Content-Range", f"/{got_bytes}").rpartition("/")[2])
            crc32c = _CRC32C.search(",".join(headers.getall("X-Goog-Hash")))
            return Fetched(blocks, got_bytes, size_bytes, headers["X-Goog-Generation"], crc32c[1] if crc32c else "")

        url = self._fs.url(f"{self._bucket.name}/{self._prefix}{key}", generation=version or None)
        part = {"Range": f"bytes={start}-{stop - 1}"} if stop else {}
        # A compressed object arrives as it is stored, for that is what the checksum covers.
        return self._call(fetched, "GET", url, headers={"Accept-Encoding": "gzip", **part})

    def _send(self, key: str, content: Watched, over: str | None) -> str | None:
        name, condition = self._prefix + key, None if over is None else over or "0"
        try:
            if content.size_bytes > COPY_BYTES:
                return self._upload(name, content, condition)
            blob = self._bucket.blob(name)
            how = {"content_type": content_type(name), "if_generation_match": condition, "checksum": "crc32c"}
            self._ask(blob.upload_from_string, content.read(), **how)
            return str(blob.generation)
        except api.PreconditionFailed:
            return None
        except aiohttp.ClientOSError:
            # A server that refuses during the upload may reset the connection, which loses its answer.
            if over == "" and self.exists(key):
                return None
            raise

    def _upload(self, name: str, content: Watched, condition: str | None) -> str:
        # Google refuses content with another checksum. The boundary is random, so that no file contains it.
        about = {"name": name, "contentType": content_type(name), "crc32c": content.crc32c}
        boundary = secrets.token_hex(16)
        parts = ("application/json", json.dumps(about)), (about["contentType"], "")
        head = "".join(f"\r\n--{boundary}\r\nContent-Type: {kind}\r\n\r\n{text}" for kind, text in parts).encode()
        tail = f"\r\n--{boundary}--".encode()

        async def body() -> AsyncIterator[bytes]:
            yield head
            while block := content.read(_BLOCK_BYTES):
                yield block
            yield tail

        url = f"{self._fs._location}/upload/storage/v1/b/{{}}/o"
        size_bytes = str(len(head) + content.size_bytes + len(tail))
        headers = {"Content-Type": f"multipart/related; boundary={boundary}", "Content-Length": size_bytes}
        how = {"uploadType": "multipart", "ifGenerationMatch": condition, "headers": headers, "data": body()}
        sent = self._call(lambda _, blocks: json.loads(b"".join(blocks)), "POST", url, self._bucket.name, **how)
        return str(self._answer(sent, lambda: content.read_at)["generation"])

    def _delete(self, key: str) -> None:
        self._ask(self._bucket.delete_blob, self._prefix + key)

    def _list(self, prefix: str) -> Sequence[Entry]:
        found = self._ask(self._listed, prefix=self._prefix + prefix)[0]
        return [Entry(blob.name.removeprefix(self._prefix), blob.size) for blob in found]

    def _folders(self, prefix: str) -> Sequence[str]:
        start = self._prefix + prefix
        folders = self._ask(self._listed, prefix=start, delimiter="/")[1]
        return [folder.removeprefix(start).removesuffix("/") for folder in folders]

    def _listed(self, **asked: Any) -> tuple[list[storage.Blob], set[str]]:
        found = self._bucket.list_blobs(fields="items(name,size),prefixes,nextPageToken", **asked)
        return list(found), found.prefixes

    def _ask(self, work: Callable[..., T], *args: Any, **named: Any) -> T:
        """Sends small requests by google-cloud-storage, each once."""
        return self._answer(in_thread(work, *args, retry=None, timeout=self.retry.silence_seconds, **named))

    def _call(self, made_of: Callable[[Any, Sequence[bytes]], T], *asked: Any, **named: Any) -> Future[T]:
        """Starts a request; its result is `made_of` the headers and the content of the answer."""
        silence_seconds = self.retry.silence_seconds
        limits = aiohttp.ClientTimeout(total=None, sock_connect=silence_seconds, sock_read=silence_seconds)

        async def call() -> T:
            # asyncio logs the error of a call for which no thread waits any more.
            cast(asyncio.Task[T], asyncio.current_task()).add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )
            return made_of(*await self._fs._call(*asked, timeout=limits, **named))

        return asyncio.run_coroutine_threadsafe(call(), self._fs.loop)

    def _bucket_exists(self) -> bool:
        """Returns whether the bucket exists, as far as is known: the answer 404 may mean a missing object or bucket."""
        if not self._was_seen.is_set():
            # Without the right to list nothing is known: the role of a trainer may not read a bucket's metadata.
            with suppress(*_CLIENT):
                try:
                    self._ask(self._listed, max_results=1)
                except api.NotFound:
                    return False
                self._was_seen.set()
        return True

    def _job_error(self, error: Exception, uri: str) -> JobError | None:
        if not isinstance(error, _CLIENT) or isinstance(error, requests.JSONDecodeError):
            return super()._job_error(error, uri)
        if isinstance(answer := getattr(error, "response", None), requests.Response):
            # The error of google-cloud-storage repeats the whole answer.
            error = _refusal(answer.status_code, answer.content)
        if _DAMAGED in str(error):
            return damaged(uri)
        code = self._status(error)
        reason = one_line(error.message) if isinstance(error, api.GoogleAPICallError) else cause(error)
        is_final = isinstance(error, GoogleAuthError) and not (error.retryable or isinstance(error, TransportError))
        if code == 401 or is_final:
            return self._no_credentials(reason)
        if code == 404 and not self._bucket_exists():
            return self._no_bucket()
        permission = _GOOGLE_PERMISSION.search(str(error))
        return self._status_error(uri, code, reason, permission[0] if permission else "")

    def _status(self, error: Exception) -> int | None:
        return int(code) if (code := getattr(error, "code", None)) else None


class _OneAttempt(GCSFileSystem):
    """Sends each request once, because six attempts of gcsfs outlast a lease, and returns the answer in blocks."""

    async def _request(self, method: str, path: str, *args: str, **named: Any) -> tuple[int, Any, Any, Sequence[bytes]]:
        about = {name: named.pop(name, None) for name in ("data", "timeout")}
        about |= {"headers": self._get_headers(named.pop("headers", None)), "params": self._get_params(named)}
        session = await self._set_session()
        async with session.request(method, self._format_path(path, args), **about) as answer:
            # To join the blocks would copy them once more.
            blocks = [block async for block in answer.content.iter_any()]
            if answer.status >= 400:
                raise _refusal(answer.status, b"".join(blocks))
            return answer.status, answer.headers, answer.request_info, blocks


class _Login(Credentials):
    """The credentials in use. A separate thread fetches the next token before the last one expires.

    gcsfs would fetch it on the event loop, where all transfers wait for it, and google-cloud-storage during a request
    that renews a lease.
    """

    def __init__(self, credentials: Credentials) -> None:
        super().__init__()
        self._credentials, self._lock = credentials, threading.Lock()
        self._coming: Future[None] | None = None

    @property
    def valid(self) -> bool:
        """Returns whether a token exists; `coming` keeps it fresh."""
        return self._credentials.token is not None

    def coming(self, *, anew: bool = False) -> Future[None] | None:
        """Starts to fetch a token if necessary; returns that call if a request must wait for it."""
        with self._lock:
            state = TokenState.INVALID if anew else self._credentials.token_state
            if state is not TokenState.FRESH and (self._coming is None or self._coming.done()):
                self._coming = in_thread(self._credentials.refresh, Request())
            return self._coming if state is TokenState.INVALID else None

    def apply(self, headers: dict[str, str], token: str | None = None) -> None:
        """Adds the token to a request."""
        self._credentials.apply(headers)

    def refresh(self, request: object) -> None:
        """Does nothing: `coming` fetches tokens."""


def _login() -> _Login | None:
    """Returns the login of fsspec's configuration, or else Google's; None for anonymous reading and an emulator."""
    token = apply_config(GCSFileSystem, {}).get("token")
    if token is None and "STORAGE_EMULATOR_HOST" in os.environ:
        token = "anon"  # noqa: S105
    if token is None:
        found = google.auth.default(scopes=[_SCOPE])[0]
    else:
        found = GoogleCredentials("", "read_write", token).credentials
    return _Login(found) if found else None


def _refusal(status: int, content: bytes) -> Exception:
    """Returns the error that google-cloud-storage raises for this answer."""
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = content.decode(errors="replace")
    return api.from_http_status(status, message)
