"""The picture that shows people the labels of their dataset."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import job.data.pack
from ddpm import figures
from job.data.checks import preview_png, verify_dataset
from job.data.reading.cache import ImageCache
from job.data.shards import load_index
from job.store import open_store
from tests.job.command_line import DDPM, ddpm, ddpm_here, succeeded
from tests.job.packing import KEY, objects, packed
from tests.job.some_images import encoded, folder_of, tar_of

ODD = "Ähren und\nKorn, " + 30 * "sehr " + "reif"


def shade(number: int, side: int = 16) -> Image.Image:
    """A colour that no other number has."""
    return Image.new("RGB", (side, side), (number % 16 * 16, 255 - number // 16 * 16, number * 97 % 256))


def classes_in(folder: Path, names: list[str], images: int = 9, side: int = 16) -> Path:
    """A folder whose images show the number of their class."""
    shades = [(name, encoded(shade(number, side))) for number, name in enumerate(names)]
    return folder_of(folder, [(f"{name}/{n:02d}.png", png) for name, png in shades for n in range(images)])


def tars_in(folder: Path, classes: int, side: int) -> Path:
    """The same in tars, in no order, as by img2dataset."""
    folder.mkdir()
    shades = [encoded(shade(number, side)) for number in range(classes)]
    mixed = np.random.default_rng(0).permutation(classes * 9).tolist()
    for first in range(0, len(mixed), 7):
        some = mixed[first : first + 7]
        pairs = [(("png", shades[at // 9]), ("cls", b"%d" % (at // 9))) for at in some]
        files = [(f"{at:03d}.{end}", content) for at, pair in zip(some, pairs, strict=True) for end, content in pair]
        tar_of(folder / f"{first:05d}.tar", files)
    return folder


def tiles_in(sheet: np.ndarray, tile: int, rows: int) -> np.ndarray:
    """The colours in the middle of 8 tiles in each row, uint8 [rows, 8, 3]; 4 pixels lie between them, 20 around."""
    step, first = tile + 4, 20 + 4 + tile // 2
    down, across = (sheet.shape[axis] - 20 - count * step - 4 + first - 20 for axis, count in ((0, rows), (1, 8)))
    return sheet[down:-20:step, across:-20:step]


@pytest.mark.parametrize("kind", ["pack", "index"])
@pytest.mark.parametrize(("classes", "channels", "side"), [(3, 3, 16), (14, 3, 16), (3, 1, 300)])
def test_each_class_has_a_row_of_its_images(tmp_path, kind, classes, channels, side):
    names = [f"class {number:02d}" if kind == "pack" else str(number) for number in range(classes)]
    source, options = "", {"channels": channels, "size": side}
    if kind == "pack":
        source = classes_in(tmp_path / "source", names, side=side)
    else:
        options |= {"tars": (str(tars_in(tmp_path / "tars", classes, side)),), "shard_images": None}
    previews, key = set(), KEY.replace("16", str(side))
    for bucket in ("one", "other"):
        packed(tmp_path / bucket, source, **options)
        previews.add((tmp_path / bucket / key / "preview.png").read_bytes())
        assert verify_dataset(open_store(str(tmp_path / bucket)), key) == []
    (preview,), shown = previews, range(min(classes, 12))
    colours = np.stack([np.asarray(shade(number, 1).convert("L" if channels == 1 else "RGB")) for number in shown])
    sheet, colours = np.asarray(Image.open(io.BytesIO(preview))), colours.reshape(-1, 1, channels)
    assert (tiles_in(sheet, 64 if side == 16 else 150, len(shown)) == colours).all()
    images = np.broadcast_to(colours.repeat(8, 0)[:, None], (8 * len(shown), side, side, channels))
    title = f"small-{side}" + " · 2 of 14 classes not shown" * (classes == 14)
    expected = figures.contact_sheet(images, np.repeat(shown, 8).tolist(), names[:12], 8, title)
    assert np.array_equal(sheet, np.asarray(expected))


def test_images_without_classes_are_a_grid(tmp_path):
    source = folder_of(tmp_path / "source", [(f"{n:03d}.png", encoded(shade(n))) for n in range(50)])
    for bucket in ("one", "other"):
        packed(tmp_path / bucket, source)
    one, other = (objects(tmp_path / bucket)["preview.png"] for bucket in ("one", "other"))
    assert one == other
    found = tiles_in(np.asarray(Image.open(io.BytesIO(one))), 64, 4).reshape(-1, 3).tolist()
    all_of_them = [list(shade(n).getpixel((0, 0))) for n in range(50)]
    numbers = [all_of_them.index(colour) for colour in found]
    assert len(set(numbers)) == 32 and numbers == sorted(numbers)


def test_few_tables_and_images_are_read(tmp_path, monkeypatch):
    """Of data sorted by class, with a shard for each: no random choice would find all of the first twelve."""
    source = classes_in(tmp_path / "source", [f"{number:03d} of many" for number in range(200)], images=8)
    read = {"read_table": [], "open_shard": []}

    def counting(name, original):
        return lambda self, shard: read[name].append(shard) or original(self, shard)

    for name in read:
        monkeypatch.setattr(ImageCache, name, counting(name, getattr(ImageCache, name)))
    index = packed(tmp_path / "bucket", source, shard_images=8)
    assert len(index.shards) == len(index.classes) == 200
    assert 64 <= len(read["read_table"]) == len(set(read["read_table"])) < 100
    assert sorted(read["open_shard"]) == list(range(12))


def test_odd_names_and_empty_classes_have_rows(tmp_path):
    files = [("cat/1", 1), ("cat/2", 2), ("dog/1", 3), ("dog/2", 4), (f"{ODD}/1", 5)]
    source = folder_of(tmp_path / "source", [(f"{name}.png", encoded(shade(n))) for name, n in files])
    succeeded(ddpm_here("data", "pack", source, "small", "--size", 16, "--bucket", tmp_path, "--hold-out", "40%"))
    for part in ("small", "small-held-out"):
        sheet = np.asarray(Image.open(tmp_path / f"datasets/{part}-16/preview.png"))
        assert sheet.shape[0] - 3 * 68 < 80, part
        beside = sheet[-20 - 3 * 68 : -20, : 20 + 240]
        assert [(row < 128).any() for row in np.split(beside, 3)] == [True] * 3, part
        assert (beside[:, :20] == 255).all(), "a long name is cut"
    index = load_index(open_store(str(tmp_path)), KEY).model_copy(update={"classes": ("a\nb", "x" * 10**7, "\x1b[2J")})
    assert preview_png(open_store(str(tmp_path)), index, tmp_path / "tables").startswith(b"\x89PNG")


def test_a_failed_preview_costs_no_dataset(tmp_path, monkeypatch, caplog):
    source = classes_in(tmp_path / "source", ["cat", "dog"])
    words = ("small", "--size", 16, "--bucket", tmp_path / "bucket")

    def broken(*_):
        raise ZeroDivisionError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(job.data.pack, "preview_png", broken)
        out = succeeded(ddpm_here("data", "pack", source, *words))
    preview = tmp_path / "bucket" / KEY / "preview.png"
    assert "look at" not in out and not preview.exists()
    assert f"{preview} is missing: a mistake; `ddpm data show small` makes it" in caplog.text
    assert succeeded(ddpm_here("data", "show", *words)).endswith(f"\nlook at  {preview}\n")
    packed(tmp_path / "other", source)
    assert preview.read_bytes() == objects(tmp_path / "other")["preview.png"]


@pytest.mark.parametrize("place", ["tmp_path", "gcs_bucket"])
def test_packing_names_the_preview_and_show_opens_it(tmp_path, place, request):
    bucket = request.getfixturevalue(place)
    words = ("small", "--size", 16, "--bucket", bucket)
    program = (sys.executable, "-X", "importtime", DDPM)
    done = ddpm("data", "pack", classes_in(tmp_path / "source", ["cat", "dog"]), *words, program=program)
    assert succeeded(done).splitlines()[-1] == f"look at  {bucket}/{KEY}/preview.png"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "PIL" in imported and "torch" not in imported

    browser, opened = tmp_path / "browser", tmp_path / "opened.png"
    browser.write_text(f'#!/bin/sh\ncat "${{1#file://}}" > {opened}\n')
    browser.chmod(0o755)
    succeeded(ddpm("data", "show", *words, "--open", BROWSER=f"{browser} %s"))
    assert opened.read_bytes() == open_store(str(bucket)).read(f"{KEY}/preview.png").data
    assert load_index(open_store(str(bucket)), KEY).classes == ("cat", "dog")
