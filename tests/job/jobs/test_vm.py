"""The life of a job on VMs: against servers on this machine that speak for Compute Engine and Cloud Logging."""

from __future__ import annotations

import re
import threading
import time

import pytest

from job.exits import BadRequestError, Exit, MissingInputError, Restart, State
from job.jobs.backends import Cause, NoCapacityError, google
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.jobs.google_jobs import REGIONS, ZONES, backend_of, sampling, spec
from tests.job.jobs.google_server import Refusal

STOCK_OUT = (
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS",
    "The zone 'projects/my-project/zones/us-central1-a' does not have enough resources available.",
)
QUOTA = ("QUOTA_EXCEEDED", "Quota 'PREEMPTIBLE_NVIDIA_L4_GPUS' exceeded.  Limit: 0.0 in region us-central1.")
SLICED = "sample-celeba"


@pytest.fixture
def backend(cloud):
    return backend_of("vm")


@pytest.fixture
def state(backend):
    """The state of the job, and its cause or exit code."""

    def state():
        status = backend.alive("celeba")
        return status.state, status.cause or status.exit_code

    return state


def test_a_job_through_its_states(cloud, backend, state):
    assert (state(), backend.alive("celeba").created) == ((State.GONE, None), "")
    (made,) = backend.render(spec())
    backend.submit(spec())
    arrived = cloud.compute.instances[ZONES[0], "celeba"]
    assert {key: arrived[key] for key in made} == made
    assert (backend.alive("celeba").state, backend.alive("celeba").has_machine) == (State.WAITING, False)
    cloud.compute.set_status("celeba", "RUNNING")
    status = backend.alive("celeba")
    assert (status.state, status.place, status.created[-1]) == (State.RUNNING, ZONES[0], "Z")
    assert backend.jobs() == [status]
    # Deleting itself takes it a while.
    cloud.logging.ended("celeba", 65)
    cloud.compute.set_status("celeba", "STOPPING")
    for _ in range(2):
        assert state() == (State.FAILED, Exit.BAD_DATA) and "bad data" in backend.alive("celeba").why
        cloud.compute.vanish()
    assert backend.jobs() == []


def test_earlier_jobs_do_not_count(cloud, backend, state):
    backend.submit(spec())
    cloud.logging.ended("celeba", 0)
    cloud.compute.vanish()
    assert state() == (State.FINISHED, 0)
    backend.submit(spec())
    assert state() == (State.WAITING, None)
    cloud.compute.vanish()
    assert state() == (State.GONE, None)
    cloud.logging.ended("celeba", 75, event="taken")
    assert state() == (State.GONE, Cause.TAKEN_AWAY)
    # Where who submits may not write logs.
    cloud.logging.ended("celeba", 0, event="started")
    assert state() == (State.GONE, None)


def test_gone_machines_leave_jobs_known(cloud, backend, folder):
    text = f"vm: {{backend: vm, project: my-project, zones: [{ZONES[0]}], image: i, bucket: gs://bucket}}"
    (folder / "targets.yaml").write_text(text)
    backend.submit(spec())
    cloud.logging.printed("celeba", "epoch 1")
    cloud.logging.ended("celeba", 75, event="taken")
    cloud.compute.vanish()
    lines = succeeded(ddpm_here("jobs", "logs", "celeba", "--on", "vm")).splitlines()
    assert lines == ["ddpm-vm: submitted", "epoch 1", "ddpm-vm: ended with code 75"]
    lines = succeeded(ddpm_here("jobs", "status", "celeba", "--on", "vm", "--bucket", folder)).splitlines()
    assert re.fullmatch(r"state       gone, submitted 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", lines[1])
    assert lines[2] == "message     its machine was taken away"
    # What was never there is not.
    assert "knows a job" in refused(ddpm_here("jobs", "logs", "nobody", "--on", "vm"), Exit.MISSING_INPUT)


def test_targets_of_a_project_share_jobs(cloud, backend, folder):
    places = {"one": ("vm", "zones", ZONES[0]), "two": ("vm", "zones", ZONES[1])}
    places |= {"first": ("batch", "regions", REGIONS[0]), "both": ("batch", "regions", ", ".join(REGIONS))}
    line = "{}: {{backend: {}, project: my-project, {}: [{}], image: i, bucket: gs://bucket}}\n"
    (folder / "targets.yaml").write_text("".join(line.format(name, *words) for name, words in places.items()))
    for name, one in (
        ("celeba", backend),
        ("batched", backend_of("batch")),
        ("other", backend_of("batch").elsewhere()),
    ):
        one.submit(spec(name))
        assert succeeded(ddpm_here("jobs", "list")).count(f"{name} ") == 1
        assert "waiting" in succeeded(ddpm_here("jobs", "status", name, "--bucket", folder))
        succeeded(ddpm_here("jobs", "cancel", name))


def test_machines_of_others_stay(cloud, backend):
    cloud.compute.instances[ZONES[0], "celeba"] = {"name": "celeba", "status": "RUNNING"}
    with pytest.raises(BadRequestError, match="already exists"):
        backend.submit(spec())
    assert list(cloud.compute.instances) == [(ZONES[0], "celeba")] and not cloud.made("DELETE")


def test_leaving_machines_make_room(cloud, backend, state):
    backend.submit(spec())
    cloud.logging.ended("celeba", 70)
    cloud.compute.set_status("celeba", "TERMINATED")
    assert state() == (State.FAILED, Exit.NOT_A_NUMBER)
    assert all("its disk costs money" in one.message for one in (backend.alive("celeba"), *backend.jobs()))
    backend.submit(spec())
    cloud.compute.set_status("celeba", "STOPPING")
    assert state() == (State.RUNNING, None)
    assert backend.alive("celeba").message == "its machine is being taken away"
    backend.submit(spec())
    assert state() == (State.WAITING, None)


def test_shortage_leaves_nothing(cloud, backend):
    for place, problem, error, said in [
        (ZONES[0], STOCK_OUT, NoCapacityError, "does not have enough resources"),
        # The last of several slices.
        ("-2", STOCK_OUT, NoCapacityError, "does not have enough resources"),
        (ZONES[0], QUOTA, BadRequestError, r"PREEMPTIBLE_NVIDIA_L4_GPUS.*iam-admin/quotas"),
    ]:
        cloud.compute.failures = {place: problem}
        with pytest.raises(error, match=said):
            backend.submit(sampling())
        assert not cloud.compute.instances
    cloud.denied["POST .*us-central1-a/instances$"] = Refusal(503, STOCK_OUT[1], "resourceNotReady")
    with pytest.raises(NoCapacityError):
        backend.submit(spec())
    backend.elsewhere().submit(spec())
    assert [*cloud.compute.instances] == [(ZONES[1], "celeba")]
    assert backend.alive("celeba").place == ZONES[1]


def test_slices_are_machines_and_one_job(cloud, backend):
    backend.submit(sampling())
    for index in range(3):
        cloud.compute.set_status(f"{SLICED}-{index}", "RUNNING")
    assert [(one.name, one.state) for one in backend.jobs()] == [(SLICED, State.RUNNING)]
    cloud.logging.printed(SLICED, "piece 4", index=2)
    assert [*backend.logs(SLICED, False)] == ["[all] ddpm-vm: submitted", "[2] piece 4"]
    cloud.logging.ended(SLICED, 0, 1, 3)
    cloud.compute.vanish(f"{SLICED}-1")
    status = backend.alive(SLICED)
    assert (status.state, status.message) == (State.RUNNING, "1 of 3 slices finished")
    cloud.logging.ended(SLICED, 0, 0, 3)
    cloud.compute.vanish()
    status = backend.alive(SLICED)
    assert (status.state, status.message) == (State.GONE, "2 of 3 slices finished; slice 2: its machine is gone")
    cloud.logging.ended(SLICED, 0, 2, 3)
    assert backend.alive(SLICED).state is State.FINISHED


def test_the_slice_that_failed_worst_decides(cloud, backend):
    for codes in [(71, 65), (65, 71), (75, 65), (137, 65)]:
        backend.submit(sampling(slices=2))
        for index, code in enumerate(codes):
            cloud.logging.ended(SLICED, code, index, 2)
        cloud.compute.vanish()
        status = backend.alive(SLICED)
        assert (status.state, status.exit_code, status.restart) == (State.FAILED, 65, Restart.NEVER)
        assert f"slice {codes.index(65)}" in status.message


def test_cancelling_deletes_the_machines(cloud, backend):
    backend.submit(sampling())
    assert backend.cancel(SLICED).startswith("was waiting and is removed")
    assert not cloud.compute.instances
    # They hear of it, and say so.
    cloud.logging.ended(SLICED, 75, 1, 3, "taken")
    assert backend.alive(SLICED).state is State.CANCELLED
    with pytest.raises(MissingInputError, match=SLICED):
        backend.cancel(SLICED)
    # Who may not write logs may submit and cancel all the same.
    cloud.denied["entries:write"] = Refusal(403, "Permission 'logging.logEntries.create' denied")
    for word, expected in (("RUNNING", "is stopping: it saves first"), ("TERMINATED", "was gone already")):
        backend.submit(spec())
        cloud.compute.set_status("celeba", word)
        assert backend.cancel("celeba").startswith(expected)


def test_logs_are_complete(cloud, backend, monkeypatch):
    monkeypatch.setattr(google, "LOG_PAGE_ENTRIES", 20)
    cloud.logging.printed("celeba", "of a job of the same name, last week", ago_seconds=7 * 86400)
    backend.submit(spec())
    cloud.compute.set_status("celeba", "RUNNING")
    cloud.logging.printed("other", "another job")
    for number in range(50):
        cloud.logging.printed("celeba", f"line {number}\n")
    expected = ["ddpm-vm: submitted", *(f"line {number}" for number in range(50))]
    assert [*backend.logs("celeba", False)] == expected
    has_seen_all = threading.Event()

    def story():
        cloud.logging.printed("celeba", "line 50")
        assert has_seen_all.wait(20)
        printed_at = time.monotonic()
        cloud.logging.ended("celeba", 0)
        cloud.compute.vanish()
        # The last lines of a job arrive when it is known that its machine is no more, and not in order.
        asked = len(cloud.requests)
        while len(cloud.requests) == asked:
            time.sleep(0.01)
        cloud.logging.printed("celeba", "late line", ago_seconds=time.monotonic() - printed_at)

    thread, lines = threading.Thread(target=story), []
    thread.start()
    for line in backend.logs("celeba", True):
        lines.append(line)
        if line == "line 50":
            has_seen_all.set()
    thread.join()
    assert lines[:-2] == [*expected, "line 50"]
    assert sorted(lines[-2:]) == ["ddpm-vm: ended with code 0", "late line"]
