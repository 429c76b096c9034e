"""The operations of a bucket, said once for gs://, s3://, az:// and local folders alike.

A bucket is not a file system: objects appear whole or not at all, nothing is appended to or renamed, a listing is not a
lock. Every operation here is one that all backends can do atomically on a single object.
"""

from __future__ import annotations

import abc
import copy
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
    """`create` found another object with this key: somebody else was first."""


class ConflictError(JobError):
    """`replace` found a version other than the expected one: somebody else wrote in between."""


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
    """A bucket, or a folder in one. Keys are relative, `/`-separated and validated; instances are thread-safe.

    What is written here gets a plain name; what others wrote, spaces and all, is listed and read under its own.

    Instances hold connections and must not cross a fork: pass `uri` to the child and call `open_store` there.

    Every method raises `ObjectMissingError` (66) for a missing object, `MissingInputError` (66) for a missing bucket,
    `NoPermissionError` (77), `DiskFullError` (74), `BucketAwayError` (69) when `retry` gives up, and `StoppedError`
    (75) when its stop ends the waiting; each message names the object's URI and what to do. A local folder is made with
    its first object: until then it holds no objects, and listing it is an error, for it may be a misspelt one.

    A backend implements what begins with an underscore: one attempt each, with keys that are validated. Its clients'
    errors are told in one place, `_told`; what may pass is a `BucketAwayError`.
    """

    uri: str
    """`gs://bucket/prefix` or an absolute local path; no trailing slash. `open_store(uri)` gives an equal store."""
    retry: Retry
    """Tries again while the bucket is away; `store.retry(work)` does several operations again as one."""

    def __init__(self, uri: str, retry: Retry) -> None:
        """The whole bucket."""
        self.uri, self.retry = uri.rstrip("/") or "/", retry
        self._prefix = ""

    def uri_of(self, key: str) -> str:
        """The URI a person or another tool can use for `key`."""
        return self._uri(validated_key(key))

    def sub(self, prefix: str) -> Self:
        """The store of everything below `prefix`, sharing this one's connections and patience."""
        below = copy.copy(self)
        below.uri, below._prefix = self.uri_of(prefix), f"{self._prefix}{prefix}/"
        return below

    def within(self, seconds: float, stop: Stop = NEVER) -> Self:
        """The same objects and connections, with operations that give up after `seconds`, or at `stop`."""
        other = copy.copy(self)
        other.retry = self.retry.within(seconds, stop)
        return other

    def read(self, key: str, most_bytes: int | None = None) -> Blob:
        """The whole object and its version. For small objects: it is held in memory, up to `READ_BYTES` or fewer.

        Raises:
            BadDataError: it is larger.
        """
        return self._attempt(self._read, validated_key(key), most_bytes)

    def create(self, key: str, data: bytes) -> str:
        """Writes an object that must not exist yet, atomically, and returns its version.

        A retry after a lost response finds the object it wrote itself, so a conflict with byte-identical content
        counts as success: put something unique (an attempt id) into objects that decide a race.

        Raises:
            ObjectExistsError: an object with other content has this key.
        """
        return self._created(key, io.BytesIO(data))

    def check_writable(self, key: str) -> None:
        """Writes and deletes a few bytes at a key of their own: what fails is known before anything is computed.

        Raises:
            NoPermissionError: the credentials do not allow one of the two; the message names the object.
            BadRequestError: a second writer overwrites the first.
        """
        self.create(key, b"of the first writer")
        try:
            self.create(key, b"of a second one")
        except ObjectExistsError:
            return
        finally:
            self.delete(key)
        raise BadRequestError(
            f"{self.uri} lets a second writer overwrite the first, and two attempts could take one run: use a bucket "
            "that honours If-None-Match or ifGenerationMatch (no zonal one, and no proxy that drops them)"
        )

    def replace(self, key: str, data: bytes, version: str) -> str:
        """Writes over exactly `version` of an object (compare-and-swap) and returns the new version.

        As in `create`, a conflict in which the object already holds `data` counts as success.

        Raises:
            ConflictError: the object is gone or has another version.
        """
        new_version = self._attempt(self._written, validated_new_key(key), io.BytesIO(data), version)
        if new_version is None:
            raise ConflictError(f"{self.uri_of(key)} has changed or is gone: somebody else wrote it")
        return new_version

    def put(self, key: str, data: bytes) -> None:
        """Writes an object whatever was there before, atomically. Only for hints, status and reports."""
        self._attempt(self._written, validated_new_key(key), io.BytesIO(data), None)

    def upload(self, path: Path, key: str) -> None:
        """Copies a finished local file to a fresh key; a bucket verifies its crc32c.

        The object appears whole or not at all, also when this process dies half-way. As in `create`, a conflict with
        an object of the same content counts as success, so that whoever died after an upload can repeat it.

        Raises:
            ObjectExistsError: an object with other content has this key.
        """
        with os_errors(path), path.open("rb") as file:
            self._created(key, file)

    def download(self, key: str, path: Path) -> None:
        """Copies an object to a local file (temporary name, then rename), making its folder if need be.

        `path` is whole or absent, whatever happens to this process. It is not forced to the disk: after a power failure
        it may be damaged, and can be fetched again.
        """
        self._attempt(self._download, validated_key(key), path)

    def open(self, key: str) -> BinaryIO:
        """A seekable stream over an object, for archives that are too large to hold or copy.

        Each read is tried again at its position; all are of the version that was there at the beginning.
        """
        return self._attempt(self._open, validated_key(key))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects below the folder `prefix`, recursively, in key order; never from a cache.

        A prefix under which nothing lies gives an empty listing, not an error; a missing bucket is an error. Hidden
        names (`.DS_Store`), folder markers and names with control characters are left out: they are no keys.
        """
        entries = self._attempt(self._list, folder_key(prefix))
        return iter(sorted((entry for entry in entries if is_key(entry.key)), key=lambda entry: entry.key))

    def folders(self, prefix: str = "") -> Sequence[str]:
        """Names of the immediate sub-folders of `prefix`, sorted; never from a cache."""
        return sorted(name for name in self._attempt(self._folders, folder_key(prefix)) if is_key(name))

    def delete(self, key: str) -> None:
        """Removes an object; one that is already gone is no error."""
        with suppress(ObjectMissingError):
            self._attempt(self._delete, validated_key(key))

    def exists(self, key: str) -> bool:
        """Whether an object has this key right now; does not read it."""
        with suppress(ObjectMissingError), self.open(key):
            return True
        return False

    def sweep(self) -> None:
        """Removes what killed writers left half-written and nobody can see.

        A bucket keeps nothing of the kind.
        """
        return

    def _attempt(self, work: Callable[..., T], key: str, *args: Any) -> T:
        """Does `work(key, *args)` with this store's patience, and tells what goes wrong as a `JobError`."""
        uri = self._uri(key).rstrip("/")

        def attempt() -> T:
            began = time.monotonic()
            # What the disk says is about the file on it, if one is up- or downloaded.
            with os_errors(next((arg for arg in args if isinstance(arg, Path)), uri)):
                try:
                    result = work(key, *args)
                    asked = work.__name__.strip("_")
                    detail(lambda: f"{asked} {uri}: {time.monotonic() - began:.3f} s")
                    return result
                except Exception as error:
                    if told := self._told(error, uri):
                        raise told from error
                    raise

        return self.retry(attempt)

    def _uri(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{key}"

    def _told(self, error: Exception, uri: str) -> JobError | None:
        """What a client's error about `uri` means, or None if it came from elsewhere, such as a local disk."""
        return None

    def _created(self, key: str, content: BinaryIO) -> str:
        version = self._attempt(self._written, validated_new_key(key), content, "")
        if version is None:
            raise ObjectExistsError(f"{self.uri_of(key)} exists already with other content: somebody else was first")
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
            # Whoever was first has deleted it since, such as an equal packer that is done.
            content.seek(0)
            return self._write(key, content, over)

    def _version_if_equal(self, key: str, content: BinaryIO) -> str | None:
        content.seek(0)
        equal: list[bool] = []
        version = self._fetch(key, lambda data: equal.append(content.read(len(data)) == data))
        return version if all(equal) and not content.read(1) else None

    def _read(self, key: str, most_bytes: int | None = None) -> Blob:
        content, most_bytes = io.BytesIO(), most_bytes or READ_BYTES

        def consume(data: bytes) -> None:
            if content.tell() + len(data) > most_bytes:
                raise BadDataError(f"{self.uri_of(key)} has more than {most_bytes:,} bytes: no such object is so large")
            content.write(data)

        version = self._fetch(key, consume)
        return Blob(content.getvalue(), version)

    def _download(self, key: str, path: Path) -> None:
        with temporary_beside(path) as (temporary, file):
            self._fetch(key, file.write)
            file.flush()
            temporary.replace(path)

    @abc.abstractmethod
    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        """Streams the content, verified, to `consume`; returns the version."""

    @abc.abstractmethod
    def _write(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        """Writes over this version, where nothing is if it is empty, or over anything if it is None.

        Returns the new version; None if something else is there.
        """

    @abc.abstractmethod
    def _open(self, key: str) -> BinaryIO: ...

    @abc.abstractmethod
    def _list(self, prefix: str) -> Sequence[Entry]:
        """The objects whose keys begin so, with their whole keys, in any order."""

    @abc.abstractmethod
    def _folders(self, prefix: str) -> Sequence[str]: ...

    @abc.abstractmethod
    def _delete(self, key: str) -> None: ...


def is_key(name: str) -> bool:
    """Whether `name` is a safe relative key: nothing empty, hidden or `..` in it, no backslash or control character."""
    return _KEY.fullmatch(name) is not None


def validated_key(key: str) -> str:
    """Returns `key` if it is a safe relative key.

    Raises:
        BadRequestError: it could lead outside the store, or is one that no listing shows.
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
    """What the keys below the folder `prefix` begin with; nothing for the store itself."""
    return f"{validated_key(prefix)}/" if prefix else ""
