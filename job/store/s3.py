"""An S3 bucket, of Amazon's or of any server that knows conditional writes (If-None-Match and If-Match).

Every object goes up in one request, of which S3 takes up to 5 GB, guarded by its crc32c and, in the signature, by the
SHA-256 of the content. Its metadata have the crc32c as well: servers differ in what they keep.

The words of a server that refuses credentials are never repeated: they may hold the key that it refused.
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

from job.exits import BadRequestError, JobError, NoPermissionError
from job.store.base import ObjectMissingError
from job.store.calls import in_thread
from job.store.files import COPY_BYTES
from job.store.remote import CONNECTIONS, Page, Piece, RemoteStore, Watched, cause, content_type, damaged, one_line
from job.store.retry import Retry

_CRC32C = "ddpm-crc32c"
_LISTINGS_AT_ONCE = 16

_NO_ANSWER = (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, ConnectionError, TimeoutError)
_LOCKED_OUT = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound, boto.SSOError)
_NOT_AS_THOUGHT = ("PreconditionFailed", "412")
"""The answers to a conditional write that finds something else; the second from servers that only send a status."""
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
        """Finds credentials and endpoint as the AWS command line does, but sends nothing to the bucket yet.

        Raises:
            NoPermissionError: the profile does not exist.
            BadRequestError: the endpoint or another setting makes no sense.
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
            # We send and compare crc32c ourselves; older servers choke on the trailers that botocore would add.
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
            # Its own words may repeat a password.
            told = self._job_error(error, self.uri) if isinstance(error, boto.BotoCoreError) else None
            raise told or BadRequestError(
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
                # S3 always says how much is to come; something on the way cut the answer into chunks of its own.
                raise boto.IncompleteReadError(actual_bytes=0, expected_bytes="unknown")
            # Entered itself, it would give the stream below it, which takes a shorter content for a whole one.
            with closing(answer["Body"]) as body:
                data = body.read()
            size_bytes = int(answer.get("ContentRange", f"/{len(data)}").rpartition("/")[2])
            # An object of others carries no checksum of ours.
            return Piece([data], size_bytes, answer["ETag"], answer["Metadata"].get(_CRC32C, ""))

        return in_thread(get)

    def _send(self, key: str, content: Watched, over: str | None) -> str | None:
        try:
            answer = self._ask(
                "put_object",
                **self._named(key),
                **({} if over is None else {"IfMatch": over} if over else {"IfNoneMatch": "*"}),
                # A file is announced first, and waits for an answer.
                Body=content if content.size_bytes > COPY_BYTES else content.read(),
                ContentType=content_type(key),
                ChecksumCRC32C=content.crc32c,
                Metadata={_CRC32C: content.crc32c},
            )
        except boto.ClientError as error:
            if _code(error) in _NOT_AS_THOUGHT or (over and _code(error) == "NoSuchKey"):
                return None
            raise
        return str(answer["ETag"])

    def _ask(self, operation: str, **asked: Any) -> dict[str, Any]:
        """The answer to a request."""
        found: dict[str, Any] = self._answer(in_thread(getattr(self._client, operation), **asked))
        return found

    def _folders(self, prefix: str) -> Sequence[str]:
        def has_objects(name: str) -> bool:
            objects, _ = next(self._pages(f"{self._prefix}{prefix}{name}/", "", MaxKeys=1))
            return bool(objects)

        # SeaweedFS goes on listing a folder that was emptied.
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
            # A page of somebody on the way has nothing in it that S3 says, and would be an empty listing.
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
            # The answer itself is in its words.
            return self._status_error(uri, None, "an answer that is not S3's")
        if isinstance(error, (*_NO_ANSWER, boto.CredentialRetrievalError)):
            return self._status_error(uri, None, cause(error))
        if isinstance(error, boto.BotoCoreError):
            return BadRequestError(f"{uri}: cannot be asked for ({cause(error)}): check the AWS settings")
        return super()._job_error(error, uri)

    def _refusal(self, error: boto.ClientError, uri: str) -> JobError:
        """What S3's word for an error means, or else its number."""
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
                return NoPermissionError(f"{uri}: refused, for this machine's clock is wrong ({code}): set it")
            case "BadDigest" | "XAmzContentSHA256Mismatch" | "XAmzContentChecksumMismatch":
                return damaged(uri)
            case "PreconditionFailed" | "412":
                return ObjectMissingError(f"{uri} was replaced while it was read: what is there now is another object")
            case "ConditionalRequestConflict" | "IncompleteBody" | "OperationAborted" | "RequestTimeout" | "SlowDown":
                return self._status_error(uri, None, reason)
        action = _ACTION.search(str(error))
        return self._status_error(uri, status, code if status in (401, 403) else reason, action[0] if action else "")

    def _status(self, error: Exception) -> int | None:
        return error.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(error, boto.ClientError) else None


def _code(error: boto.ClientError) -> str:
    """The word by which S3 knows an error, such as `NoSuchKey`."""
    return str(error.response["Error"].get("Code", ""))
