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
from tests.job.data.formats.test_formats import lmdb_of, npy
from tests.job.some_images import folder_of, png

PNG = png(0, 8, 8)
DAMAGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4)
# Other bytes at some places, and an earlier end: of one file in three.
HARM = st.tuples(DAMAGES, st.none() | st.none() | st.integers(0, 1 << 12))
HARMS = st.one_of(st.just(((), None)), st.just(((), None)), HARM)
NUMBERS = st.one_of(st.integers(-3, 70), st.sampled_from([2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]))
OR_NOT = st.none() | st.none()


def becomes_dataset_or_line(tmp_path: Path, files: dict[str, bytes], harm: tuple = ((), None)) -> None:
    """Packs a folder of these files after a harm to each."""
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    shutil.rmtree(tmp_path / "bucket", ignore_errors=True)
    damages, cut = harm
    harmed = {name: bytearray(content[:cut]) for name, content in files.items()}
    for content in filter(None, harmed.values()):
        for at, value in damages:
            content[at % len(content)] = value
    folder = folder_of(tmp_path / "in", harmed.items())
    try:
        index = pack(open_store(str(tmp_path / "bucket")), PackRequest(str(folder), "x", 8))
    except JobError as error:
        assert error.exit_code in (Exit.BAD_DATA, Exit.BAD_REQUEST)
        assert len(str(error).splitlines()) == 1
    else:
        assert index.images <= sum(map(len, harmed.values()))
        assert all(name == printable(name) for name in (index.source, *index.classes))


# Arrays.
TYPES = ["|u1", "<f4", "<i8", "|O", "<U9", "|S0", "<U0", "|V9999999999", "c16", "x", [("a", "|u1"), ("b", "<f4", 9**9)]]
ABOUT = {
    "descr": st.sampled_from(TYPES),
    "fortran_order": st.booleans(),
    "shape": st.lists(NUMBERS, max_size=5).map(tuple),
}
ODD = ["-" * 9000 + "1", "(" * 9000, "[" * 150, "{[]: 1}", "1" * 5000, "{'shape': (1,)}", "\0"]
HEADERS = st.one_of(st.fixed_dictionaries(ABOUT).map(repr), st.text(max_size=60), st.sampled_from(ODD))


def array(version: int, header: str, length: int | None, size: int) -> bytes:
    """An .npy of any header, and of so many values."""
    encoded = header.encode(errors="replace")
    form = "<I" if version == 2 else "<H"
    stated = len(encoded) if length is None else length % 2 ** (8 * struct.calcsize(form))
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(form, stated) + encoded + b"\1" * size


def plain(values: object, dtype: object = None) -> bytes:
    """An .npy as numpy writes it."""
    return npy(np.array(values, dtype))


def npz(arrays: dict[str, bytes], method: int) -> bytes:
    """A zip of arrays."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


SIZES = st.sampled_from([0, 1, 2, 16, 128, 192, 384, 100_000])
FORGED = st.builds(array, st.sampled_from([1, 1, 2, 3, 9]), HEADERS, OR_NOT | NUMBERS, SIZES)
SHAPES = st.sampled_from([(2, 8, 8), (2, 8, 8, 3), (2, 1, 8, 8), (2, 192), (3, 64), (2, 8, 8, 2), (2, 3, 3)])
IMAGES = SHAPES.map(lambda shape: plain(np.zeros(shape, np.uint8)))
LABELS = st.one_of(
    st.lists(NUMBERS.map(lambda number: number % 2**63), min_size=1, max_size=3).map(plain),
    st.lists(st.text(max_size=5), min_size=2, max_size=2).map(plain),
    st.lists(st.floats() | st.booleans(), min_size=2, max_size=2).map(plain),
    st.just(plain([{}, "x"], object)),
    # No characters: a string of such would be no text.
    st.integers(0, 2**32 - 1).map(lambda n: plain(["aa", "b"]).replace(b"b\0\0\0", struct.pack("<I", n))),
)
SET_NAMES = st.sampled_from(["x", "x_train", "x_test", "arr_0", "data", "../x", "\x1b[2J"])
LABEL_NAMES = st.sampled_from(["y", "y_train", "arr_1", "labels", "fine_label"])
SETS = st.dictionaries(SET_NAMES, IMAGES | IMAGES | FORGED, max_size=3)
LABEL_SETS = st.dictionaries(LABEL_NAMES, LABELS | LABELS | FORGED, max_size=2)
# Files of their own; stored, deflated, and packed by LZMA.
METHODS = st.sampled_from([None, None, None, None, None, 0, 0, 8, 8, 14])


@examples(few=40, many=2000)
def test_hostile_arrays(tmp_path: Path, count: int) -> None:
    @search(count, SETS, LABEL_SETS, METHODS, HARMS)
    def check(images: dict, labels: dict, method: int | None, harm: tuple) -> None:
        arrays = {**images, **labels}
        files = {f"{name.strip('./')}.npy": content for name, content in arrays.items()}
        zipped = {"a.npz": npz(arrays, method)} if method is not None else None
        becomes_dataset_or_line(tmp_path, zipped or files or {"a.npy": b""}, harm)


# TFRecords.
def varint(number: int) -> bytes:
    """A number as protocol buffers have it."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, wire: int, content: bytes, length: int | None = None) -> bytes:
    """A field, whose length may be a lie."""
    stated = varint(len(content) if length is None else length) if wire == 2 else b""
    return varint(number << 3 | wire) + stated + content


VARINTS = st.one_of(st.integers(0, 300), st.sampled_from([2**31, 2**62, 2**64 - 1]))
WORDS = [PNG, b"\x01", b"cat", b"\xff" * 11, b"image", b"label", b"shape", b"data", bytes(192), b"\3\x08\x08"]
CONTENTS = st.one_of(st.sampled_from(WORDS), st.binary(max_size=20))
FIELDS = st.sampled_from([1, 1, 2, 3, 9]), st.sampled_from([2, 2, 2, 2, 0, 1, 5, 3])
MESSAGES = st.recursive(
    CONTENTS,
    lambda inner: st.lists(st.builds(field, *FIELDS, inner, OR_NOT | OR_NOT | VARINTS), max_size=4).map(b"".join),
    max_leaves=12,
)


def feature(name: str, kind: int, values: list[bytes]) -> bytes:
    """A feature of an example, well-formed."""
    listed = b"".join(field(1, 2, value) for value in values)
    return field(1, 2, field(1, 2, name.encode()) + field(2, 2, field(kind, 2, listed)))


KEYS = ["image/encoded", "image", "image/class/label", "label", "shape", "data", "height", "x\x1b[2J"]
KINDS = st.sampled_from([1, 1, 3, 3, 2])
FEATURES = st.builds(feature, st.sampled_from(KEYS), KINDS, st.lists(CONTENTS, max_size=3))
GOOD = [b"", feature("image", 1, [PNG]), feature("image", 1, [PNG]), feature("image/encoded", 1, [PNG])]
EXAMPLES = st.builds(
    lambda good, features: field(1, 2, b"".join([good, *features])),
    st.sampled_from(GOOD),
    st.lists(FEATURES, max_size=4),
)


@examples(few=40, many=2000)
def test_hostile_tfrecords(tmp_path: Path, count: int) -> None:
    """Their checksums are right before the harm."""
    crc = TFRecordWriter.masked_crc

    @search(count, st.lists(EXAMPLES | EXAMPLES | MESSAGES, min_size=1, max_size=3), st.booleans(), HARMS)
    def check(records: list[bytes], is_gzipped: bool, harm: tuple) -> None:
        content = b""
        for record in records:
            length = struct.pack("<Q", len(record))
            content += length + crc(length) + record + crc(record)
        becomes_dataset_or_line(tmp_path, {"train.tfrecord": gzip.compress(content) if is_gzipped else content}, harm)


@pytest.fixture(name="tree", scope="module")
def tree_fixture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """LMDB's tree of two levels."""
    files = [(b"%032d" % number, PNG + bytes(number * 100 % 4200)) for number in range(30)]
    folder = lmdb_of(tmp_path_factory.mktemp("tree"), files)
    with lmdb.open(str(folder), readonly=True) as environment:
        assert environment.stat()["depth"] == 2
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
        becomes_dataset_or_line(tmp_path, {"data.mdb": bytes(content)}, harm)


@examples(few=20, many=500)
def test_hostile_cifar(tmp_path: Path, count: int) -> None:
    hundred = " ".join(f"n\x1b{number}" for number in range(100)).encode()
    names = st.sampled_from([b"a b c d e f g h i j", hundred, hundred, b"cat", b"", b"a " * 10])

    @search(count, st.integers(0, 3), names, st.integers(0, 4), st.integers(0, 255))
    def check(kind: int, said: bytes, images: int, value: int) -> None:
        content = bytes([value]) * (images * (3073 + kind % 2) + kind // 2)
        of_ten = {"data_batch_1.bin": content, "batches.meta.txt": said}
        of_hundred = {"train.bin": content, "fine_label_names.txt": said, "coarse_label_names.txt": said}
        becomes_dataset_or_line(tmp_path, of_hundred if kind % 2 else of_ten)
