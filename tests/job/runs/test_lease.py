"""What one process can see of a lease: fences, silence, damage, confirmations, and a bucket that is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from job.coordination import lease as lease_module
from job.coordination.lease import LEASE_KEY, ProcessIdentity
from job.exits import BadDataError, BucketAwayError, LostRunError
from job.stop import NEVER, Stop
from job.store import ConflictError, Store, open_store
from job.store.local import LocalStore
from tests.job.launching import Notes, by_somebody_elsewhere, eventually, record_in, taken


@pytest.fixture
def soon_expired(quick: None, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(lease_module, "EXPIRE_SECONDS", 0.6)
    return 0.6


class BadDay(LocalStore):
    """A folder that can be away, and lose an answer after it has written."""

    away = lose_next = False

    def within(self, seconds: float, stop: Stop = NEVER) -> BadDay:
        return self

    def _attempt(self, work: Callable[..., Any], key: str, *args: Any) -> Any:
        if self.away:
            raise BucketAwayError("the bucket is away")
        answer = super()._attempt(work, key, *args)
        if self.lose_next and work == self._written:
            self.lose_next = False
            raise BucketAwayError("the answer was lost")
        return answer


@pytest.fixture
def bad_day(tmp_path: Path) -> BadDay:
    (tmp_path / "run").mkdir()
    return BadDay(tmp_path / "run")


def test_fences_only_grow(any_run: Store):
    fences, notes = [], list[str]()
    began = time.monotonic()
    for floor in (6, 0, 10, 3, 0):
        lease = taken(any_run, floor, notes=notes)
        record = record_in(any_run)
        assert record["process"] == ProcessIdentity.of_this_process().model_dump()
        assert (record["fence"], record["released"]) == (lease.fence, False)
        fences.append(lease.fence)
        lease.close()
        assert (record_in(any_run)["fence"], record_in(any_run)["released"]) == (lease.fence, True)
    assert fences == [7, 8, 11, 12, 13]
    assert notes == []
    assert time.monotonic() - began < lease_module.EXPIRE_SECONDS / 2


def test_the_last_fence_is_refused(new_run: Store):
    by_somebody_elsewhere(new_run, fence=lease_module.MAX_FENCE)
    new_run.put(LEASE_KEY, lease_module.load_lease(new_run).model_copy(update={"released": True}).to_json())
    with pytest.raises(BadDataError, match=f"{new_run.uri_of(LEASE_KEY)} has fence 999999, which no run reaches"):
        taken(new_run)
    new_run.delete(LEASE_KEY)
    with pytest.raises(BadDataError, match=r"an attempt or a checkpoint of .* has fence 999999"):
        taken(new_run, lease_module.MAX_FENCE)
    Path(new_run.uri_of(LEASE_KEY)).mkdir(parents=True)
    with pytest.raises(BadDataError, match="where an object belongs"):
        taken(new_run)


def test_a_silent_lease_is_replaced(new_run: Store, soon_expired: float):
    """Whatever it says about the time, and whether or not anybody can read it."""
    intact = by_somebody_elsewhere(new_run, fence=4)
    for fence, (content, said) in enumerate(
        (
            (by_somebody_elsewhere(new_run, fence=8, since="1999-12-31T23:59:59Z"), "process 77 on 'far-away'"),
            (by_somebody_elsewhere(new_run, fence=9, since="2031-01-01T00:00:00Z"), "process 77 on 'far-away'"),
            (b"", "damaged"),
            (intact.replace(b'"fence": 4', b'"fence": 5'), "damaged"),
            (b'{"fence": 99999999, "released": true}', "damaged"),
        ),
        9,
    ):
        new_run.put(LEASE_KEY, content)
        notes: Notes = []
        began = time.monotonic()
        lease = taken(new_run, floor=fence - 1, notes=notes)
        assert time.monotonic() - began >= soon_expired
        assert lease.fence == record_in(new_run)["fence"] == fence
        assert [said in note and new_run.uri in note for note in notes] == [True, True]
        assert "silent" in notes[1]
        lease.close()


def test_a_winner_that_dies_is_replaced(new_run: Store, soon_expired: float):
    by_somebody_elsewhere(new_run, fence=4, since="2031-01-01T00:00:00Z")
    threading.Timer(0.3, by_somebody_elsewhere, [new_run, 5, "2031-01-01T00:00:01Z"]).start()
    began = time.monotonic()
    lease = taken(new_run)
    assert time.monotonic() - began >= 0.3 + soon_expired
    assert lease.fence == 6
    lease.close()


def test_a_late_silence_is_noticed(bad_day: BadDay, quick: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease_module, "EXPIRE_SECONDS", 2.0)
    holder = taken(bad_day)
    run = open_store(bad_day.uri)
    threading.Timer(0.3, setattr, [bad_day, "away", True]).start()
    lease = taken(run, wait_seconds=1.5)
    assert lease.fence == 2
    bad_day.away = False
    eventually(lambda: holder.lost)
    lease.close()


def test_a_holder_mends_its_lease(new_run: Store, quick: None):
    notes: Notes = []
    lease = taken(new_run, floor=2, notes=notes)
    new_run.put(LEASE_KEY, b"garbage")
    with pytest.raises(LostRunError, match="is alive"):
        taken(new_run)
    assert record_in(new_run)["fence"] == 3
    new_run.delete(LEASE_KEY)
    eventually(lambda: new_run.exists(LEASE_KEY))
    lease.confirm()
    assert (record_in(new_run)["fence"], lease.lost) == (3, "")
    assert [any(word in note for note in notes) for word in ("damaged", "deleted")] == [True, True]
    lease.close()


def test_a_lost_run_is_reported(new_run: Store, monkeypatch: pytest.MonkeyPatch):
    lease = taken(new_run)
    lease.check_lost()
    foreign = by_somebody_elsewhere(new_run, fence=9)
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.0)
    for ask in (lease.confirm, lease.confirm, lease.check_lost):
        with pytest.raises(LostRunError, match=r"taken over by process 77 on 'far-away' since .* \(fence 9\)"):
            ask()
    assert lease.lost
    lease.close()
    assert new_run.read(LEASE_KEY).data == foreign


def test_a_holder_survives_an_outage(bad_day: BadDay, quick: None):
    notes: Notes = []
    lease = taken(bad_day, notes=notes)
    bad_day.away = True
    eventually(lambda: notes)
    time.sleep(3 * lease_module.RENEW_SECONDS)
    with pytest.raises(BucketAwayError):
        lease.confirm()
    lease.check_lost()
    assert not lease.lost
    assert [("could not renew" in note) for note in notes] == [True]
    bad_day.away = False
    renewal = record_in(bad_day)["renewal"]
    lease.confirm()
    eventually(lambda: record_in(bad_day)["renewal"] > renewal + 1)
    assert record_in(bad_day)["fence"] == lease.fence
    lease.close()


def test_a_lost_answer_loses_no_lease(bad_day: BadDay, monkeypatch: pytest.MonkeyPatch):
    lease = taken(bad_day)
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.0)
    for _ in range(3):
        bad_day.lose_next = True
        with suppress(BucketAwayError):
            lease.confirm()
        renewal = record_in(bad_day)["renewal"]
        lease.confirm()
        assert record_in(bad_day)["renewal"] > renewal
    assert not lease.lost
    monkeypatch.undo()
    lease.close()


def test_no_lease_changes_in_an_outage(bad_day: BadDay, quick: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease_module, "CLOSE_SECONDS", 0.3)
    silent, notes, answer = taken(bad_day, notes=(notes := [])), notes, threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(BadDay, "replace", lambda *_: answer.wait(60) and "never")
        began = time.monotonic()
        silent.close()
        assert 0.3 <= time.monotonic() - began < 10
    assert ["could not be released in time" in note for note in notes] == [True]
    answer.set()
    bad_day.delete(LEASE_KEY)
    lease = taken(bad_day, notes=(notes := []))
    bad_day.away = True
    lease.close()
    assert "could not release" in notes[-1]
    assert "the bucket is away" in notes[-1]
    with pytest.raises(BucketAwayError):
        taken(bad_day)


def test_an_outage_is_no_silence(bad_day: BadDay, soon_expired: float, monkeypatch: pytest.MonkeyPatch):
    """Who watches through an outage gives the holder its time anew: it could not renew either."""
    by_somebody_elsewhere(bad_day)
    real = BadDay.read

    def read_once_slowly(store: BadDay, key: str) -> Any:
        if len(looks) == 2:
            time.sleep(2 * soon_expired)
        looks.append(time.monotonic())
        return real(store, key)

    looks: list[float] = []
    monkeypatch.setattr(BadDay, "read", read_once_slowly)
    lease = taken(bad_day)
    assert time.monotonic() - looks[2] >= soon_expired
    lease.close()


def test_endless_conflicts_confirm_nothing(bad_day: BadDay, monkeypatch: pytest.MonkeyPatch):
    lease = taken(bad_day)
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.0)
    monkeypatch.setattr(BadDay, "replace", Mock(side_effect=ConflictError("changed")))
    with pytest.raises(BucketAwayError, match="changes faster"):
        lease.confirm()
    monkeypatch.undo()
    lease.confirm()
    lease.close()
