"""Arrow files of images, which `save_to_disk` of Hugging Face's `datasets` writes: streams, or files with a footer.

A local one is mapped into memory, so that labels are read without the images between them. Any other is read from its
beginning to its end for the labels, and once more for the images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from job.data.formats.columns import Columns
from job.data.formats.tables import BoundedFile, Group, Table, table_source, tables_among
from job.data.members import Files, RefusedError, Source

# `datasets` keeps results of `map` beside the data.
_NAME = re.compile(r"(?:.*/)?(?!cache-|tmp)[^/]*\.(arrow|feather)", re.IGNORECASE)
_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def arrow_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of Arrow files."""
    names = tables_among(files, _NAME)
    return table_source(files, names, "Arrow", partial(_opened, files), column) if names else None


def _opened(files: Files, name: str) -> Table:
    import pyarrow as pa

    if files.folder:
        return _ArrowTable(pa.memory_map(str(files.folder / name)))
    return _ArrowTable(pa.PythonFile(BoundedFile(files.open(name)), "r"))


class _ArrowTable:
    """An open Arrow file; see `Table`. A group is a record batch."""

    def __init__(self, file: Any) -> None:
        """Reads the schema. Raises `RefusedError` for a truncated stream, and errors of `pyarrow`."""
        self._file = file
        try:
            self._is_stream = file.read(len(_FILE_MAGIC)) != _FILE_MAGIC
            # A stream may end behind any batch.
            if self._is_stream and file.size() >= len(_END_OF_STREAM):
                file.seek(file.size() - len(_END_OF_STREAM))
                if file.read() != _END_OF_STREAM:
                    raise RefusedError("is truncated, or no Arrow file: its end is missing: get it again")
            self.schema = self._reader(None).schema
            self._batches: Iterator[Any] = iter(())
            self._next = -1
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def groups(self, columns: Columns) -> Iterator[Group]:
        """Yields the groups; see `Table`."""
        for batch in self._read([columns.image, *filter(None, [columns.label])]):
            # Of lengths that contradict each other pyarrow would end this process.
            batch.validate()
            labels = None
            if columns.label:
                values = batch.column(columns.label)
                values.validate(full=True)
                labels = columns.label_texts(values)
            yield Group(batch.num_rows, batch.nbytes, labels)

    def images(self, columns: Columns, group: int) -> Iterator[Any]:
        """Yields the images of a group; see `Table`."""
        if self._next < 0 or group < self._next:
            self._batches, self._next = self._read([columns.image]), 0
        for batch in self._batches:
            self._next += 1
            if self._next > group:
                images = batch.column(columns.image)
                images.validate(full=True)
                yield from columns.images_in(images)
                return

    def _reader(self, fields: list[int] | None) -> Any:
        import pyarrow as pa

        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields)
        self._file.seek(0)
        return (pa.ipc.open_stream if self._is_stream else pa.ipc.open_file)(self._file, options=options)

    def _read(self, columns: list[str]) -> Iterator[Any]:
        """Yields all batches with these columns alone."""
        reader = self._reader(sorted(map(self.schema.get_field_index, columns)))
        if self._is_stream:
            yield from reader
        else:
            yield from map(reader.get_batch, range(reader.num_record_batches))
