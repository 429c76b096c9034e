"""Notices of a metadata server, which is a real one, and has bad days."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from job import stop as stop_module
from job.stop import Stop
from tests.job.answering import metadata_server
from tests.job.launching import eventually


@pytest.fixture
def watching(monkeypatch):
    """Watches a server; the threads pause for as short as a test can bear, and end with the test."""
    monkeypatch.setattr(stop_module, "_NOTICE_PAUSE_SECONDS", 0.02)
    with ExitStack() as watches:

        def watching(host: str) -> Stop:
            monkeypatch.setenv("GCE_METADATA_HOST", host)
            watches.enter_context(stop_module.preemption_watched(stop := Stop()))
            return stop

        yield watching


@pytest.fixture
def server():
    with metadata_server() as server:
        yield server


def test_a_notice_stops_at_once(watching, server, monkeypatch):
    # That of another machine.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    stop = watching(server.host)
    eventually(lambda: len(server.requests) == 2, 20)
    assert server.requests[0].endswith("wait_for_change=true&last_etag=0&timeout_sec=60")
    time.sleep(0.2)
    assert len(server.requests) == 2, "it asks again although its request is not answered"
    assert not stop()
    server.preempt()
    eventually(stop, 10)
    assert stop.reason == "the machine's notice instance/preempted=TRUE"
    # One that begins on a machine that is preempted already stops at once.
    eventually(watching(server.host), 10)


def cut_short(request):
    request.send_response(200)
    request.send_header("Content-Length", "9999")
    request.end_headers()
    request.wfile.write(b"TR")
    request.close_connection = True


ODD_ANSWERS = {
    "unavailable": lambda request: request.send_error(503),
    "hotel": lambda request: request.say(200, "<html>log in to the hotel's network</html>", ETag="1"),
    "does not know how to wait": lambda request: request.say(200, "FALSE"),
    "cut short": cut_short,
}


def test_odd_answers_stop_nothing(watching, server):
    for name, server.odd in ODD_ANSWERS.items():
        asked = len(server.requests)
        stop = watching(server.host)
        eventually(lambda asked=asked: len(server.requests) > asked + 3, 20)
        assert not stop(), name
        stop.request("the next one")
    stop = watching(server.host)
    server.odd = None
    server.preempt()
    eventually(stop, 10)


def test_a_missing_server_harms_nothing(watching, monkeypatch, tmp_path):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    stops = [watching(host) for host in ("127.0.0.1:1", "not a host", "http://metadata", "nobody.invalid")]
    time.sleep(0.2)
    assert not any(stop() for stop in stops)
    assert errors == []
    assert "instance/preempted" in {thread.name for thread in threading.enumerate()}
    monkeypatch.delenv("GCE_METADATA_HOST")
    product = tmp_path / "product_name"
    monkeypatch.setattr(stop_module, "_PRODUCT", product)
    for text, host in (("Standard PC", ""), ("Google Compute Engine", "metadata.google.internal")):
        product.write_text(f"{text}\n")
        assert stop_module._metadata_host() == host
    product.unlink()
    assert stop_module._metadata_host() == ""
