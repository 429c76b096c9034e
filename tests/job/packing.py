"""A small dataset that tests pack, stop, kill and compare."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import job.data.pack
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.shards import DatasetIndex
from job.data.source import open_source
from job.data.source.members import Source
from job.stop import Stop
from job.store import open_store
from tests.job.some_images import jpeg, zip_of

KEY = "datasets/small-16"
SHARD_IMAGES = 16
FILES = [(f"{kind}/{n:03d}.jpg", jpeg(100 * i + n)) for i, kind in enumerate(("cats", "dogs")) for n in range(30)]


def packed(
    bucket: str | Path,
    source: str | Path,
    *,
    shard_images: int | None = SHARD_IMAGES,
    stop_at: int | None = None,
    decoded: Iterator[int] | None = None,
    **options,
) -> DatasetIndex:
    """Packs the source as this module's dataset, or is stopped once so many images are decoded, which it counts."""
    stop, prepare = Stop(), job.data.pack.prepare
    decoded = decoded or count(1)

    def counted(*arguments):
        if next(decoded) == stop_at:
            stop.request("a test")
        return prepare(*arguments)

    request = PackRequest(str(source), "small", **{"size": 16, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.data.pack, "prepare", counted)
        return pack(open_store(str(bucket)), request, shard_images=shard_images, stop=stop)


def names_of(source: Source) -> Iterator[str]:
    """The names of a source's images, in order."""
    return (member.name for member in source.images())


def images_of(source: str | Path) -> list[tuple[str, bytes]]:
    """Names and contents of the images at a place, in order."""
    opened = open_source(str(source))
    entries = list(entries_of(opened))
    assert list(names_of(opened)) == [name for name, _ in entries]
    return entries


def entries_of(source: Source) -> Iterator[tuple[str, bytes]]:
    """The same with their contents."""
    return source.loaded(source.images())


def objects(bucket: str | Path) -> dict[str, bytes]:
    """Everything that lies in the dataset's folder."""
    store = open_store(str(bucket)).sub(KEY)
    return {entry.key: store.read(entry.key).data for entry in store.list()}


def committed(bucket: Path) -> dict[str, bytes]:
    """Without what an interrupted clearing-up may have left of the journal."""
    assert (bucket / KEY / "index.json").exists()
    return {key: content for key, content in objects(bucket).items() if not key.startswith("pieces/")}


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
