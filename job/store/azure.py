"""A container of Azure Blob Storage: adlfs finds the account and its credentials, Microsoft's client transfers content.

A large object is uploaded in blocks and appears with their list. Azure compares the MD5 of each block; the metadata
contain the crc32c of the whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from io import BytesIO
from typing import Any

from adlfs import AzureBlobFileSystem
from azure.core import MatchConditions
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError, ServiceResponseError
from azure.storage.blob import BlobBlock, ContentSettings
from azure.storage.blob.aio import BlobClient, BlobPrefix, BlobServiceClient

from job.exits import JobError
from job.store.base import READ_BYTES, ObjectMissingError
from job.store.calls import T, on_loop
from job.store.files import COPY_BYTES
from job.store.remote import Page, Piece, RemoteStore, Watched, cause, content_type, damaged
from job.store.retry import Retry

# It logs many lines about an error that this program reports in one.
logging.getLogger("azure").setLevel(logging.CRITICAL)

_SCOPE = "https://storage.azure.com/.default"
_CRC32C = "ddpm_crc32c"
_BLOCK_BYTES = 4 << 20
_BLOCKS_AT_ONCE = 4
_SILENCES_PER_BLOCK = 12
_UNREACHABLE = re.compile(r"(Environment|WorkloadIdentity)Credential: [^\n]*(Cannot connect|[Tt]imed? ?out)")
"""The text of an error whose cause is a sign-in server that does not answer, and not wrong credentials."""
_CONFLICTS = ("BlobAlreadyExists", "ConditionNotMet", "InvalidBlockList")
"""The answers to a conditional write that finds another object; the last if that was committed in between."""


class AzureStore(RemoteStore):
    """Objects of a container whose names begin with a prefix. Versions are ETags."""

    _cloud, _make = "Azure", "az storage container create --name {name}"
    _roles = "`Storage Blob Data Contributor` on {uri}"
    _login_by = "set AZURE_STORAGE_ACCOUNT_NAME and run `az login`, or set AZURE_STORAGE_CONNECTION_STRING"

    def __init__(self, container: str, retry: Retry) -> None:
        """Finds the account and its credentials as adlfs does, without any request.

        Raises:
            NoPermissionError: no account is named.
        """
        super().__init__("az", container, retry)
        try:
            self._fs = AzureBlobFileSystem(use_listings_cache=False, skip_instance_cache=True)
        except ValueError:
            # The error's text may repeat a key.
            raise self._no_credentials("no account, or a wrong one") from None
        # The client of adlfs would repeat each request for a minute.
        self._fs.service_client = BlobServiceClient(
            self._fs.service_client.url,
            credential=self._fs.service_client.credential,
            retry_total=0,
            connection_timeout=retry.silence_seconds,
            read_timeout=retry.silence_seconds,
            max_single_put_size=COPY_BYTES,
            max_single_get_size=READ_BYTES,
        )
        self._container = self._fs.service_client.get_container_client(container)

    def _sign_in(self, *, anew: bool = False) -> bool:
        if hasattr(credential := self._fs.service_client.credential, "get_token"):
            # The credential keeps the token until it expires.
            self._in_time(self._begin(credential.get_token(_SCOPE)))
        return False

    def _get(self, key: str, start: int, stop: int | None, version: str = "") -> Future[Piece]:
        which: dict[str, Any] = {}
        if stop:
            which |= {"offset": start, "length": stop - start, "raw_request_hook": _once()}
        which |= {"etag": version, "match_condition": MatchConditions.IfNotModified} if version else {}

        async def get() -> Piece:
            found = await self._blob(key).download_blob(**which)
            about, data = found.properties, await found.readall()
            size_bytes = int((about.content_range or f"/{len(data)}").rpartition("/")[2])
            return Piece([data], size_bytes, about.etag, about.metadata.get(_CRC32C, ""))

        return self._begin(get())

    def _send(self, key: str, content: Watched, over: str | None) -> str | None:
        about: dict[str, Any] = {
            "metadata": {_CRC32C: content.crc32c},
            "content_settings": ContentSettings(content_type=content_type(key)),
        }
        if over is not None:
            about["match_condition"] = MatchConditions.IfNotModified if over else MatchConditions.IfMissing
            about |= {"etag": over} if over else {}
        blob = self._blob(key)
        try:
            if content.size_bytes <= COPY_BYTES:
                sent = self._send_off(blob.upload_blob(content.read(), overwrite=True, validate_content=True, **about))
            else:
                sent = self._send_off(blob.commit_block_list(self._blocks(blob, content), **about))
            return str(self._answer(sent)["etag"])
        except HttpResponseError as error:
            if _code(error) in _CONFLICTS or (over and _code(error) == "BlobNotFound"):
                return None
            raise

    def _blocks(self, blob: BlobClient, content: Watched) -> list[BlobBlock]:
        """Sends the content in blocks, some at a time; no reader sees them before their list is committed."""
        # Two writers under one key do not overwrite each other's blocks.
        writer, blocks = secrets.token_hex(8), list[BlobBlock]()
        ahead: deque[Future[Any]] = deque()
        try:
            while block := content.read(_BLOCK_BYTES):
                blocks.append(BlobBlock(f"{writer}-{len(blocks):05d}"))
                # Microsoft's client would compute the MD5 on the event loop.
                md5 = hashlib.md5(block, usedforsecurity=False).digest()
                sent = blob.stage_block(blocks[-1].id, BytesIO(block), len(block), transactional_content_md5=md5)
                ahead.append(self._send_off(sent))
                if len(ahead) == _BLOCKS_AT_ONCE:
                    self._answer(ahead.popleft())
            while ahead:
                self._answer(ahead.popleft())
        finally:
            for under_way in ahead:
                under_way.cancel()
        return blocks

    def _pages(self, start: str, delimiter: str) -> Iterator[Page]:
        asked = partial(self._container.walk_blobs, delimiter=delimiter) if delimiter else self._container.list_blobs
        listed: Any = asked(name_starts_with=start, include=["metadata"])
        found = self._answer(self._begin(_all(listed)))
        blobs = [each for each in found if not isinstance(each, BlobPrefix)]
        # An account with a hierarchical namespace lists folders as objects.
        objects = [(each.name, each.size) for each in blobs if "hdi_isfolder" not in (each.metadata or {})]
        yield objects, [each.name for each in found if isinstance(each, BlobPrefix)]

    def _delete(self, key: str) -> None:
        self._answer(self._begin(self._blob(key).delete_blob()))

    def _blob(self, key: str) -> BlobClient:
        return self._container.get_blob_client(self._prefix + key)

    def _begin(self, asked: Awaitable[T], limit_seconds: float | None = None) -> Future[T]:
        return on_loop(self._fs.loop, asyncio.wait_for(asked, limit_seconds))

    def _send_off(self, asked: Awaitable[T]) -> Future[T]:
        # The client reports no progress within a block, which a slow network takes long to send.
        return self._begin(asked, _SILENCES_PER_BLOCK * self.retry.silence_seconds)

    def _job_error(self, error: Exception, uri: str) -> JobError | None:
        if not isinstance(error, (AzureError, ConnectionError, TimeoutError)):
            return super()._job_error(error, uri)
        code, status = _code(error), self._status(error)
        match code:
            case "ContainerNotFound" | "ContainerBeingDeleted":
                return self._no_bucket()
            case "ConditionNotMet":
                return ObjectMissingError(f"{uri} was replaced while it was read: it is another object now")
            case "Md5Mismatch":
                return damaged(uri)
            case "InvalidOperation" if "contentMD5" in str(error):
                # Azurite's code for the same error.
                return damaged(uri)
        if isinstance(error, ClientAuthenticationError) and _UNREACHABLE.search(str(error)):
            return self._status_error(uri, None, "Azure's sign-in does not answer")
        if isinstance(error, ClientAuthenticationError) and "Authorization" not in code:
            clock = ", or this machine's clock is wrong" if code == "AuthenticationFailed" else ""
            return self._no_credentials((code or type(error).__name__) + clock)
        if status in (None, 200):
            return self._status_error(uri, None, cause(error) if status is None else "an answer that is not Azure's")
        # The text of a refusal contains the signed string.
        return self._status_error(uri, status, code or "without a reason")

    def _status(self, error: Exception) -> int | None:
        return error.status_code if isinstance(error, HttpResponseError) else None


def _once() -> Callable[[object], None]:
    """Returns a hook of a request that forbids a second one: Microsoft's client repeats a broken one at any setting."""
    asked: list[object] = []

    def ask(request: object) -> None:
        asked.append(request)
        if len(asked) > 1:
            raise ServiceResponseError("the answer broke off")

    return ask


def _code(error: Exception) -> str:
    """Returns Azure's code of an error, such as `BlobNotFound`."""
    code = getattr(error, "error_code", None)
    return str(getattr(code, "value", code) or "")


async def _all(pages: AsyncIterator[T]) -> list[T]:
    return [each async for each in pages]
