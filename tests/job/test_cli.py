"""The command line on its good days, from images to pictures, in a folder; `test_security` uses an object server.

And what a script and a notebook call instead: `job.load` and `ddpm.load`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import ddpm as science
import job
from job.cli.app import app
from job.exits import BadConfigError, BadRequestError, Exit, JobError, MissingInputError
from job.runs.checkpoints import list_checkpoints
from job.store import open_store
from tests.job.command_line import (
    COMMANDS,
    DDPM,
    NETWORK,
    ddpm,
    ddpm_here,
    environment,
    ran,
    refuses,
    settings,
    succeeded,
)  # fmt: skip
from tests.job.launching import eventually
from tests.job.some_images import folder_of, jpeg, png, zip_of

HEAVY = {"torch", "numpy", "PIL", "matplotlib", "yaml", "rich", "accelerate", "google", "botocore"}


def commands(group, path: str = "") -> list[str]:
    """The words of every command and group."""
    named = getattr(group, "commands", {}).items()
    return [path, *(found for name, command in named for found in commands(command, f"{path} {name}".strip()))]


def test_help_is_whole_and_light():
    names = commands(COMMANDS)
    assert len(names) > 30
    for name in names:
        out = ran(*name.split(), "--help", COLUMNS="80")
        assert out.startswith("Usage: ") and max(map(len, out.splitlines())) <= 80, name
        assert f" ddpm {name}".rstrip() in out.partition("Example")[2], name
        assert not [line for line in out.splitlines()[1:] if line.endswith("...")], name
    for name in ("", "submit train", "jobs logs"):
        done = ddpm(*name.split(), "--help", program=(sys.executable, "-X", "importtime", DDPM))
        assert done.stdout.startswith(f"Usage: ddpm {name}".rstrip())
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "typer" in imported and not imported & HEAVY, name


def test_processes_end_well(tmp_path):
    assert succeeded(ddpm("--version")) == f"ddpm {job.__version__}\n"
    assert succeeded(ddpm("--version", program=(sys.executable, "-m", "job"))) == f"ddpm {job.__version__}\n"
    # Exit handlers of libraries run.
    program = "import atexit; atexit.register(print, 'cleared away'); from job.__main__ import main; main()"
    for words, code in (("--version", Exit.FINISHED), ("--nonsense", Exit.USAGE)):
        done = ddpm(words, program=(sys.executable, "-c", program))
        assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "cleared away")
    # A terminal that is an ASCII one gets escapes.
    photos = zip_of(tmp_path / os.fsdecode(b"caf\xe9.zip"), [(f"{n}.jpg", jpeg(n)) for n in range(3)])
    words = ("data", "pack", photos, "mine", "--size", 16, "--bucket", tmp_path / "bucket")
    out = succeeded(ddpm(*words, PYTHONIOENCODING="ascii"))
    assert "3 colour, 16\\xd716 pixels" in out
    assert "made     from caf%E9.zip" in out


OFFERED = {
    "list": "data li",
    "walk": "runs show |sample --run w|report |runs compare walk --bucket {} w",
    "tiles": "train --dataset t|data show |train --bucket {} --dataset t|submit train --bucket {} --dataset t",
    "landscape-sample": "train --preset landscape-|config --preset landscape-",
    "train.batch_size=": "config --set train.batch|import --set train.batch",
    "local": "doctor --on loc|submit train --on lo",
    "train-walk": "jobs status train-",
    "dpmpp_3m": "sample --run walk --sampler dpmpp_3",
    "leading linspace log_snr": "sample --grid l",
    "karras": "evaluate --run walk --grid kar",
    "mobilenet": "evaluate --run walk --extractor mob",
}


def test_a_shell_offers_names(bucket, tmp_path):
    """What bash gets when somebody presses the tabulator after these words."""
    folder_of(bucket, [("jobs/train-walk/0-of-1.json", b"{}")])

    def about(words, place):
        typed = {"COMP_WORDS": f"ddpm {words}", "COMP_CWORD": str(words.count(" ") + 1)}
        typed |= {} if "--bucket" in words else {"DDPM_BUCKET": str(place)}
        return {"_DDPM_COMPLETE": "complete_bash", **typed}

    for offered, lines in OFFERED.items():
        for words in lines.format(bucket, bucket).split("|"):
            done = CliRunner().invoke(app, prog_name="ddpm", env=about(words, bucket))
            assert done.stdout.split() == offered.split(), (words, done.stderr)
    assert CliRunner().invoke(app, prog_name="ddpm", env=about("runs show ", tmp_path / "no")).output.strip() == ""
    assert succeeded(ddpm(**about("sample --run w", bucket))) == "walk\n"


def test_datasets_are_listed_and_shown(bucket):
    place, licence = ("--bucket", bucket), "CC0 [/bold] [link=x]:smile:"
    header, row = ran("data", "list", *place).splitlines()
    assert header.split()[:4] == ["dataset", "size", "images", "classes"]
    assert row.split()[:4] == ["tiles", "16", "299", "5"]
    out = ran("data", "show", "tiles", *place)
    counts = {name: int(count) for name, count in re.findall(r"^  (\w+) +(\d+) images$", out, re.MULTILINE)}
    assert sorted(counts) == ["coast", "desert", "hills", "mountain", "skyline"]
    assert sum(counts.values()) == 299
    assert f"look at  {bucket}/datasets/tiles-16/preview.png" in out
    sheet = Image.open(bucket / "datasets/tiles-16/preview.png")
    assert min(sheet.size) > 300 and len(sheet.getcolors(1 << 24)) > 1000
    # Listings leave out foreign objects, and obey no markup.
    ran("data", "pack", "landscape-sample", "noted", "--size", 8, "--licence", licence, *place)
    folder_of(bucket, [(name, b"mine") for name in ("runs/My_Notes/todo", "datasets/notes/todo.txt", "runs/readme")])
    assert "My_Notes" not in ran("runs", "list", *place)
    out = ran("data", "list", DDPM_BUCKET=str(bucket), COLUMNS="40")
    assert ["tiles", "16", "299"] in [line.split()[:3] for line in out.splitlines()]
    assert licence in ran("data", "list", *place, COLUMNS="200")


def test_a_finished_run_is_listed_and_shown(bucket):
    run, place = bucket / "runs/walk", ("--bucket", bucket)
    # To ask for fewer epochs than there are is no mistake.
    for epochs in (3, 1):
        out = ran("train", "--dataset", "tiles", "--run", "walk", *place, "--epochs", epochs)
        assert out.splitlines() == [
            "Run 'walk' is finished already: 3 epochs, 912 images seen.",
            f"page        {run}/report.html",
            f"samples     {run}/samples/epoch-0003-ddim-4.png",
            "train more  add --epochs 6 (make: EPOCHS=6)",
        ]
    pictures = [run / name for name in ("samples/epoch-0003-ddim-4.png", "figures/loss.png")]
    assert all(len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 10 for path in pictures)
    config = yaml.safe_load((run / "config.yaml").read_bytes())
    assert (config["data"]["size"], config["data"]["channels"], config["model"]["num_classes"]) == (16, 3, 5)

    _, row = ran("runs", "list", *place).splitlines()
    assert row.split()[:4] == ["walk", "finished", "3.0", "912/912"]
    loss, rate, left, as_of = row.replace(",", "").split()[4:]
    assert left == "-" and 0 < float(loss) < 2 and float(rate) > 1
    assert abs(datetime.now(UTC) - datetime.fromisoformat(as_of)) < timedelta(hours=1)
    out = ran("runs", "show", "walk", *place)
    lines = ("state       finished", "images seen 912 of 912", "newest      checkpoints/000001-000000000912,")
    assert all(line in out for line in (*lines, "checkpoints 2: epoch 1, epoch 3"))
    assert re.search(r"^attempt 1   20\d\d-.* on .*, 1 × .*, code 0\.", out, re.MULTILINE)
    assert out.startswith(f"run         walk  ({run})\n") and out.endswith(f"page        {run}/report.html\n")


def test_figures_of_noise_follow_the_schedule(bucket, tmp_path):
    output, walk = tmp_path / "n.png", ("--run", "walk", "--bucket", bucket)
    words = ("figure", "noising", "--dataset", "tiles", "--timesteps", "0,999", "-o", output, "--bucket", bucket)
    names = [Path(line).name for line in ran(*words).splitlines()]
    assert names == ["n.png", "n-original.png", "n-noised.png"]
    original, noised = (np.asarray(Image.open(tmp_path / f"n-{part}.png"), float) for part in ("original", "noised"))
    assert original.shape == noised.shape
    # Half of the picture is the image at t = 0, which is hardly noised, the other at t = 999, where nothing is left.
    half = original.shape[1] // 2
    assert np.abs(original - noised)[:, :half].mean() < 8 < 40 < np.abs(original - noised)[:, half:].mean()

    # One image gets noisier by the schedule of a run, in tiles of 6 times 16 pixels, with captions under them.
    assert ran("figure", "noising", *walk, "--image", 3, "-o", output) == f"{output}\n"
    picture = np.asarray(Image.open(output).convert("RGB"), float)
    top = np.flatnonzero((picture[:, 4:100] < 255).any(axis=2).all(axis=1))[0]
    tiles = [picture[y : y + 96, 4 + 100 * x : 100 + 100 * x] for y in (top, top + 126) for x in range(6)]
    distances = [np.abs(tile - tiles[0]).mean() for tile in tiles]
    assert distances == sorted(distances) and distances[11] > 60
    late, own = ("figure noising --timesteps 99", "figure schedule --schedule edm")
    refuses([(late, 64, "99 is not in 0 to 49"), (own, 64, "run 'walk' has a schedule of its own")], *walk)

    # That run has 50 timesteps, and plots differ in their titles alone. Other schedules need no bucket.
    plots = []
    for which in ("cosine --timesteps 50", "cosine", "edm", "flow", walk):
        words = ("--schedule", *which.split()) if isinstance(which, str) else which
        assert ran("figure", "schedule", *words, "-o", output) == f"{output}\n"
        plots.append(np.asarray(Image.open(output)))
        assert plots[-1].shape[:2] == (480, 640)
    assert [np.array_equal(plots[-1][35:], plot[35:]) for plot in plots] == [True, False, False, False, True]


def test_ensure_packs_only_a_missing_dataset(tmp_path):
    photos = folder_of(tmp_path / "photos", [(f"{n}.jpg", jpeg(n)) for n in range(6)])
    words = ("data", "ensure", "mine", "--bucket", tmp_path / "bucket")
    there, said = f"{tmp_path}/bucket/datasets/mine", "is there already: 6 images of photos"
    compared = f"{said}; SOURCE has not changed"
    # Without a preset or a size it is made for the network of the preset it will be trained with.
    for more, packed, line in (
        (("--source", photos), "6 colour, 32×32 pixels", ""),
        (("--source", photos), "", f"-32 {compared}"),
        ((), "", f"-32 {said}"),
        (("--source", photos, "--size", 16), "6 colour, 16×16 pixels", ""),
        (("--source", photos, "--size", 16, "--no-classes"), "", f"-16 {compared}"),
        (("--size", 16, "--no-classes"), "", f"-16 {said}; labels, classes and split stay as they are"),
        (("--source", photos), "", " is there already, at several sizes; SOURCE is not compared"),
        ((), "", ""),
    ):
        done = ddpm_here(*words, *more)
        assert packed in succeeded(done) and bool(packed) == bool(done.stdout)
        assert not line or done.stderr == f"{there}{line}\n"


def test_a_tilde_is_the_home_folder(tmp_path):
    """In words that no shell expands: zsh and dash leave `make SOURCE=~/photos` as it is."""
    folder_of(tmp_path / "photos", [(f"{n}.jpg", jpeg(n)) for n in range(4)])
    (tmp_path / "labels.csv").write_text("file,label\n0.jpg,a\n1.jpg,b\n2.jpg,a\n3.jpg,b\n")
    (tmp_path / "mine.yaml").write_text("far: {backend: mars}")
    words = ("data", "pack", "~/photos", "mine", "--size", 8, "--labels", "~/labels.csv", "--bucket", "~/bucket")
    out = ran(*words, HOME=str(tmp_path))
    assert f"({tmp_path}/bucket/datasets/mine-8)" in out and "classes  a, b" in out
    rows = [
        (words, Exit.BAD_CONFIG, "far") for words in ("jobs list --on far --targets", "train --dataset mine --config")
    ]
    refuses(rows, "~/mine.yaml", HOME=str(tmp_path))


def pixels(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def test_a_loaded_model_draws_what_the_command_does(bucket):
    model = job.load(f"{bucket}/runs/walk", device="cpu")
    for number, words, options in (
        (3, "", {}),
        (4, "--sampler ddpm", {"sampler": "ddpm"}),
        (5, "--classes hills,coast --steps 7", {"classes": ["hills", 0], "steps": 7}),
    ):
        about = ("--run", "walk", "--bucket", bucket, "--count", 6, "--save", "png", "--first-seed", number)
        ran("sample", *about, *words.split())
        (folder,) = (bucket / "runs/walk/samples").glob(f"epoch-0003-*-{number}-6-*")
        theirs = pixels([Image.open(path) for path in sorted(folder.glob("piece-*/*.png"))])
        assert abs(pixels(model.sample(6, seed=number, **options)) - theirs).max() <= 1


def test_epochs_and_weights_are_chosen(bucket):
    def drawn(**which):
        return job.load(f"{bucket}/runs/walk/", device="cpu", **which).sample(2, steps=4, as_tensor=True)

    last = drawn(epoch=3)
    assert (last != drawn(epoch=1)).any()
    assert (last != drawn(weights="model")).any()
    average = job.load(f"{bucket}/runs/walk/", weights="ema-0.1", device="cpu")
    assert average.classes == ("coast", "desert", "hills", "mountain", "skyline")
    for uri, which, error, said in (
        ("walk", {}, BadRequestError, "is not the folder of a run: use one such as gs://my-bucket/runs/celeba"),
        ("runs/walking", {}, MissingInputError, "there is no run 'walking'"),
        ("runs/walk", {"epoch": 2}, MissingInputError, r"has no checkpoint of epoch 2: .* \(there are: 1, 3\)"),
    ):
        with pytest.raises(error, match=said):
            job.load(f"{bucket}/{uri}", **which)
    gif = Image.open(ran("sample", "--run", "walk", "--seeds", "3,5", "--gif", "--bucket", bucket).split()[-1])
    assert (gif.n_frames, gif.info["duration"]) == (5, 200)


def test_an_export_is_the_same_model(bucket, tmp_path):
    augmented = ("--run", "augmented", "--epochs", 1, *settings(data__augment="0.1", sample__every_epochs="0"))
    ran("train", "--dataset", "tiles", *augmented, "--bucket", bucket)
    for run in ("augmented", "walk"):
        folder = tmp_path / run
        ran("export", "--run", run, "--bucket", bucket, "--to", folder)
        there, here = science.load(folder, device="cpu"), job.load(f"{bucket}/runs/{run}", device="cpu")
        for options in ({}, {"classes": "hills"}):
            assert (pixels(there.sample(2, steps=2, **options)) == pixels(here.sample(2, steps=2, **options))).all()
    what = "Model(UNet, 64,643 parameters, images 3×16×16, prediction v, schedule cosine, 5 classes, from "
    assert (repr(here), repr(there)) == (f"{what}{bucket}/runs/walk, epoch 3, weights ema)", f"{what}{folder})")


def test_who_may_only_read_may_load(walked):
    """From a bucket of which this process can change nothing, also where it is root's, who may write anywhere."""
    user, nobody = os.geteuid(), 65534
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copytree(walked, Path(folder, "bucket"))
        paths = [Path(folder), copied, *copied.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        os.seteuid(user or nobody)
        try:
            assert len(job.load(f"{copied}/runs/walk", device="cpu").sample(1, steps=2)) == 1
        finally:
            os.seteuid(user)
            for path in paths:
                path.chmod(0o755)
        assert not list((copied / "runs/walk").glob("reading/*"))


def test_a_closed_pipe_is_no_failure(bucket):
    """As `head` and pagers are."""
    variables = environment(PYTHONUNBUFFERED="1", DDPM_BUCKET=str(bucket))
    for words in ("runs list --json", "runs list", "--help", "config --list"):
        reads, writes = os.pipe()
        os.close(reads)
        with os.fdopen(writes, "w") as output:
            streams = {"stdout": output, "stderr": subprocess.PIPE}
            done = subprocess.run([DDPM, *words.split()], **streams, env=variables, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (Exit.FINISHED, b""), words


@pytest.mark.slow
def test_a_run_is_trained(bucket, tmp_path):
    """By somebody who has closed its streams, as daemons do, and in a folder that has a `job` of its own."""
    (tmp_path / "job.py").write_text("raise SystemExit('the wrong job')")
    words = ("submit", "train", "--dataset", "tiles", "--bucket", bucket, "--epochs", 1, *settings(), "--on", "local")
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", DDPM, *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), check=False, timeout=120)
    assert done.returncode == Exit.FINISHED
    assert [ref.images_seen for ref in list_checkpoints(open_store(str(bucket)).sub("runs/tiles"))] == [312]


SET = {key: value for key, value in NETWORK.items() if key != "sample.every_epochs"}


def test_a_run_from_training_to_images(bucket, tmp_path, capfd):
    bucket = str(bucket)
    run = job.train("tiles", bucket=Path(bucket), run="mine", epochs=1, set=SET)
    assert (run.name, run.uri, run.page) == ("mine", f"{bucket}/runs/mine", f"{bucket}/runs/mine/report.html")
    assert run.checkpoints() == [312] and run.metrics()[-1]["images_seen"] == 288
    assert job.train("tiles", bucket=bucket, run="mine").checkpoints() == [312]
    assert capfd.readouterr().out == ""
    one, two = run.sample(2, seed=7, classes="coast", steps=3)
    assert one.size == (16, 16) and one != two
    (picture,) = job.sample("mine", bucket=bucket, seeds="0-3", steps=3)
    assert picture.startswith(run.uri) and Path(picture).exists()
    assert Path(run.export(tmp_path / "out"), "README.md").exists()
    images = [(f"{number}.png", png(number)) for number in range(4)]
    source = folder_of(tmp_path / "source", images)
    assert "others-16" in job.pack(source, "others", size=16, bucket=bucket)
    with pytest.raises(BadConfigError, match="learns tiles at 16 pixels, not 8"):
        job.train(source, dataset="tiles", size=8, bucket=bucket, run="mine")
    assert "mine" in job.submit("sample", run="mine", bucket=bucket, seeds=[0, 1], steps=3, on="local", dry_run=True)


def test_errors_are_exceptions_with_the_message_alone(bucket, capfd):
    at = {"bucket": str(bucket)}
    for call, name, options, kind, said in (
        (job.train, "nothing", at, MissingInputError, "dataset 'nothing' is not in"),
        (job.train, "tiles", at | {"epoch": 1}, BadRequestError, "did you mean 'epochs'[?]"),
        (job.train, "tiles", at | {"set": {"train.batch": 1}}, BadConfigError, "unknown key"),
        (job.train, "tiles", at | {"set": "train.batch=1"}, BadConfigError, "unknown key"),
        (job.train, "./tiles", at | {"size": -1}, JobError, "^Invalid value for '--size': -1: "),
        (job.sample, "tiles", at | {"sampler": "dd"}, BadRequestError, "--sampler 'dd'"),
        (job.export, "tiles", {}, BadRequestError, "give either --to FOLDER or --push"),
        (job.submit, "prune", {}, BadRequestError, "use train, sample"),
        (job.Run, "tiles", {"network": str}, BadRequestError, "network=str: put the class into a file"),
    ):
        with pytest.raises(kind, match=said):
            call(name, **options)
    assert "ddpm: " not in capfd.readouterr().err


SCRIPT = """
import sys
import job
try:
    job.train("tiles", bucket=sys.argv[1], run="long", epochs=1000, set={set})
except job.exits.StoppedError as stopped:
    print(stopped)
    sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_of_the_program_saves(bucket, tmp_path, number):
    script = tmp_path / "script.py"
    # Without a guard for `__main__`: the work has processes of its own.
    script.write_text(SCRIPT.format(set=SET))
    with subprocess.Popen(
        [sys.executable, script, bucket], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        run = job.Run("long", str(bucket))
        eventually(lambda: "beginning, image 0" in child.stderr.readline())
        eventually(lambda: Path(run.uri, "status.json").exists())
        child.send_signal(number)
        said = child.stdout.read()
    assert child.returncode == (-number if number == signal.SIGKILL else 3)
    assert number == signal.SIGKILL or f"stopped by {number.name} after" in said
    eventually(run.checkpoints)
