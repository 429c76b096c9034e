"""What a command that draws finds in the bucket before it begins. Needs no tensors, so that errors come at once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from job.config import RunConfig, check_steps
from job.data.shards import DatasetIndex, dataset_key, load_index
from job.exits import BadDataError
from job.progress import note_once
from job.requests import SampleRequest
from job.runs import records
from job.runs.checkpoints import CheckpointRef, choose, load_manifest, lost_manifest
from job.sampling.names import SAMPLES, how_drawn, label_of
from job.sampling.pieces import Batch, Drawing, piece_images
from job.stop import NEVER, Stop
from job.store import Store, open_store
from job.store.retry import Retry, away_limit_seconds


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
    bucket = open_store(request.bucket, Retry(away_limit_seconds(), stop, note_once))
    run = records.run_store(bucket, request.run)
    config = records.existing_config(bucket, request.run)
    try:
        config = records.as_last_changed(run, config)
    except BadDataError as error:
        note_once(f"{error}; drawing as the run began")
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
                note_once(f"{lost}: drawing from the checkpoint before")
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
