"""What a command finds in the bucket before it begins. Needs no tensors, so errors come at once, and once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddpm.epochs import images_at_epoch
from job.config import Drawing, RunConfig, changed_for_attempt, draft
from job.data.shards import DatasetIndex, dataset_key, find_dataset, load_index
from job.exits import BadConfigError, BadDataError, BadRequestError, MissingInputError
from job.progress import note
from job.requests import TrainRequest
from job.runs import records
from job.runs.checkpoints import list_checkpoints, sound_manifest
from job.runs.layout import MAX_IMAGES_SEEN
from job.stop import NEVER, Stop
from job.store import Store, open_bucket

if TYPE_CHECKING:
    from job.data.cache import ImageCache


@dataclass(frozen=True)
class RunHandle:
    """A run and its dataset. The stores wait for a bucket that is away."""

    bucket: Store
    run: Store
    index: DatasetIndex | None
    """None for a run that was imported without a dataset."""
    config: RunConfig
    own: Drawing
    """How the run drew when it began: what differs is in the name of a picture."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Those that the network knows; by number where nobody named them."""
        count = self.config.model.num_classes or 0
        return self.index.classes if self.index and count else tuple(map(str, range(count)))

    @property
    def drawing(self) -> Drawing:
        """How images are drawn."""
        return self.config.sample

    @property
    def drawn_classes(self) -> tuple[str, ...]:
        """Those of them that the seeds take in turn."""
        return tuple(self.classes[label] for label in self.drawing.labels) or self.classes

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the pictures that people see."""
        if self.index and (encoding := self.index.encoding):
            return encoding.channels, encoding.size, encoding.size
        return self.config.image_shape

    def pictures(self) -> DatasetIndex | None:
        """The images that people see: of a dataset of latents those that were encoded.

        Raises:
            MissingInputError: they are not there any more.
            BadDataError: others are.
        """
        if self.index is None or (encoding := self.index.encoding) is None:
            return self.index
        index = load_index(self.bucket, dataset_key(encoding.source, encoding.size))
        if index.dataset_id != encoding.source_id:
            raise BadDataError(f"{encoding.source}-{encoding.size} holds others than the images of {self.index.name}")
        return index

    @property
    def dataset_images(self) -> int:
        """Images of an epoch; without a dataset more than a run can see."""
        return self.index.images if self.index else MAX_IMAGES_SEEN + 1

    def opened_images(
        self,
        stop: Stop,
        progress: Callable[[int, int], None] = lambda done, total: None,
        index: DatasetIndex | None = None,
    ) -> ImageCache:
        """A dataset's images, the run's own unless told otherwise, as far as this node's cache holds them."""
        from job.data.cache import default_cache_dir, open_cache

        index, folder = index or self.index, default_cache_dir()
        assert index is not None
        key, size_bytes = dataset_key(index.name, index.size), int(self.config.data.cache_gigabytes * 1e9)
        return open_cache(
            self.bucket, key, index, cache_dir=folder, budget_bytes=size_bytes, progress=progress, stop=stop
        )


def open_run(bucket_uri: str, name: str, stop: Stop = NEVER, *, with_dataset: bool = True) -> RunHandle:
    """A run that is there, as it was last changed, and its dataset; `stop` is heard while the bucket is away.

    Without `with_dataset` one that is not there any more is told, and left out.

    Raises:
        MissingInputError: no such run, or no such dataset.
        BadDataError: its configuration or the dataset's index is damaged.
    """
    bucket = open_bucket(bucket_uri, stop)
    run, config = records.run_store(bucket, name), records.existing_config(bucket, name)
    own = config.sample
    try:
        config = records.as_last_changed(run, config)
    except BadDataError as error:
        note(f"{error}; taking the run as it began")
    index = None
    try:
        index = load_index(bucket, records.dataset_key_of(config)) if config.data.dataset else None
    except (MissingInputError, BadDataError) as error:
        if with_dataset:
            raise
        note(f"going on without the dataset: {error}")
    return RunHandle(bucket, run, index, config, own)


@dataclass(frozen=True)
class Plan(RunHandle):
    """A run before this attempt touches it."""

    index: DatasetIndex
    request: TrainRequest
    changes: dict[str, Any]
    """What this attempt does otherwise than the run's stored configuration says."""
    is_new: bool
    held_out: DatasetIndex | None
    """Images that are not learnt, if the dataset has some and the run looks at them."""

    @property
    def target_images(self) -> int:
        """`images_seen` at which the run is finished."""
        return images_at_epoch(self.config.train.epochs, self.index.images, self.config.train.batch_size)

    @property
    def images_seen(self) -> int:
        """By the newest checkpoint, now."""
        checkpoints = list_checkpoints(self.run)
        return max(checkpoints).images_seen if checkpoints else 0

    def is_finished(self) -> bool:
        """Whether nothing is left to be learnt."""
        status = records.read_status(self.run)
        if status is None or status.state != "finished" or self.images_seen < self.target_images:
            return False
        # One that was lost since then, or is another run's by now, is learnt again.
        return sound_manifest(self.run, max(list_checkpoints(self.run))) is not None


def plan_run(request: TrainRequest, stop: Stop = NEVER, precision: str = "auto") -> Plan:
    """Finds the dataset and the run, and resolves the configuration. Writes nothing.

    A run that exists is the base of its own configuration, so that a newer program's presets cannot change it; what
    its last attempt changed stays changed until somebody says otherwise.
    `stop` is heard while the bucket is away, now and by the plan's stores later. `precision` is what a new run computes
    in where its configuration says `auto`.

    Raises:
        MissingInputError: no such dataset.
        BadConfigError: the configuration does not fit the dataset, or differs from the run's where it matters.
    """
    bucket = open_bucket(request.bucket, stop)
    run = records.run_store(bucket, request.run)
    stored = records.load_config(run)
    if stored is None:
        config = draft(request.preset_name, request.changes)
    elif not stored.data.dataset:
        raise BadRequestError(
            f"run {request.run!r} in {bucket.uri} was imported without a dataset, and can only be drawn from: import "
            f"it once more, under another name, with --dataset {request.dataset}"
        )
    elif stored.data.dataset != request.dataset:
        raise BadRequestError(
            f"run {request.run!r} in {bucket.uri} is about dataset {stored.data.dataset!r}: "
            f"choose another name with --run"
        )
    elif request.preset and request.preset != stored.preset:
        config = draft(request.preset, request.changes)
    else:
        config = records.as_last_changed(run, stored).updated(request.changes)
    index = load_index(bucket, find_dataset(bucket, request.dataset, config.data.size))
    if index.encoding and (chosen := [key for key in ("data.flip", "sample.clip") if request.changes.get(key)]):
        raise BadConfigError(f"{chosen[0]} is about pixels, and {index.name} holds latents: leave it out")
    config = follow_dataset(config, index)
    if config.train.precision == "auto":
        known = stored.train.precision if stored is not None else "auto"
        config = config.updated({"train.precision": precision if known == "auto" else known})
    check_drawing(config)
    if stored is not None and stored.imported and not list_checkpoints(run):
        raise BadDataError(
            f"run {request.run!r} was to begin with an imported checkpoint, and has none: give the same `ddpm import` "
            f"again, or delete it (ddpm runs delete {request.run} --yes)"
        )
    changes = changed_for_attempt(stored, config, request.run) if stored is not None else {}
    own, held_out = (stored or config).sample, None
    if index.held_out and config.log.validate_epochs:
        held_out = load_index(bucket, dataset_key(index.held_out, index.size))
    return Plan(bucket, run, index, config, own, request, changes, stored is None, held_out)


def check_drawing(config: RunConfig) -> None:
    """Returns if a run can draw as its section `sample` says.

    Raises:
        BadConfigError: by weights that it has not, or in a way that a command has to name.
    """
    if config.sample.weights not in (there := ("ema", "model", *config.ema.names)):
        raise BadConfigError(f"sample.weights={config.sample.weights} is none that training has ({', '.join(there)})")
    if config.sample.sampler == "own" or config.sample.grid == "found":
        raise BadConfigError("sample.sampler=own and sample.grid=found are for `ddpm sample`: choose others to train")


def follow_dataset(config: RunConfig, index: DatasetIndex) -> RunConfig:
    """Fills in what follows the dataset: size, channels, classes.

    Raises:
        BadConfigError: a value that was set by hand does not fit the dataset, or the network cannot take the size.
    """
    follows = {
        "data.dataset_id": (config.data.dataset_id or None, index.dataset_id),
        "data.size": (config.data.size, index.size),
        "data.channels": (config.data.channels, index.channels),
        "model.num_classes": (config.model.num_classes or None, len(index.classes)),
    }
    for key, (chosen, there) in follows.items():
        if chosen is not None and chosen != there:
            raise BadConfigError(f"{key} is {chosen}, but the dataset {index.name}-{index.size} has {there}")
    changes = {key: there for key, (_, there) in follows.items()} | {"data.dataset": index.name}
    if config.model.num_classes == 0:
        # A network that is to learn no classes.
        del changes["model.num_classes"]
    if index.encoding:
        # What presets say of pixels means nothing for latents.
        changes |= {"data.latents": True, "sample.clip": False}
        changes |= {"data.flip": False, "data.crop_scale": (1.0, 1.0), "data.augment": 0.0}
    return config.updated(changes)
