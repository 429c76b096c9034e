"""What ranks say, and who reads it: live, in order, by whoever is there."""

import os
import pty
import subprocess

from tests.job.command_line import environment
from tests.job.launching import ready_pids, start


def test_one_rank_learns_of_no_group_and_has_the_streams_to_itself(tmp_path):
    code = """
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert not names & os.environ.keys()
    print(input(), flush=True)
    print("as it is", end="", file=sys.stderr, flush=True)
    os.abort()
    """
    child = start(tmp_path, code, 1, stdin=subprocess.PIPE)
    out, err = child.communicate("to the rank\n", timeout=30)
    assert (child.returncode, out) == (134, "to the rank\n")
    assert err == "as it isddpm: the process failed: killed by SIGABRT\n"


def test_output_comes_live_and_says_whose_it_is(tmp_path):
    code = r"""
    print(f"out of {rank}", flush=True)
    sys.stderr.write(f"live from {rank}\nlast without an end")
    sys.stderr.flush()
    if rank:
        print("[rank1]:[W1 ProcessGroupNCCL.cpp:1] noise", flush=True)
        print("[rank1]:[W1 ProcessGroupNCCL.cpp:1] more noise", flush=True)
        print("as it is", flush=True)
    ready()
    while not Path("go").exists():
        time.sleep(0.02)
    """
    child = start(tmp_path, code)
    ready_pids(tmp_path)
    live = [child.stderr.readline() for _ in range(5)]
    live.remove("live from 0\n")
    assert live == [
        "[rank 1] out of 1\n",
        "[rank 1] live from 1\n",
        "[rank 1] last without an end[rank1]:[W1 ProcessGroupNCCL.cpp:1] noise\n",
        "[rank 1] as it is\n",
    ]
    assert child.poll() is None
    (tmp_path / "go").touch()
    # `communicate` would not see what `readline` has taken from the pipe already.
    assert child.stderr.read() == "last without an end\n"
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
    while not Path("0.ready").exists():
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
