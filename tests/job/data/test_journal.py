import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import job.data.pack
from job.data.verify import verify_dataset
from job.exits import BadDataError, BadRequestError, JobError, StoppedError
from job.store import ObjectExistsError, open_store
from job.store.local import LocalStore
from tests.job.packing import (  # noqa: F401
    FILES,
    KEY,
    committed,
    objects,
    packed,
    source_fixture,
    stop_at,
    undisturbed_fixture,
    written,
)
from tests.job.some_images import jpeg, zip_of
from tests.job.stops import stop_after


@pytest.mark.parametrize("bucket_kind", ["local", "gs"])
def test_a_stopped_packing_goes_on_and_decodes_nothing_twice(
    request, tmp_path, source, undisturbed, bucket_kind, monkeypatch
):
    bucket = request.getfixturevalue("gcs_bucket") if bucket_kind == "gs" else str(tmp_path)
    with pytest.raises(StoppedError, match="the same command goes on") as error:
        packed(bucket, source, stop=stop_at(40))
    assert error.value.exit_code == 75
    there = objects(bucket)
    assert "index.json" not in there
    done = [json.loads(there[f"packing/shard-{n:05d}.json"]) for n in range(2)]
    assert "packing/shard-00002.json" not in there

    calls = []
    prepare = job.data.pack.prepare
    monkeypatch.setattr(job.data.pack, "prepare", lambda *a: (calls.append(a), prepare(*a))[1])
    packed(bucket, source)
    assert objects(bucket) == undisturbed
    assert len(calls) == 60 - done[-1]["read_images"]


def test_stopping_while_the_names_are_read(tmp_path, source):
    with pytest.raises(StoppedError):
        packed(tmp_path / "bucket", source, stop=stop_after(0))
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
            packed(tmp_path, source, stop=stop_at(40))
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
        packed(tmp_path, source, stop=stop_at(50))
    packed(tmp_path, source, **options)
    packed(tmp_path / "fresh", source, **options)
    assert objects(tmp_path) == objects(tmp_path / "fresh")


@pytest.mark.parametrize("lost", ["shard-00000.tar", "shard-00001.offsets", "packing/shard-00000.json"])
def test_what_was_lost_in_between_is_packed_anew(tmp_path, source, undisturbed, lost):
    with pytest.raises(StoppedError):
        packed(tmp_path, source, stop=stop_at(50))
    open_store(str(tmp_path)).sub(KEY).delete(lost)
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed


@pytest.mark.parametrize("rotten", ["packing/shard-00001.json", "shard-00002.tar", "shard-00002.offsets"])
def test_leftovers_that_are_rotten_are_replaced(tmp_path, source, undisturbed, rotten):
    with pytest.raises(StoppedError):
        packed(tmp_path, source, stop=stop_at(40))
    (tmp_path / KEY / rotten).write_bytes(b"rotten")
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed


def test_a_journal_that_still_looks_like_one_is_not_believed(tmp_path, source, undisturbed):
    with pytest.raises(StoppedError):
        packed(tmp_path, source, stop=stop_at(50))
    for field in ("images", "sha256", "crc32c", "offsets_sha256"):
        path = tmp_path / KEY / "packing/shard-00001.json"
        text = path.read_text()
        start = text.index(f'"{field}"') + len(field) + 2
        digit = next(i for i in range(start, len(text)) if text[i].isdigit())
        path.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
        with pytest.raises(StoppedError):
            packed(tmp_path, source, stop=stop_at(50))
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed


KILLED_BEFORE_EACH_WRITE = """
import itertools, os, signal, sys
from job.data.pack import pack
from job.store import ObjectExistsError, open_store
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


PACK_STEP_BY_STEP = """
import sys
from job.data.pack import pack
from job.store import ObjectExistsError, open_store

def step(done, total):
    print(done, flush=True)
    sys.stdin.readline()

bucket, source = sys.argv[1:]
pack(open_store(bucket), source, "small", size=16, shard_bytes=40_000, progress=step)
"""


def test_killed_again_and_again_it_arrives_at_the_same_dataset(tmp_path, source, undisturbed):
    bucket, rng = tmp_path / "bucket", random.Random(0)
    command = [sys.executable, "-c", PACK_STEP_BY_STEP, str(bucket), str(source)]
    reused: dict[Path, tuple[int, int]] = {}
    # The fourth shard can only be full when the first is in the bucket.
    for images in (rng.randrange(5, 20), rng.randrange(20, 40), rng.randrange(40, 55), 59):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(tmp_path))
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"\n" * (images - 1))
        process.stdin.flush()
        for image in range(images):
            assert process.stdout.readline() == f"{image + 1}\n".encode()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for path in (bucket / KEY).glob("*.tar"):
            if _vouched(bucket, path):
                # A shard that the journal vouches for is never written again.
                assert reused.setdefault(path, written(path)) == written(path)
    assert len(reused) >= 1
    subprocess.run(command, check=True, input=b"", timeout=60, env=_environment(tmp_path), stdout=subprocess.DEVNULL)
    assert {path: written(path) for path in reused} == reused
    assert objects(bucket) == undisturbed


def _environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp")}


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
        patch.setattr(job.data.pack.Journal, "commit", _interrupted)
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
            packed(tmp_path, source, crop="squash", stop=stop_at(50))

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
        before(monkeypatch, "create", "shard-00000.offsets", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed(tmp_path, source, crop="squash")
        assert (tmp_path / KEY / "shard-00000.tar").stat().st_size == len(undisturbed["shard-00000.tar"])

    # The shard is uploaded, and not vouched for yet.
    before(monkeypatch, "create", "shard-00000.offsets", rival)
    with pytest.raises(BadRequestError, match="is being packed by another process"):
        packed(tmp_path, source)
    monkeypatch.undo()
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed


def test_who_has_lost_the_dataset_stops_at_the_next_shard(tmp_path, source, monkeypatch):
    small, read = {"shard_bytes": 10_000}, []

    def rival():
        with pytest.raises(StoppedError):
            packed(tmp_path, source, crop="squash", stop=stop_at(1), **small)

    before(monkeypatch, "create", "shard-00000.offsets", rival)
    with pytest.raises(BadRequestError, match="is being packed by another process"):
        packed(tmp_path, source, progress=lambda done, total: read.append(done), **small)
    assert len(read) < 30


def test_an_equal_packer_that_commits_between_a_conflict_and_its_explanation_is_no_rival(
    tmp_path, source, undisturbed, monkeypatch
):
    def rival():
        packed(tmp_path, source)
        # The bucket refused the journal's entry for one that has been cleared away before it could be compared.
        raise ObjectExistsError("exists already")

    before(monkeypatch, "create", "packing/shard-00001.json", rival)
    packed(tmp_path, source)
    assert objects(tmp_path) == undisturbed
