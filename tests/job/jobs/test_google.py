"""Jobs on VMs and on Google Batch, against a server on this machine; and APIs that refuse or are silent."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest

from job.exits import Exit, Restart, State
from job.jobs.backends import Cause, NoCapacityError, google
from tests.job.command_line import ddpm_here, raised, refused, succeeded
from tests.job.jobs.api import Refusal
from tests.job.jobs.submitting import REGIONS, ZONES, sampling, spec, target

NAME, SLICED = "train-celeba", "sample-celeba"
both = pytest.mark.parametrize("engine", ["vm", "batch"])
STOCK = "The zone 'projects/my-project/zones/us-central1-a' does not have enough resources available."
STOCK_OUT = ("ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", STOCK)
QUOTA = ("QUOTA_EXCEEDED", "Quota 'PREEMPTIBLE_NVIDIA_L4_GPUS' exceeded.  Limit: 0.0 in region us-central1.")
SHORTAGE = "VM in Managed Instance Group meets error: Batch Error: code - CODE_{}, description - error count is 4"


@pytest.fixture
def vm(cloud):
    return target("vm")


@pytest.fixture
def batch(cloud):
    return target("batch")


@pytest.fixture
def state(vm):
    """The state of the job on a VM, and its cause or exit code."""

    def state():
        status = vm.alive(NAME)
        return status.state, status.cause or status.exit_code

    return state


def checked(engine, **keys):
    return {check.name: check for check in target(engine, **keys).checks("")}


def test_absent_and_silent_apis(monkeypatch):
    monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", (0.01,))
    monkeypatch.setattr(google, "API_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(f"{google.ENDPOINT_VARIABLE}BATCH", f"http://127.0.0.1:{silent.getsockname()[1]}")
        raised(69, r"away or too busy.*timed out", target("batch").alive, NAME)
        # The doctor waits for nothing, and for as long as it takes here.
        monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", (1000.0,))
        monkeypatch.setattr(google, "HURRIED_TIMEOUT_SECONDS", 0.3)
        (check,) = target("batch").checks("")
    assert not check.passed and check.exit_code == Exit.BUCKET_AWAY
    monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", (0.01,))
    raised(69, "Connection refused", target("batch").submit, spec())


def test_nobody_is_logged_in(tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    # Nobody asks whether this is a machine of Google's.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    google._authorized_session.cache_clear()
    raised(77, "gcloud auth application-default login", target("vm").alive, NAME)
    assert not recwarn


NEEDED = "Required 'compute.instances.create' permission for 'projects/my-project/zones/us-central1-a/instances/x'"


def test_refusals_become_errors(cloud, vm):
    for error, words, *refusal in (
        (64, "resource.disks", 400, "Invalid value for field 'resource.disks[0]'", "invalid"),
        (77, "gcloud auth application", 401, "Request had invalid authentication credentials."),
        (77, "compute.instances.create", 403, NEEDED, "forbidden"),
        (77, "Enable it by visiting", 403, "Batch API is disabled. Enable it by visiting …"),
        (64, "already exists", 409, "Resource 'x' already exists"),
        (69, "Backend Error", 503, "Backend Error", "backendError"),
        (NoCapacityError, "does not have enough resources", 503, STOCK, "resourceNotReady"),
    ):
        cloud.denied["POST .*us-central1-a/instances$"] = Refusal(*refusal)
        raised(error, re.escape(words), vm.submit, spec())
        assert not cloud.compute.instances
    # Busy ones are asked again.
    for refusal in ((429, "Quota exceeded for 'Queries'"), (403, "Limit", "rateLimitExceeded")):
        cloud.refuse_next(*refusal, times=2)
        assert vm.alive(NAME).state is State.GONE
    cloud.requests.clear()
    cloud.denied["GET"] = Refusal(503, "The service is currently unavailable.")
    raised(69, "currently unavailable", vm.alive, NAME)
    assert len(cloud.requests) == 4


@both
def test_jobs_are_made_once(cloud, engine):
    cloud.lost_answers = 1
    backend = target(engine)
    backend.submit(spec())
    for one in (backend, backend.elsewhere()):
        raised(64, rf"{NAME} runs in us-central1.*ddpm jobs cancel {NAME}", one.submit, spec())
    assert cloud.lost_answers == 0 and len(cloud.compute.instances) + len(cloud.batch.jobs) == 1
    assert backend.elsewhere().elsewhere() is None


@both
def test_doctor_looks_at_all_parts(cloud, engine):
    found = checked(engine)
    assert all(check.passed for check in found.values()) and list(found)[1:] == ["service account"]
    cloud.accounts = set()
    (failed,) = (check for check in checked(engine).values() if not check.passed)
    assert (failed.name, failed.exit_code) == ("service account", Exit.MISSING_INPUT)
    cloud.denied["serviceAccounts"] = Refusal(403, "Permission 'iam.serviceAccounts.get' denied")
    account = checked(engine, machine_type="a2-highgpu-1g", gpu_type="")["service account"]
    assert account.message.startswith("not looked at: ") and account.passed
    (machine,) = checked(engine, gpus=2).values()
    assert not machine.passed and "another machine_type" in machine.remedy
    cloud.denied["(aggregated|jobs)"] = Refusal(403, "Permission 'x.y.list' denied")
    (api,) = checked(engine).values()
    assert (api.passed, api.exit_code) == (False, Exit.NO_PERMISSION)


def test_a_job_of_batch_through_its_states(cloud, batch):
    assert batch.alive(NAME).state is State.GONE
    batch.submit(spec())
    (arrived,) = cloud.batch.jobs.values()
    (made,) = batch.render(spec())
    assert {key: arrived[key] for key in made} == made
    for word, state in (("QUEUED", State.WAITING), ("SCHEDULED", State.WAITING), ("RUNNING", State.RUNNING)):
        cloud.batch.move(word)
        assert batch.alive(NAME).state is state
    cloud.batch.end_task(75)
    status = batch.alive(NAME)
    assert (status.state, status.exit_code, status.place) == (State.RUNNING, None, REGIONS[0])
    cloud.batch.end_task(0)
    cloud.batch.move("SUCCEEDED")
    status = batch.alive(NAME)
    assert (status.state, status.exit_code) == (State.FINISHED, 0)
    assert [(one.name, one.state) for one in batch.jobs()] == [(NAME, State.FINISHED)]
    # One that is over makes room.
    batch.submit(spec())
    assert next(iter(cloud.batch.jobs.values()))["uid"] != arrived["uid"]
    cloud.batch.tasks.clear()
    cloud.batch.end_task(65)
    cloud.batch.move("FAILED")
    status = batch.alive(NAME)
    assert (status.state, status.exit_code) == (State.FAILED, 65) and "bad data" in status.why


def test_shortages_of_batch_are_named(cloud, batch):
    batch.submit(spec())
    for code, said in (
        ("GCE_QUOTA_EXCEEDED", "the project's quota does not allow it"),
        ("GCE_ZONE_RESOURCE_POOL_EXHAUSTED", "such machines are out of stock"),
    ):
        cloud.batch.move("SCHEDULED", SHORTAGE.format(code))
        status = batch.alive(NAME)
        assert (status.state, status.message) == (State.WAITING, f"{said}, and Batch keeps trying")
    cloud.batch.move("CANCELLATION_IN_PROGRESS")
    assert batch.cancel(NAME).startswith("is stopping: it saves first")
    assert (batch.alive(NAME).message, cloud.made(":cancel")) == ("it is being ended", [])
    cloud.batch.move("RUNNING")
    batch.cancel(NAME)
    assert batch.alive(NAME).state is State.CANCELLED
    raised(64, "cancelled already", batch.cancel, NAME)
    raised(66, "no job 'nobody'", batch.cancel, "nobody")
    batch.elsewhere().submit(spec())
    assert batch.alive(NAME).place == REGIONS[1]
    # The one that was cancelled in the first region is out of the way.
    assert len(cloud.batch.jobs) == 1


def test_logs_of_batch_are_those_of_the_tasks(cloud, batch):
    cloud.logging.printed_by_task(f"{NAME}-of-last-week", "another")
    for job, prefix in ((spec(), ""), (sampling(), "[2] ")):
        batch.submit(job)
        cloud.logging.printed_by_task(cloud.batch.jobs[cloud.batch.full(job.name)]["uid"], "epoch 1", 2)
        assert [*batch.logs(job.name, False)] == [f"{prefix}epoch 1"]


def test_a_machine_through_its_states(cloud, vm, state):
    assert (state(), vm.alive(NAME).created) == ((State.GONE, None), "")
    (made,) = vm.render(spec())
    vm.submit(spec())
    arrived = cloud.compute.instances[ZONES[0], NAME]
    assert {key: arrived[key] for key in made} == made
    assert (vm.alive(NAME).state, vm.alive(NAME).has_machine) == (State.WAITING, False)
    cloud.compute.set_status(NAME, "RUNNING")
    status = vm.alive(NAME)
    assert (status.state, status.place, status.created[-1]) == (State.RUNNING, ZONES[0], "Z")
    assert vm.jobs() == [status]
    # Deleting itself takes it a while.
    cloud.logging.ended(NAME, 65)
    cloud.compute.set_status(NAME, "STOPPING")
    for _ in range(2):
        assert state() == (State.FAILED, Exit.BAD_DATA) and "bad data" in vm.alive(NAME).why
        cloud.compute.vanish()
    assert vm.jobs() == []


def test_earlier_machines_do_not_count(cloud, vm, state):
    vm.submit(spec())
    cloud.logging.ended(NAME, 0)
    cloud.compute.vanish()
    assert state() == (State.FINISHED, 0)
    vm.submit(spec())
    assert state() == (State.WAITING, None)
    cloud.compute.vanish()
    assert state() == (State.GONE, None)
    cloud.logging.ended(NAME, 75, event="taken")
    assert state() == (State.GONE, Cause.TAKEN_AWAY)
    # Where who submits may not write logs.
    cloud.logging.ended(NAME, 0, event="started")
    assert state() == (State.GONE, None)


def test_targets_of_a_project_share_jobs(cloud, folder):
    places = {"one": ("vm", "zones", ZONES[0]), "two": ("vm", "zones", ZONES[1])}
    places |= {"first": ("batch", "regions", REGIONS[0]), "both": ("batch", "regions", ", ".join(REGIONS))}
    line = "{}: {{backend: {}, project: my-project, {}: [{}], image: i, bucket: gs://bucket}}\n"
    (folder / "targets.yaml").write_text("".join(line.format(name, *words) for name, words in places.items()))
    made = {"celeba": target("vm"), "batched": target("batch"), "other": target("batch").elsewhere()}
    for name, one in made.items():
        one.submit(spec(name))
        assert succeeded(ddpm_here("jobs", "list")).count(f"{name} ") == 1
        assert "waiting" in succeeded(ddpm_here("jobs", "status", name, "--bucket", folder))
        succeeded(ddpm_here("jobs", "cancel", name))
    # Machines that are gone leave their jobs known.
    target("vm").submit(spec())
    cloud.logging.printed(NAME, "epoch 1")
    cloud.logging.ended(NAME, 75, event="taken")
    cloud.compute.vanish()
    lines = succeeded(ddpm_here("jobs", "logs", NAME, "--on", "one")).splitlines()
    assert lines == ["ddpm-vm: submitted", "epoch 1", "ddpm-vm: ended with code 75"]
    lines = succeeded(ddpm_here("jobs", "status", NAME, "--on", "one", "--bucket", folder)).splitlines()
    assert re.fullmatch(r"state       gone, submitted 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", lines[1])
    assert lines[2] == "message     its machine was taken away"
    # What was never there is not.
    assert "knows a job" in refused(ddpm_here("jobs", "logs", "nobody", "--on", "one"), Exit.MISSING_INPUT)


def test_leaving_machines_make_room(cloud, vm, state):
    vm.submit(spec())
    cloud.logging.ended(NAME, 70)
    cloud.compute.set_status(NAME, "TERMINATED")
    assert state() == (State.FAILED, Exit.NOT_A_NUMBER)
    assert all("its disk costs money" in one.message for one in (vm.alive(NAME), *vm.jobs()))
    vm.submit(spec())
    cloud.compute.set_status(NAME, "STOPPING")
    assert state() == (State.RUNNING, None)
    assert vm.alive(NAME).message == "its machine is being taken away"
    vm.submit(spec())
    assert state() == (State.WAITING, None)
    # Those of others stay.
    cloud.compute.instances = {(ZONES[0], NAME): {"name": NAME, "status": "RUNNING"}}
    cloud.requests.clear()
    raised(64, "already exists", vm.submit, spec())
    assert list(cloud.compute.instances) == [(ZONES[0], NAME)] and not cloud.made("DELETE")


def test_shortage_leaves_nothing(cloud, vm):
    for place, problem, error, said in [
        (ZONES[0], STOCK_OUT, NoCapacityError, "does not have enough resources"),
        # The last of several slices.
        ("-2", STOCK_OUT, NoCapacityError, "does not have enough resources"),
        (ZONES[0], QUOTA, 64, r"PREEMPTIBLE_NVIDIA_L4_GPUS.*iam-admin/quotas"),
    ]:
        cloud.compute.failures = {place: problem}
        raised(error, said, vm.submit, sampling())
        assert not cloud.compute.instances
    vm.elsewhere().submit(spec())
    assert [*cloud.compute.instances] == [(ZONES[1], NAME)]
    assert vm.alive(NAME).place == ZONES[1]


def test_slices_are_machines_and_one_job(cloud, vm):
    def told():
        status = vm.alive(SLICED)
        return status.state, status.message

    vm.submit(sampling())
    for index in range(3):
        cloud.compute.set_status(f"{SLICED}-{index}", "RUNNING")
    assert [(one.name, one.state) for one in vm.jobs()] == [(SLICED, State.RUNNING)]
    cloud.logging.printed(SLICED, "piece 4", index=2)
    assert [*vm.logs(SLICED, False)] == ["[all] ddpm-vm: submitted", "[2] piece 4"]
    cloud.logging.ended(SLICED, 0, 1, 3)
    cloud.compute.vanish(f"{SLICED}-1")
    assert told() == (State.RUNNING, "1 of 3 slices finished")
    cloud.logging.ended(SLICED, 0, 0, 3)
    cloud.compute.vanish()
    assert told() == (State.GONE, "2 of 3 slices finished; slice 2: its machine is gone")
    cloud.logging.ended(SLICED, 0, 2, 3)
    assert told()[0] is State.FINISHED
    # The slice that failed worst decides.
    for codes in [(71, 65), (65, 71), (75, 65), (137, 65)]:
        vm.submit(sampling(slices=2))
        for index, code in enumerate(codes):
            cloud.logging.ended(SLICED, code, index, 2)
        cloud.compute.vanish()
        status = vm.alive(SLICED)
        assert (status.state, status.exit_code, status.restart) == (State.FAILED, 65, Restart.NEVER)
        assert f"slice {codes.index(65)}" in status.message


def test_cancelling_deletes_the_machines(cloud, vm):
    vm.submit(spec("train-other"))
    vm.submit(sampling())
    assert vm.cancel(SLICED).startswith("was waiting and is removed")
    assert [name for _, name in cloud.compute.instances] == ["train-other"]
    # They hear of it, and say so.
    cloud.logging.ended(SLICED, 75, 1, 3, "taken")
    assert vm.alive(SLICED).state is State.CANCELLED
    raised(66, SLICED, vm.cancel, SLICED)
    # Who may not write logs may submit and cancel all the same.
    cloud.denied["entries:write"] = Refusal(403, "Permission 'logging.logEntries.create' denied")
    for word, expected in (("RUNNING", "is stopping: it saves first"), ("TERMINATED", "was gone already")):
        vm.submit(spec())
        cloud.compute.set_status(NAME, word)
        assert vm.cancel(NAME).startswith(expected)


def test_logs_are_complete(cloud, vm, monkeypatch):
    monkeypatch.setattr(google, "LOG_PAGE_ENTRIES", 20)
    cloud.logging.printed(NAME, "of a job of the same name, last week", ago_seconds=7 * 86400)
    vm.submit(spec())
    cloud.compute.set_status(NAME, "RUNNING")
    cloud.logging.printed("other", "another job")
    for number in range(50):
        cloud.logging.printed(NAME, f"line {number}\n")
    expected = ["ddpm-vm: submitted", *(f"line {number}" for number in range(50))]
    assert [*vm.logs(NAME, False)] == expected
    has_seen_all = threading.Event()

    def story():
        cloud.logging.printed(NAME, "line 50")
        assert has_seen_all.wait(20)
        printed_at = time.monotonic()
        cloud.logging.ended(NAME, 0)
        cloud.compute.vanish()
        # The last lines of a job arrive when it is known that its machine is no more, and not in order.
        asked = len(cloud.requests)
        while len(cloud.requests) == asked:
            time.sleep(0.01)
        cloud.logging.printed(NAME, "late line", ago_seconds=time.monotonic() - printed_at)

    thread, lines = threading.Thread(target=story), []
    thread.start()
    for line in vm.logs(NAME, True):
        lines.append(line)
        if line == "line 50":
            has_seen_all.set()
    thread.join()
    assert lines[:-2] == [*expected, "line 50"]
    assert sorted(lines[-2:]) == ["ddpm-vm: ended with code 0", "late line"]
