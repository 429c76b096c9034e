"""Cloud Logging: entries, and the part of its query language that is about fields (cloud.google.com/logging/docs)."""

from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from google.cloud.logging_v2.types import (
    ListLogEntriesRequest,
    ListLogEntriesResponse,
    LogEntry,
    WriteLogEntriesRequest,
)

from tests.job.jobs.google_services import Refusal, answered, as_json, parsed

_COMPARISON = re.compile(r'([A-Za-z_][\w.-]*(?:\."[^"]*")?(?:\.[\w-]+)*)\s*(>=|<=|=|>|<)\s*"((?:[^"\\]|\\.)*)"')


class LoggingService:
    """All entries, in the order in which they came."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._numbers = itertools.count(1)

    def write(self, **entry: Any) -> None:
        """An entry as the API would hold it; what is missing is filled in."""
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        entry = {"timestamp": now, "insertId": f"entry-{next(self._numbers)}", "resource": {"type": "global"}} | entry
        parsed(entry, LogEntry)
        self.entries.append(entry)

    def printed(self, name: str, text: str, index: int = 0, ago_seconds: float = 0.0) -> None:
        """A line of a container, as docker's own driver for Cloud Logging writes it."""
        at = datetime.now(UTC) - timedelta(seconds=ago_seconds)
        self.write(
            logName="projects/my-project/logs/gcplogs-docker-driver",
            timestamp=at.isoformat().replace("+00:00", "Z"),
            resource={"type": "gce_instance", "labels": {"zone": "us-central1-a"}},
            jsonPayload={
                "container": {"name": "/ddpm-job", "metadata": {"ddpm-job": name, "ddpm-slice": str(index)}},
                "instance": {"name": name},
                "message": text,
            },
        )

    def printed_by_task(self, uid: str, text: str, index: int = 0) -> None:
        """A line of a task of Batch."""
        labels = {"job_uid": uid, "task_id": f"task/{uid}-group0-{index}/0/0", "task_group_name": "group0"}
        self.write(logName="projects/my-project/logs/batch_task_logs", textPayload=f"{text}\n", labels=labels)

    def told(self, name: str) -> list[dict[str, Any]]:
        """What machines of a job said about themselves, and others about it."""
        own = [entry for entry in self.entries if entry["logName"].endswith("/ddpm-jobs")]
        return [entry["jsonPayload"] for entry in own if entry["labels"]["ddpm-job"] == name]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        if (method, path) == ("POST", "/v2/entries:write"):
            message = parsed(body, WriteLogEntriesRequest)
            common = as_json(message)
            for entry in common.get("entries", []):
                base = {key: common[key] for key in ("logName", "resource") if key in common}
                labels = {**common.get("labels", {}), **entry.get("labels", {})}
                self.write(**{**base, **entry, "labels": labels})
            return {}
        if (method, path) == ("POST", "/v2/entries:list"):
            asked = as_json(parsed(body, ListLogEntriesRequest))
            return self._list(asked)
        return None

    def _list(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked.get("resourceNames") != ["projects/my-project"]:
            raise Refusal(403, "Permission 'logging.logEntries.list' denied on resource")
        matches = _filter(asked.get("filter", ""))
        found = [entry for entry in self.entries if matches(entry)]
        found.sort(key=lambda entry: _time(entry["timestamp"]), reverse=asked.get("orderBy") == "timestamp desc")
        size, start = asked.get("pageSize", 50), int(asked.get("pageToken") or 0)
        page = found[start : start + size]
        more = {"nextPageToken": str(start + size)} if start + size < len(found) else {}
        return answered({"entries": page, **more}, ListLogEntriesResponse)


def _filter(text: str) -> Any:
    """A function that says whether an entry matches; AND binds closer than OR, as in Python."""
    if re.sub(r"AND|OR|[\s()]", "", _COMPARISON.sub("", text)):
        raise Refusal(400, f"Unparseable filter: syntax error in {text!r}")

    def matches(entry: dict[str, Any]) -> bool:
        def judged(match: re.Match[str]) -> str:
            field, operator, value = match.groups()
            return str(_compare(_field(entry, field), operator, re.sub(r"\\(.)", r"\1", value), field))

        expression = _COMPARISON.sub(judged, text).replace("AND", "and").replace("OR", "or")
        return bool(eval(expression or "True"))

    return matches


def _field(entry: dict[str, Any], path: str) -> Any:
    found: Any = entry
    for quoted, plain in re.findall(r'"([^"]*)"|([\w-]+)', path):
        found = found.get(quoted or plain) if isinstance(found, dict) else None
    return found


def _compare(found: Any, operator: str, wanted: str, field: str) -> bool:
    if operator == ">=" and field == "timestamp":
        return _time(found) >= _time(wanted)
    assert operator == "=", f"{field} {operator}: not known here"
    return str(found) == wanted


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
