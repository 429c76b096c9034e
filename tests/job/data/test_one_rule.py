"""One rule for labels, in tables beside folders, zips and tars: the colour of an image says its class.

No source may become a dataset in which an image has the class of another one, or lacks the one that the table says.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence

import pytest

from tests.job.data.coloured import (
    BAD,
    COUNTED,
    DOTS,
    FOLDERS,
    KINDS,
    NUMBERED,
    PLAIN,
    REFUSED,
    SPLITS,
    images,
    outcome,
    stem,
)
from tests.job.some_images import folder_of, tar_of, zip_of


def table(cells: Sequence[Sequence[object]], header: Sequence[str] = ("id", "label"), mark: str = ",") -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=mark, lineterminator="\n").writerows([header, *cells] if header else cells)
    return file.getvalue().encode()


def rows(truth: Sequence[tuple[str, int]] = PLAIN, name: Callable[[str], str] = str) -> list[tuple[str, str]]:
    return [(name(path), KINDS[kind]) for path, kind in truth]


SCRAMBLED = [(6 - number, path, KINDS[kind]) for number, (path, kind) in enumerate(COUNTED)]
BESIDE_ROOT = tuple((f"{'a/' * (number % 2)}{number // 2}.png", number % 3) for number in range(6))
INDEXED_ROWS = [(6 - number, f"{number}.jpg", KINDS[kind]) for number, (_, kind) in enumerate(COUNTED)]
AGED = [(number, 5 + number, KINDS[kind]) for number, (_, kind) in enumerate(COUNTED)]
AGREEING = [(number, path, KINDS[kind]) for number, (path, kind) in enumerate(COUNTED)]

TABLES = [
    ("plain", PLAIN, "t.csv", table(rows()), {}, 7),
    ("no suffix", PLAIN, "t.csv", table(rows(name=stem)), {}, 7),
    ("dots", DOTS, "t.csv", table(rows(DOTS)), {}, 7),
    ("dots, no suffix", DOTS, "t.csv", table(rows(DOTS, stem)), {}, 7),
    ("BOM", PLAIN, "t.csv", b"\xef\xbb\xbf" + table(rows()), {}, 7),
    ("no header", PLAIN, "t.csv", table(rows(), ()), {}, 7),
    ("no header, no suffix", PLAIN, "t.csv", table(rows(name=stem), ()), {}, 7),
    ("label first", PLAIN, "t.csv", table([row[::-1] for row in rows()], ("label", "id")), {}, 7),
    ("label first, no header", PLAIN, "t.csv", table([row[::-1] for row in rows()], ()), {}, 7),
    (
        "numbers as labels",
        [(f"{n}.png", n % 3) for n in range(7)],
        "t.csv",
        table([(n, n % 3) for n in range(7)]),
        {},
        7,
    ),
    ("id beside path", COUNTED, "t.csv", table(SCRAMBLED, ("id", "path", "label")), {"labels": ":label"}, REFUSED),
    (
        "id that names no image",
        COUNTED,
        "t.csv",
        table([(f"x{a}", b, c) for a, b, c in SCRAMBLED], ("id", "path", "label")),
        {"labels": ":label"},
        7,
    ),
    ("bare names below a folder", NUMBERED, "t.csv", table(rows()), {}, 7),
    ("bare names twice", FOLDERS, "t.csv", table([("0", "cat"), ("1", "owl"), ("2", "dog")]), {}, REFUSED),
    ("folders", FOLDERS, "t.csv", table(rows(FOLDERS)), {}, 6),
    ("folders, no suffix", FOLDERS, "t.csv", table(rows(FOLDERS, stem)), {}, 6),
    ("other folders", FOLDERS, "t.csv", table(rows(FOLDERS, lambda name: f"set/{name}")), {}, REFUSED),
    (
        "other case",
        [(f"A{name}", kind) for name, kind in PLAIN],
        "t.csv",
        table(rows([(f"a{n}", k) for n, k in PLAIN])),
        {},
        REFUSED,
    ),
    ("another suffix", PLAIN, "t.csv", table(rows(name=lambda name: f"{stem(name)}.jpg")), {}, REFUSED),
    ("train alone", SPLITS, "t.csv", table(rows(SPLITS)), {}, 6),
    (
        "a row of test is none of train",
        SPLITS,
        "t.csv",
        table([row for row in rows(SPLITS) if row[0] not in ("train/2.png", "test/1.png")]),
        {"split": "train"},
        BAD,
    ),
    (
        "bare names of train",
        SPLITS,
        "t.csv",
        table([(name[6:], KINDS[kind]) for name, kind in SPLITS if name[:2] == "tr"]),
        {},
        REFUSED,
    ),
    (
        "bare names of all",
        SPLITS,
        "t.csv",
        table([(name[6:], KINDS[kind]) for name, kind in SPLITS if name[:2] == "tr"]),
        {"split": "all"},
        REFUSED,
    ),
    ("missing rows", PLAIN, "t.csv", table(rows()[:-2]), {}, BAD),
    ("missing rows, dropped", PLAIN, "t.csv", table(rows()[:-2]), {"unlabelled": "drop"}, 5),
    ("float", PLAIN, "t.csv", table([(name, 0.5 + kind) for name, kind in PLAIN]), {}, BAD),
    ("whole floats", PLAIN, "t.csv", table([(name, float(kind)) for name, kind in PLAIN]), {}, 7),
    ("another label of a name", PLAIN, "t.csv", table([*rows(), ("000", "dog")]), {}, REFUSED),
    ("the same row twice", PLAIN, "t.csv", table([*rows(), rows()[0]]), {}, 7),
    ("extra columns", PLAIN, "t.csv", table([(a, 3, b) for a, b in rows()], ("id", "x", "label")), {}, REFUSED),
    (
        "extra columns, chosen",
        PLAIN,
        "t.csv",
        table([(a, 3, b) for a, b in rows()], ("id", "x", "label")),
        {"labels": ":label"},
        7,
    ),
    ("no UTF-8", PLAIN, "t.csv", table(rows()) + b"\xff,cat\n", {}, BAD),
    ("cut", PLAIN, "t.csv", table(rows())[:-12], {}, BAD),
    ("semicolons", PLAIN, "t.csv", table(rows(), mark=";"), {}, 7),
    ("tabs", PLAIN, "t.tsv", table(rows(), mark="\t"), {}, 7),
    ("blanks", PLAIN, "t.txt", table(rows(), (), " "), {}, 7),
    (
        "attributes",
        PLAIN,
        "t.txt",
        b"7\nowl tail\n" + table([(name, 1 if kind == 2 else -1, 1) for name, kind in PLAIN], (), " "),
        {"labels": ":owl"},
        7,
    ),
    (
        "one 0 among attributes",
        PLAIN,
        "t.txt",
        b"7\nowl tail\n"
        + table([(name, 0 if name == "003.png" else 1 if kind == 2 else -1, 1) for name, kind in PLAIN], (), " "),
        {"labels": ":owl"},
        BAD,
    ),
    ("object", PLAIN, "t.json", json.dumps(dict(rows())).encode(), {}, 7),
    ("a key twice", PLAIN, "t.json", json.dumps(dict(rows())).replace("001", "000").encode(), {}, BAD),
    ("objects", PLAIN, "t.json", json.dumps([{"id": a, "label": b} for a, b in rows()]).encode(), {}, 7),
    (
        "lines",
        PLAIN,
        "t.jsonl",
        "".join(json.dumps({"file_name": a, "label": b}) + "\n" for a, b in rows()).encode(),
        {},
        7,
    ),
    (
        "U+2028 in a line",
        PLAIN,
        "t.jsonl",
        "".join(
            json.dumps({"file_name": a, "text": "x\u2028y", "label": b}, ensure_ascii=False) + "\n" for a, b in rows()
        ).encode(),
        {"labels": ":label"},
        7,
    ),
    (
        "lines with lists",
        PLAIN,
        "t.jsonl",
        "".join(json.dumps({"file_name": a, "label": [b]}) + "\n" for a, b in rows()).encode(),
        {},
        BAD,
    ),
    (
        "an index that names other images",
        COUNTED,
        "t.csv",
        table(INDEXED_ROWS, ("", "file", "label")),
        {"labels": ":label"},
        REFUSED,
    ),
    ("an index beside the names", COUNTED, "t.csv", table(SCRAMBLED, ("", "path", "label")), {}, 7),
    ("two columns that agree", COUNTED, "t.csv", table(AGREEING, ("id", "path", "label")), {"labels": ":label"}, 7),
    ("ages that name some images", COUNTED, "t.csv", table(AGED, ("id", "age", "label")), {"labels": ":label"}, 7),
    (
        "ages, and an image more",
        (*COUNTED, ("7.png", 0)),
        "t.csv",
        table(AGED, ("id", "age", "label")),
        {"labels": ":label", "unlabelled": "drop"},
        REFUSED,
    ),
    (
        "masks, and numbers of which one image is missing",
        (*COUNTED[:-1], *((f"m{number}.png", kind) for number, (_, kind) in enumerate(COUNTED[::-1]))),
        "t.csv",
        table([(f"m{number}.png", number, label) for number, _, label in AGED], ("mask", "id", "label")),
        {"labels": ":label", "unlabelled": "drop"},
        REFUSED,
    ),
    (
        "a column twice",
        PLAIN,
        "t.csv",
        table([(a, b, b) for a, b in rows()], ("id", "x", "x")),
        {"labels": ":x"},
        REFUSED,
    ),
    (
        "blanks in labels",
        PLAIN,
        "t.txt",
        table([(a, "great dane") for a, _ in rows()][:-1], (), " ") + b"006.png cat\n",
        {},
        BAD,
    ),
    ("an open quote", PLAIN, "t.csv", table(rows()[:4]) + b'004.png,"dog\n' + table(rows()[5:], ()), {}, BAD),
    ("a label of lines", PLAIN, "t.csv", table(rows()[:4]) + b'004.png,"dog\n005.png,owl"\n006.png,cat\n', {}, BAD),
    ("nan", PLAIN, "t.csv", table([*rows()[:-1], ("006.png", "nan")]), {}, BAD),
    (
        "labels that look the same",
        PLAIN,
        "t.csv",
        table([(a, "a\u0308" if a < "003" else "ä") for a, _ in rows()]),
        {},
        REFUSED,
    ),
    ("an empty line first", PLAIN, "t.csv", b"\n" + table(rows()), {}, 7),
    ("a line break in labels", PLAIN, "t.csv", table([*rows()[:-1], ("006.png", "cat\nx")]), {}, BAD),
    ("folders beside the root", BESIDE_ROOT, "t.csv", table(rows(BESIDE_ROOT)), {}, 6),
    ("a name of two labels", COUNTED, "t.csv", table([("0", 3), ("0", 5), ("1", 2), ("2", 4)]), {}, BAD),
]


@pytest.mark.parametrize(
    ("truth", "file", "content", "options", "expected"), [row[1:] for row in TABLES], ids=[row[0] for row in TABLES]
)
def test_table_labels_each_image_or_is_refused(tmp_path, truth, file, content, options, expected):
    (tmp_path / file).write_bytes(content)
    options = options | {"labels": f"{tmp_path / file}{options.get('labels', '')}"}
    for make in (folder_of, zip_of, tar_of):
        source = make(tmp_path / f"source.{make.__name__[:3]}", images(truth))
        assert outcome(tmp_path / make.__name__, source, **options) == expected, make
