"""Jobs on a real Slurm: preempted, out of time, failed, cancelled, without their node, in groups and in slices."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from job.coordination.outcome import read_outcome
from job.exits import State
from job.runs.checkpoints import list_checkpoints
from job.store import Store, open_store
from tests.containers.runs import IMAGES, assert_equal, images_saved, training
from tests.job.command_line import ddpm, ddpm_here, refused, succeeded
from tests.slurm.conftest import until

# All tests share the cluster and the undisturbed run, whose time is not the first one's.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900, func_only=True)]
ENDLESS = 100_000
"""Epochs of a run that is always stopped."""


def run_of(bucket: str, run: str) -> Store:
    return open_store(bucket).sub(f"runs/{run}")


def submitted(*words: object, on: str = "low") -> None:
    succeeded(ddpm_here("submit", *words, "--on", on, "--yes"))


def trains(bucket: str, run: str, epochs: int = ENDLESS, on: str = "low") -> None:
    """Submits a run, and waits until it has saved."""
    submitted(*training(run, bucket, epochs), on=on)
    until(lambda: images_saved(run_of(bucket, run)))


def status(job: str) -> dict:
    (found,) = json.loads(succeeded(ddpm_here("jobs", "status", job, "--on", "low", "--json")))
    return dict(found)


def program(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Has jobs on `low` run another program than this one, of Python."""
    (ddpm := folder / "bin/ddpm").parent.mkdir(parents=True)
    ddpm.write_text(f"#!{sys.executable}\nimport json, os, signal, sys, time\n{text}\n")
    ddpm.chmod(0o755)
    low = json.loads(Path("targets.yaml").read_text())["low"]
    (folder / "targets.yaml").write_text(json.dumps({"low": low | {"venv": str(folder)} | changes}))
    monkeypatch.setenv("DDPM_TARGETS", f"{folder}/targets.yaml")


def test_preempted_runs_have_undisturbed_weights(cluster, bucket, undisturbed):
    trains(bucket, "taken", epochs=16)
    cluster.preempt()
    cluster.wait_for_requeue("train-taken")
    until(lambda: read_outcome("train-taken", bucket).state is State.STOPPED)
    waiting = status("train-taken")
    assert (waiting["state"], waiting["attempts"], waiting["failures"]) == ("waiting", 1, 0)
    assert "the attempt before ended with exit code 75: stopped by preemption" in waiting["message"]
    cluster.begin_now("train-taken")
    # Slurm no longer counts it as preempted: what happens now is again for its script to judge.
    cluster.wait_for("train-taken", "RUNNING")
    assert "PreemptTime=None" in cluster.run("scontrol", "show", "job", cluster.number("train-taken"))
    # As long as it lasts, and no longer.
    output = succeeded(ddpm("jobs", "logs", "train-taken", "--on", "low", "-f"))
    said = re.search(r"after ([\d,]+) images; everything is saved, and the same command goes on", output)
    assert said is not None, output
    assert int(said[1].replace(",", "")) % IMAGES, "stopped between two epochs, which proves less"
    begins = re.findall("job [0-9]+ begins", output)[0]
    steps = re.findall("ddpm-slurm: (.*?)(?: on .*)?\n", output)
    assert steps[1:] == ["ended with code 75", begins, "ended with code 0"]
    assert status("train-taken")["state"] == "finished"
    assert_equal(run_of(bucket, "taken"), run_of(bucket, undisturbed))


def test_jobs_out_of_time_go_on(cluster, bucket):
    submitted(*training("long", bucket, ENDLESS), on="brief")
    # Slurm counts two whole minutes, of which 30 s are the grace.
    cluster.wait_for_requeue("train-long")
    assert read_outcome("train-long", bucket).exit_code == 75
    cluster.begin_now("train-long")
    until(lambda: len(read_outcome("train-long", bucket).starts) == 2)
    cluster.run("scancel", "--name=train-long")


def test_fatal_ends_are_final(cluster, bucket):
    words = ("train", "--dataset", "missing", "--run", "lost", "--bucket", bucket)
    watched = ddpm("submit", *words, "--on", "low", "--yes", "--watch")
    assert "which would come again: dataset 'missing' is not in" in refused(watched, 66)
    lost = status("train-lost")
    assert (lost["state"], lost["exit_code"], lost["attempts"]) == ("failed", 66, 1)
    assert cluster.state("train-lost") == "FAILED"


def test_killed_programs_are_tried_again_to_the_bound(cluster, bucket, tmp_path, monkeypatch):
    program(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", monkeypatch)
    submitted(*training("broken", bucket))
    for failures in range(1, 5):
        cluster.wait_for_requeue("train-broken", failures)
        # The controller names its reason in its next round.
        said = "BeginTime; the attempt before ended with exit code 137: killed by signal 9"
        until(lambda said=said: status("train-broken")["message"] == said)
        waiting = status("train-broken")
        assert (waiting["exit_code"], waiting["failures"]) == (137, failures)
        cluster.begin_now("train-broken")
    cluster.wait_for("train-broken", "FAILED")
    broken = status("train-broken")
    assert (broken["state"], broken["exit_code"], broken["failures"]) == ("failed", 137, 5)


def test_cancelled_jobs_save_and_stay(cluster, bucket):
    trains(bucket, "ended")
    again = refused(ddpm_here("submit", *training("ended", bucket, ENDLESS), "--on", "low", "--yes"), 64)
    assert "train-ended runs on n" in again
    assert "it saves first" in succeeded(ddpm_here("jobs", "cancel", "train-ended", "--on", "low"))
    cluster.wait_for("train-ended", "CANCELLED")
    assert (read_outcome("train-ended", bucket).exit_code, status("train-ended")["state"]) == (75, "cancelled")
    # By a person who knows Slurm, and not this program.
    submitted(*training("ended", bucket, ENDLESS))
    until(lambda: len(read_outcome("train-ended", bucket).starts) == 2)
    until(lambda: max(list_checkpoints(run_of(bucket, "ended"))).fence == 2)
    cluster.run("scancel", "--name=train-ended")
    cluster.wait_for("train-ended", "CANCELLED")
    assert read_outcome("train-ended", bucket).exit_code == 75
    assert "is cancelled already" in refused(ddpm_here("jobs", "cancel", "train-ended", "--on", "low"), 64)


def test_runs_survive_their_node(cluster, bucket, undisturbed):
    trains(bucket, "orphaned", epochs=16, on="first")
    # The node's daemon, but not the job; the controller finds it by itself some minutes later.
    os.kill(cluster.pid("n0"), signal.SIGKILL)
    cluster.run("scontrol", "update", "NodeName=n0", "State=DOWN", "Reason=killed")
    cluster.wait_for_requeue("train-orphaned")
    # The daemon ends what it no longer knows.
    cluster.start("n0")
    cluster.begin_now("train-orphaned")
    # The new attempt may wait 80 s for the lease of the old one before it trains.
    until(lambda: len(read_outcome("train-orphaned", bucket).starts) == 2)
    cluster.wait_for("train-orphaned", "COMPLETED")
    assert_equal(run_of(bucket, "orphaned"), run_of(bucket, undisturbed))


def test_groups_have_the_weights_of_one_machine(cluster, bucket):
    succeeded(ddpm(*training("here", bucket, 4), "--processes", 2))
    for run in ("processes", "nodes"):
        submitted(*training(run, bucket, 4), f"--{run}", 2)
        cluster.wait_for(f"train-{run}", "COMPLETED")
        assert_equal(run_of(bucket, run), run_of(bucket, "here"))


def test_jobs_without_grace_leave_when_they_have_saved(cluster, folder, tmp_path, monkeypatch):
    """Slurm tells their script as well, which must not wait for what it may no longer do."""
    ready = tmp_path / "ready"
    # Slurm tells the program twice, and a second signal would end an interpreter that is about to exit.
    saves = f"signal.signal(15, lambda *_: os._exit(75)); open({str(ready)!r}, 'w'); time.sleep(300)"
    program(tmp_path, saves, monkeypatch, partition="first")
    submitted("train", "--dataset", "tiles", "--run", "brief")
    until(ready.exists)
    began = time.monotonic()
    cluster.preempt()
    cluster.wait_for_requeue("train-brief")
    until(lambda: "code=75" in cluster.run("squeue", "-h", "--name=train-brief", "-o", "%k"))
    until(lambda: "high" not in cluster.run("squeue", "-h", "-o", "%P"))
    # Killed, it would have held its node for two minutes.
    assert time.monotonic() - began < 100
    cluster.run("scancel", "--name=train-brief")


def test_failing_slices_are_named_and_tried_again_alone(cluster, folder, tmp_path, monkeypatch):
    """Also the last one, whose number is that of the whole array, while others have failed for good."""
    codes = "{'1/4': 74, '2/4': 65, '3/4': 3}.get(sys.argv[sys.argv.index('--slice') + 1], 0)"
    program(tmp_path, f"sys.exit({codes})", monkeypatch)
    submitted("sample", "--run", "lost", "--count", 9, "--slices", 4)
    (job,) = {row.split()[0] for row in cluster.run("squeue", "-h", "-o", "%j").splitlines()}

    def slices() -> list[str]:
        rows = cluster.run("squeue", "-h", "--array", "--states=all", f"--name={job}", "-o", "%K %T %k")
        return sorted(" ".join(each) for each in re.findall(r"(\d \w+) ddpm began=\d+ failures=(\d code=\d*)", rows))

    ended = ["0 COMPLETED 0 code=0", "1 FAILED 0 code=74", "2 FAILED 0 code=65", "3 PENDING 1 code=3"]
    until(lambda: slices() == ended, said=lambda: str(slices()))
    until(lambda: status(job)["state"] == "waiting")
    waiting = status(job)["message"]
    assert "1 of 4 slices finished; failed slices: 1,2" in waiting
    assert "slice 3: BeginTime; the attempt before ended with exit code 3: crashed" in waiting
    cluster.run("scancel", "--me")


def test_slices_share_the_work(cluster, bucket, undisturbed):
    words = ("sample", "--run", undisturbed, "--count", 1100, "--save", "shards", "--bucket", bucket)
    submitted(*words, "--slices", 4)
    (job,) = {row.split()[0] for row in cluster.run("squeue", "-h", "-o", "%j").splitlines()}
    output = succeeded(ddpm("jobs", "logs", job, "--on", "low", "-f"))
    assert set(re.findall(r"^==> .*_(\d)\.log <==$", output, re.MULTILINE)) == set("0123")
    assert output.count("ddpm-slurm: ended with code 0\n") == 4
    found = status(job)
    assert (found["state"], found["message"]) == ("finished", "4 of 4 slices finished")
    assert "complete already" in succeeded(ddpm_here(*words))


def test_no_shell_reads_values(cluster, folder, tmp_path, monkeypatch):
    odd = "'$(touch pwned)' \"`touch pwned`\" \\ %j ;é"
    said = tmp_path / f"{odd}.json"
    variables = {"NOTE": odd, "SAID": str(said)}
    says = "part = os.environ['SAID'] + '.part'; json.dump([sys.argv, dict(os.environ)], open(part, 'w'))"
    program(tmp_path / odd[:9], f"{says}; os.rename(part, part[:-5])", monkeypatch, env=variables)
    # What a person has set for other jobs does not win over the target's keys.
    for name, value in {"MINE": "of whoever submits", "SBATCH_PARTITION": "short", "SLURM_MEM_PER_CPU": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "images").mkdir()
    words = ("pack", str(tmp_path / "images"), "odd", "--size", "8", "--licence", odd, "--bucket", str(tmp_path / odd))
    submitted(*words, "--slices", 2)
    until(said.exists)
    argv, environ = json.loads(said.read_text())
    assert argv[1:5] == ["data", *words[:3]]
    assert argv[argv.index("--licence") + 1] == odd
    assert argv[argv.index("--slice") + 1] in ("0/2", "1/2")
    assert {name: environ[name] for name in variables} == variables
    assert not {"MINE", "SLURM_MEM_PER_CPU"} & {*environ}
    assert environ["SLURM_JOB_PARTITION"] == "low"
    assert not [*folder.rglob("pwned"), *tmp_path.rglob("pwned")]
