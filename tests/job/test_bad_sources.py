"""What people hand over to be packed by mistake, or on purpose, and what becomes of datasets that are half there."""

from __future__ import annotations

from pathlib import Path

from job.data.verify import verify_dataset
from job.exits import Exit
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, refused, succeeded
from tests.job.some_images import encoded, picture, tar_of, zip_of
from tests.job.test_bad_input import everything

GOOD = [(f"{number}.png", encoded(picture(number))) for number in range(12)]


def truncated(path: Path) -> Path:
    data = tar_of(path, GOOD).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


BAD_SOURCES = {
    "no image in it": (lambda path: zip_of(path, [("read.me", b"hello")]), ["holds no images", ".png"]),
    "truncated": (truncated, ["truncated or damaged", "get it again"]),
    "leads outside": (lambda path: zip_of(path, [*GOOD, ("../x.png", b"x")]), ["'../x.png'", "do not trust"]),
    "one pixel": (lambda path: zip_of(path, [("p.png", encoded(picture(1, 1, 1)))]), ["none of", "'p.png' has 1×1"]),
    "too many unreadable": (
        lambda path: zip_of(path, [*GOOD, *((f"x{number}.png", b"") for number in range(101))]),
        ["more than --max-bad=100", "'x0.png'", "and 98 more", "allow more"],
    ),
}


def test_a_source_that_cannot_be_packed(tmp_path):
    for kind, (make, parts) in BAD_SOURCES.items():
        folder = tmp_path / kind
        folder.mkdir()
        source, bucket = make(folder / "source"), folder / "bucket"
        words = ("data", "pack", source, "mine", "--size", 16, "--bucket", bucket)
        line = refused(ddpm_here(*words), Exit.BAD_DATA)
        assert str(source) in line, kind
        assert all(part in line for part in parts), line
        assert sorted(path.name for path in folder.iterdir()) == ["source"], kind
        # The same command goes on once the source is a good one.
        source.unlink()
        zip_of(source, GOOD)
        assert "12 colour, 16×16 pixels" in succeeded(ddpm_here(*words)), kind
        assert verify_dataset(open_store(str(bucket)), "datasets/mine-16") == [], kind


def test_what_was_never_finished_is_listed_and_goes_without_its_size(tmp_path):
    left = tmp_path / "datasets/mine-16/packing/shard-00000.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    assert "unfinished: pack it again, or delete it" in succeeded(ddpm_here("data", "list", "--bucket", tmp_path))
    succeeded(ddpm_here("data", "delete", "mine", "--bucket", tmp_path, "--yes"))
    assert not (tmp_path / "datasets").exists()


def test_the_bucket_is_no_part_of_the_photos_around_it(tmp_path):
    (tmp_path / "1.png").write_bytes(encoded(picture(1)))
    words = ["--size", 8, "--bucket", tmp_path / "bucket"]
    succeeded(ddpm_here("data", "pack", tmp_path, "one", *words))
    succeeded(ddpm_here("data", "show", "one", *words))
    assert list((tmp_path / "bucket").rglob("*.png"))
    done = ddpm("data", "pack", tmp_path, "two", *words)
    assert "images   1 colour" in succeeded(done)
    assert f"leaving out {tmp_path}/bucket, which is the bucket" in done.stderr
    here = ["data", "pack", tmp_path, "three", "--size", 8, "--bucket", tmp_path]
    assert "is both SOURCE and bucket" in refused(ddpm_here(*here), Exit.BAD_REQUEST)


def test_a_dataset_goes_only_when_one_is_certain(tmp_path):
    archive = tmp_path / "some.zip"
    zip_of(archive, GOOD)
    bucket = tmp_path / "bucket"
    about_it = ["mine", "--size", 8, "--bucket", bucket]
    bucket.mkdir()
    assert "no dataset" in refused(ddpm_here("data", "delete", *about_it), Exit.MISSING_INPUT)
    succeeded(ddpm_here("data", "pack", archive, *about_it))
    refused(ddpm_here("data", "pack", archive, *about_it), Exit.BAD_REQUEST)
    there = everything(bucket)
    assert "add --yes" in refused(ddpm_here("data", "delete", *about_it), Exit.BAD_REQUEST)
    assert everything(bucket) == there
    assert "deleted" in succeeded(ddpm_here("data", "delete", *about_it, "--yes"))
    assert everything(bucket) == {}
    succeeded(ddpm_here("data", "pack", archive, *about_it))
    assert everything(bucket) == there
