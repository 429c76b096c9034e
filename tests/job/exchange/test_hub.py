"""Pushes to the hub, judged by what a server on this machine receives from the hub's own client."""

from __future__ import annotations

import re
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from job.exits import Exit
from tests.job.command_line import DDPM, ddpm_here, refused, settings, started, succeeded
from tests.job.exchange.hub_server import TOKEN, Hub, Repository, hub

KEPT = Path(__file__).parents[2] / "kept/format-3.tar.gz"


@pytest.fixture(scope="module")
def bucket(tiles, tmp_path_factory):
    """With a run of images that have a licence."""
    bucket = tmp_path_factory.mktemp("pushing") / "bucket"
    source = tmp_path_factory.mktemp("source") / "a"
    shutil.unpack_archive(Path(__file__).parents[3] / "job/datasets/landscape-sample.zip", source)
    words = ("--size", 16, "--licence", 'CC0-1.0, see: the "page"', "--no-classes", "--bucket", bucket)
    succeeded(ddpm_here("data", "pack", source, "tiles", *words))
    train = ("train", "--dataset", "tiles", "--run", "r", "--epochs", 1, "--bucket", bucket)
    succeeded(ddpm_here(*train, *settings()))
    return bucket


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
    done = ddpm_here("export", "--run", "r", "--push", to, "--bucket", bucket, *more)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_a_push_is_a_private_commit_of_the_export(bucket, server: Hub, tmp_path):
    done = push(bucket, "my-org/tiles.16")
    assert succeeded(done).startswith(f"{server.url}/my-org/tiles.16  (epoch-0001, weights ema, ")
    assert f"my-org/tiles.16 is private: {server.url}/my-org/tiles.16/settings makes it public" in done.stderr
    pushed = server.repositories["my-org/tiles.16"]
    assert pushed.visibility == "private"
    assert len(pushed.messages) == 1
    assert pushed.messages[0].startswith("r, epoch-0001, weights ema, ")
    # The same objects as in a folder; the card has the name by which diffusers finds them.
    succeeded(ddpm_here("export", "--run", "r", "--to", tmp_path / "out", "--bucket", bucket))
    folder = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert pushed.files.keys() == folder.keys() | {".gitattributes"}
    assert {key for key, path in folder.items() if path.read_bytes() != pushed.files[key]} == {"README.md"}
    assert [*server.large.values()] == [pushed.files["unet/diffusion_pytorch_model.safetensors"]]
    card = pushed.files["README.md"].decode()
    assert 'DDIMPipeline.from_pretrained("my-org/tiles.16")' in card
    assert 'Licence of the images: CC0-1.0, see: the "page".' in card
    assert "with the preset `landscape-sample`: 312 images seen" in card
    assert yaml.safe_load(card.split("---\n")[1])["license_name"] == "cc0-1.0-see-the-page"


def test_a_second_push_replaces_the_first(bucket, server: Hub):
    server.repositories["me/tiles"] = Repository("public")
    done = push(bucket, "me/tiles")
    succeeded(done)
    assert "private" not in done.stderr
    mine = server.repositories["me/tiles"]
    # Nothing has changed: there is nothing to commit.
    succeeded(push(bucket, "me/tiles"))
    assert len(mine.messages) == 1
    parts = [f"unet/diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    mine.files |= dict.fromkeys((*parts, "LICENSE", "unet/notes.txt"), b"before")
    before = dict(mine.files)
    done = push(bucket, "me/tiles", "--weights", "model")
    succeeded(done)
    # The picture was drawn with the averages.
    assert mine.files.keys() == before.keys() - {*parts, "grid.png"}
    assert mine.files["LICENSE"] == mine.files["unet/notes.txt"] == b"before"
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert mine.files[weights] != before[weights]
    assert mine.files["README.md"] != before["README.md"]
    assert len(mine.messages) == 2


def test_repositories_of_something_else_stay(bucket, server: Hub):
    server.repositories["me/bert"] = Repository("public")
    server.repositories["me/bert"].files["pytorch_model.bin"] = b"mine"
    assert "pytorch_model.bin is there already" in refused(push(bucket, "me/bert"), Exit.BAD_REQUEST)
    assert server.repositories["me/bert"].messages == []
    assert [request for request in server.requests if "/commit/" in request] == []


@pytest.mark.parametrize(
    "name", ["tiles", "me/", "/tiles", "me/a/b", "../tiles", "me/a--b", "me/a.git", "https://hf.co/me/a", "me/\x1b[1m"]
)
def test_names_are_checked_first(server: Hub, tmp_path, name):
    line = refused(push(tmp_path / "no-bucket", name), Exit.BAD_REQUEST)
    assert "--push" in line
    assert "\x1b" not in line
    assert server.requests == []


def test_folder_or_hub(bucket, server: Hub, tmp_path):
    for more in ((), ("--to", tmp_path / "x", "--push", "me/x")):
        done = ddpm_here("export", "--run", "r", "--bucket", bucket, *more)
        assert "either --to FOLDER or --push ORG/NAME" in refused(done, Exit.BAD_REQUEST)
    assert server.requests == []
    assert not (tmp_path / "x").exists()


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
    ],
)
def test_refusals_of_the_hub_are_one_line(bucket, server: Hub, refusal, code, said):
    server.refusals |= refusal
    line = refused(push(bucket, "me/x"), code)
    assert said in line
    assert "\x1b" not in line
    assert not server.repositories.get("me/x", Repository("private")).messages


def test_what_a_machine_lacks_is_said(bucket, server: Hub, monkeypatch):
    line = refused(push(bucket, "others/x"), Exit.NO_PERMISSION)
    assert (
        'may not write to others/x (You don\'t have the rights to create a model under the namespace "others")' in line
    )
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "does not accept the token" in refused(push(bucket, "me/x"), Exit.NO_PERMISSION)
    before = len(server.requests)
    monkeypatch.delenv("HF_TOKEN")
    assert "no usable token of the hub: sign in with `hf auth" in refused(push(bucket, "me/x"), Exit.NO_PERMISSION)
    monkeypatch.setenv("HF_TOKEN", "hf_odd\x01one")
    assert "hf_odd" not in refused(push(bucket, "me/x"), Exit.NO_PERMISSION)
    assert len(server.requests) == before
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refused(push(bucket, "me/x"), Exit.BUCKET_AWAY)
    assert "the hub does not answer (Connection refused): check the network" in line


def test_cards_have_the_scores_of_their_checkpoint(server: Hub, tmp_path):
    with tarfile.open(KEPT) as tar:
        tar.extractall(tmp_path, filter="data")
    words = ("--push", "me/pixels", "--bucket", tmp_path / "bucket")
    succeeded(ddpm_here("export", "--run", "pixels", *words))
    card = server.repositories["me/pixels"].files["README.md"].decode()
    pattern = r"^Scores of 12 images by \w+ in \d+ steps, against .+ images of kept-8 .+: .*fd-mobilenet [\d.]+ \(real"
    assert re.search(pattern, card, re.MULTILINE)
    succeeded(ddpm_here("export", "--run", "pixels", *words, "--weights", "model"))
    assert "Scores" not in server.repositories["me/pixels"].files["README.md"].decode()


@pytest.mark.slow
def test_a_silent_hub_can_be_left(bucket):
    """And what a process takes from the environment alone."""
    with hub() as there:
        there.silent = True
        variables = {"HF_ENDPOINT": there.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        process = started("export", "--run", "r", "--push", "me/x", "--bucket", bucket, program=(DDPM,), **variables)
        assert there.heard.wait(60)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
        assert process.returncode == Exit.STOPPED
        assert "stopped by SIGINT while pushing" in said
        there.silent = False
        again = started("export", "--run", "r", "--push", "me/x", "--bucket", bucket, program=(DDPM,), **variables)
        said, _ = again.communicate(timeout=60)
        assert again.returncode == 0, said
        assert TOKEN not in said
    assert len(there.repositories["me/x"].messages) == 1
