"""Real processes: ranks that fail, hang, leave orphans and are killed, under a launcher that is a program itself."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from job.coordination.outcome import JOB, read_outcome
from job.stop import STOP_AT
from tests.conftest import only_linux
from tests.job.command_line import environment, settings, started
from tests.job.launching import children, ended, eventually, is_gone, ready_pids, start

DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
FIRST = "^ddpm: rank 1 of 2 failed first"
KILLED = f"{FIRST}: killed by SIGKILL, as the kernel does when memory runs out; its last lines:\n    a hint\n$"
ALIKE = "print(f'ddpm: the same of {rank}', file=sys.stderr, flush=True); sys.exit(66)"
NCCL = "print('[rank0]:[E1 ProcessGroupNCCL.cpp:1] timeout', flush=True); os.abort()"
FAILURES = [
    ("sys.exit(70)", "", 70, f"{FIRST}: the loss or a gradient was not a number"),
    ("print('ddpm: no space', file=sys.stderr); sys.exit(74)", "", 74, f"{FIRST}: no space\n$"),
    ("print('a hint'); sys.stdout.flush(); os.kill(os.getpid(), 9)", "", 137, KILLED),
    ("1/0", "", 1, f"{FIRST}, with exit code 1; its last lines:\n    Traceback"),
    # What rank 0 says is not said again.
    (ALIKE, ALIKE, 66, r"\Addpm: the same of 0\n\Z"),
    # A consequence is no cause.
    ("os._exit(68)", "os._exit(70)", 70, ""),
    ("os._exit(68)", "os.kill(os.getpid(), 9)", 137, ""),
    (NCCL, "os._exit(70)", 70, ""),
    ("os._exit(68)", "os._exit(68)", 1, ""),
    ("os._exit(75)", "os._exit(69)", 69, ""),
    ("os._exit(75)", "os._exit(68)", 75, ""),
    ("os._exit(75)", "os._exit(0)", 75, ""),
    ("os._exit(0)", "os._exit(70)", 70, ""),
    # A straggler shows its stacks, and is killed.
    ("os._exit(68)", f"{DEAF}; time.sleep(60)", 1, r"^ddpm: stacks of rank 0 of 2:\n(.*\n)+.* in <module>\n"),
]
"""How rank 1 ends; how rank 0 ends half a second later, unless it is ended; the exit code of both; what is said."""
HUNG = r"ddpm: rank 1 of 2 hung: no sign of life for \d s \(sleeping\); --hang-after sets the limit"
STUCK = """
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
SILENT = [
    ("ready(); all_ready(); work(4)", 2, 2.5, 0, r"\A\Z"),
    ("ready(); time.sleep(2)", 2, 0, 0, r"\A\Z"),
    ("os.kill(os.getpid(), signal.SIGSTOP)", 1, 1, 71, r"the process hung: .*\(stopped\)"),
    (STUCK, 2, 3, 71, HUNG),
]
"""The code of ranks that are slow or hang, their number, `--hang-after`, the exit code, what is said."""


def of_two(first: str, then: str) -> str:
    handler = "lambda number, frame: None" if then else "signal.SIG_DFL"
    return f"""
    signal.signal(signal.SIGTERM, {handler})
    ready(); all_ready()
    if rank == 1:
        {first}
    time.sleep(0.5)
    {then or "time.sleep(60)"}
    """


CASES = [*((of_two(first, then), 2, 600, *ends) for first, then, *ends in FAILURES), *SILENT]


@pytest.mark.parametrize(("code", "processes", "hang_after_seconds", "expected", "said"), CASES, ids=range(len(CASES)))
def test_the_launcher_says_who_failed(tmp_path, code, processes, hang_after_seconds, expected, said):
    began = time.monotonic()
    child = start(tmp_path, code, processes, hang_after_seconds)
    found, out, err = ended(child)
    assert (found, out) == (expected, "")
    assert re.search(said, err, re.MULTILINE), err
    assert time.monotonic() - began < 25
    if said.startswith(FIRST):
        assert err.count("ddpm: ") == 1
    if code == STUCK:
        # The main thread's stack and the other thread's, and whose they are.
        assert (err.count("in waiting_for_the_other"), err.count("Current thread")) == (1, 2)
        assert len(re.findall(r"^\[rank 1\] .* in stuck$", err, re.MULTILINE)) == 1
        assert err.count("Thread 0x") >= 2
        assert all(f"ddpm: stacks of rank {rank} of 2:" in err for rank in range(2))
        assert all(map(is_gone, ready_pids(tmp_path)))


@pytest.mark.slow
def test_a_suspended_job_lives(tmp_path):
    """All processes are stopped alike, as by Ctrl-Z, and go on."""
    child = start(tmp_path, "ready(); all_ready(); work(1.5)", 2, 2.5, start_new_session=True)
    ready_pids(tmp_path)
    os.killpg(child.pid, signal.SIGSTOP)
    time.sleep(3.5)
    os.killpg(child.pid, signal.SIGCONT)
    assert ended(child) == (0, "", "")


def test_silence_counts_per_rank_and_main_thread():
    # Not in this process, in which threads of other tests may still beat.
    program = """
    import os, threading, time
    from job.stop import HEARTBEATS, Heartbeats, Stop, connect_heartbeat
    heartbeats = Heartbeats(2)
    # The descriptor is a rank's own once it was inherited.
    os.environ[HEARTBEATS] = f"{os.dup(heartbeats.descriptor)}:1"
    connect_heartbeat()
    assert HEARTBEATS not in os.environ, "a child of the rank would take the rank's place"
    stop = Stop()
    time.sleep(0.2)
    thread = threading.Thread(target=stop)
    thread.start()
    thread.join()
    assert heartbeats.silent_seconds()[1] >= 0.2, "another thread beats"
    stop()
    silent, beating = heartbeats.silent_seconds()
    assert silent >= 0.2 > beating
    # Time in which the launcher itself did not run does not count.
    now = time.monotonic()
    time.monotonic = lambda: now + 8 * 3600
    assert heartbeats.silent_seconds() == [0, 0]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment(), check=True)


STOPS = """
from job.stop import Stop
stop = Stop().install()
ready()
stop.sleep(600)
Path(f"{rank}.stopped").touch()
sys.exit(75)
"""
EARLY = f"""
if rank == 1:
    {DEAF}
ready()
time.sleep(60)
"""


BY_SIGNALS = [(STOPS, 2, "SIGTERM"), (STOPS, 2, "SIGINT"), (STOPS, 2, "SIGHUP")]
BY_SIGNALS += [(EARLY, 1, "SIGTERM"), (EARLY, 2, "SIGTERM"), (EARLY, 3, "SIGTERM")]


@pytest.mark.parametrize(("code", "processes", "name"), BY_SIGNALS, ids=range(6))
def test_signals_reach_every_rank(tmp_path, code, processes, name):
    child = start(tmp_path, code, processes)
    pids = ready_pids(tmp_path, processes)
    if code == EARLY and processes != 2:
        # A signal to the whole process group reaches a rank first.
        os.kill(pids[0], signal.SIGTERM)
        time.sleep(0.05)
    child.send_signal(signal.Signals[name])
    began = time.monotonic()
    early = "ddpm: stopped by SIGTERM before it began; the same command begins again\n"
    assert ended(child) == (75, "", early if code == EARLY else "")
    assert time.monotonic() - began < 5
    assert len([*tmp_path.glob("*.stopped")]) == (processes if code == STOPS else 0)


@only_linux
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


@only_linux
def test_ranks_die_with_their_launcher(tmp_path):
    child = start(tmp_path, f"{DEAF}; ready(); time.sleep(60)", 3)
    ranks = ready_pids(tmp_path, 3)
    os.kill(ranks[1], signal.SIGSTOP)
    child.kill()
    child.wait()
    eventually(lambda: all(map(is_gone, ranks)), seconds=5)
    # One whose launcher is gone already does not begin; and one that waits for the launcher's checks may see the end
    # of its pipe before it is killed.
    ours, theirs = os.pipe()
    os.close(theirs)
    gone = {"DDPM_LAUNCHED": "1"}, "the launcher of this process is gone"
    closed = {"DDPM_LAUNCHED": str(os.getpid()), "DDPM_GATE": str(ours)}, r"\A\Z"
    program = "from job.processes.launcher import attach, await_go; attach(); await_go(); print('began')"
    for variables, said in (gone, closed):
        how = {"pass_fds": [ours], "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", program], env=environment(**variables), check=False, **how)
        assert (done.returncode, done.stdout) == (1, "") and re.search(said, done.stderr)
    os.close(ours)


def test_a_starting_process_is_light_and_silent():
    interrupted = "import os; os.kill(os.getpid(), 2); print(1); from job.processes.launcher import attach; attach()"
    launches = f"from job.processes.launcher import launch; launch([{sys.executable!r}, '-c', {interrupted!r}], 1)"
    imports = "import sys, job.cli.app, job.commands; assert not {'torch', 'accelerate'} & sys.modules.keys()"
    for program, said in ((launches, "ddpm: the process failed: killed by SIGINT\n"), (imports, "")):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.stderr == said


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
    said = "to the rank\n", "as it isddpm: the process failed: killed by SIGABRT\n"
    assert child.communicate("to the rank\n", timeout=30) == said
    assert child.returncode == 134


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
    assert (child.stderr.read(), child.stdout.read()) == ("last without an end\n", "out of 0\n")
    assert child.wait(30) == 0


def test_rank_0_keeps_the_terminal(tmp_path):
    """What others print takes the place of the bar's line instead of being written into it."""
    ours, theirs = pty.openpty()
    code = """
    assert sys.stderr.isatty() == (rank == 0)
    if rank == 0:
        print("a bar", end="", file=sys.stderr, flush=True)
        ready()
    while not Path("0.ready").exists():
        time.sleep(0.01)
    if rank == 1:
        print("a note", file=sys.stderr)
    """
    child = start(tmp_path, code, stderr=theirs, env=environment(TERM="xterm"))
    assert child.wait(30) == 0
    assert os.read(ours, 4096) == b"a bar\r\x1b[2K[rank 1] a note\r\n"
    os.close(ours)
    os.close(theirs)


def test_a_closed_reader_ends_nothing(tmp_path):
    child = start(tmp_path, "print('x' * 100_000, file=sys.stderr); ready()")
    child.stderr.close()
    assert child.wait(30) == 0
    ready_pids(tmp_path)


NODE_1 = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def is_waiting(pid: int) -> bool:
    """Whether a rank has loaded PyTorch, and now does nothing."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text() and not psutil.Process(pid).cpu_percent(0.2)


WAITING = [
    # A single rank has the launcher's streams.
    (1, ("--set", "x=1"), {}, 78, "ddpm: --set: unknown key 'x'"),
    (2, (), NODE_1, 75, "ddpm: stopped by SIGTERM; the same command begins again\n"),
]


@pytest.mark.parametrize(("processes", "more", "node", "code", "said"), WAITING)
@only_linux
def test_ranks_wait_for_the_checks(tiles, tmp_path, processes, more, node, code, said):
    """They have imported everything while the launcher still checks the command: it alone speaks and writes."""
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    before = {path for path in bucket.rglob("*") if path.is_file()}
    words = ("--dataset", "tiles", "--bucket", bucket, "--epochs", 1, "--stop-after", "1h", *settings(), *more)
    child = started("train", *words, "--processes", processes, **{JOB: "train-tiles"}, **node)
    ranks = eventually(lambda: len(found := children(child.pid)) == processes and found)
    # Checks may take long.
    child.send_signal(signal.SIGSTOP)
    eventually(lambda: all(map(is_waiting, ranks)))
    for rank in ranks:
        inherited = psutil.Process(rank).environ()
        assert 3500 < float(inherited[STOP_AT]) - time.clock_gettime(time.CLOCK_BOOTTIME) < 3600
        # A rank is not a job: it would write its own starts and end beside the launcher's.
        assert JOB not in inherited
    if code == 75:
        child.terminate()
    child.send_signal(signal.SIGCONT)

    found, out, _ = ended(child)
    assert (found, out.count("\n")) == (code, 1) and out.startswith(said), out
    assert all(map(is_gone, ranks))
    written = {str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file() and path not in before}
    assert written <= {"jobs/train-tiles/1-of-2.json" if node else "jobs/train-tiles/0-of-1.json"}
    if code == 78:
        outcome = read_outcome("train-tiles", str(bucket))
        assert (outcome.exit_code, len(outcome.starts)) == (code, 1)


IN_TRAIN = (
    r"stacks of rank 0 of 2:\n(.*\n)+.* in train\n(.*\n)+ddpm: stacks of rank 1 of 2:\n(.*\n)*\[rank 1\] .* in train\n"
)
ENDED_BY = [
    (signal.SIGKILL, 137, r"ddpm: rank 1 of 2 failed first: killed by SIGKILL.*\n\Z"),
    (signal.SIGSTOP, 71, r"ddpm: rank 1 of 2 hung: no sign of life for 2\d s \(stopped\); --hang-after"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "said"), ENDED_BY)
def test_a_killed_or_hung_rank_ends_its_run(place, number, code, said):
    # Starting takes seconds in which nobody beats.
    child = place.begun(f"ends-{code}", "--processes", 2, "--hang-after", 20)
    ranks = sorted(children(child.pid))
    os.kill(ranks[1], number)
    found, out, _ = ended(child, 60)
    assert (found, "Traceback" in out) == (code, False)
    assert re.search(said, out)
    assert bool(re.search(IN_TRAIN, out)) == (number == signal.SIGSTOP)
    assert out.count("went away") == (number == signal.SIGKILL)
    assert all(map(is_gone, ranks))
