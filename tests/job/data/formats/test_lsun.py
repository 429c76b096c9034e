"""LSUN's LMDB, written by the package lmdb: the keys and images that the test itself has put there."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from job.exits import Exit
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.data.formats.reading import line_of, opened
from tests.job.packing import entries_of, names_of
from tests.job.some_images import encoded, jpeg, picture, png

PAGE_BYTES = 4096


def webp(seed: int) -> bytes:
    """A picture as LSUN has it: lossy, with a shorter side of 256 pixels there."""
    return encoded(picture(seed), "WEBP", quality=75)


def sha1(number: int) -> bytes:
    """The key of an image."""
    return hashlib.sha1(b"%d" % number).hexdigest().encode()


def lsun(folder: Path, images: int = 300, value=webp) -> Path:
    """A category as LSUN's scripts store it, below SHA-1 keys, in an order of its own."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 30, sync=False) as environment:
        for start in range(0, images, 100):
            with environment.begin(write=True) as transaction:
                for number in range(start, min(start + 100, images)):
                    transaction.put(sha1(number), value(number))
    return folder


def test_lsun_is_read_as_it_was_written(tmp_path: Path) -> None:
    """One of several levels of pages, of which images were deleted, with values in leaves and on pages of their own."""
    folder = lsun(tmp_path / "church_outdoor_train_lmdb", 1000, lambda number: webp(number % 50))
    with lmdb.open(str(folder), map_size=1 << 30, sync=False) as environment:
        for number in range(0, 1000, 7):
            with environment.begin(write=True) as transaction:
                transaction.delete(sha1(number))
        with environment.begin(write=True) as transaction:
            transaction.put(b"0tiny", b"RIFF\0\0\0\0WEBP")
            transaction.put(b"1large", webp(1) + bytes(1 << 20))
        assert environment.stat()["depth"] > 1
    expected = {sha1(number).decode(): webp(number % 50) for number in range(1000) if number % 7}
    expected |= {"0tiny": b"RIFF\0\0\0\0WEBP", "1large": webp(1) + bytes(1 << 20)}
    source = opened(folder)
    assert [(f"{key}.webp", value) for key, value in sorted(expected.items())] == list(entries_of(source))
    assert [found.size_bytes for found in source.images(labelled=True)] == [
        len(value) for _, value in sorted(expected.items())
    ]
    chosen = opened(folder / "data.mdb")
    assert list(names_of(chosen)) == [f"{key}.webp" for key in sorted(expected)]
    # Without the list of free pages: their space is lost, and nothing else.
    whole = bytearray((folder / "data.mdb").read_bytes())
    for meta in (0, PAGE_BYTES):
        assert struct.unpack_from("<Q", whole, meta + 16 + 24 + 40)[0] != 2**64 - 1
        struct.pack_into("<H4QQ", whole, meta + 16 + 24 + 6, 0, 0, 0, 0, 0, 2**64 - 1)
    (folder / "data.mdb").write_bytes(whole)
    assert list(names_of(opened(folder))) == list(names_of(chosen))


def test_categories_and_splits_are_told_by_their_folders(tmp_path: Path) -> None:
    for name, images in [("church_outdoor_train_lmdb", 5), ("church_outdoor_val_lmdb", 3)]:
        lsun(tmp_path / "lsun" / name, images, value=png)
    source = opened(tmp_path / "lsun")
    assert (source.split, len(list(source.images()))) == ("train", 5)
    assert source.other_splits == ("val",)
    assert all(found.label == "" for found in source.images(labelled=True))
    folders = [name.split("/")[0] for name in names_of(opened(tmp_path / "lsun", "val"))]
    assert folders == ["church_outdoor_val_lmdb"] * 3
    faces = lmdb.open(str(tmp_path / "faces.lmdb"), subdir=False, map_size=1 << 20)
    with faces, faces.begin(write=True) as transaction:
        transaction.put(struct.pack(">I", 7), jpeg(7))
    assert list(entries_of(opened(tmp_path / "faces.lmdb"))) == [("faces.lmdb/00000007.webp", jpeg(7))]


def test_the_preset_packs_what_lsun_ships(tmp_path: Path) -> None:
    """WebP with a shorter side of 256 pixels, of which the centre is taken."""
    folder = lsun(tmp_path / "bedroom_val_lmdb", 3, lambda seed: encoded(picture(seed, 384, 256), "WEBP", quality=75))
    said = succeeded(ddpm_here("data", "pack", folder, "lsun-256", "--bucket", tmp_path / "b"))
    assert "images   3 colour, 256×256" in said and "from bedroom_val_lmdb, crop center" in said
    assert "classes" not in said
    with tarfile.open(tmp_path / "b/datasets/lsun-256-256/shard-00000.tar") as shard:
        made = [Image.open(io.BytesIO(shard.extractfile(member).read())) for member in shard]
    for image, seed in zip(made, sorted(range(3), key=sha1), strict=True):
        value = encoded(picture(seed, 384, 256), "WEBP", quality=75)
        np.testing.assert_array_equal(image, Image.open(io.BytesIO(value)).crop((64, 0, 320, 256)))


def test_what_is_not_lsun_is_refused(tmp_path: Path) -> None:
    folder = lsun(tmp_path / "in", 10, value=png)
    with zipfile.ZipFile(tmp_path / "church_outdoor_train_lmdb.zip", "w") as archive:
        archive.write(folder / "data.mdb", "church_outdoor_train_lmdb/data.mdb")
    said = line_of(tmp_path / "church_outdoor_train_lmdb.zip", Exit.BAD_REQUEST)
    assert "holds LMDB: copy or unzip its folder to a disk, and pack that" in said
    words = ("data", "pack", folder, "x", "--size", 8, "--labels", ":x", "--bucket", tmp_path / "b")
    assert "none of its images has a label 'x'" in refused(ddpm_here(*words), Exit.BAD_REQUEST)
    lsun(tmp_path / "pickles", value=lambda number: pickle.dumps({"image": number}))
    lsun(tmp_path / "empty", 0)
    several = tmp_path / "several"
    with lmdb.open(str(several), max_dbs=2) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"key", png(1), db=environment.open_db(b"images", transaction))
    for place, part in [
        ("pickles", "more than --max-bad=100 images cannot be used: "),
        ("empty", "holds no images"),
        ("several", "several: none of its images can be used: 'images.webp' is damaged at its beginning, or has an un"),
    ]:
        assert part in refused(ddpm_here(*words[:2], tmp_path / place, "x", *words[4:6], *words[8:]), Exit.BAD_DATA)
    whole = (folder / "data.mdb").read_bytes()
    for content, part in [
        (bytes(8192), "is damaged, or not LMDB of a 64-bit machine ("),
        (b"Standard Jet DB", "is damaged, or not LMDB"),
        (whole.replace(struct.pack("<QI", 1 << 30, PAGE_BYTES), struct.pack("<QI", 1 << 30, 0)), "is damaged"),
    ]:
        (folder / "data.mdb").write_bytes(content)
        assert part in line_of(folder)


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lsun(tmp_path / "in", 1)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert re.search(
        r"in is LMDB, which needs more than is installed .*lmdb.* pip install .*\[lsun\]",
        line_of(folder, Exit.BAD_REQUEST),
    )


def test_truncated_and_forged_trees_are_refused(tmp_path: Path) -> None:
    folder = lsun(tmp_path / "in", 400, value=lambda number: webp(number % 9))
    path = folder / "data.mdb"
    whole = path.read_bytes()
    for cut in (0, 15, 4095, 4096, 8191, len(whole) // 3, len(whole) // 2, len(whole) - 40 * PAGE_BYTES):
        path.write_bytes(whole[:cut])
        assert "data.mdb" in line_of(path), cut
    # The newer meta page of the two, and its root.
    meta = max((0, PAGE_BYTES), key=lambda at: struct.unpack_from("<Q", whole, at + 16 + 128)[0])
    root_at, entries_at = meta + 16 + 24 + 48 + 40, meta + 16 + 24 + 48 + 32
    (root,) = struct.unpack_from("<Q", whole, root_at)
    page = root * PAGE_BYTES
    (node,) = struct.unpack_from("<H", whole, page + 16)
    for at, value, said in [
        (root_at, struct.pack("<Q", 1 << 50), "is damaged"),
        (entries_at, struct.pack("<Q", 401), "walked 400 entries, record says 401"),
        # A branch that is its own first child.
        (page + node, struct.pack("<HHH", root & 0xFFFF, root >> 16, 0), "is damaged"),
        (page + 16, struct.pack("<H", 4095), "is damaged"),
        (page + 12, struct.pack("<H", 9), "is damaged"),
        # Numbers as keys have another order.
        (entries_at - 28, struct.pack("<H", 8), "is damaged"),
    ]:
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        assert said in line_of(path), said
    path.write_bytes(whole)
    assert [content for _, content in entries_of(opened(path))] == [
        webp(number % 9) for number in sorted(range(400), key=sha1)
    ]
