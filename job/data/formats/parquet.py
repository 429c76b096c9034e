"""Parquet files of images, of which `pyarrow` reads the footer, the labels, and the groups whose images are needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from job.data.formats.columns import Columns, is_text
from job.data.formats.tables import BoundedFile, Group, Table, table_source, tables_among
from job.data.members import Files, RefusedError, Source

_NAME = re.compile(r".*\.(parquet|parq|pq)", re.IGNORECASE)
_LABELS_READ = 1 << 16


def parquet_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of Parquet files."""
    names = tables_among(files, _NAME)
    return table_source(files, names, "Parquet", partial(_opened, files), column) if names else None


def _opened(files: Files, name: str) -> Table:
    return _ParquetTable(BoundedFile(files.open(name)))


class _ParquetTable:
    """An open Parquet file; see `Table`."""

    def __init__(self, file: BoundedFile) -> None:
        """Reads the footer. Raises `RefusedError` for more rows than bytes, and errors of `pyarrow`."""
        from pyarrow import parquet

        self._file = file
        try:
            # A buffer instead of whole chunks: these may have any size.
            self._parquet: Any = parquet.ParquetFile(
                file, buffer_size=file.buffer_bytes, pre_buffer=False, page_checksum_verification=True
            )
            self.schema, about = self._parquet.schema_arrow, self._parquet.metadata
            rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            if min(rows, default=0) < 0 or sum(rows) != about.num_rows or about.num_rows > file.size_bytes:
                there = f"{sum(rows):,} rows in its groups, in {file.size_bytes:,} bytes"
                raise RefusedError(f"promises {about.num_rows:,} rows, and has {there}: it is damaged, get it again")
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def groups(self, columns: Columns) -> Iterator[Group]:
        """Yields the groups; see `Table`."""
        about = self._parquet.metadata
        for number in range(about.num_row_groups):
            # Nothing is asked about its columns: of a damaged footer pyarrow would end this process.
            group = about.row_group(number)
            labels = list(self._labels(columns, number)) if columns.label else None
            yield Group(group.num_rows, max(0, group.total_byte_size), labels)

    def images(self, columns: Columns, group: int) -> Iterator[Any]:
        """Yields the images of a group; see `Table`."""
        # One row at a time: a dictionary of one image could stand for any number of rows.
        for values in self._batches(group, _path(columns), 1):
            yield from columns.images_in(values)

    def _labels(self, columns: Columns, group: int) -> Iterator[str]:
        # A dictionary of one long text could stand for any number of rows, too.
        rows = 1 if is_text(self.schema.field(columns.label).type) else _LABELS_READ
        for values in self._batches(group, columns.label, rows):
            yield from columns.label_texts(values)

    def _batches(self, group: int, path: str, rows: int) -> Iterator[Any]:
        """Yields the values of a column, a number of rows at a time."""
        read = self._parquet.iter_batches(batch_size=rows, row_groups=[group], columns=[path], use_threads=False)
        for batch in read:
            batch.validate(full=True)
            yield batch.column(0)


def _path(columns: Columns) -> str:
    return f"{columns.image}.bytes" if columns.in_struct else columns.image
