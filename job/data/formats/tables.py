"""Tables of images in files of many rows: Parquet and Arrow, as Hugging Face's `datasets` writes them.

A first pass over a file reads the number of its rows and their labels, which are kept as numbers. An image is read when
it is asked for: row by row, from the group of rows that holds it.
"""

from __future__ import annotations

import io
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, Protocol

from job.data import members
from job.data.ahead import in_order
from job.data.formats.columns import Columns, columns_of
from job.data.members import Files, Member, RefusedError, Source, first_split, path_parts, refused, split_in
from job.exits import BadRequestError, how_to_install

_READERS = 16
"""Number of files elsewhere whose labels are read at a time."""
_MOST_READ_BYTES = 1 << 30
_BUFFER_BYTES = 8 << 20
"""Bytes that are read at a time of a large group."""
_SHARD = re.compile(r"(?P<stem>.*-)\d{5}-of-(?P<count>\d{5})(?P<suffix>\.(?:parquet|arrow))")
_REASON_CHARACTERS = 160


class Group(NamedTuple):
    """Rows that are read together.

    Attributes:
        rows: number of rows.
        size_bytes: their size in memory; it changes with their content.
        labels: the labels of the rows in order, empty for none; None without such a column.
    """

    rows: int
    size_bytes: int
    labels: list[str] | None


class Table(Protocol):
    """An open file of rows in groups."""

    schema: Any

    def groups(self, columns: Columns) -> Iterator[Group]:
        """Yields the groups in order; reads the labels, and no images."""

    def images(self, columns: Columns, group: int) -> Iterator[Any]:
        """Yields the images of a group in order, as scalars of `pyarrow`, and reads them as it goes."""

    def close(self) -> None:
        """Closes the file."""


class BoundedFile:
    """A file of which `pyarrow` reads what it needs, and no more than there is, whatever a header says."""

    def __init__(self, file: BinaryIO) -> None:
        """Takes over an open file."""
        self.buffer_bytes = _BUFFER_BYTES
        # A label is a few bytes between megabytes of images, and what is fetched at once comes by several connections.
        if read_ahead := getattr(file, "read_ahead", None):
            read_ahead(0)
            self.buffer_bytes *= 4
        self.size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._file, self.seek, self.tell, self.close = file, file.seek, file.tell, file.close

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._file.closed

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes; raises `RefusedError` for more than memory should hold."""
        rest = max(0, self.size_bytes - self.tell())
        size = rest if size < 0 else min(size, rest)
        if size > _MOST_READ_BYTES:
            raise RefusedError(f"has {size:,} bytes in one block, more than {_MOST_READ_BYTES:,}: write smaller groups")
        return self._file.read(size)


def table_source(
    files: Files, names: Sequence[str], kind: str, open_table: Callable[[str], Table], column: str | None
) -> Source:
    """Returns the images of tables.

    Args:
        files: the files of the place.
        names: those that are tables, in order.
        kind: the name of the format.
        open_table: opens one of them.
        column: see `recognised`.

    Raises:
        BadDataError: a table is damaged, or has no images.
        BadRequestError: there are several columns to choose from, or `pyarrow` is missing.
    """
    where = files.place
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        how = how_to_install("parquet")
        raise BadRequestError(f"{where} is {kind}, which needs pyarrow: {how}") from None
    # Other splits may lack the labels.
    first = next((name for name in names if split_in(path_parts(name)) == "train"), names[0])
    with members.refusing(where), reading("" if files.chosen else first), closing(open_table(first)) as table:
        columns = columns_of(table.schema, where, column)
    tables = _Tables(files, names, open_table, columns)
    split, others = first_split(names)
    return Source(
        where,
        tables.members,
        listed_in=tables.members,
        classes=columns.classes,
        note="; ".join(_remarks(names)) if not files.chosen else "",
        split=split,
        other_splits=others,
        unchosen=columns.unchosen,
    )


def tables_among(files: Files, pattern: re.Pattern[str]) -> list[str]:
    """Returns the names that a pattern matches, but for hidden ones and the tables that describe a tar beside them."""
    names = [name for name in files.matching(pattern) if not members.is_hidden(name)]
    if files.chosen:
        return names
    # img2dataset writes them, without images.
    return [name for name in names if f"{name.rpartition('.')[0]}.tar" not in files.names]


def has_shards(names: Iterable[str]) -> bool:
    """Returns whether files are the shards of a table by their names, such as `train-00000-of-00002.parquet`."""
    return any(map(_SHARD.fullmatch, names))


@contextmanager
def reading(name: str = "") -> Iterator[None]:
    """Turns the errors that `pyarrow` raises for a damaged file into one, which names the file if it has a name.

    Raises:
        RefusedError: it is damaged, encrypted or refused.
    """
    import pyarrow as pa

    try:
        yield
    except RefusedError as error:
        raise _refused(name, str(error)) from None
    except (pa.ArrowException, ValueError, LookupError, TypeError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split())[:_REASON_CHARACTERS] or type(error).__name__
        if "crypt" in reason.lower():
            raise _refused(name, "is encrypted: decrypt it, and pack the copy") from None
        raise _refused(name, f"is truncated or damaged ({reason}): get it again") from None


def _refused(name: str, problem: str) -> RefusedError:
    return refused(name, problem) if name else RefusedError(problem)


class _Rows(NamedTuple):
    """The rows of a file: of each group their number and the mean size of one; of each row its label's number."""

    groups: list[tuple[int, int]]
    texts: list[str]
    labels: array[int] | None


class _Tables:
    """Tables with the same columns, and what is known of their rows."""

    def __init__(
        self, files: Files, names: Sequence[str], open_table: Callable[[str], Table], columns: Columns
    ) -> None:
        self._names, self._open, self._columns = names, open_table, columns
        self._is_one, self._readers = bool(files.chosen), 0 if files.folder else _READERS
        self._known = dict[str, _Rows]()

    def members(self, split: str = "") -> Iterator[Member]:
        """Yields the rows of all tables, or of those of one split."""
        names = [name for name in self._names if split in ("", split_in(path_parts(name)))]
        for name, rows in zip(names, self._scanned(names), strict=True):
            yield from self._members(name, rows)

    def _scanned(self, names: Sequence[str]) -> Iterator[_Rows]:
        if not self._readers or self._known.keys() >= set(names):
            yield from map(self._rows, names)
            return
        with ThreadPoolExecutor(self._readers) as pool:
            yield from in_order(pool, self._rows, names, 2 * self._readers)

    def _members(self, name: str, rows: _Rows) -> Iterator[Member]:
        number = 0
        with closing(_Images(partial(self._open, name), self._columns, rows)) as images:
            for group, (count, size_bytes) in enumerate(rows.groups):
                for row in range(count):
                    label = rows.texts[rows.labels[number]] if rows.labels is not None else ""
                    # The content decides how it is decoded: the suffix says no more than that it is an image.
                    yield Member(f"{name}/{number:07d}.png", partial(images.read, group, row), -1, size_bytes, label)
                    number += 1

    def _rows(self, name: str) -> _Rows:
        if found := self._known.get(name):
            return found
        groups, texts, labels = list[tuple[int, int]](), dict[str, int](), array("i")
        with reading("" if self._is_one else name), closing(self._open(name)) as table:
            columns = self._columns.of_file(table.schema)
            for group in table.groups(columns):
                groups.append((group.rows, group.size_bytes // max(1, group.rows)))
                for text in group.labels or ():
                    labels.append(texts.setdefault(text, len(texts)))
                if group.labels is not None and len(group.labels) != group.rows:
                    raise _promised(group.rows, len(group.labels))
        found = _Rows(groups, list(texts), labels if columns.label else None)
        self._known[name] = found
        return found


class _Images:
    """The images of one table, which is open from the first of them on."""

    def __init__(self, open_table: Callable[[], Table], columns: Columns, rows: _Rows) -> None:
        self._open, self._columns, self._rows = open_table, columns, rows
        self._table: Table | None = None
        self._images: Iterator[Any] = iter(())
        self._group, self._next = -1, 0

    def read(self, group: int, row: int) -> bytes:
        """Returns an image as a file; empty for a row without one."""
        with reading():
            if self._table is None:
                self._table = self._open()
                self._columns.of_file(self._table.schema)
            if group != self._group or row < self._next:
                self._images, self._group, self._next = self._table.images(self._columns, group), group, 0
            for image in islice(self._images, row - self._next, None):
                self._next = row + 1
                content = image.as_buffer()
                if content is None and row == 0:
                    self._check_any(self._table, group)
                members.check_size(content.size if content is not None else 0)
                return content.to_pybytes() if content is not None else b""
            raise _promised(self._rows.groups[group][0], row)

    def _check_any(self, table: Table, group: int) -> None:
        """Raises `RefusedError` if no row of a group has an image."""
        if all(image.as_buffer() is None for image in table.images(self._columns, group)):
            raise RefusedError(
                "has no bytes, but at most a path: write the table by datasets' to_parquet, which reads it"
            )

    def close(self) -> None:
        """Closes the table."""
        if self._table is not None:
            self._table.close()


def _promised(promised: int, there: int) -> RefusedError:
    return RefusedError(f"promises {promised:,} rows in a group, and has {there:,}: it is damaged, get it again")


def _remarks(names: Sequence[str]) -> Iterator[str]:
    """Yields what a person may have overlooked among the files."""
    shards = Counter(match.group("stem", "count", "suffix") for name in names if (match := _SHARD.fullmatch(name)))
    for (stem, count, suffix), there in shards.items():
        if there != int(count):
            yield f"{there:,} of the {int(count):,} files {stem}*-of-{count}{suffix} are there: get the others"
    folders = {name.rpartition("/")[0] for name in names}
    kinds = {"/".join(part for part in folder.split("/") if not split_in([part])) for folder in folders}
    if len(kinds) > 1:
        shown = ", ".join(kind or "." for kind in sorted(kinds)[:3]) + ", …" * (len(kinds) > 3)
        yield f"tables of {len(kinds):,} folders ({shown}) are packed together: name one of them to pack it alone"
