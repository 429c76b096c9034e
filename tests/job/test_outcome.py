"""How a job ended, as it says in its bucket, and as it is read from there."""

from __future__ import annotations

import errno
import os

import pytest

from job.coordination.outcome import JOB, Outcome, outcome_written, read_outcome
from job.exits import BucketAwayError, LostRunError, StoppedError
from tests.job.command_line import ddpm_here, refused, succeeded

NAME = "train-celeba"


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv(JOB, NAME)
    (tmp_path / "bucket").mkdir()
    return str(tmp_path / "bucket")


def test_an_outcome_follows_its_job(bucket, monkeypatch):
    endings = [
        (None, "finished", 0, ""),
        (SystemExit(0), "finished", 0, ""),
        (SystemExit(71), "failed", 71, ""),
        (StoppedError("stopped by SIGTERM"), "stopped", 75, "stopped by SIGTERM"),
        (LostRunError("held by a"), "failed", 76, "held by a"),
        (BucketAwayError("x" * 1000), "failed", 69, "x" * 500),
        (OSError(errno.ENOSPC, "full", "/tmp/a"), "failed", 74, "no space left on the disk at /tmp/a: "),
        (MemoryError(), "failed", 1, "memory ran out on the machine"),
        (ValueError("nobody foresaw it"), "failed", 1, ""),
    ]
    assert read_outcome(NAME, bucket) is None
    for error, state, code, message in endings:
        monkeypatch.setenv(JOB, NAME)
        try:
            with outcome_written(bucket):
                running = read_outcome(NAME, bucket)
                assert (running.state, running.exit_code) == ("running", None), error
                # What this process starts is no job.
                assert JOB not in os.environ
                if error is not None:
                    raise error
        except BaseException as raised:
            assert raised is error
        outcome = read_outcome(NAME, bucket)
        assert (outcome.state, outcome.exit_code) == (state, code), error
        assert outcome.message.startswith(message), error


def test_outcomes_need_job_and_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.delenv(JOB)
    with outcome_written(bucket):
        pass
    (tmp_path / "file").write_text("")
    for place in ("file", "misspelt"):
        monkeypatch.setenv(JOB, NAME)
        with outcome_written(str(tmp_path / place)):
            pass
    assert not (tmp_path / "misspelt").exists()
    assert not any(read_outcome(NAME, str(tmp_path / name)) for name in ("bucket", "file", "misspelt"))


def test_the_worst_of_several_machines_decides(bucket, tmp_path, monkeypatch):
    def end(machine: int, code: int) -> None:
        monkeypatch.setenv(JOB, NAME)
        with pytest.raises(SystemExit), outcome_written(bucket, machine, 3):
            raise SystemExit(code)

    told = []
    for machine, code in ((0, 0), (1, 0), (2, 0), (1, 75), (0, 69), (2, 64)):
        end(machine, code)
        outcome = read_outcome(NAME, bucket)
        told.append((outcome.state, outcome.exit_code))
    running, finished = ("running", None), ("finished", 0)
    assert told == [running, running, finished, ("stopped", 75), ("failed", 69), ("failed", 64)]
    # What is corrupt says nothing.
    path = tmp_path / "bucket/jobs/train-celeba/2-of-3.json"
    path.write_text(path.read_text().replace("64", "0"))
    outcome = read_outcome(NAME, bucket)
    assert outcome.exit_code == 69
    # Submitted for one machine now, it is another job.
    alone = Outcome(state="finished", exit_code=0, updated="2100-01-01T00:00:00Z")
    path.with_name("0-of-1.json").write_bytes(alone.to_json())
    outcome = read_outcome(NAME, bucket)
    assert (outcome.state, outcome.machines) == ("finished", 1)


@pytest.mark.parametrize(("is_group", "count"), [(True, 2), (False, 3)])
def test_starts_are_kept(bucket, monkeypatch, is_group, count):
    for machine in (0, 1, 1):
        monkeypatch.setenv(JOB, NAME)
        with outcome_written(bucket, machine, 2, is_group=is_group):
            pass
    starts = read_outcome(NAME, bucket).starts
    assert len(starts) == count and all(start.startswith("20") and start.endswith("Z") for start in starts)
    # They do not grow without end.
    monkeypatch.setattr("job.coordination.outcome.MOST_STARTS", 2)
    monkeypatch.setenv(JOB, NAME)
    with outcome_written(bucket, 1, 2, is_group=is_group):
        pass
    assert len(read_outcome(NAME, bucket).starts) == count


def test_commands_say_how_they_ended(tmp_path):
    bucket = ("--bucket", str(tmp_path / "bucket"))
    pack = ("data", "pack", "landscape-sample", "tiles", "--size", "8", *bucket)
    succeeded(ddpm_here(*pack, **{JOB: "packed"}))
    refusals = [
        ("no-source", 66, ("data", "pack", str(tmp_path / "no"), "other", "--size", "8")),
        ("no-crop", 64, ("data", "pack", str(tmp_path / "no"), "other", "--size", "8", "--crop", "middle")),
        ("no-dataset", 66, ("train", "--dataset", "no")),
        ("no-key", 78, ("train", "--dataset", "tiles", "--set", "x=1")),
        ("no-duration", 64, ("sample", "--run", "no", "--stop-after", "soon")),
        ("no-sampler", 64, ("sample", "--run", "no", "--sampler", "plms")),
        ("no-run", 66, ("sample", "--run", "no", "--count", "9", "--slice", "1/3")),
        ("no-run-scored", 66, ("evaluate", "--run", "no", "--slice", "1/3")),
    ]
    for name, code, words in refusals:
        said = refused(ddpm_here(*words, *bucket, **{JOB: name}), code)
        outcome = read_outcome(name, str(tmp_path / "bucket"))
        assert (outcome.state, outcome.exit_code) == ("failed", code)
        # It has the lines that follow as well.
        assert outcome.message.startswith(" ".join(said.split()).removeprefix("ddpm: "))
        assert (outcome.machine, outcome.machines) == ((1, 3) if name.startswith("no-run") else (0, 1))
    finished = read_outcome("packed", str(tmp_path / "bucket"))
    assert (finished.state, finished.exit_code) == ("finished", 0)
