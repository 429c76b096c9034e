"""Parquet and Arrow files of images that tests make for themselves."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from job.data.source import open_source
from tests.job.some_images import png

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""The type of an image in the tables of `datasets`."""


def table(rows: int, labels: object = None, size: int = 16, **columns: object) -> pa.Table:
    """Rows with an image and a class, as `datasets` has them."""
    images = pa.array([{"bytes": png(number, size, size), "path": None} for number in range(rows)], IMAGE)
    kinds = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": kinds} | {name: {} for name in columns}
    labels = pa.array([number % 2 for number in range(rows)]) if labels is None else labels
    made = pa.table({"image": images, "label": labels, **columns})
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def parquet_bytes(content: pa.Table, **options: object) -> bytes:
    file = io.BytesIO()
    parquet.write_table(
        content, file, **{"row_group_size": 8, "use_dictionary": False, "compression": "none"} | options
    )
    return file.getvalue()


def arrow_bytes(content: pa.Table, new=pa.ipc.new_stream, rows: int = 8, **options: object) -> bytes:
    file = io.BytesIO()
    with new(file, content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=rows)
    return file.getvalue()


def labels_of(source: str | Path, column: str | None = "") -> list[str]:
    return [found.label for found in open_source(str(source), column=column).images(labelled=True)]


def contents_of(source: str | Path) -> list[bytes]:
    opened = open_source(str(source))
    return [content for _, content in opened.loaded(opened.images())]


def image_chunks(content: bytes) -> list[range]:
    """Where the images of each group of rows lie in a Parquet file."""
    about = parquet.ParquetFile(io.BytesIO(content)).metadata
    chunks = [about.row_group(number).column(0) for number in range(about.num_row_groups)]
    return [range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size) for chunk in chunks]
