"""The plan of a training, from the bucket, before it begins. Planning needs no tensors, so errors come at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ddpm import catalogue
from ddpm.catalogue import EDM2Config, UNetConfig, levels_with_attention
from job.config import EMBEDDED, RunConfig, Start, changed_for_attempt, draft, layered, preset_names
from job.config.schema import image_size
from job.data.reading.order import epochs_completed_by, images_at_epoch
from job.data.shards import DatasetIndex, NoDatasetError, dataset_key, find_dataset, load_index
from job.exits import BadConfigError, BadDataError, BadRequestError, MissingInputError, State
from job.requests import TrainRequest
from job.runs import records
from job.runs.checkpoints import check_average, choose, list_checkpoints, sound_manifest
from job.runs.run import RunHandle
from job.stop import NEVER, Stop
from job.store import Store, open_bucket


@dataclass(frozen=True)
class Plan(RunHandle):
    """A run before this attempt touches it."""

    index: DatasetIndex
    request: TrainRequest
    changes: dict[str, Any]
    """The differences of this attempt from the run's stored configuration."""
    is_new: bool
    held_out: DatasetIndex | None
    """The held-out images, if the dataset has some and the run validates on them."""
    start: Start | None = None
    """How a new run begins, if neither command nor dataset says it."""

    @property
    def target_images(self) -> int:
        """The number of images seen at which the run is finished."""
        return images_at_epoch(self.config.train.epochs, self.index.images, self.config.train.batch_size)

    @property
    def images_seen(self) -> int:
        """The progress of the newest checkpoint, read now."""
        checkpoints = list_checkpoints(self.run)
        return max(checkpoints).images_seen if checkpoints else 0

    def is_finished(self) -> bool:
        """Returns whether the run has reached its last epoch."""
        status = records.read_status(self.run)
        if status is None or status.state != State.FINISHED or self.images_seen < self.target_images:
            return False
        # A checkpoint that was lost, or replaced by one of another run, must be trained again.
        return sound_manifest(self.run, max(list_checkpoints(self.run))) is not None


_NETWORK = ("model.", "network.", "data.channels", "data.latents", "data.augment")
_PROCESS = ("schedule", "timesteps", "prediction", "sigma_data", "variance", "self_conditioning")
_MEANING = (*_NETWORK, *(f"diffusion.{key}" for key in _PROCESS))
"""The beginnings of keys that decide the meaning of weights."""
_NO_MEANING = ("model.num_classes", "model.label_dropout", "model.dropout", "model.gradient_checkpointing")
"""Those among them about no weight, or about the layers of classes alone, which a run can begin anew."""
_LATER = ("condition.channels", "condition.vector", "condition.noise")
"""Those that a network may get after its parent."""
_IF_ANY = ("data.augment", "condition.noise")
_SAMPLER = ("sampler", "steps", "grid", "shift", "eta", "order", "churn", "variance", "clip")
_OF_PARENT = ("model.", "network.", "condition.", "diffusion.", "data.augment", *(f"sample.{key}" for key in _SAMPLER))
"""The beginnings of keys that a run takes from its parent."""
_OWN = ("model.num_classes", "condition.channels", "condition.vector", "train.precision", "train.freeze")
"""Keys that it never takes."""
_INPUTS = ("model.num_classes", "condition.derive", *_LATER)
"""Keys of a network's inputs, on which it must agree with its teacher."""
_OPEN = (None, "auto")
"""Values that leave a setting to the machine."""


def _begun(bucket: Store, request: TrainRequest) -> RunConfig:
    """Returns the configuration of a new run that begins with the weights of a parent, which it pins.

    Optimiser and averages are the parent's only if the dataset has no preset: a learning rate goes with a network. The
    levels of the network that have attention keep it, whatever the size of the images.

    Raises:
        MissingInputError: no such run, checkpoint or weights.
        BadConfigError: the weights do not fit the network; the message lists all differences.
    """
    changes = request.changes
    at, name = records.place_of_run(bucket, changes["parent.run"])
    parent, run = records.existing_config(at, name), records.run_store(at, name)
    records.check_network_named(run, parent)
    images, batch_size, size = records.dataset_images_of(at, parent), parent.train.batch_size, parent.data.size
    (ref,) = choose(run, str(changes.get("parent.epoch", "latest")), images, batch_size)
    pinned: dict[str, Any] = {"parent.checkpoint": str(ref)}
    pinned["parent.sha256"] = check_average(run, ref, changes["parent.weights"], name).sha256
    if "parent.epoch" not in changes and (ended := epochs_completed_by(ref.images_seen, images, batch_size)):
        pinned["parent.epoch"] = ended[-1]
    try:
        chosen = image_size(changes["data.size"]) if changes.get("data.size") else None
    except ValueError as error:
        raise BadConfigError(f"configuration: data.size: {error}") from None
    try:
        index, theirs = load_index(bucket, find_dataset(bucket, request.dataset, chosen)), parent.flat()
    except NoDatasetError as error:
        # It is to be packed for the network of the parent.
        raise NoDatasetError(str(error), None if parent.data.latents else chosen or size) from None
    _check_latents(at, parent, index)
    if isinstance(parent.model, UNetConfig | EDM2Config):
        levels, shorter = levels_with_attention(parent.model, size), min(index.size.shape)
        theirs["model.attention_sizes"] = [shorter // 2**level for level, has_one in enumerate(levels) if has_one]
    is_conditioned = changes.get("condition.derive", theirs["condition.derive"]) or index.is_conditioned
    if (not index.classes or changes.get("model.num_classes") == 0) and not is_conditioned:
        theirs["model.label_dropout"] = 0.0
    keys = _OF_PARENT if request.preset_name("") else (*_OF_PARENT, "train.", "ema.")
    taken = {key: value for key, value in theirs.items() if key.startswith(keys) and key not in _OWN}
    if not changes.get("model.label_dropout", theirs["model.label_dropout"]):
        # The preset's guidance is for networks that have learnt images without their class.
        taken["sample.guidance"] = 1.0
    preset = request.preset_name(parent.preset if parent.preset in preset_names() else EMBEDDED)
    config = follow_dataset(draft(preset, layered(taken, changes)), index)
    ours = config.flat()
    before, now = _meaning(theirs), _meaning(ours)
    # A condition may come later: its weights begin at zero.
    changed = [key for key in now if before.get(key) != now[key] and (key not in _LATER or before.get(key))]
    if differing := {key: f"{key}: {theirs.get(key)} → {ours[key]}" for key in changed}:
        others = differing.get("model.kind") or "; ".join(differing.values())
        fit = f"the weights of {changes['parent.run']} fit another network ({others})"
        channels = f", or pack the images with --channels {theirs['data.channels']}" * ("data.channels" in differing)
        raise BadConfigError(f"{fit}: leave out these settings, or --from{channels}")
    if config.consistency.guidance != 1:
        _check_teacher(at, parent, config, index)
    return config.updated(pinned)


def _check_teacher(at: Store, parent: RunConfig, config: RunConfig, index: DatasetIndex) -> None:
    """Checks that a parent can guide a run: it denoises with the same inputs, and without them.

    Raises:
        BadConfigError: it cannot; or its classes or numbers mean something else, which training would not mend.
        MissingInputError: its dataset is gone.
    """
    theirs, ours, name = parent.flat(), config.flat(), config.parent.run
    needs = f"consistency.guidance={config.consistency.guidance:g} needs a parent that denoises with"
    unfit = {key: theirs.get(key) for key in _INPUTS if (theirs.get(key) or 0) != (ours[key] or 0)}
    unfit |= {} if parent.model.label_dropout else {"model.label_dropout": 0}
    unfit |= {"diffusion.objective": "consistency"} if parent.diffusion.objective == "consistency" else {}
    if unfit:
        its = ", ".join(f"{key}={value}" for key, value in unfit.items())
        raise BadConfigError(f"{needs} the run's classes and conditions, and without them: {name} has {its}")
    is_same = parent.data.dataset_id == index.dataset_id or not parent.data.dataset
    learnt = index if is_same else load_index(at, records.dataset_key_of(parent))
    labels = [(of.classes, of.vector_names, of.vector_mean, of.vector_std) for of in (learnt, index)]
    if labels[0] != labels[1] or learnt.dataset_id not in (index.dataset_id, parent.data.dataset_id):
        raise BadConfigError(f"{needs} the classes and numbers of {index.name}: those of {learnt.name} are others")
    if parent.data.classes not in ((), index.classes):
        raise BadConfigError(f"{needs} the classes of {index.name}: {name} has {', '.join(parent.data.classes)}")


def _check_latents(at: Store, parent: RunConfig, index: DatasetIndex) -> None:
    """Checks that latents are of the autoencoder whose latents the parent learnt, if its dataset is still there.

    Raises:
        BadConfigError: they are of another one.
    """
    if index.encoding and parent.data.latents:
        with suppress(MissingInputError):
            learnt = load_index(at, records.dataset_key_of(parent)).encoding
            if learnt and learnt.hashes != index.encoding.hashes:
                others = f"{index.name} holds latents of another autoencoder than {parent.data.dataset}"
                raise BadConfigError(f"{others}, which the parent learnt: encode the images with that one")


def _meaning(values: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides the meaning of weights, by key; of `_IF_ANY` that is whether the network knows of it."""
    meant = {key: value for key, value in values.items() if key.startswith(_MEANING) and key not in _NO_MEANING}
    if sizes := meant.get("model.attention_sizes"):
        # Their order means nothing.
        meant["model.attention_sizes"] = sorted(sizes)
    return meant | {key: values.get(key) for key in _LATER} | {key: values[key] > 0 for key in _IF_ANY}


def _asked_for(bucket: Store, request: TrainRequest, run: Store, stored: RunConfig | None) -> RunConfig:
    """Returns the configuration that a request asks for, before the dataset is known; `stored` is that of its run.

    Raises:
        BadRequestError: the run has another dataset, or none.
    """
    if stored is None:
        if request.from_ is not None:
            return _begun(bucket, request)
        return draft(request.preset_name(), request.defaults | request.changes)
    if stored.data.dataset != request.dataset:
        theirs = f"has the dataset {stored.data.dataset!r}" if stored.data.dataset else "was imported without a dataset"
        remedy = "choose another --run" if stored.data.dataset else f"import it anew with --dataset {request.dataset}"
        raise BadRequestError(f"run {request.run!r} ({run.uri}) {theirs}: {remedy}")
    if request.preset and request.preset != stored.preset:
        return draft(request.preset, request.changes)
    return records.as_last_changed(run, stored).updated(request.changes)


def plan_run(
    request: TrainRequest,
    stop: Stop = NEVER,
    suited: Callable[[int], dict[str, Any]] | None = None,
    gpu_gib: Callable[[], float] = float,
) -> Plan:
    """Finds the dataset and the run, and resolves the configuration. Writes nothing.

    Presets of a newer program cannot change a run, whose stored configuration is the base. The changes of the last
    attempt stay until an option replaces them.

    Args:
        request: the options of `ddpm train`.
        stop: ends a wait for the bucket, now and later by the plan's stores.
        suited: returns, for a batch size, the settings that suit this machine, by key: for what the run leaves open. A
            new run keeps them.
        gpu_gib: returns the memory in GiB of this machine's smallest GPU; 0 without one.

    Raises:
        MissingInputError: no such dataset.
        BadConfigError: the configuration does not fit the dataset, or differs from the run's where it matters.
    """
    bucket = open_bucket(request.bucket, stop)
    run = records.run_store(bucket, request.run)
    stored = records.load_config(run)
    if stored:
        records.check_network_named(run, stored)
    config = _asked_for(bucket, request, run, stored)
    index = load_index(bucket, find_dataset(bucket, request.dataset, config.data.size))
    if stored is not None and index.size != stored.data.size:
        learns, name = f"learns {request.dataset} at {stored.data.size} pixels", f"{request.run}-{index.size}"
        raise BadConfigError(f"run {request.run!r} {learns}, not {index.size}: type --run {name} (make: RUN={name})")
    if index.encoding and (chosen := [key for key in ("data.flip", "sample.clip") if request.changes.get(key)]):
        raise BadConfigError(f"{chosen[0]} needs pixels, and {index.name} holds latents: leave it out")
    start = None
    if stored is None and not (request.from_ or request.preset_name("")):
        # A network of the user takes no row, and a mirrored letter is wrong for it as well.
        start = None if request.network else Start.of(gpu_gib(), index.size, index.images)
        of_start = start.set if start else {"data.flip": False}
        config = draft(start.preset if start else EMBEDDED, request.defaults | request.changes, of_start)
    config = follow_dataset(config, index)
    if stored is None and config.diffusion.objective == "consistency":
        config = config.updated({**_in_few_steps(config, index), **request.changes})
    if suited:
        before, now = stored.flat() if stored else {}, config.flat()
        suits = {key: value for key, value in suited(config.train.batch_size).items() if now[key] in _OPEN}
        # The micro-batch is free: a person who types auto for a run of a fixed one lacks memory.
        kept = {key: before.get(key) for key in suits.keys() - {"train.micro_batch_size"}}
        config = config.updated(suits | {key: value for key, value in kept.items() if value not in _OPEN})
    check_sampling(config)
    if config.consistency.guidance != 1 and not config.has_teacher:
        raise BadConfigError(f"consistency.guidance={config.consistency.guidance:g} needs a parent: type --from RUN")
    if stored is not None and stored.imported and not list_checkpoints(run):
        raise BadDataError(f"run {request.run!r} lacks its imported checkpoint: type the same `ddpm import` again")
    changes = changed_for_attempt(stored, config, request.run) if stored is not None else {}
    validates = index.held_out and config.log.validate_epochs
    held_out = load_index(bucket, dataset_key(index.held_out, index.size)) if validates else None
    return Plan(
        bucket,
        run,
        index,
        config,
        stored or config,
        request=request,
        changes=changes,
        is_new=stored is None,
        held_out=held_out,
        start=start,
    )


def _in_few_steps(config: RunConfig, index: DatasetIndex) -> dict[str, Any]:
    """Returns the settings of a new run that learns to sample in few steps: those of its parent are for many.

    At the rate of the parent a network forgets more than it learns.
    """
    images = images_at_epoch(config.train.epochs, index.images, config.train.batch_size)
    sampling: dict[str, Any] = {"sample.sampler": "consistency", "sample.grid": "renoise", "sample.steps": 2}
    if config.consistency.guidance != 1:
        # It would act twice.
        sampling["sample.guidance"] = 1.0
    rate = {"train.learning_rate": config.train.learning_rate / 6}
    return sampling | rate | {"consistency.stage_images": max(1, images // catalogue.STAGES)}


def check_sampling(config: RunConfig) -> None:
    """Checks that training can sample with the section `sample`.

    Raises:
        BadConfigError: the run has no such weights, or the setting works only with `ddpm sample`.
    """
    if config.sample.weights not in (there := ("ema", "model", *config.ema.names)):
        raise BadConfigError(f"sample.weights={config.sample.weights}: training has only {', '.join(there)}")
    if config.sample.sampler == "own" or config.sample.grid == "found":
        raise BadConfigError("sample.sampler=own and sample.grid=found are for `ddpm sample`: choose others to train")


def follow_dataset(config: RunConfig, index: DatasetIndex) -> RunConfig:
    """Fills in the settings that the dataset decides: size, channels, classes.

    Raises:
        BadConfigError: a setting of the user does not fit the dataset, or the network cannot take the size.
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
    changes = {key: there for key, (_, there) in follows.items()}
    changes |= {"data.dataset": index.name, "data.classes": (), "data.bits": index.bits}
    derive, channels = config.condition.derive, index.condition_channels
    if derive and channels:
        raise BadConfigError(f"condition.derive={derive}: {index.name} has condition images of its own: leave it out")
    changes["condition.channels"] = config.condition.channels_of(index.channels) if derive else channels
    changes["condition.vector"] = len(index.vector_names)
    # Another filter than that of packing would mix the values of a mask.
    changes["condition.resize_filter"] = index.condition_filter or "bicubic"
    if config.model.num_classes == 0:
        # The user asked for a network without classes.
        del changes["model.num_classes"]
    if index.encoding:
        # Presets have settings for pixels, which would be errors for latents.
        changes |= {"data.latents": True, "sample.clip": False}
        changes |= {"data.flip": False, "data.crop_scale": (1.0, 1.0), "data.augment": 0.0}
        # `Latents` have the deviation 1.
        changes["diffusion.sigma_data"] = config.diffusion.model_dump(exclude_unset=True).get("sigma_data", 1.0)
    return config.updated(changes)
