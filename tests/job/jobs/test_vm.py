"""Compute Engine's and Cloud Logging's own clients against servers on this machine: the life of a job on VMs."""

from __future__ import annotations

import re

import pytest

from job.exits import BadRequestError, BucketAwayError, Exit, MissingInputError, NoPermissionError
from job.jobs.backends.base import NoCapacityError, State
from job.jobs.backends.batch import BatchBackend
from job.jobs.backends.vm import VmBackend
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.jobs.google_jobs import BATCH, REGIONS, VM, ZONES, never, sampling, spec
from tests.job.jobs.google_services import Refusal

STOCK_OUT = (
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS",
    "The zone 'projects/my-project/zones/us-central1-a' does not have enough resources available.",
)
BATCHES = {"first": REGIONS[0], "second": REGIONS[1], "both": ", ".join(REGIONS)}
"""Targets by name, and their regions."""
QUOTA = ("QUOTA_EXCEEDED", "Quota 'PREEMPTIBLE_NVIDIA_L4_GPUS' exceeded.  Limit: 0.0 in region us-central1.")


@pytest.fixture
def backend(cloud):
    return VmBackend(VM)


def runs(cloud, name, **said):
    """Has a machine up, and saying things."""
    cloud.compute.set_status(name, "RUNNING")
    cloud.compute.guest_attributes[name] = {f"ddpm/{key.replace('_', '-')}": value for key, value in said.items()}


def vanishes(cloud, name):
    for key in [key for key in cloud.compute.instances if key[1] == name]:
        del cloud.compute.instances[key]


def tells(cloud, name, event, code=0, index=0, slices=0, message=""):
    """What `vm_supervise.sh` writes."""
    cloud.logging.write(
        logName="projects/my-project/logs/ddpm-jobs",
        labels={"ddpm-job": name, "ddpm-slice": str(index), "ddpm-slices": str(slices)},
        jsonPayload={"event": event, "code": code, "attempts": 1, "message": message or event},
    )


def test_what_is_rendered_is_what_arrives(cloud, backend):
    (made,) = backend.render(spec())
    backend.submit(spec())
    arrived = cloud.compute.instances[ZONES[0], "celeba"]
    assert {key: arrived[key] for key in made} == made


def test_a_job_through_its_states(cloud, backend):
    assert backend.status("celeba").state is State.GONE
    backend.submit(spec())
    assert backend.status("celeba").state is State.WAITING
    assert not backend.status("celeba").has_machine
    runs(cloud, "celeba")
    assert backend.status("celeba").message == "the machine is starting"
    assert backend.status("celeba").has_machine
    runs(cloud, "celeba", phase="image")
    assert (backend.status("celeba").state, backend.status("celeba").message) == (
        State.WAITING,
        "the image is being pulled",
    )
    runs(cloud, "celeba", phase="running", attempts="2")
    status = backend.status("celeba")
    assert (status.state, status.attempts, status.place) == (State.RUNNING, 2, ZONES[0])
    assert status.created.endswith("Z")
    assert [one.name for one in backend.jobs()] == ["celeba"]
    runs(cloud, "celeba", phase="over", exit_code="65", attempts="2")
    status = backend.status("celeba")
    assert (status.state, status.exit_code) == (State.FAILED, Exit.BAD_DATA)
    assert "bad data" in status.message
    tells(cloud, "celeba", "started")
    tells(cloud, "celeba", "over", 65)
    vanishes(cloud, "celeba")
    status = backend.status("celeba")
    assert (status.state, status.exit_code) == (State.FAILED, Exit.BAD_DATA)


def test_a_machine_that_was_taken_away_is_gone_and_one_that_finished_is_not(cloud, backend):
    backend.submit(spec())
    tells(cloud, "celeba", "started")
    vanishes(cloud, "celeba")
    assert backend.status("celeba").state is State.GONE
    tells(cloud, "celeba", "stopped", 75)
    assert (backend.status("celeba").state, backend.status("celeba").message) == (
        State.GONE,
        "its machine was taken away",
    )
    backend.submit(spec())
    tells(cloud, "celeba", "started")
    tells(cloud, "celeba", "over", 0)
    vanishes(cloud, "celeba")
    assert (backend.status("celeba").state, backend.status("celeba").exit_code) == (State.FINISHED, 0)
    # What the job before it said is past, also while the new machine has said nothing.
    backend.submit(spec())
    vanishes(cloud, "celeba")
    assert backend.status("celeba").state is State.GONE


def test_a_machine_that_is_gone_leaves_its_job_known(cloud, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"vm: {{backend: vm, project: my-project, zones: [{ZONES[0]}], image: i, bucket: gs://bucket}}"
    (tmp_path / "targets.yaml").write_text(text)
    backend.submit(spec())
    tells(cloud, "celeba", "started")
    cloud.logging.printed("celeba", "epoch 1")
    tells(cloud, "celeba", "stopped", 75)
    vanishes(cloud, "celeba")
    lines = succeeded(ddpm_here("jobs", "logs", "celeba", "--on", "vm")).splitlines()
    assert lines == ["ddpm-vm: submitted", "ddpm-vm: started", "epoch 1", "ddpm-vm: stopped"]
    lines = succeeded(ddpm_here("jobs", "status", "celeba", "--on", "vm", "--bucket", tmp_path)).splitlines()
    assert lines[0] == "job         celeba, on vm"
    assert re.fullmatch(r"state       gone, 1 start, submitted 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", lines[1])
    assert lines[2:] == ["it says     its machine was taken away"]
    # What was never there is not.
    assert "knows no job" in refused(ddpm_here("jobs", "logs", "nobody", "--on", "vm"), Exit.MISSING_INPUT)


def test_a_job_that_runs_is_not_started_twice(cloud, backend):
    backend.submit(spec())
    with pytest.raises(BadRequestError, match=r"is waiting in us-central1-a.*ddpm jobs cancel celeba"):
        backend.submit(spec())
    # Nor in another zone.
    with pytest.raises(BadRequestError):
        backend.elsewhere().submit(spec())
    assert len(cloud.compute.instances) == 1


def test_somebody_elses_machine_of_that_name_stays(cloud, backend):
    cloud.compute.instances[ZONES[0], "celeba"] = {"name": "celeba", "status": "RUNNING"}
    with pytest.raises(BadRequestError, match="already exists"):
        backend.submit(spec())
    assert list(cloud.compute.instances) == [(ZONES[0], "celeba")]
    assert not cloud.made("DELETE")


def test_a_machine_that_is_switched_off_makes_room(cloud, backend):
    backend.submit(spec())
    tells(cloud, "celeba", "started")
    tells(cloud, "celeba", "over", 70)
    cloud.compute.set_status("celeba", "TERMINATED")
    status = backend.status("celeba")
    assert (status.state, status.exit_code) == (State.FAILED, Exit.NOT_A_NUMBER)
    assert "its disk costs money" in status.message
    backend.submit(spec())
    assert backend.status("celeba").state is State.WAITING


def test_a_machine_that_is_going_is_waited_for(cloud, backend):
    backend.submit(spec())
    cloud.compute.set_status("celeba", "STOPPING")
    assert (backend.status("celeba").state, backend.status("celeba").message) == (
        State.RUNNING,
        "its machine is being taken away",
    )
    backend.submit(spec())
    assert backend.status("celeba").state is State.WAITING


def test_out_of_stock_leaves_nothing_and_the_next_zone_may_have_one(cloud, backend):
    cloud.compute.failing_zones[ZONES[0]] = STOCK_OUT
    with pytest.raises(NoCapacityError, match="does not have enough resources"):
        backend.submit(spec())
    assert not cloud.compute.instances
    following = backend.elsewhere()
    following.submit(spec())
    assert [*cloud.compute.instances] == [(ZONES[1], "celeba")]
    assert backend.status("celeba").place == ZONES[1]
    assert following.elsewhere() is None


def test_out_of_stock_at_once_is_the_same(cloud, backend):
    cloud.denied["POST .*/instances$"] = Refusal(503, STOCK_OUT[1], "resourceNotReady")
    with pytest.raises(NoCapacityError):
        backend.submit(spec())


def test_a_quota_says_where_to_ask_for_more(cloud, backend):
    cloud.compute.failing_zones[ZONES[0]] = QUOTA
    with pytest.raises(BadRequestError, match=r"PREEMPTIBLE_NVIDIA_L4_GPUS.*iam-admin/quotas") as caught:
        backend.submit(spec())
    assert caught.value.exit_code == Exit.BAD_REQUEST
    assert not cloud.compute.instances


def test_slices_are_machines_and_one_job(cloud, backend):
    backend.submit(sampling())
    assert len(cloud.compute.instances) == 3
    for index in range(3):
        runs(cloud, f"sample-celeba-{index}", phase="running", attempts="1")
    assert [(one.name, one.state) for one in backend.jobs()] == [("sample-celeba", State.RUNNING)]
    tells(cloud, "sample-celeba", "started", 0, 1, 3)
    tells(cloud, "sample-celeba", "over", 0, 1, 3)
    vanishes(cloud, "sample-celeba-1")
    status = backend.status("sample-celeba")
    assert (status.state, status.message) == (State.RUNNING, "1 of 3 slices finished")
    for index in (0, 2):
        tells(cloud, "sample-celeba", "over", 0, index, 3)
        vanishes(cloud, f"sample-celeba-{index}")
    assert backend.status("sample-celeba").state is State.FINISHED


def test_a_slice_that_was_taken_away_makes_the_job_one_that_goes_on(cloud, backend):
    backend.submit(sampling())
    for index in (0, 1):
        tells(cloud, "sample-celeba", "over", 0, index, 3)
    for index in range(3):
        vanishes(cloud, f"sample-celeba-{index}")
    status = backend.status("sample-celeba")
    assert (status.state, status.message) == (State.GONE, "2 of 3 slices finished; slice 2: its machine is gone")


def test_targets_of_one_project_have_one_job(cloud, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "{{backend: {}, project: my-project, {}: [{}], image: i, bucket: gs://bucket}}\n"
    texts = [f"{name}: " + line.format("vm", "zones", zone) for name, zone in zip(("one", "two"), ZONES, strict=True)]
    texts += [f"{name}: " + line.format("batch", "regions", region) for name, region in BATCHES.items()]
    (tmp_path / "targets.yaml").write_text("".join(texts))
    backend.submit(spec())
    BatchBackend(BATCH).submit(spec("batched"))
    BatchBackend(BATCH).elsewhere().submit(spec("elsewhere"))
    listed = succeeded(ddpm_here("jobs", "list"))
    assert [listed.count(name) for name in ("celeba", "batched", "elsewhere")] == [1, 1, 1]
    for name in ("celeba", "batched", "elsewhere"):
        assert "waiting" in succeeded(ddpm_here("jobs", "status", name, "--bucket", tmp_path))
        succeeded(ddpm_here("jobs", "cancel", name))


def test_slices_that_cannot_all_be_had_are_none(cloud, backend):
    cloud.denied["POST .*/instances$"] = Refusal(503, STOCK_OUT[1])
    cloud.denied = {}
    real = cloud.compute._insert

    def third_fails(zone, body, query):
        if body["name"].endswith("-2"):
            raise Refusal(503, STOCK_OUT[1])
        return real(zone, body, query)

    cloud.compute._insert = third_fails
    with pytest.raises(NoCapacityError):
        backend.submit(sampling())
    assert not cloud.compute.instances


def test_cancelling_deletes_the_machines_and_is_told_from_being_lost(cloud, backend):
    backend.submit(sampling())
    backend.cancel("sample-celeba")
    assert not cloud.compute.instances
    assert backend.status("sample-celeba").state is State.CANCELLED
    with pytest.raises(MissingInputError, match="sample-celeba"):
        backend.cancel("sample-celeba")


def test_who_cancels_is_told_what_that_did(cloud, backend):
    backend.submit(spec())
    assert backend.cancel("celeba").startswith("was waiting, and is no more")
    for said, expected in (("running", "was told to stop: it saves first"), ("over", "was failed already")):
        backend.submit(spec())
        runs(cloud, "celeba", phase=said, exit_code="65")
        assert backend.cancel("celeba").startswith(expected)
    backend.submit(spec())
    cloud.compute.set_status("celeba", "TERMINATED")
    assert backend.cancel("celeba").startswith("was gone already")


def test_who_may_not_write_logs_may_submit_and_cancel(cloud, backend):
    cloud.denied["entries:write"] = Refusal(403, "Permission 'logging.logEntries.create' denied")
    backend.submit(spec())
    backend.cancel("celeba")
    assert not cloud.compute.instances


def test_logs_are_the_containers_and_the_machines_words(cloud, backend):
    cloud.logging.printed("celeba", "of a job of the same name, last week", ago_seconds=7 * 86400)
    backend.submit(spec())
    cloud.logging.printed("other", "another job")
    tells(cloud, "celeba", "started")
    cloud.logging.printed("celeba", "epoch 1: loss 0.1")
    tells(cloud, "celeba", "again", 137, message="attempt 1 ended")
    cloud.logging.printed("celeba", "epoch 2: loss 0.05\n")
    lines = [*backend.logs("celeba", False, never)]
    assert [line for line in lines if line != "ddpm-vm: submitted"] == [
        "ddpm-vm: started",
        "epoch 1: loss 0.1",
        "ddpm-vm: attempt 1 ended with code 137 (killed by signal 9)",
        "epoch 2: loss 0.05",
    ]
    vanishes(cloud, "celeba")
    assert [*backend.logs("celeba", False, never)][-1] == "epoch 2: loss 0.05"
    with pytest.raises(MissingInputError, match="no job 'nobody'"):
        [*backend.logs("nobody", False, never)]


def test_describe_is_what_the_engine_holds(cloud, backend):
    backend.submit(spec())
    runs(cloud, "celeba", phase="running")
    described = backend.describe("celeba")
    assert described["instances"][0]["name"] == "celeba"
    assert described["said"] == {"celeba": {"phase": "running"}}
    with pytest.raises(MissingInputError):
        backend.describe("nobody")


def test_an_answer_that_is_lost_makes_no_second_machine_and_no_error(cloud, backend):
    real, lost = cloud.compute._insert, []

    def once(zone, body, query):
        made = real(zone, body, query)
        if not lost:
            lost.append(made)
            raise Refusal(502, "The server encountered a temporary error")
        return made

    cloud.compute._insert = once
    backend.submit(spec())
    assert lost and len(cloud.compute.instances) == 1


def test_a_request_that_the_service_refuses_is_64_and_leaves_nothing(cloud, backend):
    cloud.denied["POST .*/instances$"] = Refusal(400, "Invalid value for field 'resource.disks[0]'", "invalid")
    with pytest.raises(BadRequestError, match=r"resource\.disks"):
        backend.submit(spec())


def test_no_permission_names_it(cloud, backend):
    message = "Required 'compute.instances.create' permission for 'projects/my-project/zones/us-central1-a/instances/x'"
    cloud.denied["POST .*/instances$"] = Refusal(403, message, "forbidden")
    with pytest.raises(NoPermissionError, match=r"no permission compute\.instances\.create") as caught:
        backend.submit(spec())
    assert caught.value.exit_code == Exit.NO_PERMISSION


def test_too_many_requests_are_asked_again_a_bounded_number_of_times(cloud, backend):
    cloud.refusals = [Refusal(429, "Quota exceeded for quota metric 'Queries'", "rateLimitExceeded")] * 2
    assert backend.status("celeba").state is State.GONE
    cloud.refusals = [Refusal(403, "Rate Limit Exceeded", "rateLimitExceeded")] * 2
    assert backend.status("celeba").state is State.GONE
    cloud.requests.clear()
    cloud.denied["aggregated"] = Refusal(503, "Backend Error", "backendError")
    with pytest.raises(BucketAwayError, match="Backend Error") as caught:
        backend.status("celeba")
    assert caught.value.exit_code == Exit.BUCKET_AWAY
    assert len(cloud.made("aggregated")) == 4
