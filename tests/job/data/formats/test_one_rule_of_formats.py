"""One rule for labels, in all formats: the colour of an image says its class.

No source may become a dataset in which an image has the class of another one, or lacks the one that the format says.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from job.data.source.formats import FORMATS
from job.exits import JobError
from tests.job.data import coloured
from tests.job.data.coloured import BAD, DOTS, FOLDERS, KINDS, PLAIN, REFUSED, SPLITS, Files, images, outcome, png, stem
from tests.job.data.formats.test_formats import lmdb_of, written
from tests.job.packing import KEY, packed
from tests.job.some_images import folder_of, idx, tar_of, zip_of
from tests.job.some_tables import IMAGE

TRUE = [kind for _, kind in PLAIN]
NAMED = [KINDS[kind] for kind in TRUE]
LSUN = [(stem(name).encode(), png(kind)) for name, kind in PLAIN]
HALVES = [kind + 0.5 for kind in TRUE]


def half(kind: int) -> float:
    """A label that is no number of a class."""
    return kind + 0.5


def samples(truth: Sequence[tuple[str, int]] = PLAIN, suffix: str = "cls", label: Callable = int) -> Files:
    """Images, each before the file of its label."""
    found = Files()
    for name, kind in truth:
        said = json.dumps({"label": label(kind)}) if suffix.endswith("json") else str(label(kind))
        found += [(name, png(kind)), (f"{stem(name)}.{suffix}", said.encode())]
    return found


JSON = samples(suffix="json")


def last(content: bytes, suffix: str = "json") -> Files:
    """The same, with other bytes as the label of the last one."""
    return [*samples(suffix=suffix)[:-1], (f"006.{suffix}", content)]


def edm(truth: Sequence[tuple[str, int]], pairs: Sequence[tuple[str, object]] | None = None, folder: str = "") -> Files:
    table = json.dumps({"labels": truth if pairs is None else pairs}).encode()
    return [*images([(folder + name, kind) for name, kind in truth]), (f"{folder}dataset.json", table)]


def table(at: Path, labels: Sequence[object], names: Sequence[str] = ()) -> Path:
    about = {"label": {"_type": "ClassLabel", "names": [*names]}} if names else {}
    features = json.dumps({"info": {"features": {"image": {"_type": "Image"}, **about}}})
    shown = pa.array([{"bytes": png(kind), "path": None} for kind in TRUE], IMAGE)
    content = pa.table({"image": shown, "label": pa.array(labels)}).replace_schema_metadata({"huggingface": features})
    parquet.write_table(content, at / "a.parquet")
    return at / "a.parquet"


def arrays(at: Path, labels: Sequence[object]) -> Path:
    np.savez(at / "a.npz", images=np.stack([coloured.pixels(kind) for kind in TRUE]), labels=np.array(labels))
    return at / "a.npz"


def records(at: Path, names: bytes | None = None, kind: str = "int", label: Callable = int, lacking: int = -1) -> Path:
    """With one of all labels missing, if it is named."""
    said = [{} if number == lacking else {"label": (label(one), kind)} for number, one in enumerate(TRUE)]
    found = [{"image": (png(one), "byte"), **more} for one, more in zip(TRUE, said, strict=True)]
    path = written(at / "r/a.tfrecord", found)
    if names is not None:
        path.with_name("label.labels.txt").write_bytes(names)
    return path.parent


def mnist(path: Path, zipped: bool = True, damaged: bool = False, count: int = 7) -> Path:
    """Its images are grey; a byte of the labels may be another one than its checksum says."""
    labels = bytearray(gzip.compress(idx(np.array(TRUE[:count])), 0))
    labels[-9] ^= damaged
    grey = idx(np.stack([np.full((28, 28), coloured.GREYS[kind]) for kind in TRUE]))
    files = {"images-idx3": gzip.compress(grey), "labels-idx1": bytes(labels)}
    packing = (lambda content: content) if zipped else gzip.decompress
    end = "-ubyte.gz" if zipped else "-ubyte"
    return folder_of(path, [(f"train-{name}{end}", packing(content)) for name, content in files.items()])


def cifar(at: Path) -> Path:
    """Classes in an order of their own, beside images of a test set."""
    shown = [np.full((32, 32, 3), colour, np.uint8).transpose(2, 0, 1).tobytes() for colour in coloured.COLOURS]
    record = [bytes([2 - kind]) + content for kind, content in enumerate(shown)]
    names = "\n".join([*KINDS[::-1], *(f"other{number}" for number in range(7))]).encode()
    content = b"".join(record[kind] for kind in TRUE)
    files = {"batches.meta.txt": names, "data_batch_1.bin": content, "test_batch.bin": record[0]}
    named = [(f"cifar-10-batches-bin/{name}", content) for name, content in files.items()]
    return tar_of(at / "cifar-10-binary.tar.gz", named)


def beside(made: Path, files: Files) -> Path:
    """The folder of a source, which has a tar as well."""
    return tar_of(made.parent / "more.tar", files).parent


MAKERS = {
    "folder": lambda at, files: folder_of(at / "source", files),
    "zip": lambda at, files: zip_of(at / "source", files),
    "tar": lambda at, files: tar_of(at / "source", files),
    "tar.gz": lambda at, files: tar_of(at / "a.tar.gz", files),
}
ANY, GZ, BESIDE, NONE = ("folder", "zip", "tar"), ("tar.gz",), ("folder", "zip"), ()
MASK = [("000.seg.png", png(1)), *samples()]
APART = sorted(samples(), key=lambda file: file[0][-3:])
BOM = samples(label=lambda kind: f"\ufeff{kind}\n")
KEY_TWICE = last(b'{"label": 1, "label": 0}')
# The name; by which makers; the files; options; the images of a packed dataset, or why not; the same in place.
FILES = [
    ("classes by number", ANY, samples(), {}, 7, 7),
    ("classes by name", ANY, samples(label=KINDS.__getitem__), {}, 7, BAD),
    ("dots", ANY, samples(DOTS), {}, 7, BAD),
    ("folders", ANY, samples(FOLDERS), {}, 6, 6),
    ("split", ANY, samples(SPLITS), {"split": "test"}, 6, None),
    ("another file's .cls", ANY, [*samples(), ("000.seg.cls", b"2")], {}, BAD, None),
    ("another file's .cls alone", NONE, [*samples()[:-1], ("006.seg.cls", b"0")], {}, None, BAD),
    ("a mask beside", ANY, MASK, {}, BAD, 7),
    ("a mask beside, dropped", ANY, MASK, {"unlabelled": "drop"}, 7, None),
    ("labels first", ANY, sorted(samples(), key=lambda file: file[0].replace("cls", "a")), {}, 7, None),
    ("labels apart", GZ, APART, {}, BAD, BAD),
    ("capitals", ANY, [(name.replace("cls", "CLS"), content) for name, content in samples()], {}, 7, None),
    ("names from a dot", ANY, [(f"./{name}", content) for name, content in samples()], {}, 7, None),
    ("missing", ANY, samples()[:-1], {}, BAD, None),
    ("missing, without classes", ANY, samples()[:-1], {"classes": False}, 7, None),
    ("the first lacks it", NONE, samples()[:1] + samples()[2:], {}, None, BAD),
    ("the first lacks it, dropped", NONE, samples()[:1] + samples()[2:], {"unlabelled": "drop"}, None, 6),
    ("a BOM and a newline", ANY, BOM, {}, 7, 7),
    ("float", ANY, samples(label=half), {}, BAD, BAD),
    ("no UTF-8", ANY, last(b"\xff", "cls"), {}, BAD, None),
    ("json", GZ, JSON, {}, 7, 7),
    ("json, another key", NONE, JSON, {"labels": ":kind"}, None, REFUSED),
    ("json, dots", GZ, samples(DOTS, "json", KINDS.__getitem__), {}, 7, None),
    ("another file's .json", GZ, [*samples(), ("000.seg.json", b'{"label": 1}')], {}, 7, None),
    (".meta.json alone", GZ, samples(suffix="meta.json"), {}, "no classes", None),
    (".cls before .json", GZ, [*samples(), ("006.json", b'{"label": 9}')], {}, 7, None),
    ("json, float", GZ, samples(PLAIN, "json", half), {}, BAD, None),
    ("json, list", GZ, samples(PLAIN, "json", lambda kind: [kind]), {}, BAD, None),
    ("json, several", GZ, last(b'{"label": 0, "class": 0}'), {}, BAD, None),
    ("json, cut", GZ, last(b'{"label": 0'), {}, BAD, None),
    ("json, a key twice", GZ, KEY_TWICE, {}, BAD, BAD),
    ("EDM", BESIDE, edm(PLAIN), {}, 7, None),
    ("EDM, dots", BESIDE, edm(DOTS), {}, 7, None),
    ("EDM, in a folder", BESIDE, edm(FOLDERS, folder="edm/"), {}, 6, None),
    ("EDM, a row of another folder", BESIDE, edm(FOLDERS, [p for p in FOLDERS if p[0] != "b/0.png"]), {}, BAD, None),
    ("EDM, other folders", BESIDE, edm(FOLDERS, [(f"x/{name}", k) for name, k in FOLDERS]), {}, REFUSED, None),
    ("EDM, a row twice", BESIDE, edm(PLAIN, [*PLAIN, ("000.png", 1)]), {}, BAD, None),
    ("EDM, floats", BESIDE, edm(PLAIN, [(name, half(kind)) for name, kind in PLAIN]), {}, BAD, None),
    ("EDM, train alone", BESIDE, edm(SPLITS), {}, 6, None),
    ("named folders", BESIDE, images([(f"{KINDS[kind]}/{name}", kind) for name, kind in PLAIN]), {}, 7, None),
    ("numbered folders", BESIDE, images([(f"{kind}/{name}", kind) for name, kind in PLAIN]), {}, 7, None),
    ("shards", BESIDE, images([(f"{kind:05d}/{name}", kind) for name, kind in PLAIN]), {}, "no classes", None),
    ("train", BESIDE, images([*((f"train/{KINDS[k]}/{n}", k) for n, k in PLAIN), ("test/owl/1.png", 2)]), {}, 7, None),
]
OF_FORMATS = {
    "published:idx_source": [
        ("MNIST", lambda at: mnist(at / "digits"), 7),
        ("MNIST below a folder of images", lambda at: mnist(at / "images idx3" / "my images", zipped=False), 7),
        ("MNIST, a flipped byte", lambda at: mnist(at / "digits", damaged=True), BAD),
        ("MNIST, labels too few", lambda at: mnist(at / "digits", count=6), BAD),
    ],
    "published:cifar_source": [
        ("CIFAR", cifar, 7),
        ("CIFAR in a folder", lambda at: cifar(at).parent, 7),
        # Train alone, since a test set is there; the command says how many images that leaves out.
        ("CIFAR beside a tar", lambda at: beside(cifar(at), samples(label=KINDS.__getitem__)), 7),
    ],
    "published:lsun_source": [("LSUN", lambda at: lmdb_of(at / "cat_train_lmdb", LSUN), "no classes")],
    "tfrecords:tfrecord_source": [
        ("TFRecord", records, 7),
        ("TFRecord, names", lambda at: records(at, b"cat\ndog\nowl\n"), 7),
        ("TFRecord, names with a BOM", lambda at: records(at, b"\xef\xbb\xbfcat\ndog\nowl"), 7),
        ("TFRecord, U+0085", lambda at: records(at, "x\x85y\ncat\ndog\nowl".encode(), label=lambda k: k + 1), 7),
        ("TFRecord, a blank line among names", lambda at: records(at, b"cat\n\ndog\nowl\n"), 7),
        ("TFRecord, a name twice", lambda at: records(at, b"cat\ncat\nowl\n"), BAD),
        ("TFRecord, names not in UTF-8", lambda at: records(at, b"cat\ndog\n\xff\n"), BAD),
        ("TFRecord, texts", lambda at: records(at, kind="byte", label=lambda k: KINDS[k].encode()), 7),
        ("TFRecord, the first lacks it", lambda at: records(at, lacking=0), BAD),
        ("TFRecord, the last lacks it", lambda at: records(at, lacking=6), BAD),
        ("TFRecord, whole floats", lambda at: records(at, kind="float", label=float), 7),
        ("TFRecord, floats", lambda at: records(at, kind="float", label=half), BAD),
    ],
    "tables:table_source": [
        ("Parquet, numbers of names", lambda at: table(at, TRUE, KINDS), 7),
        ("Parquet, floats of names", lambda at: table(at, [*map(float, TRUE)], KINDS), 7),
        ("Parquet, names", lambda at: table(at, NAMED), 7),
        ("Parquet, floats", lambda at: table(at, HALVES), BAD),
        ("Parquet, a name twice", lambda at: table(at, TRUE, ("a", "a", "b")), BAD),
        ("Parquet, a null", lambda at: table(at, [None, *TRUE[1:]]), BAD),
        ("Parquet, a name too few", lambda at: table(at, TRUE, KINDS[:2]), BAD),
    ],
    "arrays:array_source": [
        ("npz", lambda at: arrays(at, TRUE), 7),
        ("npz, names", lambda at: arrays(at, [name.encode() for name in NAMED]), 7),
        ("npz, whole floats", lambda at: arrays(at, [*map(float, TRUE)]), 7),
        ("npz, floats", lambda at: arrays(at, HALVES), BAD),
        ("npz, one -1", lambda at: arrays(at, [-1, *TRUE[1:]]), BAD),
        ("npz, too few", lambda at: arrays(at, TRUE[1:]), REFUSED),
    ],
}
"""The sources of each format, and their images with right labels."""
ARCHIVES = [
    ("EDM's zip beside a tar", lambda at: beside(zip_of(at / "edm.zip", edm(PLAIN)), samples()), 14),
    ("a zip without labels beside", lambda at: beside(zip_of(at / "a.zip", images()), samples()), BAD),
]
FOUND = {
    f"{kind}, {name}": (lambda at, kind=kind, files=files: MAKERS[kind](at, files), options, expected)
    for name, kinds, files, options, expected, _ in FILES
    for kind in kinds
}
FOUND |= {name: (make, {}, expected) for name, make, expected in ARCHIVES}
FOUND |= {name: (make, {}, expected) for reader in FORMATS for name, make, expected in OF_FORMATS[reader]}


@pytest.mark.parametrize(("make", "options", "expected"), FOUND.values(), ids=FOUND)
def test_format_labels_each_image_or_is_refused(tmp_path, make, options, expected):
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    if expected == "no classes":
        assert packed(tmp_path / "b", source, **options).classes == ()
    else:
        assert outcome(tmp_path / "b", source, **options) == expected


INDEXED = {name: (files, options, expected) for name, _, files, options, _, expected in FILES if expected}


@pytest.mark.parametrize(("files", "options", "expected"), INDEXED.values(), ids=INDEXED)
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
    assert [int(index.classes[label]) for label in table["label"]] == list(map(coloured.shown_in, found))
    assert len(found) == expected
