"""What people and their shells and scripts get of the command line: JSON, loudness, completion, keys, whole help."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from job.cli.app import app
from job.config import NETWORKS, all_settings, draft, known_keys, parse_sets
from job.exits import Exit
from tests.job.command_line import ddpm_here, on_screen, refused, succeeded


def asked(*words):
    return json.loads(succeeded(ddpm_here(*words)))


def test_programs_get_everything_as_json(bucket):
    at = ("--bucket", bucket, "--json")
    (listed,) = asked("runs", "list", *at)
    assert (listed["name"], listed["state"], listed["epoch"], listed["hours_left"]) == ("walk", "finished", 3.0, None)
    shown = asked("runs", "show", "walk", *at)
    assert shown["checkpoints"] == ["epoch 1", "epoch 3"]
    assert shown["attempts"][0]["world_size"] == 1
    assert shown["uri"] == f"{bucket}/runs/walk"
    assert asked("runs", "verify", "walk", *at)["problems"] == []
    (dataset,) = asked("data", "list", *at)
    assert (dataset["name"], dataset["images"], len(dataset["classes"])) == ("tiles", 299, 5)
    (bucket / "datasets/tiles-16/preview.png").unlink()
    assert asked("data", "show", "tiles", *at) == dataset
    assert not (bucket / "datasets/tiles-16/preview.png").exists()
    assert asked("data", "verify", "tiles", *at)["problems"] == []


def test_problems_are_in_the_json(bucket):
    path = next((bucket / "datasets/tiles-16").glob("*.tar"))
    path.write_bytes(path.read_bytes()[:-1])
    done = ddpm_here("data", "verify", "tiles", "--bucket", bucket, "--json")
    assert done.returncode == Exit.BAD_DATA
    assert len(json.loads(done.stdout)["problems"]) == 1
    (bucket / "runs/walk/LATEST").write_text("{}")
    done = ddpm_here("runs", "verify", "walk", "--bucket", bucket, "--json")
    assert done.returncode == Exit.BAD_DATA
    assert "LATEST is corrupt" in json.loads(done.stdout)["problems"][0]


def test_quiet_and_verbose(bucket):
    said = ddpm_here("-v", "runs", "list", "--bucket", bucket).stderr
    assert re.search(rf"(?m)^read {re.escape(str(bucket))}/runs/walk/status\.json: \d\.\d\d\d s$", said)
    quiet = ddpm_here("-q", "runs", "show", "wal", "--bucket", bucket)
    assert "there is no run 'wal'" in refused(quiet, Exit.MISSING_INPUT)
    (bucket / "datasets/tiles-16/index.json").unlink()
    words = ("report", "walk", "--bucket", bucket)
    quiet, usual = ddpm_here("-q", *words), ddpm_here(*words)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert "going on without the dataset" in usual.stderr
    assert quiet.stdout == usual.stdout


def completed(words, bucket):
    """What bash gets when somebody presses the tabulator after these words."""
    at = {"COMP_WORDS": f"ddpm {words}", "COMP_CWORD": str(len(words.split(" "))), "DDPM_BUCKET": str(bucket)}
    return CliRunner().invoke(app, prog_name="ddpm", env={"_DDPM_COMPLETE": "complete_bash", **at})


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
    done = completed(words, bucket)
    assert offered in done.stdout.splitlines(), done.stderr


def test_a_missing_bucket_offers_nothing(tmp_path):
    assert completed("runs show ", tmp_path / "no").output.strip() == ""


def test_every_key_has_its_values():
    listed = all_settings()
    assert list(listed) == known_keys()
    assert [key for key, setting in listed.items() if not setting["meaning"].partition(" (")[0]] == []
    assert "data.order" not in listed
    assert listed["train.batch_size"]["takes"] == "integer ≥ 1 ≤ 1,000,000"
    assert listed["train.learning_rate"]["takes"] == "number > 0"
    assert listed["data.crop_scale"]["takes"] == "list of number > 0 ≤ 1"
    assert listed["data.size"]["takes"] == "integer ≥ 1 ≤ 4,096 or string or null"
    assert listed["model.kind"]["takes"] == "|".join(NETWORKS)
    assert listed["train.precision"]["takes"] == "auto|fp32|bf16"
    assert list(asked("config", "--list", "--json")) == known_keys()


def test_keys_are_whole_however_narrow_the_terminal_is():
    sections = {"train": 19, "train.adam": 2, "": len(known_keys())}
    for begin, count in sections.items():
        keys_listed = list(asked("config", "--list", "--json", *filter(None, [begin])))
        assert len(keys_listed) == count and all(key.startswith(begin) for key in keys_listed)
    assert list(asked("config", "train.adam", "--json")) == ["train.adam_betas", "train.adam_eps"]
    line = refused(ddpm_here("config", "--list", "trian"), Exit.BAD_REQUEST)
    assert "no key begins with 'trian'; did you mean 'train'? (preset, imported, data, model, " in line
    # A pager gets one line for each key, as long as its text.
    header, *lines = succeeded(ddpm_here("config", "--list")).splitlines()
    assert header.split() == ["key", "default", "meaning"]
    assert [line.split()[0] for line in lines] == known_keys()
    assert all(line == line.rstrip() for line in (header, *lines))
    _, *lines = on_screen("config", "--list", columns=60).splitlines()
    assert [line[1:].partition(" ")[0] for line in lines if line[1] != " "] == known_keys()


@pytest.mark.parametrize("columns", [80, 40])
def test_names_are_whole_however_narrow_the_terminal_is(bucket, columns):
    name = "walk-with-a-name-of-31-letters"
    (bucket / "runs/walk").rename(bucket / "runs" / name)
    header, row = on_screen("runs", "list", "--bucket", bucket, columns=columns).splitlines()
    assert max(len(header), len(row)) == columns and row.endswith("…")
    assert row.split()[0] == name and "finished".startswith(row.split()[1].rstrip("…"))


def test_values_have_an_origin(tmp_path):
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
