"""The command line on its good days, from images to pictures, in a folder and on an object server alike."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import job
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.store import Store, open_store
from tests.job.command_line import DDPM, ddpm, ddpm_here, environment, settings, succeeded
from tests.job.some_images import folder_of, jpeg, zip_of

COMMANDS = (
    "",
    "data",
    "data pack",
    "data ensure",
    "data list",
    "data show",
    "data index",
    "data verify",
    "data delete",
    "train",
    "sample",
    "figure",
    "figure schedule",
    "figure noising",
    "figure denoising",
    "runs",
    "runs list",
    "runs show",
    "runs verify",
    "runs prune",
    "submit",
    "submit train",
    "submit sample",
    "submit pack",
    "jobs",
    "jobs list",
    "jobs status",
    "jobs logs",
    "jobs cancel",
    "jobs describe",
)
HEAVY = {"torch", "numpy", "PIL", "matplotlib", "yaml", "rich", "accelerate", "google", "botocore"}


def test_help_explains_every_command_and_imports_nothing_heavy():
    children = {
        command: subprocess.Popen(
            [sys.executable, "-X", "importtime", DDPM, *command.split(), "--help"],
            env=environment(COLUMNS="80"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in COMMANDS
    }
    for command, child in children.items():
        out, timings = child.communicate(timeout=60)
        assert child.returncode == 0, command
        assert out.startswith(f"Usage: ddpm {command}".rstrip()), command
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in timings.splitlines()}
        assert "typer" in imported
        assert not imported & HEAVY, command
        assert max(map(len, out.splitlines())) <= 80, command
        assert f" ddpm {command}".rstrip() in out.partition("Example")[2], command


def test_version():
    assert succeeded(ddpm("--version")) == f"ddpm {job.__version__}\n"
    assert succeeded(ddpm("--version", program=(sys.executable, "-m", "job"))) == f"ddpm {job.__version__}\n"


@pytest.mark.parametrize(("typed", "offered"), [("ddpm ", {"train", "sample", "data"}), ("ddpm data ", {"pack"})])
def test_the_shell_completes_commands(typed, offered):
    words = {"_DDPM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert offered <= set(succeeded(ddpm(**words)).split())


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where local buckets lie, and the cache, which is this module's own."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module", params=["local", "gs"])
def bucket(request: pytest.FixtureRequest, folder: Path) -> str:
    """A bucket with the embedded images at 16 pixels and a run `walk` of two epochs, all made on the command line.

    On the object server the run is made in two attempts; in the folder by a submitted job.
    """
    uri = str(folder / "bucket")
    if request.param == "gs":
        request.getfixturevalue("gcs_server")
        from google.cloud import storage

        name = f"test-{secrets.token_hex(6)}"
        storage.Client(project="test").create_bucket(name)
        uri = f"gs://{name}/some/folder"
    out = succeeded(ddpm("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", uri))
    assert f"{uri}/datasets/tiles-16" in out
    assert "299 colour, 16×16 pixels" in out
    if request.param == "gs":
        out = succeeded(ddpm("train", *about(uri, "walk"), "--epochs", 1))
        assert out.startswith("Run 'walk' is finished: 1 epoch, 312 images seen.\n")
        out = succeeded(ddpm("train", *about(uri, "walk"), "--epochs", 2))
    else:
        out = succeeded(ddpm("submit", "train", *about(uri, "walk"), "--epochs", 2, "--on", "local"))
    assert out.startswith("Run 'walk' is finished: 2 epochs, 600 images seen.\n")
    return uri


@pytest.fixture(scope="module")
def local(folder: Path) -> str:
    """A local bucket with the embedded images at 16 pixels."""
    uri = str(folder / "other-bucket")
    succeeded(ddpm("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", uri))
    return uri


def about(uri: str, run: str) -> list[str]:
    return ["--dataset", "tiles", "--run", run, "--bucket", uri, *settings(checkpoint__every_epochs="1")]


def run_of(uri: str, name: str) -> Store:
    return open_store(uri).sub(f"runs/{name}")


def picture_at(run: Store, key: str) -> Image.Image:
    return Image.open(io.BytesIO(run.read(key).data))


def test_datasets_are_listed_and_shown(bucket):
    header, row = succeeded(ddpm("data", "list", "--bucket", bucket)).splitlines()
    assert header.split()[:4] == ["dataset", "size", "images", "classes"]
    assert row.split()[:4] == ["tiles", "16", "299", "5"]
    out = succeeded(ddpm_here("data", "show", "tiles", "--bucket", bucket))
    counts = {name: int(count) for name, count in re.findall(r"^  (\w+) +(\d+) images$", out, re.MULTILINE)}
    assert sorted(counts) == ["coast", "desert", "hills", "mountain", "skyline"]
    assert sum(counts.values()) == 299
    assert f"contact sheet  {bucket}/datasets/tiles-16/contact-sheet.png" in out
    sheet = picture_at(open_store(bucket), "datasets/tiles-16/contact-sheet.png")
    assert min(sheet.size) > 300
    assert len(sheet.getcolors(1 << 24)) > 1000


def test_a_licence_is_text_and_no_markup(tmp_path):
    licence = "CC0 [/bold] [link=x]:smile:"
    place = ("--bucket", tmp_path / "bucket")
    succeeded(ddpm_here("data", "pack", "landscape-sample", "noted", "--size", 8, "--licence", licence, *place))
    assert succeeded(ddpm_here("data", "list", *place)).rstrip().endswith(licence)


def test_a_finished_run_says_so_and_where_everything_lies(bucket):
    out = succeeded(ddpm("train", *about(bucket, "walk"), "--epochs", 2))
    assert out.startswith("Run 'walk' is finished already: 2 epochs, 600 images seen.\n")
    assert out.endswith("To go on: the same command with more epochs (EPOCHS=4, or --epochs 4).\n")
    run = run_of(bucket, "walk")
    assert f"checkpoints {run.uri}/checkpoints\n" in out
    keys = [uri.removeprefix(f"{run.uri}/") for uri in re.findall(r"^picture +(.*)$", out, re.MULTILINE)]
    assert {"samples/epoch-0002-ddim-4.png", "samples/denoising-epoch-0002.gif", "figures/loss.png"} <= set(keys)
    for key in keys:
        assert len(picture_at(run, key).convert("RGB").getcolors(1 << 24)) > 10
    config = yaml.safe_load(run.read("config.yaml").data)
    assert (config["data"]["size"], config["data"]["channels"], config["model"]["num_classes"]) == (16, 3, 5)
    attempts = [json.loads(run.read(entry.key).data) for entry in run.list("attempts")]
    assert [attempt["changes"] for attempt in attempts] == [{}, {"train.epochs": 2}][: len(attempts)]
    # To ask for fewer epochs than there are is no mistake.
    out = succeeded(ddpm("train", *about(bucket, "walk"), "--epochs", 1))
    assert out.startswith("Run 'walk' is finished already: 2 epochs, 600 images seen.\n")
    assert "EPOCHS=4" in out


def test_several_checkpoints_are_compared(bucket):
    run = run_of(bucket, "walk")
    assert [ref.images_seen for ref in list_checkpoints(run)] == [312, 600]
    words = ("sample", "--run", "walk", "--checkpoints", "1,2", "--seeds", "0-3", "--gif", "--bucket", bucket)
    keys = [
        "samples/epoch-0001-ddim-4-seeds-0-3.png",
        "samples/denoising-epoch-0001-ddim-4-seeds-0-3.gif",
        "samples/epoch-0002-ddim-4-seeds-0-3.png",
        "samples/denoising-epoch-0002-ddim-4-seeds-0-3.gif",
        "samples/comparison-1-2-ddim-4-seeds-0-3.png",
    ]
    printed = [line.split()[0] for line in succeeded(ddpm(*words)).splitlines()]
    assert printed == [run.uri_of(key) for key in keys]
    one, two, both = (picture_at(run, key) for key in (keys[0], keys[2], keys[4]))
    assert np.abs(np.asarray(one, np.int16) - np.asarray(two, np.int16)).max() > 0
    left, right = np.array_split(np.asarray(both, np.int16)[:, : both.width // 2 * 2], 2, axis=1)
    assert 0 < np.abs(left - right).mean() < np.abs(np.roll(left, 96, axis=1) - right).mean()


def test_runs_are_listed_and_shown(bucket):
    _, row = succeeded(ddpm("runs", "list", "--bucket", bucket)).splitlines()
    assert row.split()[:4] == ["walk", "finished", "2.0", "600/600"]
    loss, rate, newest = map(float, row.split()[4:])
    assert 0 < loss < 2
    assert rate > 1
    assert newest == 600
    out = succeeded(ddpm("runs", "show", "walk", "--bucket", bucket))
    assert "state       finished" in out
    assert "images seen 600 of 600" in out
    assert re.search(r"newest +checkpoints/00000[12]-000000000600,", out)
    assert "checkpoints 2: epoch 1, epoch 2" in out


def test_a_dataset_is_verified(local):
    assert "as it was packed" in succeeded(ddpm_here("data", "verify", "tiles", "--bucket", local))


def test_images_are_noised(local, tmp_path):
    output = tmp_path / "n.png"
    words = ("figure", "noising", "--dataset", "tiles", "--timesteps", "0,999", "-o", output, "--bucket", local)
    names = [Path(line).name for line in succeeded(ddpm_here(*words)).splitlines()]
    assert names == ["n.png", "n-original.png", "n-noised.png"]
    original, noised = (np.asarray(Image.open(tmp_path / f"n-{part}.png"), float) for part in ("original", "noised"))
    assert original.shape == noised.shape
    # Half of the picture is the image at t = 0, which is hardly noised, the other at t = 999, where nothing is left.
    half = original.shape[1] // 2
    assert np.abs(original - noised)[:, :half].mean() < 8 < 40 < np.abs(original - noised)[:, half:].mean()


def test_denoising_is_a_gif(bucket):
    out = succeeded(ddpm_here("figure", "denoising", "--run", "walk", "--seeds", "3,5", "--bucket", bucket))
    run = run_of(bucket, "walk")
    gif = picture_at(run, out.strip().removeprefix(f"{run.uri}/"))
    assert (gif.n_frames, gif.info["duration"]) == (20, 200)


def test_the_schedule_needs_no_bucket(tmp_path):
    output = tmp_path / "schedule.png"
    assert succeeded(ddpm_here("figure", "schedule", "--schedule", "cosine", "-o", output)) == f"{output}\n"
    assert Image.open(output).size == (640, 480)


def beside(program: str) -> str:
    return str(Path(sys.executable).with_name(program))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_other_launchers_train_the_same_run(local):
    launchers = {
        "single": (1, "accelerate", "launch --num_processes 1"),
        "pair": (2, "accelerate", f"launch --multi_gpu --num_processes 2 --main_process_port {free_port()}"),
        "torchrun": (2, "torchrun", "--standalone --nproc_per_node 2"),
    }
    # torchrun takes words that begin like its own options for itself, also behind the program, but for `--`.
    module = {"accelerate": "--mixed_precision no --dynamo_backend no -m job", "torchrun": "-m job --"}
    children = {
        run: subprocess.Popen(
            [beside(program), *options.split(), *module[program].split(), "train", *about(local, run), "--epochs", "1"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for run, (_, program, options) in launchers.items()
    }
    for run, (processes, *_) in launchers.items():
        out, _ = children[run].communicate(timeout=200)
        assert children[run].returncode == 0, out
        assert out.count(f"Run '{run}' is finished: 1 epoch, 312 images seen.") == 1
        (ref,) = list_checkpoints(run_of(local, run))
        manifest = load_manifest(run_of(local, run), ref)
        assert (manifest.images_seen, manifest.world_size) == (312, processes)


def eventually(condition: Callable[[], object], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_submitted_job_is_stopped_with_its_command(local, tmp_path):
    """Also in a folder that has a `job` of its own."""
    (tmp_path / "job.py").write_text("raise SystemExit('the wrong job')")
    words = ["submit", "train", *about(local, "sent"), "--on", "local", "--epochs", "1000"]
    child = subprocess.Popen([DDPM, *words], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    eventually(lambda: list_checkpoints(run_of(local, "sent")))
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "everything is saved, and the same command goes on from there" in err


def test_a_detached_job_writes_its_log_where_it_says(local, tmp_path):
    words = ("submit", "train", "--dataset", "other", "--bucket", local, "--detach")
    out = succeeded(ddpm(*words, cwd=tmp_path))
    match = re.search(r"process \d+ .* writes (\S+);", out)
    assert match is not None
    log = Path(match[1])
    eventually(lambda: log.read_text() == f"ddpm: no dataset 'other' in {local}\n")
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_packed_only_if_it_is_not_there(tmp_path):
    photos = folder_of(tmp_path / "photos", [(f"{n}.jpg", jpeg(n)) for n in range(6)])
    words = ("data", "ensure", "mine", "--bucket", tmp_path / "bucket", "--source", photos)
    # Without a preset or a size it is made for the network of the preset it will be trained with.
    assert "6 colour, 32×32 pixels" in succeeded(ddpm(*words))
    assert succeeded(ddpm(*words)) == ""
    assert "6 colour, 16×16 pixels" in succeeded(ddpm(*words, "--size", 16))
    assert succeeded(ddpm(*words)) == ""


def test_listings_leave_out_what_other_people_put_there(local):
    folder = Path(local)
    for name in ("runs/My_Notes/todo.txt", "datasets/notes/todo.txt", "runs/readme.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    assert "My_Notes" not in succeeded(ddpm("runs", "list", "--bucket", local))
    out = succeeded(ddpm("data", "list", "--bucket", local, COLUMNS="40"))
    assert ["tiles", "16", "299"] in [line.split()[:3] for line in out.splitlines()]


def test_a_reader_that_goes_away_is_no_traceback(local):
    child = subprocess.Popen(
        [DDPM, "data", "list", "--bucket", local], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert b"Traceback" not in child.stderr.read()
    child.wait(60)


def test_a_terminal_that_cannot_show_a_character_shows_its_escape(tmp_path):
    photos = zip_of(tmp_path / os.fsdecode(b"caf\xe9.zip"), [(f"{n}.jpg", jpeg(n)) for n in range(3)])
    words = ("data", "pack", photos, "mine", "--size", 16, "--bucket", tmp_path / "bucket")
    out = succeeded(ddpm(*words, PYTHONIOENCODING="ascii"))
    assert "3 colour, 16\\xd716 pixels" in out
    assert "made     from caf%e9.zip" in out


def test_the_bucket_of_the_environment(local):
    assert "tiles" in succeeded(ddpm("data", "list", DDPM_BUCKET=local))
    assert os.environ.get("DDPM_BUCKET", "") != local
