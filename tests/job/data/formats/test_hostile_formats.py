"""Files of many images, damaged and forged in any way: a dataset, or one line that says why not."""

from __future__ import annotations

import gzip
import io
import shutil
import struct
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from hypothesis import strategies as st
from tfrecord import TFRecordWriter

from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.exits import Exit, JobError
from job.progress import printable
from job.store import open_store
from tests.fuzzing import examples, search
from tests.job.some_images import folder_of, png

PNG = png(0, 8, 8)
DAMAGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4)
# Other bytes at some places, and an earlier end: of one file in three.
HARMS = st.one_of(
    st.just(((), None)), st.just(((), None)), st.tuples(DAMAGES, st.none() | st.none() | st.integers(0, 1 << 12))
)
NUMBERS = st.one_of(st.integers(-3, 70), st.sampled_from([2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]))
VARINTS = st.one_of(st.integers(0, 300), st.sampled_from([2**31, 2**62, 2**64 - 1]))


def becomes_dataset_or_line(tmp_path: Path, files: list[tuple[str, bytes]], chosen: str = "") -> None:
    """Packs a folder of these files, or one of them."""
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    shutil.rmtree(tmp_path / "bucket", ignore_errors=True)
    folder = folder_of(tmp_path / "in", files)
    try:
        index = pack(open_store(str(tmp_path / "bucket")), PackRequest(str(folder / chosen), "x", 8))
    except JobError as error:
        assert error.exit_code in (Exit.BAD_DATA, Exit.BAD_REQUEST)
        assert len(str(error).splitlines()) == 1
    else:
        assert index.images <= sum(len(content) for _, content in files)
        assert all(name == printable(name) for name in (index.source, *index.classes))


def harmed(content: bytes, harm: tuple) -> bytes:
    """The content after a harm."""
    damages, cut = harm
    content = bytearray(content[:cut])
    for at, value in damages:
        if content:
            content[at % len(content)] = value
    return bytes(content)


# Arrays.
TYPES = ["|u1", "<f4", "<i8", "|O", "<U9", "|S0", "<U0", "|V9999999999", "c16", "x", [("a", "|u1"), ("b", "<f4", 9**9)]]
SHAPES = st.lists(NUMBERS, max_size=5).map(tuple)
HEADERS = st.one_of(
    st.builds(
        lambda descr, order, shape: repr({"descr": descr, "fortran_order": order, "shape": shape}),
        st.sampled_from(TYPES),
        st.booleans(),
        SHAPES,
    ),
    st.text(max_size=60),
    st.sampled_from(["-" * 9000 + "1", "(" * 9000, "[" * 150, "{[]: 1}", "1" * 5000, "{'shape': (1,)}", "\0"]),
)


def array(version: int, header: str, length: int | None, size: int) -> bytes:
    """An .npy of any header, and of so many values."""
    encoded = header.encode(errors="replace")
    form = {1: "<H", 2: "<I"}.get(version, "<H")
    stated = len(encoded) if length is None else length % 2 ** (8 * struct.calcsize(form))
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(form, stated) + encoded + b"\1" * size


def plain(array: np.ndarray) -> bytes:
    """An .npy as numpy writes it."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz(arrays: dict[str, bytes], method: int) -> bytes:
    """A zip of arrays."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


FORGED = st.builds(
    array,
    st.sampled_from([1, 1, 2, 3, 9]),
    HEADERS,
    st.none() | st.none() | NUMBERS,
    st.sampled_from([0, 1, 2, 16, 128, 192, 384, 100_000]),
)
IMAGES = st.sampled_from([(2, 8, 8), (2, 8, 8, 3), (2, 1, 8, 8), (2, 192), (3, 64), (2, 8, 8, 2), (2, 3, 3)]).map(
    lambda shape: plain(np.zeros(shape, np.uint8))
)
LABELS = st.one_of(
    st.lists(NUMBERS, min_size=1, max_size=3).map(lambda values: plain(np.array([n % 2**63 for n in values]))),
    st.lists(st.text(max_size=5), min_size=2, max_size=2).map(lambda values: plain(np.array(values))),
    st.lists(st.floats() | st.booleans(), min_size=2, max_size=2).map(lambda values: plain(np.array(values))),
    st.just(plain(np.array([{}, "x"], object))),
    # No characters: a string of such would be no text.
    st.integers(0, 2**32 - 1).map(
        lambda value: plain(np.array(["aa", "b"])).replace(b"b\0\0\0", struct.pack("<I", value))
    ),
)
SETS = st.dictionaries(
    st.sampled_from(["x", "x_train", "x_test", "arr_0", "data", "../x", "\x1b[2J"]),
    IMAGES | IMAGES | FORGED,
    max_size=3,
)
LABEL_SETS = st.dictionaries(
    st.sampled_from(["y", "y_train", "arr_1", "labels", "fine_label"]), LABELS | LABELS | FORGED, max_size=2
)
METHODS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, 14])


@examples(few=40, many=2000)
def test_hostile_arrays(tmp_path: Path, count: int) -> None:
    @search(count, SETS, LABEL_SETS, METHODS, st.booleans(), HARMS)
    def check(images: dict, labels: dict, method: int, is_npz: bool, harm: tuple) -> None:
        arrays = {**images, **labels}
        if is_npz:
            files = [("a.npz", harmed(npz(arrays, method), harm))]
        else:
            files = [(f"{name.strip('./')}.npy", harmed(content, harm)) for name, content in arrays.items()]
        becomes_dataset_or_line(tmp_path, files or [("a.npy", b"")])


# TFRecords.
def varint(number: int) -> bytes:
    """A number as protocol buffers have it."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, wire: int, content: bytes, length: int | None) -> bytes:
    """A field, whose length may be a lie."""
    stated = varint(len(content) if length is None else length) if wire == 2 else b""
    return varint(number << 3 | wire) + stated + content


WIRES = st.sampled_from([2, 2, 2, 2, 0, 1, 5, 3])
LENGTHS = st.none() | st.none() | st.none() | VARINTS
CONTENTS = st.one_of(
    st.sampled_from(
        [PNG, b"\x01", b"cat", b"\xff" * 11, b"image", b"label", b"shape", b"data", bytes(192), b"\3\x08\x08"]
    ),
    st.binary(max_size=20),
)
MESSAGES = st.recursive(
    CONTENTS,
    lambda inner: st.lists(st.builds(field, st.sampled_from([1, 1, 2, 3, 9]), WIRES, inner, LENGTHS), max_size=4).map(
        b"".join
    ),
    max_leaves=12,
)


def feature(name: str, kind: int, values: list[bytes]) -> bytes:
    """A feature of an example, well-formed."""
    listed = b"".join(field(1, 2, value, None) for value in values)
    return field(1, 2, field(1, 2, name.encode(), None) + field(2, 2, field(kind, 2, listed, None), None), None)


FEATURES = st.builds(
    feature,
    st.sampled_from(["image/encoded", "image", "image/class/label", "label", "shape", "data", "height", "x\x1b[2J"]),
    st.sampled_from([1, 1, 3, 3, 2]),
    st.lists(CONTENTS, max_size=3),
)
GOOD = [b"", feature("image", 1, [PNG]), feature("image", 1, [PNG]), feature("image/encoded", 1, [PNG])]
EXAMPLES = st.builds(
    lambda good, features: field(1, 2, b"".join([good, *features]), None),
    st.sampled_from(GOOD),
    st.lists(FEATURES, max_size=4),
)


def tfrecord(records: list[bytes], is_gzipped: bool) -> bytes:
    """A file whose checksums are right."""
    lengths = [struct.pack("<Q", len(record)) for record in records]
    crc = TFRecordWriter.masked_crc
    content = b"".join(
        length + crc(length) + record + crc(record) for length, record in zip(lengths, records, strict=True)
    )
    return gzip.compress(content) if is_gzipped else content


@examples(few=40, many=2000)
def test_hostile_tfrecords(tmp_path: Path, count: int) -> None:
    records = st.lists(EXAMPLES | EXAMPLES | MESSAGES, min_size=1, max_size=3)

    @search(count, records, st.booleans(), HARMS)
    def check(records: list[bytes], is_gzipped: bool, harm: tuple) -> None:
        becomes_dataset_or_line(tmp_path, [("train.tfrecord", harmed(tfrecord(records, is_gzipped), harm))])


# LMDB.
@pytest.fixture(name="tree", scope="module")
def tree_fixture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tree of two levels."""
    folder = tmp_path_factory.mktemp("tree")
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        for number in range(30):
            transaction.put(b"%032d" % number, PNG + bytes(number * 100 % 4200))
        assert transaction.stat()["depth"] == 2
    return (folder / "data.mdb").read_bytes()


FORGERIES = st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from("HIQ"), NUMBERS), min_size=1, max_size=4)


@examples(few=20, many=600)
def test_hostile_lmdb(tmp_path: Path, tree: bytes, count: int) -> None:
    """Other numbers in the pages that are no values: their headers, the pointers to their nodes, the meta pages."""
    numbered = [at for at in range(0, len(tree), 4096) if int.from_bytes(tree[at + 10 : at + 12], "little") != 4]

    @search(count, FORGERIES, HARMS)
    def check(forgeries: list, harm: tuple) -> None:
        content = bytearray(tree)
        for at, kind, value in forgeries:
            place = numbered[at // 80 % len(numbered)] + at % 80 * 2
            size = struct.calcsize(kind)
            content[place : place + size] = struct.pack(f"<{kind}", value % 2 ** (8 * size))
        becomes_dataset_or_line(tmp_path, [("data.mdb", harmed(bytes(content), harm))])


@examples(few=20, many=500)
def test_hostile_cifar(tmp_path: Path, count: int) -> None:
    hundred = " ".join(f"n\x1b{number}" for number in range(100)).encode()
    names = st.sampled_from([b"a b c d e f g h i j", hundred, hundred, b"cat", b"", b"a " * 10])

    @search(count, st.integers(0, 3), names, st.integers(0, 4), st.integers(0, 255))
    def check(kind: int, said: bytes, images: int, value: int) -> None:
        labels, files = (2, "train.bin") if kind % 2 else (1, "data_batch_1.bin")
        content = bytes([value]) * (images * (3072 + labels) + kind // 2)
        meta = (
            [("fine_label_names.txt", said), ("coarse_label_names.txt", said)]
            if kind % 2
            else [("batches.meta.txt", said)]
        )
        becomes_dataset_or_line(tmp_path, [(files, content), *meta])
