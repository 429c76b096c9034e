"""Being stopped before anything has begun: while modules are imported, and while a bucket does not answer."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.job.answering import metadata_server
from tests.job.command_line import DDPM, environment

PACK = ("data", "pack", "landscape-sample", "mine", "--size", "16", "--bucket", "gs://nobody-there")
WORDS = ("train", "--dataset", "x", "--bucket", "gs://nobody-there")


@pytest.fixture
def unreachable():
    """Variables of a bucket server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.getsockname()[1]}"}


def begin(command, variables, **options):
    return subprocess.Popen(command, env=environment(**variables), stderr=subprocess.PIPE, text=True, **options)


def test_while_modules_are_imported(unreachable):
    command = [sys.executable, "-c", "import job.__main__ as m; print(flush=True); m.main()", *WORDS]
    for number, seconds in ((signal.SIGTERM, 0.1), (signal.SIGINT, 0.4), (signal.SIGHUP, 2.0)):
        child = begin(command, unreachable, stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(seconds)
        child.send_signal(number)
        # Again, by an impatient person.
        child.send_signal(number)
        _, err = child.communicate(timeout=20)
        assert child.returncode == 75
        # What the interpreter was doing just then it may tell in lines of its own.
        assert err.startswith(f"ddpm: stopped by {number.name}; the same command begins again\n")


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


@pytest.mark.slow
def test_a_caught_end_is_only_delayed():
    for code in (ANOTHER_ERROR, CAUGHT):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, check=False)
        assert (done.returncode, done.stderr) == (75, "ddpm: stopped by SIGTERM; the same command begins again\n")


def test_deadlines_and_notices_end_waits(unreachable):
    with metadata_server() as server:
        server.preempt()
        cases = [(WORDS, {"GCE_METADATA_HOST": server.host})]
        cases += [((*words, "--stop-after", "4s"), {}) for words in (WORDS, PACK)]
        began = time.monotonic()
        begun = [begin([DDPM, *words], unreachable | variables) for words, variables in cases]
        for child, (words, _) in zip(begun, cases, strict=True):
            _, err = child.communicate(timeout=60)
            assert child.returncode == 75, (words, err)
        assert time.monotonic() - began < 20
