"""The life of a job on VMs: against servers on this machine that speak for Compute Engine and Cloud Logging."""

from __future__ import annotations

import re
import threading
import time

import pytest

from job.exits import BadRequestError, Exit, MissingInputError
from job.jobs.backends import google
from job.jobs.backends.base import Cause, NoCapacityError, State
from job.jobs.backends.batch import BatchBackend
from job.jobs.backends.vm import VmBackend
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.jobs.google_jobs import BATCH, REGIONS, VM, ZONES, sampling, spec
from tests.job.jobs.google_services import Refusal

STOCK_OUT = (
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS",
    "The zone 'projects/my-project/zones/us-central1-a' does not have enough resources available.",
)
QUOTA = ("QUOTA_EXCEEDED", "Quota 'PREEMPTIBLE_NVIDIA_L4_GPUS' exceeded.  Limit: 0.0 in region us-central1.")


@pytest.fixture
def backend(cloud):
    return VmBackend(VM)


def vanishes(cloud, name):
    for key in [key for key in cloud.compute.instances if key[1] == name]:
        del cloud.compute.instances[key]


def ends(cloud, name, code, index=0, slices=0, event="ended"):
    """The last word of a machine, as `vm_start.sh` writes it."""
    cloud.logging.write(
        logName="projects/my-project/logs/ddpm-jobs",
        labels={"ddpm-job": name, "ddpm-slice": str(index), "ddpm-slices": str(slices)},
        jsonPayload={"message": f"ddpm-vm: ended with code {code}", "event": event, "code": code},
    )


def taken(cloud, name, index=0, slices=0):
    ends(cloud, name, 75, index, slices, "taken")


def test_a_job_through_its_states(cloud, backend):
    assert (backend.status("celeba").state, backend.status("celeba").created) == (State.GONE, "")
    (made,) = backend.render(spec())
    backend.submit(spec())
    arrived = cloud.compute.instances[ZONES[0], "celeba"]
    assert {key: arrived[key] for key in made} == made
    assert (backend.status("celeba").state, backend.status("celeba").has_machine) == (State.WAITING, False)
    cloud.compute.set_status("celeba", "RUNNING")
    status = backend.status("celeba")
    assert (status.state, status.place, status.created[-1]) == (State.RUNNING, ZONES[0], "Z")
    assert backend.jobs() == [status]
    assert backend.describe("celeba") == {"instances": [arrived]}
    # Deleting itself takes it a while.
    ends(cloud, "celeba", 65)
    cloud.compute.set_status("celeba", "STOPPING")
    for _ in range(2):
        status = backend.status("celeba")
        assert (status.state, status.exit_code) == (State.FAILED, Exit.BAD_DATA)
        assert "bad data" in status.message
        vanishes(cloud, "celeba")
    assert backend.jobs() == []
    with pytest.raises(MissingInputError):
        backend.describe("celeba")


def test_what_an_earlier_job_of_that_name_said_is_past(cloud, backend):
    backend.submit(spec())
    ends(cloud, "celeba", 0)
    vanishes(cloud, "celeba")
    assert (backend.status("celeba").state, backend.status("celeba").exit_code) == (State.FINISHED, 0)
    backend.submit(spec())
    assert backend.status("celeba").state is State.WAITING
    vanishes(cloud, "celeba")
    assert (backend.status("celeba").state, backend.status("celeba").cause) == (State.GONE, None)
    taken(cloud, "celeba")
    assert (backend.status("celeba").state, backend.status("celeba").cause) == (State.GONE, Cause.TAKEN_AWAY)
    # Where who submits may not write logs.
    ends(cloud, "celeba", 0, event="started")
    assert (backend.status("celeba").state, backend.status("celeba").cause) == (State.GONE, None)


def test_a_machine_that_is_gone_leaves_its_job_known(cloud, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"vm: {{backend: vm, project: my-project, zones: [{ZONES[0]}], image: i, bucket: gs://bucket}}"
    (tmp_path / "targets.yaml").write_text(text)
    backend.submit(spec())
    cloud.logging.printed("celeba", "epoch 1")
    taken(cloud, "celeba")
    vanishes(cloud, "celeba")
    lines = succeeded(ddpm_here("jobs", "logs", "celeba", "--on", "vm")).splitlines()
    assert lines == ["ddpm-vm: submitted", "epoch 1", "ddpm-vm: ended with code 75"]
    lines = succeeded(ddpm_here("jobs", "status", "celeba", "--on", "vm", "--bucket", tmp_path)).splitlines()
    assert lines[0] == "job         celeba, on vm"
    assert re.fullmatch(r"state       gone, submitted 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", lines[1])
    assert lines[2] == "it says     its machine was taken away"
    # What was never there is not.
    assert "knows no job" in refused(ddpm_here("jobs", "logs", "nobody", "--on", "vm"), Exit.MISSING_INPUT)


def test_targets_of_one_project_have_one_job(cloud, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"one": ("vm", "zones", ZONES[0]), "two": ("vm", "zones", ZONES[1])}
    places |= {"first": ("batch", "regions", REGIONS[0]), "both": ("batch", "regions", ", ".join(REGIONS))}
    line = "{}: {{backend: {}, project: my-project, {}: [{}], image: i, bucket: gs://bucket}}\n"
    (tmp_path / "targets.yaml").write_text("".join(line.format(name, *words) for name, words in places.items()))
    backend.submit(spec())
    BatchBackend(BATCH).submit(spec("batched"))
    BatchBackend(BATCH).elsewhere().submit(spec("elsewhere"))
    listed = succeeded(ddpm_here("jobs", "list"))
    assert [listed.count(name) for name in ("celeba", "batched", "elsewhere")] == [1, 1, 1]
    for name in ("celeba", "batched", "elsewhere"):
        assert "waiting" in succeeded(ddpm_here("jobs", "status", name, "--bucket", tmp_path))
        succeeded(ddpm_here("jobs", "cancel", name))


def test_somebody_elses_machine_of_that_name_stays(cloud, backend):
    cloud.compute.instances[ZONES[0], "celeba"] = {"name": "celeba", "status": "RUNNING"}
    with pytest.raises(BadRequestError, match="already exists"):
        backend.submit(spec())
    assert list(cloud.compute.instances) == [(ZONES[0], "celeba")]
    assert not cloud.made("DELETE")


def test_a_machine_that_is_off_or_going_makes_room(cloud, backend):
    backend.submit(spec())
    ends(cloud, "celeba", 70)
    cloud.compute.set_status("celeba", "TERMINATED")
    status = backend.status("celeba")
    assert (status.state, status.exit_code) == (State.FAILED, Exit.NOT_A_NUMBER)
    assert "its disk costs money" in status.message and "its disk costs money" in backend.jobs()[0].message
    backend.submit(spec())
    cloud.compute.set_status("celeba", "STOPPING")
    status = backend.status("celeba")
    assert (status.state, status.message) == (State.RUNNING, "its machine is being taken away")
    backend.submit(spec())
    assert backend.status("celeba").state is State.WAITING


def test_out_of_stock_leaves_nothing_and_the_next_zone_may_have_one(cloud, backend):
    cloud.compute.failing_zones[ZONES[0]] = STOCK_OUT
    with pytest.raises(NoCapacityError, match="does not have enough resources"):
        backend.submit(spec())
    cloud.denied["POST .*us-central1-a/instances$"] = Refusal(503, STOCK_OUT[1], "resourceNotReady")
    with pytest.raises(NoCapacityError):
        backend.submit(spec())
    assert not cloud.compute.instances
    following = backend.elsewhere()
    following.submit(spec())
    assert [*cloud.compute.instances] == [(ZONES[1], "celeba")]
    assert backend.status("celeba").place == ZONES[1]
    assert following.elsewhere() is None


def test_a_quota_says_where_to_ask_for_more(cloud, backend):
    cloud.compute.failing_zones[ZONES[0]] = QUOTA
    with pytest.raises(BadRequestError, match=r"PREEMPTIBLE_NVIDIA_L4_GPUS.*iam-admin/quotas"):
        backend.submit(spec())
    assert not cloud.compute.instances


def test_slices_are_machines_and_one_job(cloud, backend):
    name = "sample-celeba"
    backend.submit(sampling())
    assert len(cloud.compute.instances) == 3
    for index in range(3):
        cloud.compute.set_status(f"{name}-{index}", "RUNNING")
    assert [(one.name, one.state) for one in backend.jobs()] == [(name, State.RUNNING)]
    cloud.logging.printed(name, "piece 4", index=2)
    assert [*backend.logs(name, False)] == ["[all] ddpm-vm: submitted", "[2] piece 4"]
    ends(cloud, name, 0, 1, 3)
    vanishes(cloud, f"{name}-1")
    status = backend.status(name)
    assert (status.state, status.message) == (State.RUNNING, "1 of 3 slices finished")
    ends(cloud, name, 0, 0, 3)
    vanishes(cloud, f"{name}-0")
    vanishes(cloud, f"{name}-2")
    status = backend.status(name)
    assert (status.state, status.message) == (State.GONE, "2 of 3 slices finished; slice 2: its machine is gone")
    ends(cloud, name, 0, 2, 3)
    assert backend.status(name).state is State.FINISHED


@pytest.mark.parametrize("codes", [(71, 65), (65, 71), (75, 65), (137, 65)])
def test_the_slice_that_failed_worst_decides(cloud, backend, codes):
    backend.submit(sampling(slices=2))
    for index, code in enumerate(codes):
        ends(cloud, "sample-celeba", code, index, 2)
    cloud.compute.instances.clear()
    status = backend.status("sample-celeba")
    assert (status.state, status.exit_code, status.retried) == (State.FAILED, 65, "never")
    assert f"slice {codes.index(65)}" in status.message


def test_slices_that_cannot_all_be_had_are_none(cloud, backend):
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
    assert backend.cancel("sample-celeba").startswith("was waiting, and is no more")
    assert not cloud.compute.instances
    # They hear of it, and say so.
    taken(cloud, "sample-celeba", 1, 3)
    assert backend.status("sample-celeba").state is State.CANCELLED
    with pytest.raises(MissingInputError, match="sample-celeba"):
        backend.cancel("sample-celeba")
    for word, expected in (("RUNNING", "was told to stop: it saves first"), ("TERMINATED", "was gone already")):
        backend.submit(spec())
        cloud.compute.set_status("celeba", word)
        assert backend.cancel("celeba").startswith(expected)


def test_who_may_not_write_logs_may_submit_and_cancel(cloud, backend):
    cloud.denied["entries:write"] = Refusal(403, "Permission 'logging.logEntries.create' denied")
    backend.submit(spec())
    backend.cancel("celeba")
    assert not cloud.compute.instances


def test_logs_are_those_of_this_job_however_many_and_late(cloud, backend, monkeypatch):
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
        time.sleep(0.1)
        cloud.logging.printed("celeba", "line 50")
        assert has_seen_all.wait(20)
        ends(cloud, "celeba", 0)
        vanishes(cloud, "celeba")
        # The last lines of a job arrive when its machine is no more, and not in order.
        time.sleep(0.1)
        cloud.logging.printed("celeba", "late line", ago_seconds=0.3)

    thread, lines = threading.Thread(target=story), []
    thread.start()
    for line in backend.logs("celeba", True):
        lines.append(line)
        if line == "line 50":
            has_seen_all.set()
    thread.join()
    assert lines[:-2] == [*expected, "line 50"]
    assert sorted(lines[-2:]) == ["ddpm-vm: ended with code 0", "late line"]
    with pytest.raises(MissingInputError, match="no job 'nobody'"):
        [*backend.logs("nobody", False)]
