"""Every object of a dataset, and of a node's cache of it, and every kind of damage: named, or mended."""

from __future__ import annotations

import re
import shutil
from contextlib import closing
from itertools import product
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

KEY, OTHER = "datasets/pets-16", "datasets/other-16"
KEYS = ["index.json", "rejects.jsonl", *(f"shard-0000{n}.{end}" for n in range(3) for end in ("offsets", "tar"))]
"""No reader needs the preview, which `data show` makes anew; nor the rejects."""


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
    assert [entry.key for entry in store.sub(KEY).list() if entry.key != "preview.png"] == KEYS
    return store.sub(KEY)


@pytest.fixture(scope="module")
def pixels(store: Store, bucket: Path) -> np.ndarray:
    return read(store, bucket / "whole")


def read(store: Store, folder: Path, kind: str = "decoded") -> np.ndarray:
    """All images."""
    where = store, load_index(store, KEY), folder
    with closing(DecodedCache(*where, NEVER) if kind == "decoded" else ShardCache(*where, 1 << 30)) as opened:
        return opened.read(np.arange(opened.index.images))


def blamed(store: Store) -> list[str]:
    """The keys that verifying names, which stand at the beginning of each line."""
    try:
        problems = verify_dataset(store, KEY)
    except BadDataError as error:
        problems = [str(error)]
    return sorted(line.split()[0].rstrip(",").removeprefix(f"{store.uri_of(KEY)}/") for line in problems)


def images_in(dataset: Store, key: str, data: bytes) -> list[bytes]:
    """The images of a tar with this content; of any other object all of it."""
    if not key.endswith(".tar"):
        return [data]
    table = np.frombuffer(dataset.read(key.replace(".tar", ".offsets")).data, OFFSETS_DTYPE)
    return [data[at : at + size] for at, size, *_ in table.tolist()]


def test_damaged_objects_are_named_and_not_read(bucket, store, dataset, pixels, tmp_path):
    """Of a shard, damage to an image; between images it leaves them as they are, and verifying names it."""
    assert "as it was packed" in succeeded(ddpm_here("data", "verify", "pets", "--bucket", bucket))
    far, blames, wrong, harmless = FarStore(bucket), {}, {}, set()
    for key in KEYS:
        before, theirs = dataset.read(key).data, store.read(f"{OTHER}/{key}").data
        # Both rejected images have the same names.
        others = {"another dataset's": lambda data, theirs=theirs: theirs} if key != "rejects.jsonl" else {}
        for name, damage in (DAMAGES | others).items():
            is_read = key != "rejects.jsonl"
            if damage and images_in(dataset, key, damage(before)) == images_in(dataset, key, before):
                is_read = False
                harmless.add(name)
            with damaged(dataset, key, damage):
                blames[name, key] = blamed(store) if (name, key) != ("gone", "index.json") else [key]
                for where, kind in product((store, far), ("decoded", "shards")):
                    expected = where.uri_of(f"{KEY}/{key}") if damage or where is store else key
                    if (key, damage) == ("index.json", None):
                        expected = f"no dataset at {where.uri}/{KEY}"
                    try:
                        np.testing.assert_array_equal(read(where, tmp_path / "cache", kind), pixels)
                        said = ""
                    except (BadDataError, MissingInputError) as error:
                        said = str(error)
                    if bool(said) != is_read or (said and expected not in said):
                        wrong[name, key, kind] = said
                    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert (wrong, harmless) == ({}, {"first bit", "last byte", "all but a byte", "a byte more"})
    assert blames == {(name, key): [key] for name, key in blames} and len(blames) == 9 * 8 - 1
    for one, other in pairs(KEYS):
        with swapped(dataset, one, other):
            assert blamed(store) == [one, other]
    with damaged(dataset, "shard-00000.tar", lambda data: bytes(len(data))):
        (problem,) = verify_dataset(store, KEY)
        assert problem.endswith(f"; damaged images of this shard: {load_index(store, KEY).shards.images[0]}")
    for key, is_named in (("shard-00099.tar", True), ("pieces/00099.json", False)):
        dataset.create(key, b"x")
        assert blamed(store) == [key] * is_named
        dataset.delete(key)
    with pytest.raises(MissingInputError):
        verify_dataset(store, "datasets/none-16")


def test_damaged_image_is_named(bucket, store, dataset, tmp_path):
    index, row = load_index(store, KEY), 3
    first, shard, _ = index.shards
    with closing(ImageCache(store, index, tmp_path / "records")) as cache:
        offset, size_bytes, _, _ = cache.records([first.images + row])[0].tolist()
    named = f"{dataset.uri_of(shard.name)}, image {row} (at byte {offset}): it differs from the index"
    intact = f"{dataset.uri_of(shard.name)} differs from the index, but all its images are intact"
    verify = ("data", "verify", "pets", "--bucket", bucket)
    train = ("train", "--dataset", "pets", "--bucket", bucket, "--epochs", 2, *settings(train__batch_size="8"))

    def changed(at: int):
        return lambda data: data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    for words, damage, said in (
        (verify, changed(offset + size_bytes // 2), named),
        (train, changed(offset + size_bytes // 2), named),
        (verify, changed(100), intact),
        (verify, lambda data: data[: offset + 1], named),
    ):
        with damaged(dataset, shard.name, damage):
            assert said in refused(ddpm_here(*words, DDPM_CACHE=str(tmp_path / "cache")), Exit.BAD_DATA)


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
            path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
            np.testing.assert_array_equal(read(far, cache, kind), pixels, err_msg=f"{name} of {path.name}")


def test_corrupt_image_is_fetched_anew(gcs_bucket, tmp_path):
    files = [(f"{n}.jpg", jpeg(n)) for n in range(8)]
    open_store(gcs_bucket).upload(tar_of(tmp_path / "a.tar", files), "a.tar")
    index = pack(store := open_store(str(tmp_path / "bucket")), PackRequest("", "pets", 16, tars=(gcs_bucket,)))
    with closing(ShardCache(store, index, tmp_path / "cache", 1 << 30)) as cache:
        whole, path = cache.read(np.arange(8)), tmp_path / "cache" / "shards" / "shard-00000.tar"
        for offset, size_bytes, *_ in cache.records(np.arange(8)).tolist():
            # Nothing in a JPEG tells that a bit of it flipped.
            flip_a_bit(path, offset + size_bytes * 3 // 4)
            np.testing.assert_array_equal(cache.read(np.arange(8)), whole)
            assert path.read_bytes() == (tmp_path / "a.tar").read_bytes()


def test_images_packed_wrong_are_named(tmp_path, monkeypatch):
    """Hashes are right, images are not; nor are those of a table that is about another tar."""
    good, wide, other = encoded(picture(1, 8, 8)), encoded(picture(1, 8, 9)), encoded(picture(2, 8, 8))
    files = iter([good, good[:99], wide, jpeg(1), *[other] * 4])
    written = write_dataset(str(tmp_path), tmp_path / "..", (4, 4), encode=lambda _: next(files))
    (first, second), where = written.index.shards, tmp_path / written.key
    (where / second.offsets_name).write_bytes((where / first.offsets_name).read_bytes())
    shards = (first, second.model_copy(update={"offsets_sha256": first.offsets_sha256}))
    (where / "index.json").write_bytes(written.index.model_copy(update={"shards": Shards.of(shards)}).to_json())
    done: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda _, images: done.append(images))
    problems = [re.sub(r" \(at byte \d+\)", "", problem) for problem in verify_dataset(written.bucket, written.key)]
    assert problems == [
        f"{where}/shard-0000{problem}: restore it, or pack the dataset again"
        for problem in (
            "0.tar, image 1: an image is damaged, or not a PNG",
            "0.tar, image 2: it is 8×9 pixels in a dataset of 8×8",
            "0.tar, image 3: an image is damaged, or not a PNG",
            *(f"1.tar, image {row}: it differs from the index" for row in range(4)),
        )
    ]
    assert done == [*range(1, 9)]
