"""A folder on a local or network disk that keeps the promises of a bucket."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from job.exits import BadDataError, BadRequestError, MissingInputError
from job.store.base import (
    Blob,
    ConflictError,
    Entry,
    ObjectExistsError,
    ObjectMissingError,
    Store,
    folder_key,
    is_key,
    validated_key,
    validated_new_key,
)
from job.store.files import (
    crc32c_of,
    folder_lock,
    os_errors,
    sweep_temporaries,
    sync_file,
    sync_folder,
    temporary_beside,
)


class LocalStore(Store):
    """Objects are files below a root folder; hidden names, and links that lead out of the root, are no objects.

    The root comes into being with its first object: until then nothing is found in it, and listing it is an error.
    Versions are SHA-256 sums of the content, because inodes and times are not stable on every file system.
    """

    def __init__(self, root: Path, prefix: str = "") -> None:
        """Opens the folder `root / prefix`, whose bucket is the absolute path `root`."""
        self._root = root
        self._folder = root / prefix
        super().__init__(str(self._folder))

    def sub(self, prefix: str) -> LocalStore:
        """A folder in the same bucket."""
        return LocalStore(self._root, str((self._folder / validated_key(prefix)).relative_to(self._root)))

    def read(self, key: str) -> Blob:
        """Reads one open file, which is never written again, so that bytes and version belong together."""
        with self._reading(key) as path, _opened(path) as file:
            data = file.read()
        return Blob(data, _version(data))

    def create(self, key: str, data: bytes) -> str:
        """Links a finished file into place: a link, unlike a rename, never takes the place of another."""
        path = self._path(validated_new_key(key))
        with os_errors(path), temporary_beside(path) as (temporary, file):
            file.write(data)
            sync_file(file)
            if not _linked(temporary, path) and not self._holds(key, data):
                raise ObjectExistsError(f"{path} exists already: somebody else was first")
        return _version(data)

    def replace(self, key: str, data: bytes, version: str) -> str:
        """Compares and renames under the folder's lock, which `put` and `delete` take as well."""
        path = self._path(key)
        try:
            with os_errors(path), folder_lock(path.parent):
                there = self.read(key)
                if there.data == data:
                    return there.version
                if there.version != version:
                    raise ConflictError(f"{path} has changed: somebody else wrote it")
                with temporary_beside(path) as (temporary, file):
                    file.write(data)
                    sync_file(file)
                    temporary.replace(path)
                    sync_folder(path.parent)
        except MissingInputError:
            raise ConflictError(f"{path} is gone: somebody else deleted it") from None
        return _version(data)

    def put(self, key: str, data: bytes) -> None:
        """Renames a finished file into place."""
        path = self._path(validated_new_key(key))
        with os_errors(path), temporary_beside(path) as (temporary, file):
            file.write(data)
            sync_file(file)
            with folder_lock(path.parent):
                temporary.replace(path)
            sync_folder(path.parent)

    def upload(self, path: Path, key: str) -> None:
        """Copies, reads the copy back, and links it into place."""
        target = self._path(validated_new_key(key))
        with os_errors(path):
            source = path.open("rb")
        with source, os_errors(target), temporary_beside(target) as (temporary, file):
            checksum = crc32c_of(source, copy_to=file)
            sync_file(file)
            file.seek(0)
            if crc32c_of(file) != checksum:
                raise BadDataError(f"{target}: the copy of {path} is damaged: check the disk")
            if not _linked(temporary, target) and not self._matches(key, file.tell(), checksum):
                raise ObjectExistsError(f"{target} exists already with other content: somebody else was first")

    def download(self, key: str, path: Path) -> None:
        """Copies, and renames the copy into place."""
        with self.open(key) as source, os_errors(path), temporary_beside(path) as (temporary, file):
            crc32c_of(source, copy_to=file)
            file.flush()
            temporary.replace(path)

    def open(self, key: str) -> BinaryIO:
        """Opens the file itself."""
        with self._reading(key) as path:
            return _opened(path)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Walks the folders; a file that vanishes on the way is left out."""
        if not self._root.is_dir():
            raise MissingInputError(self._no_root())
        return self._walk(self._path(prefix) if prefix else self._folder, folder_key(prefix))

    def folders(self, prefix: str = "") -> Sequence[str]:
        """The folders below which there is an object: an empty one is nothing to a bucket."""
        if not self._root.is_dir():
            raise MissingInputError(self._no_root())
        return sorted(
            child.name
            for child in self._children(self._path(prefix) if prefix else self._folder)
            if child.is_dir(follow_symlinks=False) and any(self._walk(Path(child.path), ""))
        )

    def delete(self, key: str) -> None:
        """Unlinks the file, and the folders that are empty without it."""
        path = self._path(key)
        absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        with os_errors(path), suppress(*absent), folder_lock(path.parent):
            path.unlink()
        # A folder with anything in it stays, and so does one that somebody begins to write to.
        with suppress(OSError):
            for folder in path.parents:
                if folder == self._root:
                    break
                folder.rmdir()

    def sweep(self) -> None:
        """Unlinks the temporary files that nobody has locked, and the folders that are empty without them."""
        with os_errors(self._folder):
            for folder, _, _ in os.walk(self._folder, topdown=False):
                sweep_temporaries(Path(folder))
                with suppress(OSError):
                    if folder != str(self._root):
                        Path(folder).rmdir()

    def exists(self, key: str) -> bool:
        """Looks at the file's kind alone."""
        path = self._path(key)
        with os_errors(path):
            return path.is_file()

    def _path(self, key: str) -> Path:
        path = self._folder / validated_key(key)
        if not self._inside(path):
            raise BadRequestError(f"{path} leads out of {self._root} through a symbolic link: open its target instead")
        return path

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self._root))

    @contextmanager
    def _reading(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        with os_errors(path):
            try:
                yield path
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                missing = f"no object at {path}" if self._root.is_dir() else self._no_root()
                raise ObjectMissingError(missing) from None

    def _no_root(self) -> str:
        return f"{self._root} is no folder: check the path; it is made when something is first written to it"

    def _holds(self, key: str, data: bytes) -> bool:
        with suppress(ObjectMissingError):
            return self.read(key).data == data
        return False

    def _matches(self, key: str, size_bytes: int, checksum: int) -> bool:
        with suppress(ObjectMissingError), self.open(key) as file:
            return os.fstat(file.fileno()).st_size == size_bytes and crc32c_of(file) == checksum
        return False

    def _children(self, folder: Path) -> Sequence[os.DirEntry[str]]:
        """What lies in `folder`, in the order in which a bucket would list it."""
        with os_errors(folder):
            try:
                with os.scandir(folder) as entries:
                    # A bucket compares whole keys, in which a folder's name goes on with a slash: a-b comes before a/b.
                    return sorted(
                        (entry for entry in entries if is_key(entry.name)),
                        key=lambda entry: f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name,
                    )
            except (FileNotFoundError, NotADirectoryError):
                return []

    def _walk(self, folder: Path, prefix: str) -> Iterator[Entry]:
        for child in self._children(folder):
            if child.is_dir(follow_symlinks=False):
                yield from self._walk(Path(child.path), f"{prefix}{child.name}/")
            elif child.is_file() and (not child.is_symlink() or self._inside(Path(child.path))):
                with suppress(FileNotFoundError):
                    yield Entry(f"{prefix}{child.name}", child.stat().st_size)


def _opened(path: Path) -> BinaryIO:
    """The file, which is a regular one: opening a pipe would wait for somebody to write into it, for good."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "is no regular file", str(path))
    return file


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _linked(temporary: Path, path: Path) -> bool:
    """Gives a finished file its name for good; False if the name is taken."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    sync_folder(path.parent)
    return True
