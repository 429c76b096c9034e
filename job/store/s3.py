"""An S3 bucket, of Amazon's or of any server that knows conditional writes (If-None-Match and If-Match).

Every object goes up in one request, of which S3 takes up to 5 GB, guarded by its crc32c and, in the signature, by the
SHA-256 of the content. Its metadata have the crc32c as well: servers differ in what they keep.

The words of a server that refuses credentials are never repeated: they may hold the key that it refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import botocore.session
import google_crc32c
from botocore import exceptions as boto
from botocore.config import Config
from botocore.parsers import ResponseParserError

from job.exits import BadRequestError, JobError, NoPermissionError
from job.store.base import Entry, ObjectMissingError, is_key
from job.store.remote import CONNECTIONS, ByteRange, Head, RemoteStore, cause, content_type, damaged, encoded, one_line
from job.store.retry import Retry

_CRC32C = "ddpm-crc32c"
_LISTINGS_AT_ONCE = 16

_NETWORK = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    ResponseParserError,
    ConnectionError,
    TimeoutError,
)
_CREDENTIALS = (
    boto.NoAuthTokenError,
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.SSOError,
    boto.TokenRetrievalError,
)
_CREDENTIAL_CODES = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_DAMAGED_CODES = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_PASSING_CODES = {"ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown"}
_PERMISSION = re.compile(r"\bs3:[A-Z][A-Za-z]+")


class S3Store(RemoteStore):
    """Objects of a bucket whose names begin with a prefix. Versions are ETags."""

    def __init__(self, bucket: str, retry: Retry) -> None:
        """Finds credentials and endpoint as the AWS command line does, but sends nothing to the bucket yet.

        Raises:
            NoPermissionError: there are no credentials.
            BadRequestError: the endpoint or another setting makes no sense.
        """
        super().__init__(f"s3://{bucket}", retry)
        self._bucket, self._bucket_uri = bucket, self.uri
        self._roles = (
            f"s3:ListBucket on {self.uri}, and s3:GetObject, s3:PutObject and s3:DeleteObject on what is in it"
        )
        self._make = f"aws s3 mb {self.uri}"
        config = Config(
            connect_timeout=retry.silence_seconds,
            read_timeout=retry.silence_seconds,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1},
            # We send and compare crc32c ourselves; older servers choke on the trailers that botocore would add.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        session = botocore.session.Session()
        try:
            if session.get_credentials() is None:
                raise self._no_credentials("none were found")
            self._client = session.create_client("s3", config=config)
            if urlsplit(self._client.meta.endpoint_url).username is not None:
                raise ValueError
        except (boto.BotoCoreError, ValueError) as error:
            # Its own words may repeat a password.
            raise self._told(error, self.uri) or BadRequestError(
                f"{self.uri}: AWS_ENDPOINT_URL must be the URL of a server without a user and password, such as "
                "http://localhost:9000"
            ) from None

    def _head(self, key: str) -> Head:
        try:
            answer = self._client.head_object(**self._named(key))
        except boto.ClientError as error:
            if _http_status(error) in (400, 401, 403):
                # A HEAD request is answered with a bare number; this one tells wrong keys from missing rights.
                self._client.get_object(**self._named(key), Range="bytes=0-0")
            raise
        return Head(answer["ContentLength"], answer["ETag"], answer["Metadata"].get(_CRC32C))

    def _fetch(self, key: str, consume: Callable[[bytes], object], part: ByteRange | None = None) -> str:
        which = {"IfMatch": part.version, "Range": part.header} if part else {}
        answer = self._client.get_object(**self._named(key), **which)
        if "ContentLength" not in answer:
            # S3 always says how much is to come; something on the way cut the answer into chunks of its own.
            raise boto.IncompleteReadError(actual_bytes=0, expected_bytes="unknown")
        # Entered itself, it would give the stream below it, which takes a shorter content for a whole one.
        with closing(answer["Body"]) as body:
            _, crc32c = self._consume(key, body.read, consume)
        # What others wrote carries no checksum of ours.
        if not part and answer["Metadata"].get(_CRC32C, crc32c) != crc32c:
            raise damaged(self.uri_of(key))
        return str(answer["ETag"])

    def _write(self, key: str, data: bytes, over: str | None) -> str | None:
        condition = {} if over is None else {"IfMatch": over} if over else {"IfNoneMatch": "*"}
        return self._send(key, data, encoded(google_crc32c.value(data)), **condition)

    def _send_file(self, key: str, file: BinaryIO, size_bytes: int, crc32c: str) -> bool:
        watched = _Watched(file, partial(self.retry.is_under_way, self.uri_of(key)))
        return self._send(key, watched, crc32c, IfNoneMatch="*") is not None

    def _send(self, key: str, body: bytes | _Watched, crc32c: str, **condition: str) -> str | None:
        try:
            answer = self._client.put_object(
                **self._named(key),
                Body=body,
                ContentType=content_type(key),
                ChecksumCRC32C=crc32c,
                Metadata={_CRC32C: crc32c},
                **condition,
            )
        except boto.ClientError as error:
            if _http_status(error) == 412 or ("IfMatch" in condition and _code(error) == "NoSuchKey"):
                return None
            raise
        return str(answer["ETag"])

    def _list(self, prefix: str) -> Sequence[Entry]:
        return [
            Entry(content["Key"].removeprefix(self._prefix), content["Size"])
            for page in self._pages(self._prefix + prefix)
            for content in page.get("Contents", [])
        ]

    def _folders(self, prefix: str) -> Sequence[str]:
        start = self._prefix + prefix
        found = [
            folder["Prefix"].removeprefix(start).removesuffix("/")
            for page in self._pages(start, Delimiter="/")
            for folder in page.get("CommonPrefixes", [])
        ]

        def has_objects(name: str) -> bool:
            page = self._client.list_objects_v2(Bucket=self._bucket, Prefix=f"{start}{name}/", MaxKeys=1)
            return bool(page.get("Contents"))

        # Some servers go on listing a folder that was emptied.
        names = [name for name in found if is_key(name)]
        with ThreadPoolExecutor(_LISTINGS_AT_ONCE) as pool:
            return [name for name, there in zip(names, pool.map(has_objects, names), strict=True) if there]

    def _delete(self, key: str) -> None:
        self._client.delete_object(**self._named(key))

    def _pages(self, start: str, **arguments: str) -> Iterator[dict[str, Any]]:
        paginator = self._client.get_paginator("list_objects_v2")
        return iter(paginator.paginate(Bucket=self._bucket, Prefix=start, **arguments))

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _bucket_exists(self) -> bool:
        try:
            self._client.list_objects_v2(Bucket=self._bucket, MaxKeys=1)
        except (boto.BotoCoreError, boto.ClientError, *_NETWORK) as error:
            # Who may not list cannot tell.
            return _http_status(error) != 404
        return True

    def _told(self, error: Exception, uri: str) -> JobError | None:
        if not isinstance(error, (boto.BotoCoreError, boto.ClientError, *_NETWORK)):
            return None
        status, code = _http_status(error), _code(error)
        if code in _CREDENTIAL_CODES or isinstance(error, _CREDENTIALS):
            return self._no_credentials(code or type(error).__name__)
        if code in _DAMAGED_CODES:
            return damaged(uri)
        if code == "NoSuchBucket":
            return self._no_bucket()
        if code == "RequestTimeTooSkewed":
            return NoPermissionError(f"{uri}: refused, for this machine's clock is wrong ({code}): set it")
        if status == 412:
            return ObjectMissingError(f"{uri} was replaced while it was read: what is there now is another object")
        if status is None and not isinstance(error, (*_NETWORK, boto.CredentialRetrievalError)):
            return BadRequestError(f"{uri}: cannot be asked for ({_reason(error)}): check the AWS settings")
        if status in (401, 403):
            permission = _PERMISSION.search(str(error))
            return self._told_by_status(uri, status, code, permission[0] if permission else "")
        return self._told_by_status(uri, None if code in _PASSING_CODES else status, _reason(error))

    def _no_credentials(self, reason: str) -> NoPermissionError:
        return NoPermissionError(
            f"{self._bucket_uri}: no usable AWS credentials ({reason}): run `aws configure` or `aws sso login`, set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine or pod a role"
        )


class _Watched:
    """A file that calls `report` at each read."""

    def __init__(self, file: BinaryIO, report: Callable[[], None]) -> None:
        self._file, self._report = file, report
        self.seek, self.tell = file.seek, file.tell

    def read(self, size_bytes: int = -1) -> bytes:
        self._report()
        return self._file.read(size_bytes)


def _http_status(error: BaseException) -> int | None:
    """HTTP status of an answer; None if there was none."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(error, boto.ClientError) else None


def _code(error: BaseException) -> str:
    """The word by which S3 knows an error, such as `NoSuchKey`; the answer to a HEAD request has the bare status."""
    return error.response["Error"].get("Code", "") if isinstance(error, boto.ClientError) else ""


def _reason(error: BaseException) -> str:
    if isinstance(error, boto.ClientError):
        return one_line(error.response["Error"].get("Message", "") or _code(error))
    # The answer itself is in the message of a parser.
    return "an answer that is not S3's" if isinstance(error, ResponseParserError) else cause(error)
