"""Archives of strangers, damaged and forged in any way: a dataset, or one line that says why not."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.exits import Exit, JobError
from job.progress import printable
from job.store import open_store
from tests.fuzzing import examples, search
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.some_images import encoded, picture, zip_of

PNG = encoded(picture(0, 8, 8))
NAMES = (
    "1.png",
    "a/1.png",
    "b/2.png",
    "b/2.cls",
    "b/2.json",
    "dataset.json",
    "x.txt",
    "3.a.png",
    "c/",
    "../1.png",
    "\x1b[2J.png",
    "d\udcff.png",
)
SIZES = st.one_of(st.integers(-2048, 4096), st.sampled_from([-(2**70), -(2**63), 2**31, 2**62, 2**64, 2**70]))
KINDS = st.sampled_from([*b"0000000\x0012345678DKLNSVxgMX"]).map(lambda number: bytes([number]))
LABELS = [b"", b"0", b"-1", b"7", b"99999", b"cat", b'{"label": "\\ud800"}', b'{"label": [1]}', b"[" * 99_999, b"null"]
TABLES = [b'{"labels": [["a/1.png", 1], ["b/2.png", "x"]]}', b'{"labels": {"1.png": NaN}}', b'{"labels": [[[], 1]]}']
CONTENTS = st.one_of(st.just(PNG), st.sampled_from(LABELS + TABLES), st.binary(max_size=600))
RECORDS = st.dictionaries(
    st.sampled_from(["size", "path", "linkpath", "mtime", "hdrcharset", "GNU.sparse.size", "GNU.sparse.map", "x"])
    | st.sampled_from(["GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.name", "GNU.sparse.realsize"]),
    st.sampled_from(["-1", "-512", "1", "0", "9" * 30, "nan", "a.png", "1,2", "", "\udcff", "BINARY"]),
    max_size=3,
)
MEMBER = st.tuples(st.sampled_from(NAMES), KINDS, st.none() | SIZES, CONTENTS, RECORDS)
DAMAGES = st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), max_size=3)
CUTS = st.none() | st.integers(0, 1 << 13)


def header(name: str, kind: bytes, size: int) -> bytes:
    """A header with any size: in base 256, as GNU writes what eleven octal digits cannot say."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")[-512:])
    if not 0 <= size < 8**11:
        block[124:136] = (size % 2**88 | (0xFF if size < 0 else 0x80) << 88).to_bytes(12)
    else:
        block[124:136] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def tar_bytes(members: list, end: int) -> bytes:
    out = b""
    for name, kind, size, content, records in members:
        padded = content + bytes(-len(content) % 512)
        if records:
            lines = b""
            for key, value in records.items():
                line = f" {key}={value}\n".encode(errors="surrogateescape")
                digits = len(str(len(line) + 2))
                lines += b"%d" % (len(line) + digits) + line
            out += header("pax", b"x", len(lines)) + lines + bytes(-len(lines) % 512)
        out += header(name, kind, len(content) if size is None else size) + padded
    return out + bytes(end)


def zip_bytes(members: list, method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, _, _, content, _ in members:
            archive.writestr(zipfile.ZipInfo(name.encode(errors="replace").decode()), content, method)
    return file.getvalue()


TARS = st.builds(tar_bytes, st.lists(MEMBER, max_size=5), st.sampled_from([1024, 1024, 512, 0, 10240]))
METHODS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
ZIPS = st.builds(zip_bytes, st.lists(MEMBER, max_size=4), METHODS)
ARCHIVES = st.one_of(TARS, TARS, TARS.map(gzip.compress), ZIPS, st.binary(max_size=2000))


class OneWay(io.RawIOBase):
    """A pipe: zipfile writes the sizes of its entries behind them."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.content += data
        return len(data)


def zip_with(*names: str, piped: bool = False, zip64: bool = False, comment: bytes = b"") -> bytes:
    file = OneWay() if piped else io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=zip64) as entry:
                entry.write(PNG)
        archive.comment = comment
    return bytes(file.content) if isinstance(file, OneWay) else file.getvalue()


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


A, B = zip_with("a.png"), zip_with("b.png", "b2.png")


@pytest.mark.parametrize(
    ("name", "content", "before_bytes"),
    [
        ("joined.zip", A + B, len(A)),
        ("an-empty-one-behind.zip", A + zip_with(), len(A)),
        ("stub.zip", b"#!/bin/sh\nexec unzip $0\n" + A, 24),
        ("adjusted.zip", adjusted(b"MZ" + bytes(998), A), 1000),
        ("in-a-folder/joined.zip", A + B, len(A)),
        ("joined.npz", npz_with(3) + npz_with(2), len(npz_with(3))),
        ("whole.zip", B, 0),
        ("piped.zip", zip_with("b.png", "b2.png", piped=True), 0),
        ("zip64.zip", zip_with("b.png", "b2.png", zip64=True), 0),
        ("comment.zip", zip_with("b.png", "b2.png", comment=b"PK\x03\x04"), 0),
        ("added-to.zip", adjusted(b"", A), 0),
        ("whole.npz", npz_with(2), 0),
    ],
    ids=lambda case: case if isinstance(case, str) else None,
)
def test_zip_with_something_before_it_is_refused(tmp_path, name, content, before_bytes) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path if path.parent == tmp_path else path.parent
    words = ("data", "pack", source, "x", "--size", 8, "--bucket", tmp_path / "bucket")
    if before_bytes:
        line = refused(ddpm_here(*words), Exit.BAD_DATA)
        assert f"has {before_bytes:,} bytes before its first entry" in line
        assert "joined by `cat`" in line and "self-extracting" in line
    else:
        assert "images   2 colour" in succeeded(ddpm_here(*words))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_in_zips_are_in_utf_8(tmp_path):
    """Without the flag that says so, as Linux and macOS write them; names in a code page of DOS could be any."""
    files = [(f"{kind}pfel/{number}.png", encoded(picture(number))) for kind in ("AA", "BB") for number in range(2)]
    for raw, kinds in ((b"\xc3\x84", ("BBpfel", "Äpfel")), (b"\x8eA", None)):
        path = zip_of(tmp_path / "a.zip", files)
        path.write_bytes(path.read_bytes().replace(b"AApfel", raw + b"pfel"))
        if kinds:
            index = pack(open_store(str(tmp_path / "b")), PackRequest(str(path), "x", 8))
            assert index is not None and index.classes == kinds
        else:
            said = refused(ddpm_here("data", "pack", path, "y", "--size", 8, "--bucket", tmp_path / "b"), Exit.BAD_DATA)
            assert "has names that are not in UTF-8: unpack it, and pack the folder" in said


@examples(few=20, many=600)
def test_hostile_archive_makes_dataset_or_line(tmp_path: Path, count: int) -> None:
    path, bucket = tmp_path / "a.tar", tmp_path / "bucket"

    @search(count, ARCHIVES, DAMAGES, CUTS)
    def check(data: bytes, damages: list[tuple[int, int]], cut: int | None) -> None:
        harmed = bytearray(data[:cut])
        for at, value in damages:
            if harmed:
                harmed[at % len(harmed)] = value
        path.write_bytes(harmed)
        for request in (PackRequest(str(path), "x", 8), PackRequest("", "x", 8, tars=(str(path),))):
            shutil.rmtree(bucket, ignore_errors=True)
            try:
                index = pack(open_store(str(bucket)), request)
            except JobError as error:
                assert error.exit_code in (Exit.BAD_DATA, Exit.BAD_REQUEST)
                assert len(str(error).splitlines()) == 1
            else:
                assert index.images <= len(harmed) // 8
                assert all(name == printable(name) for name in (index.source, *index.classes))
