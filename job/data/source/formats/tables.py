"""Tables of images in files of many rows: Parquet and Arrow, as Hugging Face's `datasets` writes them.

A first pass over a file reads the number of its rows and their labels. An image is read when it is asked for: row by
row, from the group of rows that holds it. A local Arrow file is mapped into memory, so that labels are read without the
images between them. Any other is read from its beginning to its end for the labels, and once more for the images.

`datasets` writes an image as a struct of its bytes and its path, and a class as a number whose names stand in the
schema, as JSON under the key `huggingface`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

from job.data.source import members
from job.data.source.labels import LABEL_KEYS, ImageColumn, chosen_label, class_names, label_among
from job.data.source.members import Files, Member, RefusedError, Source, path_parts, split_in
from job.exits import BadRequestError, needs_extra
from job.progress import some_of
from job.stop import in_order

_KINDS = {
    "Parquet": re.compile(r".*\.(parquet|parq|pq)", re.IGNORECASE),
    # `datasets` keeps results of `map` beside the data.
    "Arrow": re.compile(r"(?:.*/)?(?!cache-|tmp)[^/]*\.(arrow|feather)", re.IGNORECASE),
}
_SHARD = re.compile(r"(?P<stem>.*-)\d{5}-of-(?P<count>\d{5})(?P<suffix>\.(?:parquet|arrow))")
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
"""Usual columns of images: of `datasets`, and of img2dataset, whose Parquet files name the column by the codec."""
_LABELS = (*LABEL_KEYS, "labels", "fine_label", "class_label", "target", "category")

_READERS = 16
"""Number of files elsewhere whose labels are read at a time."""
_BUFFER_BYTES = 8 << 20
"""Bytes that are read at a time of a large group."""
_LABELS_READ = 1 << 16
_ARROW_FILE = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def table_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of Parquet files, else of Arrow files."""
    found = ((kind, _tables_among(files, pattern)) for kind, pattern in _KINDS.items())
    kind, names = next((pair for pair in found if pair[1]), ("", []))
    if not names:
        return None
    where, open_table = files.place, partial(_opened, files, is_arrow=kind == "Arrow")
    with needs_extra("parquet", f"{where} is {kind}, which"):
        import pyarrow  # noqa: F401
    # Other splits may lack the labels.
    first = next((name for name in names if split_in(path_parts(name)) == "train"), names[0])
    with members.refusing(f"{files.where}/{first}"), _reading(), open_table(first) as table:
        columns = _columns_of(table.schema, where, column)
    rows_of = cache(partial(_rows, open_table, columns, files.where))

    def listed(split: str = "") -> Iterator[Member]:
        chosen = [name for name in names if split in ("", split_in(path_parts(name)))]
        with ThreadPoolExecutor(_READERS) as pool:
            read = map(rows_of, chosen) if files.folder else in_order(pool, rows_of, chosen, 2 * _READERS)
            for name, rows in zip(chosen, read, strict=True):
                yield from _members(name, open_table, columns, rows)

    return Source(
        where,
        listed,
        listed_in=listed,
        classes=columns.classes,
        note="; ".join(_remarks(names)) if not files.chosen else "",
        unchosen=columns.unchosen,
    ).split_by(names)


def _tables_among(files: Files, pattern: re.Pattern[str]) -> list[str]:
    """Returns the names that a pattern matches, but for hidden ones and the tables that describe a tar beside them."""
    names = [name for name in files.matching(pattern) if not members.is_hidden(name)]
    # img2dataset writes these tables, without images.
    return [name for name in names if files.chosen or f"{name.rpartition('.')[0]}.tar" not in files.names]


def has_shards(names: Iterable[str]) -> bool:
    """Returns whether files are the shards of a table by their names, such as `train-00000-of-00002.parquet`."""
    return any(map(_SHARD.fullmatch, names))


class _Rows(NamedTuple):
    """The rows of a file: of each group their number and the mean size of one; the label of each row, if it has any."""

    groups: list[tuple[int, int]]
    labels: list[str]


def _rows(open_table: _Opener, columns: _Columns, where: str, name: str) -> _Rows:
    """Counts the rows of a file, and reads their labels."""
    import pyarrow as pa

    found, texts = _Rows([], []), dict[str, str]()
    with members.refusing(f"{where}/{name}"), _reading(), open_table(name) as table:
        label = columns.of_file(table.schema).label
        for group in table.groups():
            found.groups.append((group.rows, group.size_bytes // max(1, group.rows)))
            if label:
                # A dictionary of one long text could stand for any number of rows.
                at_once = _LABELS_READ if pa.types.is_primitive(table.schema.field(label).type) else 1
                before = len(found.labels)
                for values in group.values(label, at_once):
                    read = (label_among(columns.classes, value.as_py(), label) for value in values)
                    found.labels.extend(texts.setdefault(text, text) for text in read)
                if (there := len(found.labels) - before) != group.rows:
                    raise _promises(group.rows, there)
    return found


def _promises(promised: int, there: int) -> RefusedError:
    return RefusedError(f"promises {promised:,} rows in a group, and has {there:,}: it is damaged, get it again")


def _members(name: str, open_table: _Opener, columns: _Columns, rows: _Rows) -> Iterator[Member]:
    number = 0
    with ExitStack() as stack:
        groups = enumerate(_images_by_group(lambda: stack.enter_context(open_table(name)), columns))
        for group, (count, size_bytes) in enumerate(rows.groups):
            images = enumerate(_images_of(groups, group))
            for row in range(count):
                label = rows.labels[number] if rows.labels else ""
                read = partial(_file, images, row, count)
                # The content decides how it is decoded: the suffix says no more than that it is an image.
                yield Member(f"{name}/{number:07d}.png", read, size_bytes=size_bytes, label=label)
                number += 1


def _images_by_group(open_table: Callable[[], _Table], columns: _Columns) -> Iterator[Iterator[Any]]:
    """Opens the table when the first group is wanted, and yields the images of each."""
    table = open_table()
    columns.of_file(table.schema)
    for group in table.groups():
        # One row at a time: a dictionary of one image could stand for any number of rows.
        yield (image for values in group.values(columns.image, 1) for image in columns.images_in(values))


def _images_of(groups: Iterator[tuple[int, Iterator[Any]]], group: int) -> Iterator[Any]:
    """Goes on to a group when its first image is wanted."""
    yield from next((images for number, images in groups if number == group), ())


def _file(images: Iterator[tuple[int, Any]], row: int, promised: int) -> bytes:
    """Goes on to an image of a group of so many rows, and returns it as a file; empty for a row without one."""
    with _reading():
        for number, image in images:
            if number == row:
                content = image.as_buffer()
                members.check_size(content.size if content is not None else 0)
                return content.to_pybytes() if content is not None else b""
        raise _promises(promised, row)


class _RowGroup(NamedTuple):
    """Rows that are read together: a row group of Parquet, or a record batch of Arrow.

    Attributes:
        rows: number of rows.
        size_bytes: their size in memory; it changes with their content.
        values: yields the values of a column as arrays of `pyarrow`, of at most so many rows in Parquet.
    """

    rows: int
    size_bytes: int
    values: Callable[[str, int], Iterator[Any]]


class _Table(NamedTuple):
    """An open file: its `pyarrow.Schema`, and its groups from the first one on."""

    schema: Any
    groups: Callable[[], Iterator[_RowGroup]]


_Opener = Callable[[str], AbstractContextManager[_Table]]


@contextmanager
def _opened(files: Files, name: str, *, is_arrow: bool) -> Iterator[_Table]:
    """Opens a file. Raises `RefusedError`, and errors of `pyarrow`."""
    import pyarrow as pa

    if files.folder is None:
        content = files.open(name)
        # A label is a few bytes between megabytes of images.
        if read_ahead := getattr(content, "read_ahead", None):
            read_ahead(0)
        file = pa.PythonFile(content, "r")
    else:
        file = (pa.memory_map if is_arrow else pa.OSFile)(str(files.folder / name))
    with file:
        yield _arrow(file) if is_arrow else _parquet(file, _BUFFER_BYTES * (1 if files.folder else 4))


def _parquet(file: Any, buffer_bytes: int) -> _Table:
    """Reads the footer of a Parquet file."""
    from pyarrow import parquet

    # A buffer instead of whole chunks: these may have any size.
    opened = parquet.ParquetFile(file, buffer_size=buffer_bytes, pre_buffer=False, page_checksum_verification=True)
    about = opened.metadata
    rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != about.num_rows or about.num_rows > file.size():
        there = f"{sum(rows):,} rows in its groups, in {file.size():,} bytes"
        raise RefusedError(f"promises {about.num_rows:,} rows, and has {there}: it is damaged, get it again")

    def values(group: int, column: str, rows: int) -> Iterator[Any]:
        for batch in opened.iter_batches(rows, [group], [column], use_threads=False):
            batch.validate(full=True)
            yield batch.column(0)

    def groups() -> Iterator[_RowGroup]:
        for number in range(about.num_row_groups):
            # Nothing is asked about its columns: of a damaged footer pyarrow would end this process.
            group = about.row_group(number)
            yield _RowGroup(group.num_rows, max(0, group.total_byte_size), partial(values, number))

    return _Table(opened.schema_arrow, groups)


def _arrow(file: Any) -> _Table:
    """Reads the schema of an Arrow file: a stream, or a file with a footer."""
    import pyarrow as pa

    is_stream = file.read(len(_ARROW_FILE)) != _ARROW_FILE
    # A stream may end behind any batch.
    if is_stream and file.size() >= len(_END_OF_STREAM):
        file.seek(file.size() - len(_END_OF_STREAM))
        if file.read() != _END_OF_STREAM:
            raise RefusedError("is truncated, or no Arrow file: its end is missing: get it again")

    def reader() -> Any:
        file.seek(0)
        options = pa.ipc.IpcReadOptions(use_threads=False)
        return (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(file, options=options)

    def values(batch: Any, column: str, _: int) -> Iterator[Any]:
        found = batch.column(column)
        found.validate(full=True)
        yield found

    def groups() -> Iterator[_RowGroup]:
        opened = reader()
        for batch in opened if is_stream else map(opened.get_batch, range(opened.num_record_batches)):
            # Of lengths that contradict each other pyarrow would end this process.
            batch.validate()
            yield _RowGroup(batch.num_rows, batch.nbytes, partial(values, batch))

    return _Table(reader().schema, groups)


@contextmanager
def _reading() -> Iterator[None]:
    """Turns the errors that `pyarrow` raises for a damaged file into one that `members.refusing` knows."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, LookupError, TypeError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


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


@dataclass(frozen=True)
class _Columns:
    """The chosen columns of a table.

    Attributes:
        image: the column of images.
        label: the column of labels; empty for none.
        classes: the names of the classes in the order of their numbers, if the schema has them.
        unchosen: without a label, the words of `--labels` for each column that could be one.
    """

    image: str
    label: str = ""
    classes: tuple[str, ...] = ()
    unchosen: tuple[str, ...] = ()

    def of_file(self, schema: Any) -> _Columns:
        """Returns the same columns of another file's `pyarrow.Schema`, which may lack the labels.

        Raises:
            RefusedError: the file has other features.
        """
        features = _features(schema)
        if self.image not in _image_columns(schema, features):
            raise RefusedError(f"lacks the column {self.image!r} of images of other files: name the files of one set")
        if not self.label or self.label not in schema.names:
            return replace(self, label="", classes=())
        if _classes(features.get(self.label, {})) != self.classes:
            raise RefusedError(f"has other classes in the column {self.label!r} than others: name the files of one set")
        return self

    def images_in(self, values: Any) -> Any:
        """Returns the encoded images, as a `pyarrow.Array` of bytes, of values of the column of images."""
        import pyarrow as pa

        # Unlike `field`, `flatten` knows of rows whose whole struct is null.
        return values.flatten()[values.type.get_field_index("bytes")] if pa.types.is_struct(values.type) else values


def _columns_of(schema: Any, where: str, column: str | None) -> _Columns:
    """Chooses the columns of a `pyarrow.Schema`.

    Args:
        schema: of the table.
        where: the source, for messages.
        column: the label that a person chose; empty for the usual one, None for none.

    Raises:
        BadRequestError: there are several images or labels to choose from, or the chosen label is missing.
        RefusedError: the table lacks images.
    """
    if len(set(schema.names)) < len(schema.names):
        raise RefusedError("has several columns of one name: rename them")
    features = _features(schema)
    images = _image_columns(schema, features)
    if not images:
        said = f"is a table without a column of images, and has {some_of(schema.names)}. A row has one encoded image"
        raise RefusedError(f"{said}, and no pixels as numbers or lists: write it by `datasets`, as the feature Image")
    usual = [name for name in sorted(images, key=str.lower) if name.lower() in _IMAGES] or images
    if isinstance(column, ImageColumn):
        if column not in images:
            raise BadRequestError(f"{where} has no images {column!r}, but {some_of(images)}: use --condition :COLUMN")
        return _Columns(column)
    if len(usual) > 1:
        raise BadRequestError(f"{where} has several columns of images: {some_of(images)}: write it with one of them")
    if column is None:
        return _Columns(usual[0])
    possible = [field.name for field in schema if _can_be_label(field.type)]
    named = [name for name in possible if features.get(name, {}).get("_type") == "ClassLabel"]
    named = named or [name for name in possible if name.lower() in _LABELS]
    label = chosen_label(where, possible if column else named, column, usual=()) if named or column else ""
    unchosen = () if label else tuple(f":{name}" for name in possible)
    return _Columns(usual[0], label, _classes(features.get(label, {})), unchosen)


def _features(schema: Any) -> Mapping[str, Any]:
    """Returns the features that `datasets` has written into the schema, by column; empty without them."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature if isinstance(feature, dict) else {} for name, feature in found.items()}
    # Too many brackets are a RecursionError.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _image_columns(schema: Any, features: Mapping[str, Any]) -> list[str]:
    """Returns the columns that may hold images: structs with a field `bytes`, else plain bytes."""
    import pyarrow as pa

    structs, plain = list[str](), list[str]()
    for field in schema:
        is_struct = pa.types.is_struct(field.type)
        kind = next((one.type for one in field.type if one.name == "bytes"), pa.null()) if is_struct else field.type
        is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
        # A sound or a video is a struct of bytes, too.
        if is_bytes and features.get(field.name, {}).get("_type", "Image") in ("Image", "Value"):
            (structs if is_struct else plain).append(field.name)
    return structs or plain


def _can_be_label(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _classes(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of a `ClassLabel`."""
    names = feature.get("names")
    return class_names(names) if feature.get("_type") == "ClassLabel" and isinstance(names, list) else ()
