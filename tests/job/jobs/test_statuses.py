"""What a person learns of a job: the status of each answer of an engine, and of what the job wrote into its bucket.

`golden/statuses.yaml` holds both; `DDPM_TEST_REWRITE_GOLDEN=1 pytest tests/job/jobs/test_statuses.py` writes its
statuses anew. A time and a name that are the same in all of them are left out.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields

from job.coordination.outcome import Outcome, outcome_written
from job.coordination.sealed import utc_now
from job.exits import BadDataError, DiskFullError, JobError, State, StoppedError, state_after
from job.jobs.backends import Cause, JobStatus
from job.jobs.backends.batch import batch_alive
from job.jobs.backends.container import _container_status
from job.jobs.backends.kubernetes_objects import INDEX_ANNOTATION, observed
from job.jobs.backends.slurm import _tasks, _whole
from job.store import open_store
from tests.job.jobs.submitting import KINDS, assert_rows, sampling, spec, target

EARLIER, ONE_TIME, LATER = (f"2026-01-31T1{hour}:00:00Z" for hour in (1, 2, 3))
POD = {"name": "train-celeba-0-abcde"}
MADE = {"job": spec(), "group": spec(nodes=2), "slices": sampling(slices=2)}
RESTARTED = (State.FAILED, State.STOPPED, State.GONE)


def pod(code=None, said="", reason="Error", at="1", unscheduled="", node="c0", leaves="", index=None, ends=(), **state):
    """A pod whose container ended with `code`, is `waiting` or `running`, or has not come that far."""
    if code is not None:
        state = {"terminated": {"exitCode": code, "reason": reason, "message": said, "finishedAt": at}}
    status = {"containerStatuses": [{"name": "ddpm", "state": state}]} if state else {}
    if unscheduled:
        status["conditions"] = [{"type": "PodScheduled", "status": "False", "message": unscheduled}]
    own = {"deletionTimestamp": leaves.replace("now", utc_now())} if leaves else {}
    annotations = {"annotations": {INDEX_ANNOTATION: index}} if index is not None else {}
    where = {} if unscheduled else {"nodeName": node}
    containers = {"containers": [{"image": "r/ddpm:1"}]}
    return {"metadata": POD | own | annotations, "spec": where | containers, "status": status | dict(ends)}


def kubernetes(made="job", queue=False, conditions=(), pods=(), events=(), workload=None, deleted="", **status):
    """A Job or a JobSet, and what lies around it."""
    (thing,) = target("queued" if queue else "gke").render(MADE[made])
    names = ("type", "reason", "message")
    status["conditions"] = [{"status": "True", **dict(zip(names, each, strict=False))} for each in conditions]
    thing |= {"status": status}
    thing["metadata"] |= {"creationTimestamp": ONE_TIME} | ({"deletionTimestamp": deleted} if deleted else {})
    told = [{"type": kind, "reason": reason, "message": message} for kind, reason, message in events]
    others = []
    if workload is not None:
        active, *words = workload
        said = {"status": str(words[:1] == ["Evicted"]), **dict(zip(names, words, strict=False))}
        others = [{"spec": {"active": active}, "status": {"conditions": [said] if words else []}}]
    return observed(thing, [pod(**each) for each in pods], told, others)


def slurm(*tasks, name="train-celeba"):
    """Tasks of one array, each as `STATE|REASON|CODE`, beside jobs that are not ours."""
    rows = "8|PENDING|None||1796026535|somebodys|not ours\n9|RUNNING|None|n1|1796026535|interactive|(null)\n"
    for number, (word, reason, code) in enumerate(each.split("|") for each in tasks):
        rows += f"7_{number}|{word}|{reason}|n{number}|1796026535|{name}|ddpm began=1796026530 failures=2 code={code} "
        rows += "bucket=s3://a|b\n"
    found = _tasks(rows)
    assert [task[:2] for task in found] == [(7, number) for number in range(len(tasks))]
    return _whole(found)


def container(started="2026-01-31T12:00:00.123456789Z", **state):
    """A container as docker or podman were seen to show it."""
    found = {"Name": "/train-celeba", "Created": "2026-01-31T12:00:00.123456789Z", "Config": {"Labels": {}}}
    return _container_status({**found, "State": {"StartedAt": started, **state}})


def batch(*tasks, state="FAILED"):
    """A job of Batch whose tasks ended with each of their codes in turn."""
    events = []
    for codes in tasks:
        ends = [{"taskState": "FAILED" if code else "SUCCEEDED", "taskExecution": {"exitCode": code}} for code in codes]
        events.append({"status": {"state": ends[-1]["taskState"], "statusEvents": [{"taskState": "RUNNING"}, *ends]}})
    full = "projects/my-project/locations/us-central1/jobs/train-celeba"
    return batch_alive({"name": full, "createTime": ONE_TIME, "status": {"state": state, "statusEvents": []}}, events)


def engine(state="waiting", cause=None, code=None, **known):
    """Any engine."""
    said = "" if state == "running" else "why"
    status = JobStatus("train-celeba", State(state), said, code, created=ONE_TIME, **known)
    return status if cause is None else JobStatus(**vars(status) | {"cause": Cause(cause)})


ENGINES = {"kubernetes": kubernetes, "slurm": slurm, "container": container, "batch": batch, "engine": engine}


def shown(status: JobStatus) -> dict:
    """What differs from a status of which nothing is known."""
    usual = {one.name: one.default for one in fields(status)} | {"created": ONE_TIME, "name": status.name}
    told = {name: value for name, value in vars(status).items() if value != usual[name]}
    told |= {"why": status.why} if status.why != status.message else {}
    told |= {"restart": status.restart.name} if status.state in RESTARTED else {}
    return {name: str(value) if isinstance(value, str) else value for name, value in told.items()}


def test_answers_become_statuses(tmp_path):
    def told(case: dict) -> dict:
        (name,) = ENGINES.keys() & case
        status = ENGINES[name](**case[name]) if isinstance(case[name], dict) else ENGINES[name](*case[name])
        bucket = tmp_path / str(len([*tmp_path.iterdir()]))
        bucket.mkdir()
        if "wrote" in case:
            code, message = case["wrote"]
            # The first start is that of an earlier job of this name.
            said = {"exit_code": code, "message": message, "updated": LATER, "starts": (EARLIER, LATER)}
            one = Outcome(state=state_after(code), **said)
            open_store(str(bucket)).put(f"jobs/{status.name}/0-of-1.json", one.to_json())
        has_word = "wrote" in case or name in ("slurm", "engine")
        return shown(status.with_outcome(str(bucket)) if has_word else status)

    assert_rows("statuses.yaml", told)


def test_bucket_names_failed_slices(tmp_path, monkeypatch):
    def wrote(name: str, number: int, machines: int, error: JobError | None) -> None:
        monkeypatch.setenv("DDPM_JOB", name)
        with suppress(JobError), outcome_written(str(tmp_path), number, machines):
            if error:
                raise error

    for verb in {*KINDS} - {"train"}:
        # One slice that ended is no attempt of the job.
        wrote(f"{verb}-celeba-1a2b3c4d", 0, 2, StoppedError("stopped by SIGTERM"))
        assert JobStatus(f"{verb}-celeba-1a2b3c4d", State.WAITING).with_outcome(str(tmp_path)).message == "", verb
    name = "sample-walk-1a2b3c4d"
    for number, error in enumerate((None, DiskFullError("no space left on /a"), BadDataError("b is corrupt"), None)):
        wrote(name, number, 4, error)
    # Its engine knows as much, or has forgotten it.
    summary = "2 of 4 slices finished; failed slices: 1,2; slice 1: ended with code 74"
    known = JobStatus(name, State.FAILED, summary, 74).with_outcome(str(tmp_path))
    assert known.message == f"{summary}; no space left on /a"
    gone = JobStatus(name, State.GONE).with_outcome(str(tmp_path))
    assert (gone.exit_code, gone.message) == (74, "failed slices: 1,2; no space left on /a")
