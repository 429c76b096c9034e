"""Being stopped before anything has begun: while modules are imported, and while a bucket does not answer."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.job.command_line import DDPM, environment
from tests.job.metadata_server import PREEMPTED, metadata_server

WORDS = ("train", "--dataset", "x", "--bucket", "gs://nobody-there")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.4])
def test_while_modules_are_imported(number, seconds, unreachable):
    command = [sys.executable, "-c", "import job.__main__ as m; print(flush=True); m.main()", *WORDS]
    child = subprocess.Popen(
        command, env=environment(**unreachable), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.readline()
    time.sleep(seconds)
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 75, err
    assert f"stopped by {number.name}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_library_that_catches_the_end_delays_it_by_seconds(number):
    code = f"""
import job.__main__ as program, os, time
program._handle(program._end)
try:
    os.kill(os.getpid(), {int(number)})
except BaseException:
    pass
time.sleep(60)
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stderr) == (75, f"ddpm: stopped by {number.name}; the same command begins again\n")
    assert time.monotonic() - began < 15


@pytest.fixture
def unreachable():
    """Variables of a bucket server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.getsockname()[1]}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


def test_by_a_deadline_while_the_bucket_is_away(unreachable):
    began = time.monotonic()
    words = [DDPM, *WORDS, "--stop-after", "4s"]
    done = subprocess.run(
        words, env=environment(**unreachable), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - began < 14


def test_by_a_notice_while_the_bucket_is_away(unreachable):
    with metadata_server() as server:
        server.set(PREEMPTED, "TRUE")
        variables = environment(**unreachable, GCE_METADATA_HOST=server.host)
        done = subprocess.run([DDPM, *WORDS], env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75, done.stderr
