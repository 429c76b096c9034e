"""What a command that draws finds in the bucket before it begins. Needs no tensors, so that errors come at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from job.config import SampleConfig
from job.data.shards import load_index
from job.exits import BadDataError
from job.plan import FoundRun
from job.progress import note
from job.requests import SampleRequest
from job.runs import records
from job.runs.checkpoints import choose, load_manifest, lost_manifest
from job.runs.layout import CheckpointRef
from job.runs.samples import Drawing, how_drawn, label_of
from job.sampling.sets import SampleSet, piece_images
from job.stop import NEVER, Stop
from job.store import Retry, open_store
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
        return self.request.precision or self.config.train.precision

    @property
    def weights(self) -> Literal["ema", "model"]:
        """The group of tensors to draw from."""
        return "model" if self.request.raw else "ema"

    def label(self, ref: CheckpointRef) -> str:
        """What a checkpoint is called in a picture's name."""
        return label_of(ref.images_seen, self.index.images, self.config.train.batch_size)

    def how(self, seeds: str = "") -> str:
        """All that decides the images of a checkpoint, in a picture's name."""
        precision = "" if self.precision == self.config.train.precision else self.precision
        return how_drawn(self.sample.sampler, self.sample.steps, raw=self.request.raw, precision=precision, seeds=seeds)


def plan_sampling(request: SampleRequest, stop: Stop = NEVER) -> SamplePlan:
    """Finds the run and its checkpoints. Writes nothing; `stop` is heard while the bucket is away, now and later.

    Raises:
        MissingInputError: no such run, dataset or checkpoint; the message names those there are.
        BadConfigError: more steps than the run's diffusion has.
    """
    bucket = open_store(request.bucket, Retry(away_limit_seconds(), stop, note))
    run = records.run_store(bucket, request.run)
    config = records.existing_config(bucket, request.run)
    try:
        config = records.as_last_changed(run, config)
    except BadDataError as error:
        note(f"{error}; drawing as the run began")
    sampler = request.sampler or config.sample.sampler
    # The run's step count is meant for its own sampler: ancestral sampling with a few steps is noise.
    steps = request.steps or (config.sample.steps if sampler == config.sample.sampler else config.diffusion.timesteps)
    chosen = {"sampler": sampler, "steps": steps, "batch_size": request.batch_size, "nearest": request.nearest}
    sample = config.updated({f"sample.{key}": value for key, value in chosen.items() if value is not None}).sample
    index = load_index(bucket, records.dataset_key_of(config))
    checkpoints = choose(run, request.checkpoints, index.images, config.train.batch_size)
    if request.checkpoints == "latest" and (lost := lost_manifest(run, checkpoints)):
        note(f"{lost}; drawing from the newest checkpoint that is there")
    return SamplePlan(bucket, run, index, config, request, sample, tuple(checkpoints))


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
    sampling = plan.sample.model_dump(include={"sampler", "steps", "spacing", "eta", "variance"})
    for ref in plan.checkpoints:
        drawing = Drawing(
            checkpoint=ref.key,
            checkpoint_sha256=load_manifest(plan.run, ref).sha256,
            weights=plan.weights,
            **sampling,
            precision=plan.precision,
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
