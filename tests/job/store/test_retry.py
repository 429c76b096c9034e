"""A store that waits for its bucket: a real server behind a proxy that goes away, keeps silent and comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.exits import BucketAwayError, StoppedError
from job.stop import NEVER, Stop
from job.store import ObjectMissingError, Retry, Store, open_store
from job.store.base import Entry
from job.store.retry import UnknownHostError
from tests.faulty_proxy import Fault, FaultyProxy
from tests.job.conftest import point_at

Notes = list[str]
CONTENT = bytes(range(256)) * 40_000
"""More than a stream reads at once."""


@pytest.fixture
def notes() -> Notes:
    return []


Opened = Callable[..., Store]
of_one_kind = pytest.mark.parametrize("remote_bucket", ["gs"], indirect=True)


@pytest.fixture
def opened(proxy: FaultyProxy, remote_bucket: str, notes: Notes) -> Opened:
    """Opens the bucket."""

    def opened(limit_seconds: float = 60, stop: Stop = NEVER) -> Store:
        return open_store(remote_bucket, Retry(limit_seconds, stop, notes.append))

    return opened


@of_one_kind
def test_every_operation_waits(opened: Opened, proxy: FaultyProxy, notes: Notes, tmp_path: Path) -> None:
    """That it does so is told once."""
    store = opened()
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    version = store.create("run/replaced", b"1")
    store.put("run/deleted", b"1")
    store.upload(file, "run/there")
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: store.sub("run").read("replaced").version,
        "create": lambda: store.create("new/created", b"1"),
        "put": lambda: store.put("new/put", b"1"),
        "upload": lambda: store.upload(file, "new/uploaded"),
        "download": lambda: store.download("run/there", tmp_path / "downloaded"),
        "open": lambda: store.open("run/there").read() == CONTENT,
        "list": lambda: Entry("run/there", len(CONTENT)) in [*store.list("run")],
        "folders": lambda: "run" in store.folders(),
        "delete": lambda: store.delete("run/deleted"),
        "exists": lambda: store.exists("run/there"),
    }
    with ThreadPoolExecutor(len(calls)) as pool:
        with proxy.away():
            futures = {name: pool.submit(call) for name, call in calls.items()}
            time.sleep(1.5)
            assert not any(future.done() for future in futures.values())
        results = {name: future.result(30) for name, future in futures.items()}
    assert results["read"] == version
    assert results["open"] and results["list"] and results["folders"] and results["exists"]
    there = [entry.key for entry in store.list()]
    assert there == ["new/created", "new/put", "new/uploaded", "run/replaced", "run/there"]
    assert (tmp_path / "downloaded").read_bytes() == CONTENT
    with proxy.away():
        replaced = ThreadPoolExecutor(1).submit(store.replace, "run/replaced", b"2", version)
        time.sleep(1.5)
    assert replaced.result(30) == store.read("run/replaced").version
    assert ["trying again" in note for note in notes] == [True, False, True, False]
    assert "Connection refused" in notes[0] and notes[0].endswith("trying again for up to 60 s")
    assert notes[1].startswith("the bucket is back after ")


@of_one_kind
def test_limit_counts_from_first_failure(opened: Opened, proxy: FaultyProxy, notes: Notes) -> None:
    store = opened(limit_seconds=1)
    for _ in range(2):
        began = time.monotonic()
        with proxy.away(), pytest.raises(BucketAwayError, match=r"Connection refused.*\(tried for \d+ s in all\)"):
            store.read("key")
        assert time.monotonic() - began > 1
        with pytest.raises(ObjectMissingError):
            store.read("key")
    with proxy.away(), pytest.raises(BucketAwayError, match="tried for 0 s"):
        opened(limit_seconds=0).read("key")
    # A transfer that was under way for longer than the limit and then breaks off has only begun to wait.
    endings = [BucketAwayError("it broke off"), None]

    def transfer() -> None:
        time.sleep(0.6)
        if error := endings.pop(0):
            raise error

    Retry(0.5)(transfer)
    assert endings == []


@of_one_kind
def test_known_host_is_waited_for(monkeypatch: pytest.MonkeyPatch, remote_bucket: str) -> None:
    def unknown() -> None:
        raise UnknownHostError("away")

    monkeypatch.setattr("job.store.retry.PATIENCE_SECONDS", 0.0)
    retry, began = Retry(1.0), time.monotonic()
    retry(bool)
    with pytest.raises(BucketAwayError):
        retry(unknown)
    assert time.monotonic() - began > 1

    # The same holds for a source; one that has never answered is given up soon.
    source, began = Retry(1.0).elsewhere(), time.monotonic()
    with pytest.raises(BucketAwayError, match="tried for 0 s"):
        source(unknown)
    assert time.monotonic() - began < 1
    source(bool)
    with pytest.raises(BucketAwayError, match="tried for 1 s"):
        source(unknown)


@of_one_kind
def test_stop_ends_only_the_waiting(opened: Opened, proxy: FaultyProxy, tmp_path: Path) -> None:
    stop = Stop(30)
    store = opened(stop=stop)
    (tmp_path / "file").write_bytes(CONTENT)
    store.create("key", b"1")
    store.upload(tmp_path / "file", "large")
    stop.request("SIGTERM")
    # From a bucket that answers, what is small arrives; what is large breaks off.
    assert store.read("key").data == b"1"
    store.put("there", CONTENT[:1000])
    for carry in (store.upload, lambda path, key: store.download("large", path)):
        with pytest.raises(StoppedError, match=r"stopped by SIGTERM while gs://.*/large was transferred"):
            carry(tmp_path / "file", "new/large")
    proxy.refuse()
    for call in (lambda: store.read("key"), lambda: store.upload(tmp_path / "file", "large")):
        with pytest.raises(
            StoppedError, match=r"while the bucket was away \(.*refused|by SIGTERM while .*/large was transferred"
        ):
            call()


@of_one_kind
def test_work_is_repeated_as_a_whole(opened: Opened, proxy: FaultyProxy, notes: Notes) -> None:
    store = opened()
    below = store.sub("run").within(30)
    assert (below.retry.limit_seconds, store.sub("run").retry) == (30, store.retry)
    done: list[str] = []

    def work() -> str:
        done.append("read")
        below.exists("none")
        done.append("create")
        return store.create("key", b"1")

    proxy.inject(Fault.UNAVAILABLE, "^POST", times=2)
    assert store.retry(work) == store.read("key").version
    assert done == ["read", "create"] * 3
    assert ["trying again for up to 60 s" in note for note in notes] == [True, False], "once for all of them"
    with proxy.away(), pytest.raises(BucketAwayError, match=r"tried for \d s in all"):
        store.within(1).read("key")


def test_misspelt_host_is_waited_for_briefly(monkeypatch: pytest.MonkeyPatch, remote_bucket: str) -> None:
    monkeypatch.setattr("job.store.retry.PATIENCE_SECONDS", 0.3)
    point_at("http://no-such-host.invalid", monkeypatch)
    with pytest.raises(BucketAwayError, match=r"is away \(.*not known.*tried for 0 s"):
        open_store(remote_bucket, Retry(60)).read("key")
