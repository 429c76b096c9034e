"""Every object of a dataset, and of a node's cache of it, and every kind of damage: named, or mended."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from job.data.checks import verify_dataset
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.reading.cache import DecodedCache, ImageCache, ShardCache
from job.data.shards import OFFSETS_DTYPE, Shards, load_index
from job.exits import BadDataError, Exit, MissingInputError
from job.progress import Progress
from job.stop import NEVER
from job.store import Store, open_store
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.damages import DAMAGES, damaged, flip_a_bit, pairs, swapped
from tests.job.small_dataset import FarStore, write_dataset
from tests.job.some_images import encoded, jpeg, picture, tar_of, zip_of

KEY = "datasets/pets-16"
OTHER = "datasets/other-16"
READ = ("index.json", "shard-")
"""What the objects that a reader needs begin with."""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of three shards each, with rejected images."""
    folder = tmp_path_factory.mktemp("rot")
    for number, name in enumerate(("pets", "other")):
        files = [(f"{kind}/{n:02d}.jpg", jpeg(100 * number + n)) for kind in ("cat", "dog") for n in range(10)]
        source = zip_of(folder / f"{name}.zip", [*files, ("cat/bad.jpg", b""), ("dog/bad.jpg", b"")])
        pack(open_store(str(folder)), PackRequest(str(source), name, 16), shard_images=8)
    return folder


@pytest.fixture(scope="module")
def store(bucket: Path) -> Store:
    return open_store(str(bucket))


@pytest.fixture(scope="module")
def dataset(store: Store) -> Store:
    return store.sub(KEY)


@pytest.fixture(scope="module")
def keys(dataset: Store) -> list[str]:
    # No reader needs the preview, which `data show` makes anew.
    keys = [entry.key for entry in dataset.list() if entry.key != "preview.png"]
    kinds = [re.sub(r"\d", "", key) for key in keys]
    assert kinds == ["index.json", "rejects.jsonl", *["shard-.offsets", "shard-.tar"] * 3]
    return keys


@pytest.fixture(scope="module")
def pixels(store: Store, bucket: Path) -> np.ndarray:
    return read(store, bucket / "whole")


def opened_cache(store: Store, folder: Path, kind: str) -> ImageCache:
    where = store, load_index(store, KEY), folder
    return DecodedCache(*where, NEVER) if kind == "decoded" else ShardCache(*where, 1 << 30)


def read(store: Store, folder: Path, kind: str = "decoded") -> np.ndarray:
    """All images."""
    opened = opened_cache(store, folder, kind)
    try:
        return opened.read(np.arange(opened.index.images))
    finally:
        opened.close()


def blamed(store: Store) -> list[str]:
    """The keys that verifying names, which stand at the beginning of each line."""
    try:
        problems = verify_dataset(store, KEY)
    except BadDataError as error:
        problems = [str(error)]
    return [line.split()[0].rstrip(",").removeprefix(f"{store.uri_of(KEY)}/") for line in problems]


def refusal(store: Store, cache: Path, kind: str, pixels: np.ndarray) -> str:
    """Why the images cannot be read; nothing if they are all there, and right."""
    try:
        np.testing.assert_array_equal(read(store, cache, kind), pixels)
    except (BadDataError, MissingInputError) as error:
        return str(error)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return ""


def images_in(dataset: Store, key: str, data: bytes) -> list[bytes]:
    """The images of a tar with this content; of any other object all of it."""
    if not key.endswith(".tar"):
        return [data]
    table = np.frombuffer(dataset.read(key.replace(".tar", ".offsets")).data, OFFSETS_DTYPE)
    return [data[at : at + size] for at, size, *_ in table.tolist()]


def test_verifying_names_damaged_objects(bucket, store, dataset, keys):
    assert "as it was packed" in succeeded(ddpm_here("data", "verify", "pets", "--bucket", bucket))
    wrong: dict[object, list[str]] = {}
    for name, damage in DAMAGES.items():
        for key in keys:
            # A dataset without an index is none.
            if (name, key) == ("gone", "index.json"):
                continue
            with damaged(dataset, key, damage):
                if (found := blamed(store)) != [key]:
                    wrong[name, key] = found
    for one, other in pairs(keys):
        with swapped(dataset, one, other):
            if sorted(found := blamed(store)) != [one, other]:
                wrong[one, other] = found
    # Both rejected images of the same names.
    for key in {*keys} - {"rejects.jsonl"}:
        theirs = store.read(f"{OTHER}/{key}").data
        with damaged(dataset, key, lambda data, theirs=theirs: theirs):
            if (found := blamed(store)) != [key]:
                wrong["another dataset's", key] = found
    with damaged(dataset, "shard-00000.tar", lambda data: bytes(len(data))):
        (problem,) = verify_dataset(store, KEY)
        assert problem.endswith(f"; damaged images of this shard: {load_index(store, KEY).shards.images[0]}")
    for key, is_named in (("shard-00099.tar", True), ("pieces/00099.json", False)):
        dataset.create(key, b"x")
        if (found := blamed(store)) != [key] * is_named:
            wrong["no part of it", key] = found
        dataset.delete(key)
    assert wrong == {}


@pytest.mark.parametrize("kind", ["decoded", "shards"])
def test_reader_names_damaged_objects(store, dataset, keys, pixels, bucket, tmp_path, kind):
    """Of a shard, damage to an image; between images it leaves them as they are, and verifying names it."""
    far, wrong, harmless = FarStore(bucket), {}, set()
    for name in (*DAMAGES, "another dataset's"):
        for key in keys:
            theirs = store.read(f"{OTHER}/{key}").data
            damage = DAMAGES.get(name, lambda _, theirs=theirs: theirs)
            if damage is not None and damage(dataset.read(key).data) == dataset.read(key).data:
                continue
            before = dataset.read(key).data
            is_harmless = damage is not None and images_in(dataset, key, damage(before)) == images_in(
                dataset, key, before
            )
            harmless |= {name} if is_harmless else set()
            with damaged(dataset, key, damage):
                for where in (store, far):
                    said = refusal(where, tmp_path / "cache", kind, pixels)
                    name_of_it = where.uri_of(f"{KEY}/{key}") if damage or where is store else key
                    if (key, damage) == ("index.json", None):
                        name_of_it = f"no dataset at {where.uri}/{KEY}"
                    if bool(said) != (key.startswith(READ) and not is_harmless) or (said and name_of_it not in said):
                        wrong[name, key] = said
    assert (wrong, harmless) == ({}, {"first bit", "last byte", "all but a byte", "a byte more"})


def test_damaged_image_is_named(bucket, store, dataset, tmp_path):
    index = load_index(store, KEY)
    row, shard = 3, index.shards[1]
    image = index.shards[0].images + row
    offset, size_bytes, _, _ = ImageCache(store, index, tmp_path / "records").records([image])[0].tolist()

    def flip(data: bytes) -> bytes:
        at = offset + size_bytes // 2
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    named = f"{dataset.uri_of(shard.name)}, image {row} (at byte {offset}): it differs from the index"
    words = ("train", "--dataset", "pets", "--bucket", bucket, "--epochs", 2, *settings(train__batch_size="8"))
    verify = ("data", "verify", "pets", "--bucket", bucket)
    with damaged(dataset, shard.name, flip):
        assert named in refused(ddpm_here(*words, DDPM_CACHE=str(tmp_path / "cache")), Exit.BAD_DATA)
        assert named in refused(ddpm_here(*verify), Exit.BAD_DATA)
    with damaged(dataset, shard.name, lambda data: data[:100] + b"?" + data[101:]):
        line = refused(ddpm_here(*verify), Exit.BAD_DATA)
        assert f"{dataset.uri_of(shard.name)} differs from the index, but all its images are intact" in line
    with damaged(dataset, shard.name, lambda data: data[: offset + 1]):
        assert named in refused(ddpm_here(*verify), Exit.BAD_DATA)


@pytest.mark.parametrize(
    ("kind", "kept"), [("decoded", {"images", "checksums", "offsets"}), ("shards", {"shard-.tar", "offsets"})]
)
def test_corrupt_cache_is_repaired(bucket, store, pixels, tmp_path, kind, kept):
    far, cache = FarStore(bucket), tmp_path / "cache"
    np.testing.assert_array_equal(read(far, cache, kind), pixels)
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.stat().st_size)
    assert {re.sub(r"\d", "", path.name) for path in files} == kept
    for name, damage in DAMAGES.items():
        for path in files:
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage(path.read_bytes()))
            np.testing.assert_array_equal(read(far, cache, kind), pixels, err_msg=f"{name} of {path.name}")


def test_corrupt_image_is_fetched_anew(gcs_bucket, tmp_path):
    files = [(f"{n}.jpg", jpeg(n)) for n in range(8)]
    open_store(gcs_bucket).upload(tar_of(tmp_path / "a.tar", files), "a.tar")
    index = pack(store := open_store(str(tmp_path / "bucket")), PackRequest("", "pets", 16, tars=(gcs_bucket,)))
    cache = ShardCache(store, index, tmp_path / "cache", 1 << 30)
    whole, path = cache.read(np.arange(8)), tmp_path / "cache" / "shards" / "shard-00000.tar"
    for offset, size_bytes, *_ in cache.records(np.arange(8)).tolist():
        # Nothing in a JPEG tells that a bit of it flipped.
        flip_a_bit(path, offset + size_bytes * 3 // 4)
        np.testing.assert_array_equal(cache.read(np.arange(8)), whole)
        assert path.read_bytes() == (tmp_path / "a.tar").read_bytes()
    cache.close()


def test_images_packed_wrong_are_named(tmp_path, monkeypatch):
    """Hashes are right, images are not; nor are those of a table that is about another tar."""
    good, wide, other = encoded(picture(1, 8, 8)), encoded(picture(1, 8, 9)), encoded(picture(2, 8, 8))
    files = iter([good, good[:99], wide, jpeg(1), *[other] * 4])
    written = write_dataset(str(tmp_path), tmp_path / "..", (4, 4), encode=lambda _: next(files))
    first, second = written.index.shards
    table, where = (tmp_path / written.key / first.offsets_name).read_bytes(), f"{tmp_path}/{written.key}"
    (tmp_path / written.key / second.offsets_name).write_bytes(table)
    shards = (first, second.model_copy(update={"offsets_sha256": first.offsets_sha256}))
    index = written.index.model_copy(update={"shards": Shards.of(shards)})
    (tmp_path / written.key / "index.json").write_bytes(index.to_json())
    done: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda _, images: done.append(images))
    problems = verify_dataset(written.bucket, written.key)
    assert [
        re.sub(r" \(at byte \d+\)", "", problem).removesuffix(": restore it, or pack the dataset again")
        for problem in problems
    ] == [
        f"{where}/shard-00000.tar, image 1: an image is damaged, or not a PNG",
        f"{where}/shard-00000.tar, image 2: it is 8×9 pixels in a dataset of 8×8",
        f"{where}/shard-00000.tar, image 3: an image is damaged, or not a PNG",
        *(f"{where}/shard-00001.tar, image {row}: it differs from the index" for row in range(4)),
    ]
    assert done == [*range(1, 9)]
    with pytest.raises(MissingInputError):
        verify_dataset(written.bucket, "datasets/other-16")
