"""The trace of a program under kills: what each step learnt, and what was saved and restored.

`ddpm train` stays unchanged: hooks change modules after their import, in its processes alone. The peers call the trace.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from benchmarks.crash_campaign.injection import AfterImport, Trace

VARIABLE = "DDPM_GOODPUT_TRACE"
"""The path of the trace."""


def digests(images: Any) -> list[str]:
    """Returns a hash of the pixels of each image, uint8 [b, C, H, W]."""
    return [hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).hexdigest() for image in images]


class Hooks:
    """The hooks that change each module of `ddpm train` after its import."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def after_import(self, module: ModuleType) -> None:
        """Changes a module."""
        match module.__name__:
            case "job.training.session":
                self._trace("imported")
            case "job.coordination.lease":
                module.Lease.take = staticmethod(self._told("leased", module.Lease.take))
            case "job.runs.writer":
                module.commit_manifest = self._told("saved", module.commit_manifest, lambda _, made: made.images_seen)
                module.CheckpointWriter.save = self._told_before("saving", module.CheckpointWriter.save)
            case "ddpm.state":
                resume_at = module.TrainState.resume_at
                module.TrainState.resume_at = self._told("restored", resume_at, lambda _, images_seen, *__: images_seen)
            case "ddpm.training":
                module.train = self._told_steps(module.train)

    def _told(
        self, event: str, work: Callable[..., Any], at: Callable[..., Any] = lambda *_: None
    ) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            result = work(*args, **named)
            self._trace(event, at=at(*args))
            return result

        return call

    def _told_before(self, event: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(this: Any, images_seen: int, *args: Any) -> Any:
            self._trace(event, at=images_seen)
            return work(this, images_seen, *args)

        return call

    def _told_steps(self, train: Callable[..., Any]) -> Callable[..., Any]:
        def call(state: Any, network: Any, batches: Iterable[Any], *args: Any, hooks: Any, **named: Any) -> Any:
            newest: list[Any] = []

            def seen() -> Iterator[Any]:
                for newest[:] in zip(batches):
                    yield newest[0]

            def after_step(state: Any) -> bool:
                numbers, images = newest[0].image_numbers.tolist(), digests(newest[0].images)
                self._trace("step", at=state.images_seen, images=list(zip(numbers, images, strict=True)))
                return bool(hooks.after_step(state))

            self._trace("training")
            return train(state, network, seen(), *args, hooks=replace(hooks, after_step=after_step), **named)

        return call


def install() -> None:
    """Installs the hooks, if the environment names a trace."""
    if VARIABLE in os.environ:
        trace = Trace(os.environ[VARIABLE])
        trace("rank" if "DDPM_LAUNCHED" in os.environ else "process")
        sys.meta_path.insert(0, AfterImport(Hooks(trace).after_import))
