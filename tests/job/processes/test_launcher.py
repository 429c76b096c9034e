"""Real processes: ranks that fail, hang on, leave orphans and are killed, under a launcher that is a program itself."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from job.exits import JobError, MissingInputError, Restart, restart_after
from job.processes import group
from tests.job.command_line import environment
from tests.job.launching import children, ended, eventually, is_gone, ready_pids, start

STOPS = """
from job.stop import Stop
stop = Stop().install()
ready()
stop.sleep(600)
Path(f"{rank}.stopped").touch()
sys.exit(75)
"""


@pytest.fixture
def started(tmp_path):
    """Starts launchers beside each other, each in a folder named after the case."""

    def started(name, code, *words, **options):
        (tmp_path / name).mkdir()
        return start(tmp_path / name, code, *words, **options)

    return started


def test_the_first_failure_decides(started):
    cases = {
        "sys.exit(70)": (70, "rank 1 of 2 failed first: the loss or a gradient was not a number"),
        "print('ddpm: no space', file=sys.stderr); sys.exit(74)": (74, "rank 1 of 2 failed first: no space\n"),
        "print('a hint'); sys.stdout.flush(); os.kill(os.getpid(), 9)": (
            137,
            "rank 1 of 2 failed first: killed by SIGKILL, as the kernel does when memory runs out; its last lines:\n"
            "    a hint\n",
        ),
        "1/0": (1, "rank 1 of 2 failed first, with exit code 1; its last lines:\n    Traceback"),
    }
    began = time.monotonic()
    for number, (code, (seen, said)) in enumerate(cases.items()):
        found, out, err = ended(started(str(number), f"if rank == 1:\n    {code}\ntime.sleep(60)"))
        assert (found, out) == (seen, ""), code
        assert f"ddpm: {said}" in err
        assert err.count("ddpm: ") == 1
    assert time.monotonic() - began < 50
    # What rank 0 said is not said again.
    alike = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"ddpm: the same of {rank}", file=sys.stderr, flush=True)
    ready(); all_ready()
    sys.exit(66)
    """
    assert ended(started("alike", alike)) == (66, "", "ddpm: the same of 0\n")


def test_a_consequence_is_no_cause(started):
    cases = [
        # how rank 1 ends, at once, and rank 0 half a second later; the whole
        ("os._exit(68)", "os._exit(70)", 70),
        ("os._exit(68)", "os.kill(os.getpid(), 9)", 137),
        ("print('[rank0]:[E1 ProcessGroupNCCL.cpp:1] timeout', flush=True); os.abort()", "os._exit(70)", 70),
        ("os._exit(68)", "os._exit(68)", 1),
        ("os._exit(68)", "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", 1),
        ("os._exit(75)", "os._exit(69)", 69),
        ("os._exit(75)", "os._exit(68)", 75),
        ("os._exit(75)", "os._exit(0)", 75),
        ("os._exit(0)", "os._exit(70)", 70),
    ]
    begun = []
    for number, (first, then, _) in enumerate(cases):
        code = f"""
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        ready(); all_ready()
        if rank == 1:
            {first}
        time.sleep(0.5)
        {then}
        """
        begun.append(started(str(number), code))
    assert [(*case[:2], ended(child)[0]) for case, child in zip(cases, begun, strict=True)] == cases


def test_a_straggler_is_killed(tmp_path):
    code = """
    def deaf():
        time.sleep(60)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready(); all_ready()
    if rank == 0:
        sys.exit(70)
    deaf()
    """
    found, _, err = ended(start(tmp_path, code))
    assert found == 70
    assert re.search(r"ddpm: stacks of rank 1 of 2:\n(\[rank 1\] .*\n)+\[rank 1\] .* in deaf\n", err)


def test_signals_reach_every_rank(started, tmp_path):
    begun = {number.name: started(number.name, STOPS) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for name, child in begun.items():
        ready_pids(tmp_path / name)
        child.send_signal(signal.Signals[name])
        assert ended(child) == (75, "", ""), name
        assert all((tmp_path / name / f"{rank}.stopped").exists() for rank in range(2))


def test_an_early_signal_is_a_stop(started, tmp_path):
    code = """
    if rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    time.sleep(60)
    """
    for processes in (1, 2, 3):
        child = started(str(processes), code, processes)
        pids = ready_pids(tmp_path / str(processes), processes)
        if processes != 2:
            # A signal to the whole process group reaches a rank first.
            os.kill(pids[0], signal.SIGTERM)
            time.sleep(0.05)
        child.terminate()
        began = time.monotonic()
        assert ended(child) == (75, "", "ddpm: stopped by SIGTERM before it began; the same command begins again\n")
        assert time.monotonic() - began < 5


def test_ranks_die_with_their_launcher(tmp_path):
    child = start(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(60)", 3)
    ranks = ready_pids(tmp_path, 3)
    os.kill(ranks[1], signal.SIGSTOP)
    child.kill()
    child.wait()
    eventually(lambda: all(map(is_gone, ranks)), seconds=5)
    # One whose launcher is gone already does not begin.
    program = "from job.processes.launcher import attach; attach(); print('began')"
    words, orphaned = [sys.executable, "-c", program], environment(DDPM_LAUNCHED="1")
    done = subprocess.run(words, env=orphaned, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the launcher of this process is gone" in done.stderr
    # One that waits for the launcher's checks may see the end of its pipe before it is killed.
    ours, theirs = os.pipe()
    os.close(theirs)
    program = "from job.processes.launcher import attach, await_go; attach(); await_go(); print('began')"
    words, orphaned = [sys.executable, "-c", program], environment(DDPM_LAUNCHED=str(os.getpid()), DDPM_GATE=str(ours))
    done = subprocess.run(words, env=orphaned, pass_fds=[ours], capture_output=True, text=True, check=False)
    os.close(ours)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_ctrl_c_ends_a_starting_rank_in_silence():
    rank = "import os; os.kill(os.getpid(), 2); print('not yet'); from job.processes.launcher import attach; attach()"
    program = f"from job.processes.launcher import launch; launch([{sys.executable!r}, '-c', {rank!r}], 1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == "ddpm: the process failed: killed by SIGINT\n"


def test_as_process_1_of_a_container(tmp_path):
    """A signal that process 1 does not ask for never arrives, and all orphans of the container are its children."""
    before = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")
    orphans = 'subprocess.run(["sh", "-c", "for i in 1 2 3 4 5; do sleep 0.3 & done; sleep 600 &"])'
    child = start(tmp_path, f"assert os.getppid() == 1\n{orphans}\n{STOPS}", before=before)
    ready_pids(tmp_path)
    (launcher,) = children(child.pid)
    # The ranks, and what each left behind that still lives, and holds its pipe open.
    eventually(lambda: len(children(launcher)) == 4)
    os.kill(launcher, signal.SIGTERM)
    assert ended(child) == (75, "", "")


def test_missing_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(group, "DRIVER", tmp_path)
    monkeypatch.setattr(group, "_cuda", lambda: ("13.0", 1))
    for given in ("", "0", "1"):
        monkeypatch.setenv(group.GPUS, given)
        group.check_gpus()
    monkeypatch.setenv(group.GPUS, "8")
    # Another machine may have what this one lost.
    with pytest.raises(
        JobError, match="was given 8 GPUs, and PyTorch sees 1: a GPU failed, or the driver is too old"
    ) as lost:
        group.check_gpus()
    assert restart_after(lost.value.exit_code) is Restart.BOUNDED
    monkeypatch.undo()
    # No machine would have these.
    monkeypatch.setenv(group.GPUS, "1")
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(group, "DRIVER", tmp_path / "there")
    group._cuda.cache_clear()
    with pytest.raises(
        MissingInputError,
        match="was given 1 GPU, and PyTorch sees 0: this is a PyTorch for CPUs; `make image TORCH=cuda`",
    ):
        group.check_gpus()
    group._cuda.cache_clear()


def test_a_single_rank_has_the_streams(tmp_path):
    code = """
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    names |= {"OMPI_COMM_WORLD_SIZE", "PMI_RANK"}
    assert not names & os.environ.keys()
    print(input(), flush=True)
    print("as it is", end="", file=sys.stderr, flush=True)
    os.abort()
    """
    left = environment(LOCAL_RANK="abc", WORLD_SIZE="-1", OMPI_COMM_WORLD_SIZE="4", PMI_RANK="1")
    child = start(tmp_path, code, 1, stdin=subprocess.PIPE, env=left)
    out, err = child.communicate("to the rank\n", timeout=30)
    assert (child.returncode, out) == (134, "to the rank\n")
    assert err == "as it isddpm: the process failed: killed by SIGABRT\n"


def test_output_is_live_and_named(tmp_path):
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


def test_rank_0_keeps_the_terminal(tmp_path):
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


def test_a_closed_reader_ends_nothing(tmp_path):
    child = start(tmp_path, "print('x' * 100_000, file=sys.stderr); Path(f'{rank}.done').touch()")
    child.stderr.close()
    assert child.wait(30) == 0
    assert all((tmp_path / f"{rank}.done").exists() for rank in range(2))


def test_the_launcher_does_not_import_torch():
    program = "import sys, job.cli.app, job.commands; assert not {'torch', 'accelerate'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.slow
def test_a_killed_rank_is_named(place):
    child = place.begun("killed", "--processes", 2)
    ranks = sorted(children(child.pid))
    os.kill(ranks[1], signal.SIGKILL)
    code, err, _ = ended(child, 60)
    assert code == 137
    assert "Traceback" not in err
    assert err.count("went away") == 1
    assert "ddpm: rank 1 of 2 failed first: killed by SIGKILL" in err.splitlines()[-1]
    assert all(map(is_gone, ranks))
