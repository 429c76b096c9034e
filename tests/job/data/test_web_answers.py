"""A web source whose server answers badly: a table of answers × places, over real HTTP on loopback."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from job.exits import Exit
from tests.job.answering import serving
from tests.job.command_line import ddpm_here, refused
from tests.job.some_images import jpeg, zip_of

PATIENCE_SECONDS = 1.2
SILENCE_SECONDS = 3.0
"""Longer than the patience, so that a busy machine does not look like a silent server."""
MOST_REQUESTS = 100
"""Of a command: a try has two (HEAD, GET), and ten for each that is redirected for ever."""


class Answers(BaseHTTPRequestHandler):
    """Serves one file, and answers otherwise at one place."""

    whole: ClassVar[bytes]
    place: ClassVar[str]
    """HEAD, GET, or every request."""
    bad: ClassVar[Callable[[Answers, int], object]]
    requests: ClassVar[list[str]]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.requests.append(self.command)
        self.close_connection = True
        if self.place in (self.command, "every request"):
            type(self).bad(self)
        else:
            self.send()

    def send(self, sent_bytes: int | None = None) -> None:
        """Sends headers for the whole file, and all or some of it."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.whole)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.whole[:sent_bytes])

    def whole_answer(self, body: bytes) -> None:
        """Sends an answer that is complete in itself, whatever was asked for."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.send_header("Content-Length", "0")
        self.end_headers()


def silent(handler: Answers) -> None:
    handler.send(1000)
    time.sleep(SILENCE_SECONDS + 1)


def slow(handler: Answers) -> None:
    handler.send(0)
    step = len(handler.whole) // 6 + 1
    for start in range(0, len(handler.whole), step):
        handler.wfile.write(handler.whole[start : start + step])
        time.sleep(PATIENCE_SECONDS / 2)


def cut_once(handler: Answers) -> None:
    handler.send(None if handler.requests.count("GET") > 1 else len(handler.whole) * 2 // 3)


def status(code: int) -> Callable[[Answers], object]:
    return lambda handler: handler.send_error(code)


ANSWERS: dict[str, Callable[[Answers], object]] = {
    "whole, too short": lambda handler: handler.whole_answer(handler.whole[:-1]),
    "whole, too long": lambda handler: handler.whole_answer(handler.whole + b"x"),
    "whole, empty": lambda handler: handler.whole_answer(b""),
    "another file": lambda handler: handler.whole_answer(b"x" * len(handler.whole)),
    "cut at two thirds": lambda handler: handler.send(len(handler.whole) * 2 // 3),
    "cut at two thirds, once": cut_once,
    "1,000 bytes, then silence": silent,
    "whole, slower than the patience": slow,
    "401": status(401),
    "403": status(403),
    "404": status(404),
    "410": status(410),
    "416": status(416),
    "429": status(429),
    "500": status(500),
    "503": status(503),
    "junk": lambda handler: handler.wfile.write(b"\x00junk\r\n\r\n" * 50),
    "nothing": lambda handler: None,
    "redirect to http": lambda handler: handler.redirect("http://example.invalid/all.zip"),
    "redirect to a file": lambda handler: handler.redirect("file:///etc/hostname"),
    "redirect to itself": lambda handler: handler.redirect("/all.zip"),
    "redirect to no URL": lambda handler: handler.redirect("http://[bad"),
    "redirect to no port": lambda handler: handler.redirect("https://host:99999999/all.zip"),
}
AWAY, BAD_DATA, FINISHED = Exit.BUCKET_AWAY, Exit.BAD_DATA, Exit.FINISHED
REFUSED = {
    **dict.fromkeys(("401", "403"), Exit.NO_PERMISSION),
    **dict.fromkeys(("404", "410"), Exit.MISSING_INPUT),
    **dict.fromkeys(("redirect to http", "redirect to a file", "redirect to itself"), Exit.BAD_REQUEST),
    **dict.fromkeys(("redirect to no URL", "redirect to no port"), Exit.BAD_REQUEST),
}
OUTAGE = dict.fromkeys(("429", "500", "503", "junk", "nothing"), AWAY)
CONTENT = {
    **dict.fromkeys(("whole, too short", "whole, too long", "another file", "416"), BAD_DATA),
    **dict.fromkeys(("whole, empty", "cut at two thirds", "1,000 bytes, then silence"), AWAY),
    **dict.fromkeys(("cut at two thirds, once", "whole, slower than the patience"), FINISHED),
}
TABLE: dict[str, dict[str, Exit]] = {
    # Without an answer to HEAD the GET tells the size.
    "HEAD": dict.fromkeys(("whole, too short", "whole, too long", "whole, empty"), BAD_DATA)
    | dict.fromkeys(("404", "500", "junk", "nothing", "redirect to a file"), FINISHED),
    "GET": CONTENT | REFUSED | OUTAGE,
    "every request": REFUSED | OUTAGE | dict.fromkeys(("whole, empty", "another file"), BAD_DATA),
}
PLACES = [pytest.param(place, marks=[pytest.mark.slow] * (place == "GET")) for place in TABLE]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[type[Answers], str]]:
    # The client drops up to 128 KiB before a cut.
    files = [("notes.txt", np.random.default_rng(0).bytes(3_000_000))]
    files += [(f"{number}.jpg", jpeg(number)) for number in range(12)]
    whole = zip_of(tmp_path / "all.zip", files).read_bytes()
    handler = type("OwnAnswers", (Answers,), {"whole": whole, "requests": []})
    with serving(handler) as url:
        yield handler, f"{url}/all.zip"


@pytest.mark.parametrize("place", PLACES)
def test_every_answer_has_its_exit_code(server, tmp_path, monkeypatch, place):
    monkeypatch.setattr("job.store.Retry.silence_seconds", SILENCE_SECONDS)
    handler, url = server
    found: dict[str, int] = {}
    for number, answer in enumerate(TABLE[place]):
        handler.place, handler.bad = place, staticmethod(ANSWERS[answer])
        handler.requests.clear()
        cache, bucket, began = tmp_path / f"cache{number}", tmp_path / f"bucket{number}", time.monotonic()
        words = ("data", "pack", url, "all", "--size", 8, "--bucket", bucket)
        # Patience only helps where a later answer is good.
        patience_seconds = PATIENCE_SECONDS / 4 if TABLE[place][answer] == AWAY else PATIENCE_SECONDS
        done = ddpm_here(*words, DDPM_CACHE=str(cache), DDPM_AWAY_SECONDS=str(patience_seconds))
        found[answer] = done.returncode
        assert time.monotonic() - began < 20 * PATIENCE_SECONDS, answer
        assert len(handler.requests) <= MOST_REQUESTS, (answer, len(handler.requests))
        errors = [line for line in done.stderr.splitlines() if line.startswith("ddpm: ")]
        assert len(errors) == bool(done.returncode) and "Traceback" not in done.stderr, (answer, done.stderr)
        assert not [path for path in cache.rglob("*") if path.is_file()], answer
        if done.returncode:
            assert not [path for path in bucket.rglob("*") if path.is_file()], answer
    assert found == {answer: int(code) for answer, code in TABLE[place].items()}


def without_name_servers(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(code, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)


@pytest.mark.parametrize("bucket", ["s3://bucket/folder", "gs://bucket/folder"])
def test_unknown_host_is_given_up_soon(monkeypatch, bucket):
    """The clients' own errors have to lead to that of the resolver."""
    without_name_servers(monkeypatch, socket.EAI_NONAME)
    monkeypatch.setattr("job.store.retry.PATIENCE_SECONDS", 0.5)
    endpoint, began = "http://no-such.invalid", time.monotonic()
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "a")
    variables = {"AWS_ENDPOINT_URL": endpoint, "STORAGE_EMULATOR_HOST": endpoint, "DDPM_AWAY_SECONDS": "100"}
    words = ("data", "pack", "landscape-sample", "all", "--size", 8, "--bucket", bucket)
    done = ddpm_here(*words, **keys, **variables)
    assert "Name or service not known" in refused(done, Exit.BUCKET_AWAY)
    assert "trying again for up to 0.5 s" in done.stderr
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("source", ["https://no-such.invalid/all.zip", "hf://datasets/some/one", "sftp://no-such/all"])
@pytest.mark.parametrize("code", [socket.EAI_NONAME, socket.EAI_AGAIN])
def test_unknown_host_of_a_source_is_given_up_soon(tmp_path, monkeypatch, source, code):
    without_name_servers(monkeypatch, code)
    monkeypatch.setattr("job.store.retry.PATIENCE_SECONDS", 0.5)
    began = time.monotonic()
    done = ddpm_here("data", "pack", source, "all", "--size", 8, "--bucket", tmp_path / "b", DDPM_AWAY_SECONDS="100")
    line = refused(done, Exit.BUCKET_AWAY)
    assert line.startswith(f"ddpm: {source}: the name of its host is not known (")
    assert "trying again for up to 0.5 s" in done.stderr
    assert time.monotonic() - began < 10
