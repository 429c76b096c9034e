import hashlib
import io
import json
import os
import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

import job.data.pack
from job.data.checks import verify_dataset
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.shards import OFFSETS_DTYPE, DatasetIndex, load_index
from job.exits import BadDataError, BadRequestError, JobError, MissingInputError, StoppedError
from job.stop import Stop
from job.store import open_store
from job.store.local import LocalStore
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.packing import FILES, KEY, SHARD_IMAGES, committed, objects, packed, written
from tests.job.some_images import encoded, folder_of, jpeg, picture, tar_of, zip_of


def samples_in(bucket: Path, index: DatasetIndex, key: str = KEY) -> webdataset.WebDataset:
    urls = [str(bucket / key / shard.name) for shard in index.shards]
    return webdataset.WebDataset(urls, shardshuffle=False)


def test_webdataset_reads_the_same_dataset(tmp_path, source):
    options = {"crop": "1,2,30,40", "resize_filter": "box", "licence": "CC0-1.0"}
    index = packed(tmp_path, source, **options)
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
        assert shard.images == SHARD_IMAGES or shard == index.shards[-1]
        table = np.fromfile(tmp_path / KEY / shard.offsets_name, OFFSETS_DTYPE)
        assert len(table) == shard.images
        for offset, size, label, sha256 in table.tolist():
            png = tar[offset : offset + size]
            assert (hashlib.sha256(png).digest()[:16], png[:4], png[-8:-4]) == (sha256, b"\x89PNG", b"IEND")
            labels.append(label)
    assert labels == [0] * 30 + [1] * 30
    without = packed(tmp_path / "without", source, classes=False)
    assert without.classes == () and not any("cls" in sample for sample in samples_in(tmp_path / "without", without))


def test_any_container_gives_the_same_dataset(tmp_path, source, undisturbed, monkeypatch):
    sources = [source, folder_of(tmp_path / "pets", FILES), tar_of(tmp_path / "pets.tgz", FILES)]
    indices = []
    for number, path in enumerate(sources):
        monkeypatch.setattr(os, "cpu_count", lambda number=number: 1 + 3 * number)
        indices.append(packed(tmp_path / f"bucket-{number}", path))
    assert len({(index.dataset_id, index.listing_sha256) for index in indices}) == 1
    assert objects(tmp_path / "bucket-0") == undisturbed
    assert not any("pieces" in key for key in undisturbed)
    other = packed(tmp_path / "other", zip_of(tmp_path / "b.zip", [*FILES[:-1], ("dogs/999.jpg", FILES[-1][1])]))
    assert other.dataset_id == indices[0].dataset_id
    assert other.listing_sha256 != indices[0].listing_sha256
    with pytest.raises(BadRequestError, match=r"small-16 is there already: 60 images of pets.zip, crop center"):
        packed(tmp_path / "bucket-0", source, crop="squash")
    assert packed(tmp_path / "bucket-0", source, slice="0/1").dataset_id == other.dataset_id
    with pytest.raises(BadRequestError, match="holds shards of other images"):
        packed(tmp_path / "bucket-0", zip_of(tmp_path / "c.zip", FILES[1:]), slice="0/1")
    assert objects(tmp_path / "bucket-0") == undisturbed


def test_held_out_images_are_a_dataset(tmp_path, source):
    words = ("data", "pack", source, "small", "--size", 16, "--bucket", tmp_path, "--hold-out")
    said = succeeded(ddpm_here(*words, "20%"))
    assert "held out small-held-out-16, on which its runs log val_loss" in said
    store, parts = open_store(str(tmp_path)), {}
    for name in ("small", "small-held-out"):
        index = load_index(store, f"datasets/{name}-16")
        assert index.classes == ("cats", "dogs")
        parts[name] = {(sample["cls"], sample["png"]) for sample in samples_in(tmp_path, index, f"datasets/{name}-16")}
        assert len(parts[name]) == index.images
    assert 4 <= len(parts["small-held-out"]) <= 20
    whole = packed(tmp_path / "whole", source)
    everything = {(sample["cls"], sample["png"]) for sample in samples_in(tmp_path / "whole", whole)}
    assert parts["small"] | parts["small-held-out"] == everything
    assert not parts["small"] & parts["small-held-out"]

    # Of what is there already nothing is held out afterwards.
    taken = ("data", "pack", source, "taken", "--size", 16, "--bucket", tmp_path)
    succeeded(ddpm_here(*taken))
    assert "is there already" in refused(ddpm_here(*taken, "--hold-out", "20%"), 64)
    assert not (tmp_path / "datasets/taken-held-out-16").exists()

    # An image stays on its side when others go, and the command goes on where it was interrupted.
    before, fewer = objects(tmp_path), zip_of(tmp_path / "fewer.zip", FILES[::2])
    (tmp_path / KEY / "index.json").unlink()
    succeeded(ddpm_here(*words, "20%"))
    assert objects(tmp_path) == before
    succeeded(ddpm_here("data", "pack", fewer, "few", "--size", 16, "--bucket", tmp_path, "--hold-out", "20%"))
    assert load_index(store, "datasets/few-held-out-16").images <= len(parts["small-held-out"])
    assert "--hold-out" in refused(ddpm_here(*words, "20"), 64)
    assert "at most 50%" in refused(ddpm_here(*words, "51%"), 64)
    (tmp_path / KEY / "index.json").unlink()
    assert "holds 20.000% out, and not 10.000%" in refused(ddpm_here(*words, "10%"), 64)
    # Nor are images of an earlier source, or of another crop, what the new one is validated on.
    others = ("data", "pack", fewer, *words[3:], "20%")
    for line in (refused(ddpm_here(*others), 64), refused(ddpm_here(*words, "20%", "--crop", "squash"), 64)):
        assert "small-held-out-16 holds 20.000% out, and not" in line and "has now with these parameters" in line
        assert "data delete small-held-out" in line
    none = ddpm_here("data", "pack", fewer, "none", "--size", 16, "--bucket", tmp_path, "--hold-out", "0.001%")
    assert "holds no image out" in refused(none, 64)


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


def test_pack_reports_skipped_and_merged(tmp_path, caplog):
    """As a telephone and an exercise leave them; what Pillow reads is packed."""
    files = [(f"{split}/{kind}/1.png", encoded(picture(1))) for split in ("train", "test") for kind in ("cats", "dogs")]
    files += [("train/cats/2.avif", encoded(picture(2), "AVIF")), ("train/cats/3.cr2", b"x"), ("test/notes.txt", b"x")]
    words = ("data", "pack", zip_of(tmp_path / "a.zip", files), "--size", 8, "--bucket", tmp_path / "bucket")
    out = succeeded(ddpm_here(*words, "both", "--split", "all")).splitlines()
    assert out[1].startswith("images   5 colour") and "rejects" not in str(out)
    assert out[-2] == "skipped  1 .cr2, 1 .txt"
    assert "2 folders became classes that the network will learn: cats, dogs" in caplog.messages[0]
    assert "test, train are packed together, as one dataset; `ddpm data pack --split train`" in caplog.messages[1]
    caplog.clear()
    out = succeeded(ddpm_here(*words, "one", "--split", "train")).splitlines()
    assert out[1].startswith("images   3 colour") and len(caplog.messages) == 1
    assert "from a.zip, split train, crop" in str(out) and out[-2] == "skipped  1 .cr2"
    # As formats with splits, whose test images no run learns by default.
    out = succeeded(ddpm_here(*words, "default")).splitlines()
    assert out[1].startswith("images   3 colour") and out[-2] == "skipped  1 .cr2"
    assert "packing its split train; --split test would pack another; all: --split all" in caplog.text
    assert "split val holds no images: no file or folder of it is named so" in refused(
        ddpm_here(*words, "none", "--split", "val"), 65
    )
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
    theirs = f"{gcs_bucket}/in/pets.zip"
    with pytest.raises(StoppedError, match="all whole pieces are saved") as error:
        packed(gcs_bucket, theirs, stop_at=40)
    assert error.value.exit_code == 75
    there = objects(gcs_bucket)
    assert "index.json" not in there
    done = [json.loads(there[key]) for key in sorted(there) if key.startswith("pieces/")]
    assert 1 <= len(done) <= 2
    packed(gcs_bucket, theirs, decoded=(decoded := count()))
    assert objects(gcs_bucket) == undisturbed
    assert next(decoded) == 60 - sum(record["facts"]["shard"]["images"] for record in done)
    assert verify_dataset(open_store(gcs_bucket), KEY) == []


def test_resumed_packing_may_allow_more_rejects(tmp_path):
    bad = [(f"{name}-bad.jpg", b"bad") for name, _ in FILES[::5]]
    source = zip_of(tmp_path / "a.zip", sorted([*FILES, *bad]))
    with pytest.raises(BadDataError, match=r"--max-bad=9 .* more: see to them, or allow more with --max-bad"):
        packed(tmp_path, source, max_bad=9)
    assert sum(key.startswith("pieces/") for key in objects(tmp_path)) >= 1
    packed(tmp_path, source, max_bad=12)
    packed(tmp_path / "fresh", source, max_bad=12)
    assert objects(tmp_path) == objects(tmp_path / "fresh")
    assert objects(tmp_path)["rejects.jsonl"].count(b"\n") == 12


def before(monkeypatch, method: str, part: str, action) -> None:
    """Has `action` happen once: before a local store's method is called for a key with `part` for the first time."""
    original, calls = getattr(LocalStore, method), count()

    def hooked(self, *arguments):
        if any(part in str(argument) for argument in arguments) and next(calls) == 0:
            action()
        return original(self, *arguments)

    monkeypatch.setattr(LocalStore, method, hooked)


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def all_but_committed(bucket: Path, source: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before(patch, "create", "index.json", interrupted)
        packed(bucket, source)


def test_changed_source_or_options_are_refused(tmp_path, source):
    changes = {
        "an image": [*FILES[:35], (FILES[35][0], jpeg(999)), *FILES[36:]],
        "a name": [*FILES[:35], ("cats/new.jpg", FILES[35][1]), *FILES[36:]],
        "more images": [*FILES, ("dogs/zzz.jpg", jpeg(999))],
        "fewer images": FILES[:-5],
        "the classes": [*FILES[:-1], ("birds/1.jpg", FILES[-1][1])],
    }
    bucket = tmp_path / "bucket"
    all_but_committed(bucket, source)
    before = objects(bucket)
    attempts = [(name, zip_of(tmp_path / f"{name}.zip", files), {}) for name, files in changes.items()]
    options = [{"crop": "squash"}, {"shard_images": 9}, {"classes": False}, {"resize_filter": "box"}]
    attempts += [(str(option), source, option) for option in options]
    for name, path, option in attempts:
        with pytest.raises(BadRequestError, match=f"`ddpm data delete small --size 16 --bucket {bucket}` and type"):
            packed(bucket, path, **option)
        assert objects(bucket) == before, name
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


def test_equal_packers_do_each_others_work(tmp_path, source, undisturbed):
    outcomes = []

    def attempt() -> None:
        try:
            packed(tmp_path, source)
        except JobError as refusal:
            outcomes.append(str(refusal))

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("is there already" in error for error in outcomes), outcomes
    assert committed(tmp_path) == undisturbed


def test_packer_of_others_gives_way(tmp_path, source, undisturbed, monkeypatch):
    def rival() -> None:
        with pytest.raises(BadRequestError, match="another process packs something else there"):
            packed(tmp_path, source, crop="squash")

    before(monkeypatch, "create", "pieces/00000.json", rival)
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed


def test_equal_packer_is_no_rival(tmp_path, source, undisturbed, monkeypatch):
    before(monkeypatch, "create", "pieces/00001.json", lambda: packed(tmp_path, source))
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed


def test_deleted_pieces_are_not_committed(tmp_path, source, monkeypatch):
    dataset = open_store(str(tmp_path)).sub(KEY)

    def delete() -> None:
        for entry in list(dataset.list()):
            dataset.delete(entry.key)

    def replace() -> None:
        delete()
        packed(tmp_path, source, crop="squash")

    for happening in (delete, replace):
        delete()
        before(monkeypatch, "create", "pieces/00003.json", happening)
        with pytest.raises(BadRequestError, match=r"was deleted meanwhile|holds shards of other images"):
            packed(tmp_path, source)
        assert dataset.exists("index.json") == (happening is replace)
    assert verify_dataset(open_store(str(tmp_path)), KEY) == []
