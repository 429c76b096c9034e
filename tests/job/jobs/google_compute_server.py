"""Compute Engine: instances and operations (cloud.google.com/compute/docs/reference/rest/v1)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from google.cloud import compute_v1

from tests.job.jobs.google_services import Refusal, answered, as_json, parsed


class ComputeService:
    """What it knows; everything that takes time is done when an operation has been asked for once."""

    def __init__(self, project: str) -> None:
        self.project = project
        self.instances: dict[tuple[str, str], dict[str, Any]] = {}
        self.failing_zones: dict[str, tuple[str, str]] = {}
        """Code and message of the error with which making a machine there ends."""
        self.quotas = {"PREEMPTIBLE_NVIDIA_L4_GPUS": 4.0, "NVIDIA_L4_GPUS": 0.0}
        self.gpus_everywhere = 4.0
        self._operations: dict[str, tuple[dict[str, Any], Callable[[], None]]] = {}
        self._by_request: dict[str, dict[str, Any]] = {}
        self._numbers = itertools.count(1)

    def set_status(self, name: str, status: str) -> None:
        for (_, other), instance in self.instances.items():
            if other == name:
                instance["status"] = status

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        if region := re.fullmatch(r"/compute/v1/projects/[^/]+/regions/([^/]+)", path):
            quotas = [{"metric": metric, "limit": limit, "usage": 1.0} for metric, limit in self.quotas.items()]
            return answered({"name": region[1], "quotas": quotas}, compute_v1.Region)
        if re.fullmatch(r"/compute/v1/projects/[^/]+", path):
            quotas = [{"metric": "GPUS_ALL_REGIONS", "limit": self.gpus_everywhere, "usage": 1.0}]
            return answered({"quotas": quotas}, compute_v1.Project)
        match = re.fullmatch(
            r"/compute/v1/projects/([^/]+)/(?:zones/([^/]+)|aggregated)/(instances|operations)(.*)", path
        )
        if not match:
            return None
        project, zone, kind, rest = match.groups()
        if project != self.project:
            raise Refusal(404, f"The resource 'projects/{project}' was not found", "notFound")
        if zone is None:
            return answered(self._aggregated(query), compute_v1.InstanceAggregatedList)
        name = rest.removeprefix("/")
        if kind == "operations":
            return answered(self._operation(name), compute_v1.Operation)
        if method == "POST" and not name:
            return answered(self._insert(zone, body, query), compute_v1.Operation)
        if (zone, name) not in self.instances:
            raise Refusal(
                404, f"The resource 'projects/{project}/zones/{zone}/instances/{name}' was not found", "notFound"
            )
        return answered(self._delete(zone, name), compute_v1.Operation) if method == "DELETE" else None

    def _link(self, zone: str) -> str:
        return f"https://www.googleapis.com/compute/v1/projects/{self.project}/zones/{zone}"

    def _insert(self, zone: str, body: Any, query: dict[str, str]) -> dict[str, Any]:
        if query.get("requestId") in self._by_request:
            return self._by_request[query["requestId"]]
        instance = as_json(parsed(body, compute_v1.Instance))
        name = instance["name"]
        if (zone, name) in self.instances:
            where = f"projects/{self.project}/zones/{zone}/instances/{name}"
            raise Refusal(409, f"The resource '{where}' already exists", "alreadyExists")
        instance |= {
            "status": "PROVISIONING",
            "creationTimestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "zone": self._link(zone),
        }
        problem = self.failing_zones.get(zone)

        def done() -> None:
            if problem is None:
                instance["status"] = "STAGING"

        if problem is None:
            self.instances[zone, name] = instance
        operation = self._begin("insert", zone, name, done, problem)
        if "requestId" in query:
            self._by_request[query["requestId"]] = operation
        return operation

    def _delete(self, zone: str, name: str) -> dict[str, Any]:
        self.instances[zone, name]["status"] = "STOPPING"
        return self._begin("delete", zone, name, lambda: self.instances.pop((zone, name), None) and None, None)

    def _begin(
        self, kind: str, zone: str, machine: str, done: Callable[[], None], problem: tuple[str, str] | None
    ) -> dict[str, Any]:
        name, place = f"operation-{next(self._numbers)}", self._link(zone)
        operation = {"name": name, "operationType": kind, "status": "RUNNING", "zone": place}
        operation["targetLink"] = f"{place}/instances/{machine}"
        finished = {**operation, "status": "DONE"}
        if problem is not None:
            finished["error"] = {"errors": [{"code": problem[0], "message": problem[1]}]}
            finished |= {"httpErrorStatusCode": 503, "httpErrorMessage": "SERVICE UNAVAILABLE"}
        self._operations[name] = finished, done
        return operation

    def _operation(self, name: str) -> dict[str, Any]:
        if name not in self._operations:
            raise Refusal(404, f"operation {name} was not found", "notFound")
        finished, done = self._operations[name]
        done()
        return finished

    def _aggregated(self, query: dict[str, str]) -> dict[str, Any]:
        wanted = re.fullmatch(r"labels\.([a-z_-]+)(?:=([a-z0-9_-]+)|:\*)", query.get("filter", "labels.app:*"))
        if wanted is None:
            raise Refusal(400, f"Invalid value for field 'filter': '{query['filter']}'", "invalid")
        zones: dict[str, dict[str, Any]] = {"zones/asia-east1-a": {"warning": {"code": "NO_RESULTS_ON_PAGE"}}}
        for (zone, _), instance in self.instances.items():
            value = instance.get("labels", {}).get(wanted[1])
            if value is not None and wanted[2] in (None, value):
                zones.setdefault(f"zones/{zone}", {"instances": []})["instances"].append(instance)
        return {"items": zones}
