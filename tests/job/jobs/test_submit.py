"""`ddpm submit`: what becomes of a command line, what is refused before anything is sent, and what a dry run prints."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import yaml

from job.cli.words import parsed
from job.config_input import parse_yaml, read_config_file
from job.exits import BadConfigError, BadRequestError, Exit, MissingInputError
from job.jobs.building import Wishes, spec_of, wait_seconds
from job.jobs.spec import NAME_CHARACTERS, JobSpec, is_about, job_name
from job.jobs.submit import formatted, plan_lines
from job.jobs.targets import chosen_target, load_targets, parse_targets
from job.runs.lease import EXPIRE_SECONDS
from tests.job.command_line import DDPM, ddpm, ddpm_here, environment, refused, succeeded

TARGETS = """
local: {bucket: gs://of-local}
gke: {backend: kubernetes, image: registry/ddpm:1, bucket: gs://bucket, gpu_type: nvidia-l4, grace_seconds: 105}
vm: {backend: vm, project: my-project, zones: [us-east1-b], image: registry/ddpm:1, bucket: gs://bucket, spot: false}
plain: {backend: kubernetes, cluster: plain, image: i, bucket: gs://bucket, gpu_type: nvidia-l4, gpus: 8}
own: {backend: kubernetes, node_selector: {gpu: l4}, image: i, bucket: gs://bucket}
bare: {backend: kubernetes, bucket: gs://bucket}
s3: {backend: kubernetes, image: i, env: {A: b}}
"""
FOR_TRAIN = ["--dataset", "celeba"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with targets, and no variable that says otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDPM_TARGETS", raising=False)
    monkeypatch.delenv("DDPM_BUCKET", raising=False)
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "targets.yaml").write_text(TARGETS)
    return tmp_path


def built(verb: str, words: list[str], on: str = "gke", **wishes) -> JobSpec:
    return spec_of(parsed(verb, words), chosen_target(load_targets(), on), Wishes(**wishes))


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
        env={"DDPM_GPUS": "1"},
    )
    assert built("train", [*FOR_TRAIN, "--epochs", "3"]) == spec


def test_wishes_win_over_the_target():
    spec = built("train", FOR_TRAIN, "vm", gpus=8, nodes=2, gpu_type="a", spot=True, max_hours=0.5)
    assert (spec.gpus, spec.nodes, spec.gpu_type, spec.spot, spec.max_hours) == (8, 2, "a", True, 0.5)
    spec = built("train", FOR_TRAIN, "vm")
    assert (spec.gpus, spec.nodes, spec.gpu_type, spec.spot) == (1, 1, "nvidia-l4", False)
    spec = built("train", FOR_TRAIN, gpus=0)
    assert (spec.gpus, spec.gpu_type) == (0, "")


def test_a_replacement_waits_until_its_predecessor_s_lease_has_certainly_expired():
    for name, grace in (("gke", 105), ("vm", 30)):
        target = load_targets()[name]
        spec = built("train", [*FOR_TRAIN, "--wait", "5"], name)
        waits = float(spec.argv[spec.argv.index("--wait") + 1])
        assert waits == wait_seconds(target) > EXPIRE_SECONDS + grace
    assert "900" in built("train", [*FOR_TRAIN, "--wait", "900"]).argv
    assert "--wait" not in built("train", FOR_TRAIN, "local").argv
    assert "--wait" not in built("sample", ["--run", "a"]).argv


def test_sampling_and_packing_have_names_of_their_own():
    spec = built("sample", ["--run", "celeba", "--count", "100"], slices=4)
    assert (spec.run, spec.slices, spec.machines) == ("celeba", 4, 4)
    assert "--slice" not in spec.argv
    assert spec.argv_of_slice(3)[-2:] == ("--slice", "3/4")
    others = [
        built("sample", ["--run", "celeba", "--count", "100"], slices=2),
        built("sample", ["--run", "celeba", "--count", "101"], slices=4),
        built("sample", ["--run", "celeba", "--count", "100"], "vm", slices=4),
    ]
    assert built("sample", ["--count", "100", "--run=celeba"], slices=4).name == spec.name
    # The same images are the same job, wherever they are made.
    assert [other.name == spec.name for other in others] == [False, False, True]
    assert re.fullmatch(r"sample-celeba-[0-9a-f]{8}", spec.name)

    spec = built("pack", ["gs://photos/all.zip", "my_photos.v2", "--size", "64"])
    assert re.fullmatch(r"pack-my-photos-v2-[0-9a-f]{8}", spec.name)
    assert spec.argv[:4] == ("data", "pack", "gs://photos/all.zip", "my_photos.v2")
    assert (spec.run, spec.gpus, spec.gpu_type) == ("", 0, "")
    assert built("pack", ["gs://photos/all.zip", "my_photos.v2", "--size", "32"]).name != spec.name


@pytest.mark.parametrize("verb", ["train", "sample", "pack"])
def test_names_of_jobs_fit_whatever_the_run_is_called(verb):
    words = () if verb == "train" else ("a", "b")
    long = ["a" * 63, "a" * 62 + "b", "a" * 40 + "-" * 20 + "b", "0" * 63, "1-" * 20 + "1"]
    names = [job_name(verb, name, words) for name in long]
    assert len(set(names)) == len(names)
    assert all(len(name) <= NAME_CHARACTERS and re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name) for name in names)
    if verb != "pack":
        assert [[is_about(name, run) for run in long] for name in names] == [[a == b for b in long] for a in long]
        assert not is_about(job_name(verb, "run-2", words), "run")


def test_a_configuration_file_of_this_machine_travels_as_words(folder):
    text = """
    train: {batch_size: 64, learning_rate: 2.0e-05, epochs: 7}
    model: {channel_mults: [1, 2], attention_sizes: [8]}
    data: {flip: false}
    sample: {sampler: ddim}
    """
    (folder / "mine.yaml").write_text(text)
    words = ["--dataset", "celeba", "--config", "mine.yaml", "--set", "train.batch_size=32", "--epochs", "9"]
    spec = built("train", words)
    assert "--config" not in spec.argv
    there = parsed("train", spec.argv[1:]).request().check()
    here = parsed("train", words).request().check()
    assert there.changes == here.changes
    assert there.changes["train.batch_size"] == 32
    assert spec.argv.index("train.batch_size=32") > spec.argv.index("train.learning_rate=2.0e-05")
    assert "mine.yaml" in built("train", words, "local").argv


@pytest.mark.parametrize(
    "value", [1, 1.0, 1e-9, 1e22, True, None, "true", "1", "", "a: b", "#", [1, [2.5, "x"]], "é\n'\""]
)
def test_every_value_survives_the_way_into_a_word(value, tmp_path):
    from job.jobs.building import _as_yaml

    again = parse_yaml(_as_yaml(value))
    assert (again, type(again)) == (value, type(value))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"train": {"batch_size": value}}))
    assert read_config_file(tmp_path / "c.yaml") == {"train.batch_size": value}


def test_the_bucket_is_the_option_s_else_the_target_s_else_the_variable_s(monkeypatch):
    monkeypatch.setenv("DDPM_BUCKET", "gs://of-the-environment")
    assert built("train", FOR_TRAIN).bucket == "gs://bucket"
    assert built("train", FOR_TRAIN, "s3").bucket == "gs://of-the-environment"
    assert built("train", [*FOR_TRAIN, "--bucket", "s3://mine/folder"]).bucket == "s3://mine/folder"
    assert built("train", FOR_TRAIN, "local").bucket == "gs://of-local"


def test_folders_of_this_machine_become_absolute(folder):
    spec = built("pack", ["photos", "mine", "--size", "8", "--bucket", "b"], "container")
    assert spec.bucket == str(folder / "b")
    assert spec.argv[2:4] == (str(folder / "photos"), "mine")
    assert built("train", [*FOR_TRAIN, "--bucket", "b"], "local").argv[-2:] == ("--bucket", str(folder / "b"))


def test_a_minute_is_the_shortest_limit():
    assert [built("train", FOR_TRAIN, max_hours=hours).max_seconds for hours in (0.017, 1 / 60)] == [61, 60]


def test_this_machine_has_no_engine_that_ends_a_job():
    argv = built("train", FOR_TRAIN, "local", gpus=2, max_hours=1.5).argv
    assert argv[argv.index("--processes") + 1] == "2"
    assert argv[argv.index("--stop-after") + 1] == "5400s"
    argv = built("train", [*FOR_TRAIN, "--processes", "1", "--stop-after", "1h"], "local", gpus=2, max_hours=1.5).argv
    assert argv[argv.index("--processes") + 1] == "1"
    assert argv[argv.index("--stop-after") + 1] == "1h"
    assert "--stop-after" not in built("train", FOR_TRAIN, "local").argv


@pytest.mark.parametrize(
    ("verb", "words", "on", "wishes", "error", "part"),
    [
        ("train", ["--dataset", "a", "--bucket", "./b"], "gke", {}, BadRequestError, "is a folder of this machine"),
        ("train", ["--dataset", "a", "--bucket", "file:///b"], "gke", {}, BadRequestError, "is a folder of this"),
        ("train", ["--dataset", "a"], "s3", {}, BadRequestError, "jobs on 's3' cannot see"),
        ("train", ["--dataset", "a", "--bucket", "gs://X"], "gke", {}, BadRequestError, "names no bucket"),
        ("train", ["--dataset", "a", "--bucket", "gs://u:p@b"], "gke", {}, BadRequestError, "user or password"),
        ("train", ["--dataset", "a"], "bare", {}, BadConfigError, "target 'bare' has no `image:`"),
        ("train", ["--dataset", "a/b"], "gke", {}, BadRequestError, "cannot be a dataset's name"),
        ("train", ["--dataset", "a", "--run", "A"], "gke", {}, BadRequestError, "cannot be a run's name"),
        ("train", ["--dataset", "a", "--set", "x=1"], "gke", {}, BadConfigError, "unknown key 'x'"),
        ("train", ["--dataset", "a", "--config", "no"], "gke", {}, MissingInputError, "--config no"),
        ("train", ["--dataset", "a", "--preset", "no"], "gke", {}, BadRequestError, "no preset 'no'"),
        ("train", ["--dataset", "a"], "gke", {"max_hours": 1000}, BadRequestError, "--max-hours 1000"),
        ("train", ["--dataset", "a"], "vm", {"max_hours": 0.0001}, BadRequestError, "--max-hours 0.0001: use at least"),
        ("train", ["--dataset", "a"], "gke", {"max_hours": 0.0166}, BadRequestError, "at least a minute"),
        ("train", ["--dataset", "a"], "local", {"max_hours": float("nan")}, BadRequestError, "--max-hours nan"),
        ("train", ["--dataset", "a"], "local", {"spot": True}, BadRequestError, "--spot is about machines in a cloud"),
        ("train", ["--dataset", "a"], "container", {"gpu_type": "l4"}, BadRequestError, "--gpu-type l4 is about"),
        ("train", ["--dataset", "a"], "plain", {"gpu_type": "l4"}, BadRequestError, "--gpu-type l4 decides nothing on"),
        ("train", ["--dataset", "a"], "plain", {"spot": True}, BadRequestError, "--spot decides nothing on 'plain'"),
        ("train", ["--dataset", "a"], "own", {"spot": False}, BadRequestError, "--on-demand decides nothing on 'own'"),
        ("train", ["--dataset", "a"], "own", {"gpu_type": "l4"}, BadRequestError, "by `node_selector:` alone"),
        ("sample", ["--run", "r"], "gke", {"slices": 2}, BadRequestError, "--slice is about many images"),
        (
            "sample",
            ["--run", "r", "--count", "9", "--slice", "0/2"],
            "gke",
            {"slices": 2},
            BadRequestError,
            "one of the slices that --slices 2 makes",
        ),
        ("sample", ["--run", "r"], "gke", {"nodes": 2}, BadRequestError, "--nodes 2 is for training"),
        ("sample", ["--run", "r", "--sampler", "x"], "gke", {}, BadRequestError, "no sampler 'x'"),
        ("pack", ["a.zip", "b", "--size", "8"], "gke", {}, BadRequestError, "SOURCE 'a.zip' is a path of this"),
        ("pack", ["file:///a", "b", "--size", "8"], "gke", {}, BadRequestError, "is a path of this machine"),
        ("pack", ["https://a/b.zip", "b", "--size", "8"], "gke", {}, BadRequestError, "nobody here speaks https"),
        ("pack", ["gs://u:secret@b/a.zip", "b", "--size", "8"], "gke", {}, BadRequestError, "user or password"),
        ("pack", ["gs://abc/b.zip", "b"], "gke", {}, BadRequestError, "--size is needed"),
    ],
)
def test_what_no_machine_could_do_is_refused_here(verb, words, on, wishes, error, part):
    with pytest.raises(error, match=re.escape(part)) as refusal:
        built(verb, words, on, **wishes)
    assert "secret" not in str(refusal.value)


def test_the_embedded_images_need_no_source_elsewhere():
    assert built("pack", ["landscape-sample", "tiles", "--size", "16"]).argv[2] == "landscape-sample"


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ("train --dataset a --on gek", 64, "no target 'gek'; did you mean 'gke'?"),
        ("train --dataset a --epoch 3 --on gke", 2, "No such option: --epoch"),
        ("train --on gke", 2, "Missing option '--dataset'"),
        ("train --dataset a --epochs x --on gke", 2, "Invalid value for '--epochs'"),
        ("sample --run a extra --on gke", 2, "extra"),
        ("pack --on gke", 2, "Missing argument 'SOURCE'"),
        ("train --dataset a --gpus -1", 2, "--gpus"),
        ("train --dataset a --nodes 0", 2, "--nodes"),
        ("train --dataset a --on gke -o xml --dry-run", 64, "-o xml: use yaml or json"),
        ("train --dataset a --on gke -o json", 64, "-o json is the format of --dry-run"),
        ("train --dataset a --on gke --dry-run --watch", 64, "leave one of them out"),
        ("train --dataset a --on gke --targets no.yaml", 66, "--targets no.yaml is not there"),
        ("train --dataset a --set train.batch_size=0 --on gke", 78, "train.batch_size"),
        ("train --dataset a --nodes 2", 64, "--nodes 2 needs several machines"),
        ("sample --run a --count 9 --slices 2", 64, "--slices 2 needs several machines"),
    ],
)
def test_the_code_says_what_is_wrong(words, code, part):
    assert part in refused(ddpm_here("submit", *words.split()), code)


def test_a_targets_file_that_is_not_valid_is_a_bad_configuration(folder):
    (folder / "targets.yaml").write_text("gke: {backend: kubernetes, namspace: a}")
    line = refused(ddpm_here("submit", "train", "--dataset", "a", "--on", "local"), Exit.BAD_CONFIG)
    assert "targets.yaml: target 'gke': unknown key 'namspace'; did you mean 'namespace'?" in line


@pytest.mark.parametrize("on", ["gke", "vm", "local", "container"])
def test_a_dry_run_prints_the_request_alone_and_needs_nothing(folder, on):
    """Neither credentials nor a network, nor a home folder."""
    words = ["submit", "train", *FOR_TRAIN, "--on", on, "--dry-run"]
    nothing = {"HOME": "/nonexistent", "KUBECONFIG": "/nonexistent", "GOOGLE_APPLICATION_CREDENTIALS": "/nonexistent"}
    without_network = ("unshare", "--user", "--map-root-user", "--net", DDPM)
    done = ddpm(*words, program=without_network, **nothing)
    text = succeeded(done)
    assert done.stderr == ""
    documents = list(yaml.safe_load_all(text))
    as_json = succeeded(ddpm_here(*words, "-o", "json", **nothing))
    decoder, found = json.JSONDecoder(), []
    while as_json.strip():
        document, end = decoder.raw_decode(as_json.lstrip())
        as_json = as_json.lstrip()[end:]
        found.append(document)
    assert found == documents
    assert "celeba" in text
    assert not (folder / "cache").exists()


@pytest.mark.parametrize("on", ["container", "gke", "cluster", "vm", "batch"])
def test_each_target_of_the_example_takes_each_verb(on):
    example = str(resources.files("job.jobs") / "targets.example.yaml")
    for words in (
        ["train", *FOR_TRAIN],
        ["sample", "--run", "celeba", "--seeds", "0-3"],
        ["pack", "landscape-sample", "tiles", "--size", "16"],
    ):
        words = ["submit", *words, "--on", on, "--targets", example, "--bucket", "gs://mine", "--dry-run"]
        assert list(yaml.safe_load_all(succeeded(ddpm_here(*words))))


def test_a_process_without_input_is_not_asked(tmp_path):
    targets = tmp_path / "targets.yaml"
    targets.write_text(
        "far: {backend: vm, project: my-project, zones: [us-east1-b], image: example.com/ddpm:1, bucket: gs://bucket}"
    )
    words = [DDPM, "submit", "train", "--dataset", "a", "--on", "far", "--targets", str(targets)]
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == Exit.BAD_REQUEST, done.stderr
    assert done.stderr.splitlines()[-1].endswith("there is no terminal to ask on; --yes submits without")


def test_nothing_is_by_reference_and_scripts_are_blocks():
    shared = {"a": 1}
    text = formatted([{"one": shared, "two": shared, "script": "#!/bin/sh\necho\n"}, {}])
    assert text == "---\none:\n  a: 1\ntwo:\n  a: 1\nscript: |\n  #!/bin/sh\n  echo\n--- {}\n"


def test_a_person_is_told_what_where_how_long_and_for_how_much():
    vm = parse_targets(
        "vm: {backend: vm, project: my-project, zones: [us-east1-b, us-east1-c], image: i:1, bucket: gs://bucket, "
        "price_per_hour: 0.75}",
        "f",
    )["vm"]
    spec = spec_of(parsed("train", ["--dataset", "a", "--run", "it"]), vm, Wishes(max_hours=10))
    lines = dict(line.split(maxsplit=1) for line in plan_lines(spec, vm))
    assert lines["job"] == "train-it, on vm (vm, project my-project, us-east1-b, then us-east1-c)"
    assert lines["command"] == "ddpm train --dataset a --run it --wait 80 --bucket gs://bucket"
    assert lines["machines"].startswith("1 × g2-standard-8, 1 × nvidia-l4 each; spot")
    assert lines["limit"].startswith("10 hours")
    assert lines["cost"] == "at most $7.50 (1 × $0.75 per hour, as the target says, × 10 hours)"
    lines = plan_lines(replace(spec, spot=False), vm.model_copy(update={"price_per_hour": None}))
    assert lines[-1] == "cost      price unknown"
    assert "on demand" in "\n".join(lines)


@pytest.mark.parametrize(("on", "gpus"), [("plain", 8), ("own", 1)])
def test_a_person_is_told_nothing_of_nodes_that_the_target_does_not_select(on, gpus):
    target = load_targets()[on]
    (line,) = [line for line in plan_lines(built("train", FOR_TRAIN, on), target) if line.startswith("machines")]
    assert line == f"machines  1 × node, {gpus} × GPU each; spot or on demand, as the target's nodes are"
    line = "\n".join(plan_lines(built("train", FOR_TRAIN, "gke", gpu_type="nvidia-h100-80gb"), load_targets()["gke"]))
    assert "1 × nvidia-h100-80gb each; spot, which may be taken away" in line


@pytest.mark.parametrize(
    ("machine_type", "said"),
    [
        ("g2-standard-24", "1 × g2-standard-24, no GPU used: 2 × nvidia-l4 idle, but paid for; on demand"),
        ("n1-standard-8", "1 × n1-standard-8, no GPU; on demand"),
        ("e2-standard-8", "1 × e2-standard-8, no GPU; on demand"),
    ],
)
def test_whoever_packs_is_told_of_gpus_that_are_paid_for(machine_type, said):
    vm = load_targets()["vm"].model_copy(update={"machine_type": machine_type})
    spec = spec_of(parsed("pack", ["landscape-sample", "tiles", "--size", "8"]), vm, Wishes())
    assert f"machines  {said}" in plan_lines(spec, vm)


AGAIN = "; what --watch submits again has what is left of them"


@pytest.mark.parametrize(
    ("on", "changes", "limit"),
    [
        ("gke", {}, "10 hours for all attempts together, then the engine ends it"),
        (
            "gke",
            {"nodes": 2},
            "10 hours from each start of the group of nodes, then Kubernetes ends it; preemptions start it again "
            "without bound",
        ),
        ("queued", {"nodes": 2}, "10 hours for all attempts together, then the engine ends it"),
        ("vm", {}, "10 hours for all attempts together, then the engine ends it"),
        (
            "batch",
            {},
            "10 hours for each attempt of a task, of which there may be 11, then Batch ends it",
        ),
    ],
)
def test_a_person_is_told_what_the_hours_mean_there(folder, on, changes, limit):
    more = """
queued: {backend: kubernetes, image: i, bucket: gs://bucket, queue: gpus}
batch: {backend: batch, project: my-project, regions: [us-east1], image: registry/ddpm:1, bucket: gs://bucket}
"""
    (folder / "targets.yaml").write_text(TARGETS + more)
    spec, target = built("train", FOR_TRAIN, on, max_hours=10, **changes), chosen_target(load_targets(), on)
    for is_watched in (False, True):
        lines = dict(line.split(maxsplit=1) for line in plan_lines(spec, target, is_watched=is_watched))
        assert lines["limit"] == f"{limit}{AGAIN * is_watched}; what is saved stays (--max-hours)"


@pytest.mark.parametrize("on", ["local", "container"])
def test_on_this_machine_no_engine_ends_a_job(on):
    lines = plan_lines(built("train", FOR_TRAIN, on, max_hours=10), chosen_target(load_targets(), on))
    assert any("10 hours if --max-hours says so, and then the job ends itself" in line for line in lines)


def test_without_a_terminal_somebody_must_have_said_yes():
    done = ddpm("submit", "train", *FOR_TRAIN, "--on", "gke", KUBECONFIG="/nonexistent")
    assert "--yes" in refused(done, Exit.BAD_REQUEST)
    assert "train-celeba, on gke" in done.stdout
    # With it, the next thing that is missing is a cluster.
    done = ddpm("submit", "train", *FOR_TRAIN, "--on", "gke", "--yes", KUBECONFIG="/nonexistent")
    assert done.returncode not in (0, 1, 2)
    assert "--yes" not in done.stderr


@pytest.mark.parametrize("answer", ["n", "", "yesterday", "\x04"])
def test_on_a_terminal_a_person_is_asked(answer):
    terminal, other = pty.openpty()
    child = subprocess.Popen(
        [DDPM, "submit", "train", *FOR_TRAIN, "--on", "gke"],
        env=environment(KUBECONFIG="/nonexistent"),
        stdin=other,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(other)
    os.write(terminal, answer.encode() + (b"" if answer == "\x04" else b"\n"))
    out, err = child.communicate(timeout=60)
    os.close(terminal)
    assert child.returncode == Exit.BAD_REQUEST
    assert "Submit? [y/N]" in out
    assert err == "ddpm: train-celeba is not submitted\n"


def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path):
    """In an interpreter that cannot import it, as where the extra is not installed."""
    blocked = tmp_path / "blocked"
    for name in ("kubernetes", "google"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from job.cli.app import main; main()"
    program = (sys.executable, "-P", "-c", code, str(blocked))
    for on, extra in (("gke", "kubernetes"), ("vm", "google")):
        words = ["submit", "train", *FOR_TRAIN, "--on", on]
        line = refused(ddpm(*words, "--yes", program=program), Exit.MISSING_INPUT)
        assert f"pip install 'ddpm-job[{extra}]'" in line
        assert "celeba" in succeeded(ddpm(*words, "--dry-run", program=program))
