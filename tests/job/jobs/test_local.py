"""Jobs in the background of this machine: real processes, and what is known of them later."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.exits import BadRequestError, MissingInputError
from job.jobs.backends.base import JobStatus, State
from job.jobs.backends.local import LocalBackend
from job.jobs.backends.local_records import load_record, note_in_record
from job.jobs.spec import JobSpec
from job.jobs.targets import load_targets
from tests.job.command_line import DDPM, ddpm, environment, refused, settings, succeeded


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and a cache of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("DDPM_BUCKET", "DDPM_TARGETS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def bucket(folder: Path) -> str:
    """A local bucket with the embedded images at 16 pixels."""
    uri = str(folder / "bucket")
    succeeded(ddpm("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", uri))
    return uri


def backend() -> LocalBackend:
    return LocalBackend(load_targets()["local"])


def spec(*argv: str, name: str = "train-a", **changes: Any) -> JobSpec:
    words = {"image": "", "bucket": "b", "run": "a", "gpus": 0, "spot": False}
    return JobSpec(name=name, verb="train", argv=("train", *argv), **{**words, **changes})


def eventually(condition: Callable[[], Any], seconds: float = 100) -> Any:
    deadline = time.monotonic() + seconds
    while not (said := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return said


def ended(name: str) -> JobStatus:
    return eventually(lambda: (status := backend().status(name)).state.is_over and status)


def about(uri: str, run: str) -> list[str]:
    return ["--dataset", "tiles", "--run", run, "--bucket", uri, *settings(checkpoint__every_epochs="1")]


def test_a_job_in_the_background_has_a_story_and_can_be_stopped_and_gone_on_with(bucket):
    words = ["submit", "train", *about(bucket, "long"), "--epochs", 1000, "--on", "local", "--detach"]
    out = succeeded(ddpm(*words))
    pid = int(re.search(r"process (\d+) does it in the background", out)[1])
    assert "train\0--dataset\0tiles" in Path(f"/proc/{pid}/cmdline").read_text()
    status = backend().status("train-long")
    assert (status.state, status.attempts, status.exit_code) == (State.RUNNING, 1, None)
    line = refused(ddpm(*words), 64)
    assert "train-long runs on this machine already" in line
    assert load_record("train-long").process.pid == pid
    eventually(lambda: list(Path(bucket).glob("runs/long/checkpoints/*/MANIFEST.json")))

    # From another process, in another folder.
    out = succeeded(ddpm("jobs", "status", "train-long", cwd=Path("/")))
    assert re.search(r"^state +running, 1 start, submitted 20", out, re.MULTILINE)
    assert f"run         long  ({bucket}/runs/long)" in out
    assert re.search(r"^attempt 1 +20.*, 1 × ", out, re.MULTILINE)
    _, row = succeeded(ddpm("jobs", "list", "--on", "local")).splitlines()
    assert row.split()[:3] == ["train-long", "local", "running"]
    assert json.loads(succeeded(ddpm("jobs", "describe", "train-long", "-o", "json")))["process"]["pid"] == pid

    follower = subprocess.Popen(
        [DDPM, "jobs", "logs", "train-long", "-f"], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert "saves first" in succeeded(ddpm("jobs", "cancel", "train-long"))
    status = ended("train-long")
    assert (status.state, status.exit_code) == (State.CANCELLED, 75)
    followed, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    assert "everything is saved, and the same command goes on from there" in followed
    assert followed == succeeded(ddpm("jobs", "logs", "train-long"))
    assert "is over already" in refused(ddpm("jobs", "cancel", "train-long"), 64)
    assert "exit code   75: stopped by preemption" in succeeded(ddpm("jobs", "status", "train-long"))

    before = len(list(Path(bucket).glob("runs/long/attempts/*")))
    words[words.index(1000)] = 2
    succeeded(ddpm(*words))
    status = ended("train-long")
    assert (status.state, status.exit_code, status.message) == (State.FINISHED, 0, "")
    assert len(list(Path(bucket).glob("runs/long/attempts/*"))) in (before, before + 1)


def test_a_job_that_fails_says_why():
    words = ["submit", "train", "--dataset", "none", "--bucket", "nowhere", "--detach"]
    succeeded(ddpm(*words))
    status = ended("train-none")
    assert (status.state, status.exit_code) == (State.FAILED, 66)
    assert "nowhere is no folder" in status.message
    assert "exit code   66: missing input" in succeeded(ddpm("jobs", "status", "train-none"))
    assert "nowhere is no folder" in succeeded(ddpm("jobs", "logs", "train-none"))


def test_a_killed_job_has_the_signal_s_code():
    local = backend()
    local.submit(spec("--dataset", "a"))
    record = load_record("train-a")
    os.kill(record.process.pid, signal.SIGKILL)
    status = ended("train-a")
    assert (status.state, status.exit_code) == (State.FAILED, 137)


def test_a_job_whose_supervisor_died_with_it_is_gone_and_one_without_lives_on(bucket):
    local = backend()
    local.submit(spec(*about(bucket, "a"), "--epochs", "1000"))
    record = load_record("train-a")
    os.kill(record.supervisor.pid, signal.SIGKILL)
    eventually(record.supervisor.certainly_dead)
    assert local.status("train-a").state is State.RUNNING
    os.kill(record.process.pid, signal.SIGKILL)
    assert ended("train-a").state is State.GONE
    assert "killed, or the machine was restarted" in local.status("train-a").message
    with pytest.raises(BadRequestError, match="is over already"):
        local.cancel("train-a")


def test_a_number_that_another_process_has_now_is_nobody(tmp_path):
    local = backend()
    local.submit(spec("--dataset", "a"))
    ended("train-a")
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        dead = load_record("train-a").process
        reused = dead.model_copy(update={"pid": bystander.pid})
        note_in_record("train-a", process=reused, supervisor=reused, exit_code=None)
        assert local.status("train-a").state is State.GONE
        with pytest.raises(BadRequestError):
            local.cancel("train-a")
        assert not reused.send(signal.SIGTERM)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_machine_that_was_started_anew_runs_no_job_of_before():
    local = backend()
    local.submit(spec("--dataset", "a"))
    ended("train-a")
    before = load_record("train-a").process.model_copy(update={"boot_id": "another", "pid": os.getpid()})
    note_in_record("train-a", process=before, supervisor=before, exit_code=None)
    assert local.status("train-a").state is State.GONE
    local.submit(spec("--dataset", "a"))
    assert ended("train-a").exit_code == 66


def test_a_job_of_another_machine_that_shares_the_folder_is_in_nobody_s_way():
    local = backend()
    local.submit(spec("--dataset", "a"))
    ended("train-a")
    there = load_record("train-a").process.model_copy(update={"host": "another"})
    note_in_record("train-a", process=there, supervisor=there, exit_code=None)
    assert (local.status("train-a").state, local.status("train-a").place) == (State.RUNNING, "another")
    with pytest.raises(BadRequestError, match="runs on 'another'"):
        local.cancel("train-a")
    local.submit(spec("--dataset", "a"))
    assert ended("train-a").exit_code == 66


def test_two_that_submit_the_same_job_at_once_start_it_once(bucket):
    words = [DDPM, "submit", "train", *about(bucket, "race"), "--epochs", "1000", "--detach"]
    children = [
        subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = [child.communicate(timeout=60) for child in children]
    assert sorted(child.returncode for child in children) == [0, 64, 64], told
    backend().cancel("train-race")
    ended("train-race")


def test_variables_of_the_target_reach_the_job_and_nothing_secret_is_remembered(folder, monkeypatch):
    (folder / "targets.yaml").write_text("local: {env: {DDPM_GRACE_SECONDS: 'soon'}}")
    monkeypatch.setenv("WANDB_API_KEY", "marked-8f3a")
    succeeded(ddpm("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", "b"))
    words = ["submit", "train", "--dataset", "tiles", "--bucket", "b", *settings()]
    # The job's own words, in the foreground and in the background.
    assert "DDPM_GRACE_SECONDS='soon'" in refused(ddpm(*words), 64)
    succeeded(ddpm(*words, "--detach"))
    assert "DDPM_GRACE_SECONDS='soon'" in ended("train-tiles").message
    assert all(b"8f3a" not in path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file())


def test_a_job_may_be_packing_or_sampling(bucket):
    succeeded(ddpm("train", *about(bucket, "short"), "--epochs", 1))
    out = succeeded(ddpm("submit", "sample", "--run", "short", "--bucket", bucket, "--seeds", "0-1", "--no-nearest"))
    assert "epoch-0001-ddim-4-seeds-0-1-alone.png" in out
    words = ["submit", "pack", "landscape-sample", "small", "--size", 8, "--bucket", bucket]
    succeeded(ddpm(*words, "--detach"))
    (status,) = backend().jobs()
    assert re.fullmatch(r"pack-small-[0-9a-f]{8}", status.name)
    assert ended(status.name).state is State.FINISHED
    assert Path(bucket, "datasets/small-8/index.json").is_file()


@pytest.mark.slow
def test_a_watched_job_in_the_background_is_submitted_until_it_is_finished(bucket):
    words = [DDPM, "submit", "train", *about(bucket, "seen"), "--epochs", "1000", "--watch"]
    child = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    eventually(lambda: list(Path(bucket).glob("runs/seen/checkpoints/*/MANIFEST.json")))
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "no longer watching train-seen, which goes on" in err
    assert backend().status("train-seen").state is State.RUNNING
    backend().cancel("train-seen")
    ended("train-seen")
    words[words.index("1000")] = "1"
    done = ddpm(*words[1:])
    assert done.returncode == 0, done.stderr
    assert "train-seen is finished" in done.stderr


def test_what_nobody_submitted_is_unknown():
    assert backend().status("train-a").state is State.GONE
    assert backend().jobs() == []
    for question in (backend().describe, backend().cancel, lambda name: list(backend().logs(name, False, bool))):
        with pytest.raises(MissingInputError, match="no job 'train-a'"):
            question("train-a")


def test_a_damaged_record_is_no_job(folder):
    (folder / "cache/jobs").mkdir(parents=True)
    (folder / "cache/jobs/train-a.json").write_text("{")
    assert backend().jobs() == []
    assert backend().status("train-a").state is State.GONE


@pytest.mark.parametrize("changes", [{"nodes": 2}])
def test_this_machine_is_one(changes):
    with pytest.raises(BadRequestError, match="--nodes 2 needs several machines"):
        backend().render(spec("--dataset", "a", **changes))
