"""Clocks for `--watch` that cost no time: whenever the watch waits, the next thing happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from job.jobs import watch
from job.jobs.backends import base
from job.jobs.spec import JobSpec

PATIENCE = 30
"""How often the watch may wait once nothing happens any more, before it is told to stop."""


class Story:
    """Things that happen, one for each time that the watch waits, and what it tells a person."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.events, self.seconds, self.left = list(events), 0.0, PATIENCE
        self.told: list[str] = []

    def now(self) -> float:
        return time.time() + self.seconds

    def wait(self, seconds: float) -> bool:
        self.seconds += seconds
        if self.events:
            self.events.pop(0)()
        else:
            self.left -= 1
        return self.left == 0


def watched(home: base.Backend, spec: JobSpec, clock: Any) -> None:
    """Watches a job to its end. Its bucket is nowhere, unless it is a folder here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (watch, base):
            patch.setattr(module, "note", clock.told.append)
        bucket = "/nowhere" if "://" in spec.bucket else spec.bucket
        watch.Watch(home, replace(spec, bucket=bucket), clock.wait, clock.now).run()
