"""The command line on its good days, from images to pictures, in a folder; `test_security` uses an object server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

import job
from job.cli.app import app
from job.exits import Exit
from tests.job.command_line import DDPM, ddpm, ddpm_here, environment, refused, succeeded
from tests.job.some_images import folder_of, jpeg, zip_of

HEAVY = {"torch", "numpy", "PIL", "matplotlib", "yaml", "rich", "accelerate", "google", "botocore"}


def commands(group, path: str = "") -> list[str]:
    """The words of every command and group."""
    found = [path]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, f"{path} {name}".strip())
    return found


def test_help_is_whole_and_light():
    names = commands(typer.main.get_command(app))
    assert len(names) > 30
    for name in names:
        out = succeeded(ddpm_here(*name.split(), "--help", COLUMNS="80"))
        assert out.startswith("Usage: "), name
        assert max(map(len, out.splitlines())) <= 80, name
        assert f" ddpm {name}".rstrip() in out.partition("Example")[2], name
        assert not [line for line in out.splitlines()[1:] if line.endswith("...")], name
    for name in ("", "submit train", "jobs logs"):
        words = [sys.executable, "-X", "importtime", DDPM, *name.split(), "--help"]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.startswith(f"Usage: ddpm {name}".rstrip())
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "typer" in imported
        assert not imported & HEAVY, name


def test_version_and_completion():
    assert succeeded(ddpm("--version")) == f"ddpm {job.__version__}\n"
    assert succeeded(ddpm("--version", program=(sys.executable, "-m", "job"))) == f"ddpm {job.__version__}\n"
    words = {"_DDPM_COMPLETE": "complete_bash", "COMP_WORDS": "ddpm data ", "COMP_CWORD": "2"}
    assert {"pack", "list"} <= set(succeeded(ddpm(**words)).split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("train --bucket {} --dataset t", ["tiles"]),
        ("submit train --bucket {} --dataset t", ["tiles"]),
        ("runs compare walk --bucket {} w", ["walk"]),
        ("config --preset landscape-", ["landscape-sample"]),
        ("import --set train.batch", ["train.batch_size="]),
        ("sample --grid l", ["leading", "linspace", "log_snr"]),
        ("submit train --on lo", ["local"]),
    ],
)
def test_values_are_completed(bucket, words, offered):
    words = f"ddpm {words.format(bucket)}"
    count = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    assert succeeded(ddpm(_DDPM_COMPLETE="complete_bash", **count)).split() == offered


def test_datasets_are_listed_and_shown(bucket):
    header, row = succeeded(ddpm_here("data", "list", "--bucket", bucket)).splitlines()
    assert header.split()[:4] == ["dataset", "size", "images", "classes"]
    assert row.split()[:4] == ["tiles", "16", "299", "5"]
    out = succeeded(ddpm_here("data", "show", "tiles", "--bucket", bucket))
    counts = {name: int(count) for name, count in re.findall(r"^  (\w+) +(\d+) images$", out, re.MULTILINE)}
    assert sorted(counts) == ["coast", "desert", "hills", "mountain", "skyline"]
    assert sum(counts.values()) == 299
    assert f"look at  {bucket}/datasets/tiles-16/preview.png" in out
    sheet = Image.open(bucket / "datasets/tiles-16/preview.png")
    assert min(sheet.size) > 300
    assert len(sheet.getcolors(1 << 24)) > 1000


def test_a_finished_run_lists_its_results(bucket):
    # To ask for fewer epochs than there are is no mistake.
    for epochs in (3, 1):
        words = ("--dataset", "tiles", "--run", "walk", "--bucket", bucket, "--epochs", epochs)
        out = succeeded(ddpm_here("train", *words))
        assert out.splitlines() == [
            "Run 'walk' is finished already: 3 epochs, 912 images seen.",
            f"page        {bucket}/runs/walk/report.html",
            f"samples     {bucket}/runs/walk/samples/epoch-0003-ddim-4.png",
            "train more  add --epochs 6 (make: EPOCHS=6)",
        ]
    run = bucket / "runs/walk"
    pictures = [run / name for name in ("samples/epoch-0003-ddim-4.png", "figures/loss.png")]
    assert all(len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 10 for path in pictures)
    config = yaml.safe_load((run / "config.yaml").read_bytes())
    assert (config["data"]["size"], config["data"]["channels"], config["model"]["num_classes"]) == (16, 3, 5)


def test_runs_are_listed_and_shown(bucket):
    _, row = succeeded(ddpm_here("runs", "list", "--bucket", bucket)).splitlines()
    assert row.split()[:4] == ["walk", "finished", "3.0", "912/912"]
    loss, rate, left, as_of = row.replace(",", "").split()[4:]
    assert left == "-"
    assert 0 < float(loss) < 2
    assert float(rate) > 1
    assert abs(datetime.now(UTC) - datetime.fromisoformat(as_of)) < timedelta(hours=1)
    out = succeeded(ddpm_here("runs", "show", "walk", "--bucket", bucket))
    assert "state       finished" in out
    assert "images seen 912 of 912" in out
    assert "newest      checkpoints/000001-000000000912," in out
    assert "checkpoints 2: epoch 1, epoch 3" in out
    assert re.search(r"^attempt 1   20\d\d-.* on .*, 1 × .*, code 0\.", out, re.MULTILINE)
    run = bucket / "runs/walk"
    assert out.startswith(f"run         walk  ({run})\n") and out.endswith(f"page        {run}/report.html\n")


def test_images_are_noised(bucket, tmp_path):
    output = tmp_path / "n.png"
    words = ("figure", "noising", "--dataset", "tiles", "--timesteps", "0,999", "-o", output, "--bucket", bucket)
    names = [Path(line).name for line in succeeded(ddpm_here(*words)).splitlines()]
    assert names == ["n.png", "n-original.png", "n-noised.png"]
    original, noised = (np.asarray(Image.open(tmp_path / f"n-{part}.png"), float) for part in ("original", "noised"))
    assert original.shape == noised.shape
    # Half of the picture is the image at t = 0, which is hardly noised, the other at t = 999, where nothing is left.
    half = original.shape[1] // 2
    assert np.abs(original - noised)[:, :half].mean() < 8 < 40 < np.abs(original - noised)[:, half:].mean()


def test_one_image_gets_noisier_by_the_schedule_of_a_run(bucket, tmp_path):
    output, walk = tmp_path / "n.png", ("--run", "walk", "--bucket", bucket)
    assert succeeded(ddpm_here("figure", "noising", *walk, "--image", 3, "-o", output)) == f"{output}\n"
    # Tiles of 6 times 16 pixels, with captions under them.
    picture = np.asarray(Image.open(output).convert("RGB"), float)
    top = np.flatnonzero((picture[:, 4:100] < 255).any(axis=2).all(axis=1))[0]
    tiles = [picture[y : y + 96, 4 + 100 * x : 100 + 100 * x] for y in (top, top + 126) for x in range(6)]
    distances = [np.abs(tile - tiles[0]).mean() for tile in tiles]
    assert distances == sorted(distances) and distances[11] > 60
    # It has 50 timesteps, and plots differ in their titles alone.
    plots = []
    for words in (walk, ("--schedule", "cosine", "--timesteps", 50), ("--schedule", "cosine")):
        succeeded(ddpm_here("figure", "schedule", *words, "-o", output))
        plots.append(np.asarray(Image.open(output))[35:])
    assert np.array_equal(plots[0], plots[1]) and not np.array_equal(plots[0], plots[2])
    assert "99 is not in 0 to 49" in refused(ddpm_here("figure", "noising", *walk, "--timesteps", 99), Exit.BAD_REQUEST)
    line = refused(ddpm_here("figure", "schedule", *walk, "--schedule", "edm"), Exit.BAD_REQUEST)
    assert "run 'walk' has a schedule of its own" in line


def test_denoising_is_a_gif(bucket):
    out = succeeded(ddpm_here("sample", "--run", "walk", "--seeds", "3,5", "--gif", "--bucket", bucket))
    gif = Image.open(out.split()[-1])
    assert (gif.n_frames, gif.info["duration"]) == (5, 200)


@pytest.mark.parametrize("kind", ["cosine", "edm", "flow"])
def test_the_schedule_needs_no_bucket(tmp_path, kind):
    output = tmp_path / "schedule.png"
    assert succeeded(ddpm_here("figure", "schedule", "--schedule", kind, "-o", output)) == f"{output}\n"
    assert Image.open(output).size == (640, 480)


def test_ensure_packs_only_a_missing_dataset(tmp_path):
    photos = folder_of(tmp_path / "photos", [(f"{n}.jpg", jpeg(n)) for n in range(6)])
    words = ("data", "ensure", "mine", "--bucket", tmp_path / "bucket", "--source", photos)
    # Without a preset or a size it is made for the network of the preset it will be trained with.
    assert "6 colour, 32×32 pixels" in succeeded(ddpm_here(*words))
    done = ddpm_here(*words)
    there, said = f"{tmp_path}/bucket/datasets/mine", "is there already: 6 images of photos"
    same = f"{said}; SOURCE has not changed"
    assert (succeeded(done), done.stderr) == ("", f"{there}-32 {same}\n")
    done = ddpm_here(*words[:-2])
    assert (succeeded(done), done.stderr) == ("", f"{there}-32 {said}\n")
    assert "6 colour, 16×16 pixels" in succeeded(ddpm_here(*words, "--size", 16))
    done = ddpm_here(*words, "--size", 16, "--no-classes")
    assert done.stderr == f"{there}-16 {same}\n"
    done = ddpm_here(*words[:-2], "--size", 16, "--no-classes")
    assert done.stderr == f"{there}-16 {said}; labels, classes and split stay as they are\n"
    done = ddpm_here(*words)
    assert done.stderr == f"{there} is there already, at several sizes; SOURCE is not compared\n"
    assert succeeded(ddpm_here(*words[:-2])) == done.stdout == ""


def test_a_tilde_is_the_home_folder(tmp_path):
    """In words that no shell expands: zsh and dash leave `make SOURCE=~/photos` as it is."""
    folder_of(tmp_path / "photos", [(f"{n}.jpg", jpeg(n)) for n in range(4)])
    (tmp_path / "labels.csv").write_text("file,label\n0.jpg,a\n1.jpg,b\n2.jpg,a\n3.jpg,b\n")
    (tmp_path / "mine.yaml").write_text("far: {backend: mars}")
    words = ("data", "pack", "~/photos", "mine", "--size", 8, "--labels", "~/labels.csv", "--bucket", "~/bucket")
    out = succeeded(ddpm_here(*words, HOME=str(tmp_path)))
    assert f"({tmp_path}/bucket/datasets/mine-8)" in out and "classes  a, b" in out
    for words in (("jobs", "list", "--on", "far", "--targets"), ("train", "--dataset", "mine", "--config")):
        assert "far" in refused(ddpm_here(*words, "~/mine.yaml", HOME=str(tmp_path)), Exit.BAD_CONFIG)


def test_listings_leave_out_foreign_objects(bucket):
    licence = "CC0 [/bold] [link=x]:smile:"
    place = ("--bucket", bucket)
    succeeded(ddpm_here("data", "pack", "landscape-sample", "noted", "--size", 8, "--licence", licence, *place))
    for name in ("runs/My_Notes/todo.txt", "datasets/notes/todo.txt", "runs/readme.txt"):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_text("mine")
    assert "My_Notes" not in succeeded(ddpm_here("runs", "list", *place))
    out = succeeded(ddpm_here("data", "list", DDPM_BUCKET=str(bucket), COLUMNS="40"))
    assert ["tiles", "16", "299"] in [line.split()[:3] for line in out.splitlines()]
    assert licence in succeeded(ddpm_here("data", "list", *place, COLUMNS="200"))


def test_an_ascii_terminal_gets_escapes(tmp_path):
    photos = zip_of(tmp_path / os.fsdecode(b"caf\xe9.zip"), [(f"{n}.jpg", jpeg(n)) for n in range(3)])
    words = ("data", "pack", photos, "mine", "--size", 16, "--bucket", tmp_path / "bucket")
    out = succeeded(ddpm(*words, PYTHONIOENCODING="ascii"))
    assert "3 colour, 16\\xd716 pixels" in out
    assert "made     from caf%E9.zip" in out


def test_exit_handlers_of_libraries_run():
    program = "import atexit; atexit.register(print, 'cleared away'); from job.__main__ import main; main()"
    for words, code in (("--version", Exit.FINISHED), ("--nonsense", Exit.USAGE)):
        done = subprocess.run([sys.executable, "-c", program, words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "cleared away")
