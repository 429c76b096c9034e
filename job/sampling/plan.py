"""What a command that draws finds in the bucket before it begins. Needs no tensors, so that errors come at once."""

from __future__ import annotations

from dataclasses import dataclass

from job.config import OPTIONS_OF, SampleConfig
from job.data.shards import load_index
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.plan import FoundRun
from job.progress import note
from job.requests import SampleRequest
from job.runs import records
from job.runs.checkpoints import choose, load_average, load_manifest, lost_manifest
from job.runs.layout import CheckpointRef
from job.runs.samples import NumberedDrawing, file_words, label_of
from job.sampling.sets import SampleSet, piece_images
from job.stop import NEVER, Stop
from job.store import ObjectMissingError, Retry, Store, open_store
from job.store.retry import away_limit_seconds


@dataclass(frozen=True)
class SamplePlan(FoundRun):
    """A run, and what of it is to be drawn."""

    request: SampleRequest
    sample: SampleConfig
    """The run's own section, but for what the request chose."""
    checkpoints: tuple[CheckpointRef, ...]

    @property
    def precision(self) -> str:
        """What the network computes in."""
        chosen = self.sample.precision
        return self.config.train.precision if chosen == "auto" else chosen

    def label(self, ref: CheckpointRef) -> str:
        """What a checkpoint is called in a picture's name."""
        return label_of(ref.images_seen, self.index.images, self.config.train.batch_size)

    def how(self, seeds: str = "") -> str:
        """All that decides the images of a checkpoint, in a picture's name."""
        how = self.sample.name(self.own)
        return f"{how}-seeds-{file_words(seeds, '_')}" if seeds else how


def plan_sampling(request: SampleRequest, stop: Stop = NEVER) -> SamplePlan:
    """Finds the run and its checkpoints. Writes nothing; `stop` is heard while the bucket is away, now and later.

    Raises:
        MissingInputError: no such run, dataset or checkpoint; the message names those there are.
        BadConfigError: more steps than the run's diffusion has.
        BadRequestError: an option that its sampler does not take.
    """
    bucket = open_store(request.bucket, Retry(away_limit_seconds(), stop, note))
    run = records.run_store(bucket, request.run)
    config = stored = records.existing_config(bucket, request.run)
    try:
        config = records.as_last_changed(run, config)
    except BadDataError as error:
        note(f"{error}; drawing as the run began")
    chosen = request.chosen
    if chosen.get("precision") == config.train.precision:
        chosen["precision"] = "auto"
    if chosen.get("sampler", config.sample.sampler) != config.sample.sampler and chosen["sampler"] == "ddpm":
        # The run's step count is meant for its own sampler: ancestral sampling with a few steps is noise.
        chosen.setdefault("steps", config.diffusion.timesteps)
    sample = config.updated({f"sample.{key}": value for key, value in chosen.items()}).sample
    for option in {key for options in OPTIONS_OF.values() for key in options} & chosen.keys():
        if option not in OPTIONS_OF[sample.sampler]:
            takers = " and ".join(sampler for sampler, options in OPTIONS_OF.items() if option in options)
            raise BadRequestError(f"--{option} is an option of {takers}: leave it out, or choose --sampler")
    index = load_index(bucket, records.dataset_key_of(config))
    checkpoints = choose(run, request.checkpoints, index.images, config.train.batch_size)
    for ref in checkpoints if sample.weights not in ("ema", "model") else ():
        _check_average(run, ref, sample.weights, request.run)
    if request.checkpoints == "latest" and (lost := lost_manifest(run, checkpoints)):
        note(f"{lost}; drawing from the newest checkpoint that is there")
    return SamplePlan(bucket, run, index, config, stored.sample, request, sample, tuple(checkpoints))


def _check_average(run: Store, ref: CheckpointRef, group: str, name: str) -> None:
    """Returns if a checkpoint has this average, or one was made for it.

    Raises:
        MissingInputError: it has none; the message says how to make it.
    """
    manifest = load_manifest(run, ref)
    if group not in manifest.groups:
        try:
            load_average(run, manifest, group)
        except ObjectMissingError:
            averages = ", ".join(there for there in manifest.groups if there not in ("model", "optimizer"))
            raise MissingInputError(
                f"{run.uri}/{ref.key} has no weights {group} (it has {averages}): "
                f"`ddpm ema --run {name} --std {group.removeprefix('ema-')}` makes them, if there are snapshots"
            ) from None


def plan_sets(plan: SamplePlan) -> list[SampleSet]:
    """What `--count` asks for: a set of images of each checkpoint; nothing without it. Writes nothing.

    Raises:
        BadDataError: a checkpoint's manifest is damaged.
        BadRequestError: images of another checkpoint, or drawn otherwise, lie where these would.
    """
    request, count = plan.request, plan.request.count
    if count is None:
        return []
    first_seed, save = request.first_seed or 0, request.save or "shards"
    sets = []
    for ref in plan.checkpoints:
        drawing = NumberedDrawing(
            **plan.sample.drawing.model_copy(update={"precision": plan.precision}).model_dump(),
            checkpoint=ref.key,
            checkpoint_sha256=load_manifest(plan.run, ref).sha256,
            size=plan.index.size,
            channels=plan.index.channels,
            classes=plan.classes,
            first_seed=first_seed,
            count=count,
            piece_images=piece_images(count),
            save=save,  # type: ignore[arg-type]
        )
        name = f"{plan.label(ref)}-{plan.how()}-{first_seed}-{count}{'-png' if save == 'png' else ''}"
        sets.append(SampleSet(plan.run, name, ref, drawing))
        sets[-1].check()
    return sets
