"""What a command finds in the bucket before it begins. Needs no tensors, so errors come at once, and once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddpm.epochs import images_at_epoch
from job.config import RunConfig, changed_for_attempt, check_shape, flatten, validated
from job.config_input import draft
from job.data.shards import DatasetIndex, find_dataset, load_index
from job.exits import BadConfigError, BadRequestError
from job.progress import note_once
from job.requests import TrainRequest
from job.runs import records
from job.runs.checkpoints import MAX_IMAGES_SEEN
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
    bucket = open_store(request.bucket, Retry(away_limit_seconds(), stop, note_once))
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


def follow_dataset(config: RunConfig, index: DatasetIndex) -> RunConfig:
    """Fills in what follows the dataset: size, channels, classes.

    Raises:
        BadConfigError: a value that was set by hand does not fit the dataset, or the network cannot take the size.
    """
    classes = len(index.classes)
    for key, chosen, there in (
        ("data.size", config.data.size, index.size),
        ("data.channels", config.data.channels, index.channels),
        ("model.num_classes", config.model.num_classes or None, classes),
        ("data.dataset_id", config.data.dataset_id or None, index.dataset_id),
    ):
        if chosen is not None and chosen != there:
            raise BadConfigError(f"{key} is {chosen}, but the dataset {index.name}-{index.size} has {there}")
    follows = {
        "data.dataset": index.name,
        "data.dataset_id": index.dataset_id,
        "data.size": index.size,
        "data.channels": index.channels,
        "model.num_classes": classes if config.model.num_classes is None else config.model.num_classes,
    }
    config = validated({**flatten(config.model_dump(mode="json")), **follows}, "configuration")
    check_shape(config)
    return config
