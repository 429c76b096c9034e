"""Work in pieces: shared among machines that give what one machine gives, resumed after a kill, and made once."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from job.coordination import lease, pieces
from job.coordination.pieces import Made, OtherWorkError, Pieces, Slice
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.exits import BadDataError, BadRequestError, StoppedError
from job.stop import NEVER, Stop
from job.store import ObjectExistsError, Store, open_store
from tests.job.command_line import ddpm, started, succeeded
from tests.job.data.test_foreign_tars import write_tars
from tests.job.exchange.test_encoding import make_autoencoder
from tests.job.launching import QUICK, StopWhen, by_somebody_elsewhere
from tests.job.some_images import encoded, files_in, folder_of, picture

COUNT, MACHINES = 12, 3
WORK = "a" * 64


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, seconds in QUICK.items():
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setattr(pieces, "RENEW_SECONDS", 0.3)
    (tmp_path / "bucket").mkdir()
    return open_store(str(tmp_path / "bucket"))


class Machine:
    """One machine's part of the work, at its pace."""

    def __init__(self, store: Store, index: int, count: int, seconds: float = 0.0) -> None:
        self.made, self.seconds = list[int](), seconds
        self.pieces = Pieces(store, WORK, [1] * COUNT, share=Slice(index, count))

    def work(self, stop: Stop = NEVER) -> float:
        return self.pieces.make_missing(self._make, "testing", stop=stop)

    def _make(self, number, advance):
        time.sleep(self.seconds)
        self.made.append(number)
        advance(1)
        return Made({f"{number}.txt": f"piece {number}".encode()}, {"square": number**2})


def test_a_slow_machine_does_not_decide(store):
    machines = [Machine(store, 0, 3), Machine(store, 1, 3), Machine(store, 2, 3, seconds=1.0)]
    began = time.monotonic()
    threads = [threading.Thread(target=machine.work) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(number for machine in machines for number in machine.made) == Counter(range(COUNT))
    assert len(machines[2].made) < 4 and time.monotonic() - began < 4
    records = machines[0].pieces.records()
    assert [record.facts["square"] for record in records] == [number**2 for number in range(COUNT)]
    files = [file.read(store) for record in records for file in record.files]
    assert files == [f"piece {number}".encode() for number in range(COUNT)]


def test_a_lone_slice_ends_at_once(store, monkeypatch):
    monkeypatch.setattr(pieces, "RENEW_SECONDS", 5.0)
    began = time.monotonic()
    assert Machine(store, 1, 3).work() == COUNT
    assert time.monotonic() - began < 5


def test_one_machine_alone(store):
    """Another may have rounded otherwise: the file that is there counts, unless all must make the same bytes."""
    store.create("0.txt", b"of another machine")
    assert Machine(store, 0, 1).work() == COUNT
    assert not list(store.list("claims"))
    again = Machine(store, 0, 1)
    assert (again.work(), again.made) == (0, [])
    (record,) = again.pieces.records([0])
    assert record.files[0].read(store) == b"of another machine"
    exact = Pieces(store, WORK, [1] * COUNT, equal_bytes=True, folder="exact")
    with pytest.raises(ObjectExistsError):
        exact.commit(0, Made({"0.txt": b"piece 0"}))
    # The first commit counts alone.
    assert exact.commit(1, Made({"a": b"1"})) and not exact.commit(1, Made({"a": b"1"}))
    with pytest.raises(OtherWorkError, match="is of other work"):
        Pieces(store, "b" * 64, [1] * COUNT).make_missing(lambda number, advance: Made({}), "testing")
    path = Path(store.uri) / "pieces/00000.json"
    path.write_bytes(path.read_bytes().replace(b'"number": 0', b'"number": 1'))
    with pytest.raises(BadDataError, match=r"pieces/00000\.json .* delete it"):
        Machine(store, 0, 1).work()


def test_finished_work_is_not_made_again(store):
    """Another machine may finish the work and clear it up while this one still walks along its list."""
    late, quick = (Pieces(store, WORK, [1] * COUNT, share=Slice(index, 2), result="index.json") for index in range(2))
    made = []

    def make(number, advance):
        made.append(number)
        for missing in quick.missing():
            quick.commit(missing, Made({f"{missing}.txt": b"the same"}))
        store.create("index.json", b"names all")
        quick.clear()
        return Made({f"{number}.txt": b"the same"})

    late.make_missing(make, "testing")
    assert made == [0] and late.missing() == []


def test_the_last_machine_leaves_no_claims(store, monkeypatch):
    """Another machine finishes the work, and clears up, just before this one takes a claim."""
    late, quick = Machine(store, 0, 2), Machine(store, 1, 2)
    create = type(store).create

    def just_before(self, key, data):
        if "claims/00004" in self.uri_of(key) and not quick.made:
            quick.work()
        return create(self, key, data)

    monkeypatch.setattr(type(store), "create", just_before)
    late.work()
    assert Counter(late.made + quick.made) == Counter(range(COUNT))
    assert not list(store.list("claims"))


KILLED = """
import sys, time
from job.coordination.lease import Lease
from job.stop import NEVER
from job.store import open_store
Lease.take(open_store(sys.argv[1]).sub("claims/00001"), 0, 0.0, NEVER, print)
print("claimed", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_machine_loses_its_piece(store):
    """Nobody waits for a piece of one that is alive."""
    child = subprocess.Popen([sys.executable, "-c", KILLED, store.uri], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "claimed\n"
    alive, began = Machine(store, 0, 2), time.monotonic()
    alive.work()
    assert alive.pieces.missing() == [1] and time.monotonic() - began < 10
    child.kill()
    child.wait()
    alive.work()
    assert alive.pieces.missing() == []


def test_a_silent_machine_loses_its_piece(store, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 1.0)
    by_somebody_elsewhere(store.sub("claims/00003"))
    Machine(store, 0, 2).work()
    assert Pieces(store, WORK, [1] * COUNT).missing() == []


def test_a_stopped_machine_releases_its_claim(store):
    machine = Machine(store, 0, 2)
    with pytest.raises(StoppedError, match="all whole pieces are saved"):
        machine.work(StopWhen(lambda: len(machine.made) >= 3))
    claims = [json.loads(store.read(entry.key).data) for entry in store.list("claims")]
    assert claims and all(claim["released"] for claim in claims)
    Machine(store, 1, 2).work()
    assert machine.pieces.missing() == []


def test_slices_by_name():
    assert (Slice.parse(""), Slice.parse("2/3")) == (Slice(0, 1), Slice(2, 3))
    for text in ("3/3", "1", "a/b", "-1/2", "$BATCH_TASK_INDEX/3"):
        with pytest.raises(BadRequestError, match="slices are i/n"):
            Slice.parse(text)


def test_a_failed_commit_ends_the_work(store, tmp_path):
    (tmp_path / "bucket/pieces").write_text("no folder")
    with pytest.raises(BadRequestError, match="pieces"):
        Machine(store, 0, 1).work()


def alone_and_shared(folder: Path, part: str, *words: object, kills: int = 0) -> list[dict[str, bytes]]:
    """The objects in a part of two buckets, after one machine's work and that of three, some of which are killed.

    Without records, which clearing up may leave.
    """
    succeeded(ddpm(*words, "--bucket", folder / "alone"))
    draw, deadline = random.Random(0), time.monotonic() + 240

    def start(number: int) -> subprocess.Popen[str]:
        return started(*words, "--bucket", folder / "shared", "--slice", f"{number}/{MACHINES}")

    machines = [start(number) for number in range(MACHINES)]
    while kills and any(machine.poll() is None for machine in machines):
        time.sleep(draw.uniform(0.5, 2.5))
        number = draw.randrange(MACHINES)
        if machines[number].poll() is None:
            machines[number].send_signal(signal.SIGKILL)
            machines[number].wait()
            machines[number], kills = start(number), kills - 1
        assert time.monotonic() < deadline
    assert [machine.wait(timeout=240) for machine in machines] == [0] * MACHINES
    found = [files_in(folder / bucket / part) for bucket in ("alone", "shared")]
    return [{key: files[key] for key in files if not key.startswith(("pieces/", "claims/"))} for files in found]


@pytest.mark.slow
def test_packing(tmp_path):
    """Shards of 23 images, of which each takes a while."""
    images = [(f"{('dunes', 'sea')[number % 2]}/{number:03d}.png", encoded(picture(number))) for number in range(110)]
    words = ("data", "pack", folder_of(tmp_path / "images", images), "mine", "--size", 1200, "--min-side", 1)
    alone, shared = alone_and_shared(tmp_path, "datasets/mine-1200", *words, kills=6)
    # The index, the preview, and five shards.
    assert len(alone) == 2 + 2 * 5
    assert shared == alone


@pytest.mark.slow
def test_indexing(tmp_path):
    samples = [
        {"__key__": f"{n:05d}", "png": encoded(picture(n, 96, 96)), "cls": str(n % 3).encode()} for n in range(90)
    ]
    words = ("data", "index", write_tars(tmp_path / "tars", samples), "mine", "--size", 64)
    alone, shared = alone_and_shared(tmp_path, "datasets/mine-64", *words, kills=2)
    assert shared == alone


@pytest.mark.slow
def test_encoding(tmp_path):
    tiles = resources.files("job") / "datasets" / "landscape-sample.zip"
    pack(open_store(str(tmp_path / "alone")), PackRequest(str(tiles), "tiles", 32), shard_images=60)
    shutil.copytree(tmp_path / "alone", tmp_path / "shared")
    words = ("data", "encode", "tiles", "--autoencoder", make_autoencoder(tmp_path / "autoencoder"))
    alone, shared = alone_and_shared(tmp_path, "datasets/tiles-latents-16", *words)
    assert shared == alone


@pytest.mark.slow
def test_evaluating(walked, tmp_path):
    for name in ("alone", "shared"):
        shutil.copytree(walked, tmp_path / name)
    words = ("evaluate", "--run", "walk", "--extractor", "mobilenet", "--count", 64, "--references", 64)
    found = alone_and_shared(tmp_path, "runs/walk/evaluations", *words, kills=4)
    assert not list(tmp_path.glob("*/runs/walk/**/claims/*"))
    scores = [json.loads(data) for files in found for key, data in files.items() if key.endswith("/scores.json")]
    assert len(scores) == 2 and scores[0]["values"] == scores[1]["values"]
