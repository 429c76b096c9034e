"""What a command finds in the bucket before it begins. Needs no tensors, so errors come at once, and once."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ddpm.epochs import images_at_epoch
from job.config import RunConfig, changed_for_attempt, check_steps, flatten, follow_dataset, validated
from job.config_input import draft
from job.data.shards import DatasetIndex, dataset_key, find_dataset, load_index
from job.exits import BadConfigError, BadDataError, BadRequestError
from job.progress import note
from job.requests import SampleRequest, TrainRequest
from job.runs import records
from job.runs.checkpoints import MAX_IMAGES_SEEN, CheckpointRef, choose, load_manifest, lost_manifest
from job.sampling.names import SAMPLES, how_drawn, label_of
from job.sampling.pieces import Batch, Drawing, piece_images
from job.stop import NEVER, Stop
from job.store import Store, open_store
from job.store.retry import Retry, away_limit_seconds


@dataclass(frozen=True)
class Plan:
    """A run before this attempt touches it. Its stores wait for a bucket that is away."""

    bucket: Store
    run: Store
    index: DatasetIndex
    dataset_key: str
    config: RunConfig
    changes: dict[str, Any]
    is_new: bool

    @property
    def target_images(self) -> int:
        """`images_seen` at which the run is finished."""
        return images_at_epoch(self.config.train.epochs, self.index.images, self.config.train.batch_size)


def _note(text: str) -> None:
    # What becomes of the bucket is the same for all processes.
    if os.environ.get("RANK", "0") == "0":
        note(text)


def plan_run(request: TrainRequest, stop: Stop = NEVER) -> Plan:
    """Finds the dataset and the run, and resolves the configuration. Writes nothing.

    A run that exists is the base of its own configuration, so that a newer program's presets cannot change it; what
    its last attempt changed stays changed until somebody says otherwise.
    `stop` is asked while the bucket is waited for, now and by the plan's stores later.

    Raises:
        MissingInputError: no such dataset.
        BadConfigError: the configuration does not fit the dataset, or differs from the run's where it matters.
        BucketAwayError: the bucket stayed away beyond the limit.
        StoppedError: `stop` said so.
    """
    bucket = open_store(request.bucket, Retry(away_limit_seconds(), stop, _note))
    run = bucket.sub(f"{records.RUNS}/{records.validated_run_name(request.run)}")
    stored = records.load_config(run)
    changes: dict[str, Any] = {}
    if stored is None:
        config = draft(request.preset_name, request.changes)
    elif stored.data.dataset != request.dataset:
        raise BadRequestError(
            f"run {request.run!r} in {bucket.uri} is about dataset {stored.data.dataset!r}: "
            f"choose another name with --run"
        )
    elif request.preset and request.preset != stored.preset:
        config = draft(request.preset, request.changes)
    else:
        last = records.as_last_changed(run, stored)
        config = validated({**flatten(last.model_dump(mode="json")), **request.changes}, "configuration")
    key = find_dataset(bucket, request.dataset, config.data.size)
    index = load_index(bucket, key)
    config = follow_dataset(config, index)
    if stored is not None:
        if config.train.precision == "auto":
            config = config.model_copy(
                update={"train": config.train.model_copy(update={"precision": stored.train.precision})}
            )
        changes = changed_for_attempt(stored, config, request.run)
    plan = Plan(bucket, run, index, key, config, changes, is_new=stored is None)
    if plan.target_images > MAX_IMAGES_SEEN:
        raise BadConfigError(
            f"train.epochs={config.train.epochs:,} of {index.images:,} images are more than the "
            f"{MAX_IMAGES_SEEN:,} that a run can count"
        )
    return plan


@dataclass(frozen=True)
class SamplePlan:
    """A run, and what of it is to be drawn."""

    bucket: Store
    run: Store
    index: DatasetIndex
    config: RunConfig
    checkpoints: tuple[CheckpointRef, ...]
    sampler: str
    steps: int

    def other_precision(self, request: SampleRequest) -> str:
        """The precision that was asked for, if it is not the run's own."""
        return request.precision if request.precision != self.config.train.precision else ""


def plan_sampling(request: SampleRequest, stop: Stop = NEVER) -> SamplePlan:
    """Finds the run and its checkpoints. Writes nothing; `stop` as for `plan_run`.

    Raises:
        MissingInputError: no such run, dataset or checkpoint; the message names those there are.
        BadConfigError: more steps than the run's diffusion has.
        BucketAwayError: the bucket stayed away beyond the limit.
        StoppedError: `stop` said so.
    """
    bucket = open_store(request.bucket, Retry(away_limit_seconds(), stop, _note))
    run = records.run_store(bucket, request.run)
    config = records.existing_config(bucket, request.run)
    try:
        config = records.as_last_changed(run, config)
    except BadDataError as error:
        _note(f"{error}; drawing as the run began")
    assert config.data.size is not None
    timesteps, sampler = config.diffusion.timesteps, request.sampler or config.sample.sampler
    # The run's step count is meant for its own sampler: ancestral sampling with a few steps is noise.
    steps = request.steps or (config.sample.steps if sampler == config.sample.sampler else timesteps)
    check_steps(config, steps, "--steps ")
    index = load_index(bucket, dataset_key(config.data.dataset, config.data.size))
    checkpoints = choose(run, request.run, request.checkpoints, index.images, config.train.batch_size)
    if request.checkpoints == "latest":
        with suppress(BadDataError):
            if lost := lost_manifest(run, checkpoints):
                _note(f"{lost}: drawing from the checkpoint before")
    return SamplePlan(bucket, run, index, config, tuple(checkpoints), sampler, steps)


def plan_batches(plan: SamplePlan, request: SampleRequest) -> list[Batch]:
    """What `--count` asks for: a batch of images of each checkpoint. Writes nothing.

    Raises:
        BadDataError: a checkpoint's manifest is damaged.
        BadRequestError: images of another checkpoint, or drawn otherwise, lie where these would.
    """
    config, index, count = plan.config, plan.index, request.count
    assert count is not None
    first_seed, save = request.first_seed or 0, request.save or "shards"
    how = how_drawn(plan.sampler, plan.steps, raw=request.raw, precision=plan.other_precision(request))
    batches = []
    for ref in plan.checkpoints:
        drawing = Drawing(
            checkpoint=ref.key,
            checkpoint_sha256=load_manifest(plan.run, ref).sha256,
            weights="model" if request.raw else "ema",
            sampler=plan.sampler,
            steps=plan.steps,
            spacing=config.sample.spacing,
            eta=config.sample.eta,
            variance=config.sample.variance,
            precision=request.precision or config.train.precision,
            size=index.size,
            channels=index.channels,
            classes=index.classes if config.model.num_classes else (),
            first_seed=first_seed,
            count=count,
            piece_images=piece_images(count),
            save=save,  # type: ignore[arg-type]
        )
        label = label_of(ref.images_seen, index.images, config.train.batch_size)
        name = f"{label}-{how}-{first_seed}-{count}{'-png' if save == 'png' else ''}"
        batch = Batch(plan.run.sub(f"{SAMPLES}/{name}"), drawing)
        batch.check()
        batches.append(batch)
    return batches
