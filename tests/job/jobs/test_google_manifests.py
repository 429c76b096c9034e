"""What is sent to Compute Engine and to Batch: kept in files, judged by their protos, refused where it could not run.

`DDPM_REWRITE_GOLDEN=1 pytest tests/job/jobs/test_google_manifests.py` writes the files anew.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from google.cloud import batch_v1, compute_v1

from job.exits import BadRequestError, Exit
from job.jobs.backends.batch_manifests import job
from job.jobs.backends.vm_manifests import instances
from tests.job.jobs.google_jobs import (
    BATCH,
    GOLDEN,
    IMAGE,
    JOBS,
    VM,
    ZONES,
    files_of,
    judged,
    readable,
    rendered,
    sampling,
    spec,
)

REWRITE = "DDPM_REWRITE_GOLDEN"
BACKENDS = ("vm", "batch")
both = pytest.mark.parametrize("backend", BACKENDS)
cases = pytest.mark.parametrize("case", JOBS)


def kept(backend, case):
    return [*yaml.safe_load_all((GOLDEN / backend / f"{case}.yaml").read_text())]


@both
@cases
def test_a_request_is_what_is_kept(backend, case):
    path = GOLDEN / backend / f"{case}.yaml"
    if os.environ.get(REWRITE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(readable(rendered(backend, case)))
    assert kept(backend, case) == rendered(backend, case), f"{REWRITE}=1 writes {path} anew, if that is meant"


@both
def test_nothing_is_kept_that_is_not_made(backend):
    assert sorted(path.stem for path in (GOLDEN / backend).glob("*")) == sorted(JOBS)


@both
@cases
def test_the_proto_has_every_field_and_the_service_takes_it(backend, case):
    kind = compute_v1.Instance if backend == "vm" else batch_v1.Job
    for made in kept(backend, case):
        assert judged(backend, made) == []
        again = json.loads(kind.to_json(kind.from_json(json.dumps(made))))
        assert kind.from_json(json.dumps(again)) == kind.from_json(json.dumps(made))


@both
@cases
def test_equal_jobs_give_equal_requests(backend, case):
    one, changes = JOBS[case]
    again = replace(one, env=dict(one.env), labels=dict(one.labels))
    target = (VM if backend == "vm" else BATCH).model_copy(update=changes)
    made = instances(again, target, ZONES[0]) if backend == "vm" else [job(again, target, "us-central1")]
    assert made == rendered(backend, case)


def fields(thing, path=()):
    """Paths of all keys of all maps."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield (*path, key)
            yield from fields(value, (*path, key))
    elif isinstance(thing, list):
        for index, value in enumerate(thing):
            yield from fields(value, (*path, index))


FREE = ("labels", "variables")
"""Maps whose keys are anybody's."""
UNNOTICED = {
    "vm": {
        *("description", "labels", "guestAccelerators", "diskSizeGb", "nicType", "accessConfigs", "type", "name"),
        *("network", "subnetwork", "scopes", "shieldedInstanceConfig", "enableSecureBoot", "enableVtpm"),
        *("enableIntegrityMonitoring", "metadata", "items", "key", "value"),
    },
    "batch": {
        *("labels", "taskCount", "parallelism", "taskCountPerNode", "runAsNonRoot", "maxRetryCount", "maxRunDuration"),
        *("computeResource", "cpuMilli", "memoryMib", "lifecyclePolicies", "displayName", "commands", "options"),
        *("environment", "variables", "accelerators", "type", "count", "bootDisk", "image", "sizeGb"),
        *("installGpuDrivers", "blockProjectSshKeys", "serviceAccount", "email", "scopes", "network"),
        *("networkInterfaces", "subnetwork", "noExternalIpAddress", "logsPolicy", "destination"),
    },
}
"""Fields that a right request may lack, so that only the kept file says that this one has them."""


def parent_of(thing, path):
    for key in path[:-1]:
        thing = thing[key]
    return thing


def is_free(path):
    return len(path) > 1 and path[-2] in FREE


@both
@cases
def test_whoever_misspells_a_field_hears_of_it(backend, case):
    for made in kept(backend, case)[:1]:
        for path in fields(made):
            if is_free(path):
                continue
            changed = copy.deepcopy(made)
            parent = parent_of(changed, path)
            key = path[-1]
            parent[key[:-1] + chr(ord(key[-1]) ^ 1 | 96) + "x"] = parent.pop(key)
            assert judged(backend, changed), path
            assert changed != rendered(backend, case)[0]


@both
@cases
def test_whoever_drops_a_field_hears_of_it(backend, case):
    for made in kept(backend, case)[:1]:
        for path in fields(made):
            changed = copy.deepcopy(made)
            del parent_of(changed, path)[path[-1]]
            # The kept file is the last one to notice, and the first where a field may be absent.
            assert changed != rendered(backend, case)[0]
            if not is_free(path) and path[-1] not in UNNOTICED[backend]:
                assert judged(backend, changed), path


def refused(message, make, *arguments):
    with pytest.raises(BadRequestError) as caught:
        make(*arguments)
    assert caught.value.exit_code == Exit.BAD_REQUEST
    assert message in str(caught.value), str(caught.value)


def render(backend, one, **changes):
    if backend == "vm":
        return instances(one, VM.model_copy(update=changes), ZONES[0])
    return job(one, BATCH.model_copy(update=changes), "us-central1")


@both
def test_two_nodes_are_refused_and_the_way_out_is_named(backend):
    refused("use a kubernetes target", render, backend, spec(nodes=2))


@both
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 8}, "set machine_type: g2-standard-96"),
        ({"gpu_type": "nvidia-tesla-t4"}, "set machine_type: n1-standard-8"),
        ({"gpu_type": "nvidia-l5"}, "use --gpu-type nvidia-a100-80gb|"),
        ({"image": ""}, "set image in the target"),
        ({"image": "localhost/ddpm:latest"}, "make push-image"),
        ({"image": "a b"}, "set image in the target"),
        ({"bucket": "./bucket"}, "use gs://NAME"),
        ({"labels": {"Team": "x"}}, "label Team='x'"),
        ({"argv": ("train", "--set", "a=1\n2")}, "control character"),
        ({"env": {"A": "x\ny"}}, "control character"),
    ],
)
def test_what_could_not_run_is_refused_before_anything_is_sent(backend, changes, message):
    refused(message, render, backend, spec(**changes))


@both
def test_targets_with_odd_fields_are_refused(backend):
    for changes in (
        {"machine_type": "n1-standard-8"},
        {"machine_type": "g2-standard-9"},
        {"machine_type": "x"},
        {"service_account": "me"},
        {"network": "a b"},
    ):
        refused(next(iter(changes.values())), lambda c=changes: render(backend, spec(), **c))
    refused("--slices 5000", render, backend, sampling(slices=5000))


def test_batch_ends_everything_after_two_weeks():
    refused("336 hours", render, "batch", spec(max_hours=400))


def test_a_cpu_job_gets_no_driver_and_no_devices():
    (machine,) = render("vm", spec(gpus=0), machine_type="e2-standard-8")
    files = files_of(machine)
    assert 'DDPM_GPUS="0"' in files["/etc/ddpm/settings"] and "guestAccelerators" not in machine
    assert "nvidia" not in files["/etc/ddpm/words"]
    made = json.dumps(render("batch", spec(gpus=0), machine_type="e2-standard-8"))
    assert "--gpus" not in made and "installGpuDrivers" not in made and "accelerators" not in made


@both
def test_what_is_staged_lies_on_the_disk_and_not_in_memory(backend):
    made = render(backend, spec())
    if backend == "vm":
        lines = files_of(made[0])["/etc/ddpm/environment"].splitlines()
        variables = dict(line.split("=", 1) for line in lines)
    else:
        variables = made["taskGroups"][0]["taskSpec"]["runnables"][0]["environment"]["variables"]
    assert "--tmpfs=/tmp:" in str(made)
    assert variables["TMPDIR"] == "/scratch"
    for name in ("DDPM_CACHE", "XDG_CACHE_HOME"):
        assert variables[name].startswith("/scratch/"), name
    given = render(backend, spec(env={"TMPDIR": "/elsewhere"}))
    assert "/elsewhere" in str(given)


def test_slices_are_machines_with_words_of_their_own_or_tasks_that_find_their_number():
    machines = rendered("vm", "sampling-slices")
    assert [machine["name"] for machine in machines] == [f"sample-celeba-{index}" for index in range(3)]
    for index, machine in enumerate(machines):
        assert files_of(machine)["/etc/ddpm/words"].splitlines()[-2:] == ["--slice", f"{index}/3"]
    (made,) = rendered("batch", "sampling-slices")
    group = made["taskGroups"][0]
    assert (group["taskCount"], group["parallelism"]) == ("3", "3")
    assert group["taskSpec"]["runnables"][0]["container"]["commands"][-2:] == ["--slice", "BATCH_TASK_INDEX/3"]


def test_the_words_of_a_job_are_those_of_the_program_unchanged():
    words = ("train", "--set", "a=$(touch x); `y` \"z\" 'w' #", "--dataset", " a  b ")
    (machine,) = instances(spec(argv=words), VM, ZONES[0])
    own = files_of(machine)["/etc/ddpm/words"].splitlines()
    assert tuple(own[own.index(IMAGE) + 1 :]) == words
    made = job(spec(argv=words), BATCH, "us-central1")
    assert tuple(made["taskGroups"][0]["taskSpec"]["runnables"][0]["container"]["commands"]) == words


def test_rendering_needs_none_of_googles_libraries():
    code = (
        "import sys\n"
        "for name in ('google.cloud', 'google.auth', 'google.api_core'): sys.modules[name] = None\n"
        "from job.jobs.backends import backend_for\n"
        "from job.jobs.spec import JobSpec\n"
        "from job.jobs.targets import BatchTarget, VmTarget\n"
        "spec = JobSpec('a', 'train', ('train',), 'example.com/a:1', 'gs://b')\n"
        "for target in (VmTarget(backend='vm', project='my-project', zones=('us-central1-a',)),"
        " BatchTarget(backend='batch', project='my-project', regions=('us-central1',))):\n"
        "    print(len(backend_for(target).render(spec)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("1\n1\n", 0), done.stderr
