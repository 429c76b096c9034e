"""Training and sampling beside busy processes: our threads against PyTorch's, and against one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.measuring import Figure, seconds
from benchmarks.training_step import OurLoop, pack_for_loops
from ddpm.model import Sampling
from ddpm.threads import Threads
from job.config import EMBEDDED
from job.processes import compute
from job.processes.ranks import Agreement
from job.progress import Progress
from job.sampling.painter import Painter

AT_LEAST = 2 / 3
"""The least share of the speed of one thread, or of PyTorch's threads if these are faster."""
NEIGHBOURS = 2
PRESET_SETS = ("model.num_classes=0",)


def measure(quick: bool) -> list[Figure]:
    """Times a training step and five sampling steps in three ways in turn, beside two processes that only count."""
    count, precision = max(2, torch.get_num_threads()), compute.best_precision()
    with TemporaryDirectory(prefix="ddpm-bench-") as name:
        pack_for_loops(Path(name), quick)
        loop = OurLoop(Path(name), quick, precision, preset=EMBEDDED, sets=PRESET_SETS)
        session = loop.session
        painter = Painter(session.config, session.ranks, precision, Agreement(1, flags=1))
        sampling, images = Sampling("unipc", 2 if quick else 5), 2 if quick else 10

        def in_way(threads: Threads | None, own: int, work: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                loop.threads = painter.threads = threads
                torch.set_num_threads(own)
                work()

            return run

        def draw() -> None:
            painter.sample_together(range(images), sampling, images, "sampling")

        figures = []
        ways = {"ours": (Threads(count), count), "one thread": (None, 1), "PyTorch threads": (None, count)}
        with busy_neighbours():
            for what, work in (("training", loop.step), ("sampling", draw)):
                times = _in_turn(what, {way: in_way(*how, work) for way, how in ways.items()}, 2 if quick else 3)
                figures.append(_figure(what, times, count))
        loop.close()
    torch.set_num_threads(count)
    return figures


@contextmanager
def busy_neighbours() -> Iterator[None]:
    """Keeps processes busy meanwhile, which end with this one."""
    counting = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    neighbours = [subprocess.Popen([sys.executable, "-c", counting]) for _ in range(NEIGHBOURS)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def _in_turn(title: str, ways: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Returns the seconds of each way, turn by turn, without a first turn."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    with Progress(f"{title} beside busy processes", total=turns + 1, unit="turns") as bar:
        for turn in range(turns + 1):
            for way, work in ways.items():
                times[way].append(seconds(work))
            bar.update(turn + 1)
    return {way: each[1:] for way, each in times.items()}


def _figure(what: str, times: dict[str, list[float]], count: int) -> Figure:
    medians = {way: median(each) for way, each in times.items()}
    best = min(medians["one thread"], medians["PyTorch threads"])
    return Figure(
        f"busy_{what}_ratio",
        f"{what} beside {NEIGHBOURS} busy processes: best of PyTorch's 1 and {count} threads / ours, ×",
        [best / ours for ours in times["ours"]],
        at_least=AT_LEAST,
        beside=", ".join(f"{way} {value:.3g} s" for way, value in medians.items()),
        raw={f"{way.replace(' ', '_')}_seconds": each for way, each in times.items()},
    )
