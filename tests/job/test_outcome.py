"""How a job ends: what asks it to stop, memory that runs out, and what it says of its end in its bucket."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from job.coordination.outcome import JOB, Outcome, outcome_written, read_outcome
from job.exits import BadRequestError, BucketAwayError, LostRunError, StoppedError
from job.platform import boot_clock
from job.stop import GRACE_VARIABLE, STOP_AT, STOP_SIGNALS, Stop, deadline, duration_seconds
from job.store.retry import AWAY_VARIABLE, away_limit_seconds
from tests.conftest import only_linux
from tests.job.command_line import DDPM, ddpm, ddpm_here, ran, refused, settings, succeeded
from tests.job.hooked import hooked
from tests.job.launching import eventually


@pytest.fixture
def installed():
    """Installs what is to be asked; afterwards this process has its own signal handlers back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield lambda: Stop().install()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_durations():
    good = {"3600": 3600, "45s": 45, "90m": 5400, "1h30m": 5400, "2d": 172_800, "1d2h3m4s": 93_784, "1H": 3600}
    good |= {" 5m ": 300, "5m30": 330}
    assert {text: duration_seconds(text) for text in good} == good
    for text in ["", "0", "0h", "-5", "1.5h", "m", "90 m", "30m1h", "1h1h", "ten", "1e3", "inf", "1y", "9" * 400]:
        with pytest.raises(BadRequestError, match="90m, 1h30m or 3600"):
            print(text, duration_seconds(text))


def test_seconds_that_the_environment_says(monkeypatch):
    monkeypatch.delenv(AWAY_VARIABLE, raising=False)
    assert away_limit_seconds() == 900
    monkeypatch.setenv(AWAY_VARIABLE, "12.5")
    assert away_limit_seconds() == 12.5
    away, grace = (away_limit_seconds, ""), (Stop, " between a preemption notice and the end")
    odd = [(AWAY_VARIABLE, text, *away) for text in ("-1", "inf", "nan", "soon")] + [(GRACE_VARIABLE, "0", *grace)]
    for variable, text, read, more in odd:
        monkeypatch.setenv(variable, text)
        with pytest.raises(BadRequestError, match=f"{variable}={text!r}: give the seconds{more}"):
            read()


def test_the_first_deadline_stays(installed):
    with deadline("2s"):
        set_at = os.environ[STOP_AT]
        with deadline("1h"):
            assert os.environ[STOP_AT] == set_at
        stop = installed()
        assert not stop()
        eventually(stop, 10)
        assert float(set_at) <= boot_clock()
    assert stop.reason == "its deadline (--stop-after)"
    assert STOP_AT not in os.environ
    with deadline(""):
        assert not installed()()


def test_the_first_signal_is_the_reason(installed):
    for first in STOP_SIGNALS:
        stop = installed()
        assert not stop()
        for number in (first, *STOP_SIGNALS):
            os.kill(os.getpid(), number)
            assert stop()
        assert stop.reason == first.name
        with pytest.raises(StoppedError, match=f"^stopped by {first.name} while packing; the same command goes on$"):
            stop.check("while packing")


def test_work_without_loops_ends_at_once(installed):
    """A library may have its own error for any failure."""
    stop, said = installed(), "stopped by SIGTERM while reading; the same command begins again"
    for hidden in ((), (StoppedError,)):
        with pytest.raises(StoppedError, match=said), stop.at_once("while reading"):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
                pytest.fail("went on")
            except hidden:
                raise OSError from None
        stop = installed()
    # Other work is never interrupted.
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM"


def test_sleeping_ends_when_somebody_asks(installed):
    stop, began = installed(), time.monotonic()
    assert not stop.sleep(0.3)
    assert time.monotonic() - began >= 0.3
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.signal(signal.SIGALRM, lambda number, frame: stop.request("an alarm"))
    assert stop.sleep(600) and stop.sleep(600)
    assert stop.reason == "an alarm"


def test_waiting_for_others_is_no_hang(installed, monkeypatch):
    beating = []
    monkeypatch.setattr("job.stop.beat", lambda: beating.append(threading.current_thread().name))
    with installed().waiting(60):
        eventually(lambda: "until-all-have-met" in beating, 10)


SIGNALS_AT_EXIT = """
import os, signal, sys, time
from job.stop import Stop
class Last:
    def __del__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
sys.last = Last()
stop = Stop().install()
os.kill(os.getpid(), signal.SIGHUP)
os.kill(os.getpid(), signal.SIGTERM)
stop.sleep(600)
print(stop.reason)
sys.exit(75)
"""


def test_signals_at_exit_keep_the_code():
    for before, reason in ((), "SIGHUP"), (("nohup",), "SIGTERM"):
        done = ddpm("-c", SIGNALS_AT_EXIT, program=(*before, sys.executable))
        assert (done.returncode, done.stdout) == (75, f"{reason}\n"), done.stderr


LITTLE_MEMORY = """
import resource
from pathlib import Path

train_with_all_memory = run_training

def run_training(*arguments):
    in_use_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use_bytes + 1000 * 2**20,) * 2)
    return train_with_all_memory(*arguments)
"""


@pytest.mark.slow
@only_linux
def test_memory_that_runs_out_on_the_machine(tmp_path):
    variables = {"PYTHONPATH": hooked(tmp_path / "hooks", job__training__session=LITTLE_MEMORY)}
    variables["DDPM_CACHE"] = str(tmp_path / "cache")
    place = ("--bucket", tmp_path / "bucket")
    ran("data", "ensure", "landscape-sample", *place)
    sets = settings(model__channels="32", train__batch_size="299", checkpoint__every_minutes="60")
    words = ("train", "--dataset", "landscape-sample", "--epochs", 1, *place, *sets)
    said = refused(ddpm(*words, **variables), 72)
    assert "memory ran out on the machine" in said and "smaller train.micro_batch_size" in said
    succeeded(ddpm(*words, "--set", "train.micro_batch_size=16", **variables))


@only_linux
def test_a_limit_below_the_program_itself(tmp_path):
    said = refused(ddpm("data", "list", "--bucket", tmp_path, program=("prlimit", "--as=60000000", DDPM)), 72)
    assert re.search(r"ran out on the machine \(\S+\.so\S* failed to map segment\): allow more \(`ulimit -a`\)", said)


NAME, NO_MEMORY = "train-celeba", "memory ran out on the machine"
OF_A_GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"
ENDINGS = [
    (None, "finished", 0, ""),
    (SystemExit(0), "finished", 0, ""),
    (SystemExit(71), "failed", 71, ""),
    (StoppedError("stopped by SIGTERM"), "stopped", 75, "stopped by SIGTERM"),
    (LostRunError("held by a"), "failed", 76, "held by a"),
    (BucketAwayError("x" * 1000), "failed", 69, "x" * 500),
    (OSError(errno.ENOSPC, "full", "/tmp/a"), "failed", 74, "no space left on the disk at /tmp/a: "),
    (ValueError("nobody foresaw it"), "failed", 1, ""),
    (MemoryError(), "failed", 72, f"{NO_MEMORY}: allow more"),
    (torch.OutOfMemoryError(OF_A_GPU), "failed", 72, "memory ran out on the GPU (Tried to allocate 2.00 GiB): train "),
    (RuntimeError("could not create a primitive"), "failed", 72, f"{NO_MEMORY} (could not create a primitive)"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "failed", 72, "memory ran out on the GPU (CUDA"),
    (RuntimeError("can't start new thread"), "failed", 72, f"{NO_MEMORY} (can't start new thread): allow more"),
    (OSError(12, "Cannot allocate memory"), "failed", 72, f"{NO_MEMORY} ([Errno 12] Cannot allocate memory): allow"),
]


@pytest.fixture
def bucket(tmp_path) -> str:
    (tmp_path / "bucket").mkdir()
    return str(tmp_path / "bucket")


def end(
    place: str | Path, *machine: int, error: BaseException | None = None, **options
) -> tuple[str, int | None] | None:
    """Runs a job there that ends with this error; state and exit code as the bucket has them then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(JOB, NAME)
        raises = nullcontext() if error is None else pytest.raises(type(error))
        with raises as raised, outcome_written(str(place), *machine, **options):
            # What this process starts is no job.
            assert JOB not in os.environ
            if error is not None:
                raise error
        assert error is None or raised.value is error
    outcome = read_outcome(NAME, str(place))
    return outcome and (outcome.state, outcome.exit_code)


def test_an_outcome_follows_its_job(bucket, tmp_path, monkeypatch):
    """It needs a job and a bucket."""
    monkeypatch.delenv(JOB, raising=False)
    with outcome_written(bucket):
        pass
    (tmp_path / "file").write_text("")
    assert [read_outcome(NAME, bucket), end(tmp_path / "file"), end(tmp_path / "misspelt")] == [None] * 3
    assert not (tmp_path / "misspelt").exists()
    for error, state, code, message in ENDINGS:
        assert end(bucket, error=error) == (state, code), error
        assert read_outcome(NAME, bucket).message.startswith(message), error
    monkeypatch.setenv(JOB, NAME)
    with outcome_written(bucket):
        running = read_outcome(NAME, bucket)
        assert (running.state, running.exit_code) == ("running", None)


def test_the_worst_of_several_machines_decides(bucket):
    ends = ((0, 0), (1, 0), (2, 0), (1, 75), (0, 69), (2, 64))
    told = [end(bucket, machine, 3, error=SystemExit(code)) for machine, code in ends]
    running, finished = ("running", None), ("finished", 0)
    assert told == [running, running, finished, ("stopped", 75), ("failed", 69), ("failed", 64)]
    # What is corrupt says nothing.
    path = Path(bucket, "jobs/train-celeba/2-of-3.json")
    path.write_text(path.read_text().replace("64", "0"))
    assert read_outcome(NAME, bucket).exit_code == 69
    # Submitted for one machine now, it is another job.
    alone = Outcome(state="finished", exit_code=0, updated="2100-01-01T00:00:00Z")
    path.with_name("0-of-1.json").write_bytes(alone.to_json())
    outcome = read_outcome(NAME, bucket)
    assert (outcome.state, outcome.machines) == ("finished", 1)


@pytest.mark.parametrize(("is_group", "count"), [(True, 2), (False, 3)])
def test_starts_are_kept(bucket, monkeypatch, is_group, count):
    for machine in (0, 1, 1):
        end(bucket, machine, 2, is_group=is_group)
    starts = read_outcome(NAME, bucket).starts
    assert len(starts) == count and all(start.startswith("20") and start.endswith("Z") for start in starts)
    # They do not grow without end.
    monkeypatch.setattr("job.coordination.outcome.MOST_STARTS", 2)
    end(bucket, 1, 2, is_group=is_group)
    assert len(read_outcome(NAME, bucket).starts) == count


def test_commands_say_how_they_ended(tmp_path):
    bucket, none = str(tmp_path / "bucket"), str(tmp_path / "no")
    ran("data", "pack", "landscape-sample", "tiles", "--size", "8", "--bucket", bucket, **{JOB: "packed"})
    finished = read_outcome("packed", bucket)
    assert (finished.state, finished.exit_code) == ("finished", 0)
    rows = [
        (66, f"data pack {none} other --size 8"),
        (64, f"data pack {none} other --size 8 --crop middle"),
        (66, "train --dataset no"),
        (78, "train --dataset tiles --set x=1"),
        (64, "sample --run no --stop-after soon"),
        (64, "sample --run no --sampler plms"),
        (66, "sample --run no --count 9 --slice 1/3"),
        (66, "evaluate --run no --slice 1/3"),
    ]
    for number, (code, words) in enumerate(rows):
        name = f"job-{number}"
        said = refused(ddpm_here(*words.split(), "--bucket", bucket, **{JOB: name}), code)
        outcome = read_outcome(name, bucket)
        assert (outcome.state, outcome.exit_code) == ("failed", code)
        # It has the lines that follow as well.
        assert outcome.message.startswith(" ".join(said.split()).removeprefix("ddpm: "))
        assert (outcome.machine, outcome.machines) == ((1, 3) if "--slice" in words else (0, 1))
