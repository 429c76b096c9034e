"""Compute Engine's metadata server, on this machine: values to wait for, and days on which it is not well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import parse_qs, urlsplit

from tests.job.answering import JsonHandler, serving

PREEMPTED = "instance/preempted"
_PATH = "/computeMetadata/v1/"

Answer = Callable[[JsonHandler], None]


class MetadataServer:
    """What the server knows; `host` is for `GCE_METADATA_HOST`.

    A request with `wait_for_change` is answered when the value's ETag is another one than `last_etag`, or after
    `timeout_sec` (cloud.google.com/compute/docs/metadata/querying-metadata).
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.requests: list[str] = []
        self.odd: Answer | None = None
        """What answers instead, while it is set."""
        self._values = {PREEMPTED: ("FALSE", 0)}
        self._changed = threading.Condition()

    def set(self, resource: str, value: str) -> None:
        """Changes a value, and answers those that wait for it."""
        with self._changed:
            self._values[resource] = value, self._values[resource][1] + 1
            self._changed.notify_all()

    def asked(self, resource: str) -> int:
        """How often somebody has asked for a value."""
        return sum(resource in path for path in self.requests)

    def _wait(self, resource: str, last_etag: str, seconds: float) -> tuple[str, str]:
        with self._changed:
            self._changed.wait_for(lambda: self._etag(resource) != last_etag, seconds)
            return self._values[resource][0], self._etag(resource)

    def _etag(self, resource: str) -> str:
        return f"etag-of-{resource}-{self._values[resource][1]}"

    def answer(self, request: JsonHandler) -> None:
        self.requests.append(request.path)
        if self.odd is not None:
            self.odd(request)
            return
        url = urlsplit(request.path)
        query, resource = parse_qs(url.query), url.path.removeprefix(_PATH)
        if request.headers.get("Metadata-Flavor") != "Google" or resource not in self._values:
            request.send_error(403 if resource in self._values else 404)
            return
        seconds = float(query["timeout_sec"][0]) if query.get("wait_for_change") == ["true"] else 0.0
        value, etag = self._wait(resource, query.get("last_etag", [""])[0], seconds)
        # Who asked may be gone by now.
        with suppress(OSError):
            request.say(200, value, ETag=etag)


@contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """A server that answers while the context lasts."""

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            known.answer(self)

    with serving(Handler) as url:
        known = MetadataServer(url.removeprefix("http://"))
        yield known
