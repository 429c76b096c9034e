"""s3:// and az:// through obstore, the Python of Rust's object_store; botocore finds what AWS users have set up.

A small object, and a file that only one writer may create, is sent whole in one request, under its condition. A file
under a key of its writer's own is sent in parts. The metadata contain the crc32c of the content; S3 also compares the
SHA-256 of each request.

Messages never repeat the text of a server that refuses credentials: it may contain the key.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import urlsplit

import obstore
from fsspec.config import conf
from obstore.exceptions import BaseError
from obstore.store import AzureStore as AzureClient
from obstore.store import S3Store as S3Client

from job.exits import BadDataError, BadRequestError, JobError, NoPermissionError
from job.store.base import Entry, ObjectMissingError
from job.store.files import COPY_BYTES
from job.store.remote import Fetched, RemoteStore, Watched, cause, content_type, damaged, one_line
from job.store.retry import Retry, T, in_thread

_CRC32C = "ddpm_crc32c"
_PART_BYTES, _PARTS_AT_ONCE = 5 << 20, 4
"""S3 takes no smaller parts, and many files are uploaded at the same time."""
_SILENCES_PER_UPLOAD = 12
"""Times of silence for as many bytes as are sent at once: the client reports no progress within a request."""
_LISTINGS_AT_ONCE = 16
_BLOCK_BYTES = 64 << 10

_STATUS = re.compile(r"status code: (\d{3})|\(code: (\d{3})\)")
_CODE, _MESSAGE = re.compile("<Code>([^<]*)"), re.compile("<Message>([^<]*)")
_INNERMOST = re.compile(r'^ *(?:\w+: )?"?((?!\w+://)[A-Za-z][^"\n{]*)"?,$', re.MULTILINE)
"""A value in the structure of an error; the last one is the cause."""
_WORDS = {
    "container does not exist": "ContainerNotFound",
    "Received redirect without|<Region>": "OtherRegion",
    "error: ('az account |Error reading federated token|Error performing token request.* code: 40[013])": "NoToken",
    "GET http://169.254.169.254/": "NoToken",
}
"""Codes for errors without one, by obstore's words: a deletion at Azure, a region, the sign-in at Azure."""
_BAD_PATH = re.compile('object with invalid path.*Path "(.*?)"', re.DOTALL)
_ACTION = re.compile(r"\bs3:[A-Z][A-Za-z]+")
_CONFLICTS = {"PreconditionFailed", "BlobAlreadyExists", "ConditionNotMet", "NoSuchKey", "BlobNotFound"}
"""The answers to a conditional write that finds another object, or none to replace."""
_AZURE_OPTIONS = ("account_name", "account_key", "sas_token", "tenant_id", "client_id", "client_secret")
_IN_TEXT = {"AccountName": "account_name", "AccountKey": "account_key", "SharedAccessSignature": "sas_token"}
"""The options that a connection string has."""
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"}
_LOCKED_OUT = re.compile("Token|AccessKey|SignatureDoes|HeaderMalformed|Authentication")
_DAMAGED = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "Md5Mismatch"}
_BUSY = {"ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown"}


class Refused(Exception):  # noqa: N818 -- it may be the expected answer
    """An answer with an error; `status` is None if there was no answer, for the reason `text`."""

    def __init__(self, text: str) -> None:
        """Takes it from the text of obstore's error."""
        said, _, structure = text.partition("\n\nDebug source:")
        status, code, message, path = (each.search(said) for each in (_STATUS, _CODE, _MESSAGE, _BAD_PATH))
        found = code[1] if code else ""
        self.code = next((name for words, name in _WORDS.items() if re.search(words, said)), found)
        self.status, self.bad_path = int(status[1] or status[2]) if status else None, path[1] if path else ""
        cause = (["an unknown error", *_INNERMOST.findall(structure)])[-1]
        self.text = message[1] if message else "timed out" if cause == "TimedOut" else cause


class ObjectStore(RemoteStore):
    """Objects of a bucket whose names begin with a prefix. Versions are ETags."""

    def _connects_by(self, kind: type, bucket: str, **settings: Any) -> None:
        self._connect = partial(kind, bucket, **settings)
        self._client = self._connected(self.retry.silence_seconds)

    def _connected(self, silence_seconds: float) -> Any:
        """Returns a client whose requests fail when the server is silent for so long, and are sent once."""
        # To it a request is silent until its body is sent.
        limits = {"connect_timeout": self.retry.silence_seconds, "read_timeout": silence_seconds, "timeout": 86400}
        options = {name: timedelta(seconds=seconds) for name, seconds in limits.items()}
        once = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
        return self._connect(client_options={"allow_http": True, **options}, retry_config=once)

    def _ask(self, work: Callable[..., T], *args: Any, **named: Any) -> T:
        return self._answer(in_thread(_asked, work, *args, **named))

    def _get(self, key: str, start: int, stop: int | None, version: str = "") -> Future[Fetched]:
        def get() -> Fetched:
            which: Any = {**({"range": (start, stop)} if stop else {}), **({"if_match": version} if version else {})}
            found = obstore.get(self._client, self._prefix + key, options=which)
            # An object that another program wrote has no such checksum.
            crc32c = found.attributes.get(_CRC32C, "")
            # Heaps of threads would keep the memory of the ranges.
            content = mmap.mmap(-1, found.range[1] - found.range[0] or 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for block in found.stream(_BLOCK_BYTES):
                content.write(block)
            got_bytes = content.tell()
            content.seek(0)
            blocks = iter(partial(content.read, _BLOCK_BYTES), b"") if got_bytes else ()
            return Fetched(blocks, got_bytes, found.meta["size"], str(found.meta["e_tag"]), crc32c)

        return in_thread(_asked, get)

    def _send(self, key: str, content: Watched, over: str | None) -> str | None:
        about = {"Content-Type": content_type(key), _CRC32C: content.crc32c}
        is_parted = over is None and content.size_bytes > _PART_BYTES
        how: dict[str, Any] = {"use_multipart": is_parted, "chunk_size": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE}
        if over is not None:
            how["mode"] = {"e_tag": over} if over else "create"
        client = self._client
        if content.size_bytes > COPY_BYTES:
            at_once = 1 if is_parted else max(1, content.size_bytes / (_PART_BYTES * _PARTS_AT_ONCE))
            client = self._connected(at_once * _SILENCES_PER_UPLOAD * self.retry.silence_seconds)
        data: Any = content if is_parted else content.whole()
        try:
            return str(self._ask(obstore.put, client, self._prefix + key, data, attributes=about, **how)["e_tag"])
        except Refused as error:
            if over is not None and (error.code in _CONFLICTS or (error.status == 412 and not error.code)):
                return None
            raise

    def _list(self, prefix: str) -> Sequence[Entry]:
        start = self._prefix + prefix
        found = self._ask(lambda: obstore.list(self._client, start or None, chunk_size=1000).collect())
        self._check_listing(start, found)
        sizes = {each["path"]: each["size"] for each in found if each["path"].startswith(start)}
        # The marker `a/` of a folder is listed as an object `a`.
        folders = {name[: at.start()] for name in sizes for at in re.finditer("/", name)}
        objects = ((name, size_bytes) for name, size_bytes in sizes.items() if size_bytes or name not in folders)
        return [Entry(name.removeprefix(self._prefix), size_bytes) for name, size_bytes in objects]

    def _folders(self, prefix: str) -> Sequence[str]:
        start = self._prefix + prefix
        found = self._ask(obstore.list_with_delimiter, self._client, start or None)
        self._check_listing(start, [*found["common_prefixes"], *found["objects"]])
        return [folder.removeprefix(start) for folder in found["common_prefixes"]]

    def _check_listing(self, start: str, found: Sequence[object]) -> None:
        """Asks for an object as well if nothing is listed: for obstore a proxy's page is an empty listing."""
        try:
            if not found:
                self._ask(obstore.get, self._client, f"{start}none", options={"range": (0, 1)})
        except Refused as error:
            if error.status != 404:
                raise

    def _delete(self, key: str) -> None:
        self._ask(obstore.delete, self._client, self._prefix + key)

    def _job_error(self, error: Exception, uri: str) -> JobError | None:
        if not isinstance(error, Refused):
            return super()._job_error(error, uri)
        # The cloud's error code says more than the HTTP status.
        status, code = error.status, error.code or "without a reason"
        if code in _NO_BUCKET:
            return self._no_bucket()
        if code == "OtherRegion":
            return BadRequestError(f"{uri}: the bucket is in another region: set AWS_REGION to that")
        if _LOCKED_OUT.search(code):
            clock = ", or this machine's clock is wrong" if code == "AuthenticationFailed" else ""
            return self._no_credentials(code + clock)
        if code == "RequestTimeTooSkewed":
            return NoPermissionError(f"{uri}: refused because this machine's clock is wrong ({code}): set it")
        if code in _DAMAGED:
            return damaged(uri)
        if status == 412:
            return ObjectMissingError(f"{uri} was replaced while it was read: it is another object now")
        if error.bad_path:
            why = "has an empty part, '..' or a control character"
            return BadDataError(f"{uri} cannot be listed, because the key {error.bad_path[:200]!r} {why}: rename it")
        if status in (401, 403):
            action = _ACTION.search(error.text)
            return self._status_error(uri, status, code, action[0] if action else "")
        reason = one_line(error.text) if status is None or self._cloud == "AWS" else code
        return self._status_error(uri, None if code in _BUSY else status, reason)

    def _status(self, error: Exception) -> int | None:
        return error.status if isinstance(error, Refused) else None


class S3Store(ObjectStore):
    """A bucket at Amazon or on any server with conditional writes (If-None-Match and If-Match)."""

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
        # az:// does without it.
        import botocore.session

        super().__init__("s3", bucket, retry)
        options = conf.get("s3", {})
        self._is_anonymous = bool(options.get("anon"))
        with self._signing_in():
            session = botocore.session.Session(profile=options.get("profile"))
            if "key" in options and "secret" in options:
                session.set_credentials(options["key"], options["secret"], options.get("token"))
            self._credentials = session.get_credentials()
            where = {"endpoint_url": options.get("endpoint_url"), **options.get("client_kwargs", {})}
            found = session.create_client("s3", **where).meta
            if urlsplit(found.endpoint_url).username is not None:
                raise ValueError
        self._connects_by(
            S3Client,
            bucket,
            aws_endpoint_url_s3=found.endpoint_url,
            region=found.region_name,
            virtual_hosted_style_request=False,
            checksum_algorithm="SHA256",
            # Some servers cannot delete several objects by one request.
            disable_bulk_delete=True,
            request_payer=bool(options.get("requester_pays")),
            skip_signature=self._is_anonymous,
            credential_provider=None if self._is_anonymous else self._signature,
        )

    def _sign_in(self, *, anew: bool = False) -> bool:
        # During a request nothing would end the search for credentials.
        if not self._is_anonymous:
            with self._signing_in():
                self._in_time(in_thread(self._signature))
        return False

    def _signature(self) -> dict[str, Any]:
        """Returns the current credentials; obstore asks again for each request, and botocore renews them in time."""
        from botocore.exceptions import NoCredentialsError

        if self._credentials is None:
            raise NoCredentialsError
        key, secret, token = self._credentials.get_frozen_credentials()[:3]
        return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": datetime.now(UTC)}

    @contextmanager
    def _signing_in(self) -> Iterator[None]:
        """Translates the errors of botocore; their texts may repeat a password."""
        from botocore import exceptions as boto

        try:
            yield
        except (boto.ConnectionError, boto.HTTPClientError, boto.CredentialRetrievalError) as error:
            raise self._status_error(self.uri, None, cause(error)) from error
        except ValueError:
            must = "the URL of a server without a user and password, and AWS_REGION a region: check the AWS settings"
            raise BadRequestError(f"{self.uri}: AWS_ENDPOINT_URL must be {must}") from None
        except boto.ClientError as error:
            raise self._no_credentials(str(error.response["Error"].get("Code", ""))) from None
        except boto.BotoCoreError as error:
            raise self._no_credentials(type(error).__name__) from None

    def _folders(self, prefix: str) -> Sequence[str]:
        def has_objects(name: str) -> bool:
            below = f"{self._prefix}{prefix}{name}/"
            return bool(self._ask(lambda: next(obstore.list(self._client, below, chunk_size=1), None)))

        # SeaweedFS still lists a folder whose objects are deleted.
        found = super()._folders(prefix)
        with ThreadPoolExecutor(_LISTINGS_AT_ONCE) as pool:
            return [name for name, there in zip(found, pool.map(has_objects, found), strict=True) if there]


class AzureStore(ObjectStore):
    """A container of Azure Blob Storage."""

    _cloud, _make = "Azure", "az storage container create --name {name}"
    _roles = "`Storage Blob Data Contributor` on {uri}"
    _login_by = "set AZURE_STORAGE_ACCOUNT_NAME and run `az login`, or set AZURE_STORAGE_CONNECTION_STRING"

    def __init__(self, container: str, retry: Retry) -> None:
        """Finds the account and its credentials, without any request.

        obstore reads the variables of Azure itself; where they name no credentials, it asks the machine for a token.

        Raises:
            NoPermissionError: no account is named.
        """
        super().__init__("az", container, retry)
        options = {**conf.get("abfs", {}), **conf.get("az", {})}
        text = options.get("connection_string") or os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
        said = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
        suffix = said.get("EndpointSuffix")
        endpoint = said.get("BlobEndpoint") or (f"https://{said.get('AccountName')}.blob.{suffix}" if suffix else "")
        settings = {
            # A connection string with a signature names only the endpoint.
            "account_name": re.sub(r"https?://|\..*", "", endpoint),
            **{name: options[name] for name in _AZURE_OPTIONS if name in options},
            **{name: said[part] for part, name in _IN_TEXT.items() if part in said},
            "endpoint": endpoint,
            "skip_signature": options.get("anon"),
            "use_azure_cli": which("az") and Path("~/.azure/azureProfile.json").expanduser().exists(),
        }
        try:
            self._connects_by(AzureClient, container, **{name: value for name, value in settings.items() if value})
        except (BaseError, ValueError):
            # The error's text may repeat a key.
            raise self._no_credentials("no account, or a wrong one") from None


def _asked(work: Callable[..., T], *args: Any, **named: Any) -> T:
    """Returns the result of obstore, or raises `Refused`."""
    try:
        return work(*args, **named)
    except (BaseError, OSError) as error:
        raise Refused(str(error)) from None
