"""Pushes to the hub, judged by what a server on this machine receives from the hub's own client."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from huggingface_hub import constants

from job.exits import Exit
from tests.job.answering import JsonHandler, serving
from tests.job.command_line import DDPM, ddpm_here, refused, started, succeeded

TOKEN = "hf_a-token-of-nobody-1c9e"
KEPT = Path(__file__).parents[2] / "kept/format-3.tar.gz"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class Repository:
    """Its files, and what the commits said."""

    visibility: str
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    messages: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.messages):040x}"

    def entry(self, path: str) -> dict[str, Any]:
        """What the hub says of a file, be it there or not."""
        content, is_large = self.files.get(path), path.endswith(".safetensors")
        oid = content and (sha256(content) if is_large else sha1(b"blob %d\0" % len(content) + content)).hexdigest()
        mode = {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        return {"type": "file", "path": path, "size": len(content or b""), "oid": oid, **mode}


@dataclass
class Hub:
    """A small hub of Hugging Face: what it has, and what it has heard."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, which come before the commit that names them."""
    requests: list[str] = field(default_factory=list)
    refusals: dict[str, tuple[int, Any]] = field(default_factory=dict)
    """Answers instead, by a pattern of method and path."""
    silent: bool = False
    heard: Event = field(default_factory=Event)

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """What the endpoints say that its client uses for a push, with the rules of the real one."""
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            said = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            valid = re.fullmatch(r"[a-z0-9.-]+", said.get("license_name", "none")) and "library_name" in said
            return 200 if valid else 400, {"errors": [] if valid else [{"message": "an odd name"}], "warnings": []}
        name, what = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(/.+)?", path).groups()
        if (repository := self.repositories.get(name)) is None:
            return 404, {"error": "Repository not found"}
        if what == "/tree/main":
            return 200, [*map(repository.entry, repository.files)]
        if what == "/preupload/main":
            return 200, {"files": [repository.entry(each["path"]) for each in json.loads(body)["files"]]}
        if what == "/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for each in objects:
                if each["oid"] not in self.large:
                    each["actions"] = {"upload": {"href": f"{self.url}/large/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if what == "/commit/main":
            self.commit(repository, [json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{repository}", "commitOid": str(repository)}
        assert what in (None, "/revision/main")
        is_private = repository.visibility == "private"
        return 200, {"id": name, "private": is_private, "sha": str(repository), "siblings": []}

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        """Makes a repository, unless there is one; older clients say in the first way that it is private."""
        name, owner = asked["name"], asked["organization"]
        if owner not in ("me", "my-org"):
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
        code = 409 if f"{owner}/{name}" in self.repositories else 200
        visibility = "private" if asked.get("private") else asked.get("visibility", "public")
        self.repositories.setdefault(f"{owner}/{name}", Repository(visibility))
        return code, {"url": f"{self.url}/{owner}/{name}"}

    def commit(self, repository: Repository, lines: list[Any]) -> None:
        """Takes all of it, or nothing."""
        files = dict(repository.files)
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            if key == "deletedFile":
                del files[value["path"]]
            else:
                content = base64.b64decode(value["content"]) if key == "file" else self.large[value["oid"]]
                files[value["path"]] = content
        repository.files = files
        repository.messages.append(lines[0]["value"]["summary"])


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
            path, body, token = urlsplit(self.path).path, self.body(), self.headers.get("Authorization")
            there.requests.append(f"{self.command} {path}")
            there.heard.set()
            if there.silent:
                Event().wait(60)
            for pattern, refusal in there.refusals.items():
                if re.search(pattern, there.requests[-1]):
                    return self.say(*refusal)
            if path.startswith("/large/"):
                # Of a signed URL, where a token would not belong.
                assert token is None and f"/large/{sha256(body).hexdigest()}" == path
                there.large[path.removeprefix("/large/")] = body
                return self.say(200, {})
            if token != f"Bearer {TOKEN}":
                return self.say(401, {"error": "Invalid credentials in Authorization header"})
            code, said = there.answer(path, body)
            self.say(code, said, **({"X-Error-Code": "RepoNotFound"} if code == 404 else {}))

        do_GET = do_POST = do_PUT = answer

    with serving(Handler) as there.url:
        yield there


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """With a run `pixels` that has scores."""
    with tarfile.open(KEPT) as tar:
        tar.extractall(folder := tmp_path_factory.mktemp("pushing"), filter="data")
    return folder / "bucket"


@pytest.fixture
def server(monkeypatch):
    """A hub that this process finds, with a token that may write. It takes no Xet, the protocol of the real one."""
    with hub() as there:
        # The client reads these variables when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", there.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield there


def push(bucket, to, *more):
    done = ddpm_here("export", "--run", "pixels", "--push", to, "--bucket", bucket, *more)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_a_push_is_a_private_commit_of_the_export(bucket, server, tmp_path):
    done = push(bucket, "my-org/pixels.8")
    assert succeeded(done).startswith(f"{server.url}/my-org/pixels.8  (epoch-0002, weights ema, ")
    assert f"my-org/pixels.8 is private: {server.url}/my-org/pixels.8/settings makes it public" in done.stderr
    pushed = server.repositories["my-org/pixels.8"]
    assert (pushed.visibility, len(pushed.messages)) == ("private", 1)
    # The same objects as in a folder; the card has the name by which diffusers finds them.
    succeeded(ddpm_here("export", "--run", "pixels", "--to", tmp_path / "out", "--bucket", bucket))
    folder = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert pushed.files.keys() == folder.keys() | {".gitattributes"}
    assert {key for key, path in folder.items() if path.read_bytes() != pushed.files[key]} == {"README.md"}
    card = pushed.files["README.md"].decode()
    assert 'from_pretrained("my-org/pixels.8"' in card and yaml.safe_load(card.split("---\n")[1])
    pattern = r"^Scores of 12 images by \w+ in \d+ steps, against .+ images of kept-8 .+: .*fd-mobilenet [\d.]+ \(real"
    assert re.search(pattern, card, re.MULTILINE)
    # Another one replaces it, and leaves what is not of an export.
    parts = [f"unet/diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    pushed.files |= dict.fromkeys((*parts, "LICENSE", "unet/notes.txt"), b"before")
    before = dict(pushed.files)
    succeeded(push(bucket, "my-org/pixels.8", "--weights", "model"))
    assert pushed.files.keys() == before.keys() - {*parts, "grid.png"}
    assert pushed.files["LICENSE"] == b"before" and pushed.files[WEIGHTS] != before[WEIGHTS]
    assert "Scores" not in pushed.files["README.md"].decode()


@pytest.mark.parametrize(
    "name", ["tiles", "me/", "/tiles", "me/a/b", "../tiles", "me/a--b", "me/a.git", "https://hf.co/me/a", "me/\x1b[1m"]
)
def test_names_are_checked_first(server, tmp_path, name):
    line = refused(push(tmp_path / "no-bucket", name), Exit.BAD_REQUEST)
    assert "--push" in line and "\x1b" not in line
    assert server.requests == []


@pytest.mark.parametrize(
    ("refusal", "code", "said"),
    [
        ({"create": (401, {"error": "Invalid username or password."})}, Exit.NO_PERMISSION, "hf auth login"),
        ({"commit": (403, {"error": "Forbidden: pass a write token"})}, Exit.NO_PERMISSION, "pass a write token"),
        ({"commit": (409, {"error": "main has moved"})}, Exit.BUCKET_AWAY, "changed during the push (main has moved)"),
        ({"commit": (413, {"error": "too large"})}, Exit.BAD_REQUEST, "refuses the push to me/x: too large"),
        (
            {"create": (500, "<html>\x1b[31m"), "me/x": (404, {"error": "Repository not found"})},
            Exit.BUCKET_AWAY,
            "the hub does not answer",
        ),
        ({"validate": (400, {"errors": [{"message": "no"}]})}, Exit.BAD_REQUEST, "Invalid metadata in README.md. - no"),
        ({"validate": (502, "<html>")}, Exit.BUCKET_AWAY, "the hub does not answer"),
        ("hf_odd\x01one", Exit.NO_PERMISSION, "no usable token of the hub: sign in with `hf auth"),
        ("http://127.0.0.1:9", Exit.BUCKET_AWAY, "the hub does not answer (Connection refused): check the network"),
        ({"pytorch_model.bin": b"mine"}, Exit.BAD_REQUEST, "pytorch_model.bin is there already"),
    ],
)
def test_refusals_of_the_hub_are_one_line(bucket, server, monkeypatch, refusal, code, said):
    match refusal:
        case {"pytorch_model.bin": _}:
            server.repositories["me/x"] = Repository("public", refusal)
        case dict():
            server.refusals |= refusal
        case str() if refusal.startswith("hf_"):
            monkeypatch.setenv("HF_TOKEN", refusal)
        case str():
            monkeypatch.setattr(constants, "ENDPOINT", refusal)
    line = refused(push(bucket, "me/x"), code)
    assert said in line and "\x1b" not in line and "hf_odd" not in line
    assert not server.repositories.get("me/x", Repository("private")).messages


@pytest.mark.slow
def test_a_silent_hub_can_be_left(bucket, tmp_path):
    """And what a process takes from the environment alone."""
    with hub() as there:
        there.silent = True
        words = ("export", "--run", "pixels", "--push", "me/x", "--bucket", shutil.copytree(bucket, tmp_path / "b"))
        variables = {"HF_ENDPOINT": there.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        process = started(*words, program=(DDPM,), **variables)
        assert there.heard.wait(60)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == Exit.STOPPED
        assert "stopped by SIGINT while waiting for me/x" in said
        there.silent = False
        again = started(*words, program=(DDPM,), **variables)
        said, _ = again.communicate(timeout=60)
        assert again.returncode == 0, said
        assert TOKEN not in said
    assert len(there.repositories["me/x"].messages) == 1
