"""Signs of life: a process that hangs is told from one that is slow, waits, or was suspended with all others."""

from __future__ import annotations

import mmap
import os
import re
import signal
import subprocess
import threading
import time

import pytest

from job import stop as stop_module
from job.processes import heartbeat
from job.processes.heartbeat import Heartbeats
from job.stop import HEARTBEATS, Stop, beat, connect_heartbeat
from tests.job.command_line import DDPM, environment, settings
from tests.job.launching import children, ended, eventually, is_gone, ready_pids, start


@pytest.fixture
def connected(monkeypatch):
    """The launcher's side of two ranks, of which this process is the second."""
    heartbeats = Heartbeats(2)
    monkeypatch.setattr(stop_module, "_beats", None)
    monkeypatch.setattr(stop_module, "_place", 0)
    # The descriptor is a rank's own once it was inherited.
    monkeypatch.setenv(HEARTBEATS, f"{os.dup(heartbeats.descriptor)}:1")
    connect_heartbeat()
    yield heartbeats
    os.close(heartbeats.descriptor)


def test_without_a_launcher_a_beat_is_nothing(monkeypatch):
    monkeypatch.setattr(stop_module, "_beats", None)
    monkeypatch.delenv(HEARTBEATS, raising=False)
    connect_heartbeat()
    beat()
    assert stop_module._beats is None


def test_silence_is_counted_per_rank_from_the_start_and_ends_with_a_beat(connected):
    assert HEARTBEATS not in os.environ, "a child of the rank would take the rank's place"
    began = connected.last_beat(0)
    connected.look()
    time.sleep(0.2)
    beat()
    silent, beating = connected.look()
    assert silent >= 0.2
    assert beating == 0
    time.sleep(0.1)
    assert connected.look()[0] >= 0.3
    assert connected.last_beat(0) == began < connected.last_beat(1) <= time.monotonic()


def test_time_in_which_the_launcher_itself_did_not_run_does_not_count(connected, monkeypatch):
    before = connected.look()[0]
    now = time.monotonic()
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now + 8 * 3600)
    assert connected.look()[0] == before + heartbeat._LONGEST_LOOK_SECONDS


def test_the_memory_takes_no_disk_and_what_a_rank_writes_there_is_a_time(connected):
    assert os.fstat(connected.descriptor).st_size == 16
    beat()
    with mmap.mmap(connected.descriptor, 0) as memory:
        assert memoryview(memory).cast("d")[1] == connected.last_beat(1)


def test_a_poll_of_the_stop_flag_is_a_beat_in_the_main_thread_alone(connected):
    stop = Stop()
    before = connected.last_beat(1)
    thread = threading.Thread(target=stop)
    thread.start()
    thread.join()
    assert connected.last_beat(1) == before
    stop()
    assert connected.last_beat(1) > before


@pytest.mark.parametrize("processes", [1, 2])
def test_a_hung_job_ends_with_71_and_the_stacks_of_all_ranks(tmp_path, processes):
    code = f"""
    def stuck():
        threading.Event().wait()
    def waiting_for_the_other():
        threading.Event().wait()
    threading.Thread(target=time.sleep, args=[600], name="another", daemon=True).start()
    ready(); all_ready()
    if rank == {processes - 1}:
        stuck()
    work(0.5)
    waiting_for_the_other()
    """
    child = start(tmp_path, code, processes, hang_after_seconds=3)
    ranks = ready_pids(tmp_path, processes)
    found, out, err = ended(child)
    name = "rank 1 of 2" if processes == 2 else "the process"
    assert (found, out) == (71, "")
    assert re.search(rf"ddpm: {name} hung: no sign of life for \d s \(sleeping\); --hang-after sets the limit", err)
    # The main thread's stack and the other thread's.
    assert err.count("Current thread") == err.count("in stuck") + err.count("in waiting_for_the_other") == processes
    assert err.count("Thread 0x") >= processes
    for rank in range(processes):
        assert f"ddpm: stacks of {f'rank {rank} of 2' if processes == 2 else 'the process'}:" in err
    assert all(map(is_gone, ranks))


def test_a_rank_that_is_stopped_from_outside_hangs_and_shows_where(tmp_path):
    code = """
    def at_work():
        ready(); all_ready()
        work(60)
    at_work()
    """
    child = start(tmp_path, code, hang_after_seconds=2)
    os.kill(ready_pids(tmp_path)[0], signal.SIGSTOP)
    found, _, err = ended(child)
    assert found == 71
    assert re.search(r"ddpm: rank 0 of 2 hung: no sign of life for \d s \(stopped\)", err)
    assert err.count("in at_work") == 2


def test_who_beats_is_slow_and_does_not_hang(tmp_path):
    code = """
    ready(); all_ready()
    work(4)
    """
    assert ended(start(tmp_path, code, hang_after_seconds=2.5)) == (0, "", "")


def test_a_process_that_never_gets_going_hangs_too(tmp_path):
    child = start(tmp_path, "raise SystemExit('never executed')", 1, hang_after_seconds=1)
    (rank,) = eventually(lambda: children(child.pid))
    os.kill(rank, signal.SIGSTOP)
    assert ended(child)[0] == 71


def test_a_limit_of_zero_is_none(tmp_path):
    child = start(tmp_path, "ready(); time.sleep(2)", hang_after_seconds=0)
    assert ended(child) == (0, "", "")


def test_a_suspended_machine_hangs_nobody(tmp_path):
    """All processes are stopped alike, as by Ctrl-Z, and go on."""
    code = """
    ready(); all_ready()
    work(1.5)
    """
    child = start(tmp_path, code, hang_after_seconds=2.5, start_new_session=True)
    ready_pids(tmp_path)
    os.killpg(child.pid, signal.SIGSTOP)
    time.sleep(3.5)
    os.killpg(child.pid, signal.SIGCONT)
    assert ended(child) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "code"), [(1, 71), (2, 0)])
def test_waiting_for_others_is_no_hang_but_nobody_waits_alone(tmp_path, processes, code):
    rank = """
    from job.processes.group import rendezvous_seconds
    from job.stop import Stop
    stop = Stop().install(signals=False)
    with stop.waiting(rendezvous_seconds() if "RANK" in os.environ else 0.0):
        time.sleep(6)
    """
    assert ended(start(tmp_path, rank, processes, hang_after_seconds=2))[0] == code


def test_a_real_run_whose_rank_stands_still_ends_with_71_and_is_gone_on_with(tmp_path):
    bucket, variables = tmp_path / "bucket", environment(DDPM_CACHE=str(tmp_path / "cache"))
    pack = [DDPM, "data", "pack", "landscape-sample", "tiles", "--size", "16", "--bucket", bucket]
    subprocess.run(pack, env=variables, stdout=subprocess.DEVNULL, check=True)
    words = ["train", "--dataset", "tiles", "--bucket", str(bucket), "--epochs", "1000", "--processes", "2"]
    # Starting takes seconds in which nobody beats.
    words += ["--hang-after", "12"]
    child = subprocess.Popen([DDPM, *words, *settings()], env=variables, stderr=subprocess.PIPE, text=True)
    eventually(lambda: (bucket / "runs" / "tiles" / "LATEST").exists(), 120)
    ranks = sorted(children(child.pid))
    os.kill(ranks[1], signal.SIGSTOP)
    code, _, err = ended(child, 60)
    assert code == 71
    assert re.search(r"ddpm: rank 1 of 2 hung: no sign of life for 1\d s \(stopped\); --hang-after", err)
    assert re.search(r"ddpm: stacks of rank 0 of 2:\n(.*\n)+.* in train\n(.*\n)+ddpm: stacks of rank 1 of 2:\n", err)
    assert re.search(r"\[rank 1\] .* in train\n", err)
    assert all(map(is_gone, ranks))
