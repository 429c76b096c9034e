"""A small dataset that tests pack, stop, kill and compare."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.data.pack import PackRequest, pack
from job.data.shards import DatasetIndex
from job.stop import Stop
from job.store import open_store
from tests.job.some_images import jpeg, zip_of

KEY = "datasets/small-16"
SHARD_BYTES = 40_000
FILES = [(f"{kind}/{n:03d}.jpg", jpeg(100 * i + n)) for i, kind in enumerate(("cats", "dogs")) for n in range(30)]


def packed(
    bucket: str | Path, source: str | Path, *, shard_bytes: int = SHARD_BYTES, stop_at: int = 0, **options
) -> DatasetIndex:
    """Packs the source as this module's dataset, or is stopped once so many images, or bytes of tars, are read."""
    stop = Stop()
    told = options.pop("progress", lambda *_: None)

    def progress(done: int, total: int, images: int) -> None:
        told(done, total, images)
        if stop_at and images >= stop_at:
            stop.request("a test")

    request = PackRequest(str(source), "small", **{"size": 16, **options})
    store = open_store(str(bucket))
    return pack(store, request, shard_bytes=shard_bytes, stop=stop, progress=progress)


def objects(bucket: str | Path) -> dict[str, bytes]:
    """Everything that lies in the dataset's folder."""
    store = open_store(str(bucket)).sub(KEY)
    return {entry.key: store.read(entry.key).data for entry in store.list()}


def committed(bucket: Path) -> dict[str, bytes]:
    """Without what an interrupted clearing-up may have left of the journal."""
    assert (bucket / KEY / "index.json").exists()
    return {key: content for key, content in objects(bucket).items() if not key.startswith("packing/")}


def written(shard: Path) -> tuple[int, int]:
    """Changes whenever the object is written anew, be it with the same bytes."""
    return shard.stat().st_ino, shard.stat().st_mtime_ns


@pytest.fixture(name="source", scope="module")
def source_fixture(tmp_path_factory) -> Path:
    """A zip of the images."""
    return zip_of(tmp_path_factory.mktemp("source") / "pets.zip", FILES)


@pytest.fixture(name="undisturbed", scope="module")
def undisturbed_fixture(source, tmp_path_factory) -> dict[str, bytes]:
    """The dataset as it is when nothing happens."""
    bucket = tmp_path_factory.mktemp("undisturbed")
    packed(bucket, source)
    return objects(bucket)
