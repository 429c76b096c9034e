"""LSUN's images (Yu et al. 2015) in LMDB: a B-tree of encoded images. Its keys do not name classes.

The tree is read page by page, and every number in it is checked. LMDB's own library maps the file into the memory and
believes what it finds there: a damaged file would end the process. The format is that of `mdb.c` in LMDB 0.9, as 64-bit
machines write it: two meta pages, branch pages, leaf pages, and overflow pages with the values that fit no leaf.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import BinaryIO, NamedTuple

from job.data import members
from job.data.formats.image_bytes import START_BYTES, suffix_of
from job.data.members import Files, Member, RefusedError, Source, first_split, read_exactly
from job.exits import BadRequestError

_FILE = re.compile(r"(?:.*/)?(?:data\.mdb|[^/]+\.lmdb)", re.IGNORECASE)
_FOLDER = re.compile(r"(?:^|/)data\.mdb$", re.IGNORECASE)

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_PAGE = struct.Struct("<QHHHH")
"""Its number, padding, its kind, and where its free space begins and ends."""
_META = struct.Struct("<IIQQ48s48sQQ")
"""Magic, version, address, size of the map, the free pages, the main tree, the last page, the transaction."""
_TREE = struct.Struct("<IHHQQQQQ")
"""Page size (of the free pages), flags, depth, pages of three kinds, entries, the root page."""
_NODE = struct.Struct("<HHHH")
"""Size of the value, or number of the child, in two or three parts; flags; size of the key."""
_IS_BRANCH, _IS_LEAF, _IS_OVERFLOW = 0x01, 0x02, 0x04
_IS_BIG = 0x01
_NO_PAGE = 2**64 - 1
_PAGE_SIZES = {1 << bits for bits in range(9, 17)}
_MOST_LEVELS = 32
_DAMAGED = "is damaged, or not LMDB of a 64-bit machine: get it again"


class _Entry(NamedTuple):
    """A key, and where its value lies in the file: on pages of its own from `overflow_page` on, unless that is 0."""

    key: bytes
    start: int
    size_bytes: int
    overflow_page: int


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
    folders = {name: _FOLDER.sub("", name) for name in names}
    suffixes = dict[str, str]()
    for name in names:
        with members.refusing(f"{files.where}/{name}"), closing(files.open(name)) as file:
            suffixes[name] = _suffix(_Tree(file))
    split, others = first_split(folders.values())
    return Source(files.place, partial(_members, files, folders, suffixes), split=split, other_splits=others)


def _suffix(tree: _Tree) -> str:
    """Returns the suffix of the first image."""
    first = next(tree.entries(), None)
    if first is None:
        raise RefusedError("holds no images")
    content = tree.read(first)
    if suffix := suffix_of(content[:START_BYTES]):
        return suffix
    raise RefusedError(
        f"has a value at its first key, {_text(first.key)}, and is not an image file such as a JPEG: write its images "
        "into a folder, and pack that (the package lmdb opens it)"
    )


def _members(files: Files, folders: Mapping[str, str], suffixes: Mapping[str, str]) -> Iterator[Member]:
    """Yields the images in the order of their keys."""
    for name, folder in folders.items():
        with closing(files.open(name)) as file:
            tree = _Tree(file)
            for entry in tree.entries():
                path = "/".join(filter(None, (folder, _text(entry.key) + suffixes[name])))
                yield Member(path, partial(tree.read, entry), size_bytes=entry.size_bytes)


def _text(key: bytes) -> str:
    return key.decode() if key.isascii() and key.decode().isprintable() else key.hex()


class _Tree:
    """The main tree of an LMDB file."""

    def __init__(self, file: BinaryIO) -> None:
        """Reads the meta pages; raises `RefusedError` if they are damaged."""
        self._file, self._size_bytes, self._page_bytes = file, file.seek(0, io.SEEK_END), 0
        # Two transactions take turns to write the two pages.
        metas = [self._meta(0), self._meta(1)]
        _, root, self._entries = max(metas)
        self._root = root

    def _meta(self, number: int) -> tuple[int, int, int]:
        """Returns the transaction of a meta page, the root of the tree and its number of entries."""
        self._file.seek(number * self._page_bytes + _PAGE.size)
        magic, version, _, _, free, main, _, transaction = _META.unpack(read_exactly(self._file, _META.size))
        page_bytes = _TREE.unpack(free)[0]
        if (magic, version) != (_MAGIC, _VERSION) or page_bytes not in _PAGE_SIZES:
            raise RefusedError(_DAMAGED)
        self._page_bytes = page_bytes
        _, flags, *_, entries, root = _TREE.unpack(main)
        if flags:
            raise RefusedError("sorts its keys in another way than LSUN: write its images into a folder, and pack that")
        return transaction, root, entries

    def entries(self) -> Iterator[_Entry]:
        """Yields all keys in order, without reading the values on pages of their own."""
        if self._root == _NO_PAGE:
            return
        stack, pages, count, last = [iter([self._root])], 0, 0, b""
        while stack:
            number = next(stack[-1], None)
            if number is None:
                stack.pop()
                continue
            page, is_leaf, nodes = self._page(number)
            pages += 1
            # A forged tree could lead back to its root.
            if len(stack) > _MOST_LEVELS or pages * self._page_bytes > self._size_bytes:
                raise RefusedError(_DAMAGED)
            if not is_leaf:
                stack.append(iter([_child(page, node) for node in nodes]))
                continue
            for node in nodes:
                entry = self._entry(number, page, node)
                if count and entry.key <= last:
                    raise RefusedError(_DAMAGED)
                count, last = count + 1, entry.key
                yield entry
        if count != self._entries:
            raise RefusedError(f"has {count:,} of {self._entries:,} images: get it again")

    def _page(self, number: int) -> tuple[bytes, bool, tuple[int, ...]]:
        """Returns a branch or a leaf, whether it is a leaf, and where its nodes lie in it."""
        if not 2 <= number < self._size_bytes // self._page_bytes:
            raise RefusedError(_DAMAGED)
        self._file.seek(number * self._page_bytes)
        page = read_exactly(self._file, self._page_bytes)
        its_number, _, kind, lower, _ = _PAGE.unpack_from(page)
        if its_number != number or kind not in (_IS_BRANCH, _IS_LEAF) or not _PAGE.size <= lower <= len(page):
            raise RefusedError(_DAMAGED)
        return page, kind == _IS_LEAF, struct.unpack_from(f"<{(lower - _PAGE.size) // 2}H", page, _PAGE.size)

    def _entry(self, number: int, page: bytes, node: int) -> _Entry:
        low, high, flags, key_bytes = _NODE.unpack_from(page, node)
        start, size_bytes = node + _NODE.size + key_bytes, low | high << 16
        if flags not in (0, _IS_BIG):
            raise RefusedError("holds several databases, or several values of a key: write its images into a folder")
        overflow_page: int = struct.unpack_from("<Q", page, start)[0] if flags else 0
        at = overflow_page * self._page_bytes + _PAGE.size if flags else number * self._page_bytes + start
        end = self._size_bytes if flags else (number + 1) * self._page_bytes
        if start > len(page) or at + size_bytes > end or bool(flags) != (overflow_page > 1):
            raise RefusedError(_DAMAGED)
        return _Entry(page[node + _NODE.size : start], at, size_bytes, overflow_page)

    def read(self, entry: _Entry) -> bytes:
        """Returns the value of an entry."""
        if entry.overflow_page:
            self._file.seek(entry.start - _PAGE.size)
            number, _, kind, _, _ = _PAGE.unpack(read_exactly(self._file, _PAGE.size))
            if (number, kind) != (entry.overflow_page, _IS_OVERFLOW):
                raise RefusedError(_DAMAGED)
        self._file.seek(entry.start)
        return read_exactly(self._file, entry.size_bytes)


def _child(page: bytes, node: int) -> int:
    low, high, highest, _ = _NODE.unpack_from(page, node)
    return low | high << 16 | highest << 32
