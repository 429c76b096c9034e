"""The code inside the processes of a campaign: the trace of their work, and the fault that ends them.

The product's code stays unchanged: hooks change modules after their import, in these processes alone. The trace is a
file of JSON lines, each written with one call, so that it holds everything up to the kill.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

from benchmarks.crash_campaign import sabotage

VARIABLE = "DDPM_CRASH_CAMPAIGN"
"""JSON: `trace` (a path), `fault` (the fields of a `Point`, or null), `sabotage` (a name, or empty)."""
OPERATIONS = ("read", "create", "replace", "put", "move", "download", "open", "delete", "exists")
SHARD_IMAGES = 26
RENEW_SECONDS, EXPIRE_SECONDS = 1.0, 12.0
"""Shorter than the product's, so that a small run renews its lease and a zombie is replaced within seconds."""

_STORES = {
    "job.store.local": ("LocalStore",),
    "job.store.gcs": ("GcsStore",),
    "job.store.objects": ("S3Store", "AzureStore"),
}
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


class Trace:
    """The trace of this process. Lines of several processes never mix: each is one write in append mode."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.fence = 0
        self.rank = int(os.environ.get("RANK", "0"))

    def __call__(self, event: str, **fields: Any) -> None:
        """Writes a line."""
        line = {"event": event, "time": time.time(), "rank": self.rank, "fence": self.fence, **fields}
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())


class _Gate:
    """Delays the stop of a process until no other thread is inside an operation, where it could hold a shared lock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._inside == 1)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


class Fault:
    """The point at which this process, its group or its launcher gets a signal; see `Point` for the fields."""

    def __init__(self, trace: Trace, fields: dict[str, Any]) -> None:
        self._trace, self._fields = trace, fields
        self._lock, self._count, self._struck = threading.Lock(), 0, False
        self._armed = not fields["since"]
        self._gate = _Gate()

    def around(self, op: str, uri: str, data: bytes, work: Callable[[], Any]) -> Any:
        """Runs `work`, with the fault before or after it."""
        with self._gate.inside():
            if self._struck or not self._matches(op, uri, data):
                result = work()
                self._armed = self._armed or bool(re.search(self._fields["since"], f"{op} {uri}"))
                return result
            if self._fields["hold"]:
                return self._held(work)
            # One at a time, so that after the k-th upload exactly k objects exist.
            with self._lock:
                self._count += 1
                due = self._count == self._fields["nth"]
                if due and self._fields["when"] == "before":
                    self._strike(op, uri)
                result = work()
                if due and self._fields["when"] == "after":
                    self._strike(op, uri)
                return result

    def _held(self, work: Callable[[], Any]) -> Any:
        with self._lock:
            self._count += 1
            if self._count == self._fields["nth"]:
                self._strike("held", "")
        # SIGKILL takes effect after a moment, in which this thread must not go on.
        while not self._struck or self._fields["action"] == "kill":
            time.sleep(0.01)
        return work()

    def _matches(self, op: str, uri: str, data: bytes) -> bool:
        fields = self._fields
        return (
            self._armed
            and self._trace.rank == fields["rank"]
            and op in fields["op"].split("|")
            and re.search(fields["key"], uri) is not None
            and (not fields["data"] or re.search(fields["data"].encode(), data) is not None)
        )

    def _strike(self, op: str, uri: str) -> None:
        self._struck = True
        number = _SIGNALS[self._fields["action"]]
        self._trace("fault", point=self._fields["name"], op=op, uri=uri)
        if number == signal.SIGSTOP:
            with self._gate.alone():
                os.killpg(0, number)
            return
        match self._fields["target"]:
            case "group":
                os.killpg(0, number)
            case "launcher":
                os.kill(int(os.environ["DDPM_LAUNCHED"]), number)
            case _:
                os.kill(os.getpid(), number)
        while number == signal.SIGKILL:
            time.sleep(1)


class Watched:
    """The hooks that change each module after its import."""

    def __init__(self, trace: Trace, fault: Fault | None, broken: str) -> None:
        self._trace, self._fault, self._broken = trace, fault, broken
        self._local = threading.local()
        self._drawn: list[Any] = []

    def after_import(self, module: ModuleType) -> None:
        """Changes a module."""
        match module.__name__:
            case name if name in _STORES:
                for store, op in product((getattr(module, each) for each in _STORES[name]), OPERATIONS):
                    setattr(store, op, self._watched(op, getattr(store, op)))
            case "job.coordination.lease":
                vars(module).update(RENEW_SECONDS=RENEW_SECONDS, EXPIRE_SECONDS=EXPIRE_SECONDS)
            case "job.data.pack":
                module.pack.__kwdefaults__["shard_images"] = SHARD_IMAGES
            case "job.sampling.painter":
                self._watch_sampling(module.Painter, "check_agreed")
                self._watch_sampling(module.Painter, "check_stopped")
            case "job.runs.checkpoints":
                self._watch_restoring(module)
            case "job.training.attempt":
                self._watch_attempt(module)
            case "job.training.session":
                self._watch_session(module)
            case "ddpm.training":
                self._keep_drawn(module)
        sabotage.apply(self._broken, module, self._trace)

    def _around(self, op: str, uri: str, data: bytes, work: Callable[[], Any]) -> Any:
        return work() if self._fault is None else self._fault.around(op, uri, data, work)

    def _watched(self, op: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(store: Any, *args: Any, **kwargs: Any) -> Any:
            # An operation inside another one, such as the read of a replace, does not count.
            if getattr(self._local, "inside", False):
                return method(store, *args, **kwargs)
            uri = f"{store.uri}/{args[1] if op == 'move' else args[0]}"
            data = args[1] if op in ("create", "replace", "put") else b""

            def work() -> Any:
                self._local.inside = True
                try:
                    result = method(store, *args, **kwargs)
                finally:
                    self._local.inside = False
                if op == "create" and uri.endswith("/MANIFEST.json"):
                    manifest = json.loads(data)
                    committed = [manifest["fence"], manifest["images_seen"]]
                    self._trace("commit", ref=committed, loss_sums=manifest["loss_sums"])
                elif op == "create" and re.search("/pieces/[0-9]+.json$", uri):
                    self._trace("piece", uri=uri)
                elif op == "delete" and "/checkpoints/" in uri:
                    self._trace("delete", uri=uri)
                return result

            return self._around(op, uri, data, work)

        return call

    def _watch_sampling(self, kind: type, name: str) -> None:
        check = getattr(kind, name)

        def watched_check(this: Any, *args: Any) -> None:
            self._around("sampling-step", "", b"", lambda: check(this, *args))

        setattr(kind, name, watched_check)

    def _watch_restoring(self, module: ModuleType) -> None:
        restore = module.restore

        def watched(run: Any, ref: Any, into: Any = None, **options: Any) -> Any:
            restored = restore(run, ref, into, **options)
            # An attempt does not go on from the weights of a parent, which may differ.
            if into is not None and "may_differ" not in options:
                self._trace("restored", ref=[ref.fence, ref.images_seen])
            return restored

        module.restore = watched

    def _watch_attempt(self, module: ModuleType) -> None:
        restore = module.TrainingAttempt._restore

        def watched_restore(attempt: Any) -> None:
            self._trace.fence = attempt.record.fence
            self._trace("began")
            restore(attempt)

        module.TrainingAttempt._restore = watched_restore

    def _watch_session(self, module: ModuleType) -> None:
        session = module.TrainingSession
        after_step = session.after_step

        def watched_after_step(this: Any, state: Any) -> bool:
            self._trace("step", images_seen=state.images_seen, images=self._digests())
            return bool(after_step(this, state))

        session.after_step = watched_after_step

    def _keep_drawn(self, module: ModuleType) -> None:
        """Keeps the content of each micro-batch: the numbers of its images, and their pixels, noise and points."""
        draw, losses = module.randomness.training_noise, module.Objective.losses

        def kept_noise(seed: int, image_numbers: Any, *args: Any) -> Any:
            self._drawn.append((image_numbers.tolist(), []))
            return draw(seed, image_numbers, *args)

        def kept_losses(objective: Any, network: Any, *args: Any, **named: Any) -> Any:
            x_start, noise, drawn = args[:3]
            self._drawn[-1][1].extend([x_start, noise, *(row for row in drawn if row is not None)])
            return losses(objective, network, *args, **named)

        module.randomness.training_noise, module.Objective.losses = kept_noise, kept_losses

    def _digests(self) -> list[list[Any]]:
        """Returns for each image of this step its number, and a hash of its pixels, noise and point."""
        digests = []
        for numbers, tensors in self._drawn:
            arrays = [tensor.contiguous().numpy() for tensor in tensors]
            for i, number in enumerate(numbers):
                digest = hashlib.blake2b(b"".join(array[i].tobytes() for array in arrays), digest_size=6)
                digests.append([number, digest.hexdigest()])
        self._drawn.clear()
        return digests


class AfterImport(importlib.abc.MetaPathFinder):
    """Passes modules of the product to a hook after their import."""

    def __init__(self, hook: Callable[[ModuleType], None]) -> None:
        self._hook = hook

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns a module's spec, whose loader calls the hook at its end."""
        if not name.startswith(("job.", "ddpm.")):
            return None
        for finder in sys.meta_path:
            if finder is self or (spec := finder.find_spec(name, path, target)) is None:
                continue
            if spec.loader is not None:
                spec.loader.exec_module = partial(self._execute, spec.loader.exec_module)  # type: ignore[method-assign]
            return spec
        return None

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        self._hook(module)


def install() -> None:
    """Installs trace, fault and sabotage, if the environment asks for them."""
    if VARIABLE not in os.environ:
        return
    chosen = json.loads(os.environ[VARIABLE])
    trace = Trace(chosen["trace"])
    role = "rank" if "DDPM_LAUNCHED" in os.environ else "launcher"
    trace("process", pid=os.getpid(), role=role)
    is_target = role == "rank" or (chosen["fault"] or {}).get("phase") in ("pack", "shared-pack")
    fault = Fault(trace, chosen["fault"]) if chosen["fault"] and is_target else None
    sys.meta_path.insert(0, AfterImport(Watched(trace, fault, chosen["sabotage"]).after_import))
