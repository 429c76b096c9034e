"""`ddpm replay`: the state of a run at any image, trained again from the nearest checkpoint before it.

A replay has no lease, and writes nothing into the run but the mark of a reader. Each image is learnt with the settings
of the attempt that learnt it. The files that come out are those that a checkpoint of that moment would have, so that
equal states have files of equal SHA-256.
"""

from __future__ import annotations

import json
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ddpm import training
from ddpm.threads import threads_of
from job.config import RunConfig, method
from job.data.autoencoder import latents_of
from job.data.cache import ImageCache
from job.data.order import order_of
from job.data.stream import stream_batches
from job.exchange.exporting import Export, check_free, write_folder
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.plan import follow_dataset, open_run
from job.processes import compute
from job.processes.ranks import Ranks, build_accelerator, meet
from job.progress import Progress, note
from job.runs import records
from job.runs.checkpoint_files import CheckpointFiles, write_part
from job.runs.checkpoints import Manifest, load_manifest, opened
from job.runs.layout import CheckpointRef
from job.runs.lineage import Lineage
from job.runs.readers import reading_chosen
from job.runs.retention import Retention
from job.sealed import NamedObject, code_version
from job.stop import Stop
from job.store import open_store
from job.store.files import scratch_folder
from job.training.attempt import load_parent
from job.training.session import initial_state, wrapped


class Replay:
    """A run on this process, at any image from one of its checkpoints on.

    Attributes:
        state: after `begin`.
        begun: the checkpoint that it began with; None for the first weights.
        differences: sentences about attempts that ran on other code or another device.
    """

    state: training.TrainState

    def __init__(self, bucket_uri: str, name: str, stop: Stop) -> None:
        """Opens the run, and meets no other process.

        Raises:
            MissingInputError: no such run, dataset or checkpoint.
            BadRequestError: the run has no dataset.
        BadConfigError: the dataset has other images now.
        """
        self.stop, self.of_run = stop, open_run(bucket_uri, name, stop)
        if self.of_run.index is None:
            raise BadRequestError(f"run {name!r} was imported without a dataset: it has nothing to learn again")
        self.index, run = self.of_run.index, self.of_run.run
        self._stored = self._config = records.existing_config(self.of_run.bucket, name)
        follow_dataset(self._stored, self.index)
        self.lineage = Lineage.of(run, self._stored)
        self.batch_size_images = self._stored.train.batch_size
        self.order = order_of(self.index, self._stored)
        self.begun: CheckpointRef | None = None
        self.differences = list[str]()

    @cached_property
    def ranks(self) -> Ranks:
        """This process alone."""
        return meet(self.stop)

    @cached_property
    def images(self) -> ImageCache:
        """The run's dataset."""
        with Progress("reading images", total=self.index.images) as bar:
            return self.of_run.opened_images(self.stop, lambda done, total: bar.update(done))

    def begin(self, image: int) -> None:
        """Restores the newest checkpoint at or before an image, else the weights that the run began with.

        Raises:
            MissingInputError: the run was imported, and its oldest checkpoint is newer.
            BadDataError: the checkpoint is damaged.
        """
        run, lineage = self.of_run.run, self.lineage

        def nearest() -> list[CheckpointRef]:
            return [ref for ref in Lineage.of(run, self._stored).checkpoints if ref.images_seen <= image][-1:]

        with reading_chosen(run, nearest) as (refs, _):
            self.begun = refs[0] if refs else None
            first = lineage.stretches[0]
            if self.begun is None and first.attempt.imported:
                raise MissingInputError(f"{run.uri} was imported at {first.last_image:,} images: choose a later image")
            stretch = next((one for one in lineage.stretches if self.begun and one.has(self.begun)), first)
            self._config = stretch.config
            self.state = initial_state(self._config, self.ranks.device)
            if self.begun:
                with opened(run, self.begun) as restored:
                    restored.copy_into(self.state.tensors())
                self.state.resume_at(self.begun.images_seen, self.batch_size_images)
            elif self._config.parent.run:
                load_parent(self.state, self.of_run)

    def train_to(self, image: int) -> None:
        """Trains up to an image, a multiple of the batch size; the last attempt learns images beyond the lineage.

        Raises:
            StoppedError: a stop was requested.
            MissingInputError: the images on the way were learnt before an import.
        """
        while (seen := self.state.images_seen) < image:
            stretch = self.lineage.stretch_of(seen)
            if stretch.attempt.imported:
                what = f"the checkpoint of {stretch.last_image:,} images was imported"
                raise MissingInputError(f"{self.of_run.run.uri} has no way to image {image:,}: {what}")
            self._compare(stretch.attempt, stretch.config)
            last = image if stretch is self.lineage.stretches[-1] else min(image, stretch.last_image)
            self._train(stretch.config, last)
            self.stop.check(f"after {self.state.images_seen:,} images", "the same command begins again")

    def _train(self, config: RunConfig, last_image: int) -> None:
        ranks, state = self.ranks, self.state
        if config != self._config:
            # Another attempt resumed here: its network may have other settings.
            self._config, self.state = config, initial_state(config, ranks.device)
            for group, tensors in state.tensors().items():
                for name, tensor in self.state.tensors()[group].items():
                    tensor.copy_(tensors[name])
            self.state.resume_at(state.images_seen, self.batch_size_images)
            self.state.log = state.log
            state = self.state
        slots = compute.slots_of(config.train, ranks)
        threads = threads_of(ranks.device, config.train.slot_threads or 1) if slots else None
        accelerator = build_accelerator(config.train.precision, deterministic=slots is not None)
        batches = stream_batches(
            self.images,
            self.order,
            batch_size_images=self.batch_size_images,
            first_image=state.images_seen,
            last_image=last_image,
            with_labels=bool(config.model.num_classes),
            pin_memory=ranks.device.type == "cuda",
            stop=self.stop,
        )
        with (
            Progress("replaying", total=last_image, start=state.images_seen) as bar,
            closing(batches),
            threads.alone() if threads else nullcontext(),
        ):

            def after_step(state: training.TrainState) -> bool:
                bar.update(state.images_seen)
                return self.stop()

            training.train(
                state,
                wrapped(state.model, config, ranks, accelerator, slots),
                batches,
                method.objective_of(config),
                settings=replace(method.settings_of(config), latents=latents_of(self.index)),
                accelerator=accelerator,
                hooks=training.Hooks(after_step, self.stop),
                slots=slots,
                threads=threads,
            )

    def _compare(self, attempt: records.Attempt, config: RunConfig) -> None:
        is_exact = compute.slots_of(config.train, self.ranks) is not None
        device = compute.describe_device(self.ranks.device, config.train, is_exact)
        here = {"code_version": code_version(), "device": device, "is_exact": is_exact, "world_size": 1}
        for difference in records.what_is_otherwise(attempt, attempt.model_copy(update=here), "this replay"):
            if difference not in self.differences:
                self.differences.append(difference)
                note(f"THE BITS MAY DIFFER: {difference}")

    def files(self, folder: Path) -> Export:
        """Writes the files of a checkpoint of this moment into a folder."""
        ref = CheckpointRef(self.lineage.stretch_of(self.state.images_seen - 1).attempt.fence, self.state.images_seen)
        of_checkpoint = CheckpointFiles(
            self.state.tensors(), Retention(self._config, self.index.images), self.of_run.classes
        )
        of_checkpoint.copy()
        paths, named = dict[str, Path](), list[NamedObject]()
        for key, tensors in of_checkpoint.tensors_of(ref):
            # Snapshots of the averages lie elsewhere.
            if key.startswith(f"{ref.key}/"):
                path = folder / f"{len(paths)}.safetensors"
                named.append(write_part(path, key.removeprefix(f"{ref.key}/"), tensors))
                paths[named[-1].key] = path
        record = {
            "run": self.of_run.run.uri,
            "images_seen": self.state.images_seen,
            "epoch": self.state.images_seen / self.index.images,
            "replayed_from": str(self.begun) if self.begun else "the first weights",
            "sha256": {file.key: file.sha256 for file in named},
            "code_version": code_version(),
            "differences": self.differences,
        }
        small = of_checkpoint.descriptions | {RECORD: (json.dumps(record, indent=2) + "\n").encode()}
        return Export(paths, small, f"{self.state.images_seen:,} images seen")


RECORD = "replay.json"
"""The record of a replay, beside its files."""


def replay_run(bucket_uri: str, name: str, image: int, to: str, verify: bool) -> None:
    """Prints the SHA-256 of each file of the state of a run at an image, and writes the files into a folder, if given.

    Args:
        bucket_uri: the bucket of the run.
        name: the run.
        image: number of images seen, a multiple of the batch size.
        to: a new or empty folder, as a path or a URI; empty for none.
        verify: begin before a checkpoint of that moment, and compare with it.

    Raises:
        BadRequestError: the run has no such state, or the folder has other files.
        MissingInputError: no such run or dataset, or nothing to compare with.
        BadDataError: a checkpoint is damaged, or differs from the replay.
        StoppedError: a signal came; nothing was written.
    """
    stop = Stop().install()
    replay = Replay(bucket_uri, name, stop)
    run, newest, batch_size = replay.of_run.run, replay.lineage.newest.images_seen, replay.batch_size_images
    below = image // batch_size * batch_size
    if image != below or image > newest:
        near = sorted({min(below, newest), min(below + batch_size, newest)})
        states = " or ".join(f"{one:,}" for one in near)
        raise BadRequestError(
            f"--image {image}: run {name!r} has states at multiples of {batch_size:,} images, up to {newest:,}: "
            f"use {states}"
        )
    target = open_store(to, replay.of_run.bucket.retry) if to else None
    there = [ref for ref in replay.lineage.checkpoints if ref.images_seen == image]
    if verify and not (there and image):
        raise MissingInputError(f"--verify: {run.uri} has no checkpoint at image {image:,} to compare with")
    if target:
        check_free(target, to, set())
    replay.begin(image - batch_size if verify else image)
    replay.train_to(image)
    with scratch_folder("replay") as folder:
        export = replay.files(folder)
        record: dict[str, Any] = json.loads(export.small[RECORD])
        print(f"{run.uri} at image {image:,} (epoch {record['epoch']:.2f}), from {record['replayed_from']}")
        for key, sha256 in record["sha256"].items():
            print(f"{sha256}  {key}")
        if target:
            print(write_folder(target, to, name, export, stop))
    if verify:
        _compare_with(load_manifest(run, there[-1]), record["sha256"], run.uri)


def _compare_with(manifest: Manifest, found: dict[str, str], uri: str) -> None:
    there = {file.key.removeprefix(f"{manifest.ref.key}/"): file.sha256 for file in manifest.files}
    if differing := [key for key, sha256 in found.items() if there.get(key) != sha256]:
        raise BadDataError(f"{uri}/{manifest.ref.key} differs from the replay in {', '.join(differing)}")
    print(f"equal to {uri}/{manifest.ref.key}, file by file")
