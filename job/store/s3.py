"""An S3 bucket, of Amazon's or of any server that knows conditional writes (If-None-Match and If-Match).

Every object goes up in one request, which S3 takes up to 5 GB: it is guarded by a crc32c and, in its signature, by the
SHA-256 of the content. Every object carries the crc32c in its metadata as well: servers differ in what they keep.

What goes wrong is told as the errors a person can act on. The words of a server that refuses credentials are never
repeated: they may hold the key that it refused.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import botocore.session
import google_crc32c
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.store.base import Blob, Entry, ObjectMissingError, Store, content_type, is_key, one_line, stream_of
from job.store.files import crc32c_of, temporary_beside
from job.store.retry import Retry

_CRC32C = "ddpm-crc32c"
_CONNECTIONS = 64
_LISTINGS_AT_ONCE = 16

_CONNECTION = (
    BotoConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,
    ConnectionError,
    TimeoutError,
)
_CREDENTIALS = (
    CredentialRetrievalError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
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
_PASSING_STATUSES = {408, 429, 500, 502, 503, 504}
_PERMISSION = re.compile(r"\bs3:[A-Z][A-Za-z]+")


class S3Store(Store):
    """Objects of a bucket whose names begin with a prefix. Versions are ETags."""

    def __init__(self, bucket: str, retry: Retry) -> None:
        """Finds credentials and endpoint as the AWS command line does, but sends nothing to the bucket yet.

        Raises:
            NoPermissionError: there are no credentials.
            BadRequestError: the endpoint or another setting makes no sense.
        """
        super().__init__(f"s3://{bucket}", retry)
        self._bucket, self._bucket_uri = bucket, self.uri
        config = Config(
            connect_timeout=retry.silence_seconds,
            read_timeout=retry.silence_seconds,
            max_pool_connections=_CONNECTIONS,
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
            is_usable = urlsplit(self._client.meta.endpoint_url).username is None
        except (BotoCoreError, ValueError) as error:
            if told := self._told(error, self.uri):
                raise told from error
            is_usable = False
        if not is_usable:
            raise BadRequestError(
                f"{self.uri}: AWS_ENDPOINT_URL must be the URL of a server without a user and password, such as "
                "http://localhost:9000"
            )

    def _read(self, key: str) -> Blob:
        content = io.BytesIO()
        etag = self._fetch(key, content.write)
        return Blob(content.getvalue(), etag)

    def _write(self, key: str, data: bytes, version: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            return self._send(key, data, google_crc32c.value(data), **condition)
        except ClientError as error:
            if _status(error) == 412 or (version is not None and _code(error) == "NoSuchKey"):
                return None
            raise

    def _put(self, key: str, data: bytes) -> None:
        self._send(key, data, google_crc32c.value(data))

    def _upload(self, key: str, path: Path) -> bool:
        with path.open("rb") as file:
            checksum, size_bytes = crc32c_of(file), file.tell()
            file.seek(0)
            watched = _Watched(file, partial(self.retry.is_under_way, self.uri_of(key)))
            try:
                self._send(key, watched, checksum, IfNoneMatch="*")
            except ClientError as error:
                if _status(error) != 412:
                    raise
                there = self._head(key)
                return (there["ContentLength"], there["Metadata"].get(_CRC32C)) == (size_bytes, _encoded(checksum))
        return True

    def _download(self, key: str, path: Path) -> None:
        with temporary_beside(path) as (temporary, file):
            self._fetch(key, file.write)
            file.flush()
            temporary.replace(path)

    def _open(self, key: str) -> BinaryIO:
        there = self._head(key)
        return stream_of(partial(self._attempt, self._range, key, there["ETag"]), there["ContentLength"])

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
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def _look(self, key: str) -> None:
        self._head(key)

    def _head(self, key: str) -> dict[str, Any]:
        name = self._prefix + key
        try:
            return self._client.head_object(Bucket=self._bucket, Key=name)
        except ClientError as error:
            if not _is_passing(error) and _status(error) not in (404, 412):
                # A HEAD request is answered with a bare number; this one tells wrong keys from missing rights.
                self._client.get_object(Bucket=self._bucket, Key=name, Range="bytes=0-0")
            raise

    def _pages(self, start: str, **arguments: str) -> Iterator[dict[str, Any]]:
        paginator = self._client.get_paginator("list_objects_v2")
        return iter(paginator.paginate(Bucket=self._bucket, Prefix=start, **arguments))

    def _send(self, key: str, body: bytes | _Watched, checksum: int, **condition: str) -> str:
        crc32c = _encoded(checksum)
        answer = self._client.put_object(
            Bucket=self._bucket,
            Key=self._prefix + key,
            Body=body,
            ContentType=content_type(key),
            ChecksumCRC32C=crc32c,
            Metadata={_CRC32C: crc32c},
            **condition,
        )
        return str(answer["ETag"])

    def _range(self, key: str, etag: str, start: int, stop: int) -> bytes:
        content = io.BytesIO()
        self._fetch(key, content.write, IfMatch=etag, Range=f"bytes={start}-{stop - 1}")
        return content.getvalue()

    def _fetch(self, key: str, consume: Callable[[bytes], object], **which: str) -> str:
        """Streams the content, or a range of it, and returns the ETag.

        Raises:
            BucketAwayError: less arrived, or, of the whole content, something else than was declared when it went up.
        """
        answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **which)
        if "ContentLength" not in answer:
            # S3 always says how much is to come; something on the way cut the answer into chunks of its own.
            raise IncompleteReadError(actual_bytes=0, expected_bytes="unknown")
        with answer["Body"] as body:
            checksum = self._consume(key, body.read, consume)[1]
        # What others wrote carries no checksum of ours.
        if "Range" not in which and answer["Metadata"].get(_CRC32C, _encoded(checksum)) != _encoded(checksum):
            raise _damaged(self.uri_of(key))
        return str(answer["ETag"])

    def _told(self, error: Exception, uri: str) -> JobError | None:
        if not isinstance(error, (BotoCoreError, ClientError, *_CONNECTION)):
            return None
        status, code = _status(error), _code(error)
        if code == "NoSuchBucket":
            return self._no_bucket()
        if status == 404:
            return self._missing(uri)
        if code == "RequestTimeTooSkewed":
            return NoPermissionError(f"{uri}: refused, for this machine's clock is wrong ({code}): set it")
        if code in _CREDENTIAL_CODES:
            region = error.response["Error"].get("Region") if isinstance(error, ClientError) else None
            return self._no_credentials(f"{code}; its region is {region}" if region else code)
        if isinstance(error, _CREDENTIALS):
            return self._no_credentials(type(error).__name__)
        if status in (401, 403):
            permission = _PERMISSION.search(str(error))
            return NoPermissionError(
                f"{uri}: no permission{f' {permission[0]}' if permission else ''} ({code}): grant the account in use "
                f"s3:ListBucket on {self._bucket_uri}, and s3:GetObject, s3:PutObject and s3:DeleteObject on what is "
                "in it"
            )
        if code in _DAMAGED_CODES:
            return _damaged(uri)
        if status == 412:
            return ObjectMissingError(f"{uri} was replaced while it was read: what is there now is another object")
        if _is_passing(error):
            return BucketAwayError(f"{uri}: the bucket is away ({_reason(error)}): check the network")
        if status is None:
            return BadRequestError(f"{uri}: cannot be asked for ({_reason(error)}): check the AWS settings")
        return BadRequestError(f"{uri}: the bucket refused with {status}: {_reason(error)}")

    def _missing(self, uri: str) -> MissingInputError:
        """What a 404 about `uri` means: a HEAD request answers so for a missing bucket, too."""
        try:
            self._client.list_objects_v2(Bucket=self._bucket, MaxKeys=1)
        except ClientError as error:
            # Who may not list cannot tell; the object is missing all the same.
            if _status(error) == 404:
                return self._no_bucket()
        except (BotoCoreError, *_CONNECTION):
            pass
        return ObjectMissingError(f"no object at {uri}")

    def _no_bucket(self) -> MissingInputError:
        return MissingInputError(
            f"no bucket {self._bucket_uri}: check the name and AWS_ENDPOINT_URL, or make it with "
            f"`aws s3 mb {self._bucket_uri}`"
        )

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


def _damaged(uri: str) -> BucketAwayError:
    return BucketAwayError(f"{uri}: the bytes were damaged on the way (checksum differs): check the network")


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, ClientError):
        return _status(error) in _PASSING_STATUSES or _code(error) in _PASSING_CODES
    return isinstance(error, (*_CONNECTION, CredentialRetrievalError))


def _status(error: BaseException) -> int | None:
    """HTTP status of an answer; None if there was none."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(error, ClientError) else None


def _code(error: BaseException) -> str:
    """The word by which S3 knows an error, such as `NoSuchKey`; the answer to a HEAD request has the bare status."""
    return error.response["Error"].get("Code", "") if isinstance(error, ClientError) else ""


def _reason(error: BaseException) -> str:
    """One short line: the server's own words, or the innermost cause (`Connection refused`, not a nest of classes)."""
    if isinstance(error, ClientError):
        return one_line(error.response["Error"].get("Message", "") or _code(error))
    # An outer layer would print the whole URL, and a password in it.
    while not isinstance(error, TimeoutError) and (inner := error.__cause__ or error.__context__):
        error = inner
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError):
        return "timed out"
    # The answer itself is in the message of a parser.
    is_answer = isinstance(error, ResponseParserError | SyntaxError)
    return "an answer that is not S3's" if is_answer else one_line(str(error) or type(error).__name__)


def _encoded(crc32c: int) -> str:
    """The checksum as S3 writes it."""
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()
