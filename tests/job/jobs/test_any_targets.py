"""Whatever `targets.yaml` and the words of `ddpm submit` say: a code of the table and one line, or a job without more."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from job.exits import Exit
from job.jobs.targets import BY_BACKEND
from tests.fuzzing import examples, search
from tests.job.command_line import ddpm_here

pytestmark = pytest.mark.usefixtures("folder")

VALID = {
    "local": {"backend": "local", "bucket": "gs://bucket"},
    "container": {"backend": "container", "bucket": "gs://bucket", "engine": "podman"},
    "gke": {"backend": "kubernetes", "image": "registry/ddpm:1", "bucket": "gs://bucket", "gpu_type": "nvidia-l4"},
    "vm": {"backend": "vm", "project": "my-project", "zones": ["us-east1-b"], "image": "i:1", "bucket": "gs://bucket"},
    "batch": {"backend": "batch", "project": "my-project", "regions": ["us-east1"], "image": "i:1", "bucket": "s3://abc"},
}
REFUSALS = {Exit.USAGE, Exit.BAD_REQUEST, Exit.MISSING_INPUT, Exit.BAD_CONFIG}
NASTY = ["--privileged", "-v/:/host", "a,destination=/etc", "a b", "../..", "a\0b", "\x1b[31m", "\n--privileged", "$(id)",
         "", "x" * 500, "gs://b/\n", "./a,b", "é", "1e999", "nan", "0", "-1", "us-east1", "projects/p/regions/r/s"]  # fmt: skip
TEXTS = st.sampled_from(NASTY) | st.text(max_size=8)
SCALARS = TEXTS | st.integers() | st.floats() | st.booleans() | st.none() | st.binary(max_size=4) | st.dates()
KEYS = SCALARS | st.sampled_from(["A", "HF_TOKEN", "key", "operator"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
WORDS = st.sampled_from([*NASTY, "1", "2", "90m", "12s", "1h", "bf16", "0-3", "0/2", "train.batch_size=1", "fp32"])
OPTIONS = {
    "train": ["--dataset", "--run", "--set", "--processes", "--stop-after", "--epochs", "--preset", "--wait", "--bucket"],
    "sample": ["--run", "--count", "--slice", "--seeds", "--checkpoints", "--stop-after", "--precision", "--save"],
    "pack": ["--size", "--crop", "--licence", "--stop-after", "--max-bad", "--bucket"],
}
RESOURCES = ["--gpus", "--nodes", "--gpu-type", "--max-hours", "--slices", "--config", "--output"]
BEGIN = {"train": ["--dataset", "a"], "sample": ["--run", "a"], "pack": ["gs://abc/b.zip", "a", "--size", "8"]}
TAKE_A_VALUE = {"--name", "--label", "--pull", "--shm-size", "--mount", "--env", "--memory", "--network", "--userns",
                "--security-opt", "--device", "--gpus"}  # fmt: skip
STAND_ALONE = {"--stop-timeout", "--read-only", "--tmpfs", "--user", "--cap-drop", "--security-opt"}


@st.composite
def changed_targets(draw):
    """A target that is valid but for some of its keys."""
    name = draw(st.sampled_from([*VALID]))
    keys = st.sampled_from([*BY_BACKEND[VALID[name]["backend"]].model_fields, "nmae"]) | SCALARS
    block = VALID[name] | draw(st.dictionaries(keys, VALUES, min_size=1, max_size=2))
    return name, yaml.safe_dump({name: block}, allow_unicode=True).encode("utf-8", "surrogatepass")


@st.composite
def words(draw):
    """A verb, and some options of it with any values."""
    verb = draw(st.sampled_from([*BEGIN]))
    option = st.sampled_from([*OPTIONS[verb], *RESOURCES])
    chosen = draw(st.lists(st.tuples(option, WORDS.filter(lambda word: "\0" not in word)), max_size=3))
    return verb, [*BEGIN[verb], *(f"{name}={value}" for name, value in chosen)]


def submitted(name: str, text: bytes, verb: str, options: list[str]) -> list[dict]:
    """What a dry run prints; nothing if it refuses as it may."""
    Path("t").write_bytes(text)
    done = ddpm_here("submit", verb, *options, "--on", name, "--targets", "t", "--dry-run")
    assert done.returncode in {0, *REFUSALS}, done.stderr
    if done.returncode:
        told = done.stderr.rstrip("\n")
        assert told.startswith(("ddpm: ", "Usage: ")), told
        assert not told.startswith("ddpm: ") or len(told.splitlines()) == 1, told
        assert not set(told) & set(map(chr, range(32))) - {"\n"}, told
        return []
    return list(yaml.safe_load_all(done.stdout))


def assert_nothing_more(name: str, manifests: list[dict]) -> None:
    """The words of a container are options that this program gives it, the image, and a command of this program."""
    if name == "container" and manifests:
        rest = manifests[0]["command"][2:]
    elif name == "vm" and manifests:
        rest = next(item["value"] for item in manifests[0]["metadata"]["items"] if item["key"] == "ddpm-words").splitlines()
    else:
        return
    while rest[0].startswith("-"):
        option, _, value = rest.pop(0).partition("=")
        if not value and option in TAKE_A_VALUE:
            value = rest.pop(0)
        if option == "--mount":
            keys = [part.partition("=")[0] for part in value.split(",")]
            assert keys in (["type", "source", "destination"], ["type", "source", "destination", "readonly"],
                            ["type", "source", "target"]), value  # fmt: skip
        assert option in TAKE_A_VALUE | STAND_ALONE | {
            "--hostname", "--env-file", "--ipc", "--ulimit", "--volume"}, option  # fmt: skip
    assert rest[1] in ("train", "sample", "data"), rest


@examples(few=12, many=3000)
def test_any_targets_and_any_words_are_refused_in_a_line_or_give_a_job_without_more(count):
    @search(count, changed_targets(), words())
    def check(target, command):
        assert_nothing_more(target[0], submitted(*target, *command))

    @search(count, st.sampled_from([*VALID]), words())
    def check_words(name, command):
        assert_nothing_more(name, submitted(name, yaml.safe_dump({name: VALID[name]}).encode(), *command))

    whole = yaml.safe_dump(VALID).encode()

    @search(count, st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=20), st.sampled_from([*VALID]))
    def check_bytes(start, length, put, name):
        submitted(name, whole[:start] + put + whole[start + length :], "train", ["--dataset", "a"])
