"""What people and their shells and scripts get of the command line: JSON, loudness, completion, keys, whole help."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import typer

from job.cli import app as cli
from job.config import NETWORKS, draft, known_keys, parse_sets
from job.exits import Exit
from job.report.settings import keys
from tests.job.command_line import DDPM, ddpm, ddpm_here, environment, refused, succeeded


def asked(*words):
    return json.loads(succeeded(ddpm_here(*words)))


def test_everything_that_is_told_is_told_to_programs_as_well(bucket):
    at = ("--bucket", bucket, "--json")
    (listed,) = asked("runs", "list", *at)
    assert (listed["name"], listed["state"], listed["epoch"], listed["hours_left"]) == ("walk", "finished", 3.05, None)
    shown = asked("runs", "show", "walk", *at)
    assert shown["checkpoints"] == ["epoch 1", "epoch 3"]
    assert shown["attempts"][0]["world_size"] == 1
    assert f"{bucket}/runs/walk/report.html" in shown["outputs"]
    assert asked("runs", "verify", "walk", *at)["problems"] == []
    (dataset,) = asked("data", "list", *at)
    assert (dataset["name"], dataset["images"], len(dataset["classes"])) == ("tiles", 299, 5)
    assert asked("data", "show", "tiles", *at) == dataset
    assert not (bucket / "datasets/tiles-16/contact-sheet.png").exists()
    assert asked("data", "verify", "tiles", *at)["problems"] == []


def test_what_is_wrong_is_in_the_json_too_and_in_the_exit_code(bucket):
    path = next((bucket / "datasets/tiles-16").glob("*.tar"))
    path.write_bytes(path.read_bytes()[:-1])
    done = ddpm_here("data", "verify", "tiles", "--bucket", bucket, "--json")
    assert done.returncode == Exit.BAD_DATA
    assert len(json.loads(done.stdout)["problems"]) == 1
    (bucket / "runs/walk/LATEST").write_text("{}")
    done = ddpm_here("runs", "verify", "walk", "--bucket", bucket, "--json")
    assert done.returncode == Exit.BAD_DATA
    assert "LATEST is corrupt" in json.loads(done.stdout)["problems"][0]


def test_quiet_tells_results_alone_and_verbose_each_request(bucket):
    words = ("sample", "--run", "walk", "--bucket", bucket, "--seeds", 0)
    quiet, usual = ddpm("-q", *words), ddpm(*words)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert usual.stderr and quiet.stdout.split()[0] == usual.stdout.split()[0]
    assert "there is no run 'wal'" in refused(ddpm("-q", "runs", "show", "wal", "--bucket", bucket), Exit.MISSING_INPUT)
    said = ddpm("-v", "runs", "list", "--bucket", bucket).stderr
    assert re.search(rf"(?m)^read {re.escape(str(bucket))}/runs/walk/status\.json: \d\.\d\d\d s$", said)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("runs show ", "walk"),
        ("sample --run w", "walk"),
        ("report ", "walk"),
        ("train --dataset t", "tiles"),
        ("data show ", "tiles"),
        ("train --preset landscape-", "landscape-sample"),
        ("config --set train.batch", "train.batch_size="),
        ("doctor --on loc", "local"),
        ("jobs status train-", "train-walk"),
        ("sample --run walk --sampler dpmpp_3", "dpmpp_3m"),
        ("evaluate --run walk --grid kar", "karras"),
        ("evaluate --run walk --extractor mob", "mobilenet"),
    ],
)
def test_a_shell_offers_names(bucket, words, offered):
    (bucket / "jobs/train-walk").mkdir(parents=True)
    (bucket / "jobs/train-walk/0-of-1.json").write_text("{}")
    line = f"ddpm {words}"
    variables = environment(DDPM_BUCKET=str(bucket), _DDPM_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD="9")
    variables["COMP_CWORD"] = str(len(line.split(" ")) - 1)
    done = subprocess.run([DDPM], env=variables, capture_output=True, text=True, check=False)
    assert offered in done.stdout.splitlines(), done.stderr


def test_a_bucket_that_is_not_there_offers_nothing_and_says_nothing(tmp_path):
    line = "ddpm runs show "
    at = {"DDPM_BUCKET": str(tmp_path / "no"), "_DDPM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "3"}
    done = subprocess.run([DDPM], env=environment(**at), capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_every_key_is_said_to_take_what_it_takes():
    listed = {key.key: key for key in keys()}
    assert list(listed) == known_keys()
    assert [key.key for key in listed.values() if not key.description] == []
    assert "data.order" not in listed
    assert listed["train.batch_size"].takes == "whole number from 1 up to 1,000,000"
    assert listed["train.learning_rate"].takes == "number above 0"
    assert listed["data.crop_scale"].takes == "2 numbers above 0 up to 1"
    assert listed["data.size"].takes == "whole number from 1 up to 4,096 or null"
    assert listed["model.kind"].takes == "|".join(NETWORKS)
    assert listed["train.precision"].takes == "auto|fp32|bf16"
    assert asked("config", "--list", "--json")[5]["key"] == known_keys()[5]
    assert "train.warmup_images" in succeeded(ddpm_here("config", "--list"))


def test_each_value_says_where_it_comes_from(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {batch_size: 32, seed: 7}\n")
    words = ("config", "--preset", "celeba", "--config", tmp_path / "mine.yaml", "--set", "train.batch_size=64")
    told = asked(*words, "--json")
    assert told["train.batch_size"] == {"value": 64, "from": "--set"}
    assert told["train.seed"] == {"value": 7, "from": str(tmp_path / "mine.yaml")}
    assert told["model.channel_mults"] == {"value": [1, 2, 2, 2, 4], "from": "preset celeba"}
    assert told["train.warmup_images"]["from"] in ("default", "preset celeba")
    assert told["data.size"] == {"value": None, "from": "the dataset"}
    sets, unset = parse_sets(["train.batch_size=64", "train.seed=7"]), {"preset": "celeba", "data.order": "feistel-1"}
    assert {key: values["value"] for key, values in told.items()} | unset == draft("celeba", sets).flat()
    # What it prints is what one types.
    lines = [line.split() for line in succeeded(ddpm_here(*words)).splitlines()]
    (mults,) = (words[1] for words in lines if words[0] == "model.channel_mults")
    assert parse_sets([f"model.channel_mults={mults}"])["model.channel_mults"] == "1,2,2,2,4"
    assert "there is no preset 'celebs'" in refused(ddpm_here("config", "--preset", "celebs"), Exit.BAD_REQUEST)


def commands(group=None, words=()):
    group = group or typer.main.get_command(cli.app)
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_is_whole_at_100_columns(words):
    lines = succeeded(ddpm_here(*words, "--help", COLUMNS="100")).splitlines()
    assert [line for line in lines if len(line) > 100] == []
    assert [line for line in lines[1:] if line.endswith("...")] == []
