"""A bucket that is a folder on a local or network disk."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from job.exits import BadDataError, BadRequestError, BucketAwayError, MissingInputError
from job.store.base import Entry, ObjectMissingError, Store, is_key, validated_new_key
from job.store.files import COPY_BYTES, folder_lock, make_folder, os_errors, sweep_temporaries, sync, temporary_beside
from job.store.retry import Retry


class LocalStore(Store):
    """Objects are files below a root folder, except hidden files and links that lead out of the root.

    The first object creates the root; listing it earlier is an error. Versions are SHA-256 sums of the content, because
    inodes and times are not stable on every file system.
    """

    def __init__(self, root: Path, retry: Retry | None = None) -> None:
        """Opens the folder `root`, an absolute path."""
        self._root = root
        # The stores of sub-folders share it.
        self._inode: dict[str, int] = {}
        super().__init__(str(root), retry or Retry())

    @property
    def _folder(self) -> Path:
        return Path(self._root, self._prefix)

    def sweep(self) -> None:
        """Removes temporary files without a lock, and folders that are empty then."""
        with os_errors(self._folder):
            for folder, _, _ in os.walk(self._folder, topdown=False):
                sweep_temporaries(Path(folder))
                with suppress(OSError):
                    if folder != str(self._root):
                        Path(folder).rmdir()

    def move(self, path: Path, key: str, *, fresh: bool = False) -> None:
        """Makes the file the object itself, without a copy, if it lies on the same disk; else uploads it."""
        if self._attempt(self._linked, validated_new_key(key), path):
            path.unlink()
        else:
            super().move(path, key, fresh=fresh)

    def _linked(self, key: str, path: Path) -> bool:
        target = self._path(key)
        sync(path)
        # Another disk, one without links, an object that is there, or a folder that another process just removed.
        with suppress(OSError):
            make_folder(target.parent)
            target.hardlink_to(path)
            sync(target.parent)
            return True
        return False

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        # An object's file is never modified, so the bytes and the version belong together.
        with self._open(key) as file:
            return _copied(file, consume)

    def _write(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        path = self._path(key)
        # The temporary file would create the folder.
        if over and not path.exists():
            return None
        with temporary_beside(path) as (temporary, file):
            version = _copied(content, file.write)
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError, ObjectMissingError):
                if over == "":
                    path.hardlink_to(temporary)
                else:
                    with folder_lock(path.parent):
                        if over and self._read(key).version != over:
                            return None
                        temporary.replace(path)
                sync(path.parent)
                return version
            if path.exists() and not path.is_file():
                raise BadDataError(f"{path} is a folder or a pipe, where an object belongs: move it away")
        return None

    def _open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with os_errors(path):
            with suppress(FileNotFoundError, NotADirectoryError):
                # To open a pipe would wait for a writer, without end.
                if stat.S_ISREG(path.stat().st_mode):
                    return path.open("rb")
            raise ObjectMissingError(f"no object at {path}" if self._root.is_dir() else self._no_root())

    def _list(self, prefix: str) -> Sequence[Entry]:
        return list(self._walk(self._existing(prefix), prefix))

    def _folders(self, prefix: str) -> Sequence[str]:
        # A bucket has no folders without objects.
        return [
            child.name
            for child in _children(self._existing(prefix))
            if child.is_dir(follow_symlinks=False) and any(self._walk(Path(child.path), ""))
        ]

    def _delete(self, key: str) -> None:
        path = self._path(key)
        # FileLock finds its folder existing and then gone, if another process removes it just then.
        absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
        with suppress(*absent), folder_lock(path.parent):
            path.unlink()
        # A folder that is not empty stays, so a writer that has just begun does not lose it.
        with suppress(OSError):
            for folder in path.parents:
                if folder == self._root:
                    break
                folder.rmdir()

    def _path(self, key: str) -> Path:
        self._check_there()
        path = self._folder / key
        if not self._inside(path):
            raise BadRequestError(f"{path} leads out of {self._root} through a symbolic link: open its target instead")
        return path

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self._root))

    def _no_root(self) -> str:
        return f"{self._root} is not a folder: check the path; the first object creates it"

    def _check_there(self) -> None:
        """Raises `BucketAwayError` if the root is not the folder that was found first: it was removed or unmounted."""
        inode = self._root.stat().st_ino if self._root.is_dir() else None
        if inode != (self._inode.setdefault("root", inode) if inode else self._inode.get("root")):
            raise BucketAwayError(f"{self._root} is gone with all its objects: mount it again, or restore it")

    def _existing(self, prefix: str) -> Path:
        self._check_there()
        if not self._root.is_dir():
            raise MissingInputError(self._no_root())
        return self._path(prefix.removesuffix("/")) if prefix else self._folder

    def _walk(self, folder: Path, prefix: str) -> Iterator[Entry]:
        for child in _children(folder):
            if child.is_dir(follow_symlinks=False):
                yield from self._walk(Path(child.path), f"{prefix}{child.name}/")
            elif child.is_file() and (not child.is_symlink() or self._inside(Path(child.path))):
                with suppress(FileNotFoundError):
                    yield Entry(f"{prefix}{child.name}", child.stat().st_size)


def _children(folder: Path) -> Sequence[os.DirEntry[str]]:
    with os_errors(folder):
        try:
            with os.scandir(folder) as entries:
                return [entry for entry in entries if is_key(entry.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []


def _copied(content: BinaryIO, consume: Callable[[bytes], object]) -> str:
    """Passes the rest of a file to `consume`, and returns its version."""
    digest = hashlib.sha256()
    while block := content.read(COPY_BYTES):
        digest.update(block)
        consume(block)
    return digest.hexdigest()
