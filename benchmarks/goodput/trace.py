"""The trace of a program under kills: what each step learnt, and what was saved and restored.

`ddpm train` stays unchanged: hooks change modules after their import, in its processes alone. The peers call the trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from benchmarks.crash_campaign.injection import Trace, wrap


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
                wrap(module.CheckpointWriter, "save", self._saving)
                wrap(module, "commit_manifest", self._saved)
            case "ddpm.state":
                wrap(module.TrainState, "resume_at", self._restored)
            case "ddpm.training":
                wrap(module, "train", self._trained)

    def _saving(self, save: Callable[..., Any], writer: Any, images_seen: int, *args: Any) -> Any:
        self._trace("saving", at=images_seen)
        return save(writer, images_seen, *args)

    def _saved(self, commit_manifest: Callable[..., Any], run: Any, manifest: Any) -> None:
        commit_manifest(run, manifest)
        self._trace("saved", at=manifest.images_seen)

    def _restored(self, resume_at: Callable[..., Any], state: Any, images_seen: int, *args: Any) -> None:
        resume_at(state, images_seen, *args)
        self._trace("restored", at=images_seen)

    def _trained(
        self,
        train: Callable[..., Any],
        state: Any,
        network: Any,
        batches: Iterable[Any],
        *args: Any,
        hooks: Any,
        **named: Any,
    ) -> Any:
        newest: list[Any] = []

        def seen() -> Iterator[Any]:
            for newest[:] in zip(batches):
                yield newest[0]

        def after_step(state: Any) -> bool:
            numbers, images = newest[0].image_numbers.tolist(), digests(newest[0].images)
            self._trace("step", at=state.images_seen, images=list(zip(numbers, images, strict=True)))
            return bool(hooks.after_step(state))

        return train(state, network, seen(), *args, hooks=replace(hooks, after_step=after_step), **named)
