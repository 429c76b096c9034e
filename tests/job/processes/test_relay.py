"""What ranks say, and who reads it: live, in order, by whoever is there, and never waited for."""

import os
import pty
import re
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from job.processes.relay import Relay
from job.runs.checkpoints import list_checkpoints
from job.runs.lease import load_lease
from job.store import open_store
from tests.job.command_line import DDPM, ddpm_here, environment, settings, succeeded
from tests.job.launching import ended, eventually, ready_pids, start


def test_one_rank_learns_of_no_group_and_has_input_and_output_to_itself(tmp_path):
    code = """
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert not names & os.environ.keys()
    print(input())
    print("as it is", end="", file=sys.stderr)
    """
    child = start(tmp_path, code, 1, stdin=subprocess.PIPE)
    out, err = child.communicate("to the rank\n", timeout=30)
    assert (child.returncode, out, err) == (0, "to the rank\n", "as it is\n")


def test_what_rank_0_said_is_not_said_again(tmp_path):
    code = """
    # A handler would not last to the very end of the process, and the signal of the launcher would.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"ddpm: the same of {rank}", file=sys.stderr, flush=True)
    ready(); all_ready()
    sys.exit(66)
    """
    assert ended(start(tmp_path, code)) == (66, "", "ddpm: the same of 0\n")


def test_output_comes_live_and_says_whose_it_is(tmp_path):
    code = r"""
    print(f"out of {rank}", flush=True)
    time.sleep(rank * 0.3)
    sys.stderr.write(f"live from {rank}\nlast without an end")
    sys.stderr.flush()
    if rank:
        print("[rank1]:[W1 ProcessGroupNCCL.cpp:1] noise", flush=True)
        print("[rank1]: once is enough", flush=True)
    ready()
    while not Path("go").exists():
        time.sleep(0.02)
    """
    child = start(tmp_path, code)
    ready_pids(tmp_path)
    first = [child.stderr.readline() for _ in range(3)]
    assert first.count("live from 0\n") == 1
    assert [line for line in first if "1" in line] == ["[rank 1] out of 1\n", "[rank 1] live from 1\n"]
    assert child.poll() is None
    (tmp_path / "go").touch()
    # `communicate` would not see what `readline` has taken from the pipe already.
    assert sorted(child.stderr.read().splitlines()) == [
        "[rank 1] last without an end[rank1]:[W1 ProcessGroupNCCL.cpp:1] noise",
        "[rank 1] once is enough",
        "last without an end",
    ]
    assert child.stdout.read() == "out of 0\n"
    assert child.wait(30) == 0


def test_rank_0_keeps_the_terminal_for_its_bar(tmp_path):
    """What others print takes the place of the bar's line instead of being written into it."""
    ours, theirs = pty.openpty()
    code = """
    if rank == 0:
        assert sys.stderr.isatty()
        print("a bar", end="", file=sys.stderr, flush=True)
        ready()
    all_ready_0 = lambda: Path("0.ready").exists()
    while not all_ready_0():
        time.sleep(0.01)
    if rank == 1:
        assert not sys.stderr.isatty()
        print("a note", file=sys.stderr)
    """
    child = start(tmp_path, code, stderr=theirs, env=environment(TERM="xterm"))
    assert child.wait(30) == 0
    assert os.read(ours, 4096) == b"a bar\r\x1b[2K[rank 1] a note\r\n"
    os.close(ours)
    os.close(theirs)


def test_a_reader_that_is_gone_ends_nothing(tmp_path):
    child = start(tmp_path, "print('x' * 100_000, file=sys.stderr); Path(f'{rank}.done').touch()")
    child.stderr.close()
    assert child.wait(30) == 0
    assert all((tmp_path / f"{rank}.done").exists() for rank in range(2))


def test_a_terminal_that_takes_nothing_more_holds_nothing_up(tmp_path):
    code = """
    for _ in range(100):
        print('x' * 10_000, file=sys.stderr)
    Path(f'{rank}.done').touch()
    all_ready_1 = lambda: Path("0.done").exists() and Path("1.done").exists()
    while not all_ready_1():
        time.sleep(0.01)
    sys.exit(70 * rank)
    """
    child = start(tmp_path, code)
    # Nobody reads what it prints, which is more than a pipe holds.
    assert child.wait(20) == 70
    assert re.match(r"(\[rank 1\] )?xxx", child.stderr.read())
    assert all((tmp_path / f"{rank}.done").exists() for rank in range(2))


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_code_is_the_same_when_nobody_reads_what_is_said(tmp_path, processes):
    """As behind a `tee` that Ctrl-C ended first, or on a terminal that hung up."""
    words = ["train", "--dataset", "tiles", "--run", "walk", "--bucket", str(tmp_path), "--epochs", "10000"]
    succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", tmp_path))
    command = [DDPM, *words, *settings(checkpoint__every_epochs="1"), "--processes", str(processes)]
    variables = environment(DDPM_CACHE=str(tmp_path / "cache"))
    child = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run = open_store(str(tmp_path)).sub("runs/walk")
    eventually(lambda: (tmp_path / "runs/walk/checkpoints").exists() and list_checkpoints(run))
    child.stdout.close()
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 75
    finished = [DDPM, *words[:-1], "1", *settings(checkpoint__every_epochs="1")]
    child = subprocess.Popen(finished, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    child.stdout.close()
    assert child.wait(60) == 0


def test_a_reader_that_takes_nothing_more_holds_up_no_stop(tmp_path):
    """As a terminal does after Ctrl-S, or a pipe whose reader sleeps."""
    words = ["train", "--dataset", "tiles", "--run", "walk", "--bucket", str(tmp_path), "--epochs", "100000"]
    succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", tmp_path))
    command = [DDPM, *words, *settings(checkpoint__every_epochs="1"), "--processes", "1"]
    reading, writing = os.pipe()
    variables = environment(DDPM_CACHE=str(tmp_path / "cache"))
    child = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=writing)
    run = open_store(str(tmp_path)).sub("runs/walk")
    eventually(lambda: (tmp_path / "runs/walk/checkpoints").exists() and list_checkpoints(run))
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    os.set_blocking(writing, True)
    # Some of what it says now waits.
    time.sleep(1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 75
    assert load_lease(run).released
    os.close(reading)
    os.close(writing)


def test_a_process_that_is_alone_is_heard_out(tmp_path):
    """As when C++ code ends it: several would say the same, a screenful each."""
    code = """
    for line in ("terminate called after throwing an instance of 'c10::Error'", "  what():  CUDA error", "frame #0: x"):
        print(line, file=sys.stderr, flush=True)
    os.abort()
    """
    code, _, err = ended(start(tmp_path, code, 1))
    assert code == 134
    assert err.splitlines() == [
        "terminate called after throwing an instance of 'c10::Error'",
        "  what():  CUDA error",
        "frame #0: x",
        "ddpm: the process failed: killed by SIGABRT",
    ]


def test_what_waits_for_a_reader_is_bounded():
    relay = Relay()
    for _ in range(1000):
        relay.say("x" * 10_000)
    for _ in range(100_000):
        relay.say("")
    assert 4 << 20 < sum(map(len, relay._outgoing.queue)) + 200 * relay._outgoing.qsize() < 5 << 20
