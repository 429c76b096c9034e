"""`ddpm jobs`: one view of all engines, and of runs whose machines are gone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from job.coordination.outcome import outcome_written
from job.exits import Exit
from job.jobs.backends.local import LocalTarget
from tests.job.command_line import ddpm_here, on_screen, refused, succeeded
from tests.job.jobs.test_local import ended, spec

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(scope="module")
def failed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a job in the background that ended with 66, with its bucket and its cache."""
    made = tmp_path_factory.mktemp("failed")
    (made / "bucket").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setenv("DDPM_CACHE", str(made / "cache"))
        job = spec("--dataset", "none", "--bucket", "bucket", name="train-none", bucket="bucket")
        LocalTarget(name="local").submit(job)
        ended("train-none")
    return made


@pytest.fixture
def failed(failed_once: Path, folder: Path) -> str:
    """The name of that job, in a copy of its folder."""
    shutil.copytree(failed_once, folder, dirs_exist_ok=True)
    return "train-none"


def test_lists_show_how_jobs_ended(failed):
    header, row = succeeded(ddpm_here("jobs", "list", "--on", "local")).splitlines()
    columns = ["job", "target", "state", "attempts", "exit code", "created", "place", "message"]
    assert re.split(r"  +", header.strip()) == columns
    assert row.split()[:5] == ["train-none", "local", "failed", "1", "66"]
    assert "dataset 'none' is not in" in row
    _, row = on_screen("jobs", "list", "--on", "local", columns=50).splitlines()
    assert (row.split()[:3], len(row)) == (["train-none", "local", "failed"], 50)


def test_targets_here_share_their_jobs(failed, folder):
    (folder / "targets.yaml").write_text("mine: {backend: local}")
    assert succeeded(ddpm_here("jobs", "list")).count(failed) == 1
    assert succeeded(ddpm_here("jobs", "status", failed)).count("state ") == 1
    assert "dataset 'none' is not in" in succeeded(ddpm_here("jobs", "logs", failed))


def test_silent_engines_hide_no_other(failed, folder, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(folder / "no-cluster"))
    (folder / "targets.yaml").write_text("gke: {backend: kubernetes, image: i, bucket: gs://bucket}")
    done = ddpm_here("jobs", "list")
    assert "train-none" in succeeded(done)
    assert re.search(r"^gke: \S", done.stderr, re.MULTILINE)
    # Who asks for it by name is told by the exit code, too.
    assert ddpm_here("jobs", "list", "--on", "gke").returncode not in (0, 1, 2)
    # A command that names no target finds the one that knows the job.
    assert "failed" in succeeded(ddpm_here("jobs", "status", failed))


def test_unknown_jobs_are_refused():
    assert succeeded(ddpm_here("jobs", "list", "--on", "local")) == (
        "no jobs on local: start one with `ddpm submit train --dataset NAME --on TARGET`\n"
    )
    for command in ("status", "logs", "cancel"):
        line = refused(ddpm_here("jobs", command, "train-nothing", "--on", "local"), Exit.MISSING_INPUT)
        assert "no target knows a job 'train-nothing' (local): see `ddpm jobs list`" in line
        assert "unknown target 'mars'" in refused(
            ddpm_here("jobs", command, "train-a", "--on", "mars"), Exit.BAD_REQUEST
        )
        assert "cannot be a job's name" in refused(ddpm_here("jobs", command, "../a"), Exit.BAD_REQUEST)
        line = refused(ddpm_here("jobs", command, "train-a", "--targets", "no.yaml"), Exit.MISSING_INPUT)
        assert "--targets no.yaml: No such file" in line


def test_bucket_knows_a_gone_job(bucket, folder, monkeypatch):
    uri = str(bucket)
    monkeypatch.setenv("DDPM_JOB", "train-walk")
    with outcome_written(uri):
        pass
    # As told by a target that has its bucket, and by a person who knows where it was.
    (folder / "targets.yaml").write_text(yaml.safe_dump({"local": {"bucket": uri}}))
    for name in ("train-walk", "sample-walk-0123abcd"):
        for more in ([], ["--on", "local"], ["--bucket", uri]):
            lines = succeeded(ddpm_here("jobs", "status", name, *more)).splitlines()
            assert lines.pop(0) == f"job         {name}: unknown to every engine; the facts below are in its bucket"
            if name == "train-walk":
                assert lines.pop(0) == "state       finished, 1 start"
                assert lines.pop(0) == "exit code   0: finished"
            else:
                assert lines.pop(0) == "state       gone"
            assert lines[0] == f"run         walk  ({uri}/runs/walk)"
            assert "images seen 912 of 912 (epoch 3.00)" in lines
            assert any(line.startswith("newest      checkpoints/000001-000000000912") for line in lines)
            assert any(line.startswith("attempt 1 ") for line in lines)
    for name in ("train-other", "train-walk-2"):
        refused(ddpm_here("jobs", "status", name), Exit.MISSING_INPUT)
    # Its output went with the machine.
    refused(ddpm_here("jobs", "logs", "train-walk"), Exit.MISSING_INPUT)


def test_unreadable_buckets_hide_no_job(failed, folder):
    done = ddpm_here("jobs", "status", failed, "--bucket", "gs://X")
    assert "state       failed" in succeeded(done)
    assert "the run's folder cannot be read" in done.stderr


def test_output_cannot_command_a_terminal(failed):
    log = next(Path("cache/jobs").glob("*/*.log"))
    log.write_bytes("red \x1b[31mand\x1b]0;title\x07 \x9b2J\ttab\r\nhidden\rshown\ngrüße 🙂\n".encode())
    printed = succeeded(ddpm_here("jobs", "logs", failed))
    assert printed == "red %1B[31mand%1B]0;title%07 %C2%9B2J\ttab\nhidden%0Dshown\ngrüße 🙂\n"


def test_finished_jobs_are_not_called_killed(failed, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_JOB", failed)
        with outcome_written("bucket"):
            pass
    for listed in (("list",), ("status", failed)):
        told = succeeded(ddpm_here("jobs", *listed))
        assert "finished" in told and "killed" not in told
