"""A small dataset that tests pack, stop, kill and compare."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.data.pack import pack
from job.data.shards import DatasetIndex
from job.stop import Stop
from job.store import open_store
from tests.job.some_images import jpeg, zip_of
from tests.job.stops import stop_after

KEY = "datasets/small-16"
SHARD_BYTES = 40_000
FILES = [(f"{kind}/{n:03d}.jpg", jpeg(100 * i + n)) for i, kind in enumerate(("cats", "dogs")) for n in range(30)]


def packed(bucket: str | Path, source: str | Path, **options) -> DatasetIndex:
    """Packs the source as this module's dataset."""
    return pack(open_store(str(bucket)), str(source), "small", **{"size": 16, "shard_bytes": SHARD_BYTES, **options})


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


def stop_at(image: int) -> Stop:
    """Stops at this image; the first look at the names asks as well."""
    return stop_after(len(FILES) + image)


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
