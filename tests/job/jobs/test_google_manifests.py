"""What is sent to Compute Engine and to Batch: kept in files, judged by their protos, refused where it could not run.

`DDPM_TEST_REWRITE_GOLDEN=1 pytest tests/job/jobs/test_google_manifests.py` writes the files anew.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from job.exits import BadRequestError, Exit
from tests.job.jobs.google_jobs import backend_of, metadata_of, sampling, spec
from tests.job.jobs.google_server import parsed
from tests.job.jobs.submitting import assert_kept

both = pytest.mark.parametrize("engine", ["vm", "batch"])
WHOLE = "one-gpu-spot"
"""The case whose file has the whole script of a VM."""
EIGHT = {"machine_type": "g2-standard-96", "network": "ddpm", "subnetwork": "ddpm-us-central1"}
T4 = {"machine_type": "n1-standard-8", "gpu_type": "nvidia-tesla-t4", "service_account": ""}
JOBS = {
    "one-gpu-spot": (spec(env={"NCCL_DEBUG": "INFO"}), {}),
    "eight-gpus": (spec(gpus=8, spot=False, max_hours=72.0), EIGHT),
    "slices-on-n1": (sampling(slices=2, gpus=2), T4),
}
"""The case's name is its file's: the job, and what differs in the target."""


@both
@pytest.mark.parametrize("case", JOBS)
def test_requests_are_kept_and_valid(engine, case):
    job, changes = JOBS[case]
    made = backend_of(engine, **changes).render(job)
    for one in made:
        parsed(one, "compute_v1.Instance" if engine == "vm" else "batch_v1.Job")
        for item in one.get("metadata", {}).get("items", ()):
            if item["key"] == "startup-script" and case != WHOLE:
                item["value"] = f"as in {WHOLE}.yaml"
    assert_kept(engine, case, made, JOBS)


@both
def test_impossible_jobs_are_refused(engine):
    for job, changes, message in [
        (spec(gpus=8), {}, "has 1 nvidia-l4, not 8 nvidia-l4: use another machine_type"),
        (spec(gpus=8, gpu_type="nvidia-tesla-t4"), {"machine_type": "n1-standard-8"}, "no GPUs of its own"),
        (spec(gpu_type="nvidia-l5"), {}, "--gpu-type nvidia-a100-80gb|"),
        (spec(image=""), {}, "set the target's image"),
        (spec(image="localhost/ddpm:latest"), {}, "make push-image"),
        (spec(argv=("train", "--set", "a=1\n2")), {}, "line break"),
        (spec(env={"A": "x\ny"}), {}, "line break"),
        (spec(), {"machine_type": "x"}, "x has no GPUs of its own"),
        *([(spec(max_hours=400), {}, "336 hours")] * (engine == "batch")),
    ]:
        with pytest.raises(BadRequestError, match=re.escape(message)) as caught:
            backend_of(engine, **changes).render(job)
        assert caught.value.exit_code == Exit.BAD_REQUEST


def test_cpu_jobs_get_no_devices():
    (machine,) = backend_of("vm", machine_type="e2-standard-8").render(spec(gpus=0))
    assert metadata_of(machine)["ddpm-gpus"] == "0" and "guestAccelerators" not in machine
    assert "nvidia" not in metadata_of(machine)["ddpm-words"]
    (made,) = backend_of("batch", machine_type="e2-standard-8").render(spec(gpus=0))
    assert "--gpus" not in str(made) and "'installGpuDrivers': False" in str(made) and "accelerators" not in str(made)


def test_user_values_are_literal(tmp_path):
    words = ("train", "--set", "a=$(touch x); `y` \"z\" 'w' # %n", "--dataset", " a  b ", "")
    job = spec(argv=words, env={"A": "$(x) 'y'", "TMPDIR": "/elsewhere"})
    known = metadata_of(backend_of("vm").render(job)[0])
    assert tuple(known["ddpm-words"].split("\n")[-1 - len(words) : -1]) == words
    assert {"A=$(x) 'y'", "TMPDIR=/elsewhere"} <= {*known["ddpm-environment"].splitlines()}
    # They are part of no script.
    assert known["startup-script"] == metadata_of(backend_of("vm").render(spec())[0])["startup-script"]
    runnable = backend_of("batch").render(job)[0]["taskGroups"][0]["taskSpec"]["runnables"][0]
    assert tuple(runnable["container"]["commands"]) == words
    assert runnable["environment"]["variables"].items() >= job.env.items()
    # A shell fills in the number of a slice, and reads nothing else.
    (tmp_path / "ddpm").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (tmp_path / "ddpm").chmod(0o755)
    job = sampling(slices=2, argv=(*words, "--", "$BATCH_TASK_INDEX/2"))
    container = backend_of("batch").render(job)[0]["taskGroups"][0]["taskSpec"]["runnables"][0]["container"]
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BATCH_TASK_INDEX": "1"}
    ran = subprocess.run(
        [container["entrypoint"], *container["commands"]], env=variables, capture_output=True, check=True
    )
    found = ran.stdout.decode().split("\0")
    assert found[:-1] == [*words, "--slice", "1/2", "--", "$BATCH_TASK_INDEX/2"]


def test_newest_machines_take_hyperdisks():
    for machine, disk in (("a4-highgpu-8g", "hyperdisk"), ("g2-standard-8", "pd"), ("c4d-standard-8", "hyperdisk")):
        (made,) = backend_of("vm", machine_type=machine).render(spec(gpus=0))
        assert made["disks"][0]["initializeParams"]["diskType"].endswith(f"/{disk}-balanced")
