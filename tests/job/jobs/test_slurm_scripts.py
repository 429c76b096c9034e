"""The scripts for Slurm, kept in files, and its words for states that no test provokes. `tests/slurm` runs real jobs.

`DDPM_TEST_REWRITE_GOLDEN=1 pytest tests/job/jobs/test_slurm_scripts.py` writes the files anew.
"""

from __future__ import annotations

import re

import pytest

from job.exits import BadRequestError, Restart, State
from job.jobs.backends import Cause
from job.jobs.backends.slurm import SlurmTarget, _tasks, _whole
from job.jobs.spec import JobSpec
from tests.job.jobs.submitting import assert_kept

VENV = {"folder": "/shared/jobs", "venv": "/shared/.venv"}
SIF = {"folder": "/shared/jobs", "image": "/shared/ddpm.sif", "scratch": "/lscratch/$SLURM_JOB_ID"}
FULL = {
    "partition": "gpu",
    "account": "lab",
    "qos": "long",
    "constraint": "a100|h100",
    "gres": "lscratch:200",
    "cpus": 32,
}
TRAIN = ("train", "--dataset", "celeba", "--bucket", "s3://b")
SAMPLE = ("sample", "--run", "celeba", "--count", "50000", "--bucket", "s3://b")
JOBS = {
    "venv": ({"gpus": 0}, VENV),
    "slices": ({"verb": "sample", "argv": SAMPLE, "slices": 4, "max_hours": 0.5}, VENV | {"memory": "64G"}),
    "apptainer-nodes": (
        {"gpus": 4, "gpu_type": "a100", "nodes": 2, "max_hours": 24.0, "reads": ("/data/a b",)},
        SIF | FULL,
    ),
    "pyxis": ({"env": {"DDPM_GPUS": "1"}}, SIF | {"image": "registry#ddpm:1", "container": "pyxis"}),
}
"""The case's name is its file's: what differs in the job, and the target's keys."""


def script(job: dict, target: dict) -> str:
    usual = {"name": "train-celeba", "verb": "train", "argv": TRAIN, "image": "i", "bucket": "s3://b", "spot": False}
    (made,) = SlurmTarget(name="slurm", backend="slurm", **target).render(JobSpec(**usual | job))
    return str(made["script"])


@pytest.mark.parametrize("case", JOBS)
def test_scripts_are_kept(case):
    made = script(*JOBS[case])
    if case != "venv":
        made = made.partition("\n# Runs a job's program")[0] + "\n# as in venv.yaml\n"
    assert_kept("slurm", case, [{"script": made}], JOBS)


@pytest.mark.parametrize(
    ("job", "target", "message"),
    [
        ({"spot": True}, VENV, "--spot: on Slurm the partition decides"),
        ({"reads": ("/a,b",)}, SIF, "'/a,b' has a colon"),
    ],
)
def test_impossible_jobs_are_refused(job, target, message):
    with pytest.raises(BadRequestError, match=re.escape(message)):
        script(job, target)


@pytest.mark.parametrize(
    ("word", "code", "state", "cause", "restart"),
    [
        ("FAILED", "77", State.FAILED, None, Restart.NEVER),
        ("FAILED", "75", State.STOPPED, None, Restart.ALWAYS),
        ("FAILED", "", State.FAILED, None, Restart.BOUNDED),
        ("TIMEOUT", "", State.FAILED, None, Restart.BOUNDED),
        ("OUT_OF_MEMORY", "137", State.FAILED, None, Restart.BOUNDED),
        ("NODE_FAIL", "", State.FAILED, Cause.TAKEN_AWAY, Restart.ALWAYS),
        ("PREEMPTED", "75", State.STOPPED, Cause.TAKEN_AWAY, Restart.ALWAYS),
        ("CANCELLED by 1000", "", State.CANCELLED, None, None),
        ("COMPLETED", "0", State.FINISHED, None, None),
        ("PENDING", "75", State.WAITING, None, None),
        ("SUSPENDED", "", State.RUNNING, None, None),
    ],
)
def test_states_have_their_restart(word, code, state, cause, restart):
    row = f"7_2|{word}|None|n3|1796026535|train-celeba|ddpm began=1796026530 failures=2 code={code} bucket=s3://a|b"
    others = "8|PENDING|None||1796026535|somebodys|not ours\n9|RUNNING|None|n1|1796026535|interactive|(null)"
    ((number, index, status),) = _tasks(f"{row}\n{others}\n")
    assert (number, index, status.state, status.cause) == (7, 2, state, cause)
    assert (status.failures, status.bucket, status.created) == (2, "s3://a|b", "2026-11-30T08:15:30Z")
    assert status.exit_code == (int(code) if code else None)
    assert restart in (None, status.restart)


CORRUPT = "bad data: unreadable"


@pytest.mark.parametrize(
    ("slices", "state", "message"),
    [
        (
            ("FAILED 74", "COMPLETED 0", "PENDING 137", "FAILED 65"),
            State.WAITING,
            "1 of 4 slices finished; failed slices: 0,3; slice 2: Priority; the attempt before ended with exit code "
            "137: killed by signal 9",
        ),
        (
            ("COMPLETED 0", "FAILED 74", "RUNNING ", "COMPLETED 0"),
            State.RUNNING,
            "2 of 4 slices finished; failed slices: 1",
        ),
        (
            ("FAILED 65", "COMPLETED 0", "FAILED 74"),
            State.FAILED,
            f"1 of 3 slices finished; failed slices: 0,2; slice 0: {CORRUPT}",
        ),
    ],
)
def test_failed_slices_are_named(tmp_path, slices, state, message):
    rows = ""
    for number, (word, code) in enumerate(each.split(" ") for each in slices):
        rows += f"7_{number}|{word}|{'Priority' if word == 'PENDING' else 'None'}|n3|1796026535|sample-a-1a2b3c4d|"
        rows += f"ddpm began=1796026530 failures=0 code={code} bucket=s3://b\n"
    status = _whole(_tasks(rows)).with_outcome(str(tmp_path))
    assert status.state is state and status.message.startswith(message), status.message
