"""Google Batch: jobs and their tasks (cloud.google.com/batch/docs/reference/rest/v1)."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from google.cloud import batch_v1

from tests.job.jobs.google_services import Refusal, answered, as_json, parsed

_LOCATION = r"projects/([^/]+)/locations/[^/]+"
_OVER = ("SUCCEEDED", "FAILED", "CANCELLED")


class BatchService:
    """What it knows. Jobs stay as they are until a test moves them on."""

    def __init__(self, project: str) -> None:
        self.project = project
        self.jobs: dict[str, dict[str, Any]] = {}
        """By full name."""
        self.tasks: dict[str, list[dict[str, Any]]] = {}
        self._by_request: dict[str, dict[str, Any]] = {}

    def move(self, name: str, state: str, event: str = "") -> None:
        """Has the job of that short name in a state, with a word about it."""
        for full, job in self.jobs.items():
            if full.endswith(f"/jobs/{name}"):
                job["status"]["state"] = state
                job["status"]["statusEvents"].append({"description": event or f"Job state is set to {state}"})

    def end_task(self, name: str, code: int, index: int = 0) -> None:
        """Has a task of the job run, and end with a code."""
        full = next(full for full in self.jobs if full.endswith(f"/jobs/{name}"))
        tasks = self.tasks.setdefault(full, [])
        while len(tasks) <= index:
            tasks.append(
                {
                    "name": f"{full}/taskGroups/group0/tasks/{len(tasks)}",
                    "status": {"state": "PENDING", "statusEvents": []},
                }
            )
        status = tasks[index]["status"]
        word = "SUCCEEDED" if code == 0 else "FAILED"
        status["statusEvents"].append({"description": "Task state is set to RUNNING", "taskState": "RUNNING"})
        event: dict[str, Any] = {"description": f"Task state is set to {word}", "taskState": word}
        if code:
            event["taskExecution"] = {"exitCode": code}
        status["statusEvents"].append(event)
        status["state"] = word

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        match = re.fullmatch(rf"/v1/({_LOCATION}/jobs)(?:/([^/:]+))?(?:/taskGroups/([^/]+)/tasks)?(:cancel)?", path)
        if not match:
            return None
        parent, project, name, group, cancel = match.groups()
        if project != self.project:
            raise Refusal(403, f"Permission 'batch.jobs.get' denied on resource 'projects/{project}'")
        if name is None:
            if method == "POST":
                return self._create(parent, query, body)
            found = [job for full, job in self.jobs.items() if full.startswith(f"{parent}/")]
            return answered({"jobs": found}, batch_v1.ListJobsResponse)
        full = f"{parent}/{name}"
        if full not in self.jobs:
            raise Refusal(404, f"Resource '{full}' was not found")
        job = self.jobs[full]
        if group:
            return answered({"tasks": self.tasks.get(full, [])}, batch_v1.ListTasksResponse)
        if cancel:
            if job["status"]["state"] in _OVER:
                raise Refusal(400, f"Job {name} is in a terminal state and cannot be cancelled")
            self.move(name, "CANCELLED")
            return {"name": f"{parent}/operations/cancel-{name}", "done": True}
        if method == "DELETE":
            del self.jobs[full]
            return {"name": f"{parent}/operations/delete-{name}", "done": True}
        return answered(job, batch_v1.Job)

    def _create(self, parent: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        if query.get("requestId") in self._by_request:
            return self._by_request[query["requestId"]]
        job = as_json(parsed(body, batch_v1.Job))
        name = query.get("jobId", "")
        full = f"{parent}/{name}"
        if full in self.jobs:
            raise Refusal(409, f"Resource '{full}' already exists")
        job |= {
            "name": full,
            "uid": f"{name}-{len(self._by_request)}",
            "createTime": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "status": {"state": "QUEUED", "statusEvents": []},
        }
        self.jobs[full] = job
        if "requestId" in query:
            self._by_request[query["requestId"]] = job
        return job
