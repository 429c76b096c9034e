"""One writer per run: fences, silence, damage, a bucket that is away; who is alive or dead; two attempts at a run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from job.coordination import lease as lease_module
from job.coordination.lease import EXPIRE_SECONDS, LEASE_KEY, ProcessIdentity
from job.exits import BadDataError, BucketAwayError, Exit, LostRunError
from job.runs.checkpoints import list_checkpoints
from job.runs.records import read_status
from job.stop import NEVER
from job.store import ConflictError, open_store
from job.store.local import LocalStore
from tests.conftest import only_linux
from tests.job.command_line import ddpm, raised, settings, started, succeeded
from tests.job.hooked import hooked
from tests.job.launching import QUICK, by_somebody_elsewhere, children, eventually, lasting, record_in, taken


@pytest.fixture
def quick_expiry(quick, monkeypatch):
    monkeypatch.setattr(lease_module, "EXPIRE_SECONDS", 0.6)
    return 0.6


class BadDay(LocalStore):
    """A folder that can be away, and lose an answer after it has written."""

    away = lose_next = False

    def within(self, seconds, stop=NEVER):
        return self

    def _attempt(self, work, key, *args):
        if self.away:
            raise BucketAwayError("the bucket is away")
        answer = super()._attempt(work, key, *args)
        if self.lose_next and work == self._written:
            self.lose_next = False
            raise BucketAwayError("the answer was lost")
        return answer


@pytest.fixture
def bad_day(tmp_path):
    (tmp_path / "run").mkdir()
    return BadDay(tmp_path / "run")


def test_fences_only_grow(any_run):
    fences, notes = [], []
    began = time.monotonic()
    for floor in (6, 0, 10, 3, 0):
        lease = taken(any_run, floor, notes=notes)
        record = record_in(any_run)
        assert record["process"] == ProcessIdentity.of_this_process().model_dump()
        assert (record["fence"], record["released"]) == (lease.fence, False)
        fences.append(lease.fence)
        lease.close()
        assert (record_in(any_run)["fence"], record_in(any_run)["released"]) == (lease.fence, True)
    assert (fences, notes) == ([7, 8, 11, 12, 13], [])
    assert time.monotonic() - began < EXPIRE_SECONDS / 2


def test_the_last_fence_is_refused(new_run):
    by_somebody_elsewhere(new_run, fence=lease_module.MAX_FENCE)
    new_run.put(LEASE_KEY, lease_module.load_lease(new_run).model_copy(update={"released": True}).to_json())
    raised(BadDataError, f"{new_run.uri_of(LEASE_KEY)} has fence 999999, which no run reaches", taken, new_run)
    new_run.delete(LEASE_KEY)
    raised(BadDataError, r"an attempt or a checkpoint of .* has fence 999999", taken, new_run, lease_module.MAX_FENCE)
    Path(new_run.uri_of(LEASE_KEY)).mkdir(parents=True)
    raised(BadDataError, "where an object belongs", taken, new_run)


def test_a_silent_lease_is_replaced(new_run, quick_expiry):
    """Whatever it says about the time, and whether or not anybody can read it."""
    intact, elsewhere = by_somebody_elsewhere(new_run, fence=4), "process 77 on 'far-away'"
    contents = [
        (by_somebody_elsewhere(new_run, fence=8, since="1999-12-31T23:59:59Z"), elsewhere),
        (by_somebody_elsewhere(new_run, fence=9, since="2031-01-01T00:00:00Z"), elsewhere),
        (b"", "damaged"),
        (intact.replace(b'"fence": 4', b'"fence": 5'), "damaged"),
        (b'{"fence": 99999999, "released": true}', "damaged"),
    ]
    for fence, (content, said) in enumerate(contents, 9):
        new_run.put(LEASE_KEY, content)
        with lasting(quick_expiry):
            lease = taken(new_run, floor=fence - 1, notes=(notes := []))
        assert lease.fence == record_in(new_run)["fence"] == fence
        assert [said in note and new_run.uri in note for note in notes] == [True, True]
        assert "silent" in notes[1]
        lease.close()
    # A winner that dies is replaced as well.
    by_somebody_elsewhere(new_run, fence=24, since="2031-01-01T00:00:00Z")
    threading.Timer(0.3, by_somebody_elsewhere, [new_run, 25, "2031-01-01T00:00:01Z"]).start()
    with lasting(0.3 + quick_expiry):
        lease = taken(new_run)
    assert lease.fence == 26
    lease.close()


def test_a_late_silence_is_noticed(bad_day, quick, monkeypatch):
    monkeypatch.setattr(lease_module, "EXPIRE_SECONDS", 2.0)
    holder = taken(bad_day)
    threading.Timer(0.3, setattr, [bad_day, "away", True]).start()
    lease = taken(open_store(bad_day.uri), wait_seconds=1.5)
    assert lease.fence == 2
    bad_day.away = False
    eventually(lambda: holder.lost)
    lease.close()


def test_a_holder_mends_its_lease(new_run, quick):
    lease = taken(new_run, floor=2, notes=(notes := []))
    new_run.put(LEASE_KEY, b"garbage")
    raised(LostRunError, "is alive", taken, new_run)
    assert record_in(new_run)["fence"] == 3
    new_run.delete(LEASE_KEY)
    eventually(lambda: new_run.exists(LEASE_KEY))
    lease.confirm()
    assert (record_in(new_run)["fence"], lease.lost) == (3, "")
    assert [any(word in note for note in notes) for word in ("damaged", "deleted")] == [True, True]
    lease.close()


def test_a_lost_run_is_reported(new_run, monkeypatch):
    lease = taken(new_run)
    lease.check_lost()
    foreign = by_somebody_elsewhere(new_run, fence=9)
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.0)
    for ask in (lease.confirm, lease.confirm, lease.check_lost):
        raised(LostRunError, r"taken over by process 77 on 'far-away' since .* \(fence 9\)", ask)
    assert lease.lost
    lease.close()
    assert new_run.read(LEASE_KEY).data == foreign


def test_a_holder_survives_an_outage(bad_day, quick):
    lease = taken(bad_day, notes=(notes := []))
    bad_day.away = True
    eventually(lambda: notes)
    time.sleep(3 * lease_module.RENEW_SECONDS)
    raised(BucketAwayError, ".", lease.confirm)
    lease.check_lost()
    assert (lease.lost, [("could not renew" in note) for note in notes]) == ("", [True])
    bad_day.away = False
    renewal = record_in(bad_day)["renewal"]
    lease.confirm()
    eventually(lambda: record_in(bad_day)["renewal"] > renewal + 1)
    assert record_in(bad_day)["fence"] == lease.fence
    lease.close()


def test_a_lost_answer_loses_no_lease(bad_day, monkeypatch):
    lease = taken(bad_day)
    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "RENEW_SECONDS", 0.0)
        for _ in range(3):
            bad_day.lose_next = True
            with suppress(BucketAwayError):
                lease.confirm()
            renewal = record_in(bad_day)["renewal"]
            lease.confirm()
            assert record_in(bad_day)["renewal"] > renewal
        assert not lease.lost
        # Endless conflicts confirm nothing.
        patch.setattr(BadDay, "replace", Mock(side_effect=ConflictError("changed")))
        raised(BucketAwayError, "changes faster", lease.confirm)
    lease.confirm()
    lease.close()


def test_no_lease_changes_in_an_outage(bad_day, quick, monkeypatch):
    monkeypatch.setattr(lease_module, "CLOSE_SECONDS", 0.3)
    silent, answer = taken(bad_day, notes=(notes := [])), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(BadDay, "replace", lambda *_: answer.wait(60) and "never")
        with lasting(0.3, at_most=10):
            silent.close()
    assert ["could not be released in time" in note for note in notes] == [True]
    answer.set()
    bad_day.delete(LEASE_KEY)
    lease = taken(bad_day, notes=(notes := []))
    bad_day.away = True
    lease.close()
    assert "could not release" in notes[-1] and "the bucket is away" in notes[-1]
    raised(BucketAwayError, ".", taken, bad_day)


def test_an_outage_is_no_silence(bad_day, quick_expiry, monkeypatch):
    """Who watches through an outage gives the holder its time anew: it could not renew either."""
    by_somebody_elsewhere(bad_day)
    real, looks = BadDay.read, []

    def read_once_slowly(store, key):
        if len(looks) == 2:
            time.sleep(2 * quick_expiry)
        looks.append(time.monotonic())
        return real(store, key)

    monkeypatch.setattr(BadDay, "read", read_once_slowly)
    lease = taken(bad_day)
    assert time.monotonic() - looks[2] >= quick_expiry
    lease.close()


# --- several processes

CHILD = """
import json, sys
from job.coordination import lease
from job.exits import JobError
from job.stop import NEVER
from job.store import open_store

def say(**words):
    print(json.dumps(words), flush=True)

uri, floor, constants = sys.argv[1:]
say(**lease.ProcessIdentity.of_this_process().model_dump())
sys.stdin.readline()
vars(lease).update(json.loads(constants))
try:
    mine = lease.Lease.take(open_store(uri), int(floor), 0, NEVER, lambda note: None)
    say(fence=mine.fence)
    sys.stdin.readline()
    mine.confirm()
    mine.close()
except JobError as error:
    say(exit_code=int(error.exit_code))
"""
UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork")


class Child:
    """Another process that says who it is; told once, it begins to take a run, and told again, it gives it back."""

    def __init__(self, uri="", floor=0, wrapper=(), **constants):
        words = [*wrapper, sys.executable, "-c", CHILD, uri, str(floor), json.dumps(constants)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(words, text=True, start_new_session=True, **pipes)
        self.pid = self.process.pid

    def tell(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def identity(self):
        return ProcessIdentity.model_validate(self.answer())

    def took(self):
        self.identity()
        self.tell()
        return self.answer()["fence"]

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start():
    begun = []
    yield lambda *words, **more: begun.append(Child(*words, **more)) or begun[-1]
    for child in begun:
        child.kill()
        child.process.communicate()


@only_linux
def test_killed_holders_are_replaced_at_once(new_run, start):
    holder = start(new_run.uri)
    assert holder.took() == 1
    holder.kill()
    with lasting(at_most=lease_module.RENEW_SECONDS):
        lease = taken(new_run, notes=(notes := []))
    assert lease.fence == 2
    assert [f"process {holder.pid}" in notes[0], notes[0].endswith("is dead"), len(notes)] == [True, True, 1]
    lease.close()


def test_a_living_holder_is_named(new_run, start):
    holder = start(new_run.uri, **QUICK)
    assert holder.took() == 1
    since, host = record_in(new_run)["since"], ProcessIdentity.of_this_process().host
    with pytest.raises(LostRunError) as caught:
        taken(new_run)
    assert caught.value.exit_code == Exit.LOST_RUN == 76
    assert f"{new_run.uri} is held by process {holder.pid} on {host!r} since {since} (fence 1)" in str(caught.value)
    assert "--wait" in str(caught.value)
    with lasting(0.8, at_most=10):
        raised(LostRunError, "is alive", taken, new_run, wait_seconds=0.8)
    assert record_in(new_run)["process"]["pid"] == holder.pid
    # Who waits takes the run when its holder gives it back.
    threading.Timer(1.0, holder.tell).start()
    with lasting(1.0, at_most=20):
        lease = taken(new_run, wait_seconds=60, notes=(notes := []))
    assert lease.fence == 2
    assert [f"held by process {holder.pid}" in notes[0], "released" in notes[-1], len(notes)] == [True, True, 2]
    lease.close()


# moto looks whether there is an object and writes it without a lock in between: there two may win.
@pytest.mark.parametrize("bucket_uri", ["local", "gs", "s3"], indirect=True)
def test_one_of_many_processes_wins(any_run, start):
    *racing, killed = [start(any_run.uri, 3, **QUICK) for _ in range(5)]
    # One after another that was killed, so that all find the same lease to replace.
    assert killed.took() == 4
    killed.kill()
    for child in racing:
        child.identity()
    for child in racing:
        child.tell()
    answers = [child.answer() for child in racing]
    assert sorted(answers, key=str) == [{"exit_code": 76}] * 3 + [{"fence": 5}]
    winner = racing[answers.index({"fence": 5})]
    assert record_in(any_run)["process"]["pid"] == winner.pid
    winner.tell()
    assert winner.process.wait(60) == 0
    assert record_in(any_run)["released"]


def ticks_now():
    return time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")


@only_linux
def test_only_a_killed_process_is_dead(start, monkeypatch):
    me = ProcessIdentity.of_this_process()
    assert (me.pid, len(me.boot_id), me.certainly_dead()) == (os.getpid(), 36, False)
    assert me.pid_namespace == str(Path("/proc/self/ns/pid").readlink())
    assert me == ProcessIdentity.of_this_process()
    before = ticks_now()
    child = start()
    identity = child.identity()
    assert before - 1 <= identity.start_ticks <= ticks_now() + 1
    assert identity.pid == child.pid
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", Mock(side_effect=PermissionError))
        assert not identity.certainly_dead()
    for number, state, is_dead in ((signal.SIGSTOP, "stopped", False), (signal.SIGKILL, "zombie", True)):
        child.process.send_signal(number)
        eventually(lambda state=state: psutil.Process(child.pid).status() == state)
        # A process that nobody has reaped yet writes no more.
        assert identity.certainly_dead() == is_dead
        # A number that is used again belongs to another process.
        assert identity.model_copy(update={"start_ticks": identity.start_ticks + 1}).certainly_dead()
    child.kill()
    assert identity.certainly_dead()
    for elsewhere in ({"boot_id": "another"}, {"boot_id": ""}, {"pid_namespace": "pid:[1]"}, {"host": "another"}):
        assert not identity.model_copy(update=elsewhere).certainly_dead(), elsewhere


@only_linux
def test_another_namespace_counts_as_alive(start):
    me, there = ProcessIdentity.of_this_process(), [start(wrapper=UNSHARE + more) for more in (("--mount-proc",), ())]
    identity, other = [child.identity() for child in there]
    assert (identity.pid, identity.boot_id) == (1, me.boot_id)
    assert identity.pid_namespace not in ("", me.pid_namespace)
    # One that sees the numbers of another namespace does not trust them.
    assert (other.pid, other.boot_id, other.pid_namespace, other.start_ticks) == (1, "", "", 0)
    for child in there:
        child.kill()
    # The first process of this machine has the same number and another start, but is not meant.
    assert (identity.certainly_dead(), other.certainly_dead()) == (False, False)


FREEZE = """
import os, signal, threading, time
from pathlib import Path
from job.coordination.lease import Lease
commit, check_lost, committing = commit_manifest, Lease.check_lost, threading.RLock()

def commit_manifest(run, manifest):
    with committing:
        if Path(os.environ["FREEZE"]).exists():
            # Sent to the process, the signal would let this thread run on for as long as another takes to get it.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        commit(run, manifest)

def check_after_commit(lease):
    if threading.current_thread().name == "lease":
        time.sleep(1)
    with committing:
        check_lost(lease)

Lease.check_lost = check_after_commit
"""
"""A process that stops after it made sure that it holds the run, and before the commit: no check can help there.

When it wakes, its main thread or that of its lease might notice first, and end it before it could do harm: here they
are the slower ones.
"""


@pytest.mark.slow
def test_a_sleeping_holder_is_replaced(tiles, tmp_path):
    bucket, freeze = shutil.copytree(tiles, tmp_path / "bucket"), tmp_path / "freeze"
    run, hooks = open_store(str(bucket)).sub("runs/tiles"), hooked(tmp_path / "hooks", job__runs__writer=FREEZE)
    words = ("train", "--dataset", "tiles", "--bucket", bucket, *settings(), "--epochs")
    often, variables = ("--set", "checkpoint.every_minutes=0.01"), {"PYTHONPATH": hooks, "FREEZE": str(freeze)}
    sleeper = started(*words, 10_000, *often, **variables)
    eventually(lambda: list_checkpoints(run) or sleeper.poll() is not None, 120)
    (rank,) = children(sleeper.pid)

    # With --wait: it has the run when its holder fell silent.
    freeze.touch()
    eventually(lambda: psutil.Process(rank).status() == psutil.STATUS_STOPPED)
    silent = time.monotonic()
    epochs = max(list_checkpoints(run)).images_seen // 299 + 2
    waited = ddpm(*words, epochs, "--wait", 300)
    assert waited.returncode == 0, waited.stderr
    assert time.monotonic() - silent >= EXPIRE_SECONDS
    assert re.search(rf"took .*runs/tiles over: process {rank} .* was silent for 2\d s", waited.stderr)
    status, newest = read_status(run), max(list_checkpoints(run))
    assert (status.state, status.fence, newest.fence) == ("finished", 2, 2)

    # Woken in the middle of its commit, it writes the manifest it was about to write, and nothing more.
    before = {entry.key: run.read(entry.key).data for entry in run.list()}
    freeze.unlink()
    os.kill(rank, signal.SIGCONT)
    err, _ = sleeper.communicate(timeout=60)
    assert (sleeper.returncode, "Traceback" in err) == (76, False), err
    assert re.search(r"ddpm: .*runs/tiles was taken over by process \d+ .* \(fence 2\)", err)
    after = {entry.key: run.read(entry.key).data for entry in run.list()}
    (late,) = {key for key in before | after if before.get(key) != after.get(key)} - {"LATEST"}
    assert re.fullmatch(r"checkpoints/000001-\d{12}/MANIFEST.json", late)

    # Nobody takes what it wrote for the state of the run.
    assert max(list_checkpoints(run)) == newest
    assert "is finished already" in succeeded(ddpm(*words, epochs))
    succeeded(ddpm(*words, epochs + 1))
    last = max(list_checkpoints(run))
    assert last.fence == 3 and last.images_seen > newest.images_seen
