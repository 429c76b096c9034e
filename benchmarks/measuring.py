"""Measures speed: in turn with a peer, as medians, with the spread and the machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from job.progress import Progress

BUSY_LOAD = 0.5
"""The largest load before a measurement: other processes would distort the numbers."""


@dataclass(frozen=True)
class Figure:
    """One number of the report: the median of `samples`, printed with the smallest and the largest.

    Attributes:
        key: its name in the JSON.
        what: its name in the table, with its unit.
        samples: one value per repetition.
        at_least: the target, if more is better.
        at_most: the target, if less is better.
        beside: the numbers behind it, in words.
        raw: the same numbers, for programs; names include units.
    """

    key: str
    what: str
    samples: list[float]
    at_least: float | None = None
    at_most: float | None = None
    beside: str = ""
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median."""
        return median(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return self.value <= self.at_most if self.at_most is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        target = {"at_least": self.at_least, "at_most": self.at_most, "met": self.met}
        return {"value": self.value, "what": self.what, "samples": self.samples, **target, "raw": self.raw}


@dataclass(frozen=True)
class Turns:
    """Seconds of the same work by us and by a peer in turn, so that a slow minute affects both."""

    ours: list[float]
    peer: list[float]

    @property
    def speedups(self) -> list[float]:
        """The peer's time divided by ours, turn by turn."""
        return [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]

    def raw(self) -> dict[str, list[float]]:
        """Both lists, for JSON."""
        return {"our_seconds": self.ours, "peer_seconds": self.peer}


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the duration of `work` by a clock in seconds."""
    start = clock()
    work()
    return clock() - start


def take_turns(
    title: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    turns: int,
    warmup_turns: int = 1,
    after_turn: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Times `peer` and `ours` alternately, with a progress bar.

    Args:
        title: the title of the progress bar.
        ours: our work.
        peer: the same work by a peer.
        turns: the number of measurements of each.
        warmup_turns: the number of turns before these, which do not count.
        after_turn: waits and cleans up after every turn, outside of the measurement.
        clock: measures seconds.
    """
    measured = Turns([], [])
    with Progress(title, total=turns + warmup_turns, unit="turns") as bar:
        for turn in range(-warmup_turns, turns):
            peer_seconds, our_seconds = seconds(peer, clock), seconds(ours, clock)
            after_turn()
            if turn >= 0:
                measured.peer.append(peer_seconds)
                measured.ours.append(our_seconds)
            bar.update(turn + warmup_turns + 1)
    return measured


def machine() -> dict[str, Any]:
    """Returns the facts of this machine; the load is that of the last minute."""
    import torch

    from job.processes.compute import best_precision

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "best_precision": best_precision(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            features = ", ".join(f for f in ("avx512_bf16", "amx_bf16") if f in Path("/proc/cpuinfo").read_text())
            return f"{value.strip()} ({features or 'no bf16'})"
    return platform.machine()
