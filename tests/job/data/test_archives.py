import gzip
import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from job.data import archives, members
from job.data.images import Recipe, RejectedImageError, decode, prepare
from job.data.sources import open_source
from job.exits import BadDataError, JobError
from tests.job.some_images import (
    digits_fixture,  # noqa: F401
    folder_of,
    idx,
    jpeg,
    mnist,
    tar_of,
    zip_of,
)

FILES = [(f"b/{n}.jpg", jpeg(n)) for n in (2, 1)] + [("a/x.PNG", b"\x89PNG" * 50), ("notes.txt", b"no image")]
IMAGES = FILES[:3]


def read(path: Path) -> list[tuple[str, bytes]]:
    source = open_source(str(path))
    names = list(source.names())
    entries = list(source.entries())
    assert names == [name for name, _ in entries]
    return entries


@pytest.mark.parametrize(("make", "name"), [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tar.gz"), (tar_of, "a")])
def test_entries_come_in_the_archives_own_order_whatever_it_is_called(tmp_path, make, name):
    assert read(make(tmp_path / name, FILES)) == IMAGES


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_zips(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as archive:
        for name, content in FILES:
            archive.writestr(name, content)
    assert read(tmp_path / "a.zip") == IMAGES


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_with_long_names_and_dots(tmp_path, tar_format):
    name = "/".join(["./folder", "x" * 90, "y" * 90 + ".jpg"])
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as archive:
        for path, content in [(name, b"1"), ("./2.jpg", b"22")]:
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert read(tmp_path / "a.tar") == [(name[2:], b"1"), ("2.jpg", b"22")]


def test_names_that_are_not_utf_8_become_printable(tmp_path):
    assert read(tar_of(tmp_path / "a.tar", [("gr\udcfcn/1.jpg", b"1")])) == [("gr%fcn/1.jpg", b"1")]


def test_control_characters_in_names_become_visible(tmp_path):
    # A terminal would obey them, and a list of rejects with lines would have more of these than rejects.
    assert read(tar_of(tmp_path / "a.tar", [("a\x1b[2J\n\x7f\u2028/1.jpg", b"1")])) == [
        ("a%1b[2J%0a%7f%2028/1.jpg", b"1")
    ]


def test_what_follows_the_end_mark_is_not_left_out_in_silence(tmp_path):
    first, second = (tar_of(tmp_path / f"{name}.tar", [(f"{name}.jpg", b"1")]) for name in "ab")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(BadDataError, match="holds more behind its end mark"):
        read(joined)
    zeros = tmp_path / "zeros.tar"
    zeros.write_bytes(first.read_bytes() + bytes(100_000))
    assert read(zeros) == [("a.jpg", b"1")]


def test_backslashes_of_windows_separate_folders(tmp_path):
    assert read(zip_of(tmp_path / "a.zip", [("cats\\1.jpg", b"1")])) == [("cats/1.jpg", b"1")]


UNSAFE = [
    "../1.jpg",
    "a/../../1.jpg",
    "/etc/1.jpg",
    "..",
    "..\\1.jpg",
    "C:\\1.jpg",
    "\\\\host\\1.jpg",
    "a/../readme.txt",
]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_a_name_that_leads_outside_refuses_the_archive(tmp_path, make, name):
    source = open_source(str(make(tmp_path / "archive", [("1.jpg", jpeg(1)), (name, b"x")])))
    with pytest.raises(BadDataError) as error:
        list(source.names())
    assert f"leads out of it, {name!r}" in str(error.value)


def test_two_dots_in_a_name_are_no_harm(tmp_path):
    assert read(zip_of(tmp_path / "a.zip", [("a..b/1..2.jpg", b"1")])) == [("a..b/1..2.jpg", b"1")]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_devices_and_sparse_files_refuse_a_tar(tmp_path, kind):
    info = tarfile.TarInfo("innocent.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(BadDataError, match=r"'innocent.jpg', which is a link or a device"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_refuse_a_zip(tmp_path, mode):
    info = zipfile.ZipInfo("innocent.jpg")
    info.external_attr = (mode | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(BadDataError, match=r"'innocent.jpg', which is a link or a device"):
        read(tmp_path / "a.zip")


@pytest.mark.parametrize(("make", "name"), [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tar.gz")])
@pytest.mark.parametrize("again", ["b/1.jpg", "./b/1.jpg", "b//1.jpg", "b\\1.jpg"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_refuse_an_archive(tmp_path, make, name, again):
    path = make(tmp_path / name, [*((f"a/{n}.jpg", b"1") for n in range(200)), ("b/1.jpg", b"1"), (again, b"2")])
    with pytest.raises(BadDataError, match=rf"{name} has the entry 'b/1\.jpg' more than once"):
        list(open_source(str(path)).names())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_count_for_nothing_may_come_twice(tmp_path):
    twice = [("a/", b""), ("a/", b""), ("read.me", b""), ("read.me", b"")]
    assert read(zip_of(tmp_path / "a.zip", [*twice, *IMAGES])) == IMAGES


@pytest.mark.parametrize(("make", "name"), [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tar.gz")])
def test_archives_in_archives_are_not_opened(tmp_path, make, name):
    bomb = deflated(tmp_path / "bomb.zip", 3, 30 << 20).read_bytes()
    inner = tar_of(tmp_path / "inner.tar.gz", [("../up.jpg", b"x")]).read_bytes()
    path = make(tmp_path / name, [("bomb.zip", bomb), ("inner.tar.gz", inner), ("inner.png", inner), *IMAGES])
    assert read(path) == [("inner.png", inner), *IMAGES]
    with pytest.raises(RejectedImageError, match="no image of a kind that is read"):
        prepare(inner, Recipe(8, "center", "box", 3, 1))


def test_encryption_refuses_a_zip(tmp_path):
    data = bytearray(zip_of(tmp_path / "a.zip", [("secret.jpg", b"1")]).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(BadDataError, match=r"'secret.jpg', which is encrypted"):
        read(tmp_path / "a.zip")


def test_an_entry_may_not_be_larger_than_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "ENTRY_BYTES", 1000)
    for make, name in [(zip_of, "a.zip"), (tar_of, "a.tar"), (folder_of, "a")]:
        path = make(tmp_path / name, [("small.png", bytes(1000)), ("large.png", bytes(1001))])
        with pytest.raises(BadDataError, match=r"entry 'large.png' unpacks to 1001 bytes, more than the 1000"):
            read(path)


def deflated(path: Path, entries: int, entry_bytes: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(entries):
            archive.writestr(f"{number}.png", bytes(entry_bytes))
    return path


def test_what_is_read_counts_and_not_what_a_header_says(tmp_path):
    data = bytearray(deflated(tmp_path / "a.zip", 1, 100_000).read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = struct.pack("<I", 1000)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(BadDataError, match=r"'0.png' is truncated or damaged \(Bad CRC-32"):
        read(tmp_path / "a.zip")


def test_a_bomb_of_many_entries_goes_off_early(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ENTRY_BYTES", 1 << 20)
    path = deflated(tmp_path / "a.zip", 100, 1 << 20)
    opened = open_source(str(path)).entries()
    read_bytes = 0
    with pytest.raises(BadDataError, match=r"unpacks to more than 200 times its size \(at entry '\d+\.png'\)"):
        for _, content in opened:
            read_bytes += len(content)
    assert read_bytes <= 200 * path.stat().st_size < 40 << 20


def test_a_gzip_bomb_goes_off_although_it_is_no_image(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ENTRY_BYTES", 1 << 20)
    path = tar_of(tmp_path / "a.tar.gz", [("1.jpg", jpeg(1)), ("zeros.bin", bytes(64 << 20))])
    with pytest.raises(BadDataError, match=r"unpacks to more than 200 times its size \(at entry 'zeros.bin'\)"):
        list(open_source(str(path)).names())


def test_a_header_that_claims_gigabytes_for_itself_is_not_believed(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    first = tarfile.TarInfo("1.jpg").tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(first + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(BadDataError, match="a block of 8589934592 bytes"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize(("make", "name"), [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tgz")])
def test_a_truncated_archive_is_refused_wherever_it_was_cut(tmp_path, make, name):
    path = make(tmp_path / name, FILES)
    whole = path.read_bytes()
    # A tar is whole with its first end block; Python pads it to 10 KiB.
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 if name == "a.tar" else len(whole) - 1
    for cut in [*range(1, end, 97), *range(0, end, 512), end]:
        path.write_bytes(whole[:cut])
        with pytest.raises(BadDataError) as error:
            read(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(("make", "name"), [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tgz")])
def test_damage_never_shows_as_anything_but_a_clear_error(tmp_path, make, name):
    path = make(tmp_path / name, FILES)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), size=rng.integers(1, 12)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read(path)
        except JobError as error:
            refused += 1
            assert error.exit_code in (64, 65), error
    assert refused > 50


def test_a_damaged_zip_entry_is_named(tmp_path):
    path = zip_of(tmp_path / "a.zip", [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))])
    data = bytearray(path.read_bytes())
    data[data.index(jpeg(2)) + 300] ^= 255
    path.write_bytes(data)
    with pytest.raises(BadDataError, match=r"a.zip: entry '2.jpg' is truncated or damaged \(Bad CRC-32"):
        read(path)


def test_a_flipped_bit_behind_the_last_entry_of_a_tgz_is_found(tmp_path):
    path = tar_of(tmp_path / "a.tgz", FILES)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadDataError, match="CRC check failed"):
        list(open_source(str(path)).names())


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", bytes(100), b"\x89PNG\r\n\x1a\n" * 200, gzip.compress(b"a,b\n" * 999)],
    ids=["nothing", "text", "zeros", "image", "csv.gz"],
)
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BadDataError, match=r"a is no archive that can be packed"):
        read(tmp_path / "a")


@pytest.mark.parametrize("gz", [False, True])
def test_mnist_files_become_grey_images_in_a_folder_per_class(tmp_path, digits, gz):
    images, labels = digits
    mnist(tmp_path / "mnist", "train", images, labels, gz)
    mnist(tmp_path / "mnist", "t10k", images[:3], labels[:3], gz)
    source = open_source(str(tmp_path / "mnist"))
    assert source.channels == 1
    assert "train-images-idx3-ubyte" in source.note and "leaving out t10k-images" in source.note
    entries = list(source.entries())
    assert [name for name, _ in entries] == [f"{label}/{n:02d}.pgm" for n, label in enumerate(labels)]
    recipe = Recipe(28, "center", "lanczos", 1, 14)
    got = np.stack([decode(prepare(content, recipe), 1)[..., 0] for _, content in entries])
    np.testing.assert_array_equal(got, images)

    chosen = next((tmp_path / "mnist").glob("t10k-images*"))
    source = open_source(str(chosen))
    assert source.note == "" and source.name == chosen.name
    assert len(list(source.entries())) == 3


def test_mnist_files_without_labels(tmp_path, digits):
    mnist(tmp_path, "train", digits[0], None, gz=False)
    assert next(open_source(str(tmp_path)).names()) == "00.pgm"


def test_several_mnist_sets_and_none_for_training_need_a_choice(tmp_path, digits):
    mnist(tmp_path, "t10k", *digits, gz=False)
    mnist(tmp_path, "extra", *digits, gz=False)
    with pytest.raises(JobError, match=r"several MNIST sets: give one of extra-images.*, t10k-images") as error:
        open_source(str(tmp_path))
    assert error.value.exit_code == 64


@pytest.mark.parametrize("gz", [False, True])
def test_damaged_mnist_files_are_refused(tmp_path, digits, gz):
    images, labels = digits
    file = tmp_path / f"train-images-idx3-ubyte{'.gz' if gz else ''}"

    def refused(content: bytes, labels: np.ndarray, match: str) -> None:
        mnist(tmp_path, "train", images, labels, gz)
        file.write_bytes(gzip.compress(content) if gz else content)
        with pytest.raises(BadDataError, match=match):
            read(tmp_path)

    refused(idx(images)[:-1], labels, "has 783 bytes where 784 were promised" if gz else "is no whole MNIST image file")
    refused(idx(images) + b"\0", labels, "holds more than its 12 images")
    refused(idx(images)[:10], labels, "has 10 bytes where 16 were promised")
    refused(b"\0\0\x08\x03" + b"\xff" * 400, labels, "is no whole MNIST image file")
    refused(idx(images[:0]), labels[:0], "is no whole MNIST image file")
    refused(idx(labels), labels, "is no whole MNIST image file|16 were promised")
    refused(idx(images), labels[:-1], "does not go with its labels")
    if gz:
        mnist(tmp_path, "train", images, labels, gz)
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(BadDataError, match=r"cannot be read|truncated"):
            read(tmp_path)
