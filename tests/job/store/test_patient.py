"""A store that waits for its bucket: a real server behind a proxy that goes away, keeps silent and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.exits import BadRequestError, BucketAwayError, StoppedError
from job.stop import NEVER, Stop
from job.store import Entry, ObjectExistsError, ObjectMissingError, open_store, patient
from job.store.patient import LIMIT_VARIABLE, Outage, PatientStore, away_limit_seconds, open_patient
from tests.faulty_proxy import FaultyProxy

Notes = list[str]
CONTENT = bytes(range(256)) * 20_000
"""More than a stream reads at once."""


@pytest.fixture
def proxy(gcs_server: str, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(patient, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(patient, "LONGEST_PAUSE_SECONDS", 0.2)
    with FaultyProxy(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@pytest.fixture
def notes() -> Notes:
    return []


@pytest.fixture
def opened(proxy: FaultyProxy, gcs_bucket: str, notes: Notes) -> Callable[..., PatientStore]:
    """Opens the bucket; an operation without patience gives up after `deadline_seconds`."""

    def opened(limit_seconds: float = 60, stop: Stop = NEVER, deadline_seconds: float = 1) -> PatientStore:
        store = open_store(gcs_bucket, deadline_seconds=deadline_seconds)
        return PatientStore(store, Outage(limit_seconds, notes.append), stop)

    return opened


def test_every_operation_waits_for_the_bucket_and_that_is_told_once(
    opened: Callable[..., PatientStore], proxy: FaultyProxy, notes: Notes, tmp_path: Path
) -> None:
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
    assert {entry.key for entry in store.list()} == {
        *("new/created", "new/put", "new/uploaded", "run/replaced", "run/there")
    }
    assert (tmp_path / "downloaded").read_bytes() == CONTENT
    with proxy.away():
        replaced = ThreadPoolExecutor(1).submit(store.replace, "run/replaced", b"2", version)
        time.sleep(1.5)
    assert replaced.result(30) == store.read("run/replaced").version
    assert ["trying again" in note for note in notes] == [True, False, True, False]
    assert "Connection refused" in notes[0] and notes[0].endswith("trying again for up to 60 s")
    assert notes[1].startswith("the bucket is back after ")


def test_the_limit_counts_from_the_first_failure(
    opened: Callable[..., PatientStore], proxy: FaultyProxy, notes: Notes
) -> None:
    store = opened(limit_seconds=1)
    for _ in range(2):
        began = time.monotonic()
        with proxy.away(), pytest.raises(BucketAwayError, match=r"Connection refused.*\(tried for \d+ s in all\)"):
            store.read("key")
        assert time.monotonic() - began > 1
        with pytest.raises(ObjectMissingError):
            store.read("key")
    with proxy.away(), pytest.raises(BucketAwayError) as error:
        opened(limit_seconds=0).read("key")
    assert "tried for" not in str(error.value)


def test_what_is_no_outage_is_told_at_once(opened: Callable[..., PatientStore], notes: Notes, gcs_bucket: str) -> None:
    store = opened()
    store.create("key", b"mine")
    with pytest.raises(ObjectExistsError):
        store.create("key", b"theirs")
    with pytest.raises(ObjectMissingError):
        store.read("missing")
    with pytest.raises(ZeroDivisionError):
        store.insist(lambda: 1 // 0)
    assert notes == []


def test_a_stop_ends_the_waiting_and_nothing_else(opened: Callable[..., PatientStore], proxy: FaultyProxy) -> None:
    stop = Stop()
    store = opened(stop=stop, deadline_seconds=30)
    store.create("key", b"1")
    stop.request("a test")
    # A bucket that answers is served to the end.
    assert store.read("key").data == b"1"
    for go_away in (proxy.hang, proxy.refuse):
        go_away()
        began = time.monotonic()
        with pytest.raises(StoppedError, match="stopped while"):
            store.read("key")
        assert time.monotonic() - began < 15
        proxy.come_back()
    with proxy.away(), pytest.raises(StoppedError, match=r"stopped while the bucket was away \(.*Connection refused"):
        opened(stop=stop).read("key")


def test_a_stream_goes_on_where_it_was(
    opened: Callable[..., PatientStore], proxy: FaultyProxy, notes: Notes, tmp_path: Path
) -> None:
    store = opened()
    (tmp_path / "file").write_bytes(CONTENT)
    store.upload(tmp_path / "file", "archive")
    with store.open("archive") as stream:
        assert stream.read(1000) == CONTENT[:1000]
        assert stream.seek(-3, 2) == len(CONTENT) - 3
        assert stream.read() == CONTENT[-3:]
        stream.seek(2_000_000)
        proxy.refuse()
        back = threading.Timer(1, proxy.come_back)
        back.start()
        # Behind what was read ahead.
        assert stream.read() == CONTENT[2_000_000:]
        back.join()
        assert stream.seek(10) == stream.tell() == 10
        assert stream.read(5) == CONTENT[10:15]


def test_patience_upon_patience_is_not_more_patient(opened: Callable[..., PatientStore]) -> None:
    store = opened()
    twice = PatientStore(store.sub("run"), Outage(1, pytest.fail), NEVER)
    assert not isinstance(twice.inner, PatientStore)
    assert (twice.uri, twice.outage.limit_seconds) == (f"{store.uri}/run", 1)
    assert store.sub("run").outage is store.outage


def test_the_limit_is_what_the_environment_says(gcs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    assert away_limit_seconds() == 900
    monkeypatch.setenv(LIMIT_VARIABLE, "12.5")
    assert open_patient(gcs_bucket, NEVER, print).outage.limit_seconds == 12.5
    for text in ("-1", "inf", "nan", "soon"):
        monkeypatch.setenv(LIMIT_VARIABLE, text)
        with pytest.raises(BadRequestError, match=f"{LIMIT_VARIABLE}={text!r}: give the seconds"):
            open_patient(gcs_bucket, NEVER, print)
