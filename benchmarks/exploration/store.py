"""A bucket in memory, whose every request is a point where the schedule may interfere.

It keeps the contract of `job.store.base`: each request changes one object, at one moment, or nothing. Reads and
listings show all that took effect before.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from benchmarks.exploration.world import Process, Request, World
from job.store.base import Entry, ObjectMissingError, Store
from job.store.retry import Retry

AWAY_SECONDS = 120.0
"""How long a bucket may be away from a run here; 900 s are the default."""


class SimulatedStore(Store):
    """The bucket of a world, as one of its processes sees it."""

    def __init__(self, world: World, process: Process) -> None:
        super().__init__("sim://bucket", Retry(AWAY_SECONDS, process.stop))
        self._world, self._process = world, process

    def _ask(self, op: str, key: str, effect: Callable[[], Any], data: bytes = b"") -> Any:
        thread = self._world.current
        name = thread.name if thread else ""
        return self._world.request(Request(self._process, name, op, key, data), effect)

    def _found(self, key: str) -> tuple[bytes, str]:
        try:
            return self._world.objects[key]
        except KeyError:
            raise ObjectMissingError(f"no object at {key}") from None

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        whole = f"{self._prefix}{key}"
        data, version = self._ask("fetch", whole, lambda: self._found(whole))
        consume(data)
        return version

    def _open(self, key: str) -> BinaryIO:
        whole = f"{self._prefix}{key}"
        return io.BytesIO(self._ask("open", whole, lambda: self._found(whole))[0])

    def _write(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        whole, data, objects = f"{self._prefix}{key}", content.read(), self._world.objects

        def write() -> str | None:
            version = objects[whole][1] if whole in objects else ""
            if over is not None and over != version:
                return None
            new = hashlib.sha256(data).hexdigest() if self._world.content_versions else str(self._world.next_number())
            objects[whole] = data, new
            return new

        op = "put" if over is None else "replace" if over else "create"
        return self._ask(op, whole, write, data)

    def _list(self, prefix: str) -> Sequence[Entry]:
        whole, cut = f"{self._prefix}{prefix}", len(self._prefix)

        def found() -> list[Entry]:
            objects = self._world.objects
            return [Entry(key[cut:], len(objects[key][0])) for key in objects if key.startswith(whole)]

        return self._ask("list", whole, found)

    def _folders(self, prefix: str) -> Sequence[str]:
        whole = f"{self._prefix}{prefix}"

        def found() -> list[str]:
            rests = (key.removeprefix(whole) for key in self._world.objects if key.startswith(whole))
            return list({rest.partition("/")[0] for rest in rests if "/" in rest})

        return self._ask("folders", whole, found)

    def _delete(self, key: str) -> None:
        whole = f"{self._prefix}{key}"
        self._ask("delete", whole, lambda: self._world.objects.pop(whole, True))
