"""How fast a run trains, and which steps take longer than they should."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from job.processes import compute
from job.progress import note

SLOW_FACTOR = 5
"""A step that takes this many times the usual time is slow."""
SLOW_SECONDS = 10.0
"""Seconds lost in slow steps before the run reports them."""


class Pace:
    """Measures images per second between two rows of the log, and reports slow steps once."""

    def __init__(self, batch_size_images: int, images_seen: int) -> None:
        """Starts both clocks; `images_seen` is where this attempt begins."""
        self._batch_size, self._logged_images = batch_size_images, images_seen
        self._logged_at = self._step_began = time.monotonic()
        self._waited_seconds = self._best_images_per_second = self._lost_seconds = 0.0
        self._is_reported = False

    def restart(self) -> None:
        """Leaves all that came before the first step out of the rate and of that step's time."""
        self._logged_at = self._step_began = time.monotonic()

    def images_per_second(self, images_seen: int) -> float:
        """Returns the rate since the last call."""
        now = time.monotonic()
        rate = (images_seen - self._logged_images) / (now - self._logged_at)
        self._best_images_per_second = max(self._best_images_per_second, rate)
        self._logged_at, self._logged_images = now, images_seen
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves work between two steps out of the rate and of the next step's time."""
        began = time.monotonic()
        yield
        self._step_began = time.monotonic()
        self._logged_at += self._step_began - began

    @contextmanager
    def waiting_for_images(self) -> Iterator[None]:
        """Starts the next step's time; the wait inside counts as part of that step."""
        self._step_began = time.monotonic()
        yield
        self._waited_seconds = time.monotonic() - self._step_began

    def check_step(self) -> None:
        """Reports, once per attempt, that slow steps have cost `SLOW_SECONDS`, with the likely cause."""
        step_seconds = time.monotonic() - self._step_began
        usual_seconds = self._batch_size / (self._best_images_per_second or 1e-9)
        if self._is_reported or step_seconds < SLOW_FACTOR * usual_seconds:
            return
        self._lost_seconds += step_seconds - usual_seconds
        if self._lost_seconds > SLOW_SECONDS:
            self._is_reported = True
            cause = compute.why_slow(step_seconds, self._waited_seconds)
            note(f"a step took {step_seconds:.1f} s instead of {usual_seconds:.1f} s: {cause}")
