"""A file server that knows ranges, and answers badly as a test asks; it answers as the hub of datasets, too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from tests.job.answering import JsonHandler, serving


class Files(JsonHandler):
    """Serves `content` by path, in ranges; and what the hub says of a dataset `org/name` of these files."""

    content: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[tuple[str, str]]]
    etag = "one"
    date = ""
    place = ""
    """HEAD, GET, or every request: these `bad` answers."""
    bad: ClassVar[Callable[[Files], object]]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        paths = self.heard()["paths"]
        self.say(200, [each for each in self.listed() if each["path"] in paths])

    @property
    def whole(self) -> bytes:
        return next(iter(self.content.values()))

    def send(self, body: bytes, headers: dict[str, object], code: int = 200) -> None:
        self.send_response(code)
        for name, value in headers.items():
            if value:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_part(self, sent_bytes: int) -> None:
        """Sends headers for the first file, and some of it."""
        self.send(self.whole[:sent_bytes], {"Content-Length": len(self.whole)})

    def send_whole(self, body: bytes) -> None:
        """Sends an answer that is complete in itself, whatever was asked for."""
        self.send(body, {"Content-Length": str(len(body))})

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append((self.command, self.headers.get("Range", "")))
        if self.place in (self.command, "every request"):
            self.close_connection = True
            type(self).bad(self)
            return
        if path.startswith("/api/datasets/org/name"):
            self.hub(path)
            return
        name = re.sub(r"^/datasets/org/name/resolve/[^/]+/", "/", path)
        if name not in self.content:
            self.send_error(403 if name == "/secret.zip" else 404)
            return
        whole = self.content[name]
        headers = {"Accept-Ranges": "bytes", "ETag": self.etag and f'"{self.etag}"', "Last-Modified": self.date}
        headers |= {"X-Repo-Commit": "0" * 40, "Content-Length": str(len(whole))}
        if not (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            self.send(whole, headers)
            return
        first, last = int(match[1]), int(match[2] or len(whole) - 1)
        part = whole[first : last + 1]
        headers |= {"Content-Length": str(len(part)), "Content-Range": f"bytes {first}-{last}/{len(whole)}"}
        self.send(part, headers, 206)

    def listed(self) -> list[dict[str, object]]:
        """Files and folders as the hub tells of them."""
        parents = {str(parent) for name in self.content for parent in PurePosixPath(name[1:]).parents} - {"."}
        folders = [{"type": "directory", "path": folder, "oid": "b" * 40} for folder in sorted(parents)]
        about = {"type": "file", "oid": "a" * 40}
        return folders + [about | {"path": name[1:], "size": len(data)} for name, data in self.content.items()]

    def hub(self, path: str) -> None:
        if "/tree/" in path:
            below = path.partition("/tree/")[2].partition("/")[2]
            self.say(200, [each for each in self.listed() if not below or str(each["path"]).startswith(f"{below}/")])
        else:
            self.say(200, {"id": "org/name", "sha": "0" * 40, "siblings": [], "private": False, "gated": False})


@pytest.fixture(name="server")
def server_fixture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[type[Files], str]]:
    """The class whose attributes say how it answers, and its URL; nothing is in the cache."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    handler = type("OwnFiles", (Files,), {"content": {}, "asked": []})
    with serving(handler) as url:
        yield handler, url
