"""Sources of strangers, damaged and forged in any way: a dataset, or one line that says why not."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.source import members, open_source
from job.data.source.survey import survey
from job.exits import BadDataError, Exit, JobError
from job.progress import printable
from job.store import open_store
from tests.fuzzing import examples, search
from tests.job.packing import entries_of, images_of
from tests.job.some_images import encoded, folder_of, idx, jpeg, picture, png, tar_of, zip_of
from tests.job.some_tables import IMAGE, arrow_bytes, image_chunks, parquet_bytes, table

BAD, REQUEST, MISSING = Exit.BAD_DATA, Exit.BAD_REQUEST, Exit.MISSING_INPUT
MAKERS = {".zip": zip_of, ".tar": tar_of, ".tgz": tar_of, "": folder_of}
ONE = ("1.jpg", jpeg(1))
FILES = [*((f"b/{n}.jpg", jpeg(n)) for n in (2, 1)), ("a/x.PNG", b"\x89PNG" * 50), ("notes.txt", b"no image")]
PNG = encoded(picture(0, 8, 8))


def placed(tmp_path: Path, name: str, content: object) -> str:
    """A source of these bytes, these files, or as a function makes it; a word if there is no content."""
    path = tmp_path / name
    if content is None:
        return name
    (path.parent if path.suffix or callable(content) or isinstance(content, bytes) else path).mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path) if callable(content) else MAKERS[path.suffix](path, content)
    return str(tmp_path / name.split("/")[0])


def zipped(files: list[tuple[str, bytes]]) -> bytes:
    return zip_of(file := io.BytesIO(), files) and file.getvalue()


def deflated(entries: int, entry_bytes: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(entries):
            archive.writestr(f"{number}.png", bytes(entry_bytes))
    return file.getvalue()


def flipped(content: bytes, *places: int, bit: int = 1) -> bytes:
    """With a bit of these bytes flipped."""
    content = bytearray(content)
    for at in places:
        content[at] ^= bit
    return bytes(content)


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    """A header of a tar with any size: in base 256, as GNU writes what eleven octal digits cannot say."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")[-512:]


def tar_bytes(*files: tuple[str, bytes]) -> bytes:
    blocks = [header(name, size=len(content)) + content + bytes(-len(content) % 512) for name, content in files]
    return b"".join(blocks) + bytes(1024)


class Pipe(io.BytesIO):
    """Into a pipe, zipfile writes the sizes of entries behind them."""

    def tell(self) -> int:
        raise OSError


def zip_with(*names: str, file=io.BytesIO, zip64: bool = False, comment: bytes = b"") -> bytes:
    file = file()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=zip64) as entry:
                entry.write(PNG)
        archive.comment = comment
    return file.getvalue()


def npz_with(count: int) -> bytes:
    file = io.BytesIO()
    np.savez(file, images=np.zeros((count, 8, 8, 3), np.uint8))
    return file.getvalue()


def adjusted(stub: bytes, content: bytes) -> bytes:
    """A self-extracting zip whose offsets count from the beginning of the stub."""
    file = io.BytesIO(stub + content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("c.png", PNG)
    return file.getvalue()


def digits(gz: bool, images: bytes, labels: np.ndarray) -> list[tuple[str, bytes]]:
    """MNIST's two files, one of which may be damaged."""
    pair = (("images-idx3", images), ("labels-idx1", idx(labels)))
    return [(f"train-{k}-ubyte{'.gz' * gz}", gzip.compress(content) if gz else content) for k, content in pair]


def about(content: pa.Table, metadata: dict[str, str] | None = None) -> bytes:
    return parquet_bytes(content.replace_schema_metadata(metadata or {}))


def linked(name: str, target: str):
    def make(path: Path) -> None:
        (folder_of(path, [ONE, ("sub/2.jpg", b"2")]) / name).symlink_to(target)
        (path.parent / "outside.jpg").write_bytes(b"2")

    return make


def array_of_datasets(path: Path) -> None:
    """An array of `datasets` is an extension of lists."""
    features = datasets.Features({"image": datasets.Array3D((2, 2, 3), "uint8")})
    datasets.Dataset.from_list([{"image": np.zeros((2, 2, 3), np.uint8)}], features=features).to_parquet(path)


SECRET, TWO, LONG_ENTRY = zipped([("secret.jpg", b"1")]), zipped([ONE, ("2.jpg", jpeg(2))]), deflated(1, 100_000)
LIE = LONG_ENTRY.index(b"PK\x01\x02") + 24
LYING = LONG_ENTRY[:LIE] + struct.pack("<I", 1000) + LONG_ENTRY[LIE + 4 :]
SPARSE = bytearray(header("sparse.jpg", tarfile.GNUTYPE_SPARSE))
SPARSE[482], SPARSE[148:156] = 1, b"%06o\0 " % (sum(SPARSE) + 1 + 8 * 32 - sum(SPARSE[148:156]))
A, B = zip_with("a.png"), zip_with("b.png", "b2.png")
AA = zipped([(f"{kind}pfel/{n}.png", png(n)) for kind in ("AA", "BB") for n in range(2)])
DIGITS, CLASSES = np.random.default_rng(0).integers(0, 256, (12, 28, 28)), np.arange(12) % 5
TEXT, LISTS = pa.array(["https://example.com/1.jpg"]), pa.array([[[1, 2]]], pa.list_(pa.list_(pa.uint8())))
IMAGES = table(1)["image"]
TWICE = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "a"], "_type": "ClassLabel"}}}})}
LEFT_AND_RIGHT = parquet_bytes(pa.table({"left": IMAGES, "right": IMAGES}))
NULLS, LABELS = pa.table({"image": pa.nulls(100_000, IMAGE)}), parquet_bytes(table(2).select(["label"]))
WHOLE, STREAM = parquet_bytes(table(20)), arrow_bytes(table(20))
CHUNKS = image_chunks(WHOLE)
# The file gives its number of rows first, its group of rows last: in a varint of Thrift, of one byte, twice the number.
COUNTED = parquet_bytes(table(20).select(["image"]).replace_schema_metadata(), row_group_size=20)
FOOTER = range(len(COUNTED) - 8 - int.from_bytes(COUNTED[-8:-4], "little"), len(COUNTED) - 8)
COUNTS = [at for at in FOOTER if COUNTED[at] == 2 * 20]
LEADS_OUT = ["../1.jpg", "a/../../1.jpg", "/etc/1.jpg", "..", "..\\1.jpg", "C:\\1.jpg", "\\\\h\\1.jpg", "../x.txt"]
ARCHIVES = ("a.zip", "a.tar", "a.tgz")
ODD_KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE)

ROWS = [
    *((name, [ONE, (out, b"x")], f"leads out of it, {out!r}") for name in ARCHIVES for out in LEADS_OUT),
    *(("a.tar", header("l.jpg", k, link="/etc/passwd"), "'l.jpg', which is a link or a device") for k in ODD_KINDS),
    ("a.zip", flipped(SECRET, 6, SECRET.index(b"PK\x01\x02") + 8), "is encrypted, password required"),
    ("a.zip", LYING, "'0.png' is truncated or damaged (Bad CRC-32"),
    ("a.tar", header("1.jpg") + header("l", b"L", 8 << 30) + bytes(4096), "a block of 8,589,934,592 bytes"),
    ("a.tar", header("1.jpg") + header("2.jpg", size=-1024) + bytes(4096), "a size of -1,024 bytes"),
    ("a.tar", header("1.jpg") + header("x.txt", size=-1) + bytes(4096), "'x.txt', which has a size of -1 bytes"),
    ("a.tar", header("1.jpg") + header("p", b"x", -(2**70)) + bytes(4096), f"a block of {-(2**70):,} bytes"),
    ("a.tar", bytes(SPARSE), "is truncated or damaged"),
    ("a.zip", flipped(TWO, TWO.index(jpeg(2)) + 300), "a.zip: entry '2.jpg' is truncated or damaged (Bad CRC-32"),
    # Behind the last entry.
    ("a.tgz", lambda path: path.write_bytes(flipped(tar_of(path, FILES).read_bytes(), -6)), "CRC check failed"),
    *(
        ("a", content, "a is damaged, or not a .zip")
        for content in (b"", b"hello", bytes(100), b"\x89PNG\r\n\x1a\n" * 200, gzip.compress(b"a,b\n" * 999))
    ),
    ("joined.tar", 2 * tar_bytes(ONE), "holds more behind its end mark"),
    ("zeros.tar", tar_bytes(ONE) + bytes(100_000), 1),
    # Something before the first entry of a zip.
    ("joined.zip", A + B, f"has {len(A):,} bytes before its first entry: was it joined by `cat`, or is it self"),
    ("an-empty-one-behind.zip", A + zip_with(), f"has {len(A):,} bytes before its first entry"),
    ("stub.zip", b"#!/bin/sh\nexec unzip $0\n" + A, "has 24 bytes before its first entry"),
    ("adjusted.zip", adjusted(b"MZ" + bytes(998), A), "has 1,000 bytes before its first entry"),
    ("in-a-folder/joined.zip", A + B, f"has {len(A):,} bytes before its first entry"),
    ("joined.npz", npz_with(3) + npz_with(2), f"has {len(npz_with(3)):,} bytes before its first entry"),
    ("whole.zip", B, 2),
    ("piped.zip", zip_with("b.png", "b2.png", file=Pipe), 2),
    ("zip64.zip", zip_with("b.png", "b2.png", zip64=True), 2),
    ("comment.zip", zip_with("b.png", "b2.png", comment=b"PK\x03\x04"), 2),
    ("added-to.zip", adjusted(b"", A), 2),
    ("whole.npz", npz_with(2), 2),
    # Without the flag that says so, Linux and macOS write names in UTF-8; names in a code page of DOS could be any.
    ("a.zip", AA.replace(b"AApfel", b"\xc3\x84pfel"), (4, "BBpfel, Äpfel")),
    ("a.zip", AA.replace(b"AApfel", b"\x8eApfel"), "has names that are not in UTF-8: unpack it, and pack the folder"),
    *(
        ("mnist", digits(gz, images, labels), said)
        for gz in (False, True)
        for images, labels, said in (
            (idx(DIGITS)[:-1], CLASSES, "has 783 bytes where 784 were promised"),
            (idx(DIGITS)[:10], CLASSES, "has 10 bytes where 16 were promised"),
            (b"\0\0\x08\x03" + b"\xff" * 400, CLASSES, "is not a complete MNIST image file"),
            (idx(DIGITS[:0]), CLASSES[:0], "is not a complete MNIST image file"),
            (idx(DIGITS), CLASSES[:-1], "does not go with its labels"),
            (idx(DIGITS) + b"0", CLASSES, "holds more than the"),
        )
    ),
    *(
        (name, files, f"holds no images: {said}")
        for name in (*ARCHIVES, "a")
        for files, said in (
            ([], "none of its names ends in .avif, .bmp, .gif"),
            ([("readme.txt", b"x")], "tables and texts hold names, not images"),
        )
    ),
    *(
        (word, None, (MISSING, "nothing at"))
        for word in ("nowhere", "nowhere.zip", "file:///no/a.zip", "~/nowhere/at/all")
    ),
    ("ftp://host/a.zip", None, (REQUEST, "ftp")),
    *(
        ("in", linked(name, target), f"{name!r}, which is not a file, or links to a folder or out")
        for name, target in (("4.jpg", "../outside.jpg"), ("other", "/etc"), ("other", "."), ("4.jpg", "gone.jpg"))
    ),
    ("in", lambda path: os.mkfifo(folder_of(path, [ONE]) / "4.jpg"), "'4.jpg', which is"),
    ("a.parquet", parquet_bytes(pa.table({"image_url": TEXT})), "and has image_url. A row has one"),
    ("a.parquet", parquet_bytes(pa.table({"image": LISTS})), "and has image. A row has one"),
    ("a.parquet", parquet_bytes(pa.table({"images": [IMAGES.to_pylist()]})), "and has images. A row has one"),
    ("a.parquet", parquet_bytes(pa.table({"a": TEXT, "n": LISTS})), "without a column of images, and has a, n. A"),
    ("a.parquet", array_of_datasets, "and no pixels as numbers or lists: write it by `datasets`"),
    ("a.parquet", LEFT_AND_RIGHT, (REQUEST, "several columns of images: left, right: write")),
    ("a.parquet", parquet_bytes(table(1, pa.array([2]))), "a.parquet has the label 2, and 2 classes: get it again"),
    ("a.parquet", about(table(1), TWICE), "has two classes of one name"),
    ("a.parquet", parquet_bytes(pa.table({"image": pa.array([], IMAGE)})), "holds no images"),
    ("a.parquet", parquet_bytes(NULLS, row_group_size=1 << 20), "promises 100,000 rows, and has 100,000 rows in"),
    ("a.parquet", WHOLE[:-1], "a.parquet is truncated or damaged (Parquet magic bytes not found in footer"),
    ("a.parquet", b"", "is truncated or damaged (Parquet file size is 0 bytes"),
    ("a.parquet", WHOLE[: CHUNKS[1].start] + WHOLE[CHUNKS[2].start :], "is truncated or dam"),
    ("b.arrow", STREAM[:-8], "b.arrow is truncated, or no Arrow file: its end is missing"),
    ("b.arrow", b"", "b.arrow is truncated or damaged"),
    ("b.arrow", arrow_bytes(table(20), pa.ipc.new_file)[:-10], "b.arrow is truncated or damaged"),
    # Files that differ in their classes, or lack the images.
    ("two", {"a.parquet": WHOLE, "b.parquet": about(table(2))}.items(), "b.parquet has other classes in the column"),
    ("two", {"a.parquet": WHOLE, "b.parquet": LABELS}.items(), "b.parquet lacks the column 'image' of images of o"),
    ("a.parquet", WHOLE[:-1] + b"E", "a.parquet is truncated or damaged (Could not read encrypted metadata"),
    ("a.parquet", flipped(COUNTED, COUNTS[0], bit=2), "promises 21 rows, and has 20 rows in its groups"),
    ("a.parquet", flipped(COUNTED, COUNTS[0], COUNTS[-1], bit=2), "promises 21 rows in a group, and has 20: it is"),
]


@pytest.mark.parametrize(("name", "content", "expected"), ROWS, ids=[f"{name} {said}" for name, _, said in ROWS])
def test_source_is_read_or_refused_in_one_line(tmp_path, name, content, expected):
    place = placed(tmp_path, name, content)
    code, said = {int: (expected, ""), str: (BAD, expected)}.get(type(expected), expected)
    if isinstance(code, Exit):
        with pytest.raises(JobError) as caught:
            source = open_source(place)
            survey(source)
            list(entries_of(source))
        assert (caught.value.exit_code, said in str(caught.value)) == (code, True), caught.value
        assert len(str(caught.value).splitlines()) == 1
    else:
        assert len(images_of(place)) == code
        assert ", ".join(survey(open_source(place)).classes) == said


def test_bombs_do_not_go_off(tmp_path, monkeypatch):
    bomb, inner = deflated(3, 30 << 20), tar_of(tmp_path / "inner.tgz", [("../up.jpg", b"x")]).read_bytes()
    files = [("bomb.zip", bomb), ("inner.tar.gz", inner), ("inner.png", inner), ONE]
    for name in ARCHIVES:
        assert images_of(placed(tmp_path, name, files)) == [("inner.png", inner), ONE]
    monkeypatch.setattr(members, "ENTRY_BYTES", limit := 1 << 20)
    too_large, zeros = f"has {limit + 1:,} bytes, more than the {limit:,}", bytes(8 << 20)
    large = [("small.png", bytes(limit)), ("large.png", bytes(limit + 1))]
    rows = pa.table({"image": pa.array([png(1), bytes(limit + 1)])})
    for name, content, said in (
        *((name, large, f"entry 'large.png' {too_large}") for name in ("a.zip", "a.tar", "a")),
        ("a.parquet", parquet_bytes(rows), f"entry 'a.parquet/0000001.png' {too_large}"),
        # One whose directory is honest, and one of whom nothing is known before it is unpacked.
        ("b.zip", deflated(10, limit), "b.zip unpacks to more than 200 times its size: do not trust"),
        ("b.tgz", [ONE, ("zeros.bin", zeros)], "b.tgz unpacks to more than 200 times its size: do not trust"),
    ):
        with pytest.raises(BadDataError, match=f"{tmp_path}/.*{re.escape(said)}"):
            images_of(placed(tmp_path, name, content))
    # What is not read may be as large as it likes.
    with zipfile.ZipFile(tmp_path / "beside.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", PNG)
        archive.writestr("masks.npy", zeros)
    assert images_of(tmp_path / "beside.zip") == [("0.png", PNG)]


@pytest.mark.parametrize("name", ARCHIVES)
def test_truncated_archives_are_refused(tmp_path, name):
    path = Path(placed(tmp_path, name, FILES))
    whole = path.read_bytes()
    # A tar is whole with its first end block; Python pads it to 10 KiB.
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 if name == "a.tar" else len(whole) - 1
    for cut in [*range(1, end, 97), *range(0, end, 512), end]:
        path.write_bytes(whole[:cut])
        with pytest.raises(BadDataError, match=str(path)):
            images_of(path)


SIZES = st.one_of(st.integers(-2048, 4096), st.sampled_from([-(2**70), -(2**63), 2**31, 2**62, 2**64, 2**70]))
KINDS = st.sampled_from([*b"0000000\x0012345678DKLNSVxgMX"]).map(lambda number: bytes([number]))
NAMES = ["1.png", "a/1.png", "b/2.png", "b/2.cls", "b/2.json", "dataset.json", "x.txt", "3.a.png", "c/", "../1.png"]
NAMES += ["\x1b[2J.png", "d\udcff.png"]
LABELS_OF = [b"", b"0", b"-1", b"7", b"99999", b"cat", b"[" * 99_999, b"null", b'{"label": [1]}']
LABELS_OF += [b'{"label": "\\ud800"}']
TABLES = [b'{"labels": [["a/1.png", 1], ["b/2.png", "x"]]}', b'{"labels": {"1.png": NaN}}', b'{"labels": [[[], 1]]}']
CONTENTS = st.one_of(st.just(PNG), st.sampled_from(LABELS_OF + TABLES), st.binary(max_size=600))
KEYS = ["size", "path", "linkpath", "mtime", "hdrcharset", "x"]
KEYS += [f"GNU.sparse.{end}" for end in ("size", "map", "major", "minor", "name", "realsize")]
VALUES = st.sampled_from(["-1", "-512", "1", "0", "9" * 30, "nan", "a.png", "1,2", "", "\udcff", "BINARY"])
RECORDS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3)
MEMBER = st.tuples(st.sampled_from(NAMES), KINDS, st.none() | SIZES, CONTENTS, RECORDS)


def hostile_tar(entries: list, end: int) -> bytes:
    out = b""
    for name, kind, size, content, records in entries:
        if records:
            lines = b""
            for key, value in records.items():
                line = f" {key}={value}\n".encode(errors="surrogateescape")
                digits = len(str(len(line) + 2))
                lines += b"%d" % (len(line) + digits) + line
            out += header("pax", b"x", len(lines)) + lines + bytes(-len(lines) % 512)
        out += header(name, kind, len(content) if size is None else size) + content + bytes(-len(content) % 512)
    return out + bytes(end)


def hostile_zip(entries: list, method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, _, _, content, _ in entries:
            archive.writestr(zipfile.ZipInfo(name.encode(errors="replace").decode()), content, method)
    return file.getvalue()


def hostile_tables() -> list[tuple[str, bytes]]:
    """Small files of each kind, in the encodings and codecs that differ."""
    texts, found = pa.array(["cat", "dog", None] * 4), list[tuple[str, bytes]]()
    codecs = [{}, {"use_dictionary": True, "compression": "snappy"}]
    codecs += [{"compression": "zstd", "data_page_version": "2.0"}, {"compression": "gzip", "write_page_index": True}]
    for content in (table(12, size=8), table(12, texts, 8), table(12, texts.dictionary_encode(), 8)):
        found += [(".parquet", parquet_bytes(content, row_group_size=5, **codec)) for codec in codecs]
        for new in (pa.ipc.new_stream, pa.ipc.new_file):
            found += [(".arrow", arrow_bytes(content, new, 5, compression=codec)) for codec in (None, "lz4", "zstd")]
    return found


TARS = st.builds(hostile_tar, st.lists(MEMBER, max_size=5), st.sampled_from([1024, 1024, 512, 0, 10240]))
METHODS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
ZIPS = st.builds(hostile_zip, st.lists(MEMBER, max_size=4), METHODS)
ANY = st.one_of(TARS, TARS, TARS.map(gzip.compress), ZIPS, st.binary(max_size=2000)).map(lambda data: (".tar", data))
DAMAGES = st.lists(st.tuples(st.integers(-3000, 1 << 13), st.integers(0, 255)), max_size=4)
CUTS = st.none() | st.none() | st.integers(0, 1 << 13)


@examples(few=40, many=800)
@pytest.mark.parametrize("kind", ["archives", "tables"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_source_makes_dataset_or_line(tmp_path: Path, count: int, kind: str) -> None:
    bucket = tmp_path / "bucket"

    @search(count, ANY if kind == "archives" else st.sampled_from(hostile_tables()), DAMAGES, CUTS)
    def check(base: tuple[str, bytes], damages: list[tuple[int, int]], cut: int | None) -> None:
        harmed = bytearray(base[1][:cut])
        for at, value in damages:
            if harmed:
                harmed[at % len(harmed)] = value
        # A new file each time: Arrow's are mapped into memory.
        path = tmp_path / f"a{base[0]}"
        path.unlink(missing_ok=True)
        path.write_bytes(harmed)
        in_place = PackRequest("", "x", 8, tars=(str(path),))
        for request in (PackRequest(str(path), "x", 8), *([in_place] if kind == "archives" else [])):
            shutil.rmtree(bucket, ignore_errors=True)
            try:
                index = pack(open_store(str(bucket)), request)
            except JobError as error:
                assert error.exit_code in (BAD, REQUEST)
                assert len(str(error).splitlines()) == 1
            else:
                assert index.images <= (12 if kind == "tables" else len(harmed) // 8)
                assert all(name == printable(name) for name in (index.source, *index.classes))
