"""The labels of images: in a file beside each image, in a table of the source, or in a table that a person names.

A label is the name of a class, as text; an image without a class has an empty one. A format's sign for "no class",
such as -1 or null, is an empty label as well.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from job.data import members
from job.data.members import RefusedError
from job.exits import BadRequestError, MissingInputError
from job.progress import printable_label, some_of
from job.store import Retry, is_remote, open_store, open_to_read, split_uri, without_queries

LABEL_KEYS = ("label", "cls", "class")
"""The names under which formats keep a label; the first one that is there counts."""

SIDECARS = (".cls", ".json")
"""The files beside an image in a WebDataset tar that may hold its label."""

MOST_CLASSES = 100_000
"""Largest number of different labels that are classes."""

_LONGEST = 100
_NAME_COLUMNS = (
    *("file_name", "filename", "file", "image_name", "image_id", "image", "img"),
    *("id", "path", "filepath", "key", "name"),
)
"""Usual columns of file names, of Hugging Face and of Kaggle's competitions."""


def label_of(value: object) -> str:
    """Returns the class that a value of a format stands for."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int | str):
        return ""
    # pandas writes 3.0 into a column that lacks some numbers.
    text = re.sub(r"\A(-?\d+)\.0\Z", r"\1", printable_label(str(value).strip()))
    return "" if re.fullmatch(r"-\d+", text) or len(text) > _LONGEST else text


def sidecars(column: str | None) -> tuple[str, ...]:
    """Returns the suffixes of the files that may hold a label; a person who names a key means that of a `.json`."""
    return () if column is None else SIDECARS[1:] if column else SIDECARS


def sidecar_label(suffix: str, content: bytes, key: str = "") -> str:
    """Returns the label in a `.cls` or `.json` file of a WebDataset sample.

    Args:
        suffix: cls or json.
        content: the file.
        key: of the label in a `.json`; empty for the first of `LABEL_KEYS`.
    """
    if suffix == "cls":
        return label_of(content.decode(errors="replace"))
    try:
        found = json.loads(content)
    # Too many brackets are a RecursionError.
    except (ValueError, RecursionError):
        return ""
    keys = (key,) if key else LABEL_KEYS
    return label_of(next((found[name] for name in keys if name in found), None)) if isinstance(found, dict) else ""


@dataclass(frozen=True)
class LabelTable:
    """Labels by file name: `img/000001.jpg` finds its own row, or that of `000001.jpg` or `000001`.

    Attributes:
        where: the file, for messages.
        labels: the label of each row by its name.
        short: the name of the row by the last part of that, where no other row has the same.
        column: the name of the column of labels, if it has one.
    """

    where: str
    labels: dict[str, str]
    short: dict[str, str]
    column: str = ""
    _images: dict[str, str] = field(default_factory=dict, repr=False)

    def of(self, name: str) -> str:
        """Returns the label of an image; empty if the table has none.

        Raises:
            BadRequestError: another image has the same row.
        """
        parts = members.path_parts(name)
        tails = ["/".join(parts[start:]) for start in range(len(parts))]
        keys = (*tails, tails[-1].rpartition(".")[0])
        row = next((found for key in keys if (found := key if key in self.labels else self.short.get(key))), "")
        # Kaggle's train/1.png and test/1.png are two images, of which 1.png in the table is the first.
        if row and (other := self._images.setdefault(row, name)) != name:
            raise BadRequestError(
                f"{self.where}: its row {row!r} would label both {other!r} and {name!r}: leave one of them out, "
                "by packing one folder, or one split by --split"
            )
        return self.labels[row] if row else ""


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


def read_labels(file: str, column: str, retry: Retry | None = None) -> LabelTable:
    """Reads a table of labels: .csv, .tsv, .jsonl, .json, or a text with blanks such as CelebA's.

    Args:
        file: path or URI.
        column: the one to take; may be empty if there is no other beside that of the file names.
        retry: how operations on a bucket are repeated.

    Raises:
        MissingInputError: the file does not exist.
        BadRequestError: it has no such column, or several and none is named.
        BadDataError: it is damaged or no table.
    """
    folder, name = split_uri(file) if "/" in file else (".", file)
    store = open_to_read(folder, retry) if is_remote(file) else open_store(folder)
    file = without_queries(file)
    if not store.exists(name):
        own = "" if PurePosixPath(file).suffix else f": a column of the source itself is :{file}"
        raise MissingInputError(f"--labels: there is nothing at {file}{own}")
    with members.refusing(file):
        with store.open(name) as opened:
            content = members.read_table(opened)
        return table_in(file, content, column)


def table_in(where: str, content: bytes, column: str = "") -> LabelTable:
    """Returns the table in a file's content; see `read_labels`. Raises `RefusedError` for anything else."""
    try:
        text, suffix = content.decode("utf-8-sig"), PurePosixPath(where).suffix.lower()
    except UnicodeDecodeError:
        raise RefusedError(
            "does not hold a table of file names and labels in UTF-8: save it in that encoding"
        ) from None
    if suffix == ".json":
        found = members.parsed_json(text)
        if not isinstance(found, list) or not found or not isinstance(found[0], dict):
            if column:
                raise BadRequestError(f"{where} has no columns: leave :{column} out")
            return _by_name(where, _json_pairs(found))
        # pandas writes the rows so, as a list of objects.
        header, rows = _json_rows(found)
    elif suffix == ".jsonl":
        header, rows = _json_rows([json.loads(line) for line in text.splitlines() if line.strip()])
    else:
        header, rows = _rows(text)
    lowered = [name.lower() for name in header]
    like_names = (number for number, cell in enumerate(rows[0]) if members.is_image(str(cell)))
    names = next((lowered.index(name) for name in _NAME_COLUMNS if name in lowered), next(like_names, 0))
    chosen = _chosen(where, header, names, column)
    pairs = [(str(row[names]), row[chosen]) for row in rows if len(row) > max(names, chosen)]
    if {str(value) for _, value in pairs} == {"-1", "1"}:
        # CelebA says so of attributes.
        pairs = [(name, header[chosen] if str(value) == "1" else f"not {header[chosen]}") for name, value in pairs]
    return _by_name(where, pairs, header[chosen])


def _json_pairs(found: Any) -> Iterable[tuple[str, Any]]:
    """Returns the pairs of StyleGAN's and EDM's `dataset.json`, or of an object of names."""
    found = found.get("labels", found) if isinstance(found, dict) else found
    pairs = list(found.items()) if isinstance(found, dict) else found
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise RefusedError('has no labels such as {"labels": [["00000/img00000000.png", 6]]}')
    if any(isinstance(label, list | dict) for _, label in pairs):
        raise RefusedError("has a vector or several values for each image, and not one class: use --no-classes")
    return pairs


def _json_rows(lines: list[Any]) -> tuple[list[str], list[list[Any]]]:
    if not lines or not all(isinstance(line, dict) for line in lines):
        raise RefusedError('has no lines such as {"file_name": "0001.png", "label": "cat"}')
    header = list(dict.fromkeys(key for line in lines for key in line))
    return header, [[line.get(key) for key in header] for line in lines]


def _rows(text: str) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows of a table, which tabs, semicolons, commas or blanks separate."""
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in "\t;," if mark in first), "")
    # Lines may end as on Windows, or on an old Macintosh.
    lines = io.StringIO(text, newline=None)
    try:
        read = csv.reader(lines, delimiter=delimiter, skipinitialspace=True) if delimiter else map(str.split, lines)
        rows = [[cell.strip() for cell in row] for row in read if row]
    except csv.Error as error:
        raise RefusedError(f"does not hold a table of file names and labels ({error})") from None
    if rows and len(rows[0]) == 1 and rows[0][0].isdecimal():
        # CelebA's files begin with the number of images.
        del rows[0]
    if len(rows) < 2 or len(rows[1]) < 2:
        raise RefusedError("does not hold a table of file names and labels")
    if members.is_image(rows[0][0]):
        header = ["file", *(f"column {number}" for number in range(2, len(rows[0]) + 1))]
    else:
        header, *rows = rows
        # CelebA names the attributes, and not the column of the files.
        if not delimiter and len(rows[0]) == len(header) + 1:
            header = ["file", *header]
    if longer := next((row for row in rows if any(row[len(header) :])), None):
        said = f"has {len(longer)} values in the row of {longer[0]!r:.80}, and {len(header)} columns"
        raise RefusedError(f"{said}: write it as a .csv, with quotes around a value that has commas")
    return header, rows


def _chosen(where: str, header: list[str], names: int, column: str) -> int:
    """Returns the number of the column of labels."""
    # pandas writes its index into a first column without a name.
    others = [number for number, name in enumerate(header) if number != names and name]
    if column and column in header:
        return header.index(column)
    if not column and len(others) == 1:
        return others[0]
    said = f"has no column {column!r}, but" if column else "has several columns:"
    shown = some_of([header[number] for number in others])
    raise BadRequestError(f"{where} {said} {shown}: choose one with --labels {where}:COLUMN")


def _by_name(where: str, pairs: Iterable[tuple[str, Any]], column: str = "") -> LabelTable:
    """Returns the table of these names and labels; raises `RefusedError` for a name with two labels."""
    labels = dict[str, str]()
    for path, value in pairs:
        name, label = "/".join(part for part in members.path_parts(path) if part not in ("", ".")), label_of(value)
        if (other := labels.setdefault(name, label)) != label:
            raise RefusedError(f"labels {name!r:.80} as {other!r} and as {label!r}: leave one class for each image")
    tails = Counter(name.rpartition("/")[2] for name in labels)
    short = {tail: name for name in labels if "/" in name and tails[tail := name.rpartition("/")[2]] == 1}
    return LabelTable(where, labels, short, column)
