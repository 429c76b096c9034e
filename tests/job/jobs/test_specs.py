"""What becomes of a command line: the job that any engine takes, and what no machine could do."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml

from ddpm.image_size import ImageSize
from job.config import parse_yaml, read_config_file
from job.coordination.lease import EXPIRE_SECONDS
from job.exits import BadConfigError, BadRequestError
from job.jobs.spec import NAME_CHARACTERS, JobSpec, is_about, job_name
from job.jobs.submit import wait_seconds
from job.jobs.targets import load_targets, target_on
from job.options import options_of
from tests.job.jobs.submitting import FOR_TRAIN, KINDS, built, parsed

pytestmark = pytest.mark.usefixtures("targets_folder")


def test_commands_survive_writing_and_reading():
    for verb, words in (
        ("train", ["--dataset", "a", "--set", "x=1", "--set", "y=[1, 2]", "--wait", "30", "--epochs", "3"]),
        ("train", ["--dataset", "a", "--config", "some where.yaml", "--hang-after", "0.5", "--stop-after", "1h"]),
        ("sample", ["--run", "r", "--gif", "--weights", "model", "--no-nearest", "--steps", "4"]),
        ("sample", ["--run", "r", "--nearest", "--checkpoints", "30,80", "--seeds", "0-3"]),
        ("sample", ["--run", "r", "--count", "10", "--slice", "0/2", "--classes=-1"]),
        (
            "evaluate",
            ["--run", "r", "--count", "99", "--metrics", "fid", "--guidance", "2", "--extractor", "mobilenet"],
        ),
        ("pack", ["a folder", "name", "--size", "8", "--no-classes", "--licence", "it's mine"]),
        ("pack", ["a", "b", "--classes", "--channels", "1", "--max-bad", "0", "--licence=--size=3"]),
        ("pack", ["--size", "8", "--", "-a", "b"]),
        ("index", ["a/{00..99}.tar", "b", "name", "--size", "96x64", "--labels", ":breed", "--unlabelled", "drop"]),
        ("encode", ["name", "--autoencoder", "gs://models/vae", "--to", "latents", "--slice", "1/2"]),
    ):
        first = parsed(verb, words)
        prefix = ("data", verb) if verb in ("pack", "index", "encode") else (verb,)
        argv = first.argv()
        assert argv[: len(prefix)] == prefix
        again = parsed(verb, argv[len(prefix) :])
        assert (again, again.argv()) == (first, argv), words


OTHER_VALUES = {bool: False, int: 7, float: 0.25, str: "--x y", Path: Path("/some where"), ImageSize: ImageSize(8, 16)}


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_option_survives(kind):
    needed = {name: "a" for name, (first, *_) in options_of(kind).items() if first.default is first.empty}
    for field, options in options_of(kind).items():
        for each in options:
            takes, option = get_args(each.annotation)
            value = OTHER_VALUES.get(takes if takes in OTHER_VALUES else get_args(takes)[0])
            value = True if each.default is False else ("a", "--x") if get_origin(takes) is tuple else value
            value = option.choices[-1] if option.choices and takes is str else value
            value = {"checkpoints": "30,80", "metrics": "fid,kid"}[each.name] if option.pattern else value
            request = kind(**{"bucket": "b", **needed, field: value if field == each.name else {each.name: value}})
            again = parsed(kind.command[-1], request.argv()[len(kind.command) :])
            assert getattr(again, field) == getattr(request, field), each.name
            assert again.argv() == request.argv() != kind(**{"bucket": "b", **needed}).argv(), each.name


def test_chosen_options_are_known():
    words = ["--run", "r", "--steps", "4", "--no-nearest", "--eta", "0.5", "--grid", "karras"]
    assert parsed("sample", words).keys == {"steps": 4, "nearest": False, "eta": 0.5, "grid": "karras"}


def test_scores_are_a_job():
    words = ["--run", "celeba", "--count", "50000", "--extractor-file", "gs://theirs/inception.pt"]
    spec = built("evaluate", words)
    assert (spec.verb, spec.run, spec.slices, spec.gpus) == ("evaluate", "celeba", 0, built("sample", words[:4]).gpus)
    assert spec.argv[:3] == ("evaluate", "--run", "celeba")
    assert is_about(spec.name, "celeba")
    assert parsed("evaluate", words).count == 50_000
    with pytest.raises(BadRequestError, match="--extractor-file"):
        built("evaluate", [*words[:4], "--extractor-file", "/home/me/inception.pt"])


def test_only_typed_options_are_written(monkeypatch):
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
    spec = built("train", [*FOR_TRAIN, "--epochs", "3"])
    assert spec == JobSpec(
        name="train-celeba",
        verb="train",
        argv=("train", "--dataset", "celeba", "--epochs", "3", "--wait", "155", "--bucket", "gs://bucket"),
        image="registry/ddpm:1",
        bucket="gs://bucket",
        run="celeba",
        gpus=1,
        gpu_type="nvidia-l4",
        max_hours=24.0,
        env={"DDPM_JOB": "train-celeba", "DDPM_GPUS": "1"},
    )
    assert built("train", [*FOR_TRAIN, "--epochs", "3"]) == spec
    # What was asked for wins over the target.
    spec = built("train", FOR_TRAIN, "vm", gpus=8, gpu_type="a", spot=True, max_hours=0.5)
    assert (spec.gpus, spec.gpu_type, spec.spot, spec.max_hours) == (8, "a", True, 0.5)
    spec = built("train", FOR_TRAIN, "vm")
    assert (spec.gpus, spec.nodes, spec.gpu_type, spec.spot) == (1, 1, "nvidia-l4", False)
    spec = built("train", FOR_TRAIN, gpus=0)
    assert (spec.gpus, spec.gpu_type) == (0, "")
    assert [built("train", FOR_TRAIN, max_hours=hours).max_seconds for hours in (0.017, 1 / 60)] == [61, 60]


def test_parents_are_seen_by_the_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {
        "celeba@490": ("celeba@490", ()),
        "gs://theirs/runs/celeba@490": ("gs://theirs/runs/celeba@490", ("",)),
        "mine/runs/celeba": (f"{tmp_path}/mine/runs/celeba@latest", (f"{tmp_path}/mine",)),
    }
    for given, (word, reads) in rows.items():
        words = ["--dataset", "a", "--from", given, "--weights", "model", "--set", "train.batch_size=8"]
        spec = built("train", [*words, "--bucket", "gs://bucket"], "container")
        assert spec.argv[3:7] == ("--from", word, "--weights", "model")
        assert spec.reads == reads
        again = parsed("train", spec.argv[1:]).check().changes
        assert again == parsed("train", words).check().changes


def test_replacements_wait_for_the_lease():
    for name, grace in (("gke", 105), ("vm", 30)):
        spec = built("train", [*FOR_TRAIN, "--wait", "5"], name)
        waits = float(spec.argv[spec.argv.index("--wait") + 1])
        assert waits == wait_seconds(load_targets()[name]) > EXPIRE_SECONDS + grace
    assert "900" in built("train", [*FOR_TRAIN, "--wait", "900"]).argv
    assert "--wait" not in built("train", FOR_TRAIN, "local").argv
    assert "--wait" not in built("sample", ["--run", "a"]).argv


def test_sampling_and_packing_have_own_names():
    spec = built("sample", ["--run", "celeba", "--count", "100"], slices=4)
    assert (spec.run, spec.slices, spec.machines) == ("celeba", 4, 4)
    assert "--slice" not in spec.argv
    assert spec.argv_of_slice(3)[-2:] == ("--slice", "3/4")
    others = [
        built("sample", ["--run", "celeba", "--count", "100"], slices=2),
        built("sample", ["--run", "celeba", "--count", "101"], slices=4),
        # The same images are the same job, wherever they are made, and however that was typed.
        built("sample", ["--run", "celeba", "--count", "100"], "vm", slices=4),
        built("sample", ["--count", "100", "--run=celeba"], slices=4),
    ]
    assert [other.name == spec.name for other in others] == [False, False, True, True]
    assert re.fullmatch(r"sample-celeba-[0-9a-f]{8}", spec.name)

    spec = built("pack", ["gs://photos/all.zip", "my_photos.v2", "--size", "64"])
    assert re.fullmatch(r"pack-my-photos-v2-[0-9a-f]{8}", spec.name)
    assert spec.argv[:4] == ("data", "pack", "gs://photos/all.zip", "my_photos.v2")
    assert (spec.run, spec.gpus, spec.gpu_type) == ("", 0, "")


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


def test_configuration_files_become_words(targets_folder):
    text = """
    train: {batch_size: 64, learning_rate: 2.0e-05, epochs: 7}
    model: {channel_mults: [1, 2], attention_sizes: [8]}
    data: {flip: false}
    sample: {sampler: ddim}
    """
    (targets_folder / "mine.yaml").write_text(text)
    words = ["--dataset", "celeba", "--config", "mine.yaml", "--set", "train.batch_size=32", "--epochs", "9"]
    spec = built("train", words)
    assert "--config" not in spec.argv
    there = parsed("train", spec.argv[1:]).check()
    here = parsed("train", words).check()
    assert there.changes == here.changes
    assert there.changes["train.batch_size"] == 32
    assert spec.argv.index("train.batch_size=32") > spec.argv.index("train.learning_rate=2.0e-05")
    assert "mine.yaml" in built("train", words, "local").argv


def test_values_survive_as_words(tmp_path):
    from job.jobs.submit import _as_yaml

    for value in (1, 1.0, 1e-9, 1e22, True, None, "true", "1", "", "a: b", "#", [1, [2.5, "x"]], "é\n'\""):
        again = parse_yaml(_as_yaml(value))
        assert (again, type(again)) == (value, type(value))
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"train": {"batch_size": value}}))
        assert read_config_file(tmp_path / "c.yaml") == {"train.batch_size": value}


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
    assert built("train", [*FOR_TRAIN, "--bucket", "b"], "local").argv[-2:] == ("--bucket", str(targets_folder / "b"))


def test_local_jobs_end_themselves():
    argv = built("train", FOR_TRAIN, "local", gpus=2, max_hours=1.5).argv_that_ends
    assert argv[argv.index("--processes") + 1] == "2"
    assert argv[argv.index("--stop-after") + 1] == "5400s"
    argv = built("train", [*FOR_TRAIN, "--processes", "1"], "local", gpus=2, max_hours=1.5).argv
    assert argv[argv.index("--processes") + 1] == "1"
    assert "--stop-after" not in built("train", FOR_TRAIN, "local").argv_that_ends


def test_stop_after_becomes_the_limit():
    for verb, words in (
        ("train", FOR_TRAIN),
        ("sample", ["--run", "r"]),
        ("pack", ["gs://abc/b.zip", "b", "--size", "8"]),
    ):
        for given, hours, limit in (("90m", None, 1.5), ("90m", 4, 1.5), ("5h", 4, 4)):
            for on in ("local", "container", "gke", "vm", "batch"):
                spec = built(verb, [*words, "--stop-after", given], on, max_hours=hours)
                (*_, made) = target_on(on).render(spec)
                words_sent = made.get("command", spec.argv)
                own = [word for option, word in pairwise(words_sent) if option == "--stop-after"]
                assert "--stop-after" not in spec.argv
                assert spec.max_hours == limit, (verb, on, given)
                assert own == ([f"{limit * 3600:g}s"] if on in ("local", "container") else []), (verb, on, given)


REFUSED = [
    ("train --dataset a --bucket file:///b", "gke", {}, BadRequestError, "is a path of this machine"),
    ("train --dataset a", "s3", {}, BadRequestError, "--bucket or DDPM_BUCKET: './bucket' is a path of this machine"),
    ("train --dataset a --from ../b/runs/c@3", "gke", {}, BadRequestError, "/b/runs/c' is a path of this machine"),
    ("train --dataset a --bucket gs://u:secret@b", "gke", {}, BadRequestError, "without a user, password"),
    ("train --dataset a", "bare", {}, BadConfigError, "target 'bare' has no `image:`"),
    ("train --dataset a --set x=1", "gke", {}, BadConfigError, "unknown key 'x'"),
    ("train --dataset a", "gke", {"max_hours": 0.0166}, BadRequestError, "a job lasts for 0.017 to 720 hours"),
    ("train --dataset a", "local", {"max_hours": float("nan")}, BadRequestError, "--max-hours nan"),
    ("train --dataset a", "local", {"spot": True}, BadRequestError, "--spot is about machines in a cloud"),
    ("train --dataset a", "container", {"gpu_type": "l4"}, BadRequestError, "--gpu-type l4 is about"),
    ("train --dataset a", "plain", {"gpu_type": "l4"}, BadRequestError, "--gpu-type l4 decides nothing on"),
    ("train --dataset a", "own", {"spot": False}, BadRequestError, "--on-demand decides nothing on target 'own'"),
    ("pack gs://abc/b.zip b --size 8", "gke", {"gpus": 1}, BadRequestError, "packing uses no GPUs"),
    (
        "train --dataset a",
        "vm",
        {"nodes": 2},
        BadRequestError,
        "target 'vm' no machines train together: use a kubernetes ",
    ),
    ("train --dataset a", "gke", {"slices": 2}, BadRequestError, "--slices 2 is not for training: use --nodes"),
    ("sample --run r", "gke", {"slices": 2}, BadRequestError, "--slice works only with --count"),
    ("sample --run r", "gke", {"nodes": 2}, BadRequestError, "--nodes 2 is for training: use --slices"),
    ("pack gs://b/a.zip a --size 8 --replace", "gke", {"slices": 2}, BadRequestError, "--replace and --slice"),
    ("sample --run r --count 9 --slice 0/2", "gke", {"slices": 2}, BadRequestError, "leave one of them out"),
    *[
        (f"train --dataset a --stop-after {given}", "gke", {}, BadRequestError, f"--stop-after{said}")
        for given, said in (("nan", " 'nan'"), ("0", " '0'"), ("x", " 'x'"), ("59s", ": a job lasts for"))
    ],
    *[
        (f"{words} --set train.batch_size={images}", on, resources, BadConfigError, f"={images} images: use fewer with")
        for words, images, on, resources in (
            ("train --dataset a --processes 2", 1, "local", {}),
            ("train --dataset a --processes 2", 7, "gke", {"nodes": 4}),
            ("train --dataset a", 7, "plain", {}),
            ("train --dataset a", 7, "gke", {"gpus": 2, "nodes": 4}),
        )
    ],
    ("pack a.zip b --size 8", "gke", {}, BadRequestError, "SOURCE 'a.zip' is a path of this"),
    ("pack ftp://a/b.zip b --size 8", "gke", {}, BadRequestError, "changed in transit"),
]


def test_impossible_jobs_are_refused():
    for words, on, resources, error, part in REFUSED:
        verb, *rest = words.split()
        with pytest.raises(error, match=re.escape(part)) as refusal:
            built(verb, rest, on, **resources)
        assert "secret" not in str(refusal.value), words
    # A run that is there has a batch of its own, whatever its preset says.
    assert built("train", [*FOR_TRAIN, "--processes", "64"], nodes=4)
    assert built("train", [*FOR_TRAIN, "--set", "train.batch_size=1"])
