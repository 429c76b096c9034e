"""One rule for labels: sources of every format, plain and odd, in which the colour of an image says its class.

No source may become a dataset in which an image has the class of another one, or lacks the one that the source says.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from job.exits import JobError
from tests.job.data.formats.test_tfrecords import written
from tests.job.packing import KEY, packed
from tests.job.some_images import encoded, folder_of, idx, tar_of, zip_of
from tests.job.some_tables import IMAGE

KINDS = ("cat", "dog", "owl")
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
GREYS = (60, 120, 180)
NAMES = tuple(f"{number:03d}.png" for number in range(7))
PLAIN = tuple((name, number % 3) for number, name in enumerate(NAMES))
"""Names of images, and the classes that their colours say."""

Files = list[tuple[str, bytes]]


def pixels(kind: int) -> np.ndarray:
    return np.full((16, 16, 3), COLOURS[kind], np.uint8)


def png(kind: int) -> bytes:
    return encoded(Image.fromarray(pixels(kind)))


def images(truth: Sequence[tuple[str, int]] = PLAIN) -> Files:
    return [(name, png(kind)) for name, kind in truth]


def shown_in(image: bytes) -> int:
    """The class that an image shows."""
    colour = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), int).mean((0, 1))
    kinds = np.array(COLOURS) if np.ptp(colour) > 50 else np.array(GREYS)[:, None]
    return int(np.abs(kinds - colour).sum(1).argmin())


def judged(bucket: Path) -> list[tuple[int, str]]:
    """The class that each image of the packed dataset shows, and the one that its shard and the index say."""
    index, found = json.loads((bucket / KEY / "index.json").read_bytes()), []
    for shard in sorted((bucket / KEY).glob("shard-*.tar")):
        with tarfile.open(shard) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}
        for name in sorted(name for name in files if name.endswith(".png")):
            said = files.get(name.replace(".png", ".cls"))
            found.append((shown_in(files[name]), index["classes"][int(said)] if said is not None else ""))
    return found


# --- a table beside a folder of images


def table(cells: Sequence[Sequence[object]], header: Sequence[str] = ("id", "label"), mark: str = ",") -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=mark, lineterminator="\n").writerows([header, *cells] if header else cells)
    return file.getvalue().encode()


def rows(truth: Sequence[tuple[str, int]] = PLAIN, name: Callable[[str], str] = str) -> list[tuple[str, str]]:
    return [(name(path), KINDS[kind]) for path, kind in truth]


def stem(name: str) -> str:
    return name.rpartition(".")[0]


DOTS = tuple((f"v1.{name}", kind) for name, kind in PLAIN)
FOLDERS = tuple((f"{'ab'[number % 2]}/{number // 2}.png", number % 3) for number in range(6))
SPLITS = tuple(
    (f"{split}/{number}.png", (number + (split == "test")) % 3) for split in ("test", "train") for number in range(6)
)
NUMBERED = tuple((f"img/{name}", kind) for name, kind in PLAIN)
COUNTED = tuple((f"img/{number}.png", kind) for number, (_, kind) in enumerate(PLAIN))
SCRAMBLED = [(6 - number, path, KINDS[kind]) for number, (path, kind) in enumerate(COUNTED)]
INDEXED_ROWS = [(6 - number, f"{number}.jpg", KINDS[kind]) for number, (_, kind) in enumerate(COUNTED)]
AGREEING = [(number, path, KINDS[kind]) for number, (path, kind) in enumerate(COUNTED)]
REFUSED, BAD = 64, 65

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
    ("an index that names other images", COUNTED, "t.csv", table(INDEXED_ROWS, ("", "file", "label")), {}, REFUSED),
    ("an index beside the names", COUNTED, "t.csv", table(SCRAMBLED, ("", "path", "label")), {}, 7),
    ("two columns that agree", COUNTED, "t.csv", table(AGREEING, ("id", "path", "label")), {"labels": ":label"}, 7),
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
]


def outcome(bucket: Path, source: Path, **options: object) -> int:
    """The exit code of a packing, or else its number of images; checks that each has the class that it shows."""
    try:
        packed(bucket, source, shard_images=None, **options)
    except JobError as error:
        assert len(str(error).splitlines()) == 1
        return int(error.exit_code)
    found = judged(bucket)
    if options.get("classes") is False:
        assert {said for _, said in found} == {""}
    else:
        names = [(KINDS[shown], str(shown), "owl" if shown == 2 else "not owl") for shown, _ in found]
        assert all(said in possible for (_, said), possible in zip(found, names, strict=True)), found
    return len(found)


@pytest.mark.parametrize(
    ("truth", "file", "content", "options", "expected"), [row[1:] for row in TABLES], ids=[row[0] for row in TABLES]
)
def test_table_labels_each_image_or_is_refused(tmp_path, truth, file, content, options, expected):
    (tmp_path / file).write_bytes(content)
    options = options | {"labels": f"{tmp_path / file}{options.get('labels', '')}"}
    for make in (folder_of, zip_of, tar_of):
        source = make(tmp_path / f"source.{make.__name__[:3]}", images(truth))
        assert outcome(tmp_path / make.__name__, source, **options) == expected, make


# --- formats that have their labels


def samples(truth: Sequence[tuple[str, int]], suffix: str = "cls", label: Callable[[int], object] = int) -> Files:
    """Images, each before the file of its label."""
    found = Files()
    for name, kind in truth:
        said = label(kind)
        content = json.dumps({"label": said}).encode() if suffix.endswith("json") else str(said).encode()
        found += [(name, png(kind)), (f"{stem(name)}.{suffix}", content)]
    return found


def edm(truth: Sequence[tuple[str, int]], pairs: Sequence[tuple[str, object]] | None = None, folder: str = "") -> Files:
    pairs = [(name, kind) for name, kind in truth] if pairs is None else pairs
    return [
        *((folder + name, png(kind)) for name, kind in truth),
        (f"{folder}dataset.json", json.dumps({"labels": pairs}).encode()),
    ]


def parquet_of(path: Path, labels: pa.Array, names: Sequence[str] = ()) -> Path:
    about = {"label": {"_type": "ClassLabel", "names": [*names]}} if names else {}
    content = pa.table(
        {"image": pa.array([{"bytes": png(kind), "path": None} for _, kind in PLAIN], IMAGE), "label": labels}
    )
    features = json.dumps({"info": {"features": {"image": {"_type": "Image"}, **about}}})
    parquet.write_table(content.replace_schema_metadata({"huggingface": features}), path)
    return path


def arrays(path: Path, labels: object) -> Path:
    np.savez(path, images=np.stack([pixels(kind) for _, kind in PLAIN]), labels=np.array(labels))
    return path


def records(path: Path, names: bytes | None, labels: Sequence[dict[str, tuple[object, str]]]) -> Path:
    written(
        path / "a.tfrecord",
        [{"image": (png(kind), "byte"), **label} for (_, kind), label in zip(PLAIN, labels, strict=True)],
    )
    if names is not None:
        (path / "label.labels.txt").write_bytes(names)
    return path


def each(
    kind: str = "int", label: Callable[[int], object] = int, lacking: int = -1
) -> list[dict[str, tuple[object, str]]]:
    return [{} if number == lacking else {"label": (label(one), kind)} for number, (_, one) in enumerate(PLAIN)]


def mnist(path: Path, zipped: bool = True, damaged: bool = False, count: int = 7) -> Path:
    """Its images are grey; a byte of the labels may be another one than its checksum says."""
    path.mkdir(parents=True)
    labels = bytearray(gzip.compress(idx(np.array([kind for _, kind in PLAIN][:count])), 0))
    labels[-9] ^= damaged
    grey = idx(np.stack([np.full((28, 28), GREYS[kind]) for _, kind in PLAIN]))
    (path / f"train-images-idx3-ubyte{'.gz' * zipped}").write_bytes(gzip.compress(grey) if zipped else grey)
    (path / f"train-labels-idx1-ubyte{'.gz' * zipped}").write_bytes(labels if zipped else gzip.decompress(labels))
    return path


def cifar(path: Path) -> Path:
    """Classes in an order of their own, beside images of a test set."""
    record = {
        kind: bytes([2 - kind]) + np.full((32, 32, 3), COLOURS[kind], np.uint8).transpose(2, 0, 1).tobytes()
        for kind in range(3)
    }
    names = [*KINDS[::-1], *(f"other{number}" for number in range(7))]
    content = b"".join(record[kind] for _, kind in PLAIN)
    files = [
        ("batches.meta.txt", "\n".join(names).encode()),
        ("data_batch_1.bin", content),
        ("test_batch.bin", record[0]),
    ]
    return tar_of(path, [(f"cifar-10-batches-bin/{name}", content) for name, content in files])


def both(*made: Path) -> Path:
    return made[0].parent


SIDECARS = [
    ("classes by number", samples(PLAIN), {}, 7),
    ("classes by name", samples(PLAIN, label=KINDS.__getitem__), {}, 7),
    ("dots", samples(DOTS), {}, 7),
    ("folders", samples(FOLDERS), {}, 6),
    ("split", samples(SPLITS), {"split": "test"}, 6),
    ("another file's .cls", [*samples(PLAIN), ("000.seg.cls", b"2")], {}, BAD),
    ("a mask beside", [("000.seg.png", png(1)), *samples(PLAIN)], {}, BAD),
    ("a mask beside, dropped", [("000.seg.png", png(1)), *samples(PLAIN)], {"unlabelled": "drop"}, 7),
    ("labels first", sorted(samples(PLAIN), key=lambda file: file[0].replace("cls", "a")), {}, 7),
    ("capitals", [(name.replace("cls", "CLS"), content) for name, content in samples(PLAIN)], {}, 7),
    ("names from a dot", [(f"./{name}", content) for name, content in samples(PLAIN)], {}, 7),
    ("missing", samples(PLAIN)[:-1], {}, BAD),
    ("missing, without classes", samples(PLAIN)[:-1], {"classes": False}, 7),
    ("a BOM and a newline", samples(PLAIN, label=lambda kind: f"\ufeff{kind}\n"), {}, 7),
    ("float", samples(PLAIN, label=lambda kind: kind + 0.5), {}, BAD),
    ("no UTF-8", [*samples(PLAIN)[:-1], ("006.cls", b"\xff")], {}, BAD),
]
JSONS = [
    ("label", samples(PLAIN, "json"), {}, 7),
    ("dots", samples(DOTS, "json", KINDS.__getitem__), {}, 7),
    ("another file's .json", [*samples(PLAIN), ("000.seg.json", b'{"label": 1}')], {}, 7),
    ("labels apart", sorted(samples(PLAIN), key=lambda file: file[0][-3:]), {}, BAD),
    (".meta.json alone", samples(PLAIN, "meta.json"), {}, "no classes"),
    (".cls before .json", [*samples(PLAIN), ("006.json", b'{"label": 9}')], {}, 7),
    ("float", samples(PLAIN, "json", lambda kind: kind + 0.5), {}, BAD),
    ("list", samples(PLAIN, "json", lambda kind: [kind]), {}, BAD),
    ("several", [*samples(PLAIN, "json")[:-1], ("006.json", b'{"label": 0, "class": 0}')], {}, BAD),
    ("cut", [*samples(PLAIN, "json")[:-1], ("006.json", b'{"label": 0')], {}, BAD),
    ("a key twice", [*samples(PLAIN, "json")[:-1], ("006.json", b'{"label": 1, "label": 0}')], {}, BAD),
]
BESIDE = [
    ("EDM", edm(PLAIN), {}, 7),
    ("EDM, dots", edm(DOTS), {}, 7),
    ("EDM, in a folder", edm(FOLDERS, folder="edm/"), {}, 6),
    (
        "EDM, a row of another folder",
        edm(FOLDERS, [(name, kind) for name, kind in FOLDERS if name != "b/0.png"]),
        {},
        BAD,
    ),
    ("EDM, other folders", edm(FOLDERS, [(f"x/{name}", kind) for name, kind in FOLDERS]), {}, REFUSED),
    ("EDM, a row twice", edm(PLAIN, [*PLAIN, ("000.png", 1)]), {}, BAD),
    ("EDM, floats", edm(PLAIN, [(name, kind + 0.5) for name, kind in PLAIN]), {}, BAD),
    ("EDM, train alone", edm(SPLITS), {}, 6),
    ("folders", images([(f"{KINDS[kind]}/{name}", kind) for name, kind in PLAIN]), {}, 7),
    ("folders by number", images([(f"{kind}/{name}", kind) for name, kind in PLAIN]), {}, 7),
    ("folders of shards", images([(f"{kind:05d}/{name}", kind) for name, kind in PLAIN]), {}, "no classes"),
    ("folders of train", images([(f"train/{KINDS[k]}/{n}", k) for n, k in PLAIN] + [("test/owl/1.png", 2)]), {}, 7),
]
FORMATS = [
    ("Parquet, numbers of names", lambda at: parquet_of(at / "a.parquet", pa.array([k for _, k in PLAIN]), KINDS), 7),
    (
        "Parquet, floats of names",
        lambda at: parquet_of(at / "a.parquet", pa.array([float(k) for _, k in PLAIN]), KINDS),
        7,
    ),
    ("Parquet, names", lambda at: parquet_of(at / "a.parquet", pa.array([KINDS[k] for _, k in PLAIN])), 7),
    ("Parquet, floats", lambda at: parquet_of(at / "a.parquet", pa.array([k + 0.5 for _, k in PLAIN])), BAD),
    (
        "Parquet, a name twice",
        lambda at: parquet_of(at / "a.parquet", pa.array([k for _, k in PLAIN]), ("a", "a", "b")),
        BAD,
    ),
    ("Parquet, a null", lambda at: parquet_of(at / "a.parquet", pa.array([None, *(k for _, k in PLAIN[1:])])), BAD),
    (
        "Parquet, a name too few",
        lambda at: parquet_of(at / "a.parquet", pa.array([k for _, k in PLAIN]), KINDS[:2]),
        BAD,
    ),
    ("npz", lambda at: arrays(at / "a.npz", [k for _, k in PLAIN]), 7),
    ("npz, names", lambda at: arrays(at / "a.npz", [KINDS[k].encode() for _, k in PLAIN]), 7),
    ("npz, whole floats", lambda at: arrays(at / "a.npz", [float(k) for _, k in PLAIN]), 7),
    ("npz, floats", lambda at: arrays(at / "a.npz", [k + 0.5 for _, k in PLAIN]), BAD),
    ("npz, one -1", lambda at: arrays(at / "a.npz", [-1, *(k for _, k in PLAIN[1:])]), BAD),
    ("npz, too few", lambda at: arrays(at / "a.npz", [k for _, k in PLAIN[1:]]), REFUSED),
    ("TFRecord", lambda at: records(at / "r", None, each()), 7),
    ("TFRecord, names", lambda at: records(at / "r", b"cat\ndog\nowl\n", each()), 7),
    ("TFRecord, names with a BOM", lambda at: records(at / "r", b"\xef\xbb\xbfcat\ndog\nowl", each()), 7),
    (
        "TFRecord, U+0085 in a name",
        lambda at: records(at / "r", "x\x85y\ncat\ndog\nowl".encode(), each(label=lambda k: k + 1)),
        7,
    ),
    ("TFRecord, a name twice", lambda at: records(at / "r", b"cat\ncat\nowl\n", each()), BAD),
    ("TFRecord, names not in UTF-8", lambda at: records(at / "r", b"cat\ndog\n\xff\n", each()), BAD),
    ("TFRecord, texts", lambda at: records(at / "r", None, each("byte", lambda k: KINDS[k].encode())), 7),
    ("TFRecord, the first lacks it", lambda at: records(at / "r", None, each(lacking=0)), BAD),
    ("TFRecord, the last lacks it", lambda at: records(at / "r", None, each(lacking=6)), BAD),
    ("TFRecord, whole floats", lambda at: records(at / "r", None, each("float", float)), 7),
    ("TFRecord, floats", lambda at: records(at / "r", None, each("float", lambda k: k + 0.5)), BAD),
    ("MNIST", lambda at: mnist(at / "digits"), 7),
    ("MNIST below a folder of images", lambda at: mnist(at / "images idx3" / "my images", zipped=False), 7),
    ("MNIST, a flipped byte", lambda at: mnist(at / "digits", damaged=True), BAD),
    ("MNIST, labels too few", lambda at: mnist(at / "digits", count=6), BAD),
    ("CIFAR", lambda at: cifar(at / "cifar-10-binary.tar.gz"), 7),
    ("CIFAR in a folder", lambda at: both(cifar(at / "cifar-10-binary.tar.gz")), 7),
    (
        "CIFAR beside a tar",
        lambda at: both(
            cifar(at / "cifar-10-binary.tar.gz"), tar_of(at / "more.tar", samples(PLAIN, label=KINDS.__getitem__))
        ),
        # Train alone, since a test set is there; the command says how many images that leaves out.
        7,
    ),
    (
        "EDM's zip beside a tar",
        lambda at: both(zip_of(at / "edm.zip", edm(PLAIN)), tar_of(at / "more.tar", samples(PLAIN))),
        14,
    ),
    (
        "a zip without labels beside",
        lambda at: both(zip_of(at / "a.zip", images()), tar_of(at / "more.tar", samples(PLAIN))),
        BAD,
    ),
]
FOUND = [
    *(
        (
            f"{make.__name__[:-3]}, {name}",
            lambda at, make=make, files=files: make(at / "source", files),
            options,
            expected,
        )
        for make in (folder_of, zip_of, tar_of)
        for name, files, options, expected in SIDECARS
    ),
    *(
        (f"tar, {name}", lambda at, files=files: tar_of(at / "a.tar.gz", files), options, expected)
        for name, files, options, expected in JSONS
    ),
    *(
        (
            f"{make.__name__[:-3]}, {name}",
            lambda at, make=make, files=files: make(at / "source", files),
            options,
            expected,
        )
        for make in (folder_of, zip_of)
        for name, files, options, expected in BESIDE
    ),
    *((name, make, {}, expected) for name, make, expected in FORMATS),
]


@pytest.mark.parametrize(("make", "options", "expected"), [row[1:] for row in FOUND], ids=[row[0] for row in FOUND])
def test_format_labels_each_image_or_is_refused(tmp_path, make, options, expected):
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    if expected == "no classes":
        assert packed(tmp_path / "b", source, **options).classes == ()
    else:
        assert outcome(tmp_path / "b", source, **options) == expected


INDEXED = [
    ("classes by number", samples(PLAIN), {}, 7),
    ("classes by name", samples(PLAIN, label=KINDS.__getitem__), {}, BAD),
    ("dots", samples(DOTS), {}, BAD),
    ("folders", samples(FOLDERS), {}, 6),
    ("a mask beside", [("000.seg.png", png(1)), *samples(PLAIN)], {}, 7),
    ("another file's .cls", [*samples(PLAIN)[:-1], ("006.seg.cls", b"0")], {}, BAD),
    ("labels apart", sorted(samples(PLAIN), key=lambda file: file[0][-3:]), {}, BAD),
    ("the first lacks it", samples(PLAIN)[:1] + samples(PLAIN)[2:], {}, BAD),
    ("the first lacks it, dropped", samples(PLAIN)[:1] + samples(PLAIN)[2:], {"unlabelled": "drop"}, 6),
    ("a BOM and a newline", samples(PLAIN, label=lambda kind: f"\ufeff{kind}\n"), {}, 7),
    ("float", samples(PLAIN, label=lambda kind: kind + 0.5), {}, BAD),
    ("json", samples(PLAIN, "json"), {}, 7),
    ("json, another key", samples(PLAIN, "json"), {"labels": ":kind"}, REFUSED),
    ("json, a key twice", [*samples(PLAIN, "json")[:-1], ("006.json", b'{"label": 1, "label": 0}')], {}, BAD),
]


@pytest.mark.parametrize(
    ("files", "options", "expected"), [row[1:] for row in INDEXED], ids=[row[0] for row in INDEXED]
)
def test_index_labels_each_sample_or_refuses(tmp_path, files, options, expected):
    """In place; judged by the table of offsets, and the bytes that lie there in the tar."""
    tar = tar_of(tmp_path / "a.tar", files)
    try:
        index = packed(tmp_path / "b", "", tars=(str(tar),), shard_images=None, **options)
    except JobError as error:
        assert int(error.exit_code) == expected
        return
    row = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("label", "<i4"), ("sha256", "V16")])
    table = np.frombuffer((tmp_path / "b" / KEY / "shard-00000.offsets").read_bytes(), row)
    found = [tar.read_bytes()[offset : offset + size] for offset, size, _, _ in table.tolist()]
    assert [int(index.classes[label]) for label in table["label"]] == list(map(shown_in, found))
    assert len(found) == expected
