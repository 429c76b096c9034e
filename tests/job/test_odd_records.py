"""Records whose hash is right and whose content is odd: what lists and shows goes on, and what verifies names them."""

from __future__ import annotations

import json

import pytest

from job.exits import Exit
from tests.fuzzing import sealed
from tests.job.command_line import ddpm_here, refused, succeeded

STATUS, ATTEMPT = "status.json", "attempts/000001.json"
ODD = {
    "month 13": (STATUS, {"updated": "2026-13-01T00:00:00Z"}),
    "digits of another script": (STATUS, {"updated": "٢٠٢٦-٠١-٠١T٠٠:٠٠:٠٠Z"}),
    "yesterday": (ATTEMPT, {"started": "yesterday"}),
    "no zone": (ATTEMPT, {"started": "2026-01-01T00:00:00"}),
    "seen in hour 25": (
        ATTEMPT,
        {"previous_seen": {"state": "running", "images_seen": 1, "updated": "2026-01-01T25:00:00Z"}},
    ),
}


@pytest.fixture
def forge(bucket):
    def forge(key: str, changes: dict[str, object]) -> None:
        path = bucket / "runs/walk" / key
        path.write_bytes(sealed(json.loads(path.read_bytes()) | changes))

    return forge


def shown(bucket):
    """The run in the list, and by itself; all else that shows it ends well, too."""
    for words in ("runs list --json", "report", "report walk"):
        succeeded(ddpm_here(*words.split(), "--bucket", bucket))
    return [succeeded(ddpm_here("runs", *words, "--bucket", bucket)) for words in (["list"], ["show", "walk"])]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_moment_costs_its_record(bucket, forge, name):
    key, changes = ODD[name]
    forge(key, changes)
    listed, alone = shown(bucket)
    assert ("cannot be read" in listed) == (key == STATUS)
    assert ("attempt 1   cannot be read: " in alone) == (key == ATTEMPT)
    done = ddpm_here("runs", "verify", "walk", "--bucket", bucket)
    assert f"/runs/walk/{key} " in done.stdout
    refused(done, Exit.BAD_DATA)


@pytest.mark.parametrize("speed", [1e-300, 5e-324, float("nan"), float("inf")])
def test_an_impossible_speed_has_no_end(bucket, forge, speed):
    forge(STATUS, {"state": "running", "images_per_second": speed, "updated": "9999-12-31T23:59:59Z"})
    forge(STATUS, {"images_seen": 0, "target_images": 10**400})
    assert "running" in shown(bucket)[0]


def test_wrong_changes_name_their_attempt(bucket, forge):
    forge(ATTEMPT, {"changes": {"train.epochs": "many"}})
    words = ("--bucket", bucket)
    for command in (("runs", "prune", "walk"), ("train", "--dataset", "tiles", "--run", "walk")):
        told = refused(ddpm_here(*command, *words), Exit.BAD_DATA)
        assert f"{ATTEMPT}: train.epochs" in told and "config.yaml" not in told
    done = ddpm_here("runs", "verify", "walk", *words)
    assert f"{ATTEMPT}: train.epochs" in done.stdout
    refused(done, Exit.BAD_DATA)
    assert "taking the run as it began" in ddpm_here("report", "walk", *words).stderr
