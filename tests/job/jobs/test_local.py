"""Jobs in the background of this machine: real processes, and what is known of them later."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from job.exits import BadRequestError, State
from job.jobs.backends import JobStatus
from job.jobs.backends.local import LocalTarget
from job.jobs.spec import JobSpec
from tests.job.command_line import DDPM, about, ddpm, ddpm_here, environment, refused, settings, started, succeeded
from tests.job.jobs.submitting import told
from tests.job.launching import eventually


@pytest.fixture(autouse=True)
def no_job_is_left(folder: Path) -> Iterator[None]:
    """A job in the background would outlive a test that fails, and slow every later one."""
    yield
    for job in backend().jobs():
        if not job.state.is_over:
            backend().cancel(job.name)


def backend() -> LocalTarget:
    return LocalTarget(name="local")


def spec(*argv: str, name: str = "train-a", **changes: Any) -> JobSpec:
    words = {"image": "", "bucket": "b", "run": "a", "gpus": 0, "spot": False, "env": {"DDPM_JOB": name}}
    return JobSpec(name=name, verb="train", argv=("train", *argv), **{**words, **changes})


def ended(name: str) -> JobStatus:
    return eventually(lambda: (status := told(backend(), name)).state.is_over and status, 100)


def record_of(name: str) -> Path:
    return Path(os.environ["DDPM_CACHE"], "jobs", socket.gethostname(), f"{name}.json")


@pytest.mark.slow
def test_background_jobs_are_known_and_stopped(bucket, monkeypatch):
    words = ["submit", "train", *about(bucket, "long"), "--epochs", 1000, "--on", "local", "--detach"]
    out = succeeded(ddpm_here(*words))
    assert out.startswith("train-long is submitted: `ddpm jobs logs train-long --on local -f` follows it")
    pid = int(json.loads(record_of("train-long").read_bytes())["pid"])
    assert "train\0--dataset\0tiles" in Path(f"/proc/{pid}/cmdline").read_text()
    assert (told(backend(), "train-long").state, os.getsid(pid)) == (State.RUNNING, pid)
    eventually(lambda: list(bucket.glob("runs/long/checkpoints/*/MANIFEST.json")), 100)
    assert "train-long runs on this machine already" in refused(ddpm_here(*words), 64)
    # From another folder.
    with monkeypatch.context() as patch:
        patch.chdir("/")
        out = succeeded(ddpm_here("jobs", "status", "train-long"))
    assert re.search(r"^state +running, 1 start, submitted 20", out, re.MULTILINE)
    assert f"run         long  ({bucket}/runs/long)" in out
    assert re.search(r"^attempt 1 +20.*, 1 × ", out, re.MULTILINE)
    _, row = succeeded(ddpm_here("jobs", "list", "--on", "local")).splitlines()
    assert row.split()[:3] == ["train-long", "local", "running"]

    follower = subprocess.Popen(
        [DDPM, "jobs", "logs", "train-long", "-f"], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert "saves first" in succeeded(ddpm_here("jobs", "cancel", "train-long"))
    status = ended("train-long")
    assert (status.state, status.exit_code) == (State.STOPPED, 75)
    followed, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    assert "everything is saved, and the same command goes on from there" in followed
    assert followed == succeeded(ddpm_here("jobs", "logs", "train-long"))
    assert "is over already" in refused(ddpm_here("jobs", "cancel", "train-long"), 64)
    assert "exit code   75: stopped by preemption" in succeeded(ddpm_here("jobs", "status", "train-long"))


def test_failed_jobs_say_why(bucket, folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "marked-8f3a")
    words = ["submit", "train", "--dataset", "none", "--bucket", str(bucket)]
    succeeded(ddpm_here(*words, "--detach"))
    status = ended("train-none")
    assert (status.state, status.exit_code) == (State.FAILED, 66)
    assert "dataset 'none' is not in" in status.message
    assert "exit code   66: missing input" in succeeded(ddpm_here("jobs", "status", "train-none"))
    assert "dataset 'none' is not in" in succeeded(ddpm_here("jobs", "logs", "train-none"))
    # The target's variables reach the job, in the foreground and in the background, and nothing secret is remembered.
    (folder / "targets.yaml").write_text("local: {env: {DDPM_GRACE_SECONDS: 'soon'}}")
    words[3] = "tiles"
    assert "DDPM_GRACE_SECONDS='soon'" in refused(ddpm(*words, *settings()), 64)
    succeeded(ddpm_here(*words, *settings(), "--detach"))
    assert (ended("train-tiles").exit_code, told(backend(), "train-tiles").bucket) == (64, str(bucket))
    assert all(b"8f3a" not in path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file())
    # One that cannot write to its bucket can say so in its log alone.
    backend().submit(spec("--dataset", "none", "--bucket", "nowhere", name="train-b", bucket="nowhere"))
    status = ended("train-b")
    assert (status.state, status.exit_code) == (State.FAILED, None)
    assert "see `ddpm jobs logs train-b`" in status.message
    assert "is not in nowhere yet" in "\n".join(backend().logs("train-b", True))


def test_jobs_start_once():
    """Three that submit it at the same time; it is killed, and its record names a process that is none of its own."""

    def submit(_):
        try:
            backend().submit(spec("--dataset", "a"))
        except BadRequestError as refusal:
            return str(refusal)
        return ""

    with ThreadPoolExecutor(3) as pool:
        done, *others = sorted(pool.map(submit, range(3)))
    assert done == "" and all("train-a runs on this machine already" in refusal for refusal in others)
    path = record_of("train-a")
    record = json.loads(path.read_bytes())
    os.kill(record["pid"], signal.SIGKILL)
    status = ended("train-a")
    assert (status.state, status.exit_code) == (State.FAILED, None)
    assert "was killed" in status.message
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        path.write_text(json.dumps({**record, "pid": bystander.pid, "process_began": record["process_began"] - 60}))
        assert told(backend(), "train-a").state is State.FAILED
        with pytest.raises(BadRequestError, match="is over already"):
            backend().cancel("train-a")
        assert bystander.poll() is None
        backend().submit(spec("--dataset", "a"))
        assert ended("train-a")
    finally:
        bystander.kill()
        bystander.wait()
    # A damaged record is no job.
    path.write_text("{")
    assert (backend().jobs(), told(backend(), "train-a").state) == ([], State.GONE)


@pytest.mark.slow
def test_jobs_in_the_foreground_are_known_and_stopped(bucket, folder):
    """To commands in other terminals, while they run and later; their output is in their own terminal."""
    (folder / "other").mkdir()
    words = ["submit", "train", *about(bucket, "front"), "--epochs", 1000]
    child = started(*words)
    try:
        eventually(lambda: list(bucket.glob("jobs/train-front/*.json")), 100)
        # One of the same name in another bucket does not take its place.
        refused(ddpm(*words, "--bucket", folder / "other"), 66)
        status = told(backend(), "train-front")
        assert (status.state, status.bucket, status.attempts) == (State.RUNNING, str(bucket), 1)
        assert "has no log" in refused(ddpm_here("jobs", "logs", "train-front"), 66)
        assert "saves first" in succeeded(ddpm_here("jobs", "cancel", "train-front"))
        child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 75
    _, row = succeeded(ddpm_here("jobs", "list")).splitlines()
    assert row.split()[:3] == ["train-front", "local", "stopped"] and re.search(r" 1 +75 ", row)


@pytest.mark.slow
def test_background_jobs_are_watched(bucket):
    words = [DDPM, "submit", "train", *about(bucket, "seen"), "--epochs", "1000", "--watch"]
    child = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    eventually(lambda: list(bucket.glob("runs/seen/checkpoints/*/MANIFEST.json")), 100)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "no longer watching train-seen, which goes on" in err
    assert told(backend(), "train-seen").state is State.RUNNING
    backend().cancel("train-seen")
    ended("train-seen")
    words[words.index("1000")] = "1"
    done = ddpm(*words[1:])
    assert done.returncode == 0, done.stderr
    assert "train-seen is finished" in done.stderr
