"""`ddpm submit`: the code and the line a person gets, what a dry run prints, and who is asked."""

from __future__ import annotations

import io
import os
import pty
import sys
from pathlib import Path

import pytest
import yaml

import job
from job.exits import Exit
from tests.job.command_line import DDPM, ddpm, ddpm_here, refused, succeeded
from tests.job.jobs.submitting import FOR_TRAIN

pytestmark = pytest.mark.usefixtures("targets_folder")


REFUSED = [
    ("train --dataset a --on gek", 64, "unknown target 'gek'; did you mean 'gke'?"),
    ("train --dataset a --epoch 3 --on gke", 2, "No such option: --epoch"),
    ("train --on gke", 2, "Missing option '--dataset'"),
    ("train --dataset a --set train.batch_size=0 --on gke", 78, "train.batch_size"),
    ("train --dataset a --slices 2", 64, "--slices 2 is not for training: use --nodes"),
    ("sample --run a --slices 2", 64, "--slice works only with --count"),
    ("sample --run a --mode img2img --image x.png --on gke", 64, "--image 'x.png' is a file of this machine"),
    ("sample --run a --mode img2img --image x.png --on container", 64, "jobs on 'container' cannot see"),
    ("sample --run a --mode inpaint --image 3 --mask 7.png --on vm", 64, "--mask '7.png' is a file of this machine"),
    ("sample --run a --sampler mine:walk --on batch", 64, "--sampler 'mine:walk' is a file of this machine"),
    ("evaluate --run a --sampler mine:walk --on gke", 64, "--sampler 'mine:walk' is a file of this machine"),
    ("train --dataset a --bucket nowhere --detach", 66, "nowhere is not there: check the path"),
]


def test_the_code_says_what_is_wrong(targets_folder):
    (targets_folder / "mine.py").touch()
    for words, code, part in REFUSED:
        assert part in refused(ddpm_here("submit", *words.split()), code), words
    assert not (targets_folder / "nowhere").exists()


def test_jobs_without_local_files_are_sent(targets_folder):
    (targets_folder / "mine.py").touch()
    anywhere = ("--mode inpaint --image 0-3 --mask half", "--sampler installed_there:walk")
    here = ("--mode img2img --image x.png --on local", "--sampler mine:walk --on local")
    for words in (*(f"{words} --on gke" for words in anywhere), *here):
        succeeded(ddpm_here("submit", "sample", "--run", "a", *words.split(), "--dry-run"))


@pytest.mark.parametrize("on", ["local", "container"])
def test_one_machine_makes_all_slices(on):
    words = ("submit", "sample", "--run", "a", "--count", 9, "--bucket", "gs://bucket", "--on", on, "--dry-run")
    done = ddpm_here(*words, "--slices", 8)
    assert succeeded(done) == succeeded(ddpm_here(*words))
    assert done.stderr == f"target '{on}' is one machine, which makes all 8 slices\n"


@pytest.mark.parametrize("on", ["gke", "vm", "local", "container"])
def test_dry_runs_need_nothing(targets_folder, on):
    """Neither credentials nor a network, nor a home folder."""
    words = ["submit", "train", *FOR_TRAIN, "--on", on, "--dry-run"]
    nothing = {"HOME": "/nonexistent", "KUBECONFIG": "/nonexistent", "GOOGLE_APPLICATION_CREDENTIALS": "/nonexistent"}
    without_network = ("unshare", "--user", "--map-root-user", "--net", DDPM)
    done = ddpm(*words, program=without_network, **nothing)
    text = succeeded(done)
    assert done.stderr == ""
    documents = list(yaml.safe_load_all(text))
    assert documents
    assert "celeba" in text
    assert not (targets_folder / "cache").exists()


def test_jobs_need_a_terminal_or_yes(monkeypatch):
    # Neither a terminal nor, after `<&-`, an input.
    for stdin in (io.StringIO("yes"), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        done = ddpm_here("submit", "train", *FOR_TRAIN, "--on", "gke", KUBECONFIG="/nonexistent")
        assert "no terminal can confirm it; --yes submits without" in refused(done, Exit.BAD_REQUEST)
        assert "train-celeba, on gke" in done.stdout


def test_terminals_are_asked(monkeypatch):
    terminal, other = pty.openpty()
    os.write(terminal, b"yesterday\n")
    with os.fdopen(other) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        done = ddpm_here("submit", "train", *FOR_TRAIN, "--on", "gke", KUBECONFIG="/nonexistent")
    os.close(terminal)
    assert done.stdout.endswith("Submit? [y/N] ")
    assert refused(done, Exit.BAD_REQUEST) == "ddpm: train-celeba is not submitted"


def test_missing_libraries_are_named(tmp_path):
    """In an interpreter that cannot import it, as where the extra is not installed."""
    blocked = tmp_path / "blocked"
    for name in ("kubernetes", "google"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from job.__main__ import main; main()"
    program = (sys.executable, "-P", "-c", code, str(blocked))
    for on, extra in (("gke", "kubernetes"), ("vm", "google")):
        words = ["submit", "train", *FOR_TRAIN, "--on", on]
        line = refused(ddpm(*words, "--yes", program=program), Exit.BAD_REQUEST)
        assert line.endswith(f" -m pip install --editable '{Path(job.__file__).parents[1]}[{extra}]'")
    assert "celeba" in succeeded(ddpm(*words, "--dry-run", program=program))
