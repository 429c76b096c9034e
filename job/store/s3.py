"""An S3 bucket at Amazon or on any server with conditional writes (If-None-Match and If-Match).

Every object is uploaded in one request, of which S3 accepts up to 5 GB, and guarded by its crc32c and, in the
signature, by the SHA-256 of the content. The metadata contain the crc32c as well, because not every server keeps it.

Messages never repeat the text of a server that refuses credentials: it may contain the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore import UNSIGNED
from botocore import exceptions as boto
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.parsers import ResponseParserError
from fsspec.config import conf
from urllib3.exceptions import HTTPError

from job.exits import BadRequestError, JobError, NoPermissionError
from job.store.base import ObjectMissingError
from job.store.calls import in_thread
from job.store.files import COPY_BYTES
from job.store.remote import CONNECTIONS, Page, Piece, RemoteStore, Watched, cause, content_type, damaged, one_line
from job.store.retry import Retry

_CRC32C = "ddpm-crc32c"
_LISTINGS_AT_ONCE = 16

_NO_ANSWER = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    # botocore lets the client's own error through where the body of a refusal breaks off.
    HTTPError,
    ConnectionError,
    TimeoutError,
)
_LOCKED_OUT = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound, boto.SSOError)
_CONFLICTS = ("PreconditionFailed", "412")
"""The answers to a conditional write that finds another object; servers without error codes send the second."""
_ACTION = re.compile(r"\bs3:[A-Z][A-Za-z]+")


class S3Store(RemoteStore):
    """Objects of a bucket whose names begin with a prefix. Versions are ETags."""

    _cloud, _make = "AWS", "aws s3 mb s3://{name}"
    _roles = "s3:ListBucket on {uri}, and s3:GetObject, s3:PutObject and s3:DeleteObject in it"
    _login_by = (
        "run `aws configure` or `aws sso login`, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine "
        "or pod a role"
    )

    def __init__(self, bucket: str, retry: Retry) -> None:
        """Finds credentials and endpoint as the AWS command line does, without any request to the bucket.

        Raises:
            NoPermissionError: the profile does not exist.
            BadRequestError: the endpoint or another setting is not valid.
        """
        super().__init__("s3", bucket, retry)
        self._bucket = bucket
        options = conf.get("s3", {})
        self._payer = {"RequestPayer": "requester"} if options.get("requester_pays") else {}
        config = Config(
            connect_timeout=retry.silence_seconds,
            read_timeout=retry.silence_seconds,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1},
            # This store sends and compares crc32c; older servers refuse the trailers that botocore would add.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            signature_version=UNSIGNED if options.get("anon") else None,
        )
        where = {"endpoint_url": options.get("endpoint_url"), **options.get("client_kwargs", {})}
        session = botocore.session.Session(profile=options.get("profile"))
        if "key" in options and "secret" in options:
            session.set_credentials(options["key"], options["secret"], options.get("token"))
        try:
            self._credentials = session.get_credentials()
            self._client = session.create_client("s3", config=config, **where)
            if urlsplit(self._client.meta.endpoint_url).username is not None:
                raise ValueError
        except (boto.BotoCoreError, ValueError) as error:
            # The error's text may repeat a password.
            meaning = self._job_error(error, self.uri) if isinstance(error, boto.BotoCoreError) else None
            raise meaning or BadRequestError(
                f"{self.uri}: AWS_ENDPOINT_URL must be the URL of a server without a user and password"
            ) from None

    def _sign_in(self, *, anew: bool = False) -> bool:
        if isinstance(self._credentials, RefreshableCredentials):
            self._in_time(in_thread(self._credentials.get_frozen_credentials))
        return False

    def _get(self, key: str, start: int, stop: int | None, version: str = "") -> Future[Piece]:
        which = {"Range": f"bytes={start}-{stop - 1}"} if stop else {}
        which |= {"IfMatch": version} if version else {}

        def get() -> Piece:
            answer = self._client.get_object(**self._named(key), **which)
            if "ContentLength" not in answer:
                # S3 always sends the length: a proxy has replaced it by chunks.
                raise boto.IncompleteReadError(actual_bytes=0, expected_bytes="unknown")
            # As a context it would give the stream below, which does not notice missing content.
            with closing(answer["Body"]) as body:
                data = body.read()
            size_bytes = int(answer.get("ContentRange", f"/{len(data)}").rpartition("/")[2])
            # An object that another program wrote has no such checksum.
            return Piece([data], size_bytes, answer["ETag"], answer["Metadata"].get(_CRC32C, ""))

        return in_thread(get)

    def _send(self, key: str, content: Watched, over: str | None) -> str | None:
        try:
            answer = self._ask(
                "put_object",
                **self._named(key),
                **({} if over is None else {"IfMatch": over} if over else {"IfNoneMatch": "*"}),
                # A file is sent after the answer to an `Expect` header, which costs a round trip.
                Body=content if content.size_bytes > COPY_BYTES else content.read(),
                ContentType=content_type(key),
                ChecksumCRC32C=content.crc32c,
                Metadata={_CRC32C: content.crc32c},
            )
        except boto.ClientError as error:
            if _code(error) in _CONFLICTS or (over and _code(error) == "NoSuchKey"):
                return None
            raise
        return str(answer["ETag"])

    def _ask(self, operation: str, **asked: Any) -> dict[str, Any]:
        """Sends a request, and returns the answer."""
        found: dict[str, Any] = self._answer(in_thread(getattr(self._client, operation), **asked))
        return found

    def _folders(self, prefix: str) -> Sequence[str]:
        def has_objects(name: str) -> bool:
            objects, _ = next(self._pages(f"{self._prefix}{prefix}{name}/", "", MaxKeys=1))
            return bool(objects)

        # SeaweedFS still lists a folder whose objects are deleted.
        found = super()._folders(prefix)
        with ThreadPoolExecutor(_LISTINGS_AT_ONCE) as pool:
            return [name for name, there in zip(found, pool.map(has_objects, found), strict=True) if there]

    def _delete(self, key: str) -> None:
        self._ask("delete_object", **self._named(key))

    def _pages(self, start: str, delimiter: str, **asked: Any) -> Iterator[Page]:
        asked |= {"Bucket": self._bucket, "Prefix": start, "Delimiter": delimiter, **self._payer}
        is_last = False
        while not is_last:
            page = self._ask("list_objects_v2", **asked)
            # A missing key raises: the page of a proxy would otherwise be an empty listing.
            is_last, asked["ContinuationToken"] = not page["IsTruncated"], page.get("NextContinuationToken", "")
            objects = [(content["Key"], content["Size"]) for content in page.get("Contents", [])]
            yield objects, [folder["Prefix"] for folder in page.get("CommonPrefixes", [])]

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key, **self._payer}

    def _job_error(self, error: Exception, uri: str) -> JobError | None:
        if isinstance(error, boto.ClientError):
            return self._refusal(error, uri)
        if isinstance(error, (*_LOCKED_OUT, boto.TokenRetrievalError)):
            return self._no_credentials(type(error).__name__)
        if isinstance(error, ResponseParserError):
            # The error's text contains the whole answer.
            return self._status_error(uri, None, "an answer that is not S3's")
        if isinstance(error, (*_NO_ANSWER, boto.CredentialRetrievalError)):
            return self._status_error(uri, None, cause(error))
        if isinstance(error, boto.BotoCoreError):
            return BadRequestError(f"{uri}: cannot be asked for ({cause(error)}): check the AWS settings")
        return super()._job_error(error, uri)

    def _refusal(self, error: boto.ClientError, uri: str) -> JobError:
        """Returns the meaning of S3's error code, or else of the HTTP status."""
        code, status = _code(error), self._status(error)
        reason = one_line(error.response["Error"].get("Message", "") or code)
        match code:
            case "NoSuchBucket":
                return self._no_bucket()
            case "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired":
                return self._no_credentials(code)
            case "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "AuthorizationHeaderMalformed":
                return self._no_credentials(code)
            case "RequestTimeTooSkewed":
                return NoPermissionError(f"{uri}: refused because this machine's clock is wrong ({code}): set it")
            case "BadDigest" | "XAmzContentSHA256Mismatch" | "XAmzContentChecksumMismatch":
                return damaged(uri)
            case "PreconditionFailed" | "412":
                return ObjectMissingError(f"{uri} was replaced while it was read: it is another object now")
            case "ConditionalRequestConflict" | "IncompleteBody" | "OperationAborted" | "RequestTimeout" | "SlowDown":
                return self._status_error(uri, None, reason)
        action = _ACTION.search(str(error))
        return self._status_error(uri, status, code if status in (401, 403) else reason, action[0] if action else "")

    def _status(self, error: Exception) -> int | None:
        return error.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(error, boto.ClientError) else None


def _code(error: boto.ClientError) -> str:
    """Returns S3's code of an error, such as `NoSuchKey`."""
    return str(error.response["Error"].get("Code", ""))
