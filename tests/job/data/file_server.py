"""A file server that knows ranges, and breaks off or lies as a test asks; it answers as the hub of datasets, too."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from tests.job.answering import JsonHandler, serving


class Files(JsonHandler):
    """Serves `content` by path, in ranges; and what the hub says of a dataset `org/name` of these files."""

    content: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[tuple[str, str]]]
    cuts_once = False
    """The next answer breaks off in its middle."""
    etag = "one"
    date = ""
    stalls = False
    without_length = False
    """Half of a body comes, and nothing says that it is half."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_POST(self) -> None:
        paths = self.heard()["paths"]
        self.say(200, [each for each in self.listed() if each["path"] in paths])

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append((self.command, self.headers.get("Range", "")))
        if path.startswith("/api/datasets/org/name"):
            self.hub(path)
            return
        name = re.sub(r"^/datasets/org/name/resolve/[^/]+/", "/", path)
        if name == "/secret.zip":
            self.send_error(403)
            return
        if name not in self.content:
            self.send_error(404)
            return
        whole = self.content[name]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2] or len(whole) - 1)) if match else (0, len(whole) - 1)
        part = whole[first : last + 1]
        self.send_response(206 if match else 200)
        self.send_header("Accept-Ranges", "bytes")
        if self.etag:
            self.send_header("ETag", f'"{self.etag}"')
        if self.date:
            self.send_header("Last-Modified", self.date)
        self.send_header("X-Repo-Commit", "0" * 40)
        if with_body and self.without_length:
            part, self.close_connection = part[: len(part) // 2], True
        else:
            self.send_header("Content-Length", str(len(part)))
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.end_headers()
        if with_body:
            if self.stalls:
                time.sleep(3)
                return
            if self.cuts_once:
                part, self.close_connection, type(self).cuts_once = part[: len(part) // 2], True, False
            self.wfile.write(part)

    def listed(self) -> list[dict[str, object]]:
        """Files and folders as the hub tells of them."""
        parents = {str(parent) for name in self.content for parent in PurePosixPath(name[1:]).parents} - {"."}
        folders = [{"type": "directory", "path": folder, "oid": "b" * 40} for folder in sorted(parents)]
        files = self.content.items()
        return folders + [
            {"type": "file", "path": name[1:], "size": len(data), "oid": "a" * 40} for name, data in files
        ]

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
