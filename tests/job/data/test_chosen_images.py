"""A few images of a dataset come back right, from any bucket, and without a shard being fetched."""

from __future__ import annotations

import numpy as np
import pytest
from job.data.chosen_images import ChosenImages

from job.data.shards import INDEX, DatasetIndex
from job.exits import BadDataError
from job.store import open_store
from tests.job.small_dataset import KEY, FarStore, write_dataset


@pytest.mark.parametrize("scheme", ["local", "gs"])
def test_they_are_those_that_were_packed(scheme, tmp_path, request):
    uri = str(tmp_path / "bucket") if scheme == "local" else request.getfixturevalue("gcs_bucket")
    written = write_dataset(uri, tmp_path)
    images = ChosenImages(open_store(uri), KEY, written.index, tmp_path / "cache")
    np.testing.assert_array_equal(images.labels, written.labels)
    for indices in ([0], [21, 3, 4, 5, 3], list(range(22))):
        np.testing.assert_array_equal(images.read(np.array(indices)), written.pixels[indices])


def test_no_shard_is_fetched(tmp_path):
    write_dataset(str(tmp_path / "bucket"), tmp_path)
    store = FarStore(tmp_path / "bucket")
    images = ChosenImages(store, KEY, DatasetIndex.load(store, f"{KEY}/{INDEX}"), tmp_path / "cache")
    images.read(np.arange(22))
    assert store.downloads == []
    assert not [*tmp_path.glob("cache/**/*.tar")]


def test_one_that_is_rotten_is_named(tmp_path):
    written = write_dataset(str(tmp_path / "bucket"), tmp_path)
    shard = tmp_path / "bucket" / KEY / "shard-00002.tar"
    data = bytearray(shard.read_bytes())
    images = ChosenImages(written.bucket, KEY, written.index, tmp_path / "cache")
    data[int(images._source.records[10]["offset"]) + 20] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    with pytest.raises(BadDataError, match=r"shard-00002\.tar, image 2 .* is not as it was packed"):
        images.read(np.array([0, 10]))
