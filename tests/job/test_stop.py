"""What asks a process to stop, and what it is told then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from job.exits import BadRequestError, StoppedError
from job.stop import GRACE_VARIABLE, STOP_AT, STOP_SIGNALS, Stop, deadline, duration_seconds
from job.store.retry import AWAY_VARIABLE, away_limit_seconds
from tests.job.command_line import environment
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
    bad = ["", "0", "0h", "-5", "1.5h", "m", "90 m", "30m1h", "1h1h", "ten", "1e3", "inf", "1y", "9" * 400]
    for text in bad:
        with pytest.raises(BadRequestError, match="90m, 1h30m or 3600"):
            print(text, duration_seconds(text))


def test_seconds_that_the_environment_says(monkeypatch):
    monkeypatch.delenv(AWAY_VARIABLE, raising=False)
    assert away_limit_seconds() == 900
    monkeypatch.setenv(AWAY_VARIABLE, "12.5")
    assert away_limit_seconds() == 12.5
    monkeypatch.setenv(GRACE_VARIABLE, "0")
    with pytest.raises(BadRequestError, match="give the seconds between a preemption notice and the end"):
        Stop()
    for text in ("-1", "inf", "nan", "soon"):
        monkeypatch.setenv(AWAY_VARIABLE, text)
        with pytest.raises(BadRequestError, match=f"{AWAY_VARIABLE}={text!r}: give the seconds"):
            away_limit_seconds()


def test_the_first_deadline_stays(installed):
    with deadline("2s"):
        set_at = os.environ[STOP_AT]
        with deadline("1h"):
            assert os.environ[STOP_AT] == set_at
        stop = installed()
        assert not stop()
        eventually(stop, 10)
        assert float(set_at) <= time.clock_gettime(time.CLOCK_BOOTTIME)
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
    stop = installed()
    said = "stopped by SIGTERM while reading; the same command begins again"
    with pytest.raises(StoppedError, match=said), stop.at_once("while reading"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        pytest.fail("went on")
    stop = installed()
    # A library has its own error for any failure.
    with pytest.raises(StoppedError, match=said), stop.at_once("while reading"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except StoppedError:
            raise OSError from None
    # Other work is never interrupted.
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM"


def test_sleeping_ends_when_somebody_asks(installed):
    stop = installed()
    began = time.monotonic()
    assert not stop.sleep(0.3)
    assert time.monotonic() - began >= 0.3
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.signal(signal.SIGALRM, lambda number, frame: stop.request("an alarm"))
    assert stop.sleep(600)
    assert stop.sleep(600)
    assert stop.reason == "an alarm"


def test_waiting_for_others_is_no_hang(installed, monkeypatch):
    beating = []
    monkeypatch.setattr("job.stop.beat", lambda: beating.append(threading.current_thread().name))
    with installed().waiting(60):
        eventually(lambda: "until-all-have-met" in beating, 10)


def test_signals_at_exit_keep_the_code():
    program = """
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
    for before, reason in ([], "SIGHUP"), (["nohup"], "SIGTERM"):
        words = [*before, sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(
            words, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout) == (75, f"{reason}\n"), done.stderr
