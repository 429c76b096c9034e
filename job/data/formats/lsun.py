"""LSUN's images (Yu et al. 2015) in LMDB: encoded images in the order of their keys, which do not name classes.

The package lmdb maps a file into the memory and believes what it finds there: a damaged file would end the process. So
its verifier, which reads the pages of the tree as bytes, checks the file first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from job.data import members
from job.data.formats.image_bytes import START_BYTES, suffix_of
from job.data.members import Files, Member, RefusedError, Source, first_split
from job.exits import BadRequestError, how_to_install

_FILE = re.compile(r"(?:.*/)?(?:data\.mdb|[^/]+\.lmdb)", re.IGNORECASE)
_FOLDER = re.compile(r"(?:^|/)data\.mdb$", re.IGNORECASE)
_OPEN = WeakValueDictionary[str, Any]()
"""The files that are open: lmdb opens one no more than once in a process."""


def lsun_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of a folder of LSUN, or of all such folders in one."""
    names = files.matching(_FILE)
    if not names:
        return None
    if files.folder is None:
        raise BadRequestError(
            f"{files.place} holds LMDB, whose images lie in no order: copy or unzip its folder to a disk, and pack that"
        )
    if column:
        raise BadRequestError(f"{files.place} has no label {column!r}, and no others: LMDB has keys and images alone")
    try:
        import lmdb  # noqa: F401
    except ModuleNotFoundError:
        raise BadRequestError(f"{files.place} is LMDB, which needs lmdb: {how_to_install('lsun')}") from None
    folders = {_FOLDER.sub("", name): str(files.folder / name) for name in names}
    suffixes = dict[str, str]()
    for name, (folder, path) in zip(names, folders.items(), strict=True):
        with members.refusing(f"{files.where}/{name}"):
            _verify(path)
            suffixes[folder] = _suffix(path)
    split, others = first_split(folders)
    return Source(files.place, partial(_members, folders, suffixes), split=split, other_splits=others)


def _verify(path: str) -> None:
    from lmdb.verify import VerifyError, verify

    try:
        # A reader uses no free pages: one that their list lacks is lost space, and no damage.
        problems = [problem for problem in verify(path) if "freeDB" not in problem]
    except VerifyError as error:
        problems = [str(error)]
    if problems:
        raise RefusedError(f"is damaged, or not LMDB of a 64-bit machine ({problems[0]}): get it again")


@contextmanager
def _reading(path: str) -> Iterator[Any]:
    """Yields a transaction of a verified file; its values are valid until it ends."""
    import lmdb

    try:
        if (environment := _OPEN.get(path)) is None:
            environment = _OPEN[path] = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False)
        with environment.begin(buffers=True) as transaction:
            yield transaction
    except lmdb.Error as error:
        raise RefusedError(f"cannot be read ({error}): get it again") from None


def _suffix(path: str) -> str:
    """Returns the suffix of the first image."""
    with _reading(path) as transaction:
        for key, value in transaction.cursor():
            if suffix := suffix_of(bytes(value[:START_BYTES])):
                return suffix
            raise RefusedError(
                f"has a value at its first key, {_text(bytes(key))}, and is not an image file such as a JPEG: write "
                "its images into a folder, and pack that (the package lmdb opens it)"
            )
    raise RefusedError("holds no images")


def _members(paths: Mapping[str, str], suffixes: Mapping[str, str]) -> Iterator[Member]:
    """Yields the images below each folder in the order of their keys."""
    for folder, path in paths.items():
        with _reading(path) as transaction:
            for key, value in transaction.cursor():
                name = "/".join(filter(None, (folder, _text(bytes(key)) + suffixes[folder])))
                yield Member(name, partial(_value, transaction, bytes(key)), size_bytes=len(value))


def _value(transaction: Any, key: bytes) -> bytes:
    value = transaction.get(key)
    members.check_size(len(value))
    return bytes(value)


def _text(key: bytes) -> str:
    return key.decode() if key.isascii() and key.decode().isprintable() else key.hex()
