"""Jobs of this machine, and `ddpm jobs`: real processes, and what is known of them later, also when they are gone."""

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
import yaml

from job.coordination.outcome import outcome_written
from job.exits import BadRequestError, Exit, State
from job.jobs.backends import JobStatus
from job.jobs.backends.local import LocalTarget
from job.jobs.spec import JobSpec
from tests.conftest import only_linux
from tests.job.command_line import (
    DDPM,
    about,
    ddpm,
    ddpm_here,
    environment,
    on_screen,
    raised,
    refused,
    settings,
    started,
    succeeded,
)
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
@only_linux
def test_background_jobs_are_watched_known_and_stopped(bucket, monkeypatch):
    words = ["submit", "train", *about(bucket, "long"), "--epochs", "1000", "--on", "local"]
    child = subprocess.Popen([DDPM, *words, "--watch"], env=environment(), stderr=subprocess.PIPE, text=True)
    eventually(lambda: list(bucket.glob("runs/long/checkpoints/*/MANIFEST.json")), 100)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75 and "no longer watching train-long, which goes on" in err
    pid = int(json.loads(record_of("train-long").read_bytes())["pid"])
    assert "train\0--dataset\0tiles" in Path(f"/proc/{pid}/cmdline").read_text()
    assert (told(backend(), "train-long").state, os.getsid(pid)) == (State.RUNNING, pid)
    assert "train-long runs on this machine already" in refused(ddpm_here(*words, "--detach"), 64)
    # From another folder.
    with monkeypatch.context() as patch:
        patch.chdir("/")
        out = succeeded(ddpm_here("jobs", "status", "train-long"))
    assert re.search(r"^state +running, 1 start, submitted 20", out, re.MULTILINE)
    assert f"run         long  ({bucket}/runs/long)" in out
    assert re.search(r"^attempt 1 +20.*, 1 × ", out, re.MULTILINE)
    _, row = succeeded(ddpm_here("jobs", "list", "--on", "local")).splitlines()
    assert row.split()[:3] == ["train-long", "local", "running"]
    following = [DDPM, "jobs", "logs", "train-long", "-f"]
    follower = subprocess.Popen(following, env=environment(), stdout=subprocess.PIPE, text=True)
    assert "saves first" in succeeded(ddpm_here("jobs", "cancel", "train-long"))
    status = ended("train-long")
    assert (status.state, status.exit_code) == (State.STOPPED, 75)
    followed, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    assert "everything is saved, and the same command goes on from there" in followed
    assert followed == succeeded(ddpm_here("jobs", "logs", "train-long"))
    assert "is over already" in refused(ddpm_here("jobs", "cancel", "train-long"), 64)
    assert "exit code   75: stopped by preemption" in succeeded(ddpm_here("jobs", "status", "train-long"))
    words[words.index("1000")] = "1"
    done = ddpm(*words, "--watch")
    assert done.returncode == 0 and "train-long is finished" in done.stderr, done.stderr


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
        raised(64, "is over already", backend().cancel, "train-a")
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


def test_failed_jobs_say_why(folder, monkeypatch):
    (folder / "bucket").mkdir()
    monkeypatch.setenv("WANDB_API_KEY", "marked-8f3a")
    out = succeeded(
        ddpm_here("submit", "train", "--dataset", "none", "--bucket", "bucket", "--on", "local", "--detach")
    )
    assert out.startswith("train-none is submitted: `ddpm jobs logs train-none --on local -f` follows it")
    status, said = ended("train-none"), "dataset 'none' is not in"
    assert (status.state, status.exit_code) == (State.FAILED, 66) and said in status.message
    header, row = succeeded(ddpm_here("jobs", "list", "--on", "local")).splitlines()
    columns = ["job", "target", "state", "attempts", "exit code", "created", "place", "message"]
    assert re.split(r"  +", header.strip()) == columns
    assert row.split()[:5] == ["train-none", "local", "failed", "1", "66"] and said in row
    _, row = on_screen("jobs", "list", "--on", "local", columns=50).splitlines()
    assert (row.split()[:3], len(row)) == (["train-none", "local", "failed"], 50)
    # Targets of this machine share their jobs; and an engine that is silent hides no other.
    monkeypatch.setenv("KUBECONFIG", str(folder / "no-cluster"))
    gke = "gke: {backend: kubernetes, image: i, bucket: gs://bucket}"
    (folder / "targets.yaml").write_text(f"mine: {{backend: local}}\n{gke}")
    done = ddpm_here("jobs", "list")
    assert succeeded(done).count("train-none") == 1 and re.search(r"^gke: \S", done.stderr, re.MULTILINE)
    # Who asks for it by name is told by the exit code, too.
    assert ddpm_here("jobs", "list", "--on", "gke").returncode not in (0, 1, 2)
    # A command that names no target finds the one that knows the job.
    shown = succeeded(ddpm_here("jobs", "status", "train-none"))
    assert shown.count("state ") == 1 and "exit code   66: missing input" in shown
    (folder / "targets.yaml").unlink()
    assert said in succeeded(ddpm_here("jobs", "logs", "train-none"))
    # Nothing secret is remembered.
    assert all(b"8f3a" not in path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file())
    # Its output cannot command a terminal.
    log = next(Path("cache/jobs").glob("*/*.log"))
    log.write_bytes("red \x1b[31mand\x1b]0;title\x07 \x9b2J\ttab\r\nhidden\rshown\ngrüße 🙂\n".encode())
    printed = succeeded(ddpm_here("jobs", "logs", "train-none"))
    assert printed == "red %1B[31mand%1B]0;title%07 %C2%9B2J\ttab\nhidden%0Dshown\ngrüße 🙂\n"
    done = ddpm_here("jobs", "status", "train-none", "--bucket", "gs://X")
    assert "state       failed" in succeeded(done) and "the run's folder cannot be read" in done.stderr
    # One that the bucket knows to be finished is not called killed.
    monkeypatch.setenv("DDPM_JOB", "train-none")
    with outcome_written("bucket"):
        pass
    for listed in (("list",), ("status", "train-none")):
        told = succeeded(ddpm_here("jobs", *listed))
        assert "finished" in told and "killed" not in told


def test_variables_reach_the_job(bucket, folder):
    """In the foreground and in the background."""
    (folder / "targets.yaml").write_text("local: {env: {DDPM_GRACE_SECONDS: 'soon'}}")
    words = ("submit", "train", "--dataset", "tiles", "--bucket", bucket, *settings())
    assert "DDPM_GRACE_SECONDS='soon'" in refused(ddpm(*words), 64)
    succeeded(ddpm_here(*words, "--detach"))
    assert (ended("train-tiles").exit_code, told(backend(), "train-tiles").bucket) == (64, str(bucket))
    # A job that cannot write to its bucket can say so in its log alone.
    backend().submit(spec("--dataset", "none", "--bucket", "nowhere", name="train-b", bucket="nowhere"))
    status = ended("train-b")
    assert (status.state, status.exit_code) == (State.FAILED, None)
    assert "see `ddpm jobs logs train-b`" in status.message
    assert "is not in nowhere yet" in "\n".join(backend().logs("train-b", True))


def test_unknown_jobs_are_refused():
    assert succeeded(ddpm_here("jobs", "list", "--on", "local")) == (
        "no jobs on local: start one with `ddpm submit train --dataset NAME --on TARGET`\n"
    )
    for words, code, said in (
        ("train-nothing --on local", 66, "no target knows a job 'train-nothing' (local): see `ddpm jobs list`"),
        ("train-a --on mars", 64, "unknown target 'mars'"),
        ("../a", 64, "cannot be a job's name"),
        ("train-a --targets no.yaml", 66, "--targets no.yaml: No such file"),
    ):
        for command in ("status", "logs", "cancel"):
            assert said in refused(ddpm_here("jobs", command, *words.split()), code)


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
