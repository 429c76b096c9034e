"""The operations of a bucket, defined once for gs://, s3://, az:// and local folders.

A bucket is not a file system: objects appear whole or not at all, nothing is appended to or renamed, a listing is not a
lock. Every operation here is one that all backends can do atomically on a single object.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from job.exits import BadDataError, BadRequestError, JobError, MissingInputError
from job.progress import detail
from job.stop import NEVER, Stop
from job.store.files import os_errors, temporary_beside
from job.store.retry import Retry

T = TypeVar("T")

READ_BYTES = 1 << 30
"""Largest object that is held in memory: more than a piece of 256 images of 1,024 pixels."""

_NEW_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*(/[A-Za-z0-9][A-Za-z0-9._=+-]*)*")
_ANY = r"[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]"
_KEY = re.compile(rf"(?!\.){_ANY}+(/(?!\.){_ANY}+)*")


class ObjectMissingError(MissingInputError):
    """No object has this key."""


class ObjectExistsError(JobError):
    """`create` found another object with this key: another writer was first."""


class ConflictError(JobError):
    """`replace` found a version other than the expected one: another writer replaced it in between."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing; `key` is relative to the store that listed it."""

    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Blob:
    """A small object's bytes and the opaque version that `replace` compares."""

    data: bytes
    version: str


class Store(abc.ABC):
    """A bucket, or a folder in one. Keys are relative and `/`-separated; new ones are plain, others any safe name.

    Instances are thread-safe. They must not cross a fork: pass `uri` to the child and call `open_store` there.

    Methods raise `ObjectMissingError`, `MissingInputError` for a missing bucket, `NoPermissionError`, `DiskFullError`,
    `BucketAwayError` when `retry` gives up, and `StoppedError` when its stop ends the wait; each message names the URI
    and a remedy. The first object creates a local folder. Listing it earlier is an error: its name may be misspelt.

    A backend implements the methods that begin with an underscore: each makes one attempt, with validated keys.
    `_job_error` translates its client's errors; the operation is tried again after a `BucketAwayError`.
    """

    uri: str
    """`gs://bucket/prefix` or an absolute local path; no trailing slash. `open_store(uri)` gives an equal store."""
    retry: Retry
    """Repeats an operation while the bucket is away; `store.retry(work)` repeats several operations as one."""

    def __init__(self, uri: str, retry: Retry) -> None:
        """Opens the whole bucket."""
        self.uri, self.retry = uri.rstrip("/") or "/", retry
        self._prefix = ""

    def uri_of(self, key: str) -> str:
        """Returns the URI of an object, for people and other tools."""
        return self._uri(validated_key(key))

    def sub(self, prefix: str) -> Self:
        """Returns the store of everything below `prefix`, which shares this one's connections and `retry`."""
        below = copy.copy(self)
        below.uri, below._prefix = self.uri_of(prefix), f"{self._prefix}{prefix}/"
        return below

    def within(self, seconds: float, stop: Stop = NEVER) -> Self:
        """Returns a store of the same objects whose operations give up after `seconds`, or at `stop`."""
        other = copy.copy(self)
        other.retry = self.retry.within(seconds, stop)
        return other

    def read(self, key: str) -> Blob:
        """Returns a small object's content and version.

        Raises:
            BadDataError: the object has more than `READ_BYTES`.
        """
        return self._attempt(self._read, validated_key(key))

    def create(self, key: str, data: bytes) -> str:
        """Writes an object that must not exist yet, atomically, and returns its version.

        A retry after a lost response finds its first write, so a conflict with identical content counts as success:
        objects that decide a race need unique content, such as an attempt id.

        Raises:
            ObjectExistsError: an object with other content has this key.
        """
        return self._created(key, io.BytesIO(data))

    def check_writable(self, key: str) -> None:
        """Writes and deletes a test object, so that missing rights are known before anything is computed.

        Raises:
            NoPermissionError: the credentials lack one of the two rights; the message names the object.
            BadRequestError: a second writer overwrites the first.
        """
        for _ in range(2):
            # A process that clears the folder may delete the first object before the second writer comes.
            self.create(key, b"of the first writer")
            try:
                self.create(key, b"of a second one")
            except ObjectExistsError:
                return
            finally:
                self.delete(key)
        remedy = (
            "use a bucket, not zonal, that honours If-None-Match or ifGenerationMatch, and no proxy that drops them"
        )
        raise BadRequestError(f"{self.uri} lets a second writer overwrite the first: {remedy}")

    def replace(self, key: str, data: bytes, version: str) -> str:
        """Replaces exactly `version` of an object (compare-and-swap) and returns the new version; see `create`.

        Raises:
            ConflictError: the object is gone or has another version.
        """
        new_version = self._attempt(self._written, validated_new_key(key), io.BytesIO(data), version)
        if new_version is None:
            raise ConflictError(f"{self.uri_of(key)} has changed or is gone: another writer replaced it")
        return new_version

    def put(self, key: str, data: bytes) -> None:
        """Writes an object atomically, over any earlier one. Only for hints, status and reports."""
        self._attempt(self._written, validated_new_key(key), io.BytesIO(data), None)

    def upload(self, path: Path, key: str, *, fresh: bool = False) -> None:
        """Copies a finished local file to a new object, as `create` does.

        A key is `fresh` if no other writer uses it. Then no condition is needed, and some buckets take several parts of
        the file at a time.
        """
        with os_errors(path), path.open("rb") as file:
            self._created(key, file, None if fresh else "")

    def move(self, path: Path, key: str, *, fresh: bool = False) -> None:
        """Uploads a finished local file and deletes it; one on the disk of a local bucket becomes the object itself."""
        self.upload(path, key, fresh=fresh)
        path.unlink()

    def download(self, key: str, path: Path) -> str:
        """Copies an object to a local file, which is whole or absent, and returns the SHA-256 of what arrived.

        Only a power failure may damage the file.
        """
        return self._attempt(self._download, validated_key(key), path)

    def open(self, key: str) -> BinaryIO:
        """Returns a seekable stream over one version of an object; each read is tried again at its position."""
        return self._attempt(self._open, validated_key(key))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Lists all objects below the folder `prefix`, recursively, in key order; never from a cache.

        A missing folder is empty, a missing bucket an error. Hidden names and folder markers are left out.
        """
        entries = self._attempt(self._list, folder_key(prefix))
        return iter(sorted((entry for entry in entries if is_key(entry.key)), key=lambda entry: entry.key))

    def folders(self, prefix: str = "") -> Sequence[str]:
        """Lists the names of the immediate sub-folders of `prefix`, sorted; never from a cache."""
        return sorted(name for name in self._attempt(self._folders, folder_key(prefix)) if is_key(name))

    def delete(self, key: str) -> None:
        """Deletes an object, if it exists."""
        with suppress(ObjectMissingError):
            self._attempt(self._delete, validated_key(key))

    def exists(self, key: str) -> bool:
        """Returns whether an object has this key now, without reading its content."""
        with suppress(ObjectMissingError), self.open(key):
            return True
        return False

    def sweep(self) -> None:
        """Removes the temporary files of killed writers, which only a local folder has."""
        return

    def _attempt(self, work: Callable[..., T], key: str, *args: Any) -> T:
        """Does `work(key, *args)` with this store's `retry`, and turns its client's errors into a `JobError`."""
        uri = self._uri(key).rstrip("/")

        def attempt() -> T:
            began = time.monotonic()
            # An error of the disk is about the local file, if one is up- or downloaded.
            with os_errors(next((arg for arg in args if isinstance(arg, Path)), uri)):
                try:
                    result = work(key, *args)
                    detail(lambda: f"{work.__name__.strip('_')} {uri}: {time.monotonic() - began:.3f} s")
                    return result
                except Exception as error:
                    if meaning := self._job_error(error, uri):
                        raise meaning from error
                    raise

        return self.retry(attempt)

    def _uri(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{key}"

    def _job_error(self, error: Exception, uri: str) -> JobError | None:
        """Returns the meaning of a client's error about `uri`; None for other errors, such as those of a local disk."""
        return None

    def _created(self, key: str, content: BinaryIO, over: str | None = "") -> str:
        version = self._attempt(self._written, validated_new_key(key), content, over)
        if version is None:
            raise ObjectExistsError(f"{self.uri_of(key)} exists already with other content: another writer was first")
        return version

    def _written(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        content.seek(0)
        version = self._write(key, content, over)
        if version is not None:
            return version
        try:
            # A write whose answer was lost is refused when it is repeated.
            return self._attempt(self._version_if_equal, key, content)
        except ObjectMissingError:
            # Another writer's object is gone again, such as that of an equal packer that has finished.
            content.seek(0)
            return self._write(key, content, over)

    def _version_if_equal(self, key: str, content: BinaryIO) -> str | None:
        content.seek(0)
        equal: list[bool] = []
        version = self._fetch(key, lambda data: equal.append(content.read(len(data)) == data))
        return version if all(equal) and not content.read(1) else None

    def _read(self, key: str) -> Blob:
        content = io.BytesIO()

        def consume(data: bytes) -> None:
            if content.tell() + len(data) > READ_BYTES:
                raise BadDataError(f"{self.uri_of(key)} has more than {READ_BYTES:,} bytes: no such object is so large")
            content.write(data)

        version = self._fetch(key, consume)
        return Blob(content.getvalue(), version)

    def _download(self, key: str, path: Path) -> str:
        sha256 = hashlib.sha256()
        with temporary_beside(path) as (temporary, file):

            def consume(data: bytes) -> None:
                file.write(data)
                sha256.update(data)

            self._fetch(key, consume)
            file.flush()
            temporary.replace(path)
        return sha256.hexdigest()

    @abc.abstractmethod
    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        """Streams the verified content to `consume`, and returns its version."""

    @abc.abstractmethod
    def _write(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        """Writes over the version `over` ("": no object, None: any); returns the new version, None after a conflict."""

    @abc.abstractmethod
    def _open(self, key: str) -> BinaryIO: ...

    @abc.abstractmethod
    def _list(self, prefix: str) -> Sequence[Entry]:
        """Lists the objects whose keys begin with `prefix`, with their whole keys, in any order."""

    @abc.abstractmethod
    def _folders(self, prefix: str) -> Sequence[str]: ...

    @abc.abstractmethod
    def _delete(self, key: str) -> None: ...


def is_key(name: str) -> bool:
    """Returns whether `name` is a safe relative key: no empty, hidden or `..` part, backslash or control character."""
    return _KEY.fullmatch(name) is not None


def validated_key(key: str) -> str:
    """Returns `key` if it is a safe relative key.

    Raises:
        BadRequestError: the key could lead outside the store, or no listing would show it.
    """
    if not is_key(key):
        raise BadRequestError(f"{key!r} cannot be an object's key: use a relative path without '..' or hidden names")
    return key


def validated_new_key(key: str) -> str:
    """Returns `key` if it means the same to every bucket, shell, URL and file system.

    Raises:
        BadRequestError: it has characters that some of them treat specially.
    """
    if not _NEW_KEY.fullmatch(key):
        raise BadRequestError(f"{key!r} cannot be a new object's key: use letters, digits and ._=+- between slashes")
    return key


def folder_key(prefix: str) -> str:
    """Returns the beginning of all keys below the folder `prefix`; empty for the store itself."""
    return f"{validated_key(prefix)}/" if prefix else ""
