"""Pushes to the hub, judged by what a server on this machine receives from the hub's own client."""

import re
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from job.exits import Exit
from tests.job.command_line import DDPM, ddpm_here, refused, started, succeeded
from tests.job.exchange.hub_server import TOKEN, Repository, hub

KEPT = Path(__file__).parents[2] / "kept/format-3.tar.gz"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


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


NOT_FOUND = {"error": "Repository not found"}


@pytest.mark.parametrize(
    ("refusal", "code", "said"),
    [
        ({"create": (401, {"error": "Invalid username or password."})}, Exit.NO_PERMISSION, "hf auth login"),
        ({"commit": (403, {"error": "Forbidden: pass a write token"})}, Exit.NO_PERMISSION, "pass a write token"),
        ({"commit": (409, {"error": "main has moved"})}, Exit.BUCKET_AWAY, "changed during the push (main has moved)"),
        ({"commit": (413, {"error": "too large"})}, Exit.BAD_REQUEST, "refuses the push to me/x: too large"),
        ({"create": (500, "<html>\x1b[31m"), "me/x": (404, NOT_FOUND)}, Exit.BUCKET_AWAY, "the hub does not answer"),
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
        said, _ = process.communicate(timeout=20)
        assert process.returncode == Exit.STOPPED
        assert "stopped by SIGINT while waiting for me/x" in said
        there.silent = False
        again = started(*words, program=(DDPM,), **variables)
        said, _ = again.communicate(timeout=60)
        assert again.returncode == 0, said
        assert TOKEN not in said
    assert len(there.repositories["me/x"].messages) == 1
