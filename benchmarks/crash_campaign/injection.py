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
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

VARIABLE = "DDPM_CRASH_CAMPAIGN"
"""JSON: `trace` (a path), `fault` (fields of a `Point`, or null), `sabotage` (a name, or empty), `is_timed`."""
OPERATIONS = ("read", "create", "replace", "put", "move", "download", "open", "delete", "exists")
SHARD_IMAGES = 26
RENEW_SECONDS, EXPIRE_SECONDS = 1.0, 12.0
"""Shorter than the product's, so that a small run renews its lease."""
INITIAL_SCALE, GROWTH_STEPS = 2.0**24, 3
"""The loss scale in fp16 overflows at first, and again after every few steps."""

_STORES = {
    "job.store.local": ("LocalStore",),
    "job.store.gcs": ("GcsStore",),
    "job.store.objects": ("S3Store", "AzureStore"),
}


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


class Fault:
    """The point at which this process, its group or its launcher gets a signal; see `Point` for the fields."""

    def __init__(self, trace: Trace, fields: dict[str, Any]) -> None:
        self._trace, self._fields = trace, fields
        self._lock, self._count, self._struck = threading.Lock(), 0, False

    def around(self, op: str, uri: str, data: bytes, work: Callable[[], Any]) -> Any:
        """Runs `work`, with the fault before or after it."""
        if self._struck or not self._matches(op, uri, data):
            return work()
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

    def _matches(self, op: str, uri: str, data: bytes) -> bool:
        fields = self._fields
        return (
            self._trace.rank == fields["rank"]
            and op in fields["op"].split("|")
            and re.search(fields["key"], uri) is not None
            and (not fields["data"] or re.search(fields["data"].encode(), data) is not None)
        )

    def _strike(self, op: str, uri: str) -> None:
        self._struck = True
        number = signal.SIGKILL if self._fields["action"] == "kill" else signal.SIGTERM
        self._trace("fault", point=self._fields["name"], op=op, uri=uri)
        if self._fields["action"] == "shortage":
            import torch

            raise torch.OutOfMemoryError("planted by the campaign")
        match self._fields["target"]:
            case "group":
                os.killpg(0, number)
            case "launcher":
                os.kill(int(os.environ["DDPM_LAUNCHED"]), number)
            case _:
                os.kill(os.getpid(), number)
        while number == signal.SIGKILL:
            time.sleep(1)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Puts `around` in the place of a function or a method, which it gets before the arguments."""
    inner = getattr(owner, name)

    def call(*args: Any, **named: Any) -> Any:
        return around(inner, *args, **named)

    setattr(owner, name, call)


class Watched:
    """The hooks that change each module after its import."""

    def __init__(self, trace: Trace, fault: Fault | None, broken: str) -> None:
        self._trace, self._fault, self._broken = trace, fault, broken
        self._local = threading.local()
        self._drawn: list[Any] = []
        """The content of each micro-batch: the numbers of its images, and their pixels, noise and points."""

    def after_import(self, module: ModuleType) -> None:
        """Changes a module."""
        match module.__name__:
            case name if name in _STORES:
                for store, op in product((getattr(module, each) for each in _STORES[name]), OPERATIONS):
                    wrap(store, op, partial(self._request, op))
            case "job.coordination.lease":
                vars(module).update(RENEW_SECONDS=RENEW_SECONDS, EXPIRE_SECONDS=EXPIRE_SECONDS)
            case "job.data.pack":
                module.pack.__kwdefaults__["shard_images"] = SHARD_IMAGES
            case "job.sampling.painter":
                for check in ("check_agreed", "check_stopped"):
                    wrap(module.Painter, check, self._sampling_step)
            case "job.runs.checkpoints":
                wrap(module, "restore", self._restored)
            case "job.training.attempt":
                wrap(module.TrainingAttempt, "_restore", self._began)
            case "job.training.session":
                wrap(module.TrainingSession, "after_step", self._stepped)
            case "ddpm.precision":
                vars(module).update(INITIAL_SCALE=INITIAL_SCALE, GROWTH_STEPS=GROWTH_STEPS)
                wrap(module.LossScale, "takes_step", self._norm_found)
            case "ddpm.training":
                wrap(module.randomness, "training_noise", self._noise_drawn)
                wrap(module.Objective, "losses", self._losses_asked)
        if broken := _BROKEN.get((self._broken, module.__name__)):
            broken(module)

    def _around(self, op: str, uri: str, data: bytes, work: Callable[[], Any]) -> Any:
        return work() if self._fault is None else self._fault.around(op, uri, data, work)

    def _request(self, op: str, method: Callable[..., Any], store: Any, *args: Any, **named: Any) -> Any:
        # An operation inside another one, such as the read of a replace, does not count.
        if getattr(self._local, "inside", False):
            return method(store, *args, **named)
        uri = f"{store.uri}/{args[1] if op == 'move' else args[0]}"
        data = args[1] if op in ("create", "replace", "put") else b""

        def work() -> Any:
            self._local.inside = True
            try:
                result = method(store, *args, **named)
            finally:
                self._local.inside = False
            if op == "create" and uri.endswith("/MANIFEST.json"):
                manifest = json.loads(data)
                committed = [manifest["fence"], manifest["images_seen"]]
                self._trace("commit", ref=committed, loss_sums=manifest["loss_sums"])
            elif op == "delete" and "/checkpoints/" in uri:
                self._trace("delete", uri=uri)
            return result

        return self._around(op, uri, data, work)

    def _sampling_step(self, check: Callable[..., None], *args: Any) -> None:
        self._around("sampling-step", "", b"", lambda: check(*args))

    def _restored(self, restore: Callable[..., Any], run: Any, ref: Any, into: Any = None, **options: Any) -> Any:
        restored = restore(run, ref, into, **options)
        # An attempt does not go on from the weights of a parent, which may differ.
        if into is not None and "may_differ" not in options:
            self._trace("restored", ref=[ref.fence, ref.images_seen])
        return restored

    def _began(self, restore: Callable[..., None], attempt: Any) -> None:
        self._trace.fence = attempt.record.fence
        self._trace("began")
        restore(attempt)

    def _stepped(self, after_step: Callable[..., bool], session: Any, state: Any) -> bool:
        self._trace("step", images_seen=state.images_seen, images=self._digests())
        return after_step(session, state)

    def _noise_drawn(self, draw: Callable[..., Any], seed: int, image_numbers: Any, *args: Any) -> Any:
        self._drawn.append((image_numbers.tolist(), []))
        return draw(seed, image_numbers, *args)

    def _losses_asked(self, losses: Callable[..., Any], objective: Any, network: Any, *args: Any, **named: Any) -> Any:
        x_start, noise, drawn = args[:3]
        self._drawn[-1][1].extend([x_start, noise, *drawn[:6], *(drawn.further if drawn.further is not None else ())])
        return self._around("losses", "", b"", lambda: losses(objective, network, *args, **named))

    def _norm_found(self, takes_step: Callable[..., bool], scale: Any, norm: Any) -> Any:
        op = "step" if norm.isfinite() else "overflow"
        return self._around(op, "", b"", lambda: takes_step(scale, norm))

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
    """Installs trace, fault and sabotage, or the trace of `benchmarks.goodput`, if the environment asks for them."""
    if VARIABLE not in os.environ:
        return
    chosen = json.loads(os.environ[VARIABLE])
    trace, role = Trace(chosen["trace"]), "rank" if "DDPM_LAUNCHED" in os.environ else "launcher"
    if chosen["is_timed"]:
        from benchmarks.goodput.trace import Hooks

        hook = Hooks(trace).after_import
    else:
        trace("process", pid=os.getpid(), role=role)
        fault = Fault(trace, chosen["fault"]) if chosen["fault"] and role == "rank" else None
        hook = Watched(trace, fault, chosen["sabotage"]).after_import
    sys.meta_path.insert(0, AfterImport(hook))


def _manifest_first(writer: Any) -> None:
    from job.runs.writer import write_part
    from job.store.files import scratch_folder

    late: list[Callable[[], Any]] = []

    def upload_later(upload: Any, files: Any, run: Any, lease: Any, ref: Any, when_written: Any) -> Any:
        late.append(lambda: upload(files, run, lease, ref, when_written))
        with scratch_folder("sabotage") as folder:
            return tuple(write_part(folder / "part", key, tensors) for key, tensors in files.tensors_of(ref))

    def commit_and_upload(commit_manifest: Any, *args: Any) -> None:
        commit_manifest(*args)
        late.pop()()

    wrap(writer.CheckpointFiles, "upload", upload_later)
    wrap(writer, "commit_manifest", commit_and_upload)


def _position_off_by_one(session: Any) -> None:
    def shifted(stream_batches: Any, *args: Any, first_image: int, **named: Any) -> Any:
        return stream_batches(*args, first_image=first_image + (first_image > 0), **named)

    wrap(session, "stream_batches", shifted)


_BROKEN: dict[tuple[str, str], Callable[[Any], None]] = {
    ("manifest-first", "job.runs.writer"): _manifest_first,
    ("position-off-by-one", "job.training.session"): _position_off_by_one,
}
"""Protocols broken on purpose, by name and module: a campaign that does not report each break proves nothing."""
