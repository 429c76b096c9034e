"""Notices of a metadata server, which is a real one, and has bad days."""

from __future__ import annotations

import os
import threading
import time

import pytest

from job.processes import preemption
from job.stop import Stop
from tests.job.launching import eventually
from tests.job.metadata_server import MAINTENANCE, PREEMPTED, metadata_server, send

TERMINATE = "TERMINATE_ON_HOST_MAINTENANCE"


@pytest.fixture
def watching(monkeypatch):
    """Watches a server; the threads pause for as short as a test can bear, and end with the test."""
    monkeypatch.setattr(preemption, "_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(preemption, "_LONGEST_PAUSE_SECONDS", 0.05)
    begun = []

    def watching(host: str) -> Stop:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        begun.append(Stop())
        preemption.watch_for_preemption(begun[-1])
        return begun[-1]

    yield watching
    for stop in begun:
        stop.request("the end of the test")


@pytest.fixture
def server():
    with metadata_server() as server:
        yield server


def test_a_preemption_notice_is_acted_on_as_soon_as_it_comes(watching, server):
    stop = watching(server.host)
    eventually(lambda: server.asked(PREEMPTED) == server.asked(MAINTENANCE) == 2, 20)
    assert server.requests[0].endswith("wait_for_change=true&last_etag=0&timeout_sec=60")
    time.sleep(0.2)
    assert len(server.requests) == 4, "it asks again although its request is not answered"
    server.set(MAINTENANCE, "MIGRATE_ON_HOST_MAINTENANCE")
    eventually(lambda: server.asked(MAINTENANCE) == 3, 20)
    assert not stop(), "a migration stops nobody"
    server.set(PREEMPTED, "TRUE")
    eventually(stop, 10)
    assert stop.reason == "the machine's notice instance/preempted=TRUE"
    # One that begins on a machine that is preempted already stops at once.
    eventually(watching(server.host), 10)


def test_a_maintenance_that_was_announced_before_leaves_the_time_until_then(watching, server):
    server.set(MAINTENANCE, TERMINATE)
    stop = watching(server.host)
    eventually(lambda: server.asked(MAINTENANCE) == 2, 20)
    assert not stop()
    server.set(MAINTENANCE, "NONE")
    eventually(lambda: server.asked(MAINTENANCE) == 3, 20)
    assert not stop()
    server.set(MAINTENANCE, TERMINATE)
    eventually(stop, 10)
    assert stop.reason == f"the machine's notice instance/maintenance-event={TERMINATE}"
    # It is none either for a server that does not know how to wait.
    server.sends_etags, asked = False, server.asked(MAINTENANCE)
    stop = watching(server.host)
    eventually(lambda: server.asked(MAINTENANCE) > asked + 5, 20)
    assert not stop()


def cut_short(request):
    request.send_response(200)
    request.send_header("Content-Length", "9999")
    request.end_headers()
    request.wfile.write(b"TR")
    request.close_connection = True


def no_http(request):
    request.wfile.write(b"\x00\xff nonsense\r\n\r\n")
    request.close_connection = True


ODD_ANSWERS = {
    "unavailable": lambda request: request.send_error(503),
    "hotel": lambda request: send(request, "<html>log in to the hotel's network</html>", {"ETag": "1"}),
    "no HTTP": no_http,
    "cut short": cut_short,
}


def test_no_answer_but_the_right_one_stops_anybody_or_ends_the_watch(watching, server):
    for name, server.odd in ODD_ANSWERS.items():
        asked = {notice: server.asked(notice) for notice in (PREEMPTED, MAINTENANCE)}
        stop = watching(server.host)
        for notice, times in asked.items():
            eventually(lambda notice=notice, times=times: server.asked(notice) > times + 3, 20)
        assert not stop(), name
        stop.request("the next one")
    stop = watching(server.host)
    server.odd = None
    server.set(PREEMPTED, "TRUE")
    eventually(stop, 10)


def test_a_server_that_is_not_there_harms_nobody(watching, monkeypatch, tmp_path):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    stops = [watching(host) for host in ("127.0.0.1:1", "not a host", "http://metadata", "nobody.invalid")]
    time.sleep(0.2)
    assert not any(stop() for stop in stops)
    assert errors == []
    assert {PREEMPTED, MAINTENANCE} <= {thread.name for thread in threading.enumerate()}
    monkeypatch.delenv("GCE_METADATA_HOST")
    for product, host in (("Standard PC", ""), ("Google Compute Engine", "metadata.google.internal")):
        (tmp_path / "product_name").write_text(f"{product}\n")
        monkeypatch.setattr(preemption, "_PRODUCT", tmp_path / "product_name")
        assert preemption._metadata_host() == host
    monkeypatch.setattr(preemption, "_PRODUCT", preemption.Path(os.devnull))
    assert preemption._metadata_host() == ""
