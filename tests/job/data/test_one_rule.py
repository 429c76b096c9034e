"""One rule for labels, in tables beside folders, zips and tars: the colour of an image says its class.

No source may become a dataset in which an image has the class of another one, or lacks the one that the table says.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence

import pytest

from tests.job.data.coloured import BAD, DOTS, FOLDERS, KINDS, PLAIN, REFUSED, SPLITS, images, outcome, stem
from tests.job.some_images import folder_of, tar_of, zip_of

Truth = Sequence[tuple[str, int]]


def table(cells: Iterable[Sequence[object]], header: str = "id,label", mark: str = ",") -> bytes:
    file = io.StringIO()
    all_cells = [header.split(","), *cells] if header else cells
    csv.writer(file, delimiter=mark, lineterminator="\n").writerows(all_cells)
    return file.getvalue().encode()


def lines(objects: Iterable[dict[str, object]]) -> bytes:
    return "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in objects).encode()


def rows(truth: Truth = PLAIN, name: Callable[[str], str] = str) -> list[tuple[str, str]]:
    return [(name(path), KINDS[kind]) for path, kind in truth]


def attributes(third: int) -> bytes:
    """As CelebA has them; the fourth image says `third` of being an owl."""
    cells = [(name, third if n == 3 else 1 if kind == 2 else -1, 1) for n, (name, kind) in enumerate(PLAIN)]
    return b"7\nowl tail\n" + table(cells, "", " ")


NUMBERED = tuple((f"img/{name}", kind) for name, kind in PLAIN)
COUNTED = tuple((f"img/{number}.png", kind) for number, (_, kind) in enumerate(PLAIN))
SCRAMBLED = [(6 - number, path, KINDS[kind]) for number, (path, kind) in enumerate(COUNTED)]
BESIDE_ROOT = tuple((f"{'a/' * (number % 2)}{number // 2}.png", number % 3) for number in range(6))
INDEXED_ROWS = [(6 - number, f"{number}.jpg", KINDS[kind]) for number, (_, kind) in enumerate(COUNTED)]
AGED = [(number, 5 + number, KINDS[kind]) for number, (_, kind) in enumerate(COUNTED)]
AGREEING = [(number, path, KINDS[kind]) for number, (path, kind) in enumerate(COUNTED)]
MASKS = tuple((f"m{number}.png", kind) for number, (_, kind) in enumerate(COUNTED[::-1]))
MASKED = table([(f"m{number}.png", number, label) for number, _, label in AGED], "mask,id,label")
UPPER, LOWER = ([(f"{first}{name}", kind) for name, kind in PLAIN] for first in "Aa")
OF_TRAIN = table([(name[6:], KINDS[kind]) for name, kind in SPLITS if name[:2] == "tr"])
FEWER = table([row for row in rows(SPLITS) if row[0] not in ("train/2.png", "test/1.png")])
DIGITS = [(f"{n}.png", n % 3) for n in range(7)]
NO_SUFFIX, BACKWARDS = rows(name=stem), [row[::-1] for row in rows()]
BESIDE_X = table([(a, 3, b) for a, b in rows()], "id,x,label")
ODD_ID = table([(f"x{a}", b, c) for a, b, c in SCRAMBLED], "id,path,label")
LINE_ENDS = [{"file_name": a, "text": "x\u2028y", "label": b} for a, b in rows()]
ALIKE = table([(a, "a\u0308" if a < "003" else "ä") for a, _ in rows()])
ABOVE = table(rows()[:4])
DANE = table([(a, "great dane") for a, _ in rows()][:-1], "", " ") + b"006.png cat\n"
LABEL, DROP = {"labels": ":label"}, {"unlabelled": "drop"}
TSV, TXT, JSON, JSONL = ({"file": f"t.{suffix}"} for suffix in ("tsv", "txt", "json", "jsonl"))

TABLES: list[tuple[str, Truth, bytes, dict[str, str], int]] = [
    ("plain", PLAIN, table(rows()), {}, 7),
    ("no suffix", PLAIN, table(NO_SUFFIX), {}, 7),
    ("dots", DOTS, table(rows(DOTS)), {}, 7),
    ("dots, no suffix", DOTS, table(rows(DOTS, stem)), {}, 7),
    ("BOM", PLAIN, b"\xef\xbb\xbf" + table(rows()), {}, 7),
    ("no header", PLAIN, table(rows(), ""), {}, 7),
    ("no header, no suffix", PLAIN, table(NO_SUFFIX, ""), {}, 7),
    ("label first", PLAIN, table(BACKWARDS, "label,id"), {}, 7),
    ("label first, no header", PLAIN, table(BACKWARDS, ""), {}, 7),
    ("numbers as labels", DIGITS, table([(n, n % 3) for n in range(7)]), {}, 7),
    ("id beside path", COUNTED, table(SCRAMBLED, "id,path,label"), LABEL, REFUSED),
    ("id that names no image", COUNTED, ODD_ID, LABEL, 7),
    ("bare names below a folder", NUMBERED, table(rows()), {}, 7),
    ("bare names twice", FOLDERS, table([("0", "cat"), ("1", "owl"), ("2", "dog")]), {}, REFUSED),
    ("folders", FOLDERS, table(rows(FOLDERS)), {}, 6),
    ("folders, no suffix", FOLDERS, table(rows(FOLDERS, stem)), {}, 6),
    ("other folders", FOLDERS, table(rows(FOLDERS, lambda name: f"set/{name}")), {}, REFUSED),
    ("other case", UPPER, table(rows(LOWER)), {}, REFUSED),
    ("another suffix", PLAIN, table(rows(name=lambda name: f"{stem(name)}.jpg")), {}, REFUSED),
    ("train alone", SPLITS, table(rows(SPLITS)), {}, 6),
    ("a row of test is none of train", SPLITS, FEWER, {"split": "train"}, BAD),
    ("bare names of train", SPLITS, OF_TRAIN, {}, REFUSED),
    ("bare names of all", SPLITS, OF_TRAIN, {"split": "all"}, REFUSED),
    ("missing rows", PLAIN, table(rows()[:-2]), {}, BAD),
    ("missing rows, dropped", PLAIN, table(rows()[:-2]), DROP, 5),
    ("float", PLAIN, table([(name, 0.5 + kind) for name, kind in PLAIN]), {}, BAD),
    ("whole floats", PLAIN, table([(name, float(kind)) for name, kind in PLAIN]), {}, 7),
    ("another label of a name", PLAIN, table([*rows(), ("000", "dog")]), {}, REFUSED),
    ("the same row twice", PLAIN, table([*rows(), rows()[0]]), {}, 7),
    ("extra columns", PLAIN, BESIDE_X, {}, REFUSED),
    ("extra columns, chosen", PLAIN, BESIDE_X, LABEL, 7),
    ("no UTF-8", PLAIN, table(rows()) + b"\xff,cat\n", {}, BAD),
    ("cut", PLAIN, table(rows())[:-12], {}, BAD),
    ("semicolons", PLAIN, table(rows(), "id,label", ";"), {}, 7),
    ("tabs", PLAIN, table(rows(), "id,label", "\t"), TSV, 7),
    ("blanks", PLAIN, table(rows(), "", " "), TXT, 7),
    ("attributes", PLAIN, attributes(-1), TXT | {"labels": ":owl"}, 7),
    ("one 0 among attributes", PLAIN, attributes(0), TXT | {"labels": ":owl"}, BAD),
    ("object", PLAIN, json.dumps(dict(rows())).encode(), JSON, 7),
    ("a key twice", PLAIN, json.dumps(dict(rows())).replace("001", "000").encode(), JSON, BAD),
    ("objects", PLAIN, json.dumps([{"id": a, "label": b} for a, b in rows()]).encode(), JSON, 7),
    ("lines", PLAIN, lines({"file_name": a, "label": b} for a, b in rows()), JSONL, 7),
    ("U+2028 in a line", PLAIN, lines(LINE_ENDS), JSONL | LABEL, 7),
    ("lines with lists", PLAIN, lines({"file_name": a, "label": [b]} for a, b in rows()), JSONL, BAD),
    ("an index that names other images", COUNTED, table(INDEXED_ROWS, ",file,label"), LABEL, REFUSED),
    ("an index beside the names", COUNTED, table(SCRAMBLED, ",path,label"), {}, 7),
    ("two columns that agree", COUNTED, table(AGREEING, "id,path,label"), LABEL, 7),
    ("ages that name some images", COUNTED, table(AGED, "id,age,label"), LABEL, 7),
    ("ages, and an image more", (*COUNTED, ("7.png", 0)), table(AGED, "id,age,label"), LABEL | DROP, REFUSED),
    ("masks, and numbers of which one image is missing", (*COUNTED[:-1], *MASKS), MASKED, LABEL | DROP, REFUSED),
    ("a column twice", PLAIN, table([(a, b, b) for a, b in rows()], "id,x,x"), {"labels": ":x"}, REFUSED),
    ("blanks in labels", PLAIN, DANE, TXT, BAD),
    ("an open quote", PLAIN, ABOVE + b'004.png,"dog\n' + table(rows()[5:], ""), {}, BAD),
    ("a label of lines", PLAIN, ABOVE + b'004.png,"dog\n005.png,owl"\n006.png,cat\n', {}, BAD),
    ("nan", PLAIN, table([*rows()[:-1], ("006.png", "nan")]), {}, BAD),
    ("labels that look the same", PLAIN, ALIKE, {}, REFUSED),
    ("an empty line first", PLAIN, b"\n" + table(rows()), {}, 7),
    ("a line break in labels", PLAIN, table([*rows()[:-1], ("006.png", "cat\nx")]), {}, BAD),
    ("folders beside the root", BESIDE_ROOT, table(rows(BESIDE_ROOT)), {}, 6),
    ("a name of two labels", COUNTED, table([("0", 3), ("0", 5), ("1", 2), ("2", 4)]), {}, BAD),
]


@pytest.mark.parametrize(("name", "truth", "content", "options", "expected"), TABLES, ids=[row[0] for row in TABLES])
def test_table_labels_each_image_or_is_refused(tmp_path, name, truth, content, options, expected):
    file = tmp_path / options.get("file", "t.csv")
    file.write_bytes(content)
    options = {key: value for key, value in options.items() if key != "file"}
    options["labels"] = f"{file}{options.get('labels', '')}"
    for make in (folder_of, zip_of, tar_of):
        source = make(tmp_path / f"source.{make.__name__[:3]}", images(truth))
        assert outcome(tmp_path / make.__name__, source, **options) == expected, make
