"""A small hub of Hugging Face: the endpoints that its client uses for a push, with the rules of the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.job.answering import JsonHandler, serving

TOKEN = "hf_a-token-of-nobody-1c9e"
OWNERS = {"me", "my-org"}


@dataclass
class Repository:
    """Its files, and what the commits said."""

    visibility: str
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What it has, and what it has heard."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, which come before the commit that names them."""
    requests: list[str] = field(default_factory=list)
    refusals: dict[str, tuple[int, Any]] = field(default_factory=dict)
    """Answers instead, by a pattern of method and path."""
    silent: bool = False
    heard: Event = field(default_factory=Event)


def _oid(path: str, content: bytes) -> str:
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub with no repositories, for as long as the block lasts."""
    there = Hub()

    class Handler(JsonHandler):
        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def answer(self) -> None:
            path, body = urlsplit(self.path).path, self.body()
            there.requests.append(f"{self.command} {path}")
            there.heard.set()
            if there.silent:
                Event().wait(60)
            for pattern, (code, answer) in there.refusals.items():
                if re.search(pattern, there.requests[-1]):
                    return self.say(code, answer)
            if match := re.fullmatch(r"/large/([0-9a-f]{64})", path):
                # Of a signed URL, where a token would not belong.
                assert "Authorization" not in self.headers
                assert hashlib.sha256(body).hexdigest() == match[1]
                there.large[match[1]] = body
                return self.say(200, {})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.say(401, {"error": "Invalid credentials in Authorization header"})
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            if path == "/api/validate-yaml":
                return self.validate(json.loads(body)["content"])
            match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(/.+)?", path)
            repository = there.repositories.get(match[1]) if match else None
            if match is None or repository is None:
                return self.say(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
            if match[2] is None:
                return self.say(200, {"id": match[1], "private": repository.visibility == "private", "siblings": []})
            if match[2] == "/tree/main":
                return self.say(200, [_entry(path, content) for path, content in repository.files.items()])
            if match[2] == "/revision/main":
                return self.say(200, {"id": match[1], "sha": f"{len(repository.messages):040x}", "siblings": []})
            if match[2] == "/preupload/main":
                files = [self.mode(each["path"], repository) for each in json.loads(body)["files"]]
                return self.say(200, {"files": files})
            if match[2] == "/info/lfs/objects/batch":
                return self.batch(json.loads(body))
            if match[2] == "/commit/main":
                return self.commit(match[1], repository, [json.loads(line) for line in body.splitlines()])
            return self.say(404, {"error": f"no {path} here"})

        do_GET = do_POST = do_PUT = answer

        def create(self, asked: Any) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] not in OWNERS:
                words = f'You don\'t have the rights to create a model under the namespace "{asked["organization"]}"'
                return self.say(403, {"error": words})
            code = 409 if name in there.repositories else 200
            # Older clients say it in the first way.
            visibility = "private" if asked.get("private") else asked.get("visibility", "public")
            there.repositories.setdefault(name, Repository(visibility))
            return self.say(code, {"url": f"{there.url}/{name}"})

        def validate(self, card: str) -> None:
            said = yaml.safe_load(card.split("---\n")[1])
            valid = re.fullmatch(r"[a-z0-9.-]+", said.get("license_name", "none")) and "library_name" in said
            errors = [] if valid else [{"message": '"license_name" must be an identifier'}]
            self.say(200 if valid else 400, {"errors": errors, "warnings": []})

        def mode(self, path: str, repository: Repository) -> dict[str, Any]:
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = _oid(path, repository.files[path]) if path in repository.files else None
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        def batch(self, asked: Any) -> None:
            objects = asked["objects"]
            for each in objects:
                if each["oid"] not in there.large:
                    each["actions"] = {"upload": {"href": f"{there.url}/large/{each['oid']}"}}
            self.say(200, {"transfer": "basic", "objects": objects})

        def commit(self, name: str, repository: Repository, lines: list[Any]) -> None:
            files = dict(repository.files)
            for value in (line["value"] for line in lines if line["key"] == "file"):
                files[value["path"]] = base64.b64decode(value["content"])
            for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
                files[value["path"]] = there.large[value["oid"]]
            for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
                del files[value["path"]]
            repository.files = files
            repository.messages.append(lines[0]["value"]["summary"])
            oid = f"{len(repository.messages):040x}"
            self.say(200, {"commitUrl": f"{there.url}/{name}/commit/{oid}", "commitOid": oid})

    with serving(Handler) as there.url:
        yield there


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
