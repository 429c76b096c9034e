"""The undisturbed run of a lane, which the disturbed ones must match."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.crash_campaign.attempts import Attempts
from benchmarks.crash_campaign.history import Ending, History, differences, lost_images, read_ending, saved_images
from benchmarks.crash_campaign.processes import BrokenError, Place
from benchmarks.crash_campaign.records import Run
from benchmarks.crash_campaign.work import DATASET_KEY, Work
from job.runs.layout import RUNS
from job.store import Store, open_store


@dataclass(frozen=True)
class Undisturbed:
    """The results of the undisturbed run."""

    ending: Ending
    history: History
    dataset: dict[str, bytes]
    sampled: dict[str, str]
    """Pictures of `ddpm sample`: SHA-256 by name."""
    saved: dict[str, str]
    """Pieces of `ddpm sample --count`: SHA-256 by name."""
    child: Undisturbed | None = None
    """A run that began with the weights of this one."""


def make_undisturbed(work: Work, folder: Path, attempts: Attempts, phases: Collection[str]) -> Undisturbed:
    """Packs, trains and, for the points of these phases, samples without a fault.

    Raises:
        BrokenError: a command failed, or training did not see every image once.
    """
    place, bucket = Place(folder, folder / "cache"), open_store(work.bucket)
    run = Run("run-1", bucket.sub(f"{RUNS}/run-1"))
    attempts.start(work.pack, place=place).finish()
    training = attempts.start(work.train(run.name), place=place)
    run.invocations.append(training)
    training.finish()
    attempts.note_pace(training)
    ending, history = read_ending(run.store), run.history
    attempts.tally.undisturbed_hash = ending.weights_sha256
    attempts.tell(f"{attempts.name}: undisturbed, {ending.ref[1]:,} images, {ending.weights_sha256[:16]}…")
    for problem in differences(history, ending, history, ending):
        attempts.fail(f"undisturbed: {problem}")
    if lost_images(history, ending) or history.repeated_images:
        raise BrokenError("undisturbed training does not see every image once")
    sampled: dict[str, str] = {}
    saved: dict[str, str] = {}
    if "sample" in phases:
        attempts.start(work.sample(run.name), place=place).finish()
        pictures = read_ending(run.store).pictures
        sampled = {name: sha256 for name, sha256 in pictures.items() if name not in ending.pictures}
    if {"batch", "shared-batch"} & {*phases}:
        attempts.start(work.batch(run.name), place=place).finish()
        saved = saved_images(run.store)
    made = Undisturbed(ending, history, objects_of(bucket.sub(DATASET_KEY)), sampled, saved)
    if "from" not in phases:
        return made
    child = Run("child", bucket.sub(f"{RUNS}/child"))
    child.invocations.append(attempts.start(work.train(child.name, run.name), place=place))
    child.invocations[0].finish()
    return replace(made, child=replace(made, ending=read_ending(child.store), history=child.history))


def objects_of(dataset: Store) -> dict[str, bytes]:
    """Returns a dataset's objects without records and claims, which a kill after the commit leaves behind."""
    keys = (entry.key for entry in dataset.list() if not entry.key.startswith(("pieces/", "claims/")))
    return {key: dataset.read(key).data for key in keys}
