"""Compute Engine's metadata server, on this machine: its notice of a preemption, and days on which it is not well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import parse_qs, urlsplit

from tests.job.answering import JsonHandler, serving

_PREEMPTED = "/computeMetadata/v1/instance/preempted"

Answer = Callable[[JsonHandler], None]


class MetadataServer:
    """The server's value `instance/preempted`; `host` is for `GCE_METADATA_HOST`.

    A request with `wait_for_change` is answered when the value's ETag is another one than `last_etag`, or after
    `timeout_sec` (cloud.google.com/compute/docs/metadata/querying-metadata).
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.requests: list[str] = []
        self.odd: Answer | None = None
        """What answers instead, while it is set."""
        self._preempted = threading.Event()

    def preempt(self) -> None:
        """Answers requests that wait for it, and later ones."""
        self._preempted.set()

    def answer(self, request: JsonHandler) -> None:
        self.requests.append(request.path)
        if self.odd is not None:
            self.odd(request)
            return
        url = urlsplit(request.path)
        query = parse_qs(url.query)
        if request.headers.get("Metadata-Flavor") != "Google" or url.path != _PREEMPTED:
            request.send_error(403 if url.path == _PREEMPTED else 404)
            return
        if query.get("wait_for_change") == ["true"] and query["last_etag"] == ["etag-False"]:
            self._preempted.wait(float(query["timeout_sec"][0]))
        is_preempted = self._preempted.is_set()
        # Who asked may be gone by now.
        with suppress(OSError):
            request.say(200, str(is_preempted).upper(), ETag=f"etag-{is_preempted}")


@contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """A server that answers while the context lasts."""

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            known.answer(self)

    with serving(Handler) as url:
        known = MetadataServer(url.removeprefix("http://"))
        yield known
