"""Packing: the same dataset of any container, resumed at any point; what is left out, held out, refused or replaced.

And the picture that shows people the labels of their dataset.
"""

import hashlib
import io
import json
import os
import sys
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

import job.data.pack
from ddpm import figures
from job.coordination.lease import Lease
from job.data.checks import preview_png, verify_dataset
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.reading.cache import ImageCache
from job.data.shards import OFFSETS_DTYPE, DatasetIndex, load_index
from job.exits import BadDataError, BadRequestError, Exit, JobError, MissingInputError, StoppedError
from job.runs.records import highest_fence
from job.stop import Stop
from job.store import open_store
from job.store.local import LocalStore
from tests.job.command_line import DDPM, ddpm, ddpm_here, refused, settings, succeeded
from tests.job.packing import FILES, KEY, SHARD_IMAGES, committed, objects, packed, written
from tests.job.some_images import encoded, folder_of, jpeg, picture, tar_of, zip_of


def samples_in(bucket: Path, index: DatasetIndex, key: str = KEY) -> webdataset.WebDataset:
    return webdataset.WebDataset([str(bucket / key / shard.name) for shard in index.shards], shardshuffle=False)


def test_webdataset_reads_the_same_dataset(tmp_path, source):
    index = packed(tmp_path, source, crop="1,2,30,40", resize_filter="box", licence="CC0-1.0")
    samples = list(samples_in(tmp_path, index).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(60)]
    for (name, content), sample in zip(FILES, samples, strict=True):
        image = Image.open(io.BytesIO(content)).crop((1, 2, 31, 42)).resize((16, 16), Image.Resampling.BOX)
        np.testing.assert_array_equal(sample["png"], np.asarray(image))
        assert index.classes[sample["cls"]] == name.split("/")[0]
    assert (index.images, index.classes, index.crop, index.resize_filter) == (60, ("cats", "dogs"), "1,2,30,40", "box")
    assert (index.source, index.licence, index.image_shape) == ("pets.zip", "CC0-1.0", (16, 16, 3))
    assert [shard.images for shard in index.shards] == [SHARD_IMAGES] * 3 + [12]
    labels = []
    for shard in index.shards:
        tar = (tmp_path / KEY / shard.name).read_bytes()
        for offset, size, label, sha256 in np.fromfile(tmp_path / KEY / shard.offsets_name, OFFSETS_DTYPE).tolist():
            png = tar[offset : offset + size]
            assert (hashlib.sha256(png).digest()[:16], png[:4], png[-8:-4]) == (sha256, b"\x89PNG", b"IEND")
            labels.append(label)
    assert labels == [0] * 30 + [1] * 30
    without = packed(tmp_path / "without", source, classes=False)
    assert without.classes == () and not any("cls" in sample for sample in samples_in(tmp_path / "without", without))


def test_any_container_gives_the_same_dataset(tmp_path, source, undisturbed, monkeypatch):
    indices, bucket = [], tmp_path / "bucket-0"
    for number, path in enumerate((source, folder_of(tmp_path / "pets", FILES), tar_of(tmp_path / "pets.tgz", FILES))):
        monkeypatch.setattr(os, "cpu_count", lambda number=number: 1 + 3 * number)
        indices.append(packed(tmp_path / f"bucket-{number}", path))
    assert len({(index.dataset_id, index.listing_sha256) for index in indices}) == 1
    assert objects(bucket) == undisturbed
    assert not any("pieces" in key for key in undisturbed)
    other = packed(tmp_path / "other", zip_of(tmp_path / "b.zip", [*FILES[:-1], ("dogs/999.jpg", FILES[-1][1])]))
    assert other.dataset_id == indices[0].dataset_id and other.listing_sha256 != indices[0].listing_sha256
    with pytest.raises(BadRequestError, match=r"small-16 is there already: 60 images of pets.zip, crop center"):
        packed(bucket, source, crop="squash")
    assert packed(bucket, source, slice="0/1").dataset_id == other.dataset_id
    with pytest.raises(BadRequestError, match="holds shards of other images"):
        packed(bucket, zip_of(tmp_path / "c.zip", FILES[1:]), slice="0/1")
    assert objects(bucket) == undisturbed


def test_held_out_images_are_a_dataset(tmp_path, source):
    store, parts, fewer = open_store(str(tmp_path)), [], zip_of(tmp_path / "fewer.zip", FILES[::2])

    def held_out(name: str, share: str = "20%", of: Path = source, *more: object):
        words = ("data", "pack", of, name, "--size", 16, "--bucket", tmp_path, *more)
        return ddpm_here(*words, *(["--hold-out", share] if share else []))

    assert "held out small-held-out-16, on which its runs log val_loss" in succeeded(held_out("small"))
    packed(tmp_path / "whole", source)
    for key, bucket in (*((f"datasets/{name}-16", tmp_path) for name in ("small", "small-held-out")), (KEY, "whole")):
        index = load_index(open_store(str(tmp_path / bucket)), key)
        assert index.classes == ("cats", "dogs")
        parts.append({(sample["cls"], sample["png"]) for sample in samples_in(tmp_path / bucket, index, key)})
        assert len(parts[-1]) == index.images
    ours, theirs, whole = parts
    assert 4 <= len(theirs) <= 20 and ours | theirs == whole and not ours & theirs
    # Of what is there already nothing is held out afterwards.
    succeeded(held_out("taken", ""))
    assert "is there already" in refused(held_out("taken"), 64)
    assert not (tmp_path / "datasets/taken-held-out-16").exists()
    # An image stays on its side when others go, and the command goes on where it was interrupted.
    before = objects(tmp_path)
    (tmp_path / KEY / "index.json").unlink()
    succeeded(held_out("small"))
    assert objects(tmp_path) == before
    succeeded(held_out("few", of=fewer))
    assert load_index(store, "datasets/few-held-out-16").images <= len(theirs)
    (tmp_path / KEY / "index.json").unlink()
    # Nor are images of an earlier source, or of another crop, what the new one is validated on.
    other = "small-held-out-16 holds 20.000% out, and not 20.000% of what {} has now with these parameters"
    for name, share, of, more, said in (
        ("small", "20", source, (), "--hold-out '20'"),
        ("small", "51%", source, (), "at most 50%"),
        ("small", "10%", source, (), "holds 20.000% out, and not 10.000%"),
        ("small", "20%", fewer, (), other.format(fewer)),
        ("small", "20%", source, ("--crop", "squash"), other.format(source)),
        ("none", "0.001%", fewer, (), "holds no image out"),
    ):
        line = refused(held_out(name, share, of, *more), 64)
        assert said in line and ("data delete small-held-out" in line or "has now" not in said)


def test_rejected_images_are_named_and_bounded(tmp_path):
    good = encoded(picture(1))
    files = [("1.png", good), ("2.png", b"no image"), ("3.png", good[:-400]), ("4.png", encoded(picture(1, 7, 50)))]
    files += [("5.png", good), ("6.jpg", b"")]
    index = packed(tmp_path, zip_of(tmp_path / "a.zip", files), max_bad=4)
    assert (index.images, index.rejected_images) == (2, 4)
    lines = [json.loads(line) for line in objects(tmp_path)["rejects.jsonl"].splitlines()]
    assert [line["name"] for line in lines] == ["2.png", "3.png", "4.png", "6.jpg"]
    assert lines[2]["reason"] == "has 7×50 pixels, under --min-side=8"
    # Resumed, packing may allow more of them.
    bad = zip_of(tmp_path / "bad.zip", [(f"{n:04d}.png", b"no image") for n in range(2000)])
    none = zip_of(tmp_path / "none.zip", [("1.png", b"no image")])
    some = zip_of(tmp_path / "b.zip", sorted([*FILES, *((f"{name}-bad.jpg", b"bad") for name, _ in FILES[::5])]))
    for source, most, said in (
        (bad, 5, r"more than --max-bad=5 images .*: '0000.png' is .*; and 3 more"),
        (none, 100, "none of its images can be used: '1.png'"),
        (some, 9, r"--max-bad=9 .* more: see to them, or allow more with --max-bad"),
    ):
        with pytest.raises(BadDataError, match=said):
            packed(tmp_path / "bad", source, max_bad=most)
        with pytest.raises(MissingInputError):
            load_index(open_store(str(tmp_path / "bad")), KEY)
    assert sum(key.startswith("pieces/") for key in objects(tmp_path / "bad")) >= 1
    for place in ("bad", "fresh"):
        packed(tmp_path / place, some, max_bad=12)
    assert objects(tmp_path / "bad") == objects(tmp_path / "fresh")
    assert objects(tmp_path / "bad")["rejects.jsonl"].count(b"\n") == 12


def test_pack_reports_skipped_and_merged(tmp_path, caplog):
    """As a telephone and an exercise leave them; what Pillow reads is packed."""
    files = [(f"{split}/{kind}/1.png", encoded(picture(1))) for split in ("train", "test") for kind in ("cats", "dogs")]
    files += [("train/cats/2.avif", encoded(picture(2), "AVIF")), ("train/cats/3.cr2", b"x"), ("test/notes.txt", b"x")]
    words = ("data", "pack", zip_of(tmp_path / "a.zip", files), "--size", 8, "--bucket", tmp_path / "bucket")
    out = {}
    for name, images, skipped, options in (
        ("both", 5, "1 .cr2, 1 .txt", ("--split", "all")),
        ("one", 3, "1 .cr2", ("--split", "train")),
        # As formats with splits, whose test images no run learns by default.
        ("default", 3, "1 .cr2", ()),
    ):
        out[name] = succeeded(ddpm_here(*words, name, *options)).splitlines()
        assert out[name][1].startswith(f"images   {images} colour") and out[name][-2] == f"skipped  {skipped}"
    assert "rejects" not in str(out) and "from a.zip, split train, crop" in str(out["one"])
    learnt, merged, *others = caplog.messages
    assert "2 folders became classes that the network will learn: cats, dogs" in learnt
    assert "test, train are packed together, as one dataset; `ddpm data pack --split train`" in merged
    assert "packing its split train; --split test would pack another; all: --split all" in "".join(others[1:])
    assert len(others) == 3
    line = refused(ddpm_here(*words, "none", "--split", "val"), 65)
    assert "split val holds no images: no file or folder of it is named so" in line
    assert "--split 'cats'" in refused(ddpm_here(*words, "none", "--split", "cats"), 64)


def test_bad_requests_touch_nothing(tmp_path, gcs_bucket, source, monkeypatch):
    other = zip_of(tmp_path / "a.zip", [("1.jpg", jpeg(1))])
    cases = [({"crop": "middle"}, 64), ({"classes": True}, 64), ({"source": "nowhere.zip"}, 66)]
    for options, code in [*cases, ({"source": __file__}, 65)]:
        with pytest.raises(JobError) as error:
            packed(tmp_path / "bucket", **{"source": other, **options})
        assert (error.value.exit_code, (tmp_path / "bucket").exists()) == (code, False), options
    stop = Stop()
    stop.request("a test")
    with pytest.raises(StoppedError):
        pack(open_store(str(tmp_path / "bucket")), PackRequest(str(source), "small", 16), stop=stop)
    assert not (tmp_path / "bucket").exists()
    monkeypatch.setattr(job.data.pack, "prepare", lambda *_: pytest.fail("packed"))
    with pytest.raises(MissingInputError, match="no bucket"):
        packed(f"{gcs_bucket}-not", source)


def test_stopped_packing_decodes_nothing_twice(source, undisturbed, gcs_bucket):
    """From a bucket to a bucket."""
    open_store(gcs_bucket).upload(source, "in/pets.zip")
    theirs, decoded = f"{gcs_bucket}/in/pets.zip", count()
    with pytest.raises(StoppedError, match="all whole pieces are saved") as error:
        packed(gcs_bucket, theirs, stop_at=40)
    assert error.value.exit_code == 75
    there = objects(gcs_bucket)
    assert "index.json" not in there
    done = [json.loads(there[key]) for key in sorted(there) if key.startswith("pieces/")]
    assert 1 <= len(done) <= 2
    packed(gcs_bucket, theirs, decoded=decoded)
    assert objects(gcs_bucket) == undisturbed
    assert next(decoded) == 60 - sum(record["facts"]["shard"]["images"] for record in done)
    assert verify_dataset(open_store(gcs_bucket), KEY) == []


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def packed_while(bucket: Path, source: Path, part: str, action, method: str = "create") -> DatasetIndex:
    """Packs, and has `action` happen once: before a local store creates a key with `part` for the first time."""
    original, calls = getattr(LocalStore, method), count()

    def hooked(self, *arguments):
        if any(part in str(argument) for argument in arguments) and next(calls) == 0:
            action()
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, method, hooked)
        return packed(bucket, source)


CHANGES = {
    "an image": [*FILES[:35], (FILES[35][0], jpeg(999)), *FILES[36:]],
    "a name": [*FILES[:35], ("cats/new.jpg", FILES[35][1]), *FILES[36:]],
    "more images": [*FILES, ("dogs/zzz.jpg", jpeg(999))],
    "fewer images": FILES[:-5],
    "the classes": [*FILES[:-1], ("birds/1.jpg", FILES[-1][1])],
}


def test_changed_source_or_options_are_refused(tmp_path, source):
    bucket = tmp_path / "bucket"
    with pytest.raises(KeyboardInterrupt):
        packed_while(bucket, source, "index.json", interrupted)
    before = objects(bucket)
    attempts = [(zip_of(tmp_path / f"{name}.zip", files), {}) for name, files in CHANGES.items()]
    options = [{"crop": "squash"}, {"shard_images": 9}, {"classes": False}, {"resize_filter": "box"}]
    for path, option in attempts + [(source, option) for option in options]:
        with pytest.raises(BadRequestError, match=f"`ddpm data delete small --size 16 --bucket {bucket}` and type"):
            packed(bucket, path, **option)
        assert objects(bucket) == before, (path.name, option)
    packed(bucket, source)
    assert committed(bucket).keys() == before.keys() - {key for key in before if "pieces" in key} | {"index.json"}


def test_packing_resumes_before_any_write(tmp_path, source, undisturbed):
    """Examples of what the exploration does at every write; a shard that a record names is not written again."""
    for method, part, whole in (
        ("move", "shard-00000.tar", 0),
        ("create", "shard-00001.offsets", 1),
        ("create", "pieces/00002.json", 2),
        ("put", "preview.png", 4),
        ("create", "index.json", 4),
        ("delete", "pieces/00002.json", None),
    ):
        dataset = (bucket := tmp_path / f"{method}-{part[-10:]}") / KEY
        with pytest.raises(KeyboardInterrupt):
            packed_while(bucket, source, part, interrupted, method)
        assert (dataset / "index.json").exists() == (whole is None)
        if whole is None:
            assert committed(bucket) == undisturbed
            continue
        vouched = {f"shard-{path.stem}" for path in (dataset / "pieces").glob("*.json")}
        reused = {path: written(path) for path in dataset.glob("*.tar") if path.stem in vouched}
        assert len(reused) == whole
        packed(bucket, source)
        assert objects(bucket) == undisturbed
        assert {path: written(path) for path in reused} == reused


def test_packers_beside_each_other(tmp_path, source, undisturbed):
    """Equal ones do each other's work, and one of something else gives way."""

    def rival() -> None:
        with pytest.raises(BadRequestError, match="another process packs something else there"):
            packed(tmp_path / "rival", source, crop="squash")

    packed_while(tmp_path / "rival", source, "pieces/00000.json", rival)
    packed_while(tmp_path / "equal", source, "pieces/00001.json", lambda: packed(tmp_path / "equal", source))
    assert objects(tmp_path / "rival") == objects(tmp_path / "equal") == undisturbed
    # Deleted meanwhile, and perhaps replaced, it is not committed.
    dataset = open_store(str(tmp_path)).sub(KEY)

    def delete() -> None:
        for entry in list(dataset.list()):
            dataset.delete(entry.key)

    def replace() -> None:
        delete()
        packed(tmp_path, source, crop="squash")

    for happening in (delete, replace):
        delete()
        with pytest.raises(BadRequestError, match=r"was deleted meanwhile|holds shards of other images"):
            packed_while(tmp_path, source, "pieces/00003.json", happening)
        assert dataset.exists("index.json") == (happening is replace)
    assert verify_dataset(open_store(str(tmp_path)), KEY) == []


def test_ensure_compares_the_source(tmp_path, source):
    photos = folder_of(tmp_path / "photos", FILES)

    def ensured(source: object, *more: object):
        return ddpm_here("data", "ensure", "mine", "--bucket", tmp_path / "b", "--size", 8, "--source", source, *more)

    succeeded(ensured(photos))
    index = tmp_path / "b/datasets/mine-8/index.json"
    before = index.read_bytes()
    assert succeeded(ensured(source)) == ""
    for name, files in CHANGES.items():
        line = refused(ensured(zip_of(tmp_path / f"{name}.zip", files)), Exit.BAD_REQUEST)
        assert "mine-8 is there already: 60 images of photos" in line and f"{name}.zip has other images" in line
        assert "make: DATASET=NAME" in line and "--replace" in line
    (tmp_path / "labels.csv").write_text("".join(f"{name},{n % 3}\n" for n, (name, _) in enumerate(FILES)))
    gone, labels = tmp_path / "moved", ("--labels", tmp_path / "labels.csv")
    for source_now, options, said in (
        (photos, labels, "other images, labels"),
        (photos, ("--no-classes",), "other images, labels"),
        (photos, ("--channels", 1), "classes or pixels"),
        (photos, ("--range", "0,9"), "classes or pixels"),
        (source, (), "SOURCE has not changed"),
        (photos, ("--channels", 3), "SOURCE has not changed"),
        (source, ("--labels", tmp_path / "none.csv"), "SOURCE is not compared: --labels: there is nothing at"),
        (gone, (), f"SOURCE is not compared: there is nothing at {gone}"),
        ("https://host.invalid/a.zip", (), "; SOURCE is not compared"),
    ):
        done = ensured(source_now, *options)
        if "SOURCE" in said:
            assert (succeeded(done), said in done.stderr) == ("", True), done.stderr
        else:
            assert said in refused(done, Exit.BAD_REQUEST)
    assert index.read_bytes() == before


@pytest.mark.parametrize("command", ["ensure", pytest.param("pack", marks=pytest.mark.slow)])
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
    with closing(Lease.take(run, highest_fence(run), 0.0, Stop(), print)):
        assert f"{run.uri} is held by process" in refused(packs(second, "--replace"), Exit.LOST_RUN)
        refused(ddpm_here("data", "delete", "mine", "--bucket", bucket, "--yes"), Exit.LOST_RUN)
    # A source that cannot be packed costs nothing.
    refused(packs(tmp_path / "nowhere.zip", "--replace"), Exit.MISSING_INPUT)
    assert load_index(store, "datasets/mine-16") == before
    assert "made     from 1.zip" in succeeded(packs(second, "--replace"))
    assert load_index(store, "datasets/mine-16").dataset_id != before.dataset_id
    assert verify_dataset(store, "datasets/mine-16") == []
    refused(packs(first), Exit.BAD_REQUEST)
    assert "data.dataset_id is" in refused(ddpm_here(*words, "--run", "over"), Exit.BAD_CONFIG)


# The preview.
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
    packed(tmp_path / "bucket", source)
    sheet = Image.open(io.BytesIO(objects(tmp_path / "bucket")["preview.png"]))
    colours = [shade(n).getpixel((0, 0)) for n in range(50)]
    numbers = [colours.index(tuple(colour)) for colour in tiles_in(np.asarray(sheet), 64, 4).reshape(-1, 3).tolist()]
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
