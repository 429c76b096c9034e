"""Measures speed: all participants in turn, as medians, with the spread and the machine."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from job.platform import usable_cores
from job.progress import Progress

ROOT = Path(__file__).parents[1]
BUSY_LOAD = 0.5
"""The largest load before a measurement: other processes would distort the numbers."""
Measured = TypeVar("Measured")
Lines = dict[str, tuple[Sequence[float], Sequence[float], str]]
"""By name x, y and the style of matplotlib, empty for a line with a marker; names that begin with _ have no legend."""


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


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the duration of `work` by a clock in seconds."""
    start = clock()
    work()
    return clock() - start


def timed(clock: Callable[[], float] = time.perf_counter, **works: Callable[[], object]) -> dict[str, Any]:
    """Returns works that return their duration by a clock."""
    return {name: lambda work=work: seconds(work, clock) for name, work in works.items()}


def in_turn(
    title: str,
    works: dict[str, Callable[[], Measured]],
    turns: int,
    warmup_turns: int = 1,
    after_turn: Callable[[], object] = lambda: None,
) -> dict[str, list[Measured]]:
    """Does each work once a turn, so that a slow minute affects all; returns what they return, turn by turn.

    Args:
        title: the title of the progress bar.
        works: the participants by name.
        turns: the number of measurements of each.
        warmup_turns: the number of turns before these, which do not count.
        after_turn: waits and cleans up after every turn, outside of the measurement.
    """
    found: dict[str, list[Measured]] = {name: [] for name in works}
    with Progress(title, total=(turns + warmup_turns) * len(works), unit="turns") as bar:
        for turn in range(turns + warmup_turns):
            for number, (name, work) in enumerate(works.items(), 1):
                measured = work()
                if turn >= warmup_turns:
                    found[name].append(measured)
                bar.update(turn * len(works) + number)
            after_turn()
    return found


def faster(key: str, what: str, took: dict[str, list[float]], peer: str = "peer", **more: Any) -> Figure:
    """Returns how many times as fast as a peer ours is: its seconds divided by ours, turn by turn."""
    ratios = [theirs / ours for theirs, ours in zip(took[peer], took["ours"], strict=True)]
    beside = ", ".join(f"{name} {median(each):.3g} s" for name, each in took.items())
    raw = {f"{name}_seconds": each for name, each in took.items()} | more.pop("raw", {})
    return Figure(key, f"{what}, ×", ratios, beside=f"{beside}{more.pop('beside', '')}", raw=raw, **more)


def fresh(module: str, *words: object, timeout_seconds: float | None = None) -> Any:
    """Returns what a module prints, JSON in its last line, in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT, timeout=timeout_seconds)
    return json.loads(done.stdout.splitlines()[-1])


def lines_png(lines: Lines, ticks: Sequence[float], xlabel: str, ylabel: str, yscale: str = "log") -> bytes:
    """Returns a plot as PNG of 720 × 480 pixels, whose horizontal axis is logarithmic."""
    from matplotlib import figure as figures

    figure = figures.Figure(figsize=(7.2, 4.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (name, (x, y, style)), marker in zip(lines.items(), cycle("ov^s<>D*P"), strict=False):
        axes.plot(x, y, style or f"{marker}-", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale=yscale)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def machine() -> dict[str, Any]:
    """Returns the facts of this machine; the load is that of the last minute."""
    import torch

    from job.processes.compute import best_precision

    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "best_precision": best_precision(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            features = ", ".join(feature for feature in ("avx512_bf16", "amx_bf16") if feature in text)
            return f"{value.strip()} ({features or 'no bf16'})"
    return platform.machine()
