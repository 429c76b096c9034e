"""`ddpm submit`: what becomes of a command line, the job that any engine takes, and who is asked before it is sent."""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml

import job
from ddpm.image_size import ImageSize
from job.config import parse_yaml, read_config_file
from job.coordination.lease import EXPIRE_SECONDS
from job.exits import Exit
from job.jobs.spec import NAME_CHARACTERS, JobSpec, is_about, job_name
from job.jobs.submit import _as_yaml, wait_seconds
from job.jobs.targets import load_targets, target_on
from job.options import options_of
from tests.conftest import only_linux
from tests.job.command_line import DDPM, ddpm, ddpm_here, refused, succeeded
from tests.job.jobs.submitting import FOR_TRAIN, KINDS, built, parsed

pytestmark = pytest.mark.usefixtures("targets_folder")


def test_commands_survive_writing_and_reading():
    for words in (
        "train --dataset a --set x=1 --set 'y=[1, 2]' --wait 30 --epochs 3 --config 'some where.yaml' --stop-after 1h",
        "sample --run r --gif --weights model --no-nearest --steps 4 --count 10 --slice 0/2 --classes=-1",
        "evaluate --run r --count 99 --metrics fid --guidance 2 --extractor mobilenet",
        'pack "a folder" name --size 8 --no-classes --channels 1 --max-bad 0 --licence "it\'s mine"',
        "pack a b --classes --licence=--size=3",
        "pack --size 8 -- -a b",
        "index a/{00..99}.tar b name --size 96x64 --labels :breed --unlabelled drop",
        "encode name --autoencoder gs://models/vae --to latents --slice 1/2",
    ):
        verb, *options = shlex.split(words)
        first = parsed(verb, options)
        prefix = ("data", verb) if verb in ("pack", "index", "encode") else (verb,)
        argv = first.argv()
        assert argv[: len(prefix)] == prefix
        again = parsed(verb, argv[len(prefix) :])
        assert (again, again.argv()) == (first, argv), words


OTHER_VALUES = {bool: False, int: 7, float: 0.25, str: "--x y", Path: Path("/some where"), ImageSize: ImageSize(8, 16)}
OF_PATTERN = {"checkpoints": "30,80", "metrics": "fid,kid", "then": "sr-64", "vector": "20,0.5:60,0.5"}


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_option_survives(kind):
    needed = {name: "a" for name, (first, *_) in options_of(kind).items() if first.default is first.empty}
    for field, options in options_of(kind).items():
        for each in options:
            takes, option = get_args(each.annotation)
            value = OTHER_VALUES.get(takes if takes in OTHER_VALUES else get_args(takes)[0])
            value = True if each.default is False else ("a", "--x") if get_origin(takes) is tuple else value
            value = option.choices[-1] if option.choices and takes is str else value
            value = OF_PATTERN[each.name] if option.pattern else value
            request = kind(**{"bucket": "b", **needed, field: value if field == each.name else {each.name: value}})
            again = parsed(kind.command[-1], request.argv()[len(kind.command) :])
            assert getattr(again, field) == getattr(request, field), each.name
            assert again.argv() == request.argv() != kind(**{"bucket": "b", **needed}).argv(), each.name


def test_only_typed_options_are_written(monkeypatch):
    words = ["--run", "r", "--steps", "4", "--no-nearest", "--eta", "0.5", "--grid", "karras"]
    assert parsed("sample", words).keys == {"steps": 4, "nearest": False, "eta": 0.5, "grid": "karras"}
    monkeypatch.setenv("DDPM_BUCKET", "gs://of-the-environment")
    request = parsed("train", ["--dataset", "a"])
    assert request.bucket == "gs://of-the-environment"
    assert request.argv() == ("train", "--dataset", "a", "--bucket", "gs://of-the-environment")
    assert parsed("train", ["--dataset", "a", "--bucket", "gs://b"]).argv() == (*request.argv()[:-1], "gs://b")
    assert parsed("train", ["--dataset", "a", "--hang-after", "600", "--wait=0"]) == request
    one = parsed("train", ["--dataset=a", "--epochs=3", "--run", "r"])
    assert one.argv() == parsed("train", ["--run=r", "--epochs", "3", "--dataset", "a"]).argv()
    argv = parsed("pack", ["--bucket", "/b", "/images", "name"]).argv()
    assert argv == ("data", "pack", "/images", "name", "--bucket", "/b")


def test_training_becomes_a_job():
    argv = ("train", "--dataset", "celeba", "--epochs", "3", "--wait", "155", "--bucket", "gs://bucket")
    there = {"image": "registry/ddpm:1", "bucket": "gs://bucket", "gpus": 1, "gpu_type": "nvidia-l4"}
    there |= {"run": "celeba", "max_hours": 24.0, "env": {"DDPM_JOB": "train-celeba", "DDPM_GPUS": "1"}}
    assert built("train", [*FOR_TRAIN, "--epochs", "3"]) == JobSpec("train-celeba", "train", argv, **there)
    # What was asked for wins over the target.
    for on, asked, expected in (
        ("vm", {"gpus": 8, "gpu_type": "a", "spot": True, "max_hours": 0.5}, (8, 1, "a", True, 1800)),
        ("vm", {}, (1, 1, "nvidia-l4", False, 24 * 3600)),
        ("gke", {"gpus": 0, "max_hours": 0.017}, (0, 1, "", True, 61)),
        ("gke", {"nodes": 2, "max_hours": 1 / 60}, (1, 2, "nvidia-l4", True, 60)),
    ):
        spec = built("train", FOR_TRAIN, on, **asked)
        assert (spec.gpus, spec.nodes, spec.gpu_type, spec.spot, spec.max_seconds) == expected


def test_parents_are_seen_by_the_job(targets_folder):
    for given, word, reads in (
        ("celeba@490", "celeba@490", ()),
        ("gs://theirs/runs/celeba@490", "gs://theirs/runs/celeba@490", ("",)),
        ("mine/runs/celeba", f"{targets_folder}/mine/runs/celeba@latest", (f"{targets_folder}/mine",)),
    ):
        words = ["--dataset", "a", "--from", given, "--weights", "model", "--set", "train.batch_size=8"]
        spec = built("train", [*words, "--bucket", "gs://bucket"], "container")
        assert (spec.argv[3:7], spec.reads) == (("--from", word, "--weights", "model"), reads)
        assert parsed("train", spec.argv[1:]).check().changes == parsed("train", words).check().changes


def test_replacements_wait_for_the_lease():
    for name, grace in (("gke", 105), ("vm", 30)):
        spec = built("train", [*FOR_TRAIN, "--wait", "5"], name)
        waits = float(spec.argv[spec.argv.index("--wait") + 1])
        assert waits == wait_seconds(load_targets()[name]) > EXPIRE_SECONDS + grace
    assert "900" in built("train", [*FOR_TRAIN, "--wait", "900"]).argv
    assert "--wait" not in built("train", FOR_TRAIN, "local").argv
    assert "--wait" not in built("sample", ["--run", "a"]).argv


def test_other_work_has_names_of_its_own():
    words = ["--run", "celeba", "--count", "100"]
    spec = built("sample", words, slices=4)
    assert (spec.run, spec.slices, spec.machines) == ("celeba", 4, 4)
    assert "--slice" not in spec.argv and spec.argv_of_slice(3)[-2:] == ("--slice", "3/4")
    others = [built("sample", words, slices=2), built("sample", [*words[:3], "101"], slices=4)]
    # The same images are the same job, wherever they are made, and however that was typed.
    others += [built("sample", words, "vm", slices=4), built("sample", ["--count", "100", "--run=celeba"], slices=4)]
    assert [other.name == spec.name for other in others] == [False, False, True, True]
    pack = built("pack", ["gs://photos/all.zip", "my_photos.v2", "--size", "64"])
    score = built("evaluate", ["--run", "celeba", "--count", "50000", "--extractor-file", "gs://theirs/inception.pt"])
    for made, name, about, argv in (
        (spec, "sample-celeba", ("celeba", 1, "nvidia-l4", 4), ("sample", "--run", "celeba")),
        (pack, "pack-my-photos-v2", ("", 0, "", 0), ("data", "pack", "gs://photos/all.zip", "my_photos.v2")),
        (score, "evaluate-celeba", ("celeba", 1, "nvidia-l4", 0), ("evaluate", "--run", "celeba", "--count", "50000")),
    ):
        assert re.fullmatch(f"{name}-[0-9a-f]{{8}}", made.name) and made.argv[: len(argv)] == argv
        assert (made.run, made.gpus, made.gpu_type, made.slices) == about
        assert not made.run or is_about(made.name, made.run)


@pytest.mark.parametrize("verb", ["train", "sample", "pack"])
def test_names_fit_for_any_run(verb):
    words = () if verb == "train" else ("a", "b")
    long = ["a" * 63, "a" * 62 + "b", "a" * 40 + "-" * 20 + "b", "0" * 63, "1-" * 20 + "1"]
    names = [job_name(verb, name, words) for name in long]
    assert len(set(names)) == len(names)
    assert all(len(name) <= NAME_CHARACTERS and re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name) for name in names)
    if verb != "pack":
        assert [[is_about(name, run) for run in long] for name in names] == [[a == b for b in long] for a in long]
        assert not is_about(job_name(verb, "run-2", words), "run")


CONFIG = """
train: {batch_size: 64, learning_rate: 2.0e-05, epochs: 7}
model: {channel_mults: [1, 2], attention_sizes: [8]}
data: {flip: false}
sample: {sampler: ddim}
"""


def test_configuration_files_become_words(targets_folder):
    (targets_folder / "mine.yaml").write_text(CONFIG)
    words = ["--dataset", "celeba", "--config", "mine.yaml", "--set", "train.batch_size=32", "--epochs", "9"]
    spec = built("train", words)
    assert "--config" not in spec.argv
    there = parsed("train", spec.argv[1:]).check().changes
    assert there == parsed("train", words).check().changes and there["train.batch_size"] == 32
    assert spec.argv.index("train.batch_size=32") > spec.argv.index("train.learning_rate=2.0e-05")
    assert "mine.yaml" in built("train", words, "local").argv
    for value in (1, 1.0, 1e-9, 1e22, True, None, "true", "1", "", "a: b", "#", [1, [2.5, "x"]], "é\n'\""):
        again = parse_yaml(_as_yaml(value))
        assert (again, type(again)) == (value, type(value))
        (targets_folder / "c.yaml").write_text(yaml.safe_dump({"train": {"batch_size": value}}))
        assert read_config_file(targets_folder / "c.yaml") == {"train.batch_size": value}


def test_bucket_of_a_job(targets_folder, monkeypatch):
    assert built("train", FOR_TRAIN).bucket == "gs://bucket"
    assert built("train", FOR_TRAIN, "local").bucket == "gs://of-local"
    monkeypatch.setenv("DDPM_BUCKET", "gs://of-the-environment")
    assert built("train", FOR_TRAIN).bucket == built("train", FOR_TRAIN, "s3").bucket == "gs://of-the-environment"
    assert built("train", [*FOR_TRAIN, "--bucket", "s3://mine/folder"]).bucket == "s3://mine/folder"
    # Folders of this machine become absolute.
    spec = built("pack", ["photos", "mine", "--size", "8", "--bucket", "b"], "container")
    assert spec.bucket == str(targets_folder / "b")
    assert spec.argv[2:4] == (str(targets_folder / "photos"), "mine")
    options = ["--vector", "a/b.csv:age,angle", "--condition", "masks"]
    spec = built("pack", ["photos", "mine", "--size", "8", "--bucket", "b", *options], "container")
    vector = str(targets_folder / "a/b.csv:age,angle")
    assert {("--vector", vector), ("--condition", str(targets_folder / "masks"))} <= {*pairwise(spec.argv)}
    assert built("train", [*FOR_TRAIN, "--bucket", "b"], "local").argv[-2:] == ("--bucket", str(targets_folder / "b"))


def test_local_jobs_end_themselves():
    pairs = [*pairwise(built("train", FOR_TRAIN, "local", gpus=2, max_hours=1.5).argv_that_ends)]
    assert {("--processes", "2"), ("--stop-after", "5400s")} <= {*pairs}
    argv = built("train", [*FOR_TRAIN, "--processes", "1"], "local", gpus=2, max_hours=1.5).argv
    assert ("--processes", "1") in pairwise(argv)
    assert "--stop-after" not in built("train", FOR_TRAIN, "local").argv_that_ends


WORDS = {"train": FOR_TRAIN, "sample": ["--run", "r"], "pack": ["gs://abc/b.zip", "b", "--size", "8"]}


@pytest.mark.parametrize("on", ["local", "container", "gke", "vm", "batch"])
def test_stop_after_becomes_the_limit(on):
    for verb, words in WORDS.items():
        for given, hours, limit in (("90m", None, 1.5), ("90m", 4, 1.5), ("5h", 4, 4)):
            spec = built(verb, [*words, "--stop-after", given], on, max_hours=hours)
            (*_, made) = target_on(on).render(spec)
            own = [word for option, word in pairwise(made.get("command", spec.argv)) if option == "--stop-after"]
            assert "--stop-after" not in spec.argv and spec.max_hours == limit, (verb, given)
            assert own == ([f"{limit * 3600:g}s"] if on in ("local", "container") else []), (verb, given)


def test_jobs_without_local_files_are_sent(targets_folder):
    (targets_folder / "mine.py").touch()
    for words in (
        "--mode inpaint --image 0-3 --mask half --on gke",
        "--sampler installed_there:walk --on gke",
        "--mode img2img --image x.png --on local",
        "--sampler mine:walk --on local",
    ):
        succeeded(ddpm_here("submit", "sample", "--run", "a", *words.split(), "--dry-run"))


@pytest.mark.parametrize("on", ["local", "container"])
def test_one_machine_makes_all_slices(on):
    words = ("submit", "sample", "--run", "a", "--count", 9, "--bucket", "gs://bucket", "--on", on, "--dry-run")
    done = ddpm_here(*words, "--slices", 8)
    assert succeeded(done) == succeeded(ddpm_here(*words))
    assert done.stderr == f"target '{on}' is one machine, which makes all 8 slices\n"


@pytest.mark.parametrize("on", ["gke", "vm", "local", "container"])
@only_linux
def test_dry_runs_need_nothing(targets_folder, on):
    """Neither credentials nor a network, nor a home folder."""
    nothing = dict.fromkeys(("HOME", "KUBECONFIG", "GOOGLE_APPLICATION_CREDENTIALS"), "/nonexistent")
    without_network = ("unshare", "--user", "--map-root-user", "--net", DDPM)
    done = ddpm("submit", "train", *FOR_TRAIN, "--on", on, "--dry-run", program=without_network, **nothing)
    assert list(yaml.safe_load_all(succeeded(done))) and "celeba" in done.stdout and done.stderr == ""
    assert not (targets_folder / "cache").exists()


def test_terminals_are_asked(monkeypatch):
    words = ("submit", "train", *FOR_TRAIN, "--on", "gke")
    # Neither a terminal nor, after `<&-`, an input.
    for stdin in (io.StringIO("yes"), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        done = ddpm_here(*words, KUBECONFIG="/nonexistent")
        assert "no terminal can confirm it; --yes submits without" in refused(done, Exit.BAD_REQUEST)
        assert "train-celeba, on gke" in done.stdout
    terminal, other = pty.openpty()
    os.write(terminal, b"yesterday\n")
    with os.fdopen(other) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        done = ddpm_here(*words, KUBECONFIG="/nonexistent")
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
