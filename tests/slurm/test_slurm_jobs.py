"""Jobs on a real Slurm: preempted, out of time, failed, cancelled, without their node, in groups and in slices."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import psutil
import pytest

from job.coordination.outcome import read_outcome
from job.exits import State
from job.runs.checkpoints import list_checkpoints
from job.store import Store, open_store
from tests.containers.runs import IMAGES, assert_equal, training
from tests.job.command_line import ddpm, ddpm_here, refused, succeeded
from tests.slurm.cluster import until

ENDLESS = 100_000
"""Epochs of a run that is always stopped."""


def run_of(bucket: str, run: str) -> Store:
    return open_store(bucket).sub(f"runs/{run}")


def submitted(*words: object, on: str) -> None:
    succeeded(ddpm_here("submit", *words, "--on", on, "--yes"))


def status(job: str, on: str) -> dict:
    (found,) = json.loads(succeeded(ddpm_here("jobs", "status", job, "--on", on, "--json")))
    return dict(found)


def has_saved(bucket: str, run: str) -> bool:
    there = run_of(bucket, run)
    return there.exists("config.yaml") and bool(list_checkpoints(there))


def wait_for_checkpoint(bucket: str, run: str) -> None:
    until(lambda: has_saved(bucket, run), 60)


def test_preempted_runs_have_undisturbed_weights(cluster, bucket, undisturbed):
    submitted(*training("taken", bucket), on="low")
    wait_for_checkpoint(bucket, "taken")
    cluster.run("sbatch", "-p", "high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait_for_requeue("train-taken")
    until(lambda: read_outcome("train-taken", bucket).state is State.STOPPED)
    waiting = status("train-taken", "low")
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
    assert re.findall("ddpm-slurm: (.*?)(?: on .*)?\n", output)[1:] == [
        "ended with code 75",
        re.search("job [0-9]+ begins", output)[0],
        "ended with code 0",
    ]
    assert status("train-taken", "low")["state"] == "finished"
    assert_equal(run_of(bucket, "taken"), run_of(bucket, undisturbed))


def test_jobs_out_of_time_go_on(cluster, bucket):
    submitted(*training("long", bucket, ENDLESS), on="brief")
    # Slurm counts two whole minutes, of which 30 s are the grace.
    cluster.wait_for_requeue("train-long", seconds=120)
    assert read_outcome("train-long", bucket).exit_code == 75
    cluster.begin_now("train-long")
    cluster.wait_for("train-long", "RUNNING")
    until(lambda: len(read_outcome("train-long", bucket).starts) == 2)
    cluster.run("scancel", "--name=train-long")


def test_fatal_ends_are_final(cluster, bucket):
    words = ("train", "--dataset", "missing", "--run", "lost", "--bucket", bucket)
    watched = ddpm("submit", *words, "--on", "low", "--yes", "--watch")
    assert "which would come again: dataset 'missing' is not in" in refused(watched, 66)
    lost = status("train-lost", "low")
    assert (lost["state"], lost["exit_code"], lost["attempts"]) == ("failed", 66, 1)
    assert cluster.state("train-lost") == "FAILED"


def program(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Has jobs on `low` run another program than this one."""
    (ddpm := folder / "bin/ddpm").parent.mkdir(parents=True)
    ddpm.write_text(text)
    ddpm.chmod(0o755)
    low = json.loads(Path("targets.yaml").read_text())["low"]
    (folder / "targets.yaml").write_text(json.dumps({"low": low | {"venv": str(folder)} | changes}))
    monkeypatch.setenv("DDPM_TARGETS", f"{folder}/targets.yaml")


def test_crashes_are_tried_again_to_the_bound(cluster, bucket, tmp_path, monkeypatch):
    program(tmp_path, "#!/bin/sh\nexit 3\n", monkeypatch)
    submitted(*training("broken", bucket), on="low")
    for failures in range(1, 5):
        cluster.wait_for_requeue("train-broken", failures)
        assert status("train-broken", "low")["failures"] == failures
        cluster.begin_now("train-broken")
    cluster.wait_for("train-broken", "FAILED")
    broken = status("train-broken", "low")
    assert (broken["state"], broken["exit_code"], broken["failures"]) == ("failed", 3, 5)


def test_cancelled_jobs_save_and_stay(cluster, bucket):
    submitted(*training("ended", bucket, ENDLESS), on="low")
    wait_for_checkpoint(bucket, "ended")
    again = refused(ddpm_here("submit", *training("ended", bucket, ENDLESS), "--on", "low", "--yes"), 64)
    assert "train-ended runs on n" in again
    assert "it saves first" in succeeded(ddpm_here("jobs", "cancel", "train-ended", "--on", "low"))
    cluster.wait_for("train-ended", "CANCELLED")
    first = read_outcome("train-ended", bucket)
    assert (first.exit_code, status("train-ended", "low")["state"]) == (75, "cancelled")
    # By a person who knows Slurm, and not this program.
    submitted(*training("ended", bucket, ENDLESS), on="low")
    until(lambda: len(read_outcome("train-ended", bucket).starts) == 2)
    until(lambda: max(list_checkpoints(run_of(bucket, "ended"))).fence == 2)
    cluster.run("scancel", "--name=train-ended")
    cluster.wait_for("train-ended", "CANCELLED")
    assert read_outcome("train-ended", bucket).exit_code == 75
    assert "is cancelled already" in refused(ddpm_here("jobs", "cancel", "train-ended", "--on", "low"), 64)


def test_runs_survive_their_node(cluster, bucket, undisturbed):
    submitted(*training("orphaned", bucket), on="first")
    wait_for_checkpoint(bucket, "orphaned")
    cluster.kill("n0")
    # As the controller finds by itself some minutes later.
    cluster.run("scontrol", "update", "NodeName=n0", "State=DOWN", "Reason=killed")
    cluster.wait_for_requeue("train-orphaned")
    cluster.start("n0")
    # The daemon ends what it no longer knows.
    cluster.begin_now("train-orphaned")
    # The new attempt may wait 80 s for the lease of the old one before it trains.
    cluster.wait_for("train-orphaned", "COMPLETED", 80 + 90)
    assert len(read_outcome("train-orphaned", bucket).starts) == 2
    assert_equal(run_of(bucket, "orphaned"), run_of(bucket, undisturbed))


def test_groups_have_the_weights_of_one_machine(cluster, bucket):
    succeeded(ddpm(*training("here", bucket, 4), "--processes", 2))
    submitted(*training("processes", bucket, 4), "--processes", 2, on="low")
    cluster.wait_for("train-processes", "COMPLETED", 90)
    assert_equal(run_of(bucket, "processes"), run_of(bucket, "here"))
    submitted(*training("nodes", bucket, 4), "--nodes", 2, on="low")
    cluster.wait_for("train-nodes", "COMPLETED", 90)
    assert_equal(run_of(bucket, "nodes"), run_of(bucket, "here"))


def test_jobs_without_grace_leave_when_they_have_saved(cluster, folder, tmp_path, monkeypatch):
    """Slurm tells their script as well, which must not wait for what it may no longer do."""
    ready = tmp_path / "ready"
    # Slurm tells the program twice, and a second signal would end an interpreter that is about to exit.
    saves = "import os, pathlib, signal, time; signal.signal(15, lambda *_: os._exit(75))"
    saves += f"; pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    program(tmp_path, f"#!{sys.executable}\n{saves}\n", monkeypatch, partition="first")
    submitted("train", "--dataset", "tiles", "--run", "brief", on="low")
    until(ready.exists)
    began = time.monotonic()
    cluster.run("sbatch", "-p", "high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait_for_requeue("train-brief")
    until(lambda: "code=75" in cluster.run("squeue", "-h", "--name=train-brief", "-o", "%k"))
    until(lambda: "high" not in cluster.run("squeue", "-h", "-o", "%P"))
    # Killed, it would have held its node for 30 s.
    assert time.monotonic() - began < 20
    cluster.run("scancel", "--name=train-brief")


def test_failing_slices_are_tried_again_alone(cluster, folder, tmp_path, monkeypatch):
    """The last one, too, whose number is that of the whole array."""
    fails = "import sys; sys.exit(3 * (sys.argv[sys.argv.index('--slice') + 1] == '3/4'))"
    program(tmp_path, f"#!{sys.executable}\n{fails}\n", monkeypatch)
    submitted("sample", "--run", "walk", "--count", 9, "--slices", 4, on="low")

    def slices() -> list[str]:
        rows = cluster.run("squeue", "-h", "--array", "--states=all", "-o", "%j|%K %T %k").splitlines()
        found = re.findall(r"sample-walk-\w+\|(\d \w+) ddpm began=\d+ (failures=\d code=\d*)", "\n".join(rows))
        return sorted(" ".join(each) for each in found)

    done = [f"{index} COMPLETED failures=0 code=0" for index in range(3)]
    until(lambda: slices() == [*done, "3 PENDING failures=1 code=3"], said=lambda: str(slices()))
    cluster.run("scancel", "--me")


def test_slices_that_failed_for_good_are_named(cluster, folder, tmp_path, monkeypatch):
    """Also while another one waits for its next attempt."""
    codes = "{'1/4': 74, '2/4': 65, '3/4': 3}.get(sys.argv[sys.argv.index('--slice') + 1], 0)"
    program(tmp_path, f"#!{sys.executable}\nimport sys; sys.exit({codes})\n", monkeypatch)
    submitted("sample", "--run", "lost", "--count", 9, "--slices", 4, on="low")
    (job,) = {row.split()[0] for row in cluster.run("squeue", "-h", "-o", "%j").splitlines()}
    until(lambda: "1 of 4 slices finished; failed slices: 1,2" in status(job, "low")["message"])
    until(lambda: status(job, "low")["state"] == "waiting")
    waiting = status(job, "low")["message"]
    assert "slice 3: BeginTime; the attempt before ended with exit code 3: crashed" in waiting
    cluster.run("scancel", "--me")


def test_killed_programs_leave_their_code(cluster, bucket):
    submitted(*training("killed", bucket, ENDLESS), on="low")
    wait_for_checkpoint(bucket, "killed")
    for each in psutil.process_iter(["cmdline"]):
        if {"train", "--run", "killed"} <= {*(each.info["cmdline"] or ())}:
            each.kill()
    cluster.wait_for_requeue("train-killed")
    waiting = status("train-killed", "low")
    assert waiting["message"] == "BeginTime; the attempt before ended with exit code 137: killed by signal 9"
    assert (waiting["exit_code"], waiting["attempts"], waiting["failures"]) == (137, 1, 1)
    cluster.run("scancel", "--name=train-killed")


def test_slices_share_the_work(cluster, bucket, undisturbed):
    words = ("sample", "--run", undisturbed, "--count", 1100, "--save", "shards", "--bucket", bucket)
    submitted(*words, "--slices", 4, on="low")
    (job,) = {row.split()[0] for row in cluster.run("squeue", "-h", "-o", "%j").splitlines()}
    output = succeeded(ddpm("jobs", "logs", job, "--on", "low", "-f"))
    assert set(re.findall(r"^==> .*_(\d)\.log <==$", output, re.MULTILINE)) == set("0123")
    assert output.count("ddpm-slurm: ended with code 0\n") == 4
    found = status(job, "low")
    assert (found["state"], found["message"]) == ("finished", "4 of 4 slices finished")
    assert "complete already" in succeeded(ddpm_here(*words))


def test_no_shell_reads_values(cluster, folder, tmp_path, monkeypatch):
    odd = "'$(touch pwned)' \"`touch pwned`\" \\ %j ;é"
    says = "import json, os, sys; json.dump([sys.argv, dict(os.environ)], open(os.environ['SAID'], 'w'))"
    said = tmp_path / f"{odd}.json"
    variables = {"NOTE": odd, "SAID": str(said)}
    program(tmp_path / odd[:9], f"#!{sys.executable}\n{says}\n", monkeypatch, env=variables)
    # What a person has set for other jobs does not win over the target's keys.
    for name, value in {"MINE": "of whoever submits", "SBATCH_PARTITION": "short", "SLURM_MEM_PER_CPU": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "images").mkdir()
    words = ("pack", str(tmp_path / "images"), "odd", "--size", "8", "--licence", odd, "--bucket", str(tmp_path / odd))
    submitted(*words, "--slices", 2, on="low")
    until(said.exists)
    argv, environ = json.loads(said.read_text())
    assert argv[1:5] == ["data", *words[:3]]
    assert argv[argv.index("--licence") + 1] == odd
    assert argv[argv.index("--slice") + 1] in ("0/2", "1/2")
    assert {name: environ[name] for name in variables} == variables
    assert not {"MINE", "SLURM_MEM_PER_CPU"} & {*environ}
    assert environ["SLURM_JOB_PARTITION"] == "low"
    assert not [*folder.rglob("pwned"), *tmp_path.rglob("pwned")]
