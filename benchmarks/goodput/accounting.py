"""The account of traces: seconds of a step, a save and a restart, and the images learnt; and a model of the goodput."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from statistics import median

from benchmarks.crash_campaign.history import History
from benchmarks.crash_campaign.processes import Event

Learnt = list[tuple[int, str]]
"""The number of each image in the run, and the hash of its pixels, in order."""

WARM_STEPS = 10
"""The first steps of a process, which are slower: they count as part of its restart."""
SPREAD = 0.25
LEAST_SECONDS = 1e-3
"""The cost of a save where the noise is larger: zero would lead to an interval of zero."""


def gaps(mean_seconds: float, kills: int) -> list[float]:
    """Returns the times between kills: spread evenly over ±25 % and shuffled, so that no period of saves fits them."""
    times = [mean_seconds * (1 + SPREAD * ((2 * i + 1) / kills - 1)) for i in range(kills)]
    random.Random(kills).shuffle(times)
    return times


def of_kind(events: Sequence[Event], kind: str) -> list[Event]:
    """Returns the events of a kind."""
    return [event for event in events if event["event"] == kind]


def image_seconds(steps: Sequence[Event]) -> float:
    """Returns the seconds per image, without the first steps."""
    warm = steps[WARM_STEPS:]
    return (warm[-1]["time"] - warm[0]["time"]) / sum(len(step["images"]) for step in warm[1:])


def saves(events: Sequence[Event]) -> list[tuple[float, float]]:
    """Returns the begin and the end of each committed save after the first steps."""
    steps = of_kind(events, "step")
    warm_at = steps[WARM_STEPS]["at"] if len(steps) > WARM_STEPS else float("inf")
    begun = {event["at"]: event["time"] for event in of_kind(events, "saving")}
    return [(begun[event["at"]], event["time"]) for event in of_kind(events, "saved") if event["at"] > warm_at]


def _steps(events: Sequence[Event], *, beside_saves: bool) -> list[tuple[float, int]]:
    """Returns the seconds and the images of the steps beside saves, or of the others, without the first ones."""
    spans, found = saves(events), []
    for one, two in pairwise(of_kind(events, "step")[WARM_STEPS:]):
        if beside_saves == any(one["time"] < end and begin < two["time"] for begin, end in spans):
            found.append((two["time"] - one["time"], len(two["images"])))
    return found


def calm_image_seconds(attempts: Sequence[Sequence[Event]], otherwise: float) -> float:
    """Returns the seconds per image of the steps that are not beside saves: at the speed of this machine meanwhile.

    Where saves leave too few such steps it is `otherwise`, that of a run without saves.
    """
    steps = [step for events in attempts for step in _steps(events, beside_saves=False)]
    return sum(seconds for seconds, _ in steps) / sum(images for _, images in steps) if len(steps) > 50 else otherwise


def save_seconds(events: Sequence[Event], image_seconds: float) -> float:
    """Returns the time that a save takes from training: what the steps beside it take longer than the others."""
    image_seconds = calm_image_seconds([events], image_seconds)
    longer = sum(seconds - images * image_seconds for seconds, images in _steps(events, beside_saves=True))
    return max(LEAST_SECONDS, longer / count) if (count := len(saves(events))) else LEAST_SECONDS


def interval_images(attempts: Sequence[Sequence[Event]], otherwise: float) -> float:
    """Returns the median number of images between two saves, and `otherwise` without two of them."""
    saved = [[event["at"] for event in of_kind(events, "saved")] for events in attempts]
    between = [two - one for each in saved for one, two in pairwise(each)]
    return float(median(between)) if between else otherwise


def restart_seconds(events: Sequence[Event], started: float, image_seconds: float) -> float:
    """Returns the time from the start of a process to its first step, with what the first steps take longer."""
    steps = of_kind(events, "step")[: WARM_STEPS + 1]
    learnt = sum(len(step["images"]) for step in steps)
    return float(steps[-1]["time"] - started - learnt * image_seconds)


def lineage(attempts: Sequence[Sequence[Event]], at: int) -> Learnt:
    """Returns all images of the state saved at `at`: of the attempt that saved it, of its restored state, and so on."""
    history, saved_by = History(), dict[int, int]()
    for attempt, events in enumerate(attempts):
        for event in events:
            if event["event"] == "restored":
                history.restored[attempt] = (saved_by[event["at"]], event["at"])
            elif event["event"] == "saving":
                saved_by[event["at"]] = attempt
            elif event["event"] == "step":
                history.steps.setdefault(attempt, []).append((event["at"], dict(event["images"])))
    return sorted(history.effective((saved_by[at], at))) if at else []


def lost_and_repeated(images: Learnt, dataset: Counter[str]) -> tuple[int, int]:
    """Returns the number of images that finished epochs never learnt, and of those that they learnt again."""
    size, lost, repeated = dataset.total(), 0, 0
    finished = (max((number for number, _ in images), default=-1) + 1) // size
    epochs = [Counter[str]() for _ in range(finished + 1)]
    for number, digest in images:
        epochs[number // size][digest] += 1
    for seen in epochs[:finished]:
        lost += (dataset - seen).total()
        repeated += (seen - dataset).total()
    return lost, repeated


@dataclass(frozen=True)
class Costs:
    """The quantities of the model, measured once without kills in between."""

    image_seconds: float
    restart_seconds: float
    save_seconds: float
    """The time that a save takes from training."""
    commit_seconds: float
    """The time from the begin of a save to the moment from which it survives a kill."""

    def young_images(self, mean_seconds: float, step_images: float) -> float:
        """Returns the best interval between saves, √(2 C T) (Young 1974), in whole steps, not below one save."""
        seconds = max(sqrt(2 * self.save_seconds * mean_seconds), self.commit_seconds)
        return step_images * max(1, round(seconds / self.image_seconds / step_images))

    def kept_images(self, seconds: float, interval_images: float) -> float:
        """Returns the images whose save is committed when a process is killed after so many seconds."""
        usable = seconds - self.restart_seconds - self.commit_seconds + self.save_seconds
        saves = usable // (interval_images * self.image_seconds + self.save_seconds)
        return max(0.0, saves) * interval_images

    def goodput(self, times: Sequence[float], interval_images: float) -> float:
        """Returns productive time ÷ wall time for kills after these times."""
        return sum(self.kept_images(time, interval_images) for time in times) * self.image_seconds / sum(times)
