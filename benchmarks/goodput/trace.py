"""The trace of a program under kills: what each step learnt, and what was saved and restored.

`ddpm train` stays unchanged: hooks change modules after their import, in its processes alone. The peers call the trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from benchmarks.crash_campaign.injection import Trace


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
            case "job.runs.writer":
                module.commit_manifest = self._told(
                    module.commit_manifest, after="saved", at=lambda made: made.images_seen
                )
                module.CheckpointWriter.save = self._told(module.CheckpointWriter.save, before="saving", at=int)
            case "ddpm.state":
                module.TrainState.resume_at = self._told(module.TrainState.resume_at, after="restored", at=int)
            case "ddpm.training":
                module.train = self._told_steps(module.train)

    def _told(
        self, work: Callable[..., Any], *, before: str = "", after: str = "", at: Any = None
    ) -> Callable[..., Any]:
        """Returns a function that traces its begin or its end, with `at` of its second argument."""

        def call(*args: Any, **named: Any) -> Any:
            about = {"at": at(args[1])} if at else {}
            if before:
                self._trace(before, **about)
            result = work(*args, **named)
            if after:
                self._trace(after, **about)
            return result

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

            return train(state, network, seen(), *args, hooks=replace(hooks, after_step=after_step), **named)

        return call
