import numpy as np
import pytest

from job.data.shards import DatasetIndex, ShardWriter
from job.data.verify import verify_dataset
from job.exits import MissingInputError
from job.store import open_store
from tests.job.some_images import encoded, picture

KEY = "datasets/small-16"


def test_what_is_wrong_from_the_beginning_is_named(tmp_path):
    """Hashes are right, images are not; nor are those of a table that is about another tar."""
    bucket, good = open_store(str(tmp_path / "made")), encoded(picture(1, 16, 16))
    images = [(good, 0), (good[:99], 1), (encoded(picture(1, 16, 17)), 0), (good, 1)]
    writer, other = (ShardWriter(tmp_path / f"shard-{number:05d}.tar") for number in (0, 1))
    for number, (image, label) in enumerate(images):
        writer.add(f"{number:09d}", image, label)
        other.add(f"{number:09d}", good, label)
    shard, offsets = writer.finish()
    second, _ = other.finish()
    second = second.model_copy(update={"offsets_sha256": shard.offsets_sha256})
    for each in (shard, second):
        bucket.upload(tmp_path / each.name, f"{KEY}/{each.name}")
        bucket.create(f"{KEY}/{each.offsets_name}", offsets)
    index = DatasetIndex(
        name="small",
        size=16,
        channels=3,
        classes=("a", "b"),
        crop="center",
        resize_filter="box",
        source="made",
        source_sha256="0" * 64,
        shards=(shard, second),
    )
    bucket.create(f"{KEY}/index.json", index.to_json())
    done: list[tuple[int, int]] = []
    where = f"{bucket.uri}/{KEY}"
    tables = np.frombuffer(offsets, [("offset", "<u8"), ("rest", "V12")])["offset"]
    assert verify_dataset(bucket, KEY, lambda *progress: done.append(progress)) == [
        f"{where}/shard-00000.tar: image 1: an image is damaged, or none of PNG, JPEG, WebP and GIF",
        f"{where}/shard-00000.tar: image 2: it is 16×17 pixels in a dataset of 16×16",
        *(
            f"{where}/shard-00001.tar: image {row} is not where its table says (at byte {tables[row]})"
            for row in (1, 2, 3)
        ),
    ]
    assert done == [(n, 8) for n in range(1, 9)]
    with pytest.raises(MissingInputError):
        verify_dataset(bucket, "datasets/other-16")
