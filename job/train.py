"""`ddpm train`: begins a run or goes on with it. There is no resume flag; the same command does both."""

from __future__ import annotations

from dataclasses import replace

from job import compute, runs
from job.config import RunConfig
from job.data.cache import default_cache_dir, open_cache
from job.grace import Notice, grace_seconds
from job.lease import Lease
from job.plan import Plan, plan_run
from job.progress import Progress, note
from job.ranks import Ranks
from job.requests import TrainRequest
from job.runs import Attempt
from job.session import TrainingSession
from job.stopping import StopFlag
from job.store.patient import Outage, PatientStore, away_limit_seconds


def run_training(request: TrainRequest, stop: StopFlag) -> None:
    """Trains until the run is finished; on return everything is committed and the pictures are in the bucket.

    Raises:
        StoppedError: a signal came; the state is committed, the same command goes on.
        NotANumberError: a gradient was not finite; the last checkpoint is from before that.
        LostRunError: another attempt holds the run, or took it.
        BucketAwayError: the bucket stayed away beyond the limit.
        JobError: see the message.
    """
    outage, grace = Outage(away_limit_seconds(), note), grace_seconds()
    plan = plan_run(request)
    precision = plan.config.train.precision
    if precision == "auto":
        precision = compute.best_precision()
    accelerator = compute.build_accelerator(precision, plan.config.train.deterministic)
    ranks = Ranks(accelerator, stop)
    lease: Lease | None = None

    def begin() -> tuple[RunConfig, Attempt]:
        nonlocal lease
        lease = Lease.take(plan.run, runs.highest_fence(plan.run), request.wait_seconds, stop, note)
        return _begin(plan, lease.fence, precision, ranks.world_size)

    try:
        config, attempt = ranks.on_main(begin)
        patient = replace(
            plan, bucket=PatientStore(plan.bucket, outage, stop), run=PatientStore(plan.run, outage, stop)
        )
        with Progress("reading images", unit="images", total=plan.index.images, disable=not ranks.is_main) as bar:
            cache = open_cache(
                patient.bucket,
                plan.dataset_key,
                plan.index,
                cache_dir=default_cache_dir(),
                budget_bytes=int(config.data.cache_gigabytes * 1e9),
                progress=lambda done, total: bar.update(done),
                should_stop=stop,
            )
        session = TrainingSession(patient, config, ranks, cache, stop)
        with session.restored(attempt, lease, outage, grace):
            session.train()
            session.finish()
    finally:
        if lease is not None:
            lease.close()
    accelerator.end_training()


def _begin(plan: Plan, fence: int, precision: str, world_size: int) -> tuple[RunConfig, Attempt]:
    config = plan.config
    if plan.is_new:
        resolved = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
        config = runs.create_config(plan.run, resolved)
    return config, runs.record_attempt(plan.run, fence, plan.changes, world_size)
