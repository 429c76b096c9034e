from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from job.coordination.lease import ProcessIdentity

CHILD = """
import sys
from job.coordination.lease import ProcessIdentity
print(ProcessIdentity.of_this_process().model_dump_json(), flush=True)
sys.stdin.read()
"""
Start = Callable[..., tuple[subprocess.Popen[str], ProcessIdentity]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python under a wrapping command, which tells who it is and lives until it is killed."""
    children = []

    def started(*wrapper: str) -> tuple[subprocess.Popen[str], ProcessIdentity]:
        command, pipes = [*wrapper, sys.executable, "-c", CHILD], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        child = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        children.append(child)
        return child, ProcessIdentity.model_validate_json(child.stdout.readline())

    yield started
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def ticks_now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")


def test_this_process_is_alive(start: Start):
    me = ProcessIdentity.of_this_process()
    assert (me.pid, len(me.boot_id)) == (os.getpid(), 36)
    assert me.pid_namespace == str(Path("/proc/self/ns/pid").readlink())
    assert me == ProcessIdentity.of_this_process()
    assert not me.certainly_dead()
    before = ticks_now()
    _, identity = start()
    assert before - 1 <= identity.start_ticks <= ticks_now() + 1


def test_only_a_killed_process_is_dead(start: Start, monkeypatch):
    child, identity = start()
    assert identity.pid == child.pid
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(PermissionError()))
        assert not identity.certainly_dead()
    for number, state, is_dead in ((signal.SIGSTOP, "stopped", False), (signal.SIGKILL, "zombie", True)):
        child.send_signal(number)
        while psutil.Process(child.pid).status() != state:
            time.sleep(0.01)
        # A process that nobody has reaped yet writes no more.
        assert identity.certainly_dead() == is_dead
        # A number that is used again belongs to another process.
        assert identity.model_copy(update={"start_ticks": identity.start_ticks + 1}).certainly_dead()
    child.wait()
    assert identity.certainly_dead()
    for elsewhere in ({"boot_id": "another"}, {"boot_id": ""}, {"pid_namespace": "pid:[1]"}, {"host": "another"}):
        assert not identity.model_copy(update=elsewhere).certainly_dead(), elsewhere


def test_another_namespace_counts_as_alive(start: Start):
    me, unshare = ProcessIdentity.of_this_process(), ("unshare", "--user", "--map-root-user", "--pid", "--fork")
    child, identity = start(*unshare, "--mount-proc")
    assert (identity.pid, identity.boot_id) == (1, me.boot_id)
    assert identity.pid_namespace not in ("", me.pid_namespace)
    # One that sees the numbers of another namespace does not trust them.
    other_child, other = start(*unshare)
    assert (other.pid, other.boot_id, other.pid_namespace, other.start_ticks) == (1, "", "", 0)
    for process in (child, other_child):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # The first process of this machine has the same number and another start, but is not meant.
    assert not identity.certainly_dead()
    assert not other.certainly_dead()
