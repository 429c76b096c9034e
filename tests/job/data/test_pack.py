"""Packing: the same dataset of any container, resumed at any point; what is left out, held out, refused or replaced."""

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

import job.data.pack
from job.coordination.lease import Lease
from job.data.checks import verify_dataset
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.shards import OFFSETS_DTYPE, DatasetIndex, load_index
from job.exits import BadDataError, BadRequestError, Exit, JobError, MissingInputError, StoppedError
from job.runs.records import highest_fence
from job.stop import Stop
from job.store import open_store
from job.store.local import LocalStore
from tests.job.command_line import ddpm_here, refused, settings, succeeded
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
    assert verify_dataset(open_store(str(tmp_path)), KEY) == []
    labels = []
    for shard in index.shards:
        tar = (tmp_path / KEY / shard.name).read_bytes()
        table = np.fromfile(tmp_path / KEY / shard.offsets_name, OFFSETS_DTYPE)
        assert len(table) == shard.images == (12 if shard == index.shards[-1] else SHARD_IMAGES)
        for offset, size, label, sha256 in table.tolist():
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
    store, parts, fewer = open_store(str(tmp_path)), {}, zip_of(tmp_path / "fewer.zip", FILES[::2])

    def held_out(name: str, share: str = "20%", of: Path = source, *more: object):
        where = ("--size", 16, "--bucket", tmp_path)
        return ddpm_here("data", "pack", of, name, *where, *(["--hold-out", share] if share else []), *more)

    assert "held out small-held-out-16, on which its runs log val_loss" in succeeded(held_out("small"))
    for name in ("small", "small-held-out"):
        index = load_index(store, f"datasets/{name}-16")
        assert index.classes == ("cats", "dogs")
        parts[name] = {(sample["cls"], sample["png"]) for sample in samples_in(tmp_path, index, f"datasets/{name}-16")}
        assert len(parts[name]) == index.images
    ours, theirs = parts.values()
    assert 4 <= len(theirs) <= 20
    whole = packed(tmp_path / "whole", source)
    assert ours | theirs == {(sample["cls"], sample["png"]) for sample in samples_in(tmp_path / "whole", whole)}
    assert not ours & theirs

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
    assert "--hold-out" in refused(held_out("small", "20"), 64)
    assert "at most 50%" in refused(held_out("small", "51%"), 64)
    (tmp_path / KEY / "index.json").unlink()
    assert "holds 20.000% out, and not 10.000%" in refused(held_out("small", "10%"), 64)
    # Nor are images of an earlier source, or of another crop, what the new one is validated on.
    for done in (held_out("small", of=fewer), held_out("small", "20%", source, "--crop", "squash")):
        line = refused(done, 64)
        assert "small-held-out-16 holds 20.000% out, and not" in line and "has now with these parameters" in line
        assert "data delete small-held-out" in line
    assert "holds no image out" in refused(held_out("none", "0.001%", fewer), 64)


def test_rejected_images_are_named_and_bounded(tmp_path):
    good = encoded(picture(1))
    files = [("1.png", good), ("2.png", b"no image"), ("3.png", good[:-400]), ("4.png", encoded(picture(1, 7, 50)))]
    files += [("5.png", good), ("6.jpg", b"")]
    index = packed(tmp_path, zip_of(tmp_path / "a.zip", files), max_bad=4)
    assert (index.images, index.rejected_images) == (2, 4)
    lines = [json.loads(line) for line in objects(tmp_path)["rejects.jsonl"].splitlines()]
    assert [line["name"] for line in lines] == ["2.png", "3.png", "4.png", "6.jpg"]
    assert lines[2]["reason"] == "has 7×50 pixels, under --min-side=8"
    bad = zip_of(tmp_path / "bad.zip", [(f"{n:04d}.png", b"no image") for n in range(2000)])
    with pytest.raises(BadDataError, match=r"more than --max-bad=5 images .*: '0000.png' is .*; and 3 more"):
        packed(tmp_path / "bad", bad, max_bad=5)
    with pytest.raises(BadDataError, match=r"none of its images can be used: '1.png'"):
        packed(tmp_path / "bad", zip_of(tmp_path / "none.zip", [("1.png", b"no image")]))
    with pytest.raises(MissingInputError):
        load_index(open_store(str(tmp_path / "bad")), KEY)

    # Resumed, packing may allow more of them.
    files = sorted([*FILES, *((f"{name}-bad.jpg", b"bad") for name, _ in FILES[::5])])
    source, bucket = zip_of(tmp_path / "b.zip", files), tmp_path / "resumed"
    with pytest.raises(BadDataError, match=r"--max-bad=9 .* more: see to them, or allow more with --max-bad"):
        packed(bucket, source, max_bad=9)
    assert sum(key.startswith("pieces/") for key in objects(bucket)) >= 1
    for place in (bucket, tmp_path / "fresh"):
        packed(place, source, max_bad=12)
    assert objects(bucket) == objects(tmp_path / "fresh")
    assert objects(bucket)["rejects.jsonl"].count(b"\n") == 12


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


def packed_while(bucket: Path, source: Path, part: str, action) -> DatasetIndex:
    """Packs, and has `action` happen once: before a local store creates a key with `part` for the first time."""
    create, calls = LocalStore.create, count()

    def hooked(self, *arguments):
        if any(part in str(argument) for argument in arguments) and next(calls) == 0:
            action()
        return create(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "create", hooked)
        return packed(bucket, source)


def test_changed_source_or_options_are_refused(tmp_path, source):
    changes = {
        "an image": [*FILES[:35], (FILES[35][0], jpeg(999)), *FILES[36:]],
        "a name": [*FILES[:35], ("cats/new.jpg", FILES[35][1]), *FILES[36:]],
        "more images": [*FILES, ("dogs/zzz.jpg", jpeg(999))],
        "fewer images": FILES[:-5],
        "the classes": [*FILES[:-1], ("birds/1.jpg", FILES[-1][1])],
    }
    bucket = tmp_path / "bucket"
    with pytest.raises(KeyboardInterrupt):
        packed_while(bucket, source, "index.json", interrupted)
    before = objects(bucket)
    attempts = [(zip_of(tmp_path / f"{name}.zip", files), {}) for name, files in changes.items()]
    options = [{"crop": "squash"}, {"shard_images": 9}, {"classes": False}, {"resize_filter": "box"}]
    for path, option in attempts + [(source, option) for option in options]:
        with pytest.raises(BadRequestError, match=f"`ddpm data delete small --size 16 --bucket {bucket}` and type"):
            packed(bucket, path, **option)
        assert objects(bucket) == before, (path.name, option)
    packed(bucket, source)
    assert committed(bucket).keys() == before.keys() - {key for key in before if "pieces" in key} | {"index.json"}


def test_packing_resumes_before_any_write(tmp_path):
    source, few = zip_of(tmp_path / "few.zip", FILES[25:33]), {"shard_images": 2}
    packed(tmp_path / "undisturbed", source, **few)
    undisturbed = objects(tmp_path / "undisturbed")
    # Three objects for each of four shards; preview and index; the entries of the four to delete. Before them, a probe.
    for number in range(12 + 2 + 4):
        bucket, writes = tmp_path / str(number), count(-3)

        def dying(original, number=number, writes=writes):
            return lambda *arguments: interrupted() if next(writes) == number else original(*arguments)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for method in ("create", "move", "put", "delete"):
                patch.setattr(LocalStore, method, dying(getattr(LocalStore, method)))
            packed(bucket, source, **few)
        assert (bucket / KEY / "index.json").exists() == (number > 13)
        if number > 13:
            assert committed(bucket) == undisturbed
            continue
        vouched = [f"shard-{path.stem}" for path in (bucket / KEY / "pieces").glob("*.json")]
        reused = {path: written(path) for path in (bucket / KEY).glob("*.tar") if path.stem in vouched}
        assert len(reused) == min(number // 3, 4)
        packed(bucket, source, **few)
        assert objects(bucket) == undisturbed
        assert {path: written(path) for path in reused} == reused


def test_packers_beside_each_other(tmp_path, source, undisturbed):
    """Equal ones do each other's work, and one of something else gives way."""
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(packed, tmp_path / "both", source) for _ in range(2)]
    errors = [str(one.exception()) for one in both if one.exception()]
    assert all("is there already" in error for error in errors), errors
    assert committed(tmp_path / "both") == undisturbed

    def rival() -> None:
        with pytest.raises(BadRequestError, match="another process packs something else there"):
            packed(tmp_path / "rival", source, crop="squash")

    packed_while(tmp_path / "rival", source, "pieces/00000.json", rival)
    packed_while(tmp_path / "equal", source, "pieces/00001.json", lambda: packed(tmp_path / "equal", source))
    assert objects(tmp_path / "rival") == objects(tmp_path / "equal") == undisturbed


def test_deleted_pieces_are_not_committed(tmp_path, source):
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


def test_ensure_compares_the_source(tmp_path):
    pets = [(f"{kind}/{n}.jpg", jpeg(n)) for kind in ("cats", "dogs") for n in range(6)]
    photos, copied = folder_of(tmp_path / "photos", pets), zip_of(tmp_path / "copied.zip", pets)

    def ensured(source: object, *more: object):
        return ddpm_here("data", "ensure", "mine", "--bucket", tmp_path / "b", "--size", 8, "--source", source, *more)

    succeeded(ensured(photos))
    index = tmp_path / "b/datasets/mine-8/index.json"
    before = index.read_bytes()
    assert succeeded(ensured(copied)) == ""
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
    for options, said in (
        (("--labels", tmp_path / "labels.csv"), "other images, labels"),
        (("--no-classes",), "other images, labels"),
        (("--channels", 1), "classes or pixels"),
        (("--range", "0,9"), "classes or pixels"),
    ):
        assert said in refused(ensured(photos, *options), Exit.BAD_REQUEST)
    for source, options, said in (
        (copied, (), "SOURCE has not changed"),
        (photos, ("--channels", 3), "SOURCE has not changed"),
        (copied, ("--labels", tmp_path / "none.csv"), "SOURCE is not compared: --labels: there is nothing at"),
        (tmp_path / "moved", (), f"SOURCE is not compared: there is nothing at {tmp_path}/moved"),
        ("https://host.invalid/a.zip", (), "; SOURCE is not compared"),
    ):
        done = ensured(source, *options)
        assert (succeeded(done), said in done.stderr) == ("", True), done.stderr
    assert index.read_bytes() == before


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
