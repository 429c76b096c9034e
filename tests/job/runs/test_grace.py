"""Whether a save fits between a preemption notice and the end, told by the command line, and what follows if not."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from job.exits import BadRequestError
from job.runs import grace
from job.runs.checkpoints import list_checkpoints
from job.runs.grace import cadence_minutes, fits, measure_save_seconds
from job.stop import GRACE_VARIABLE, MARGIN_SECONDS, Stop, default_grace_seconds
from job.store import open_store
from job.store.local import LocalStore
from tests.job.command_line import ddpm, refused, settings, succeeded
from tests.job.hooked import hooked

SECONDS_PER_BYTE, ROUND_TRIP_SECONDS = 2e-6, 0.1


class SlowStore(LocalStore):
    """A folder that takes its time."""

    def upload(self, path: Path, key: str) -> None:
        time.sleep(ROUND_TRIP_SECONDS + path.stat().st_size * SECONDS_PER_BYTE)
        super().upload(path, key)

    def delete(self, key: str) -> None:
        time.sleep(ROUND_TRIP_SECONDS)
        super().delete(key)


def test_a_spot_machine_has_30_seconds_unless_the_variable_says_otherwise(monkeypatch):
    monkeypatch.delenv(GRACE_VARIABLE, raising=False)
    assert default_grace_seconds() == 30
    monkeypatch.setenv(GRACE_VARIABLE, "15")
    assert default_grace_seconds() == 15


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon", "15s"])
def test_what_the_variable_cannot_say(monkeypatch, text):
    monkeypatch.setenv(GRACE_VARIABLE, text)
    with pytest.raises(BadRequestError, match=f"{GRACE_VARIABLE}={text!r}: give the seconds"):
        default_grace_seconds()


@pytest.mark.parametrize("checkpoint_bytes", [100_000, 1_000_000])
def test_the_time_of_a_save_follows_from_the_bucket_and_the_size(tmp_path, monkeypatch, checkpoint_bytes):
    monkeypatch.setattr(grace, "PROBE_BYTES", 100_000)
    run = SlowStore(tmp_path)
    began = time.monotonic()
    found = measure_save_seconds(run, checkpoint_bytes)
    took = time.monotonic() - began
    # A machine that is busy elsewhere makes it longer, by what the measurement itself took longer.
    right = checkpoint_bytes * SECONDS_PER_BYTE + 3 * ROUND_TRIP_SECONDS
    late = took - 100_000 * SECONDS_PER_BYTE - 2 * ROUND_TRIP_SECONDS
    assert 0.8 * right <= found <= 1.2 * right + late * max(3, checkpoint_bytes / 100_000)
    assert list(run.list()) == []


def test_what_fits_changes_nothing_and_what_does_not_is_saved_more_often():
    assert fits(30 - MARGIN_SECONDS, 30)
    assert not fits(30 - MARGIN_SECONDS + 0.1, 30)
    assert cadence_minutes(10, save_seconds=5, grace=30) == 10
    # A tenth of the time may go into saving.
    assert cadence_minutes(10, save_seconds=40, grace=30) == pytest.approx(400 / 60)
    assert cadence_minutes(10, save_seconds=80, grace=30) == 10
    assert cadence_minutes(10, save_seconds=1, grace=2) == 1
    assert cadence_minutes(0.5, save_seconds=1, grace=2) == 0.5


def test_the_time_runs_from_the_first_request():
    stop = Stop(15)
    assert not stop()
    assert stop.seconds_left() == stop.seconds_left_to_save() == float("inf")
    stop.request("first")
    assert stop()
    assert 10 < stop.seconds_left() <= 15
    left = stop.seconds_left()
    time.sleep(0.05)
    stop.request("second")
    assert stop.reason == "first"
    assert stop.seconds_left() <= left - 0.05
    assert stop.seconds_left_to_save() <= left - MARGIN_SECONDS
    brief = Stop(1)
    brief.request("first")
    assert 0 < brief.seconds_left_to_save() <= 0.5


@pytest.mark.slow
def test_a_person_is_warned_and_saving_follows(tmp_path):
    bucket = tmp_path / "bucket"
    succeeded(ddpm("data", "pack", "landscape-sample", "tiles", "--size", "16", "--bucket", bucket))
    # A minute is the shortest cadence that follows; a test has less time.
    hooks = hooked(tmp_path / "hooks", job__runs__grace="SHORTEST_CADENCE_MINUTES = 0.002")
    keep = {"checkpoint.every_minutes": 7, "checkpoint.every_epochs": 999}
    keep |= {"checkpoint.keep_last": 99, "checkpoint.keep_every_epochs": 0}
    rarely = [word for key, value in keep.items() for word in ("--set", f"{key}={value}")]
    found = {}
    for name, seconds in (("enough", 30), ("short", 2)):
        words = ("--dataset", "tiles", "--run", name, "--bucket", bucket, "--epochs", 5, *settings(), *rarely)
        variables = {"DDPM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": hooks, GRACE_VARIABLE: str(seconds)}
        done = ddpm("train", *words, **variables)
        succeeded(done)
        warnings = re.findall(r"a save takes about .*", done.stderr)
        found[name] = warnings, len(list_checkpoints(open_store(str(bucket)).sub(f"runs/{name}")))
    assert found["enough"] == ([], 1)
    (warning,), checkpoints = found["short"]
    assert re.fullmatch(
        r"a save takes about \d+\.\d s, which does not fit into the 2 s between a preemption notice and the end: "
        r"saving every 0\.\d instead of 7 minutes",
        warning,
    )
    assert checkpoints > 2
    line = refused(ddpm("train", *words, "--epochs", 9, **variables | {GRACE_VARIABLE: "soon"}), 64)
    assert f"{GRACE_VARIABLE}='soon': give the seconds between a preemption notice and the end, such as 30" in line
