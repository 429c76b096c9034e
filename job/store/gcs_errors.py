"""What goes wrong between us and Google Cloud Storage, told as the errors a person can act on.

Two client libraries with four HTTP stacks below them have some thirty ways of saying five things; this is the one place
that knows them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import aiohttp
import requests
import urllib3
from gcsfs.retry import ChecksumError, HttpError
from google.api_core.exceptions import GoogleAPIError, RetryError
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud.storage.exceptions import DataCorruption

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.store.base import ObjectMissingError

REMOTE = (
    GoogleAPIError,
    GoogleAuthError,
    DataCorruption,
    HttpError,
    ChecksumError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)
_PERMISSION = re.compile(r"storage\.[a-z]+\.[a-zA-Z]+")
_MESSAGE = re.compile(r'"message": *"([^"]+)"')
_REQUEST = re.compile(r"^\d{3} [A-Z]+ \S+: ")
_REASON_CHARACTERS = 200


class GcsErrors:
    """Translates the errors of one bucket's clients."""

    def __init__(self, bucket: str, deadline_seconds: float, bucket_exists: Callable[[], bool]) -> None:
        """`bucket_exists` tells a missing bucket from a missing object: Google answers both with 404."""
        self._bucket = f"gs://{bucket}"
        self._deadline_seconds = deadline_seconds
        self._bucket_exists = bucket_exists

    @contextmanager
    def about(self, uri: str) -> Iterator[None]:
        """Turns what the clients raise into a `JobError` that names `uri`; errors of the local disk pass through.

        Raises:
            ObjectMissingError: 404, though the bucket is there.
            MissingInputError: 404 for the bucket itself.
            NoPermissionError: 401, 403, or credentials that cannot be refreshed.
            BucketAwayError: no connection, silence, 408, 429 or 5xx until the deadline, or bytes damaged on the way.
            BadRequestError: any other refusal.
        """
        try:
            yield
        except (*REMOTE, OSError, ValueError) as error:
            if not _is_remote(error):
                raise
            raise self.translated(error, uri) from error

    def translated(self, error: BaseException, uri: str) -> JobError:
        """The `JobError` for one error of a client."""
        if isinstance(error, RetryError) and error.cause is not None:
            error = error.cause
        status, reason = _status(error), _reason(error)
        if status == 404:
            return self.missing(uri)
        if status in (401, 403):
            permission = _PERMISSION.search(str(error))
            return NoPermissionError(
                f"{uri}: no permission{f' {permission[0]}' if permission else ''} ({reason}): grant the account in use "
                f"roles/storage.objectUser on {self._bucket}"
            )
        if isinstance(error, GoogleAuthError) and not (error.retryable or isinstance(error, TransportError)):
            return no_credentials(self._bucket, reason)
        if isinstance(error, DataCorruption | ChecksumError):
            return damaged(uri)
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            return BadRequestError(f"{uri}: Google Cloud Storage refused with {status}: {reason}")
        return BucketAwayError(
            f"{uri}: the bucket was away for {self._deadline_seconds:g} s ({reason}): check the network; the same "
            "command goes on from here"
        )

    def missing(self, uri: str) -> MissingInputError:
        """What a 404 about `uri` means."""
        try:
            there = self._bucket_exists()
        except REMOTE:
            # Who may not list cannot tell; the object is missing all the same.
            there = True
        if there:
            return ObjectMissingError(f"no object at {uri}")
        return MissingInputError(
            f"no bucket {self._bucket}: check the name, or make it with `gcloud storage buckets create {self._bucket}`"
        )


def is_passing(error: Exception) -> bool:
    """Whether the same request of google-cloud-storage may succeed a little later."""
    if isinstance(error, GoogleAuthError):
        return error.retryable or isinstance(error, TransportError)
    status = _status(error)
    return _is_remote(error) if status is None else status >= 500 or status in (408, 429)


def is_lost(error: Exception) -> bool:
    """Whether a request got no answer, so that it may have been met or not."""
    return _is_remote(error) and _status(error) is None


def damaged(uri: str) -> BucketAwayError:
    """The bytes that arrived are not the ones that were sent."""
    return BucketAwayError(f"{uri}: the bytes were damaged on the way (crc32c differs): check the network; try again")


def no_credentials(bucket_uri: str, reason: str) -> NoPermissionError:
    """Google knows neither a user nor a service account here."""
    return NoPermissionError(
        f"{bucket_uri}: no usable Google credentials ({reason}): run `gcloud auth application-default login`, or set "
        "GOOGLE_APPLICATION_CREDENTIALS to a key file"
    )


def _is_remote(error: Exception) -> bool:
    """Whether an error came from the network: bare built-in ones may be gcsfs's words for HTTP answers.

    An `OSError` with a number, though, comes from this machine's disk.
    """
    if isinstance(error, OSError) and not isinstance(error, REMOTE):
        return error.errno is None
    return isinstance(error, REMOTE) or str(error).startswith("Bad Request")


def _status(error: BaseException) -> int | None:
    """HTTP status of an answer; None if there was none."""
    if isinstance(error, FileNotFoundError):
        return 404
    for word, status in (("Forbidden", 403), ("Bad Request", 400)):
        if type(error) in (OSError, ValueError) and str(error).startswith(word):
            return status
    response = getattr(error, "response", None)
    code = getattr(error, "code", None) or getattr(error, "status", None) or getattr(response, "status_code", None)
    return int(code) if code else None


def _reason(error: BaseException) -> str:
    """One short line: the server's own words, or the innermost cause (`Connection refused`, not a nest of classes)."""
    text = _REQUEST.sub("", str(error))
    if (message := _MESSAGE.search(text)) is not None:
        text = message[1]
    elif _status(error) is None:
        while not isinstance(error, TimeoutError) and (inner := error.__cause__ or error.__context__):
            error = inner
        text = "timed out" if isinstance(error, TimeoutError) else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= _REASON_CHARACTERS else f"{text[:_REASON_CHARACTERS]}…"
