"""The labels of images, by one rule for every format and every table.

A label is the name of a class, as text; an image without a class has an empty one. `label_of` says what a value of a
format stands for, `with_sidecars` which file beside an image labels it, and `LabelTable` which row of a table does. A
value, a file or a row that could mean two things is refused: a label is never guessed.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from job.data.source.members import Files, Member, RefusedError, is_hidden, is_image, path_parts, refused, refusing
from job.exits import BadRequestError, MissingInputError
from job.progress import printable, printable_label, some_of
from job.store import Retry, open_to_read, split_uri, without_queries

LABEL_KEYS = ("label", "cls", "class")
"""The names under which formats keep a label."""

_SAMPLE_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
"""The key of a WebDataset sample, the path up to the first dot of the file's name, and the rest of the name."""

_SIDECARS = (".cls", ".json")
_LONGEST, _MOST_FLOAT32 = 100, 3.4e38
_PAIR = ("file", "label")
_A_TABLE = "a table of file names and labels: write a line such as 0001.png,cat for each image into a .csv"
_DECIMALS = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


def label_of(value: object) -> str:
    """Returns the class that a value of a format stands for; empty for none: null, NaN, blank or a negative number.

    Raises:
        RefusedError: it stands for no class: a number that is not whole, several values, or a long text.
    """
    # pandas writes a missing value as text, too.
    if value is None or (isinstance(value, float | str) and str(value).strip().lower() == "nan"):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, int | float | str):
        raise RefusedError("has several values of its label, and not one class: use --no-classes")
    text = str(value).strip()
    # pandas writes 3.0 into a column that lacks some numbers.
    if isinstance(value, float) or _DECIMALS.fullmatch(text):
        if not float(text).is_integer():
            raise RefusedError(f"has the label {text:.40}, which is not a whole number: use --no-classes")
        text = str(int(Decimal(text)))
    if len(text) > _LONGEST or "\n" in text:
        said = f"has a label of {len(text):,} characters, which names no class, {text[:40]!r}"
        raise RefusedError(f"{said}: close its quotes, or use --no-classes")
    return "" if re.fullmatch(r"-\d+", text) else printable_label(text)


class ImageColumn(str):
    """The name of a column of images, without labels."""


class NumberColumn(str):
    """The name of a column whose values are numbers of vectors, and not classes."""


def value_of(value: object, column: str) -> str:
    """Returns what a value of a column stands for, `number_of` or `label_of` it."""
    return number_of(value) if isinstance(column, NumberColumn) else label_of(value)


def number_of(value: object) -> str:
    """Returns a number, or the numbers of a list, as text with blanks between them; empty for none.

    Raises:
        RefusedError: one is not a number, or not finite as float32.
    """
    values = value if isinstance(value, list | tuple) else () if value in (None, "") else (value,)
    try:
        numbers = [float(one) for one in values]
    except (TypeError, ValueError):
        raise RefusedError(f"has {value!r:.40}, which cannot be a number: mend it, or name another column") from None
    if not all(abs(number) < _MOST_FLOAT32 for number in numbers):
        raise RefusedError(f"has {value!r:.40}, which is not finite in float32: mend it, or leave the image out")
    return " ".join(map(repr, numbers))


def class_names(names: Sequence[object]) -> tuple[str, ...]:
    """Returns the names of a format's classes in the order of their numbers; a blank name becomes its number.

    Raises:
        RefusedError: two classes have one name.
    """
    classes = tuple(printable_label(str(name).strip())[:_LONGEST] or str(number) for number, name in enumerate(names))
    if len(set(classes)) < len(classes):
        raise RefusedError("has two classes of one name: rename one, or use --no-classes")
    return classes


def label_among(classes: Sequence[str], value: object, column: str = "") -> str:
    """Returns the class that a value stands for, where a format lists its classes: by number, or by name as text.

    Raises:
        RefusedError: no class has this number or name.
    """
    label = value_of(value, column)
    if isinstance(column, NumberColumn) or not classes or not label or (isinstance(value, str) and label in classes):
        return label
    if isinstance(value, str) or not label.isdecimal() or int(label) >= len(classes):
        raise RefusedError(f"has the label {label}, and {len(classes):,} classes: get it again")
    return classes[int(label)]


def text_of(content: bytes) -> str:
    """Returns a text in UTF-8, without a byte order mark; raises `RefusedError` for another encoding."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RefusedError("is not a text in UTF-8: save it in that encoding") from None


def json_of(text: str) -> Any:
    """Returns the content of a JSON document.

    Raises:
        RefusedError: an object has a key twice.
        RecursionError: it is nested too deeply.
        ValueError: it is not JSON.
    """
    return json.loads(text, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RefusedError(f"has the key {twice!r:.80} twice: leave one of them")
    return found


def sidecars(column: str | None, *, adjacent: bool = True) -> tuple[str, ...]:
    """Returns the suffixes of the files that may hold a label; a person who names a key means that of a `.json`.

    If the files of an image are not adjacent, no `.json` is read unless a key is named: it may cost a request each.
    """
    return () if column is None else _SIDECARS[1:] if column else _SIDECARS[: 2 if adjacent else 1]


def sidecar_label(suffix: str, content: bytes, key: str = "") -> str:
    """Returns the label in a `.cls` or `.json` file of a WebDataset sample; empty without one.

    Args:
        suffix: cls or json.
        content: the file.
        key: of the label in a `.json`; empty for the one of `LABEL_KEYS` that it has.

    Raises:
        RefusedError: it has several labels, or one that stands for no class.
        ValueError: it is not JSON.
    """
    if suffix == "cls":
        return label_of(text_of(content))
    if not isinstance(found := json_of(text_of(content)), dict):
        return ""
    keys = [key] if key else [name for name in LABEL_KEYS if name in found]
    if len(keys) > 1:
        raise RefusedError(f"has several labels, {some_of(keys)}: choose one, such as --labels :{keys[0]}")
    return value_of(found.get(keys[0]), key) if keys else ""


def with_sidecars(
    where: str, listed: Callable[[], Iterator[Member]], column: str | None, *, adjacent: bool = True
) -> Iterator[Member]:
    """Yields the files of a source with the labels that lie beside them: `a/1.cls` labels `a/1.png` and no other image.

    A `.cls` counts before a `.json`.

    Args:
        where: the source, for messages.
        listed: yields its files in order.
        column: the key of the label in a `.json`; empty for the usual one, None for no labels. See `sidecars`: files
            that may hold labels are not yielded.
        adjacent: whether the files of an image must be adjacent, as in WebDataset's tars, which are streams.

    Raises:
        RefusedError: a `.cls` lies beside no image.
        BadDataError: a file of a label is damaged, or has several labels or none that stands for a class.
    """
    suffixes = sidecars(column, adjacent=adjacent)
    for _, files in groupby(listed(), sample_key if adjacent else lambda _: None):
        others, labels = list[Member](), dict[str, tuple[str, str]]()
        for member in files:
            stem, suffix = member.name.rpartition(".")[0], member.name.rpartition(".")[2].lower()
            if f".{suffix}" not in suffixes or is_hidden(member.name):
                others.append(member)
            elif labels.get(stem, ("", ""))[0] != "cls":
                with refusing(f"{where}: entry {member.name!r}"):
                    labels[stem] = suffix, sidecar_label(suffix, member.read(), column or "")
        for member in others:
            label = labels.pop(member.name.rpartition(".")[0], ("", ""))[1] if is_image(member.name) else ""
            yield replace(member, label=label)
        if lost := next((stem for stem, (suffix, _) in labels.items() if suffix == "cls"), None):
            how = "; the files of an image must be adjacent: make the tar by tar --sort=name" if adjacent else ""
            raise refused(f"{lost}.cls", f"labels no image, such as {lost}.png{how}")


def sample_key(member: Member) -> str:
    """Returns the key of a file of a WebDataset sample; the whole name of another file."""
    match = _SAMPLE_KEY.fullmatch(member.name)
    return match[1] if match else member.name


@dataclass(frozen=True)
class Rows:
    """A table as it was read, before a column of names is chosen.

    Attributes:
        where: the file, for messages.
        cells: its rows.
        header: the names of its columns; None if its first row may have them.
    """

    where: str
    cells: Sequence[Sequence[object]]
    header: Sequence[str] | None = None


@dataclass(frozen=True)
class LabelTable:
    """The labels of images by name.

    A row belongs to the image whose path in the source it has, with or without the suffix. If all rows have bare names,
    without folders, the name of the image's file counts instead, which must then be that of one image.

    Attributes:
        where: the file, for messages.
        labels: the label of each row by its name.
        column: the name of the column of labels.
        names: the name of that of the names.
    """

    where: str
    labels: dict[str, str]
    column: str
    names: str
    _is_bare: bool
    _images: dict[str, str] = field(default_factory=dict, repr=False)

    def of(self, name: str) -> str:
        """Returns the label of an image; empty if the table has none.

        Raises:
            BadRequestError: another image has the same row, or this one has two.
        """
        rows = [row for row in _names_of(name)[self._is_bare :: 2] if row in self.labels]
        for row in rows:
            if (other := self._images.setdefault(row, name)) != name:
                said = f"{self.where}: its row {row!r} would label both {other!r} and {name!r}"
                raise BadRequestError(f"{said}: pack one of their folders, or write their paths into the table")
        if len({self.labels[row] for row in rows}) > 1:
            raise BadRequestError(f"{self.where}: its rows {some_of(rows)} both label {name!r}: leave one of them out")
        return self.labels[rows[0]] if rows else ""


def labels_of_pairs(where: str, pairs: Sequence[tuple[str, object]]) -> LabelTable:
    """Returns the labels of a format's pairs of a path and a label. Raises `RefusedError` for a path with two."""
    return _joined(Rows(where, pairs, _PAIR), 0, False, "")


def join_labels(table: Rows, images: Iterable[str], column: str = "") -> LabelTable:
    """Returns the labels of a table, whose column of names is the one that names images.

    Args:
        table: its rows.
        images: the paths of all images of the source.
        column: the name of the column of labels; may be empty if there is one beside that of the names.

    Raises:
        BadRequestError: no column names images, or several do; or the column of labels is missing, or not chosen.
        RefusedError: a name has two labels, or a label stands for no class.
    """
    body, first = (table.cells, ()) if table.header else (table.cells[1:], table.cells[0])
    columns = list[_Column]()
    for number in range(max(map(len, table.cells))):
        cells = {row[number] for row in body if len(row) > number and isinstance(row[number], Hashable)}
        names, above = {*map(_row_name, cells)}, _row_name(first[number]) if len(first) > number else ""
        is_bare, has_files = not any("/" in name for name in names or {above}), any(map(is_image, names))
        columns.append(_Column(number, above, {*names, above} - {""}, len(names), is_bare, has_files))
    wanted, images = set[str]().union(*(each.names for each in columns)), list(images)
    known = [wanted.intersection(name for image in images for name in _names_of(image)[bare::2]) for bare in (0, 1)]
    found = {each.number: each.names & known[each.is_bare] for each in columns}
    matching = [each for each in columns if found[each.number]]
    # pandas writes its index into a column without a name.
    matching = [each for each in matching if each.first or table.header] or matching
    matching.sort(key=lambda each: (len(found[each.number]), each.distinct), reverse=True)
    named = {
        each.number: _joined(table, each.number, each.first in found[each.number], column) for each in matching[:1]
    }
    is_sure = bool(matching) and _names_all(matching[0], found[matching[0].number], len(body), images)
    for each in matching[1:]:
        # Labels such as 7 are names of images, too, but of few; then several rows have one name.
        with suppress(RefusedError, BadRequestError):
            joined = _joined(table, each.number, each.first in found[each.number], column)
            if not is_sure or each.has_files or len(found[each.number]) >= each.distinct:
                named[each.number] = joined
    if named and all(len({_stem(row[one]) for one in named if len(row) > one}) <= 1 for row in body):
        number, joined = next(iter(named.items()))
        titles = {each.number: str((table.header or table.cells[0])[each.number]) for each in columns if each.has_files}
        others = [title for one, title in titles.items() if one not in named and title != joined.column]
        if others and number not in titles:
            said = f"names images in its column {others[0]!r}, and not those of the source, such as {images[0]!r}"
            raise BadRequestError(f"{table.where} {said}: mend that column, or leave it out")
        # Kaggle's train/1.png and test/1.png are two images, of which 1.png in the table is the first.
        for image in images:
            joined.of(image)
        return joined
    how, last = "two columns that name images" if named else "no column that names images", map(str, table.cells[-1])
    said = f"{table.where} has {how}, such as {next(iter(images), '')!r}: its last row has {some_of(last)}"
    raise BadRequestError(f"{said}; one column has the path of each image in the source, or the name of its file")


class _Column(NamedTuple):
    """The cells of a column as names of images.

    Attributes:
        number: of the column.
        first: its cell in the first row, which may be a header.
        names: all its cells but blank ones.
        distinct: number of those behind the first, each counted once.
        is_bare: whether no other cell than the first has a folder.
        has_files: whether another one has the suffix of an image.
    """

    number: int
    first: str
    names: set[str]
    distinct: int
    is_bare: bool
    has_files: bool


def _names_all(column: _Column, found: set[str], rows: int, images: Sequence[str]) -> bool:
    """Whether each row names an image of its own, and no image is left: ages name some others by chance."""
    is_named = (not found.isdisjoint(_names_of(image)[column.is_bare :: 2]) for image in images)
    return len(found - {column.first}) == rows and all(is_named)


def _stem(cell: object) -> str:
    """Returns the name of a file without folders and suffix."""
    name = _row_name(cell).rpartition("/")[2]
    return name.rpartition(".")[0] if is_image(name) else name


def _names_of(name: str) -> tuple[str, str, str, str]:
    """Returns the path of an image and the name of its file, and both without the suffix."""
    stem = name.rpartition(".")[0]
    return name, name.rpartition("/")[2], stem, stem.rpartition("/")[2]


def _row_name(cell: object) -> str:
    """Returns a cell as sources write the paths of images."""
    parts = path_parts("" if cell is None else str(cell))
    return printable("/".join(part for part in parts if part not in ("", ".")))


def _joined(table: Rows, names: int, is_headless: bool, column: str) -> LabelTable:
    """Returns the labels of a table whose column of names is known."""
    header, cells = table.header, table.cells
    if header is None and is_headless:
        header = [f"column {number}" for number in range(1, 1 + max(map(len, cells)))]
    elif header is None:
        header, cells = list(map(str, cells[0])), cells[1:]
    # pandas writes its index into a first column without a name.
    others = [number for number, name in enumerate(header) if number != names and name]
    named = [number for number in others if column in ("", header[number])]
    if len(named) != 1:
        said = f"has no column {column!r}, but" if column else "has several columns:"
        shown = some_of(header[number] for number in others)
        raise BadRequestError(f"{table.where} {said} {shown}: choose one with --labels {table.where}:COLUMN")
    chosen = named[0]
    pairs = [(row[names], row[chosen]) for row in cells if len(row) > max(names, chosen)]
    is_attribute = header is not _PAIR and not isinstance(column, NumberColumn)
    if is_attribute and {str(value) for _, value in pairs} == {"-1", "1"}:
        # CelebA says so of attributes; without their names -1 means no class.
        pairs = [(name, header[chosen] if str(value) == "1" else f"not {header[chosen]}") for name, value in pairs]
    labels = dict[str, str]()
    for cell, value in pairs:
        name, label = _row_name(cell), value_of(value, column)
        if (other := labels.setdefault(name, label)) != label:
            raise RefusedError(f"labels {name!r:.80} as {other!r} and as {label!r}: leave one class for each image")
    return LabelTable(table.where, labels, header[chosen], header[names], not any("/" in name for name in labels))


def chosen_label(where: str, labels: Sequence[str], column: str, usual: Sequence[str] = LABEL_KEYS) -> str:
    """Returns which of the labels of a format is taken: the one that a person named, a usual one, or the only one.

    Raises:
        BadRequestError: there is no such label, or there are several and none is named.
    """
    if column in labels:
        return column
    found = next(([name] for name in usual if name in labels), labels)
    if not column and len(found) == 1:
        return found[0]
    said = f"has no label {column!r}, but" if column else "has several labels:"
    shown = some_of(labels) or "no others"
    raise BadRequestError(f"{where} {said} {shown}: choose one with --labels :NAME, or use --no-classes")


def split_labels(text: str) -> tuple[str, str]:
    """Splits `FILE[:COLUMN]`, in which FILE may be a URI, into both; `:COLUMN` is a column of the source itself."""
    file, colon, column = text.rpartition(":")
    # A feature of TensorFlow's may be named image/class/text.
    if text.startswith(":"):
        return "", text[1:]
    return (file, column) if colon and not set("/\\") & set(column) else (text, "")


def read_labels(file: str, retry: Retry | None = None) -> Rows:
    """Reads a table of labels: .csv, .tsv, .jsonl, .json, or a text with blanks such as CelebA's.

    Args:
        file: path or URI.
        retry: how operations on a bucket are repeated.

    Raises:
        MissingInputError: the file does not exist.
        BadDataError: it is damaged or no table.
    """
    folder, name = split_uri(file) if "/" in file else (".", file)
    store = open_to_read(folder, retry)
    file = without_queries(file)
    if not store.exists(name):
        own = "" if PurePosixPath(file).suffix else f": a column of the source itself is :{file}"
        raise MissingInputError(f"--labels: there is nothing at {file}{own}")
    with refusing(file):
        return table_in(file, Files(folder, (name,), store.open).read(name))


def table_in(where: str, content: bytes) -> Rows:
    """Returns the table in a file's content; see `read_labels`. Raises `RefusedError` for anything else."""
    text, suffix = text_of(content), PurePosixPath(where).suffix.lower()
    if suffix == ".json":
        found = json_of(text)
        # pandas writes the rows so, as a list of objects.
        if not isinstance(found, list) or not found or not isinstance(found[0], dict):
            return Rows(where, pairs_in(found), _PAIR)
    elif suffix == ".jsonl":
        found = [json_of(line) for line in text.split("\n") if line.strip()]
    else:
        return _rows(where, text)
    if not found or not all(isinstance(line, dict) for line in found):
        raise RefusedError('has no lines such as {"file_name": "0001.png", "label": "cat"}')
    header = list(dict.fromkeys(key for line in found for key in line))
    return Rows(where, [[line.get(key) for key in header] for line in found], header)


def pairs_in(found: Any) -> list[tuple[str, object]]:
    """Returns the pairs of StyleGAN's and EDM's `dataset.json`, or of an object; raises `RefusedError` for others."""
    found = found.get("labels", found) if isinstance(found, dict) else found
    pairs = list(found.items()) if isinstance(found, dict) else found
    if (
        not isinstance(pairs, list)
        or not pairs
        or not all(isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
    ):
        raise RefusedError('has no labels such as {"labels": [["00000/img00000000.png", 6]]}')
    return pairs


def _rows(where: str, text: str) -> Rows:
    """Returns a table whose columns tabs, semicolons, commas or blanks separate."""
    first = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in "\t;," if mark in first), "")
    # Lines may end as on Windows, or on an old Macintosh.
    lines = io.StringIO(text, newline=None)
    read = csv.reader(lines, delimiter=delimiter, skipinitialspace=True) if delimiter else map(str.split, lines)
    rows = [[cell.strip() for cell in row] for row in read if row]
    if rows and len(rows[0]) == 1 and rows[0][0].isdecimal():
        # CelebA's files begin with the number of images.
        del rows[0]
    if len(rows) < 2 or len(rows[1]) < 2:
        raise RefusedError(f"does not hold {_A_TABLE}")
    # CelebA names the attributes, and not the column of the files.
    is_attributes = not delimiter and len(rows[1]) == len(rows[0]) + 1 and not is_image(rows[0][0])
    header = ["file", *rows.pop(0)] if is_attributes else None
    width = len(header or rows[0])
    # Blanks may be part of a label.
    if other := next((row for row in rows if any(row[width:]) or (len(row) < width and not delimiter)), None):
        said = f"has {len(other)} values in the row of {other[0]!r:.80}, and {width} columns"
        raise RefusedError(f"{said}: write it as a .csv, with quotes around a value that has commas")
    return Rows(where, rows, header)
