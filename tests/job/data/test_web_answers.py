"""A web source whose server answers badly: a table of answers × places, over real HTTP on loopback."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import numpy as np
import pytest

from job.exits import Exit
from tests.job.command_line import ddpm_here, refused
from tests.job.data.file_server import Files
from tests.job.some_images import files_in, jpeg, zip_of

PATIENCE_SECONDS = 1.2
SILENCE_SECONDS = 3.0
"""Longer than the patience, so that a busy machine does not look like a silent server."""
MOST_REQUESTS = 100
"""Of a command: a try has two (HEAD, GET), and ten for each that is redirected for ever."""


def silent(handler: Files) -> None:
    handler.send_part(1000)
    time.sleep(SILENCE_SECONDS + 1)


def slow(handler: Files) -> None:
    handler.send_part(0)
    step = len(handler.whole) // 6 + 1
    for start in range(0, len(handler.whole), step):
        handler.wfile.write(handler.whole[start : start + step])
        time.sleep(PATIENCE_SECONDS / 2)


def cut_once(handler: Files) -> None:
    gets = sum(command == "GET" for command, _ in handler.asked)
    handler.send_part(len(handler.whole) * (2 if gets == 1 else 3) // 3)


def redirect(target: str) -> Callable[[Files], object]:
    return lambda handler: handler.send(b"", {"Location": target, "Content-Length": "0"}, 302)


ANSWERS: dict[str, Callable[[Files], object]] = {
    "whole, too short": lambda handler: handler.send_whole(handler.whole[:-1]),
    "whole, too long": lambda handler: handler.send_whole(handler.whole + b"x"),
    "whole, empty": lambda handler: handler.send_whole(b""),
    "another file": lambda handler: handler.send_whole(b"x" * len(handler.whole)),
    "cut at two thirds": lambda handler: handler.send_part(len(handler.whole) * 2 // 3),
    "cut at two thirds, once": cut_once,
    "1,000 bytes, then silence": silent,
    "whole, slower than the patience": slow,
    "junk": lambda handler: handler.wfile.write(b"\x00junk\r\n\r\n" * 50),
    "nothing": lambda handler: None,
    "redirect to http": redirect("http://example.invalid/all.zip"),
    "redirect to a file": redirect("file:///etc/hostname"),
    "redirect to itself": redirect("/all.zip"),
    "redirect to no URL": redirect("http://[bad"),
    "redirect to no port": redirect("https://host:99999999/all.zip"),
}
for code in ("401", "403", "404", "410", "416", "429", "500", "503"):
    ANSWERS[code] = lambda handler, code=int(code): handler.send_error(code)
AWAY, BAD_DATA, FINISHED = Exit.BUCKET_AWAY, Exit.BAD_DATA, Exit.FINISHED
REFUSED = {
    **dict.fromkeys(("401", "403"), Exit.NO_PERMISSION),
    **dict.fromkeys(("404", "410"), Exit.MISSING_INPUT),
    **dict.fromkeys((answer for answer in ANSWERS if answer.startswith("redirect")), Exit.BAD_REQUEST),
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


@pytest.mark.parametrize("place", PLACES)
def test_every_answer_has_its_exit_code(server, tmp_path, monkeypatch, place):
    monkeypatch.setattr("job.store.Retry.silence_seconds", SILENCE_SECONDS)
    (handler, url), found = server, {}
    # The client drops up to 128 KiB before a cut.
    files = [("notes.txt", np.random.default_rng(0).bytes(3_000_000))]
    files += [(f"{number}.jpg", jpeg(number)) for number in range(12)]
    handler.place, handler.etag = place, ""
    handler.content = {"/all.zip": zip_of(tmp_path / "all.zip", files).read_bytes()}
    for number, answer in enumerate(TABLE[place]):
        handler.bad = ANSWERS[answer]
        handler.asked.clear()
        cache, bucket, began = tmp_path / f"cache{number}", tmp_path / f"bucket{number}", time.monotonic()
        words = ("data", "pack", f"{url}/all.zip", "all", "--size", 8, "--bucket", bucket)
        # Patience only helps where a later answer is good.
        patience_seconds = PATIENCE_SECONDS / 4 if TABLE[place][answer] == AWAY else PATIENCE_SECONDS
        done = ddpm_here(*words, DDPM_CACHE=str(cache), DDPM_AWAY_SECONDS=str(patience_seconds))
        found[answer] = done.returncode
        assert time.monotonic() - began < 50 * PATIENCE_SECONDS, answer
        assert len(handler.asked) <= MOST_REQUESTS, (answer, len(handler.asked))
        errors = [line for line in done.stderr.splitlines() if line.startswith("ddpm: ")]
        assert len(errors) == bool(done.returncode) and "Traceback" not in done.stderr, (answer, done.stderr)
        assert not files_in(cache) and not (done.returncode and files_in(bucket)), answer
    assert found == {answer: int(code) for answer, code in TABLE[place].items()}


ENDPOINT = dict.fromkeys(("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"), "http://no-such.invalid")
KEYS = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "a")


@pytest.mark.parametrize(
    ("source", "bucket", "code"),
    [
        # The clients' own errors have to lead to that of the resolver.
        *(("landscape-sample", bucket, socket.EAI_NONAME) for bucket in ("s3://bucket/folder", "gs://bucket/folder")),
        *(
            (source, "", code)
            for source in ("https://no-such.invalid/all.zip", "hf://datasets/some/one", "sftp://no-such/all")
            for code in (socket.EAI_NONAME, socket.EAI_AGAIN)
        ),
    ],
)
def test_unknown_host_is_given_up_soon(tmp_path, monkeypatch, source, bucket, code):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(code, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("job.store.retry.PATIENCE_SECONDS", 0.5)
    words, began = ("data", "pack", source, "all", "--size", 8, "--bucket", bucket or tmp_path / "b"), time.monotonic()
    done = ddpm_here(*words, **({**ENDPOINT, **KEYS} if bucket else {}), DDPM_AWAY_SECONDS="100")
    line = refused(done, Exit.BUCKET_AWAY)
    said = "Name or service not known" if bucket else f"ddpm: {source}: the name of its host is not known ("
    assert said in line and "trying again for up to 0.5 s" in done.stderr
    assert time.monotonic() - began < 30
