"""Several processes want one run: one has it, and is known to be alive or dead."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from job.coordination import lease as lease_module
from job.coordination.lease import ProcessIdentity
from job.exits import Exit, LostRunError
from job.store import Store
from tests.job.launching import QUICK, Notes, record_in, taken

CHILD = """
import json, sys
from job.coordination import lease
from job.exits import JobError
from job.stop import NEVER
from job.store import open_store

def say(**words):
    print(json.dumps(words), flush=True)

uri, floor = sys.argv[1], int(sys.argv[2])
for name, value in json.loads(sys.argv[3]).items():
    setattr(lease, name, value)
run = open_store(uri)
say(ready=True)
sys.stdin.readline()
try:
    mine = lease.Lease.take(run, floor, 0, NEVER, lambda note: print(note, file=sys.stderr))
    say(fence=mine.fence)
    sys.stdin.readline()
    mine.confirm()
    mine.close()
except JobError as error:
    say(exit_code=int(error.exit_code))
"""


class Child:
    """Another process that wants the run; told once, it begins to take it, and told again, it gives it back."""

    def __init__(self, run: Store, floor: int = 0, **constants: float) -> None:
        arguments = [run.uri, str(floor), json.dumps(constants)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def tell(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        return json.loads(self.process.stdout.readline())

    def took(self) -> int:
        self.answer()
        self.tell()
        return self.answer()["fence"]


Start = Callable[..., Child]


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


def test_killed_holders_are_replaced_at_once(new_run: Store, start: Start):
    holder = start(new_run)
    assert holder.took() == 1
    holder.process.kill()
    holder.process.wait()
    notes: Notes = []
    began = time.monotonic()
    lease = taken(new_run, notes=notes)
    assert time.monotonic() - began < lease_module.RENEW_SECONDS
    assert lease.fence == 2
    assert [f"process {holder.pid}" in notes[0], notes[0].endswith("is dead"), len(notes)] == [True, True, 1]
    lease.close()


def test_a_living_holder_is_named(new_run: Store, start: Start):
    holder = start(new_run, **QUICK)
    assert holder.took() == 1
    since = record_in(new_run)["since"]
    with pytest.raises(LostRunError) as caught:
        taken(new_run)
    assert caught.value.exit_code == Exit.LOST_RUN == 76
    host = ProcessIdentity.of_this_process().host
    assert f"{new_run.uri} is held by process {holder.pid} on {host!r} since {since} (fence 1)" in str(caught.value)
    assert "--wait" in str(caught.value)
    began = time.monotonic()
    with pytest.raises(LostRunError, match="is alive"):
        taken(new_run, wait_seconds=0.8)
    assert 0.8 <= time.monotonic() - began < 10
    assert record_in(new_run)["process"]["pid"] == holder.pid
    # Who waits takes the run when its holder gives it back.
    threading.Timer(1.0, holder.tell).start()
    notes: Notes = []
    began = time.monotonic()
    lease = taken(new_run, wait_seconds=60, notes=notes)
    assert 1.0 <= time.monotonic() - began < 20
    assert lease.fence == 2
    assert [f"held by process {holder.pid}" in notes[0], "released" in notes[-1], len(notes)] == [True, True, 2]
    lease.close()


# moto looks whether there is an object and writes it without a lock in between: there two may win.
@pytest.mark.parametrize("bucket_uri", ["local", "gs", "s3"], indirect=True)
def test_one_of_many_processes_wins(any_run: Store, start: Start):
    children = [start(any_run, floor=3, **QUICK) for _ in range(5)]
    # One after another that was killed, so that all find the same lease to replace.
    assert children[4].took() == 4
    children[4].process.kill()
    children[4].process.wait()
    for child in children[:4]:
        child.answer()
    for child in children[:4]:
        child.tell()
    answers = [child.answer() for child in children[:4]]
    assert sorted(answers, key=str) == [{"exit_code": 76}] * 3 + [{"fence": 5}]
    winner = children[answers.index({"fence": 5})]
    assert record_in(any_run)["process"]["pid"] == winner.pid
    winner.tell()
    assert winner.process.wait(60) == 0
    assert record_in(any_run)["released"]
