"""What is sent to Compute Engine and to Batch: kept in files, judged by their protos, refused where it could not run.

`DDPM_REWRITE_GOLDEN=1 pytest tests/job/jobs/test_google_manifests.py` writes the files anew.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import pytest
from google.cloud import batch_v1, compute_v1

from job.exits import BadRequestError, Exit
from job.jobs.backends.batch import batch_job
from job.jobs.backends.vm import vm_instances
from job.jobs.submit import formatted
from tests.job.jobs.google_jobs import BATCH, GOLDEN, JOBS, VM, ZONES, metadata_of, rendered, sampling, spec
from tests.job.jobs.google_services import Refusal, parsed

REWRITE = "DDPM_REWRITE_GOLDEN"
BACKENDS = ("vm", "batch")
both = pytest.mark.parametrize("backend", BACKENDS)
WHOLE = "one-gpu-spot"
"""The case whose file has the whole script of a VM."""


def shown(backend, case):
    """What a dry run prints; the script of a VM, which is a constant, in one case alone."""
    made = copy.deepcopy(rendered(backend, case))
    for item in (item for one in made if case != WHOLE for item in one.get("metadata", {}).get("items", ())):
        if item["key"] == "startup-script":
            item["value"] = f"as in {WHOLE}.yaml"
    return formatted(made)


@both
@pytest.mark.parametrize("case", JOBS)
def test_a_request_is_what_is_kept_and_the_service_takes_it(backend, case):
    path = GOLDEN / backend / f"{case}.yaml"
    if os.environ.get(REWRITE):
        path.write_text(shown(backend, case))
    assert path.read_text() == shown(backend, case), f"{REWRITE}=1 writes {path} anew, if that is meant"
    assert sorted(path.stem for path in (GOLDEN / backend).glob("*")) == sorted(JOBS)


def fields(thing, path=()):
    """Paths of all keys of all maps, but of those whose keys are anybody's."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield (*path, key)
            yield from fields(value, (*path, key)) if key not in ("labels", "variables") else ()
    elif isinstance(thing, list):
        for index, value in enumerate(thing):
            yield from fields(value, (*path, index))


@both
def test_the_proto_has_every_field_and_takes_its_value(backend):
    kind = compute_v1.Instance if backend == "vm" else batch_v1.Job
    for made in (one for case in JOBS for one in rendered(backend, case)):
        parsed(made, kind)
        for path in fields(made):
            changed = copy.deepcopy(made)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1] + "x"] = parent.pop(path[-1])
            # Whoever misspells one hears of it.
            with pytest.raises(Refusal):
                parsed(changed, kind)


def render(backend, one, **changes):
    if backend == "vm":
        return vm_instances(one, VM.model_copy(update=changes), ZONES[0])
    return [batch_job(one, BATCH.model_copy(update=changes), "us-central1")]


REFUSED = [
    (spec(nodes=2), {}, "use a kubernetes target"),
    (spec(gpus=8), {}, "set machine_type: g2-standard-96"),
    (spec(gpu_type="nvidia-tesla-t4"), {}, "set machine_type: n1-standard-8"),
    (spec(gpu_type="nvidia-l5"), {}, "use --gpu-type nvidia-a100-80gb|"),
    (spec(image=""), {}, "set image in the target"),
    (spec(image="localhost/ddpm:latest"), {}, "make push-image"),
    (spec(image="a b"), {}, "set image in the target"),
    (spec(argv=("train", "--set", "a=1\n2")), {}, "control character"),
    (spec(env={"A": "x\ny"}), {}, "control character"),
    (spec(), {"machine_type": "n1-standard-8"}, "n1-standard-8"),
    (spec(), {"machine_type": "x"}, "machine_type 'x'"),
    (sampling(slices=5000), {}, "--slices 5000"),
]


@both
def test_what_could_not_run_is_refused_before_anything_is_sent(backend):
    for one, changes, message in [*REFUSED, *([(spec(max_hours=400), {}, "336 hours")] * (backend == "batch"))]:
        with pytest.raises(BadRequestError, match=re.escape(message)) as caught:
            render(backend, one, **changes)
        assert caught.value.exit_code == Exit.BAD_REQUEST


def test_a_cpu_job_gets_no_driver_and_no_devices():
    (machine,) = render("vm", spec(gpus=0), machine_type="e2-standard-8")
    assert metadata_of(machine)["ddpm-gpus"] == "0" and "guestAccelerators" not in machine
    assert "nvidia" not in metadata_of(machine)["ddpm-words"]
    (made,) = render("batch", spec(gpus=0), machine_type="e2-standard-8")
    assert "--gpus" not in str(made) and "'installGpuDrivers': False" in str(made) and "accelerators" not in str(made)


def test_values_of_users_are_words_as_they_are_and_part_of_no_script():
    words = ("train", "--set", "a=$(touch x); `y` \"z\" 'w' # %n", "--dataset", " a  b ", "")
    (machine,) = render("vm", spec(argv=words, env={"A": "$(x) 'y'"}))
    known = metadata_of(machine)
    own = known["ddpm-words"].removesuffix("\n").split("\n")
    assert tuple(own[-len(words) :]) == words
    assert "A=$(x) 'y'\n" in known["ddpm-environment"]
    assert known["startup-script"] == metadata_of(rendered("vm", "eight-gpus")[0])["startup-script"]
    (made,) = render("batch", spec(argv=words))
    container = made["taskGroups"][0]["taskSpec"]["runnables"][0]["container"]
    assert tuple(container["commands"]) == words


def test_an_environment_of_the_user_wins():
    (machine,), (made,) = (render(backend, spec(env={"TMPDIR": "/elsewhere"})) for backend in BACKENDS)
    assert "TMPDIR=/elsewhere\n" in metadata_of(machine)["ddpm-environment"]
    assert "'TMPDIR': '/elsewhere'" in str(made)


def test_slices_are_machines_with_words_of_their_own_or_tasks_that_find_their_number():
    machines = rendered("vm", "sampling-slices")
    assert [machine["name"] for machine in machines] == [f"sample-celeba-{index}" for index in range(3)]
    for index, machine in enumerate(machines):
        assert metadata_of(machine)["ddpm-words"].splitlines()[-2:] == ["--slice", f"{index}/3"]
    (made,) = rendered("batch", "sampling-slices")
    group = made["taskGroups"][0]
    assert (group["taskCount"], group["parallelism"]) == ("3", "3")
    assert group["taskSpec"]["runnables"][0]["container"]["commands"][-2:] == ["--slice", "BATCH_TASK_INDEX/3"]


def test_rendering_needs_none_of_googles_libraries():
    code = (
        "import sys\n"
        "for name in ('google.cloud', 'google.auth', 'google.api_core', 'requests'): sys.modules[name] = None\n"
        "from job.jobs.backends import backend_for\n"
        "from job.jobs.spec import JobSpec\n"
        "from job.jobs.targets import BatchTarget, VmTarget\n"
        "spec = JobSpec('a', 'train', ('train',), 'example.com/a:1', 'gs://b')\n"
        "for target in (VmTarget(backend='vm', project='my-project', zones=('us-central1-a',)),"
        " BatchTarget(backend='batch', project='my-project', regions=('us-central1',))):\n"
        "    with backend_for(target) as backend: print(len(backend.render(spec)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("1\n1\n", 0), done.stderr
