"""What goes wrong between us and S3, told as the errors a person can act on.

The words of a server that refuses credentials are never repeated: they may hold the key that it refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
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
from job.store.base import ObjectMissingError

_CONNECTION = (
    BotoConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)
_REMOTE = (BotoCoreError, ClientError, *_CONNECTION)
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
_REASON_CHARACTERS = 200


class S3Errors:
    """Translates the errors of one bucket's client."""

    def __init__(self, bucket_uri: str, deadline_seconds: float, bucket_exists: Callable[[], bool]) -> None:
        """`bucket_exists` tells a missing bucket from a missing object: a HEAD request answers both with a bare 404."""
        self._bucket_uri = bucket_uri
        self._deadline_seconds = deadline_seconds
        self._bucket_exists = bucket_exists

    @contextmanager
    def about(self, uri: str) -> Iterator[None]:
        """Turns what the client raises into a `JobError` that names `uri`; errors of the local disk pass through.

        Raises:
            ObjectMissingError: 404, though the bucket is there; or another object took its place.
            MissingInputError: 404 for the bucket itself.
            NoPermissionError: 401, 403, or credentials that are missing, refused or cannot be refreshed.
            BucketAwayError: no connection, silence, 408, 429 or 5xx until the deadline, or bytes damaged on the way.
            BadRequestError: any other refusal, or settings that make no sense.
        """
        try:
            yield
        except _REMOTE as error:
            raise self.translated(error, uri) from error

    def translated(self, error: BaseException, uri: str) -> JobError:
        """The `JobError` for one error of the client."""
        status, code = status_of(error), code_of(error)
        if code == "NoSuchBucket":
            return self._no_bucket()
        if status == 404:
            return self.missing(uri)
        if code == "RequestTimeTooSkewed":
            return NoPermissionError(f"{uri}: refused, for this machine's clock is wrong ({code}): set it")
        if code in _CREDENTIAL_CODES:
            region = error.response["Error"].get("Region") if isinstance(error, ClientError) else None
            return no_credentials(self._bucket_uri, f"{code}; its region is {region}" if region else code)
        if isinstance(error, _CREDENTIALS):
            return no_credentials(self._bucket_uri, type(error).__name__)
        if status in (401, 403):
            permission = _PERMISSION.search(str(error))
            return NoPermissionError(
                f"{uri}: no permission{f' {permission[0]}' if permission else ''} ({code}): grant the account in use "
                f"s3:ListBucket on {self._bucket_uri}, and s3:GetObject, s3:PutObject and s3:DeleteObject on what is "
                "in it"
            )
        if code in _DAMAGED_CODES:
            return damaged(uri)
        if status == 412:
            return ObjectMissingError(f"{uri} was replaced while it was read: what is there now is another object")
        if is_passing(error):
            return BucketAwayError(
                f"{uri}: the bucket was away for {self._deadline_seconds:g} s ({_reason(error)}): check the network; "
                "the same command goes on from here"
            )
        if status is None:
            return BadRequestError(f"{uri}: cannot be asked for ({_reason(error)}): check the AWS settings")
        return BadRequestError(f"{uri}: the bucket refused with {status}: {_reason(error)}")

    def missing(self, uri: str) -> MissingInputError:
        """What a 404 about `uri` means."""
        try:
            there = self._bucket_exists()
        except _REMOTE:
            # Who may not list cannot tell; the object is missing all the same.
            there = True
        return ObjectMissingError(f"no object at {uri}") if there else self._no_bucket()

    def _no_bucket(self) -> MissingInputError:
        return MissingInputError(
            f"no bucket {self._bucket_uri}: check the name and AWS_ENDPOINT_URL, or make it with "
            f"`aws s3 mb {self._bucket_uri}`"
        )


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, ClientError):
        return status_of(error) in _PASSING_STATUSES or code_of(error) in _PASSING_CODES
    return isinstance(error, (*_CONNECTION, CredentialRetrievalError))


def status_of(error: BaseException) -> int | None:
    """HTTP status of an answer; None if there was none."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(error, ClientError) else None


def code_of(error: BaseException) -> str:
    """The word by which S3 knows an error, such as `NoSuchKey`; the answer to a HEAD request has the bare status."""
    return error.response["Error"].get("Code", "") if isinstance(error, ClientError) else ""


def damaged(uri: str) -> BucketAwayError:
    """The bytes that arrived are not the ones that were sent."""
    return BucketAwayError(f"{uri}: the bytes were damaged on the way (checksum differs): check the network; try again")


def no_credentials(bucket_uri: str, reason: str) -> NoPermissionError:
    """AWS, or whoever answers in its stead, knows no one here."""
    return NoPermissionError(
        f"{bucket_uri}: no usable AWS credentials ({reason}): run `aws configure` or `aws sso login`, set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine or pod a role"
    )


def _reason(error: BaseException) -> str:
    """One short line: the server's own words, or the innermost cause (`Connection refused`, not a nest of classes)."""
    if isinstance(error, ClientError):
        text = error.response["Error"].get("Message", "") or code_of(error)
    else:
        # An outer layer would print the whole URL, and a password in it.
        while not isinstance(error, TimeoutError) and (inner := error.__cause__ or error.__context__):
            error = inner
        text = _cause(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= _REASON_CHARACTERS else f"{text[:_REASON_CHARACTERS]}…"


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ResponseParserError | HttpProcessingError):
        # The answer itself is in the message.
        return "an answer that is not S3's"
    return str(error)
