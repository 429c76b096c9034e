"""What the pipeline asks of a bucket, said once for gs:// and local folders alike.

A bucket is not a file system: objects appear whole or not at all, nothing is appended to or renamed, a listing is not a
lock. Every operation here is one that all backends can do atomically on a single object.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from job.exits import BadRequestError, JobError, MissingInputError

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
    `NoPermissionError` (77), `DiskFullError` (74), and `BucketAwayError` (69) after bounded retries; each message
    names the object's URI and what to do. A local folder is made with its first object: until then it holds no objects,
    and listing it is an error, for it may be a misspelt one.
    """

    uri: str
    """`gs://bucket/prefix` or an absolute local path; no trailing slash. `open_store(uri)` gives an equal store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") or "/"

    def uri_of(self, key: str) -> str:
        """The URI a person or another tool can use for `key`."""
        return f"{self.uri.rstrip('/')}/{validated_key(key)}"

    @abc.abstractmethod
    def sub(self, prefix: str) -> Store:
        """The store of everything below `prefix`, sharing this one's connections."""

    @abc.abstractmethod
    def read(self, key: str) -> Blob:
        """The whole object and its version. For small objects: it is held in memory."""

    @abc.abstractmethod
    def create(self, key: str, data: bytes) -> str:
        """Writes an object that must not exist yet, atomically, and returns its version.

        A retry after a lost response finds the object it wrote itself, so a conflict with byte-identical content
        counts as success: put something unique (an attempt id) into objects that decide a race.

        Raises:
            ObjectExistsError: an object with other content has this key.
        """

    @abc.abstractmethod
    def replace(self, key: str, data: bytes, version: str) -> str:
        """Writes over exactly `version` of an object (compare-and-swap) and returns the new version.

        As in `create`, a conflict in which the object already holds `data` counts as success.

        Raises:
            ConflictError: the object is gone or has another version.
        """

    @abc.abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Writes an object whatever was there before, atomically. Only for hints, status and reports."""

    @abc.abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Copies a finished local file to a fresh key, verified by crc32c end to end.

        The object appears whole or not at all, also when this process dies half-way. As in `create`, a conflict with
        an object of the same size and crc32c counts as success, so that whoever died after an upload can repeat it.

        Raises:
            ObjectExistsError: an object with other content has this key.
        """

    @abc.abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copies an object to a local file (temporary name, then rename), making its folder if need be.

        `path` is whole or absent, whatever happens to this process. It is not forced to the disk: after a power failure
        it may be damaged, and can be fetched again.
        """

    @abc.abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A seekable stream over an object, for archives that are too large to hold or copy."""

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects below the folder `prefix`, recursively, in key order; never from a cache.

        A prefix under which nothing lies gives an empty listing, not an error; a missing bucket is an error. Hidden
        names (`.DS_Store`), folder markers and names with control characters are left out: they are no keys.
        """

    @abc.abstractmethod
    def folders(self, prefix: str = "") -> Sequence[str]:
        """Names of the immediate sub-folders of `prefix`, sorted; never from a cache."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; one that is already gone is no error."""

    @abc.abstractmethod
    def exists(self, key: str) -> bool:
        """Whether an object has this key right now; does not read it."""

    def sweep(self) -> None:
        """Removes what killed writers left half-written and nobody can see.

        A bucket does so by itself, where a rule of its lifecycle ends multipart uploads.
        """
        return


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
        raise BadRequestError(
            f"{key!r} cannot be a new object's key: use letters, digits, '.', '_', '=', '+', '-' between single slashes"
        )
    return key


def folder_key(prefix: str) -> str:
    """What the keys below the folder `prefix` begin with; nothing for the store itself."""
    return f"{validated_key(prefix)}/" if prefix else ""
