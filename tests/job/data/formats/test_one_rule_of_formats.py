"""One rule for labels, in all formats: the colour of an image says its class.

No source may become a dataset in which an image has the class of another one, or lacks the one that the format says.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from job.data.source.formats import FORMATS
from job.exits import JobError
from tests.job.data.coloured import (
    BAD,
    COLOURS,
    DOTS,
    FOLDERS,
    GREYS,
    KINDS,
    PLAIN,
    REFUSED,
    SPLITS,
    Files,
    images,
    outcome,
    pixels,
    png,
    shown_in,
    stem,
)
from tests.job.data.formats.test_tfrecords import written
from tests.job.packing import KEY, packed
from tests.job.some_images import folder_of, idx, tar_of, zip_of
from tests.job.some_tables import IMAGE


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


def lsun(path: Path) -> Path:
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        for name, kind in PLAIN:
            transaction.put(stem(name).encode(), png(kind))
    return path


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
OF_FORMATS = {
    "published:idx_source": [
        ("MNIST", lambda at: mnist(at / "digits"), 7),
        ("MNIST below a folder of images", lambda at: mnist(at / "images idx3" / "my images", zipped=False), 7),
        ("MNIST, a flipped byte", lambda at: mnist(at / "digits", damaged=True), BAD),
        ("MNIST, labels too few", lambda at: mnist(at / "digits", count=6), BAD),
    ],
    "published:cifar_source": [
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
    ],
    "published:lsun_source": [
        ("LSUN", lambda at: lsun(at / "cat_train_lmdb"), "no classes"),
    ],
    "tfrecords:tfrecord_source": [
        ("TFRecord", lambda at: records(at / "r", None, each()), 7),
        ("TFRecord, names", lambda at: records(at / "r", b"cat\ndog\nowl\n", each()), 7),
        ("TFRecord, names with a BOM", lambda at: records(at / "r", b"\xef\xbb\xbfcat\ndog\nowl", each()), 7),
        (
            "TFRecord, U+0085 in a name",
            lambda at: records(at / "r", "x\x85y\ncat\ndog\nowl".encode(), each(label=lambda k: k + 1)),
            7,
        ),
        ("TFRecord, a blank line among names", lambda at: records(at / "r", b"cat\n\ndog\nowl\n", each()), 7),
        ("TFRecord, a name twice", lambda at: records(at / "r", b"cat\ncat\nowl\n", each()), BAD),
        ("TFRecord, names not in UTF-8", lambda at: records(at / "r", b"cat\ndog\n\xff\n", each()), BAD),
        ("TFRecord, texts", lambda at: records(at / "r", None, each("byte", lambda k: KINDS[k].encode())), 7),
        ("TFRecord, the first lacks it", lambda at: records(at / "r", None, each(lacking=0)), BAD),
        ("TFRecord, the last lacks it", lambda at: records(at / "r", None, each(lacking=6)), BAD),
        ("TFRecord, whole floats", lambda at: records(at / "r", None, each("float", float)), 7),
        ("TFRecord, floats", lambda at: records(at / "r", None, each("float", lambda k: k + 0.5)), BAD),
    ],
    "tables:table_source": [
        (
            "Parquet, numbers of names",
            lambda at: parquet_of(at / "a.parquet", pa.array([k for _, k in PLAIN]), KINDS),
            7,
        ),
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
    ],
    "arrays:array_source": [
        ("npz", lambda at: arrays(at / "a.npz", [k for _, k in PLAIN]), 7),
        ("npz, names", lambda at: arrays(at / "a.npz", [KINDS[k].encode() for _, k in PLAIN]), 7),
        ("npz, whole floats", lambda at: arrays(at / "a.npz", [float(k) for _, k in PLAIN]), 7),
        ("npz, floats", lambda at: arrays(at / "a.npz", [k + 0.5 for _, k in PLAIN]), BAD),
        ("npz, one -1", lambda at: arrays(at / "a.npz", [-1, *(k for _, k in PLAIN[1:])]), BAD),
        ("npz, too few", lambda at: arrays(at / "a.npz", [k for _, k in PLAIN[1:]]), REFUSED),
    ],
}
"""The sources of each format, and their images with right labels."""
ARCHIVES = [
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
    *((name, make, {}, expected) for reader in FORMATS for name, make, expected in OF_FORMATS[reader]),
    *((name, make, {}, expected) for name, make, expected in ARCHIVES),
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
