"""Every phase ends within ten seconds of being asked to, with code 75 and its state kept, whoever asks and however.

Real processes train the preset that comes with the program; what each took is printed (`pytest -s`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from job.runs.checkpoints import list_checkpoints
from job.runs.records import read_status
from job.store import Store, open_store
from tests.job.command_line import DDPM, ddpm, environment, succeeded
from tests.job.hooked import hooked
from tests.job.launching import children, eventually
from tests.job.leases import taken
from tests.job.metadata_server import PREEMPTED, metadata_server
from tests.job.packing import FILES, KEY, objects, packed, written
from tests.job.slow_link import slow_link
from tests.job.some_images import zip_of

LIMIT_SECONDS = 10
ON_AND_ON = ("--epochs", 1000, "--set", "checkpoint.every_minutes=0.005")
SHORT_EPOCHS = ("--set", "train.batch_size=75", "--set", "checkpoint.every_epochs=1")
TELL = """
import os
from pathlib import Path
check_agreed = Painter._check_agreed

def tell_and_check(painter, *step):
    Path(os.environ["SAMPLING"]).touch()
    check_agreed(painter, *step)

Painter._check_agreed = tell_and_check
"""


@dataclass
class Job:
    """A command that was started, in a process group of its own."""

    title: str
    process: subprocess.Popen[str]

    def stopped_by(self, ask: Callable[[subprocess.Popen[str]], object]) -> str:
        """Asks it to stop and returns what it said; it must end in time, with 75."""
        assert self.process.poll() is None, self.process.communicate()
        ask(self.process)
        return self.stopped(time.monotonic())

    def stopped(self, asked: float) -> str:
        """What it said; it was asked at `asked`, in `time.monotonic`'s seconds."""
        _, err = self.process.communicate(timeout=60)
        seconds = time.monotonic() - asked
        print(f"{self.title}: {seconds:.1f} s from being asked to exit code {self.process.returncode}")
        assert self.process.returncode == 75, err
        assert seconds < LIMIT_SECONDS
        assert "Traceback" not in err
        assert len([line for line in err.splitlines() if line.startswith("ddpm: stopped")]) == 1, err
        return err


def start(title: str, *words: object, **variables: str) -> Job:
    process = subprocess.Popen(
        [DDPM, *map(str, words)],
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Job(title, process)


def by(number: int) -> Callable[[subprocess.Popen[str]], object]:
    """A signal to the command."""
    return lambda process: process.send_signal(number)


def by_group(number: int) -> Callable[[subprocess.Popen[str]], object]:
    """A signal to the process group, as from a terminal: it reaches a rank twice. And again, by an impatient person."""

    def ask(process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, number)
        time.sleep(0.05)
        os.killpg(process.pid, number)

    return ask


def by_rank(number: int) -> Callable[[subprocess.Popen[str]], object]:
    """A signal to the last rank alone."""
    return lambda process: os.kill(max(children(process.pid)), number)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a bucket, in which the embedded dataset is packed, and a cache."""
    folder = tmp_path_factory.mktemp("phases")
    succeeded(ddpm("data", "ensure", "landscape-sample", "--bucket", folder / "bucket"))
    return folder


@pytest.fixture
def train(place):
    """Starts training a run; `begun` waits for its first checkpoint, once per run."""

    def train(title: str, run: str, *words: object, **variables: str) -> Job:
        options = ("--dataset", "landscape-sample", "--run", run, "--bucket", place / "bucket")
        return start(title, "train", *options, *ON_AND_ON, *words, DDPM_CACHE=str(place / "cache"), **variables)

    return train


def run_of(place: Path, name: str) -> Store:
    return open_store(str(place / "bucket")).sub(f"runs/{name}")


def begun(job: Job, run: Store) -> Job:
    """Waits until the job has committed a checkpoint."""
    eventually(lambda: list_checkpoints(run) or job.process.poll() is not None, 120)
    assert job.process.poll() is None, job.process.communicate()
    return job


def saved(run: Store, said: str) -> None:
    """What a run that was stopped leaves: everything up to where it was."""
    status = read_status(run)
    assert status.state == "stopped"
    newest = max(list_checkpoints(run))
    assert newest.images_seen == status.images_seen
    assert f"after {newest.images_seen:,} images; everything is saved" in said
    lease = run.read("lease.json").data
    assert b'"released":true' in lease.replace(b" ", b"")


# --- training


def test_training_by_two_group_signals(place, train):
    run = run_of(place, "group")
    job = begun(train("training, 2 processes, SIGINT twice to the group", "group", "--processes", 2), run)
    saved(run, said := job.stopped_by(by_group(signal.SIGINT)))
    assert "stopped by SIGINT" in said


def test_training_by_a_signal_to_one_rank(place, train):
    run = run_of(place, "rank")
    job = begun(train("training, 2 processes, SIGTERM to rank 1", "rank", "--processes", 2), run)
    saved(run, said := job.stopped_by(by_rank(signal.SIGTERM)))
    assert "stopped by another process" in said


def test_training_by_a_preemption_notice(place, train):
    run = run_of(place, "notice")
    with metadata_server() as server:
        job = train("training, notice of the metadata server", "notice", GCE_METADATA_HOST=server.host)
        begun(job, run)
        saved(run, said := job.stopped_by(lambda process: server.set(PREEMPTED, "TRUE")))
    assert "the machine's notice instance/preempted=TRUE" in said


def test_training_by_a_deadline(place, train):
    run = run_of(place, "deadline")
    began = time.monotonic()
    job = train("training, --stop-after 15s", "deadline", "--stop-after", "15s")
    saved(run, said := job.stopped(began + 15))
    assert "its deadline (--stop-after)" in said


def test_starting(train):
    job = train("2 s after the start, SIGTERM to the group", "starting", "--processes", 2)
    time.sleep(2)
    job.stopped_by(by_group(signal.SIGTERM))


# --- sampling


@pytest.fixture(scope="module")
def trained(place) -> str:
    """The name of a run with a checkpoint of its first epoch."""
    words = ("--dataset", "landscape-sample", "--run", "trained", "--bucket", place / "bucket", "--epochs", 1)
    succeeded(ddpm("train", *words, *SHORT_EPOCHS, "--set", "sample.images=1", "--set", "sample.steps=2"))
    return "trained"


@pytest.fixture
def telling(tmp_path) -> dict[str, str]:
    """Variables that make a process tell when it samples, by a file in `SAMPLING`."""
    return {
        "PYTHONPATH": hooked(tmp_path / "hooks", job__sampling__painter=TELL),
        "SAMPLING": str(tmp_path / "sampling"),
    }


def sampling(job: Job, telling: dict[str, str]) -> Job:
    """Waits until the job samples."""
    eventually(lambda: Path(telling["SAMPLING"]).exists() or job.process.poll() is not None, 120)
    return job


@pytest.mark.parametrize("processes", [1, 2])
def test_sampling_in_training(place, train, telling, processes):
    name = f"paints-{processes}"
    run = run_of(place, name)
    grid = ("--set", "sample.every_epochs=1", "--set", "sample.steps=1000", "--set", "sample.images=500")
    title = f"sampling in training, {processes} processes, SIGTERM"
    job = sampling(train(title, name, *SHORT_EPOCHS, *grid, "--processes", processes, **telling), telling)
    saved(run, job.stopped_by(by(signal.SIGTERM)))
    assert max(list_checkpoints(run)).images_seen == 300


@pytest.mark.parametrize(("processes", "ask"), [(1, by_group(signal.SIGTERM)), (2, by(signal.SIGINT))])
def test_sample(place, trained, telling, processes, ask):
    def there() -> set[str]:
        return {entry.key for entry in run_of(place, trained).list()}

    before = there()
    words = ("--run", trained, "--bucket", place / "bucket", "--seeds", "0-499", "--steps", 1000, "--sampler", "ddpm")
    job = start(f"sample, {processes} processes", "sample", *words, "--processes", processes, **telling)
    assert "while sampling" in sampling(job, telling).stopped_by(ask)
    assert there() == before


# --- waiting for a lease


def test_waiting_for_a_lease(place, train):
    run = run_of(place, "held")
    holder = taken(run)
    waiting = train("waiting for a lease, SIGTERM", "held", "--wait", "600")
    said = next(line for line in waiting.process.stderr if "is held by" in line)
    assert f"process {os.getpid()} on" in said
    assert f"stopped by SIGTERM before {run.uri} could be taken" in waiting.stopped_by(by(signal.SIGTERM))
    holder.confirm()
    holder.close()


# --- data


SLOW = """
import time
quick = prepare

def prepare(content, recipe):
    time.sleep(0.3)
    return quick(content, recipe)

pack.__kwdefaults__["shard_bytes"] = 40_000
"""


@pytest.mark.parametrize("words", [("--stop-after", "4s"), ()])
def test_packing_goes_on_from_its_journal(tmp_path, words):
    source, bucket = zip_of(tmp_path / "pets.zip", FILES), tmp_path / "bucket"
    packed(tmp_path / "undisturbed", source)
    pack = ("data", "pack", source, "small", "--size", 16, "--bucket", bucket)
    slow = hooked(tmp_path / "slow", job__data__pack=SLOW.replace("0.3", "2") if words else SLOW)
    job = start(f"packing, {' '.join(words) or 'SIGINT to the group'}", *pack, *words, PYTHONPATH=slow)
    began = time.monotonic()
    first = bucket / KEY / "shard-00000.tar"
    if words:
        said = job.stopped(began + 4)
    else:
        eventually(first.exists)
        said = job.stopped_by(by_group(signal.SIGINT))
        kept = written(first)
    assert "the same command goes on" in said
    assert not (bucket / KEY / "index.json").exists()
    quick = hooked(tmp_path / "quick", job__data__pack='pack.__kwdefaults__["shard_bytes"] = 40_000')
    succeeded(ddpm(*pack, PYTHONPATH=quick))
    assert objects(bucket) == objects(tmp_path / "undisturbed")
    if not words:
        assert written(first) == kept, "it was packed anew"


def test_the_first_download(tmp_path, gcs_server, gcs_bucket, place):
    succeeded(ddpm("data", "ensure", "landscape-sample", "--bucket", gcs_bucket))
    options = ("--dataset", "landscape-sample", "--bucket", gcs_bucket, "--epochs", 1)
    cache = {"DDPM_CACHE": str(tmp_path / "cache")}
    # At this speed the shard takes minutes.
    with slow_link(gcs_server, bytes_per_second=5_000) as url:
        job = start("first download, SIGTERM", "train", *options, **cache, STORAGE_EMULATOR_HOST=url)
        eventually(lambda: [*tmp_path.glob("cache/*/incoming/*")] or job.process.poll() is not None, 120)
        said = job.stopped_by(by(signal.SIGTERM))
    assert re.search(r"stopped( by SIGTERM)? while (reading the images|the bucket was away)", said)
    run = open_store(gcs_bucket).sub("runs/landscape-sample")
    assert list_checkpoints(run) == []
    assert b'"released":true' in run.read("lease.json").data.replace(b" ", b"")
