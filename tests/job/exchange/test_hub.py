"""Pushes to the hub, judged by what a server on this machine receives from the hub's own client."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import tarfile
from hashlib import sha256
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import yaml
from huggingface_hub import constants

from job.exits import Exit
from tests.job.answering import JsonHandler, serving
from tests.job.command_line import ddpm_here, refused, started, succeeded

TOKEN = "hf_a-token-of-nobody-1c9e"
KEPT = Path(__file__).parents[2] / "kept/format-3.tar.gz"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def repository(visibility="private", **files):
    """Its files, and what the commits said."""
    return SimpleNamespace(visibility=visibility, files={".gitattributes": b"", **files}, messages=[])


class Hub(JsonHandler):
    """A small hub of Hugging Face: what it has, what it has heard, and what it says instead of answers."""

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return content

    def answer(self):
        path, body, token, there = urlsplit(self.path).path, self.body(), self.headers.get("Authorization"), self.there
        there.requests.append(f"{self.command} {path}")
        there.heard.set()
        if there.silent:
            Event().wait(60)
        for pattern, refusal in there.refusals.items():
            if re.search(pattern, there.requests[-1]):
                return self.say(*refusal)
        if path.startswith("/large/"):
            # Of a signed URL, where a token would not belong. Large files come before the commit that names them.
            assert token is None and f"/large/{sha256(body).hexdigest()}" == path
            there.large[path.removeprefix("/large/")] = body
            return self.say(200, {})
        if token != f"Bearer {TOKEN}":
            return self.say(401, {"error": "Invalid credentials in Authorization header"})
        code, said = self.said(there, path, [json.loads(line) for line in body.splitlines()])
        self.say(code, said, **({"X-Error-Code": "RepoNotFound"} if code == 404 else {}))

    do_GET = do_POST = do_PUT = answer

    def said(self, there, path, heard):
        """What the endpoints say that its client uses for a push, with the rules of the real one."""
        if path == "/api/repos/create":
            name, code = f"{heard[0]['organization']}/{heard[0]['name']}", 409
            if name not in there.repositories:
                # Older clients say in the first way that it is private.
                visibility = "private" if heard[0].get("private") else heard[0].get("visibility", "public")
                there.repositories[name], code = repository(visibility), 200
            return code, {"url": f"{there.url}/{name}"}
        if path == "/api/validate-yaml":
            about = yaml.safe_load(heard[0]["content"].split("---\n")[1])
            valid = re.fullmatch(r"[a-z0-9.-]+", about.get("license_name", "none")) and "library_name" in about
            return 200 if valid else 400, {"errors": [] if valid else [{"message": "an odd name"}], "warnings": []}
        name, what = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(/.+)?", path).groups()
        if (pushed := there.repositories.get(name)) is None:
            return 404, {"error": "Repository not found"}
        if what == "/tree/main":
            return 200, [{"type": "file", "path": each, "size": 0, "oid": ""} for each in pushed.files]
        if what == "/preupload/main":
            names = [each["path"] for each in heard[0]["files"]]
            modes = {each: "lfs" if each.endswith(".safetensors") else "regular" for each in names}
            return 200, {"files": [{"path": each, "uploadMode": modes[each], "shouldIgnore": False} for each in modes]}
        if what == "/info/lfs/objects/batch":
            for each in heard[0]["objects"]:
                each["actions"] = {"upload": {"href": f"{there.url}/large/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": heard[0]["objects"]}
        if what == "/commit/main":
            for key, value in ((line["key"], line["value"]) for line in heard[1:]):
                if key == "deletedFile":
                    del pushed.files[value["path"]]
                else:
                    content = base64.b64decode(value["content"]) if key == "file" else there.large[value["oid"]]
                    pushed.files[value["path"]] = content
            pushed.messages.append(heard[0]["value"]["summary"])
            return 200, {"commitUrl": f"{there.url}/{name}/commit/1", "commitOid": "1" * 40}
        assert what in (None, "/revision/main")
        return 200, {"id": name, "private": pushed.visibility == "private", "sha": "0" * 40, "siblings": []}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """With a run `pixels` that has scores."""
    with tarfile.open(KEPT) as tar:
        tar.extractall(folder := tmp_path_factory.mktemp("pushing"), filter="data")
    return folder / "bucket"


@pytest.fixture
def server(monkeypatch):
    """A hub that this process finds, with a token that may write. It takes no Xet, the protocol of the real one."""
    there = SimpleNamespace(repositories={}, large={}, requests=[], refusals={}, silent=False, heard=Event())
    with serving(type("Handler", (Hub,), {"there": there})) as there.url:
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


AWAY, REFUSED, NO_TOKEN = Exit.BUCKET_AWAY, Exit.BAD_REQUEST, Exit.NO_PERMISSION
GONE = {"create": (500, "<html>\x1b[31m"), "me/x": (404, {"error": "Repository not found"})}
INVALID = {"validate": (400, {"errors": [{"message": "no"}]})}


@pytest.mark.parametrize(
    ("refusal", "code", "said"),
    [
        ({"create": (401, {"error": "Invalid username or password."})}, NO_TOKEN, "hf auth login"),
        ({"commit": (403, {"error": "Forbidden: pass a write token"})}, NO_TOKEN, "pass a write token"),
        ({"commit": (409, {"error": "main has moved"})}, AWAY, "changed during the push (main has moved)"),
        ({"commit": (413, {"error": "too large"})}, REFUSED, "refuses the push to me/x: too large"),
        (GONE, AWAY, "the hub does not answer"),
        (INVALID, REFUSED, "Invalid metadata in README.md. - no"),
        ({"validate": (502, "<html>")}, AWAY, "the hub does not answer"),
        ({"HF_TOKEN": "hf_odd\x01one"}, NO_TOKEN, "no usable token of the hub: sign in with `hf auth"),
        ({"ENDPOINT": "http://127.0.0.1:9"}, AWAY, "does not answer (Connection refused): check the network"),
        ({"pytorch_model.bin": b"mine"}, REFUSED, "pytorch_model.bin is there already"),
    ],
)
def test_refusals_of_the_hub_are_one_line(bucket, server, monkeypatch, refusal, code, said):
    if "pytorch_model.bin" in refusal:
        server.repositories["me/x"] = repository("public", **refusal)
    server.refusals |= refusal
    monkeypatch.setenv("HF_TOKEN", refusal.get("HF_TOKEN", TOKEN))
    monkeypatch.setattr(constants, "ENDPOINT", refusal.get("ENDPOINT", server.url))
    line = refused(push(bucket, "me/x"), code)
    assert said in line and "\x1b" not in line and "hf_odd" not in line
    assert not server.repositories.get("me/x", repository()).messages


@pytest.mark.slow
def test_a_silent_hub_can_be_left(bucket, server, tmp_path):
    """And what a process takes from the environment alone."""
    words = ("export", "--run", "pixels", "--push", "me/x", "--bucket", shutil.copytree(bucket, tmp_path / "b"))
    for server.silent, code, line in (
        (True, Exit.STOPPED, "stopped by SIGINT while waiting for me/x"),
        (False, Exit.FINISHED, "/me/x  (epoch-0002, weights ema, "),
    ):
        server.heard.clear()
        process = started(*words, HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET="1")
        if server.silent:
            assert server.heard.wait(60)
            process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == code and line in said, said
        assert TOKEN not in said
    assert len(server.repositories["me/x"].messages) == 1
