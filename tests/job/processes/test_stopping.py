"""Every phase ends within ten seconds of being asked to, with code 75 and its state kept, whoever asks and however."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from job import stop as stop_module
from job.coordination.lease import load_lease
from job.runs.checkpoints import list_checkpoints
from job.runs.records import read_status
from job.stop import Stop
from job.store import open_store
from tests.faulty_proxy import Fault
from tests.job.answering import metadata_server
from tests.job.command_line import DDPM, ddpm, settings, started, succeeded
from tests.job.hooked import hooked
from tests.job.launching import eventually
from tests.job.processes.conftest import ON_AND_ON

LIMIT_SECONDS = 10
SAMPLES = """
import os
from pathlib import Path
check_agreed = Painter.check_agreed

def tell_and_check(painter, *step):
    Path(os.environ["REACHED"]).touch()
    check_agreed(painter, *step)

Painter.check_agreed = tell_and_check
"""
SLOW_STEP = """
import os, time
from pathlib import Path
training_noise_of = randomness.training_noise

def training_noise(seed, image_numbers, *where):
    if image_numbers[0] >= 96:
        Path(os.environ["REACHED"]).touch()
        time.sleep(1.5)
    return training_noise_of(seed, image_numbers, *where)

randomness.training_noise = training_noise
"""


def by_group(number):
    """A signal to the process group, as from a terminal: it reaches a rank twice. And again, by an impatient person."""

    def ask(process):
        os.killpg(process.pid, number)
        time.sleep(0.05)
        os.killpg(process.pid, number)

    return ask


def stopped_by(ask, process, limit_seconds=LIMIT_SECONDS) -> str:
    """Asks a command to stop and returns what it said; it must end in time, with 75."""
    assert process.poll() is None, process.communicate()
    ask(process)
    asked = time.monotonic()
    err, _ = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert time.monotonic() - asked < limit_seconds
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("ddpm: stopped")]) == 1, err
    return err


def check_saved(run, said: str) -> None:
    """Checks that a run that was stopped left everything up to where it was."""
    status, newest = read_status(run), max(list_checkpoints(run))
    assert (status.state, status.images_seen) == ("stopped", newest.images_seen)
    assert f"after {newest.images_seen:,} images; everything is saved" in said
    assert load_lease(run).released


@pytest.fixture
def reached(tmp_path):
    """Starts a command whose hooks tell by a file that it is where it is to be stopped, and waits for that."""
    path = tmp_path / "reached"

    def reached(start, *words, **hooks):
        path.unlink(missing_ok=True)
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        process = start(*words, PYTHONPATH=hooked(folder, **hooks), REACHED=str(path))
        eventually(lambda: path.exists() or process.poll() is not None, 120)
        return process

    return reached


def test_training_by_a_preemption_notice(place):
    with metadata_server() as server:
        process = place.begun("notice", GCE_METADATA_HOST=server.host)
        said = stopped_by(lambda process: server.preempt(), process)
    check_saved(place.run("notice"), said)
    assert "the machine's notice instance/preempted=TRUE" in said


@pytest.mark.slow
def test_a_step_of_many_micro_batches(place, reached):
    """Of two processes, in a step that takes longer than what counts as a hang."""
    batch = settings(train__batch_size="48", train__micro_batch_size="1")
    words = (*ON_AND_ON, "--processes", 2, "--hang-after", 15, *batch)
    process = reached(place.started, "long-steps", *words, ddpm__training=SLOW_STEP)
    time.sleep(16)
    # The rest of the step takes 20 s.
    said = stopped_by(lambda process: process.terminate(), process, limit_seconds=8)
    check_saved(place.run("long-steps"), said)
    assert "stopped by SIGTERM after 96 images" in said
    assert "\nloading PyTorch in 2 processes\n" in said and said.count("\nbeginning, image 0, attempt 1\n") == 1


@pytest.mark.slow
def test_sampling(place, reached):
    """In training and afterwards."""
    grid = {"diffusion.timesteps": 1000, "sample.every_epochs": 1, "sample.steps": 1000, "sample.images": 500}
    words = [word for key, value in grid.items() for word in ("--set", f"{key}={value}")]
    process = reached(place.started, "paints", *words, "--processes", 2, job__sampling__painter=SAMPLES)
    check_saved(run := place.run("paints"), stopped_by(by_group(signal.SIGTERM), process))
    assert max(list_checkpoints(run)).images_seen == 312

    before = {entry.key for entry in run.list()}
    words = ("--run", "paints", "--bucket", place.bucket, "--seeds", "0-499", "--steps", 1000, "--sampler", "ddpm")
    for processes, number in ((1, signal.SIGTERM), (2, signal.SIGINT)):
        process = reached(started, "sample", *words, "--processes", processes, job__sampling__painter=SAMPLES)
        assert "while sampling" in stopped_by(by_group(number), process)
        assert {entry.key for entry in run.list()} == before


@pytest.mark.slow
@pytest.mark.parametrize("remote_bucket", ["gs"], indirect=True)
def test_the_first_download(proxy, remote_bucket, tmp_path):
    succeeded(ddpm("data", "ensure", "landscape-sample", "--bucket", remote_bucket))
    proxy.inject(Fault.SILENCE, "^GET .*shard-", times=1000)
    options = ("--dataset", "landscape-sample", "--bucket", remote_bucket, "--epochs", 1, *settings())
    process = started("train", *options, DDPM_CACHE=str(tmp_path / "cache"))
    eventually(lambda: proxy.injected[Fault.SILENCE] or process.poll() is not None, 120)
    said = stopped_by(lambda process: process.terminate(), process)
    assert re.search(r"stopped( by SIGTERM)? while (reading the images|the bucket was away)", said)
    run = open_store(remote_bucket).sub("runs/landscape-sample")
    assert (list_checkpoints(run), load_lease(run).released) == ([], True)


# --- before anything has begun

PACK = ("data", "pack", "landscape-sample", "mine", "--size", "16", "--bucket", "gs://nobody-there")
TRAIN = ("train", "--dataset", "x", "--bucket", "gs://nobody-there")
IMPORTS = (sys.executable, "-c", "import job.__main__ as m; print(flush=True); m.main()")


@pytest.mark.slow
def test_commands_without_a_bucket():
    """While modules are imported, and while a server takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent, metadata_server() as server:
        unreachable = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        for number, seconds in ((signal.SIGTERM, 0.1), (signal.SIGINT, 0.4), (signal.SIGHUP, 2.0)):
            child = started(*TRAIN, program=IMPORTS, **unreachable)
            child.stdout.readline()
            time.sleep(seconds)
            child.send_signal(number)
            # Again, by an impatient person.
            child.send_signal(number)
            # What the interpreter was doing just then it may tell in lines of its own.
            stopped = f"ddpm: stopped by {number.name}; the same command begins again\n"
            assert child.stdout.read().startswith(stopped)
            assert child.wait(20) == 75
        server.preempt()
        begun = [started(*TRAIN, program=(DDPM,), **unreachable, GCE_METADATA_HOST=server.host)]
        begun += [started(*words, "--stop-after", "4s", **unreachable) for words in (TRAIN, PACK)]
        for child in begun:
            err, _ = child.communicate(timeout=60)
            assert child.returncode == 75, (child.args, err)


ANOTHER_ERROR = """
import job.__main__ as program, job.cli.app as app, os, signal
def imported():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        raise RuntimeError("a module could not be made") from error
app.app = imported
program.main()
"""
CAUGHT = """
import job.__main__ as program, os, signal, time
program.handle_stop_signals(program._end)
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    pass
time.sleep(60)
"""


LATE = """
import os
from job.stop import Stop
class Late:
    # Python destroys this after it has taken its own handlers away.
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, 15)
stop, late = Stop().install(), Late()
"""
ENDED = "ddpm: stopped by SIGTERM; the same command begins again\n"
BY_CODE = [*(pytest.param(code, (75, ENDED), marks=pytest.mark.slow) for code in (ANOTHER_ERROR, CAUGHT))]
BY_CODE += [(LATE, (0, ""))]


@pytest.mark.parametrize(("code", "ends"), BY_CODE, ids=["another error", "caught", "too late"])
def test_a_caught_end_is_only_delayed(code, ends):
    """And a signal while the interpreter ends changes no exit code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stderr) == ends


# --- notices of a metadata server, which is a real one, and has bad days


@pytest.fixture
def watching(monkeypatch):
    """Watches a server; the threads pause for as short as a test can bear, and end with the test."""
    monkeypatch.setattr(stop_module, "_NOTICE_PAUSE_SECONDS", 0.02)
    with ExitStack() as watches:

        def watching(host: str) -> Stop:
            monkeypatch.setenv("GCE_METADATA_HOST", host)
            watches.enter_context(stop_module.preemption_watched(stop := Stop()))
            return stop

        yield watching


def cut_short(request):
    request.send_response(200)
    request.send_header("Content-Length", "9999")
    request.end_headers()
    request.wfile.write(b"TR")
    request.close_connection = True


ODD_ANSWERS = {
    "unavailable": lambda request: request.send_error(503),
    "hotel": lambda request: request.say(200, "<html>log in to the hotel's network</html>", ETag="1"),
    "does not know how to wait": lambda request: request.say(200, "FALSE"),
    "cut short": cut_short,
}


def test_a_notice_stops_and_odd_answers_do_not(watching, monkeypatch):
    # That of another machine.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with metadata_server() as server:
        waiting = watching(server.host)
        eventually(lambda: len(server.requests) == 2, 20)
        assert server.requests[0].endswith("wait_for_change=true&last_etag=0&timeout_sec=60")
        time.sleep(0.2)
        assert len(server.requests) == 2, "it asks again although its request is not answered"
        for name, server.odd in ODD_ANSWERS.items():
            asked = len(server.requests)
            stop = watching(server.host)
            eventually(lambda asked=asked: len(server.requests) > asked + 3, 20)
            assert not stop(), name
            stop.request("the next one")
        # Its next question is answered by itself again.
        asking = watching(server.host)
        server.odd = None
        assert not waiting()
        server.preempt()
        # One that begins on a machine that is preempted already stops at once.
        for stop in (waiting, asking, watching(server.host)):
            eventually(stop, 10)
            assert stop.reason == "the machine's notice instance/preempted=TRUE"


def test_a_missing_server_harms_nothing(watching, monkeypatch, tmp_path):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    stops = [watching(host) for host in ("127.0.0.1:1", "not a host", "http://metadata", "nobody.invalid")]
    time.sleep(0.2)
    assert not any(stop() for stop in stops)
    assert errors == []
    assert "instance/preempted" in {thread.name for thread in threading.enumerate()}
    monkeypatch.delenv("GCE_METADATA_HOST")
    product = tmp_path / "product_name"
    monkeypatch.setattr(stop_module, "_PRODUCT", product)
    for text, host in (("Standard PC", ""), ("Google Compute Engine", "metadata.google.internal")):
        product.write_text(f"{text}\n")
        assert stop_module._metadata_host() == host
    product.unlink()
    assert stop_module._metadata_host() == ""
