"""Whatever `targets.yaml` and the words of `ddpm submit` say: one line and a code of the table, or a job alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from job.exits import Exit
from job.jobs.targets import target_class
from job.stop import deadline
from tests.fuzzing import examples, search
from tests.job.command_line import ddpm_here
from tests.job.jobs.submitting import SHOWN, parsed

pytestmark = pytest.mark.usefixtures("folder")

VALID = {backend: keys | {"bucket": "gs://bucket"} for backend, keys in SHOWN.items()}
REFUSALS = (Exit.USAGE, Exit.BAD_REQUEST, Exit.MISSING_INPUT, Exit.BAD_CONFIG)
NASTY = [
    "--privileged",
    "/a b",
    "/$SLURM_JOB_ID",
    "-v/:/host",
    "a,destination=/etc",
    "./a,b",
    "a b",
    "../..",
    "$(id)",
    "é",
    "x" * 500,
    "",
]
NASTY += ["1e999", "nan", "0", "-1", "us-east1", "projects/p/regions/r/s", "a\0b", "\x1b[31m", "\n--privileged"]
SCALARS = st.sampled_from(NASTY) | st.text(max_size=8) | st.integers() | st.floats() | st.booleans() | st.none()
SCALARS |= st.binary(max_size=4) | st.dates()
KEYS = SCALARS | st.sampled_from(["A", "HF_TOKEN", "key", "operator"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
WORDS = st.sampled_from([*NASTY[:-3], "1", "2", "90m", "12s", "1h", "bf16", "0-3", "0/2", "train.batch_size=1", "fp32"])
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
        check_words_of(done.stdout, words[0])
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


def check_words_of(script: str, verb: str) -> None:
    """A shell finds in a script for Slurm the words of our command, and nothing to run or to expand but a number."""
    header, body, _ = script.partition("\n# Runs a job")
    assert body
    shown = [*BASH, header + '\nprintf "%s\\0" "${words[@]}"']
    done = subprocess.run(shown, env={"SLURM_ARRAY_TASK_ID": "0"}, capture_output=True, check=True)
    assert not done.stderr
    found = done.stdout.decode(errors="surrogateescape").split("\0")[:-1]
    program = next(number for number, word in enumerate(found) if word.endswith(("/bin/ddpm", "ddpm:1", "ddpm")))
    check_command(found[program + 1 :], verb)


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
