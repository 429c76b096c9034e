"""Checkpoints in a bucket: their commit, choice, verification and loading, and the names of their files for diffusers.

    RUN/checkpoints/{fence:06d}-{images_seen:012d}/model-00.safetensors …     uploaded first, under a fresh prefix
                                                   unet/diffusion_pytorch_model.safetensors   the weights to sample with
                                                   unet/config.json                 the arguments of its UNet2DModel
                                                   scheduler/scheduler_config.json  the process, and the run's sampler
                                                   model_index.json                 the class of its pipeline
                                                   id2label.json                    the names of the classes, by number
                                                   condition.json                   the settings of its condition
                                                   run_config.yaml                  the configuration, as last changed
                                                   MANIFEST.json              created once, last: the commit
                                                   averages/ema-0.13.json …   made by `ddpm ema`: `averages.py`
    RUN/LATEST                                                                the last commit, a hint

A checkpoint exists when its manifest does. The newest is the one with the highest (fence, images seen) whose objects
verify: a replaced writer that still runs has a lower fence, and its checkpoints never win. `LATEST` only reveals the
loss of a manifest.

A checkpoint has `unet/` if diffusers has such a network, the scheduler if it has such a process, and `model_index.json`
if one of its pipelines can sample from both. None takes a class: exports bring code of their own for that. The names of
classes have the form of the hub's label files (huggingface/label-files), which DiTPipeline takes. They and the
configuration are files of their own, because diffusers warns at each load of keys that it does not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NamedTuple

from pydantic import Field

from ddpm import catalogue
from job.config import RunConfig
from job.coordination.sealed import NamedObject, RecordPart, Sealed
from job.data.reading.order import epochs_completed_by
from job.exits import BadConfigError, BadDataError, MissingInputError
from job.progress import note
from job.runs.layout import CHECKPOINTS, CheckpointRef, ObjectKind, located, places_in
from job.runs.records import readable_attempt
from job.store import ObjectMissingError, Store
from job.store.files import scratch_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

LATEST_KEY = ObjectKind.LATEST.value
PARALLEL_DOWNLOADS = 4
FORMAT_VERSION = "0.36.0"
"""The version of diffusers that knows all these settings."""

WEIGHTS = "unet/diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
ID2LABEL = "id2label.json"
RUN_CONFIG = "run_config.yaml"
CONDITION = "condition.json"
PIPELINE_CODE = "pipeline.py"
UNET_CONFIG, SCHEDULER_CONFIG = "unet/config.json", "scheduler/scheduler_config.json"


class Segment(RecordPart):
    """The rows of the metrics of consecutive saves; see `metric_rows.py`."""

    saves: int = Field(ge=1)
    rows: NamedObject
    events: NamedObject
    """The same for TensorBoard."""


class Manifest(Sealed):
    """The content of `MANIFEST.json`, whose existence is the commit of a checkpoint."""

    format: int = Field(default=3, ge=3, le=3)
    fence: int = Field(ge=1)
    attempt: str
    """The id of the attempt that wrote it; no other run has it."""
    images_seen: int = Field(ge=0)
    loss_sums: list[list[float]]
    """The sums of losses for the next row of the metrics."""
    lineage: tuple[Annotated[str, Field(pattern=r"^\d{6}-\d{12}$")], ...] = ()
    """The checkpoints from which this attempt and those before it resumed, by name, oldest first."""
    files: tuple[NamedObject, ...]
    unet_group: str = ""
    """The group of weights in `unet/`, such as `ema`; empty if diffusers lacks the network."""
    segments: tuple[Segment, ...] = ()
    """The run's metrics up to here, in order."""
    snapshots: tuple[NamedObject, ...] = ()
    """All snapshots of the run up to here: power-function averages in half precision, for `ddpm ema`."""

    @property
    def ref(self) -> CheckpointRef:
        """Returns the name of its checkpoint."""
        return CheckpointRef(self.fence, self.images_seen)

    @property
    def metrics(self) -> tuple[NamedObject, ...]:
        """Returns the objects of the run's metrics up to here, in order."""
        return tuple(named for segment in self.segments for named in (segment.rows, segment.events))

    @property
    def objects(self) -> dict[str, str]:
        """Returns the SHA-256 of each object that it names, by key."""
        return {named.key: named.sha256 for named in (*self.files, *self.metrics, *self.snapshots)}

    @property
    def groups(self) -> tuple[str, ...]:
        """Returns the groups of its tensors: `model`, `optimizer` and the averages."""
        return tuple(dict.fromkeys(filter(None, map(self.group_of, self.files))))

    def bytes_of(self, group: str) -> int:
        """Returns the size of a group's files."""
        return sum(file.size_bytes for file in self.files if self.group_of(file) == group)

    def group_of(self, file: NamedObject) -> str:
        """Returns the group of a file's tensors: `model`, `optimizer` or an average such as `ema`; else empty."""
        place = located(file.key)
        is_in_unet = place.kind is ObjectKind.PIPELINE and file.key.endswith(".safetensors")
        return self.unet_group if is_in_unet else place.group


class AverageRecord(Sealed):
    """The record of an average that `ddpm ema` made for a checkpoint; its existence is the commit."""

    std: float
    made_of: int = Field(ge=1)
    """The number of stored averages that it combines."""
    error: float
    """See `ddpm.ema.reconstruct`."""
    files: tuple[NamedObject, ...]


class Latest(Sealed):
    """The content of `LATEST`, which is written after the manifest and so may still name the checkpoint before."""

    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")


def commit_manifest(run: Store, manifest: Manifest) -> None:
    """Commits a checkpoint: creates its manifest, once all its objects are there."""
    run.create(manifest.ref.manifest_key, manifest.to_json())
    run.put(LATEST_KEY, Latest(checkpoint=manifest.ref.key).to_json())


def list_checkpoints(run: Store) -> list[CheckpointRef]:
    """Returns all committed checkpoints, oldest first."""
    places = places_in(run, CHECKPOINTS).values()
    return sorted(place.checkpoint for place in places if place.kind is ObjectKind.MANIFEST)


def by_progress(refs: list[CheckpointRef]) -> dict[int, CheckpointRef]:
    """Returns a checkpoint for each `images_seen`, in order: that of the newest attempt, if several made one."""
    newest = {ref.images_seen: ref for ref in sorted(refs)}
    return dict(sorted(newest.items()))


def load_manifest(run: Store, ref: CheckpointRef) -> Manifest:
    """Reads a manifest and checks it against its own hash, its place, and the attempt that should have written it.

    Raises:
        BadDataError: it is corrupt, or was written for another place or by another run.
        ObjectMissingError: it is gone.
    """
    manifest = Manifest.load(run, ref.manifest_key)
    attempt = readable_attempt(run, ref.fence)
    if manifest.ref != ref or (attempt and attempt.id != manifest.attempt):
        raise BadDataError(f"{run.uri_of(ref.manifest_key)} was not written by attempt {ref.fence} of this run")
    return manifest


def lost_manifest(run: Store, refs: list[CheckpointRef]) -> str:
    """Returns a problem if `LATEST` is corrupt or names a checkpoint newer than all of `refs`; else an empty text."""
    try:
        ref = CheckpointRef.parse(Latest.load(run, LATEST_KEY).checkpoint.removeprefix(f"{CHECKPOINTS}/"))
    except ObjectMissingError:
        return ""
    except BadDataError as error:
        return str(error)
    # An older one was deleted by the rules, after an attempt was killed between its manifest and `LATEST`.
    if (refs and ref <= max(refs)) or run.exists(ref.manifest_key):
        return ""
    return f"{run.uri_of(ref.manifest_key)} is missing, though {run.uri_of(LATEST_KEY)} names it"


def sound_manifest(run: Store, ref: CheckpointRef) -> Manifest | None:
    """Returns a checkpoint's manifest, if it is sound and the files have the sizes in it; does not read the files."""
    with suppress(BadDataError, ObjectMissingError):
        manifest = load_manifest(run, ref)
        sizes = {entry.key: entry.size_bytes for entry in run.list(ref.key)}
        if all(sizes.get(file.key) == file.size_bytes for file in manifest.files):
            return manifest
    return None


def newest_sound(run: Store, refs: list[CheckpointRef]) -> Manifest | None:
    """Returns the manifest of the newest of these checkpoints whose manifest is sound."""
    return next((manifest for ref in sorted(refs, reverse=True) if (manifest := sound_manifest(run, ref))), None)


def newest_good(
    run: Store, aside: set[CheckpointRef] | None = None, into: dict[str, dict[str, Any]] | None = None
) -> Manifest | None:
    """Returns the manifest of the newest checkpoint whose every file verifies, to go on from; None in a new run.

    Damaged ones are reported, and added to `aside`. Damaged metrics do not matter here: see `read_rows`. For `into` see
    `restore`; after an error these tensors may have values of damaged checkpoints.

    Raises:
        BadDataError: there are checkpoints, but none of them verifies.
        BadConfigError: the newest that verifies does not fit `into`; an older one would lose work.
    """
    refs, problems = list_checkpoints(run), list[str]()
    if lost := lost_manifest(run, refs):
        problems.append(lost)
        note(f"{lost}; the manifests that are there tell which checkpoint is the newest")
    for ref in reversed(refs):
        try:
            return restore(run, ref, into).manifest
        except (BadDataError, ObjectMissingError) as error:
            problems.append(str(error))
            note(f"set aside checkpoint {run.uri}/{ref.key}: {error}")
            if aside is not None:
                aside.add(ref)
    if problems:
        raise BadDataError(
            f"no checkpoint of {run.uri} can be used: {'; '.join(problems)}. Restore one of them, or start another "
            "run with --run NAME"
        )
    return None


def load_weights(run: Store, ref: CheckpointRef, group: str, network: nn.Module) -> None:
    """Copies weights of a checkpoint, such as `ema` or `model`, into a network; see `restore`."""
    restore(run, ref, {group: {name: parameter.detach() for name, parameter in network.named_parameters()}})


def restore(
    run: Store,
    ref: CheckpointRef,
    into: dict[str, dict[str, Any]] | None = None,
    *,
    may_differ: tuple[str, ...] = ("loss_scale",),
    may_grow: tuple[str, ...] = (),
    groups: tuple[str, ...] = (),
    folder: Path | None = None,
) -> Restored:
    """Downloads and verifies a checkpoint, or some of its groups.

    A group that is not in the checkpoint itself is an average that was made for it later.

    Args:
        run: the run's folder.
        ref: the checkpoint.
        into: live tensors by group and name, which keep their memory layout. Each file's values go there as soon as
            it verifies, while others still download.
        may_differ: the beginnings of the names of tensors that may be on one side alone, or have another shape there:
            these keep their values. An import has no loss scale, and may go on in fp16.
        may_grow: the names of tensors that may have more inputs, dimension 1, than in the checkpoint: zeros there.
        groups: those to download; none: those of `into`, or all.
        folder: keeps the files; without it each is deleted as soon as it is read.

    Raises:
        BadDataError: it is damaged, or another run's; the message names the object.
        BadConfigError: names or shapes differ from those in `into`.
        ObjectMissingError: the bucket lacks this average.
    """
    manifest, groups = load_manifest(run, ref), groups or tuple(into or ())
    # Descriptions for diffusers have no group: their damage must not stop a resume.
    wanted = [(file, group) for file in manifest.files if (group := manifest.group_of(file))]
    wanted = [(file, group) for file, group in wanted if not groups or group in groups]
    for group in set(groups) - {*manifest.groups}:
        wanted += [(file, group) for file in load_average(run, ref, group).files]
    files, unfit = dict[str, list[Path]](), {group: set(named) for group, named in (into or {}).items()}
    with scratch_folder("restore") as scratch, ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:

        def fetch(named: NamedObject) -> Path:
            path, uri = (folder or scratch) / named.name, run.uri_of(named.key)
            try:
                sha256 = run.download(named.key, path)
            except ObjectMissingError:
                raise BadDataError(f"{uri} is missing, though its manifest is there") from None
            if sha256 != named.sha256:
                raise BadDataError(f"{uri} is corrupt: its SHA-256 is not the one in the manifest")
            return path

        paths = pool.map(fetch, (file for file, _ in wanted))
        for (file, group), path in zip(wanted, paths, strict=True):
            if into is not None:
                _fill(path, file.key, into[group], unfit[group], may_grow)
            if folder:
                files.setdefault(group, []).append(path)
            else:
                path.unlink()
    differing = set[str]().union(*unfit.values())
    if strangers := [name for name in differing if not name.startswith(may_differ)]:
        raise BadConfigError(
            f"{ref.key}: tensor {min(strangers)!r} does not fit this configuration: use the version of the program "
            "that the run's last attempt names"
        )
    return Restored(manifest, files, differing)


def load_average(run: Store, ref: CheckpointRef, group: str) -> AverageRecord:
    """Returns the record of an average that was made for a checkpoint.

    Raises:
        BadDataError: it is corrupt.
        ObjectMissingError: the bucket lacks it.
    """
    return AverageRecord.load(run, ObjectKind.AVERAGE.key(checkpoint=ref, group=group))


def check_average(run: Store, ref: CheckpointRef, group: str, name: str) -> Manifest | AverageRecord:
    """Returns the record that names the files of these weights: a checkpoint's manifest, or an average's made later.

    Raises:
        MissingInputError: neither has them; the message says how to make them.
    """
    manifest = load_manifest(run, ref)
    if group in manifest.groups:
        return manifest
    try:
        return load_average(run, ref, group)
    except ObjectMissingError:
        averages = ", ".join(there for there in manifest.groups if there not in ("model", "optimizer", "teacher"))
        raise MissingInputError(
            f"{run.uri}/{ref.key} has no weights {group} (it has {averages}): "
            f"`ddpm ema --run {name} --std {group.removeprefix('ema-')}` makes them, if there are snapshots"
        ) from None


def sha256_of(file: BinaryIO) -> str:
    """Returns the SHA-256 of the rest of a file."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
        manifest: its manifest.
        files: its files in the folder that keeps them, by group.
        differing: the names of tensors that were on one side alone, or have another shape there; see `restore`.
    """

    manifest: Manifest
    files: dict[str, list[Path]]
    differing: set[str]


def _fill(path: Path, key: str, tensors: dict[str, Any], unfit: set[str], may_grow: tuple[str, ...] = ()) -> None:
    """Copies the values of a file into live tensors; takes their names out of `unfit`, and adds those that it lacks."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                target, value = tensors.get(name), file.get_tensor(name)
                if target is not None and name in may_grow and target.shape != value.shape:
                    target, whole = target[:, : value.shape[1]], target
                    whole[:, value.shape[1] :] = 0
                if target is not None and target.shape == value.shape:
                    target.copy_(value)
                    unfit.discard(name)
                else:
                    unfit.add(name)
    except SafetensorError as error:
        raise BadDataError(f"{key} holds no tensors ({error})") from None


def choose(run: Store, wanted: str, dataset_images: int, batch_size_images: int) -> list[CheckpointRef]:
    """Returns the checkpoints that a person asked for: `latest`, `all`, or epochs such as `30,80,490`.

    Raises:
        MissingInputError: the run lacks one of them; the message lists the epochs of the others.
        BadDataError: the run has lost all its checkpoints.
    """
    refs = by_progress(list_checkpoints(run))
    if lost := "" if refs else lost_manifest(run, []):
        # Meanwhile training may have committed its first checkpoints, and retired the one in `LATEST`.
        refs = by_progress(list_checkpoints(run))
    if not refs:
        if lost:
            raise BadDataError(f"{run.uri} has no checkpoint any more: {lost}")
        raise MissingInputError(f"{run.uri} has no checkpoint yet: train it first")
    if wanted == "latest":
        return [max(refs.values())]
    if wanted == "all":
        return list(refs.values())
    ends = {
        epoch: ref
        for images_seen, ref in refs.items()
        for epoch in epochs_completed_by(images_seen, dataset_images, batch_size_images)
    }
    try:
        return list(dict.fromkeys(ends[int(epoch)] for epoch in wanted.split(",")))
    except KeyError as error:
        there = ", ".join(map(str, sorted(ends))) or "none that ends an epoch; use latest"
        raise MissingInputError(
            f"{run.uri} has no checkpoint of epoch {error}: not kept or not reached (there are: {there})"
        ) from None


class Described(NamedTuple):
    """The description of a run for diffusers."""

    objects: dict[str, bytes]
    """The objects beside the weights, by key below the checkpoint; empty if diffusers lacks the network."""
    lacking: str
    """The reason why they do not make a whole pipeline; empty if they do."""


def described(config: RunConfig, classes: tuple[str, ...], has_code: bool = False) -> Described:
    """Returns the objects beside the weights of a run.

    Args:
        config: of the run.
        classes: names of its classes.
        has_code: whether `job.exchange.class_pipeline`, which takes classes, lies beside them.
    """
    from ddpm import interop

    model, diffusion, sample = config.model, config.diffusion, config.sample
    if not isinstance(model, catalogue.UNetConfig):
        return Described({}, f"model.kind={model.kind} is not a network that diffusers samples from")
    if config.condition.vector or config.condition.noise:
        which = "vector" if config.condition.vector else "noise"
        return Described({}, f"diffusers' UNet2DModel has no input for condition.{which}")
    channels, *_ = config.image_shape
    values: dict[str, dict[str, Any]] = {}
    lacking = ""
    try:
        values[UNET_CONFIG] = interop.unet2d_config(
            model,
            image_size=config.image_size,
            in_channels=channels * (1 + diffusion.self_conditioning) + config.condition.channels,
            out_channels=channels * (1 + diffusion.learns_variance),
            num_classes=(model.num_classes or 0) + bool(model.num_classes and model.label_dropout),
        )
        scheduler = interop.scheduler_config(diffusion, sample)
        values[SCHEDULER_CONFIG] = scheduler
        kind = scheduler["_class_name"]
        # The loop of DDPM's takes the steps of any scheduler.
        pipeline = "DDIMPipeline" if kind == "DDIMScheduler" else "DDPMPipeline"
        if config.data.latents:
            lacking = f"{pipeline} samples pixels, and the network latents"
        elif config.data.bits != 8 or channels not in (1, 3):
            lacking = f"{pipeline} makes 8 bits in 1 or 3 channels"
        elif diffusion.self_conditioning:
            lacking = f"{pipeline} does not feed the network its own estimate (diffusion.self_conditioning)"
        elif config.condition.channels:
            lacking = f"{pipeline} does not take a condition image"
        elif model.num_classes and not has_code:
            lacking = f"{pipeline} does not take a class"
        else:
            values["model_index.json"] = {
                "_class_name": ["pipeline", "ClassConditionalPipeline"] if model.num_classes else pipeline,
                "scheduler": ["diffusers", kind],
                "unet": ["diffusers", "UNet2DModel"],
            }
    except interop.NoCounterpartError as error:
        lacking = str(error)
    version = {"_diffusers_version": FORMAT_VERSION}
    objects = {key: _json(dict(sorted((version | value).items()))) for key, value in values.items()}
    return Described(objects and objects | of_run(config, classes), lacking)


def of_run(config: RunConfig, classes: tuple[str, ...]) -> dict[str, bytes]:
    """Returns the objects with the settings of a run and the names of its classes, by key."""
    without_names = config.data.model_copy(update={"classes": ()})
    settings = {RUN_CONFIG: config.model_copy(update={"data": without_names}).to_yaml().encode()}
    if config.is_conditioned:
        settings[CONDITION] = _json(config.condition.model_dump())
    return settings | ({ID2LABEL: _json({str(i): name for i, name in enumerate(classes)})} if classes else {})


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def weights_names(parts: int) -> list[str]:
    """Returns diffusers' names for this number of weight files."""
    if parts == 1:
        return [f"{WEIGHTS}.safetensors"]
    return [f"{WEIGHTS}-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]


def weights_index(size_bytes: int, names: dict[str, str]) -> bytes:
    """Returns the JSON object that maps each tensor's name to its file, for weights in several files."""
    return _json({"metadata": {"total_size": size_bytes}, "weight_map": names})


def files_for_diffusers(
    config: RunConfig, classes: tuple[str, ...], parts: Mapping[str, Mapping[str, Tensor]]
) -> tuple[str, dict[str, str], dict[str, bytes]]:
    """Names the parts with the weights to sample with, and describes them.

    Args:
        config: of the run.
        classes: names of its classes.
        parts: all tensors of a checkpoint by part, each named after its group: `ema-00.safetensors`.

    Returns:
        The group of these weights, empty if diffusers lacks the network; their files below the checkpoint, by part; the
        objects beside them, by key below the checkpoint.
    """
    descriptions = described(config, classes).objects
    group = config.sample.weights if descriptions else ""
    weights = {part: tensors for part, tensors in parts.items() if group and part.rpartition("-")[0] == group}
    names = dict(zip(weights, weights_names(len(weights)), strict=True))
    if len(weights) > 1:
        where = {tensor: names[part].rpartition("/")[2] for part, tensors in weights.items() for tensor in tensors}
        size_bytes = sum(tensor.nbytes for tensors in weights.values() for tensor in tensors.values())
        descriptions[INDEX] = weights_index(size_bytes, where)
    return group, names, descriptions
