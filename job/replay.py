"""`ddpm replay`: the state of a run at any image, trained again from the nearest checkpoint before it.

A replay has no lease, and writes nothing into the run but the mark of a reader. Each image is learnt with the settings
of the attempt that learnt it. The files that come out are those that a checkpoint of that moment would have, so that
equal states have files of equal SHA-256.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ddpm import training
from ddpm.state import TrainState
from job.config import RunConfig, method, validated
from job.coordination.sealed import code_version
from job.data.reading.cache import ImageCache, open_cache
from job.exchange.exporting import Objects, check_strangers, open_target, write_folder
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.own_code import named_network
from job.plan import follow_dataset
from job.processes import compute
from job.processes.ranks import meet
from job.progress import Progress, note
from job.runs import records
from job.runs.checkpoints import Manifest, list_checkpoints, load_manifest, newest_sound, restore
from job.runs.layout import CheckpointRef
from job.runs.retention import Retention, reading_chosen
from job.runs.run import open_run
from job.runs.writer import CheckpointFiles, write_part
from job.stop import Stop
from job.store import Store
from job.store.files import scratch_folder
from job.training.attempt import load_parent
from job.training.session import Loop

RECORD = "replay.json"
"""The record of a replay, beside its files."""


@dataclass(frozen=True)
class Stretch:
    """The images that one attempt learnt, from the end of the stretch before up to number `last_image`, without it."""

    attempt: records.Attempt
    config: RunConfig
    """The run's configuration with the changes of this attempt."""
    last_image: int


def stretches_to(run: Store, stored: RunConfig, newest: Manifest) -> list[Stretch]:
    """Returns the way to a run's newest checkpoint, in order; `stored` is its configuration as it began.

    An attempt that was killed may have learnt images after its last checkpoint. The next attempt learns them again, so
    that they count as the next one's.

    Raises:
        BadDataError: the record of an attempt is damaged or missing.
    """
    stretches = []
    for ref in (*map(CheckpointRef.parse, newest.lineage), newest.ref):
        attempt = records.load_attempt(run, ref.fence)
        config = validated(stored.flat() | attempt.changes, f"{run.uri}, attempt {ref.fence}")
        stretches.append(Stretch(attempt, config, ref.images_seen))
    return stretches


class Replay:
    """A run on this process alone, at any image from one of its checkpoints on.

    Attributes:
        newest: the run's newest checkpoint.
        stretches: the way there.
        begun: the checkpoint that it began with; None for the first weights.
        state: that of training, after `begin`.
        differences: sentences about attempts that ran other code or on another device.
    """

    begun: CheckpointRef | None
    state: TrainState

    def __init__(self, bucket_uri: str, name: str, stop: Stop) -> None:
        """Opens the run.

        Raises:
            MissingInputError: no such run, dataset or checkpoint.
            BadRequestError: the run has no dataset.
            BadConfigError: the dataset has other images now.
        """
        self.stop, self.of_run = stop, open_run(bucket_uri, name, stop)
        run, self.stored, index = self.of_run.run, self.of_run.stored, self.of_run.index
        records.check_network_named(run, self.stored)
        if index is None:
            raise BadRequestError(f"{run.uri} was imported without a dataset, and has learnt nothing here")
        follow_dataset(self.stored, index)
        self.index = index
        if (newest := newest_sound(run, list_checkpoints(run))) is None:
            raise MissingInputError(f"{run.uri} has no checkpoint that can be read: train it first")
        self.newest, self.stretches = newest, stretches_to(run, self.stored, newest)
        self.ranks, self.batch_size, self.differences = meet(stop), self.stored.train.batch_size, list[str]()

    @cached_property
    def images(self) -> ImageCache:
        """The run's dataset."""
        return open_cache(self.of_run.bucket, self.index, self.of_run.config.data.cache_gigabytes * 1e9, self.stop)

    def checkpoints(self) -> list[CheckpointRef]:
        """Returns the checkpoints on the way to the newest one that the run has now, in order."""
        ends = {one.attempt.fence: one.last_image for one in self.stretches}
        there = [ref for ref in list_checkpoints(self.of_run.run) if ref.images_seen <= ends.get(ref.fence, -1)]
        return sorted(there, key=lambda ref: (ref.images_seen, ref.fence))

    def stretch_of(self, image_number: int) -> Stretch:
        """Returns the stretch that learnt an image; that of later images is the last one."""
        return next((one for one in self.stretches if image_number < one.last_image), self.stretches[-1])

    def begin(self, image: int) -> None:
        """Restores the newest checkpoint at or before an image, else the weights that the run began with.

        Raises:
            BadDataError: the checkpoint is damaged.
            MissingInputError: the way there leads through an import.
        """
        run = self.of_run.run
        # That of an import is open until a machine trains it.
        config = self.stored.updated({"train.precision": self.stretches[-1].config.train.precision})
        self.state = method.initial_state(method.build_network(config, self.ranks.device), config)

        def nearest() -> list[CheckpointRef]:
            return [ref for ref in self.checkpoints() if ref.images_seen <= image][-1:]

        with reading_chosen(run, nearest) as (refs, _):
            for ref in refs:
                restore(run, ref, self.state.tensors())
                self.state.resume_at(ref.images_seen, self.batch_size)
        self.begun = refs[0] if refs else None
        # Before the last import the images were learnt elsewhere.
        given = max((one.last_image for one in self.stretches if one.attempt.imported), default=-1)
        if given > (self.begun.images_seen if self.begun else -1):
            what = f"the checkpoint of {given:,} images was imported, and is later or gone"
            raise MissingInputError(f"{run.uri} has no way to image {image:,}: {what}")
        if self.begun is None and self.stored.parent.run:
            load_parent(self.state, self.of_run)
            self.state.restart_averages()

    def train_to(self, image: int) -> None:
        """Trains up to an image of the run, a multiple of the batch size.

        Raises:
            StoppedError: a stop was requested.
        """
        while (seen := self.state.images_seen) < image:
            stretch = self.stretch_of(seen)
            last = min(image, stretch.last_image)
            self._compare(stretch.attempt, stretch.config)
            loop = Loop(stretch.config, self.images, self.ranks, self.state, last)
            bar = Progress("replaying", total=last, start=seen)

            def after_step(state: TrainState, bar: Progress = bar) -> bool:
                bar.update(state.images_seen)
                return self.stop()

            with bar, closing(loop.batches), loop.alone():
                loop.learn(training.Hooks(after_step, self.stop))
            self.stop.check(f"after {self.state.images_seen:,} images", "the same command begins again")

    def _compare(self, attempt: records.Attempt, config: RunConfig) -> None:
        is_exact = compute.slots_of(config.train, self.ranks) is not None
        device = compute.describe_device(self.ranks.device, config.train, is_exact, config.ema.device)
        here = {"code_version": code_version(), "device": device, "is_exact": is_exact, "world_size": 1}
        for difference in records.what_is_otherwise(attempt, attempt.model_copy(update=here), "this replay"):
            if difference not in self.differences:
                self.differences.append(difference)
                note(f"THE BITS MAY DIFFER: {difference}")

    def written(self, folder: Path) -> tuple[Objects, dict[str, str]]:
        """Writes the files of a checkpoint of this moment into a folder, and returns the SHA-256 of each by key."""
        seen, tensors = self.state.images_seen, self.state.tensors()
        stretch = self.stretch_of(max(0, seen - 1))
        ref, retention = CheckpointRef(0, seen), Retention(stretch.config, self.index.images)
        files, paths, hashes = CheckpointFiles(tensors, retention, self.of_run.classes), dict[str, Path](), {}
        files.copy()
        for whole_key, part in files.tensors_of(ref):
            # Snapshots of the averages lie elsewhere.
            if (key := whole_key.removeprefix(f"{ref.key}/")) != whole_key:
                paths[key] = folder / f"{len(paths)}.safetensors"
                hashes[key] = write_part(paths[key], key, part).sha256
        how = {"code_version": code_version(), "differences": self.differences, "sha256": hashes}
        where = {"run": self.of_run.run.uri, "images_seen": seen, "from": str(self.begun or "its first weights")}
        small = files.descriptions | {RECORD: (json.dumps(where | how, indent=2) + "\n").encode()}
        return {**paths, **small}, hashes


def replay_run(bucket_uri: str, name: str, image: int, to: str, network: str = "", *, verify: bool) -> None:
    """Prints the SHA-256 of each file of the state of a run at an image; writes the files into a folder, if given.

    Args:
        bucket_uri: the bucket of the run.
        name: the run.
        image: number of images seen, a multiple of the batch size.
        to: a new or empty folder, as a path or a URI; empty for none.
        network: the run's own network, if it has one; see `named_network`.
        verify: begin before a checkpoint of that moment, and compare with it.

    Raises:
        BadRequestError: the run has no such state, or the folder has files, or lies among the runs of the bucket.
        MissingInputError: no such run or dataset, or nothing to compare with.
        BadDataError: a checkpoint is damaged, or differs from the replay.
        StoppedError: a signal came; nothing was written.
    """
    stop = Stop().install()
    if network:
        named_network(network, bucket_uri)
    replay = Replay(bucket_uri, name, stop)
    run, newest, batch_size = replay.of_run.run, replay.newest.images_seen, replay.batch_size
    if image % batch_size or image > newest:
        below = image - image % batch_size
        near = " or ".join(f"{one:,}" for one in sorted({min(below, newest), min(below + batch_size, newest)}))
        raise BadRequestError(f"--image {image}: {name!r} has states every {batch_size:,} images to {newest:,}: {near}")
    there = [ref for ref in replay.checkpoints() if ref.images_seen == image]
    if verify and not (there and image):
        raise MissingInputError(f"--verify: {run.uri} has no checkpoint at image {image:,} to compare with")
    if target := open_target(to, replay.of_run) if to else None:
        check_strangers(target, to, set())
    replay.begin(image - batch_size if verify else image)
    replay.train_to(image)
    with scratch_folder("replay") as folder:
        objects, hashes = replay.written(folder)
        print(f"{run.uri} at image {image:,}, from {replay.begun or 'its first weights'}")
        print("\n".join(f"{sha256}  {key}" for key, sha256 in hashes.items()))
        if target:
            print(write_folder(target, to, name, objects, stop))
    if verify:
        committed = {file.key.removeprefix(f"{there[-1].key}/"): file for file in load_manifest(run, there[-1]).files}
        if differing := [key for key in hashes if key not in committed or committed[key].sha256 != hashes[key]]:
            raise BadDataError(f"{run.uri}/{there[-1].key} differs from the replay in {', '.join(differing)}")
        print(f"equal to {run.uri}/{there[-1].key}, file by file")
