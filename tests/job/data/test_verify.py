import hashlib

import numpy as np
import pytest

from job.data.pack import pack
from job.data.shards import OFFSETS_DTYPE, DatasetIndex, ShardWriter
from job.data.verify import verify_dataset
from job.exits import BadDataError, MissingInputError
from job.store import open_store
from tests.job.some_images import encoded, jpeg, picture, zip_of

KEY = "datasets/small-16"


@pytest.fixture
def dataset(tmp_path):
    files = [(f"{kind}/{n}.jpg", jpeg(n)) for kind in "ab" for n in range(10)] + [("a/bad.jpg", b"")]
    bucket = open_store(str(tmp_path / "bucket"))
    index = pack(bucket, str(zip_of(tmp_path / "a.zip", files)), "small", size=16, shard_bytes=40_000)
    assert len(index.shards) == 2
    return tmp_path / "bucket" / KEY


def problems(dataset) -> list[str]:
    return verify_dataset(open_store(str(dataset.parent.parent)), KEY)


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_sound_dataset_has_no_problems_and_every_image_is_looked_at(dataset):
    done = []
    bucket = open_store(str(dataset.parent.parent))
    assert verify_dataset(bucket, KEY, lambda *progress: done.append(progress)) == []
    assert done == [(n, 20) for n in range(1, 21)]


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("shard-00001.tar", lambda path: path.unlink(), "shard-00001.tar is missing"),
        ("shard-00001.tar", lambda path: path.write_bytes(b"x"), "shard-00001.tar has 1 bytes instead of"),
        ("shard-00000.tar", lambda path: flip(path, 700), "shard-00000.tar has sha256"),
        ("shard-00000.offsets", lambda path: path.unlink(), "shard-00000.offsets is missing"),
        ("shard-00000.offsets", lambda path: path.write_bytes(b""), "shard-00000.offsets has 0 bytes instead of"),
        ("shard-00000.offsets", lambda path: flip(path, 3), "shard-00000.offsets has sha256"),
        ("rejects.jsonl", lambda path: path.unlink(), "rejects.jsonl is missing"),
        ("rejects.jsonl", lambda path: flip(path, 3), "rejects.jsonl has sha256"),
    ],
)
def test_each_bad_object_is_named(dataset, name, damage, problem):
    damage(dataset / name)
    (found,) = problems(dataset)
    assert found.startswith(f"{dataset}/{problem}")


def test_all_bad_objects_are_named(dataset):
    flip(dataset / "shard-00000.tar", 700)
    flip(dataset / "shard-00000.offsets", 0)
    (dataset / "shard-00001.offsets").unlink()
    assert [line.split("/")[-1].split()[0] for line in problems(dataset)] == [
        "shard-00000.tar",
        "shard-00000.offsets",
        "shard-00001.offsets",
    ]


def _made(tmp_path, images: list[tuple[bytes, int]], wrong_table: bool = False) -> str:
    """A dataset with good hashes, whatever its images are."""
    bucket = open_store(str(tmp_path / "made"))
    writer = ShardWriter(tmp_path / "shard-00000.tar")
    for number, (image, label) in enumerate(images):
        writer.add(f"{number:09d}", image, label)
    shard, offsets = writer.finish()
    if wrong_table:
        table = np.frombuffer(offsets, OFFSETS_DTYPE).copy()
        table["bytes"][1] += 1
        offsets = table.tobytes()
        shard = shard.model_copy(update={"offsets_sha256": hashlib.sha256(offsets).hexdigest()})
    bucket.upload(writer.path, f"{KEY}/{shard.name}")
    bucket.create(f"{KEY}/{shard.offsets_name}", offsets)
    index = DatasetIndex(
        name="small",
        size=16,
        channels=3,
        classes=("a", "b"),
        crop="center",
        resize_filter="box",
        source="made",
        source_sha256="0" * 64,
        shards=(shard,),
    )
    bucket.create(f"{KEY}/index.json", index.to_json())
    return problems(tmp_path / "made" / KEY)


def test_images_that_are_wrong_from_the_beginning_are_named(tmp_path):
    good = encoded(picture(1, 16, 16))
    found = _made(tmp_path, [(good, 0), (good[:99], 1), (encoded(picture(1, 16, 17)), 0), (good, 2), (good, 1)])
    where = f"{tmp_path}/made/{KEY}/shard-00000.tar: image"
    assert found == [
        f"{where} 1: an image is damaged, or none of PNG, JPEG, WebP and GIF",
        f"{where} 2 has the shape (17, 16, 3) instead of (16, 16, 3)",
        f"{where} 3 has the class 2",
    ]


def test_offsets_that_do_not_fit_the_tar_are_named(tmp_path):
    good = encoded(picture(1, 16, 16))
    (found,) = _made(tmp_path, [(good, 0), (good, 1)], wrong_table=True)
    assert found.endswith("shard-00000.offsets does not say where the images of shard-00000.tar lie")


def test_no_dataset_and_no_index(dataset):
    bucket = open_store(str(dataset.parent.parent))
    with pytest.raises(MissingInputError):
        verify_dataset(bucket, "datasets/other-16")
    (dataset / "index.json").write_bytes(b"{}")
    with pytest.raises(BadDataError):
        verify_dataset(bucket, KEY)
