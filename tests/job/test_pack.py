import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import job.pack
from job.exits import BadDataError, BadRequestError, DiskFullError, JobError, MissingInputError, StoppedError
from job.pack import pack
from job.shards import OFFSETS_DTYPE, DatasetIndex, load_index
from job.store import open_store
from job.store.local import LocalStore
from job.verify import verify_dataset
from tests.job.some_images import encoded, folder_of, jpeg, picture, tar_of, zip_of
from tests.job.test_archives import digits, mnist  # noqa: F401

KEY = "datasets/small-16"
SHARD_BYTES = 40_000
FILES = [(f"{kind}/{n:03d}.jpg", jpeg(100 * i + n)) for i, kind in enumerate(("cats", "dogs")) for n in range(30)]


def packed(bucket: str | Path, source: str | Path, **options) -> DatasetIndex:
    return pack(open_store(str(bucket)), str(source), "small", **{"size": 16, "shard_bytes": SHARD_BYTES, **options})


def objects(bucket: str | Path) -> dict[str, bytes]:
    store = open_store(str(bucket)).sub(KEY)
    return {entry.key: store.read(entry.key).data for entry in store.list()}


def committed(bucket: Path) -> dict[str, bytes]:
    """Without what an interrupted clearing-up may have left of the journal."""
    assert (bucket / KEY / "index.json").exists()
    return {key: content for key, content in objects(bucket).items() if not key.startswith("packing/")}


def written(shard: Path) -> tuple[int, int]:
    """Changes whenever the object is written anew, be it with the same bytes."""
    return shard.stat().st_ino, shard.stat().st_mtime_ns


def stop_after(images: int):
    """Says stop at the poll for this image; the first look at the names polls as well."""
    polls = iter([False] * (len(FILES) + images))
    return lambda: next(polls, True)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return zip_of(tmp_path_factory.mktemp("source") / "pets.zip", FILES)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, bytes]:
    bucket = tmp_path_factory.mktemp("undisturbed")
    packed(bucket, source)
    return objects(bucket)


def test_webdataset_reads_the_same_pixels_and_classes(tmp_path, source):
    import webdataset

    index = packed(tmp_path, source)
    assert len(index.shards) == 4
    urls = [str(tmp_path / KEY / shard.name) for shard in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(60)]
    for (name, content), sample in zip(FILES, samples, strict=True):
        image = Image.open(io.BytesIO(content)).crop((0, 4, 40, 44)).resize((16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(sample["png"], np.asarray(image))
        assert index.classes[sample["cls"]] == name.split("/")[0]


def test_without_classes_there_are_only_images(tmp_path, source):
    import webdataset

    index = packed(tmp_path, source, classes=False)
    assert index.classes == ()
    urls = [str(tmp_path / KEY / shard.name) for shard in index.shards]
    assert {key for sample in webdataset.WebDataset(urls, shardshuffle=False) for key in sample if key[0] != "_"} == {
        "png"
    }


def test_the_offsets_point_to_the_images_and_the_index_says_how_they_were_made(tmp_path, source):
    index = packed(tmp_path, source, crop="1,2,30,40", resize_filter="box", licence="CC0-1.0")
    assert (index.images, index.classes, index.crop, index.resize_filter) == (60, ("cats", "dogs"), "1,2,30,40", "box")
    assert (index.source, index.licence, index.size, index.channels) == ("pets.zip", "CC0-1.0", 16, 3)
    assert index == load_index(open_store(str(tmp_path)), KEY)
    labels = []
    for shard in index.shards:
        tar = (tmp_path / KEY / shard.name).read_bytes()
        assert SHARD_BYTES <= len(tar) < SHARD_BYTES + 5000 or shard == index.shards[-1]
        table = np.fromfile(tmp_path / KEY / shard.offsets_name, OFFSETS_DTYPE)
        assert len(table) == shard.images
        for offset, size, label in table.tolist():
            assert tar[offset : offset + 4] == b"\x89PNG"
            assert tar[offset + size - 8 : offset + size - 4] == b"IEND"
            labels.append(label)
    assert labels == [0] * 30 + [1] * 30
    assert verify_dataset(open_store(str(tmp_path)), KEY) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_the_bytes_do_not_depend_on_threads(tmp_path, source, undisturbed, threads):
    packed(tmp_path, source, threads=threads)
    assert objects(tmp_path) == undisturbed
    assert not any("packing" in key for key in undisturbed)


def test_a_folder_a_zip_and_a_tar_of_the_same_images_are_the_same_dataset(tmp_path, source):
    sources = [source, folder_of(tmp_path / "pets", FILES), tar_of(tmp_path / "pets.tgz", FILES)]
    indices = [packed(tmp_path / f"bucket-{n}", path) for n, path in enumerate(sources)]
    assert len({index.dataset_id for index in indices}) == 1
    assert len({index.source_sha256 for index in indices}) == 1
    other = packed(tmp_path / "other", zip_of(tmp_path / "b.zip", [*FILES[:-1], ("dogs/999.jpg", FILES[-1][1])]))
    assert other.dataset_id == indices[0].dataset_id
    assert other.source_sha256 != indices[0].source_sha256


def test_from_bucket_to_bucket(tmp_path, source, undisturbed, gcs_bucket):
    open_store(gcs_bucket).upload(source, "in/pets.zip")
    packed(gcs_bucket, f"{gcs_bucket}/in/pets.zip")
    assert objects(gcs_bucket) == undisturbed
    assert verify_dataset(open_store(gcs_bucket), KEY) == []


def test_mnist_is_packed_grey(tmp_path, digits):  # noqa: F811
    mnist(tmp_path / "mnist", "train", *digits, gz=True)
    index = packed(tmp_path, tmp_path / "mnist", size=28)
    assert (index.channels, index.classes) == (1, ("0", "1", "2", "3", "4", "5", "9"))
    assert index.source == "train-images-idx3-ubyte.gz"
    assert verify_dataset(open_store(str(tmp_path)), "datasets/small-28") == []
    assert packed(tmp_path / "colour", tmp_path / "mnist", size=28, channels=3).channels == 3


def test_rejected_images_are_counted_and_named(tmp_path):
    good = encoded(picture(1))
    files = [("1.png", good), ("2.png", b"no image"), ("3.png", good[:-400]), ("4.png", encoded(picture(1, 7, 50)))]
    files += [("5.png", good), ("6.jpg", b"")]
    index = packed(tmp_path, zip_of(tmp_path / "a.zip", files), max_bad=4)
    assert (index.images, index.rejected_images) == (2, 4)
    lines = [json.loads(line) for line in objects(tmp_path)["rejects.jsonl"].splitlines()]
    assert [line["name"] for line in lines] == ["2.png", "3.png", "4.png", "6.jpg"]
    assert lines[2]["reason"] == "has 7×50 pixels, under 8 on its shorter side"


def test_too_many_rejects_end_the_packing_at_once(tmp_path):
    files = [(f"{n:04d}.png", b"no image") for n in range(2000)]
    read = []
    with pytest.raises(
        BadDataError, match=r"more than --max-bad=5 images cannot be used: '0000.png' is .*; and 3 more"
    ):
        packed(tmp_path, zip_of(tmp_path / "a.zip", files), max_bad=5, progress=lambda *done: read.append(done))
    assert read == [(n, 2000) for n in range(1, 6)]
    with pytest.raises(MissingInputError):
        load_index(open_store(str(tmp_path)), KEY)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(BadDataError, match=r"none of its images can be used: '1.png'"):
        packed(tmp_path, zip_of(tmp_path / "a.zip", [("1.png", b"no image")]))
    assert "index.json" not in objects(tmp_path)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"crop": "middle"}, 64),
        ({"size": 0}, 64),
        ({"resize_filter": "none"}, 64),
        ({"channels": 2}, 64),
        ({"classes": True}, 64),
        ({"source": "nowhere.zip"}, 66),
        ({"source": __file__}, 65),
    ],
)
def test_bad_requests_touch_nothing(tmp_path, options, code):
    source = zip_of(tmp_path / "a.zip", [("1.jpg", jpeg(1))])
    with pytest.raises(JobError) as error:
        packed(tmp_path / "bucket", **{"source": source, **options})
    assert error.value.exit_code == code
    assert not (tmp_path / "bucket").exists()


def test_a_dataset_that_is_there_is_not_packed_again(tmp_path, source, undisturbed):
    packed(tmp_path, source)
    with pytest.raises(BadRequestError, match=r"small-16 is there already: 60 images of pets.zip, crop center"):
        packed(tmp_path, source, crop="squash")
    assert objects(tmp_path) == undisturbed


def test_a_bucket_that_is_missing_shows_before_anything_is_packed(source, gcs_bucket, monkeypatch):
    monkeypatch.setattr(job.pack, "prepare", lambda *_: pytest.fail("packed"))
    with pytest.raises(MissingInputError, match="no bucket"):
        packed(f"{gcs_bucket}-not", source)


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("bucket_kind", ["local", "gs"])
def test_a_stopped_packing_goes_on_and_decodes_nothing_twice(
    request, tmp_path, source, undisturbed, bucket_kind, monkeypatch
):
    bucket = request.getfixturevalue("gcs_bucket") if bucket_kind == "gs" else str(tmp_path)
    with pytest.raises(StoppedError, match="the same command goes on from here") as error:
        packed(bucket, source, should_stop=stop_after(40))
    assert error.value.exit_code == 75
    there = objects(bucket)
    assert "index.json" not in there
    done = [json.loads(there[f"packing/shard-{n:05d}.json"]) for n in range(2)]
    assert "packing/shard-00002.json" not in there

    calls = []
    prepare = job.pack.prepare
    monkeypatch.setattr(job.pack, "prepare", lambda *a: (calls.append(a), prepare(*a))[1])
    packed(bucket, source)
    assert objects(bucket) == undisturbed
    assert len(calls) == 60 - done[-1]["read_images"]


def test_stopping_while_the_names_are_read(tmp_path, source):
    with pytest.raises(StoppedError):
        packed(tmp_path / "bucket", source, should_stop=lambda: True)
    assert not (tmp_path / "bucket").exists()


def test_more_rejects_may_be_allowed_when_it_goes_on(tmp_path):
    files = [
        file for n, file in enumerate(FILES) for file in ([file, (f"cats/x{n}.jpg", b"bad")] if n % 5 == 0 else [file])
    ]
    source = zip_of(tmp_path / "a.zip", files)
    with pytest.raises(BadDataError, match="--max-bad=9"):
        packed(tmp_path, source, max_bad=9)
    reused = {key for key in objects(tmp_path) if key.startswith("packing/shard")}
    assert len(reused) >= 2
    packed(tmp_path, source, max_bad=12)
    packed(tmp_path / "fresh", source, max_bad=12)
    assert objects(tmp_path) == objects(tmp_path / "fresh")
    assert objects(tmp_path)["rejects.jsonl"].count(b"\n") == 12


CHANGES = {
    "an image": lambda files: [*files[:35], (files[35][0], jpeg(999)), *files[36:]],
    "a name": lambda files: [*files[:35], ("cats/new.jpg", files[35][1]), *files[36:]],
    "more images": lambda files: [*files, ("dogs/zzz.jpg", jpeg(999))],
    "fewer images": lambda files: files[:-5],
    "hardly any images": lambda files: [*files[:4], *files[-4:]],
    "the first image": lambda files: [("cats/000.jpg", jpeg(999)), *files[1:]],
    "the classes": lambda files: [*files[:-1], ("birds/1.jpg", files[-1][1])],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("killed", ["midway", "before the commit"])
def test_a_source_that_changed_in_between_is_noticed(tmp_path, change, killed):
    source = zip_of(tmp_path / "pets.zip", FILES)
    if killed == "midway":
        with pytest.raises(StoppedError):
            packed(tmp_path, source, should_stop=stop_after(40))
    else:
        all_but_committed(tmp_path, source)
        assert "packing/shard-00003.json" in objects(tmp_path)
    before = written(tmp_path / KEY / "shard-00000.tar")
    files = CHANGES[change](FILES)
    index = packed(tmp_path, zip_of(source, files))
    packed(tmp_path / "fresh", source)
    assert objects(tmp_path) == objects(tmp_path / "fresh")
    assert index.images == len(files)
    same_start = files[:16] == FILES[:16] and change != "the classes"
    assert (before == written(tmp_path / KEY / "shard-00000.tar")) is same_start


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "options", [{"crop": "squash"}, {"shard_bytes": 9000}, {"classes": False}, {"resize_filter": "box"}]
)
def test_other_parameters_take_nothing_over(tmp_path, source, options):
    with pytest.raises(StoppedError):
        packed(tmp_path, source, should_stop=stop_after(50))
    packed(tmp_path, source, **options)
    packed(tmp_path / "fresh", source, **options)
    assert objects(tmp_path) == objects(tmp_path / "fresh")


@pytest.mark.parametrize("lost", ["shard-00000.tar", "shard-00001.offsets", "packing/shard-00000.json"])
def test_what_was_lost_in_between_is_packed_anew(tmp_path, source, undisturbed, lost):
    with pytest.raises(StoppedError):
        packed(tmp_path, source, should_stop=stop_after(50))
    open_store(str(tmp_path)).sub(KEY).delete(lost)
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed


@pytest.mark.parametrize("rotten", ["packing/shard-00001.json", "shard-00002.tar", "shard-00002.offsets"])
def test_leftovers_that_are_rotten_are_replaced(tmp_path, source, undisturbed, rotten):
    with pytest.raises(StoppedError):
        packed(tmp_path, source, should_stop=stop_after(40))
    (tmp_path / KEY / rotten).write_bytes(b"rotten")
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed


KILLED_BEFORE_EACH_WRITE = """
import itertools, os, signal, sys
from job.pack import pack
from job.store import open_store
from job.store.local import LocalStore

source, folder = sys.argv[1:]
writes = itertools.count(1)

def dying(method, last):
    def write(self, *arguments):
        if next(writes) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *arguments)
    return write

for last in itertools.count(1):
    bucket = f"{folder}/bucket-{last}"
    child = os.fork()
    if child == 0:
        for name in ("create", "upload", "put", "delete"):
            setattr(LocalStore, name, dying(getattr(LocalStore, name), last))
        pack(open_store(bucket), source, "small", size=16, shard_bytes=40_000)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


def test_killed_before_any_write_it_goes_on_to_the_same_bytes(tmp_path, source, undisturbed):
    subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_EACH_WRITE, str(source), str(tmp_path)], check=True, timeout=120
    )
    # The parameters; three objects for each of four shards; the index; five of the journal's to delete.
    last = 1 + 12 + 1 + 5 + 1
    assert (tmp_path / f"bucket-{last}").exists() and not (tmp_path / f"bucket-{last + 1}").exists()
    for number in range(1, last + 1):
        bucket = tmp_path / f"bucket-{number}"
        assert (bucket / KEY / "index.json").exists() == (number > 14)
        if number > 14:
            assert committed(bucket) == undisturbed
            continue
        reused = {path: written(path) for path in (bucket / KEY).glob("*.tar") if _vouched(bucket, path)}
        assert len(reused) == max(0, (number - 2) // 3)
        packed(bucket, source)
        assert objects(bucket) == undisturbed
        assert {path: written(path) for path in reused} == reused


def _vouched(bucket: Path, shard: Path) -> bool:
    return (bucket / KEY / "packing" / shard.with_suffix(".json").name).exists()


PACK_SLOWLY = """
import sys, time
from job.pack import pack
from job.store import open_store

bucket, source = sys.argv[1:]
print("ready", flush=True)
pack(open_store(bucket), source, "small", size=16, shard_bytes=40_000, progress=lambda done, total: time.sleep(0.01))
"""


def test_killed_again_and_again_it_arrives_at_the_same_dataset(tmp_path, source, undisturbed):
    bucket = tmp_path / "bucket"
    rng, kills, reused = random.Random(0), 0, {}
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", PACK_SLOWLY, str(bucket), str(source)],
            stdout=subprocess.PIPE,
            env=_environment(tmp_path),
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            code = process.wait(timeout=60 if kills == 4 else rng.uniform(0.05, 0.55))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            for path in (bucket / KEY).glob("*.tar"):
                if _vouched(bucket, path):
                    # A shard that the journal vouches for is never written again.
                    assert reused.setdefault(path, written(path)) == written(path)
            continue
        assert code == 0
        break
    assert kills == 4
    assert len(reused) >= 1
    assert {path: written(path) for path in reused} == reused
    assert objects(bucket) == undisturbed


def _environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp")}


# ------------------------------------------------------------------------------------------------ races


def race(*attempts) -> list[BaseException | None]:
    """Runs the attempts at once and returns how each ended."""
    barrier = threading.Barrier(len(attempts))
    outcomes: list[BaseException | None] = [None] * len(attempts)

    def run(number: int) -> None:
        barrier.wait()
        try:
            attempts[number]()
        except JobError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(attempts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def slowly(seed: int):
    rng = random.Random(seed)
    return lambda done, total: time.sleep(rng.uniform(0, 0.004))


@pytest.mark.parametrize("seed", range(3))
def test_two_equal_packers_at_once_both_succeed(tmp_path, source, undisturbed, seed):
    attempts = [
        lambda n=n: packed(tmp_path, source, threads=1, progress=slowly(2 * seed + n)) for n in range(2)
    ]  # fmt: skip
    for outcome in race(*attempts):
        assert outcome is None or "is there already" in str(outcome)
    assert committed(tmp_path) == undisturbed


@pytest.mark.parametrize("seed", range(3))
def test_two_different_packers_at_once_never_make_a_wrong_dataset(tmp_path, source, seed):
    attempts = [
        lambda n=n: packed(tmp_path, source, crop=("center", "squash")[n], threads=1, progress=slowly(2 * seed + n))
        for n in range(2)
    ]
    outcomes = race(*attempts)
    assert any(isinstance(outcome, JobError) for outcome in outcomes)
    if all(outcomes):
        packed(tmp_path, source)
    assert verify_dataset(open_store(str(tmp_path)), KEY) == []


def all_but_committed(bucket: Path, source: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job.pack.Journal, "commit", _interrupted)
        packed(bucket, source)


def before(monkeypatch, method: str, part: str, action, times: int = 1) -> None:
    """Has `action` happen once: before a local store's method is called for the n-th time for a key with `part`."""
    original, calls = getattr(LocalStore, method), []

    def hooked(self, key, *arguments):
        if part in key:
            calls.append(key)
            if len(calls) == times:
                action()
        return original(self, key, *arguments)

    monkeypatch.setattr(LocalStore, method, hooked)


def test_shards_that_are_replaced_right_before_the_commit_stop_it(tmp_path, source, monkeypatch):
    def rival():
        with pytest.raises(StoppedError):
            packed(tmp_path, source, crop="squash", should_stop=stop_after(50))

    before(monkeypatch, "create", "index.json", rival)
    with pytest.raises(BadRequestError, match="is being packed by another process"):
        packed(tmp_path, source)
    assert "index.json" not in objects(tmp_path)
    packed(tmp_path, source, crop="squash")
    assert verify_dataset(open_store(str(tmp_path)), KEY) == []


def test_a_commit_right_before_leftovers_are_cleared_saves_them(tmp_path, source, undisturbed, monkeypatch):
    all_but_committed(tmp_path, source)
    indices = []
    before(monkeypatch, "put", "packing/parameters.json", lambda: indices.append(packed(tmp_path, source)))
    with pytest.raises(BadRequestError, match="was packed by another process meanwhile"):
        packed(tmp_path, source, crop="squash")
    assert len(indices) == 1
    assert committed(tmp_path) == undisturbed


def test_shards_vouched_for_after_they_were_cleared_are_never_committed(tmp_path, source, undisturbed, monkeypatch):
    """Both have shards of the same size: the sizes alone would not tell."""

    def rival():
        with pytest.raises(KeyboardInterrupt):
            before(monkeypatch, "create", "shard-00000.offsets", _interrupted)
            packed(tmp_path, source, crop="squash")
        assert (tmp_path / KEY / "shard-00000.tar").stat().st_size == len(undisturbed["shard-00000.tar"])

    # The shard is uploaded, and not vouched for yet.
    before(monkeypatch, "create", "shard-00000.offsets", rival)
    with pytest.raises(BadRequestError, match="is being packed by another process"):
        packed(tmp_path, source)
    monkeypatch.undo()
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed


# ------------------------------------------------------------------------------------------------ full disks


def test_a_full_disk_for_temporary_files(tmp_path, small_disk, monkeypatch):
    source = zip_of(tmp_path / "a.zip", [(f"{n}.png", encoded(picture(n, 256, 256))) for n in range(20)])
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(DiskFullError, match="free some space") as error:
        packed(tmp_path / "bucket", source, size=256, shard_bytes=64 << 20)
    assert error.value.exit_code == 74
    assert list(small_disk.iterdir()) == []
    assert not (tmp_path / "bucket" / "datasets" / "small-256" / "index.json").exists()


def test_a_full_disk_for_the_bucket(tmp_path, small_disk):
    source = zip_of(tmp_path / "a.zip", [(f"{n}.png", encoded(picture(n, 256, 256))) for n in range(20)])
    with pytest.raises(DiskFullError):
        packed(small_disk / "bucket", source, size=256, shard_bytes=300_000)
    with pytest.raises(MissingInputError):
        load_index(open_store(str(small_disk / "bucket")), "datasets/small-256")
