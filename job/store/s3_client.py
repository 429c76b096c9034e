"""The connection to one S3 bucket: requests that are repeated while the bucket is away, and streams that go on.

All goes through s3fs, whose client is botocore's, made asynchronous, with an event loop in a thread of its own. Its
file-like functions are not used: they can neither declare checksums nor compare versions, and they count attempts where
we count seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import SystemRandom
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError
from fsspec.asyn import get_loop, sync
from s3fs import S3FileSystem

from job.exits import BadRequestError
from job.store.s3_errors import S3Errors, is_passing, no_credentials, status_of

T = TypeVar("T")

_CONNECTIONS = 64
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0
_SLOWEST_BYTES_PER_SECOND = 256 << 10
_BLOCK_BYTES = 1 << 20


class Bucket:
    """The connections to one bucket, which all stores in it share."""

    def __init__(self, name: str, deadline_seconds: float) -> None:
        """Finds credentials and the endpoint (`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`); sends the bucket nothing yet.

        Raises:
            NoPermissionError: there are no credentials.
            BadRequestError: the endpoint or another setting makes no sense.
        """
        self.name = name
        self.uri = f"s3://{name}"
        self.deadline_seconds = deadline_seconds
        self.errors = S3Errors(self.uri, deadline_seconds, self.exists)
        self._seen = False
        session = AioSession()
        with self.errors.about(self.uri):
            if sync(get_loop(), session.get_credentials, timeout=deadline_seconds) is None:
                raise no_credentials(self.uri, "none were found")
            self._files = S3FileSystem(
                session=session,
                skip_instance_cache=True,
                use_listings_cache=False,
                config_kwargs={
                    "connect_timeout": deadline_seconds / 2,
                    "read_timeout": deadline_seconds / 2,
                    "max_pool_connections": _CONNECTIONS,
                    "retries": {"total_max_attempts": 1},
                    # We send and compare crc32c ourselves; older servers choke on the trailers that botocore would add.
                    "request_checksum_calculation": "when_required",
                    "response_checksum_validation": "when_required",
                },
            )
            self._files.retries = 1
            try:
                self._files.connect()
                unusable = urlsplit(self._files.s3.meta.endpoint_url).username is not None
            except ValueError as error:
                if isinstance(error, BotoCoreError):
                    raise
                unusable = True
            if unusable:
                raise BadRequestError(
                    f"{self.uri}: AWS_ENDPOINT_URL must be the URL of a server without a user and password, such as "
                    "http://localhost:9000"
                )

    def exists(self) -> bool:
        """Whether the bucket is there. Asks by listing: the answer to a HEAD request would not say what is wrong."""
        if not self._seen:
            try:
                self.call("list_objects_v2", MaxKeys=1)
            except ClientError as error:
                if status_of(error) == 404:
                    return False
                raise
            self._seen = True
        return True

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One request on this bucket, repeated with growing pauses while the bucket is away, and its answer.

        Args:
            operation: a method of botocore's S3 client.
            arguments: its arguments, less `Bucket`.
        """
        return self._patiently(lambda: self.once(operation, **arguments))

    def once(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """As `call`, but one attempt."""
        seconds = self._attempt_seconds(len(arguments.get("Body", b"")))
        try:
            return self._files.call_s3(operation, Bucket=self.name, timeout=seconds, **arguments)
        except OSError as error:
            # s3fs tells refusals with the numbers of disk errors.
            if isinstance(error.__cause__, ClientError):
                raise error.__cause__ from None
            raise

    def get(
        self,
        name: str,
        consume: Callable[[bytes], object],
        *,
        start: int = 0,
        stop: int | None = None,
        version: str | None = None,
    ) -> dict[str, Any]:
        """Streams an object's bytes from `start` to `stop`; a stream that breaks off is taken up where it broke.

        Args:
            name: the object's name in the bucket.
            consume: takes the bytes, block by block, in order.
            start: first byte.
            stop: one past the last byte; to the end if None.
            version: the ETag that the object must have; whichever the first answer tells if None.

        Returns:
            The first answer; empty if there was nothing to read.
        """
        first: dict[str, Any] = {}
        reached = start

        def attempt() -> None:
            nonlocal reached, stop, version
            which = {} if stop is None else {"Range": f"bytes={reached}-{stop - 1}"}
            which |= {} if version is None else {"IfMatch": version}
            answer = self.once("get_object", Key=name, ChecksumMode="ENABLED", **which)
            body = answer.pop("Body")
            if "ContentLength" not in answer:
                # S3 always says how much is to come; something on the way cut the answer into chunks of its own.
                raise IncompleteReadError(actual_bytes=0, expected_bytes="unknown")
            if not first:
                first.update(answer)
            version = answer["ETag"]
            stop = reached + answer["ContentLength"]
            try:
                while reached < stop:
                    size_bytes = min(_BLOCK_BYTES, stop - reached)
                    seconds = self._attempt_seconds(size_bytes)
                    block = sync(self._files.loop, _read_exactly, body, size_bytes, timeout=seconds)
                    consume(block)
                    reached += len(block)
            finally:
                self._files.loop.call_soon_threadsafe(body.close)

        while stop is None or reached < stop:
            before = reached
            try:
                self._patiently(attempt)
            except Exception as error:
                # The deadline is for a bucket that is away, and this one was here a moment ago.
                if reached == before or not is_passing(error):
                    raise
        return first

    def _attempt_seconds(self, size_bytes: int) -> float:
        """Half the deadline, so that a server that accepts and then keeps silent gets a second chance."""
        return self.deadline_seconds / 2 + size_bytes / _SLOWEST_BYTES_PER_SECOND

    def _patiently(self, attempt: Callable[[], T]) -> T:
        over = time.monotonic() + self.deadline_seconds
        pause_seconds = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except Exception as error:
                if not is_passing(error) or time.monotonic() + pause_seconds > over:
                    raise
            time.sleep(pause_seconds * SystemRandom().uniform(0.5, 1.0))
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)


async def _read_exactly(body: Any, size_bytes: int) -> bytes:
    """The next `size_bytes` of an answer in one piece: what arrives at a time would wake its reader too often."""
    pieces = []
    missing_bytes = size_bytes
    while missing_bytes:
        piece = await body.read(missing_bytes)
        if not piece:
            raise IncompleteReadError(actual_bytes=size_bytes - missing_bytes, expected_bytes=size_bytes)
        pieces.append(piece)
        missing_bytes -= len(piece)
    return b"".join(pieces)
