"""Google's APIs on this machine: Compute Engine, Batch, Cloud Logging, and the metadata server of a VM.

Written from the services' protocol buffers and reference pages, never from our client: a body that is no message of the
proto is refused with 400, and so is an answer of ours that is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from google.protobuf import json_format

from tests.job.jobs.api import Api, Refusal

Json = dict[str, Any]
TOKEN = "token-of-the-machine"
PROJECT = "my-project"


def parsed(body: Any, message_type: str) -> Any:
    """A body as the message that it must be: unknown fields, wrong types and unknown words are refused."""
    module, _, name = message_type.rpartition(".")
    # Not before one is needed: they take seconds, and most test processes need none.
    kind = getattr(import_module(f"google.cloud.{module}"), name)
    message = kind.pb(kind())
    try:
        json_format.ParseDict(body, message)
    except json_format.ParseError as error:
        raise Refusal(400, f"Invalid JSON payload received. {error}") from error
    return message


def answered(answer: Json, message_type: str) -> Json:
    """An answer that a service could give: whoever asks reads no field that the proto does not have."""
    parsed(answer, message_type)
    return answer


def now(ago_seconds: float = 0.0) -> str:
    """A time as the services write it."""
    return (datetime.now(UTC) - timedelta(seconds=ago_seconds)).isoformat().replace("+00:00", "Z")


class Compute:
    """Instances and operations; everything that takes time is done when an operation has been asked for once."""

    def __init__(self) -> None:
        self.instances: dict[tuple[str, str], Json] = {}
        """By zone and name."""
        self.failures: dict[str, tuple[str, str]] = {}
        """By the end of a machine's zone or name: code and message of the error with which making it ends."""
        self._operations: dict[str, tuple[Json, Callable[[], object]]] = {}

    def set_status(self, name: str, status: str) -> None:
        for (_, other), instance in self.instances.items():
            if other == name:
                instance["status"] = status

    def vanish(self, *names: str) -> None:
        """Machines are no more."""
        for key in [key for key in self.instances if key[1] in names or not names]:
            del self.instances[key]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Json | None:
        if path == f"/compute/v1/projects/{PROJECT}/aggregated/instances":
            return answered(self._aggregated(query["filter"]), "compute_v1.InstanceAggregatedList")
        match = re.fullmatch(rf"/compute/v1/projects/{PROJECT}/zones/([^/]+)/(instances|operations)/?(.*)", path)
        if not match:
            return None
        zone, kind, name = match.groups()
        if kind == "operations":
            finished, change = self._operations[name]
            change()
            return answered(finished, "compute_v1.Operation")
        if method == "POST":
            return self._insert(zone, json_format.MessageToDict(parsed(body, "compute_v1.Instance")))
        if (zone, name) not in self.instances:
            raise Refusal(404, f"The resource '{path}' was not found", "notFound")
        self.set_status(name, "STOPPING")
        return self._begin(zone, name, lambda: self.vanish(name))

    def _insert(self, zone: str, instance: Json) -> Json:
        name = instance["name"]
        if (zone, name) in self.instances:
            raise Refusal(409, f"The resource '{name}' already exists", "alreadyExists")
        for end, (code, message) in self.failures.items():
            if zone.endswith(end) or name.endswith(end):
                failed = {"error": {"errors": [{"code": code, "message": message}]}, "httpErrorStatusCode": 503}
                return self._begin(zone, name, lambda: None, **failed)
        instance |= {"status": "PROVISIONING", "creationTimestamp": now(), "zone": f"projects/{PROJECT}/zones/{zone}"}
        self.instances[zone, name] = instance
        return self._begin(zone, name, lambda: instance.update(status="STAGING"))

    def _begin(self, zone: str, machine: str, change: Callable[[], object], **end: Any) -> Json:
        name, place = f"operation-{len(self._operations)}", f"projects/{PROJECT}/zones/{zone}"
        operation = {"name": name, "zone": place, "targetLink": f"{place}/instances/{machine}"}
        self._operations[name] = {**operation, "status": "DONE", **end}, change
        return answered({**operation, "status": "RUNNING"}, "compute_v1.Operation")

    def _aggregated(self, filter_: str) -> Json:
        match = re.fullmatch(r"labels\.ddpm-job(?:=([a-z0-9-]+)|:\*)", filter_)
        assert match, filter_
        zones: Json = {"zones/asia-east1-a": {"warning": {"code": "NO_RESULTS_ON_PAGE"}}}
        for (zone, _), instance in self.instances.items():
            if (job := instance.get("labels", {}).get("ddpm-job")) and match[1] in (None, job):
                zones.setdefault(f"zones/{zone}", {"instances": []})["instances"].append(instance)
        return {"items": zones}


_JOB = re.compile(r"/v1/(projects/[^/]+/locations/[^/]+/jobs)(/[^/:]+)?(/taskGroups/group0/tasks|:cancel)?")


class Batch:
    """Jobs by full name, and their tasks; they stay as they are until a test moves them on."""

    def __init__(self) -> None:
        self.jobs: dict[str, Json] = {}
        self.tasks: dict[str, list[Json]] = {}

    def full(self, name: str) -> str:
        """The first job of that short name."""
        return next(full for full in self.jobs if full.endswith(f"/jobs/{name}"))

    def move(self, state: str, event: str = "", name: str = "train-celeba") -> None:
        """Has a job in a state, with a word about it."""
        status = self.jobs[self.full(name)]["status"]
        status["state"] = state
        status["statusEvents"].append({"description": event or f"Job state is set to {state}"})

    def end_task(self, *codes: int, name: str = "train-celeba") -> None:
        """Has the task of a job run, and end with each of the codes in turn."""
        task = {"status": {"state": "PENDING", "statusEvents": []}}
        status = self.tasks.setdefault(self.full(name), [task])[0]["status"]
        for code in codes:
            status["state"] = "FAILED" if code else "SUCCEEDED"
            ended = {"taskState": status["state"], "taskExecution": {"exitCode": code} if code else {}}
            status["statusEvents"] += [{"taskState": "RUNNING"}, ended]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Json | None:
        if not (match := _JOB.fullmatch(path)):
            return None
        parent, name, part = match.groups()
        if name is None and method == "POST":
            return self._create(f"{parent}/{query['jobId']}", parsed(body, "batch_v1.Job"))
        if name is None:
            found = [job for full, job in self.jobs.items() if full.startswith(f"{parent}/")]
            return answered({"jobs": found}, "batch_v1.ListJobsResponse")
        full = parent + name
        if full not in self.jobs:
            raise Refusal(404, f"Resource '{full}' was not found")
        if part == ":cancel":
            self.move("CANCELLED", name=name[1:])
        elif part:
            return answered({"tasks": self.tasks.get(full, [])}, "batch_v1.ListTasksResponse")
        elif method == "DELETE":
            return self.jobs.pop(full) and {}
        return answered(self.jobs[full], "batch_v1.Job")

    def _create(self, full: str, job: Any) -> Json:
        uid, status = f"{full.rpartition('/')[2]}-{now()}", {"state": "QUEUED", "statusEvents": []}
        own = {"name": full, "uid": uid, "createTime": now(), "status": status}
        self.jobs[full] = json_format.MessageToDict(job) | own
        return self.jobs[full]


class Logging:
    """All entries, in the order in which they came."""

    def __init__(self) -> None:
        self.entries: list[Json] = []

    def write(self, **entry: Any) -> None:
        """An entry as the API would hold it; what is missing is filled in."""
        entry = {"timestamp": now(), "insertId": f"entry-{len(self.entries)}", "resource": {"type": "global"}} | entry
        self.entries.append(answered(entry, "logging_v2.types.LogEntry"))

    def printed(self, name: str, text: str, index: int = 0, ago_seconds: float = 0.0) -> None:
        """A line of a container, as docker's own driver for Cloud Logging writes it."""
        container = {"name": "/ddpm-job", "metadata": {"ddpm-job": name, "ddpm-slice": str(index)}}
        log, payload = f"projects/{PROJECT}/logs/gcplogs-docker-driver", {"container": container, "message": text}
        self.write(logName=log, timestamp=now(ago_seconds), jsonPayload=payload)

    def printed_by_task(self, uid: str, text: str, index: int = 0) -> None:
        """A line of a task of Batch."""
        labels = {"job_uid": uid, "task_id": f"task/{uid}-group0-{index}/0/0", "task_group_name": "group0"}
        self.write(logName=f"projects/{PROJECT}/logs/batch_task_logs", textPayload=f"{text}\n", labels=labels)

    def ended(self, name: str, code: int, index: int = 0, slices: int = 0, event: str = "ended") -> None:
        """The last word of a machine, as `vm_start.sh` writes it."""
        labels = {"ddpm-job": name, "ddpm-slice": str(index), "ddpm-slices": str(slices)}
        said = {"message": f"ddpm-vm: ended with code {code}", "event": event, "code": code}
        self.write(logName=f"projects/{PROJECT}/logs/ddpm-jobs", labels=labels, jsonPayload=said)

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Json | None:
        if path == "/v2/entries:write":
            common = json_format.MessageToDict(parsed(body, "logging_v2.types.WriteLogEntriesRequest"))
            for entry in common.pop("entries"):
                self.write(**{**common, **entry})
            return {}
        if path != "/v2/entries:list":
            return None
        asked = json_format.MessageToDict(parsed(body, "logging_v2.types.ListLogEntriesRequest"))
        assert asked["resourceNames"] == [f"projects/{PROJECT}"]
        found = [entry for entry in self.entries if _matches(entry, asked["filter"])]
        assert asked["orderBy"] == "timestamp asc"
        found.sort(key=lambda entry: datetime.fromisoformat(entry["timestamp"]))
        start, end = (int(asked.get("pageToken", 0)) + size for size in (0, asked["pageSize"]))
        more = {"nextPageToken": str(end)} if end < len(found) else {}
        return answered({"entries": found[start:end], **more}, "logging_v2.types.ListLogEntriesResponse")


def _matches(entry: Json, filter_: str) -> bool:
    """Whether a filter takes an entry (cloud.google.com/logging/docs/view/logging-query-language)."""

    def judged(match: re.Match[str]) -> str:
        path, operator, wanted = match.groups()
        found: Any = entry
        for key in re.findall(r"[\w-]+", path):
            found = found.get(key) if isinstance(found, dict) else None
        is_later = operator == ">=" and datetime.fromisoformat(found) >= datetime.fromisoformat(wanted)
        return str(is_later or found == wanted)

    # AND binds closer than OR, as in Python; what is left over is no Python.
    expression = re.sub(r'([\w."-]+?)(>?=)"([^"]*)"', judged, filter_)
    return bool(eval(expression.replace("AND", "and").replace("OR", "or")))


class GoogleServer(Api):
    """The services, and ways to have them answer with errors."""

    def __init__(self) -> None:
        super().__init__()
        self.compute, self.batch, self.logging = Compute(), Batch(), Logging()
        self.accounts = {f"ddpm-job@{PROJECT}.iam.gserviceaccount.com"}
        self.metadata = {
            "project/project-id": PROJECT,
            "instance/name": "train-celeba",
            "instance/zone": f"projects/{PROJECT}/zones/us-central1-a",
            "instance/service-accounts/default/token": json.dumps({"access_token": TOKEN, "expires_in": 3599}),
        }
        """What a VM asks about itself."""
        self.denied: dict[str, Refusal] = {}
        """What requests are answered with whose method and path match the pattern."""
        self.lost_answers = 0
        """How many creations are met, and answered with an error."""
        self._by_request: dict[str, Any] = {}

    def made(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [text for text in self.requests if re.search(pattern, text)]

    def answer(self, method: str, target: str, body: Any, headers: Any) -> Any:
        url = urlsplit(target)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        if path.startswith("/computeMetadata/v1/"):
            assert headers["Metadata-Flavor"] == "Google"
            return self.metadata[path.removeprefix("/computeMetadata/v1/")]
        self.note(method, url.path)
        for pattern, refusal in self.denied.items():
            if re.search(pattern, self.requests[-1]):
                raise refusal
        # Only a machine has a token here; the clients come without credentials, as to any server in plain http.
        assert headers.get("Authorization") in (None, f"Bearer {TOKEN}")
        request = query.get("requestId", "")
        if request not in self._by_request:
            found = self._found(method, path, query, body)
            if not request:
                return found
            self._by_request[request] = found
            if self.lost_answers:
                self.lost_answers -= 1
                raise Refusal(502, "The server encountered a temporary error")
        return self._by_request[request]

    def _found(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        if path.startswith("/v1/projects/-/serviceAccounts/") and (email := path.rpartition("/")[2]) in self.accounts:
            return {"email": email}
        for service in (self.compute, self.batch, self.logging):
            if (found := service.answer(method, path, query, body)) is not None:
                return found
        raise Refusal(404, f"{method} {path} is not there")
