"""Cloud Logging: entries, and the part of its query language that is about fields (cloud.google.com/logging/docs)."""

from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from google.cloud.logging_v2.types import ListLogEntriesRequest, LogEntry, WriteLogEntriesRequest

from tests.job.jobs.google_services import Refusal, as_json, parsed

_TOKEN = re.compile(
    r'\s*(?:(AND|OR)\b|([()])|([A-Za-z_][\w.-]*(?:\."[^"]*")?(?:\.[\w-]+)*)\s*(>=|<=|=|>|<)\s*"((?:[^"\\]|\\.)*)")'
)


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
        return {"entries": page, **({"nextPageToken": str(start + size)} if start + size < len(found) else {})}


def _filter(text: str) -> Any:
    """A function that says whether an entry matches; AND binds closer than OR."""
    tokens, position = [], 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if not match:
            raise Refusal(400, f"Unparseable filter: syntax error at {text[position : position + 40]!r}")
        tokens.append(match.groups())
        position = match.end()

    def either() -> Any:
        parts = [both()]
        while tokens and tokens[0][0] == "OR":
            tokens.pop(0)
            parts.append(both())
        return lambda entry: any(part(entry) for part in parts)

    def both() -> Any:
        parts = [one()]
        while tokens and tokens[0][0] == "AND":
            tokens.pop(0)
            parts.append(one())
        return lambda entry: all(part(entry) for part in parts)

    def one() -> Any:
        if not tokens:
            raise Refusal(400, "Unparseable filter: it ends too soon")
        _, bracket, field, operator, value = tokens.pop(0)
        if bracket == "(":
            inner = either()
            if not tokens or tokens.pop(0)[1] != ")":
                raise Refusal(400, "Unparseable filter: a bracket is missing")
            return inner
        wanted = re.sub(r"\\(.)", r"\1", value)
        return lambda entry: _compare(_field(entry, field), operator, wanted, field)

    found = either() if tokens else lambda entry: True
    if tokens:
        raise Refusal(400, "Unparseable filter: something is left over")
    return found


def _field(entry: dict[str, Any], path: str) -> Any:
    found: Any = entry
    for quoted, plain in re.findall(r'"([^"]*)"|([\w-]+)', path):
        found = found.get(quoted or plain) if isinstance(found, dict) else None
    return found


def _compare(found: Any, operator: str, wanted: str, field: str) -> bool:
    if found is None:
        return False
    if operator == "=":
        return str(found) == wanted
    assert field == "timestamp", f"{field} has no order"
    a, b = _time(found), _time(wanted)
    return {">=": a >= b, "<=": a <= b, ">": a > b, "<": a < b}[operator]


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
