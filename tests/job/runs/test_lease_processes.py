"""Several processes want one run: one has it, and is known to be alive or dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from job.exits import Exit, LostRunError
from job.processes.process_identity import ProcessIdentity
from job.runs import lease as lease_module
from job.runs.lease import LEASE_KEY
from job.store import Store, open_store
from tests.job.leases import QUICK, Notes, record_in, taken

CHILD = """
import json, sys, time
from job.runs import lease
from job.exits import JobError
from job.stop import NEVER
from job.store import open_store

def say(**words):
    print(json.dumps(words), flush=True)

uri, floor, wait_seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
for name, value in json.loads(sys.argv[4]).items():
    setattr(lease, name, value)
run = open_store(uri)
say(ready=True)
sys.stdin.readline()
try:
    mine = lease.Lease.take(run, floor, wait_seconds, NEVER, lambda note: print(note, file=sys.stderr))
    say(fence=mine.fence, at=time.monotonic())
    for line in sys.stdin:
        match line.split():
            case ["hold", seconds]:
                time.sleep(float(seconds))
                say(at=time.monotonic())
            case ["lost"]:
                deadline = time.monotonic() + 20
                while not mine.lost and time.monotonic() < deadline:
                    time.sleep(0.02)
                mine.check_lost()
            case ["confirm"]:
                mine.confirm()
                say(confirmed=True)
            case ["close"]:
                mine.close()
                break
except JobError as error:
    say(exit_code=int(error.exit_code), message=str(error), at=time.monotonic())
"""


class Child:
    """Another process that wants the run; it begins to take it when it is told to go."""

    def __init__(self, run: Store, floor: int = 0, wait_seconds: float = 0, **constants: float) -> None:
        arguments = [run.uri, str(floor), str(wait_seconds), json.dumps(constants)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, words: str) -> dict[str, Any]:
        self.tell(words)
        return self.answer()

    def get_ready(self) -> None:
        assert self.answer() == {"ready": True}

    def took(self) -> int:
        self.get_ready()
        answer = self.ask("go")
        assert "fence" in answer, answer
        return answer["fence"]


Start = Callable[..., Child]


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path)).sub("runs/one")


@pytest.fixture
def any_run(bucket_uri: str) -> Store:
    """One in each kind of bucket."""
    return open_store(bucket_uri).sub("runs/one")


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[Child] = []

    def started(*arguments: Any, **constants: float) -> Child:
        children.append(Child(*arguments, **constants))
        return children[-1]

    yield started
    for child in children:
        child.process.kill()
        child.process.communicate()


def test_after_kill_9_on_the_same_machine_nobody_waits(run: Store, start: Start):
    holder = start(run)
    assert holder.took() == 1
    holder.process.kill()
    holder.process.wait()
    notes: Notes = []
    began = time.monotonic()
    lease = taken(run, notes=notes)
    seconds = time.monotonic() - began
    print(f"took the run of a killed process over in {seconds:.3f} s")
    assert seconds < lease_module.RENEW_SECONDS
    assert lease.fence == 2
    assert [f"process {holder.pid}" in notes[0], notes[0].endswith("is dead"), len(notes)] == [True, True, 1]
    lease.close()


def test_who_finds_a_living_holder_ends_with_76_and_says_who_it_is(run: Store, start: Start):
    holder = start(run, **QUICK)
    assert holder.took() == 1
    since = record_in(run)["since"]
    with pytest.raises(LostRunError) as caught:
        taken(run)
    assert caught.value.exit_code == Exit.LOST_RUN == 76
    host = ProcessIdentity.of_this_process().host
    assert f"{run.uri} is held by process {holder.pid} on {host!r} since {since} (fence 1)" in str(caught.value)
    assert "--wait" in str(caught.value)
    began = time.monotonic()
    with pytest.raises(LostRunError, match="is alive"):
        taken(run, wait_seconds=0.8)
    assert 0.8 <= time.monotonic() - began < 10
    assert record_in(run)["process"]["pid"] == holder.pid


def test_who_waits_takes_the_run_when_its_holder_gives_it_back(run: Store, start: Start):
    holder = start(run, **QUICK)
    assert holder.took() == 1
    threading.Timer(1.0, holder.tell, ["close"]).start()
    notes: Notes = []
    began = time.monotonic()
    lease = taken(run, wait_seconds=60, notes=notes)
    assert 1.0 <= time.monotonic() - began < 20
    assert lease.fence == 2
    assert [f"held by process {holder.pid}" in notes[0], "given back" in notes[-1], len(notes)] == [True, True, 2]
    lease.close()


# moto looks whether there is an object and writes it without a lock in between: there two may win.
@pytest.mark.parametrize("bucket_uri", ["local", "gs", "s3-seaweedfs"], indirect=True)
def test_of_many_that_come_at_once_one_wins(any_run: Store, start: Start):
    children = [start(any_run, floor=3, **QUICK) for _ in range(4)]
    for child in children:
        child.get_ready()
    for child in children:
        child.tell("go")
    answers = [child.answer() for child in children]
    assert [answer["fence"] for answer in answers if "fence" in answer] == [4]
    assert [answer["exit_code"] for answer in answers if "exit_code" in answer] == [76] * 3
    winner = next(child for child, answer in zip(children, answers, strict=True) if "fence" in answer)
    assert record_in(any_run)["process"]["pid"] == winner.pid
    assert winner.ask("confirm") == {"confirmed": True}


def test_many_that_wait_have_the_run_of_a_dead_one_after_the_other(run: Store, start: Start):
    first = start(run)
    fences = [first.took()]
    first.process.kill()
    children = [start(run, wait_seconds=120, **QUICK) for _ in range(3)]
    holding: list[tuple[float, float, int]] = []

    def hold(child: Child) -> None:
        child.get_ready()
        answer = child.ask("go")
        until = child.ask("hold 0.1")
        holding.append((answer["at"], until["at"], answer["fence"]))
        child.tell("close")

    threads = [threading.Thread(target=hold, args=[child]) for child in children]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holding.sort()
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(holding)), holding
    assert fences + [fence for _, _, fence in holding] == [1, 2, 3, 4]


def test_a_thread_that_wakes_with_its_process_tells_the_training_loop(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lease_module, "EXPIRE_SECONDS", 0.6)
    run = open_store(str(tmp_path / "run"))
    holder = start(run, **QUICK | {"RENEW_SECONDS": 2.0})
    assert holder.took() == 1
    # Stopped between two renewals: a process that is stopped inside one keeps the lock of its folder.
    time.sleep(0.5)
    holder.process.send_signal(signal.SIGSTOP)
    lease = taken(run)
    holder.tell("lost")
    holder.process.send_signal(signal.SIGCONT)
    answer = holder.answer()
    assert (answer["exit_code"], lease.fence) == (76, 2)
    assert "(fence 2)" in answer["message"]
    lease.confirm()
    lease.close()


@pytest.mark.slow
def test_a_holder_that_sleeps_beyond_expiry_is_replaced_and_wakes_to_find_it_out(gcs_bucket: str, start: Start):
    run = open_store(gcs_bucket).sub("runs/one")
    holder = start(run)
    assert holder.took() == 1
    began = time.monotonic()
    with pytest.raises(LostRunError, match=f"process {holder.pid} "):
        taken(run)
    refused_seconds = time.monotonic() - began
    holder.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    lease = taken(run)
    expired_seconds = time.monotonic() - began
    there = run.read(LEASE_KEY)
    holder.tell("confirm")
    os.kill(holder.pid, signal.SIGCONT)
    answer = holder.answer()
    print(f"76 after {refused_seconds:.1f} s; taken over {expired_seconds:.1f} s after SIGSTOP")
    assert refused_seconds < 15
    assert 20 <= expired_seconds < 30
    assert lease.fence == 2
    assert answer["exit_code"] == 76
    assert f"taken over by process {os.getpid()} " in answer["message"]
    assert run.read(LEASE_KEY) == there, "the woken one wrote something"
    lease.confirm()
    lease.close()
