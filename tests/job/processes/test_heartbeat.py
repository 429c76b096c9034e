"""Signs of life: a process that hangs is told from one that is slow, waits, or was suspended with all others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from job import stop as stop_module
from job.stop import HEARTBEATS, Heartbeats, beat, connect_heartbeat
from tests.job.command_line import environment
from tests.job.launching import children, ended, is_gone, ready_pids, start


@pytest.fixture
def connected(monkeypatch):
    """The launcher's side of two ranks, of which this process is the second."""
    heartbeats = Heartbeats(2)
    monkeypatch.setattr(stop_module, "_own_beat", None)
    # The descriptor is a rank's own once it was inherited.
    monkeypatch.setenv(HEARTBEATS, f"{os.dup(heartbeats.descriptor)}:1")
    connect_heartbeat()
    yield heartbeats
    os.close(heartbeats.descriptor)


def test_silence_counts_per_rank(connected, monkeypatch):
    assert HEARTBEATS not in os.environ, "a child of the rank would take the rank's place"
    time.sleep(0.2)
    beat()
    silent, beating = connected.silent_seconds()
    assert silent >= 0.2 > beating
    # Time in which the launcher itself did not run does not count.
    now = time.monotonic()
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now + 8 * 3600)
    assert connected.silent_seconds() == [0, 0]


def test_only_the_main_thread_beats():
    # Not in this process, in which threads of other tests may still beat.
    program = """
    import os, threading, time
    from job.stop import HEARTBEATS, Heartbeats, Stop, connect_heartbeat
    heartbeats = Heartbeats(2)
    os.environ[HEARTBEATS] = f"{os.dup(heartbeats.descriptor)}:1"
    connect_heartbeat()
    stop = Stop()
    time.sleep(0.1)
    thread = threading.Thread(target=stop)
    thread.start()
    thread.join()
    silent = heartbeats.silent_seconds()[1]
    assert silent >= 0.1, silent
    stop()
    assert heartbeats.silent_seconds()[1] < silent
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment(), check=True)


def test_a_hung_job_shows_its_stacks(tmp_path):
    code = """
    def stuck():
        threading.Event().wait()
    def waiting_for_the_other():
        threading.Event().wait()
    threading.Thread(target=time.sleep, args=[600], name="another", daemon=True).start()
    ready(); all_ready()
    if rank == 1:
        stuck()
    work(0.5)
    waiting_for_the_other()
    """
    child = start(tmp_path, code, hang_after_seconds=3)
    ranks = ready_pids(tmp_path)
    found, out, err = ended(child)
    assert (found, out) == (71, "")
    assert re.search(r"ddpm: rank 1 of 2 hung: no sign of life for \d s \(sleeping\); --hang-after sets the limit", err)
    # The main thread's stack and the other thread's.
    assert (err.count("in stuck"), err.count("in waiting_for_the_other"), err.count("Current thread")) == (1, 1, 2)
    assert err.count("Thread 0x") >= 2
    assert all(f"ddpm: stacks of rank {rank} of 2:" in err for rank in range(2))
    assert all(map(is_gone, ranks))


@pytest.mark.slow
def test_a_slow_or_suspended_job_lives(tmp_path):
    cases = {
        # name: rank's code, seconds after which it hangs, processes, exit code
        "slow": ("ready(); all_ready(); work(4)", 2.5, 2, 0),
        "no limit": ("ready(); time.sleep(2)", 0, 2, 0),
        "suspended": ("ready(); all_ready(); work(1.5)", 2.5, 2, 0),
        "stands still": ("os.kill(os.getpid(), signal.SIGSTOP)", 1, 1, 71),
    }
    begun = {}
    for name, (code, hang_after_seconds, processes, _) in cases.items():
        (tmp_path / name).mkdir()
        begun[name] = start(tmp_path / name, code, processes, hang_after_seconds, start_new_session=True)
    # All processes are stopped alike, as by Ctrl-Z, and go on.
    ready_pids(tmp_path / "suspended")
    os.killpg(begun["suspended"].pid, signal.SIGSTOP)
    time.sleep(3.5)
    os.killpg(begun["suspended"].pid, signal.SIGCONT)
    for name, (*_, expected) in cases.items():
        code, _, err = ended(begun[name])
        assert code == expected, (name, err)


@pytest.mark.slow
def test_a_hung_run_ends(place):
    # Starting takes seconds in which nobody beats.
    child = place.begun("hangs", "--processes", 2, "--hang-after", 20)
    ranks = sorted(children(child.pid))
    os.kill(ranks[1], signal.SIGSTOP)
    code, err, _ = ended(child, 60)
    assert code == 71
    assert re.search(r"ddpm: rank 1 of 2 hung: no sign of life for 2\d s \(stopped\); --hang-after", err)
    assert re.search(r"ddpm: stacks of rank 0 of 2:\n(.*\n)+.* in train\n(.*\n)+ddpm: stacks of rank 1 of 2:\n", err)
    assert re.search(r"\[rank 1\] .* in train\n", err)
    assert all(map(is_gone, ranks))
