"""What people hand over to be packed by mistake, or on purpose, and what becomes of datasets that are half there."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from job.data.verify import verify_dataset
from job.exits import Exit
from job.runs.records import read_status
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, refused, settings, succeeded
from tests.job.some_images import encoded, picture, tar_of, zip_of
from tests.job.test_bad_input import everything

GOOD = [(f"{number}.png", encoded(picture(number))) for number in range(12)]


def bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(6):
            archive.writestr(f"{number}.png", bytes(60 << 20))
    return path


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_SOURCES = {
    "empty archive": (lambda path: zip_of(path, []), ["holds no images"]),
    "no image in it": (lambda path: zip_of(path, [("read.me", b"hello")]), ["holds no images", ".png"]),
    "empty file": (lambda path: written(path, b""), ["no archive that can be packed", "give a folder"]),
    "another file": (lambda path: written(path, b"<html>sign in"), ["no archive that can be packed"]),
    "truncated zip": (lambda path: cut(zip_of(path, GOOD), 0.5), ["truncated or damaged", "get it again"]),
    "zip without its end": (lambda path: cut(zip_of(path, GOOD), 0.999), ["truncated or damaged", "get it again"]),
    "truncated tar": (lambda path: cut(tar_of(path, GOOD), 0.5), ["truncated or damaged", "get it again"]),
    "leads outside": (lambda path: zip_of(path, [*GOOD, ("../x.png", b"x")]), ["'../x.png'", "do not trust"]),
    "bomb": (bomb, ["200 times its size", "do not trust"]),
    "unreadable images": (lambda path: zip_of(path, [("a.png", b"no image")]), ["none of its images", "'a.png'"]),
    "too many unreadable": (
        lambda path: zip_of(path, [*GOOD, *((f"x{number}.png", b"") for number in range(101))]),
        ["more than --max-bad=100", "'x0.png'", "and 98 more", "allow more"],
    ),
    "one pixel": (lambda path: zip_of(path, [("p.png", encoded(picture(1, 1, 1)))]), ["'p.png' has 1×1 pixels"]),
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
        assert not list(bucket.rglob("index.json")), kind
        assert sorted(path.name for path in folder.iterdir() if path != bucket) == ["source"], kind
        if bucket.exists():
            assert "unfinished: pack it again" in succeeded(ddpm_here("data", "list", "--bucket", bucket))
            assert "no dataset 'mine'" in refused(ddpm_here("train", "--dataset", "mine", "--bucket", bucket), 66)
        # The same command goes on once the source is a good one.
        source.unlink()
        zip_of(source, GOOD)
        assert "12 colour, 16×16 pixels" in succeeded(ddpm_here(*words)), kind
        assert verify_dataset(open_store(str(bucket)), "datasets/mine-16") == [], kind
    (tmp_path / "photos").mkdir()
    line = refused(ddpm_here("data", "pack", tmp_path / "photos", "mine", "--size", 16, "--bucket", tmp_path / "b"), 65)
    assert f"{tmp_path}/photos holds no images" in line
    assert not (tmp_path / "b").exists()


def test_images_of_all_kinds_train(tmp_path):
    image, turned = picture(3), Image.Exif()
    turned[0x0112] = 6
    ramp = Image.fromarray((np.arange(40 * 48).reshape(48, 40) * 34).astype(np.uint16))
    kinds = [
        ("grey.png", encoded(image.convert("L"))),
        ("grey-alpha.png", encoded(image.convert("LA"))),
        ("alpha.png", encoded(image.convert("RGBA"))),
        ("cmyk.jpg", encoded(image.convert("CMYK"), "JPEG")),
        ("palette.gif", encoded(image.convert("P"), "GIF")),
        ("bits.png", encoded(image.convert("1"))),
        ("deep.png", encoded(ramp)),
        ("turned.jpg", encoded(image, "JPEG", exif=turned)),
        ("pixel.png", encoded(picture(4, 1, 1))),
        ("broken.jpg", encoded(image, "JPEG")[:-400]),
    ]
    bucket, cache = tmp_path / "bucket", {"DDPM_CACHE": str(tmp_path / "cache")}
    source = zip_of(tmp_path / "kinds.zip", kinds)
    out = succeeded(ddpm_here("data", "pack", source, "kinds", "--size", 16, "--bucket", bucket))
    assert "images   8 colour" in out
    assert "rejects  2, named in rejects.jsonl" in out
    rejects = [json.loads(line) for line in (bucket / "datasets/kinds-16/rejects.jsonl").read_text().splitlines()]
    assert {reject["name"]: reject["reason"].split()[0] for reject in rejects} == {
        "broken.jpg": "cannot",
        "pixel.png": "has",
    }
    words = ("--dataset", "kinds", "--bucket", bucket, "--epochs", 3, *settings(train__batch_size="8"))
    out = succeeded(ddpm_here("train", *words, **cache))
    assert "Run 'kinds' is finished: 3 epochs, 24 images seen." in out
    status = read_status(open_store(str(bucket)).sub("runs/kinds"))
    assert status is not None
    assert (status.state, status.images_seen) == ("finished", 24)


def test_what_was_never_finished_is_listed_and_goes_without_its_size(tmp_path):
    left = tmp_path / "datasets/mine-16/packing/parameters.json"
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
