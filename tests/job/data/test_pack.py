import io
import json

import google_crc32c
import numpy as np
import pytest
from PIL import Image

import job.data.pack
from job.data.shards import OFFSETS_DTYPE, load_index
from job.data.verify import verify_dataset
from job.exits import BadDataError, BadRequestError, DiskFullError, JobError, MissingInputError
from job.store import open_store
from tests.job.packing import FILES, KEY, SHARD_BYTES, objects, packed, source_fixture, undisturbed_fixture  # noqa: F401
from tests.job.some_images import (
    digits_fixture,  # noqa: F401
    encoded,
    folder_of,
    jpeg,
    mnist,
    picture,
    tar_of,
    zip_of,
)


def test_webdataset_reads_the_same_pixels_and_classes(tmp_path, source):
    import webdataset

    index = packed(tmp_path, source)
    assert len(index.shards) == 4
    urls = [str(tmp_path / KEY / shard.name) for shard in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(60)]
    for (name, content), sample in zip(FILES, samples, strict=True):
        image = Image.open(io.BytesIO(content)).crop((0, 4, 40, 44)).resize((16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(sample["png"], np.asarray(image))
        assert index.classes[sample["cls"]] == name.split("/")[0]


def test_without_classes_there_are_only_images(tmp_path, source):
    import webdataset

    index = packed(tmp_path, source, classes=False)
    assert index.classes == ()
    urls = [str(tmp_path / KEY / shard.name) for shard in index.shards]
    assert {key for sample in webdataset.WebDataset(urls, shardshuffle=False) for key in sample if key[0] != "_"} == {
        "png"
    }


def test_the_offsets_point_to_the_images_and_the_index_says_how_they_were_made(tmp_path, source):
    index = packed(tmp_path, source, crop="1,2,30,40", resize_filter="box", licence="CC0-1.0")
    assert (index.images, index.classes, index.crop, index.resize_filter) == (60, ("cats", "dogs"), "1,2,30,40", "box")
    assert (index.source, index.licence, index.size, index.channels) == ("pets.zip", "CC0-1.0", 16, 3)
    assert index == load_index(open_store(str(tmp_path)), KEY)
    labels = []
    for shard in index.shards:
        tar = (tmp_path / KEY / shard.name).read_bytes()
        assert SHARD_BYTES <= len(tar) < SHARD_BYTES + 5000 or shard == index.shards[-1]
        table = np.fromfile(tmp_path / KEY / shard.offsets_name, OFFSETS_DTYPE)
        assert len(table) == shard.images
        for offset, size, label, crc32c in table.tolist():
            assert google_crc32c.value(tar[offset : offset + size]) == crc32c
            assert tar[offset : offset + 4] == b"\x89PNG"
            assert tar[offset + size - 8 : offset + size - 4] == b"IEND"
            labels.append(label)
    assert labels == [0] * 30 + [1] * 30
    assert verify_dataset(open_store(str(tmp_path)), KEY) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_the_bytes_do_not_depend_on_threads(tmp_path, source, undisturbed, threads):
    packed(tmp_path, source, threads=threads)
    assert objects(tmp_path) == undisturbed
    assert not any("packing" in key for key in undisturbed)


def test_a_folder_a_zip_and_a_tar_of_the_same_images_are_the_same_dataset(tmp_path, source):
    sources = [source, folder_of(tmp_path / "pets", FILES), tar_of(tmp_path / "pets.tgz", FILES)]
    indices = [packed(tmp_path / f"bucket-{n}", path) for n, path in enumerate(sources)]
    assert len({index.dataset_id for index in indices}) == 1
    assert len({index.source_sha256 for index in indices}) == 1
    other = packed(tmp_path / "other", zip_of(tmp_path / "b.zip", [*FILES[:-1], ("dogs/999.jpg", FILES[-1][1])]))
    assert other.dataset_id == indices[0].dataset_id
    assert other.source_sha256 != indices[0].source_sha256


def test_from_bucket_to_bucket(tmp_path, source, undisturbed, gcs_bucket):
    open_store(gcs_bucket).upload(source, "in/pets.zip")
    packed(gcs_bucket, f"{gcs_bucket}/in/pets.zip")
    assert objects(gcs_bucket) == undisturbed
    assert verify_dataset(open_store(gcs_bucket), KEY) == []


def test_mnist_is_packed_grey(tmp_path, digits):
    mnist(tmp_path / "mnist", "train", *digits, gz=True)
    index = packed(tmp_path, tmp_path / "mnist", size=28)
    assert (index.channels, index.classes) == (1, ("0", "1", "2", "3", "4", "5", "9"))
    assert index.source == "train-images-idx3-ubyte.gz"
    assert verify_dataset(open_store(str(tmp_path)), "datasets/small-28") == []
    assert packed(tmp_path / "colour", tmp_path / "mnist", size=28, channels=3).channels == 3


def test_rejected_images_are_counted_and_named(tmp_path):
    good = encoded(picture(1))
    files = [("1.png", good), ("2.png", b"no image"), ("3.png", good[:-400]), ("4.png", encoded(picture(1, 7, 50)))]
    files += [("5.png", good), ("6.jpg", b"")]
    index = packed(tmp_path, zip_of(tmp_path / "a.zip", files), max_bad=4)
    assert (index.images, index.rejected_images) == (2, 4)
    lines = [json.loads(line) for line in objects(tmp_path)["rejects.jsonl"].splitlines()]
    assert [line["name"] for line in lines] == ["2.png", "3.png", "4.png", "6.jpg"]
    assert lines[2]["reason"] == "has 7×50 pixels, under 8 on its shorter side"


def test_too_many_rejects_end_the_packing_at_once(tmp_path):
    files = [(f"{n:04d}.png", b"no image") for n in range(2000)]
    read = []
    with pytest.raises(
        BadDataError, match=r"more than --max-bad=5 images cannot be used: '0000.png' is .*; and 3 more"
    ):
        packed(tmp_path, zip_of(tmp_path / "a.zip", files), max_bad=5, progress=lambda *done: read.append(done))
    assert read == [(n, 2000) for n in range(1, 6)]
    with pytest.raises(MissingInputError):
        load_index(open_store(str(tmp_path)), KEY)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(BadDataError, match=r"none of its images can be used: '1.png'"):
        packed(tmp_path, zip_of(tmp_path / "a.zip", [("1.png", b"no image")]))
    assert "index.json" not in objects(tmp_path)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"crop": "middle"}, 64),
        ({"size": 0}, 64),
        ({"resize_filter": "none"}, 64),
        ({"channels": 2}, 64),
        ({"classes": True}, 64),
        ({"source": "nowhere.zip"}, 66),
        ({"source": __file__}, 65),
    ],
)
def test_bad_requests_touch_nothing(tmp_path, options, code):
    source = zip_of(tmp_path / "a.zip", [("1.jpg", jpeg(1))])
    with pytest.raises(JobError) as error:
        packed(tmp_path / "bucket", **{"source": source, **options})
    assert error.value.exit_code == code
    assert not (tmp_path / "bucket").exists()


def test_a_dataset_that_is_there_is_not_packed_again(tmp_path, source, undisturbed):
    packed(tmp_path, source)
    with pytest.raises(BadRequestError, match=r"small-16 is there already: 60 images of pets.zip, crop center"):
        packed(tmp_path, source, crop="squash")
    assert objects(tmp_path) == undisturbed


def test_a_bucket_that_is_missing_shows_before_anything_is_packed(source, gcs_bucket, monkeypatch):
    monkeypatch.setattr(job.data.pack, "prepare", lambda *_: pytest.fail("packed"))
    with pytest.raises(MissingInputError, match="no bucket"):
        packed(f"{gcs_bucket}-not", source)


def test_a_full_disk_for_temporary_files(tmp_path, small_disk, monkeypatch):
    source = zip_of(tmp_path / "a.zip", [(f"{n}.png", encoded(picture(n, 256, 256))) for n in range(20)])
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(DiskFullError, match="free some space") as error:
        packed(tmp_path / "bucket", source, size=256, shard_bytes=64 << 20)
    assert error.value.exit_code == 74
    assert list(small_disk.iterdir()) == []
    assert not (tmp_path / "bucket" / "datasets" / "small-256" / "index.json").exists()


def test_a_full_disk_for_the_bucket(tmp_path, small_disk):
    source = zip_of(tmp_path / "a.zip", [(f"{n}.png", encoded(picture(n, 256, 256))) for n in range(20)])
    with pytest.raises(DiskFullError):
        packed(small_disk / "bucket", source, size=256, shard_bytes=300_000)
    with pytest.raises(MissingInputError):
        load_index(open_store(str(small_disk / "bucket")), "datasets/small-256")
