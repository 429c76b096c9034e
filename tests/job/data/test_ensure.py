"""A source and the dataset that is there already: compared, or replaced."""

from contextlib import closing

import pytest

from job.coordination.lease import Lease
from job.data.checks import verify_dataset
from job.data.shards import load_index
from job.exits import Exit
from job.runs.records import highest_fence
from job.stop import Stop
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.some_images import folder_of, jpeg, zip_of


def test_ensure_compares_the_source(tmp_path):
    pets = [(f"{kind}/{n}.jpg", jpeg(n)) for kind in ("cats", "dogs") for n in range(6)]
    photos = folder_of(tmp_path / "photos", pets)
    place = ("--bucket", tmp_path / "bucket")

    def ensured(source, *more):
        return ddpm_here("data", "ensure", "mine", *place, "--size", 8, "--source", source, *more)

    succeeded(ensured(photos))
    index = tmp_path / "bucket/datasets/mine-8/index.json"
    before = index.read_bytes()
    copied = zip_of(tmp_path / "copied.zip", pets)
    assert succeeded(ensured(copied)) == "" and "SOURCE has not changed" in ensured(copied).stderr
    others = {
        "fewer": pets[1:],
        "names": [("cats/other.jpg", pets[0][1]), *pets[1:]],
        "sizes": [("cats/0.jpg", pets[0][1] + b"0"), *pets[1:]],
        "classes": [(f"{kind}/{name}", content) for (name, content), kind in zip(pets, "ab" * 6, strict=True)],
    }
    for name, files in others.items():
        line = refused(ensured(zip_of(tmp_path / f"{name}.zip", files)), Exit.BAD_REQUEST)
        assert "mine-8 is there already: 12 images of photos" in line and f"{name}.zip has other images" in line
        assert "make: DATASET=NAME" in line and "--replace" in line
    (tmp_path / "labels.csv").write_text("".join(f"{name},{n % 3}\n" for n, (name, _) in enumerate(pets)))
    assert "other images, labels" in refused(ensured(photos, "--labels", tmp_path / "labels.csv"), Exit.BAD_REQUEST)
    assert "other images, labels" in refused(ensured(photos, "--no-classes"), Exit.BAD_REQUEST)
    for option in (("--channels", 1), ("--range", "0,9")):
        assert "classes or pixels" in refused(ensured(photos, *option), Exit.BAD_REQUEST)
    assert "SOURCE has not changed" in ensured(photos, "--channels", 3).stderr
    photos.rename(tmp_path / "moved")
    assert f"SOURCE is not compared: there is nothing at {photos}" in ensured(photos).stderr
    words = ("--labels", tmp_path / "none.csv")
    assert "SOURCE is not compared: --labels: there is nothing at" in ensured(copied, *words).stderr
    assert succeeded(ensured(photos)) == "" and index.read_bytes() == before
    assert "; SOURCE is not compared" in ensured("https://host.invalid/a.zip").stderr


@pytest.mark.parametrize("command", ["ensure", "pack"])
def test_a_dataset_is_replaced_unless_a_run_trains_on_it(tmp_path, command):
    first, second = (zip_of(tmp_path / f"{n}.zip", [(f"{n}.jpg", jpeg(n)), ("b.jpg", jpeg(9))]) for n in range(2))
    bucket = tmp_path / "bucket"

    def packs(source, *more):
        words = ("ensure", "mine", "--source", source) if command == "ensure" else ("pack", source, "mine")
        return ddpm_here("data", *words, "--bucket", bucket, "--size", 16, *more)

    succeeded(packs(first))
    store = open_store(str(bucket))
    before = load_index(store, "datasets/mine-16")
    words = ("train", "--dataset", "mine", "--bucket", bucket, "--epochs", 1, *settings(train__batch_size="2"))
    succeeded(ddpm_here(*words, "--run", "over"))
    run = store.sub("runs/over")
    stop = Stop()
    with closing(Lease.take(run, highest_fence(run), 0.0, stop, print)):
        line = refused(packs(second, "--replace"), Exit.LOST_RUN)
        assert f"{run.uri} is held by process" in line
        refused(ddpm_here("data", "delete", "mine", "--bucket", bucket, "--yes"), Exit.LOST_RUN)
    # A source that cannot be packed costs nothing.
    refused(packs(tmp_path / "nowhere.zip", "--replace"), Exit.MISSING_INPUT)
    assert load_index(store, "datasets/mine-16") == before
    assert "made     from 1.zip" in succeeded(packs(second, "--replace"))
    assert load_index(store, "datasets/mine-16").dataset_id != before.dataset_id
    assert verify_dataset(store, "datasets/mine-16") == []
    refused(packs(first), Exit.BAD_REQUEST)
    assert "data.dataset_id is" in refused(ddpm_here(*words, "--run", "over"), Exit.BAD_CONFIG)
