"""`targets.yaml` and the words after `ddpm submit`: what is valid, and what is refused with one line and a code.

`golden/refusals.yaml` holds what is refused; whatever else a person may write is searched for.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from job.exits import BadConfigError, Exit, State
from job.jobs.backends import JobStatus
from job.jobs.backends.kubernetes import KubernetesTarget
from job.jobs.backends.kubernetes_objects import size_bytes
from job.jobs.backends.local import LocalTarget
from job.jobs.targets import load_targets, parse_targets, target_class
from job.stop import deadline
from tests.fuzzing import examples, search
from tests.job.command_line import ddpm_here, raised, refused
from tests.job.jobs.submitting import FOR_TRAIN, GOLDEN, SHOWN, TARGETS, built, parsed, spec, target

pytestmark = pytest.mark.usefixtures("folder")
GKE = "gke: {backend: kubernetes, image: i, bucket: gs://bucket"
VM = "v: {backend: vm, project: my-project, zones: [us-east1-b]"
SLURM = {"backend": "slurm", "folder": "/shared/jobs"}
KEPT = yaml.safe_load((GOLDEN / "refusals.yaml").read_text())


def test_refused_targets_name_the_key():
    for text, said in (row.split("  ->  ") for row in KEPT["targets"].splitlines()):
        text, parts = text.replace("$GKE", GKE).replace("$VM", VM), said.split(" && ")
        with pytest.raises(BadConfigError) as refusal:
            parse_targets(text, "targets.yaml", text.partition(":")[0])
        said = str(refusal.value)
        assert said.startswith("targets.yaml") and "hunter2" not in said, text
        assert all(part in said for part in parts) and refusal.value.exit_code == 78, said
    for name in KEPT["secret"]:
        raised(78, f"{name} looks like a secret", parse_targets, GKE + f", env: {{{name}: x}}}}", "f", "gke")
    made = parse_targets(GKE + f", env: {{{', '.join(f'{name}: /a' for name in KEPT['harmless'])}}}}}", "f")["gke"]
    assert list(made.env) == KEPT["harmless"]


def test_refused_jobs_name_the_option(folder):
    (folder / "targets.yaml").write_text(TARGETS)
    (folder / "mine.py").touch()
    for words, said in (row.split("  ->  ") for row in KEPT["jobs"].splitlines()):
        code, _, part = said.partition(" ")
        line = refused(ddpm_here("submit", *words.replace("$TRAIN", "train --dataset a").split()), int(code))
        assert part in line and "secret" not in line, words
    assert not (folder / "nowhere").exists()
    # A run that is there has a batch of its own, whatever its preset says.
    assert built("train", [*FOR_TRAIN, "--processes", "64"], nodes=4)
    assert built("train", [*FOR_TRAIN, "--set", "train.batch_size=1"])
    raised(64, "use a letter and up to 45 lower-case letters", spec, "t" * 47)


def test_what_could_not_run_is_not_rendered():
    for name, keys, changes, part in KEPT["rendered"]:
        job = spec(**changes | ({"argv": tuple(changes["argv"])} if "argv" in changes else {}))
        for each in ("vm", "batch") if name == "google" else (SLURM if name == "slurm" else name,):
            raised(64, re.escape(part), target(each, **keys).render, job)


def test_option_variable_then_working_folder(monkeypatch):
    for name, place in (("here", "."), ("there", "a"), ("elsewhere", "b")):
        Path(place).mkdir(exist_ok=True)
        Path(place, "targets.yaml").write_text(GKE.replace("gke", name) + "}")
    assert list(load_targets()) == ["local", "container", "here"]
    monkeypatch.setenv("DDPM_TARGETS", "a/targets.yaml")
    assert list(load_targets()) == ["local", "container", "there"]
    assert list(load_targets(Path("b/targets.yaml"))) == ["local", "container", "elsewhere"]
    Path("c").write_bytes(b"\xff\xfe\x00")
    for file, error, said in (
        ("no.yaml", 66, r"--targets no\.yaml: No such file"),
        ("c", 78, "is not valid YAML"),
        ("/dev/zero", 78, "/dev/zero is larger than 256 KiB: is it the right file"),
        ("b", 64, "b: Is a directory"),
    ):
        raised(error, said, load_targets, Path(file))
    monkeypatch.setenv("DDPM_TARGETS", "neither.yaml")
    raised(66, r"DDPM_TARGETS neither\.yaml: No such file", load_targets)


@pytest.mark.parametrize(
    ("words", "code", "begin"),
    [
        ("submit train --dataset a --on gke --dry-run", 0, "left out"),
        ("doctor --on local --no-bucket", 0, "left out"),
        ("jobs list", 0, "left out"),
        ("jobs status train-none", 66, "left out"),
        ("submit train --dataset a --on old --dry-run", 78, "ddpm"),
        ("jobs list --on old", 78, "ddpm"),
    ],
)
def test_a_target_that_is_not_valid_blocks_no_other(words, code, begin, monkeypatch):
    monkeypatch.setattr(KubernetesTarget, "jobs", lambda self: [])
    monkeypatch.setattr(KubernetesTarget, "alive", lambda self, name: JobStatus(name, State.GONE))
    monkeypatch.setattr(LocalTarget, "checks", lambda self, bucket: ())
    Path("targets.yaml").write_text(f"{GKE}, gpu_type: nvidia-l4}}\nold: {{backend: kubernetes, zone: a}}\n")
    done = ddpm_here(*words.split())
    assert done.returncode == code, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "targets.yaml" in line)
    assert line.startswith(f"{begin}: targets.yaml: target 'old': unknown key 'zone'")


def test_sizes_are_those_of_kubernetes():
    for text, size in (("16Gi", 16 * 2**30), ("1.5G", 15 * 10**8), ("1Ti", 2**40), ("2k", 2000), ("0.1Ki", 103)):
        assert size_bytes(text) == size


TYPED = ["train --dataset mine", "data ensure mine", "data ensure mine --on container", "data show mine"]
TYPED += ["runs show walk", "sample --run walk", "submit train --dataset mine"]


@pytest.mark.parametrize("typed", [*TYPED, "submit sample --run walk --on container"])
def test_bucket_of_option_variable_or_target(folder, typed):
    def looked_in(*words, **variable):
        line = refused(ddpm_here(*typed.split(), *words, **variable), 66)
        return [name for name in ("/bucket", "of-target", "of-variable", "of-option") if name in line]

    assert looked_in() == ["/bucket"]
    (folder / "targets.yaml").write_text("local: {bucket: of-target}\ncontainer: {bucket: of-target, image: i}")
    assert looked_in() == ["of-target"]
    assert looked_in(DDPM_BUCKET="of-variable") == ["of-variable"]
    assert looked_in("--bucket", "of-option", DDPM_BUCKET="of-variable") == ["of-option"]


VALID = {backend: keys | {"bucket": "gs://bucket"} for backend, keys in SHOWN.items()}
REFUSALS = (Exit.USAGE, Exit.BAD_REQUEST, Exit.MISSING_INPUT, Exit.BAD_CONFIG)
NASTY = ["--privileged", "/a b", "/$SLURM_JOB_ID", "-v/:/host", "a,destination=/etc", "./a,b", "a b", "../..", "$(id)"]
NASTY += ["é", "x" * 500, "", "1e999", "nan", "0", "-1", "us-east1", "projects/p/regions/r/s"]
UNPRINTABLE = ["a\0b", "\x1b[31m", "\n--privileged"]
SCALARS = st.sampled_from(NASTY + UNPRINTABLE) | st.text(max_size=8) | st.integers() | st.floats() | st.booleans()
SCALARS |= st.none() | st.binary(max_size=4) | st.dates()
KEYS = SCALARS | st.sampled_from(["A", "HF_TOKEN", "key", "operator"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
WORDS = st.sampled_from([*NASTY, "1", "2", "90m", "12s", "1h", "bf16", "0-3", "0/2", "train.batch_size=1", "fp32"])
BEGIN = {"train": ["--dataset", "a"], "sample": ["--run", "a"], "pack": ["gs://abc/b.zip", "a", "--size", "8"]}
BEGIN["evaluate"] = BEGIN["sample"]
OPTIONS = {
    "train": "dataset run set processes stop-after epochs preset wait bucket",
    "sample": "run count slice seeds checkpoints stop-after precision save",
    "evaluate": "run count checkpoints stop-after precision metrics extractor extractor-file repeats",
    "pack": "size crop licence stop-after max-bad bucket",
}
RESOURCES = "gpus nodes gpu-type max-hours slices config"
OPTIONS_OF_ENGINES = "--name --label --pull --shm-size --mount --env --memory --network --userns --security-opt"
OPTIONS_OF_ENGINES += " --stop-timeout --read-only --tmpfs --user --cap-drop --hostname --env-file --ipc --ulimit"
OPTIONS_OF_ENGINES += " --volume --device --gpus"
BASH = ("/bin/bash", "--restricted", "--noprofile", "--norc", "-c")
MOUNTS = ("type source destination", "type source destination readonly", "type source target")


@st.composite
def changed_targets(draw):
    """A target that is valid but for some of its keys."""
    name = draw(st.sampled_from([*VALID]))
    keys = st.sampled_from([*target_class(name).model_fields, "nmae"]) | SCALARS
    block = VALID[name] | draw(st.dictionaries(keys, VALUES, min_size=1, max_size=2))
    return name, yaml.safe_dump({name: block}, allow_unicode=True).encode("utf-8", "surrogatepass")


@st.composite
def commands(draw):
    """A verb, and some options of it with any values."""
    verb = draw(st.sampled_from([*BEGIN]))
    options = st.sampled_from([*OPTIONS[verb].split(), *RESOURCES.split()])
    chosen = draw(st.lists(st.tuples(options, WORDS), max_size=3))
    return [verb, *BEGIN[verb], *(f"--{option}={word}" for option, word in chosen)]


def submitted(name: str, text: bytes, words: list[str]) -> None:
    """A dry run refuses as it may, or prints a command that its job takes, and no option of an engine but our own."""
    Path("t").write_bytes(text)
    done = ddpm_here("submit", *words, "--on", name, "--targets", "t", "--dry-run")
    if done.returncode in REFUSALS:
        # A line about each target that is not valid, and not used.
        told = "\n".join(line for line in done.stderr.split("\n")[:-1] if not line.startswith("left out: t: target "))
        assert told.startswith("Usage: ") or (told.startswith("ddpm: ") and len(told.splitlines()) == 1), told
        assert not set(told) & set(map(chr, range(32))) - {"\n"}, told
        return
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("#!"):
        check_command(words_of(done.stdout), words[0])
        return
    for made in yaml.safe_load_all(done.stdout):
        rest = made["command"][2 if name == "container" else 0 :] if name in ("container", "local") else []
        for item in made.get("metadata", {}).get("items", ()) if name == "vm" else ():
            rest = item["value"].splitlines() if item["key"] == "ddpm-words" else rest
        while rest and rest[0].startswith("-"):
            option, equals, value = rest.pop(0).partition("=")
            assert option in OPTIONS_OF_ENGINES.split() and (equals or option == "--read-only"), option
            assert option != "--mount" or " ".join(part.split("=")[0] for part in value.split(",")) in MOUNTS, value
        if rest:
            check_command(rest[1:], words[0])


def check_command(rest: list[str], verb: str) -> None:
    """The job's program takes its words."""
    again = parsed(verb, rest[2 if verb == "pack" else 1 :])
    assert again.command == tuple(rest[: len(again.command)])
    again.check()
    with deadline(again.stop_after):
        pass


def words_of(script: str) -> list[str]:
    """Our words, as a shell finds them in a script for Slurm, with nothing to run or to expand but a number."""
    header, body, _ = script.partition("\n# Runs a job")
    assert body
    shown = [*BASH, header + '\nprintf "%s\\0" "${words[@]}"']
    done = subprocess.run(shown, env={"SLURM_ARRAY_TASK_ID": "0"}, capture_output=True, check=True)
    assert not done.stderr
    found = done.stdout.decode(errors="surrogateescape").split("\0")[:-1]
    program = next(number for number, word in enumerate(found) if word.endswith(("/bin/ddpm", "ddpm:1", "ddpm")))
    return found[program + 1 :]


@examples(few=10, many=400)
def test_any_targets_and_words(count):
    @search(count, changed_targets(), commands())
    def check(target, words):
        submitted(*target, words)

    @search(count, st.sampled_from([*VALID]), commands())
    def check_words(name, words):
        submitted(name, yaml.safe_dump({name: VALID[name]}).encode(), words)

    whole = yaml.safe_dump(VALID).encode()

    @search(count, st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=20), st.sampled_from([*VALID]))
    def check_bytes(start, length, put, name):
        submitted(name, whole[:start] + put + whole[start + length :], ["train", "--dataset", "a"])
