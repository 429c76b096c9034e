"""`ddpm train`: begins a run or goes on with it. There is no resume flag; the same command does both."""

from __future__ import annotations

from job.config import RunConfig
from job.data.cache import default_cache_dir, open_cache
from job.exits import LostRunError
from job.plan import Plan, plan_run
from job.processes import compute
from job.processes.ranks import Ranks, meet
from job.progress import Progress, note
from job.requests import TrainRequest
from job.runs import records
from job.runs.lease import Lease
from job.runs.records import Attempt
from job.session import TrainingSession
from job.stop import NEVER, Stop

_LAST_SECONDS = 0.5
"""For the process itself to end, of the time that a preemption leaves."""


def run_training(request: TrainRequest, stop: Stop = NEVER) -> None:
    """Trains until the run is finished; on return everything is committed and the pictures are in the bucket.

    Args:
        request: which run.
        stop: asked all the while. One that is to stop before all processes have met has nothing to save.

    Raises:
        StoppedError: a signal came; the state is committed, the same command goes on.
        NotANumberError: a gradient was not finite; the last checkpoint is from before that.
        LostRunError: another attempt holds the run, or took it.
        BucketAwayError: the bucket stayed away beyond the limit.
        JobError: see the message.
    """
    plan = plan_run(request, stop)
    precision = plan.config.train.precision
    if precision == "auto":
        precision = compute.best_precision()
    ranks = meet(stop, precision, plan.config.train.deterministic)
    lease: Lease | None = None

    def take() -> int:
        nonlocal lease
        floor = records.highest_fence(plan.run)
        lease = Lease.take(plan.run, floor, request.wait_seconds, stop, note)
        return lease.fence

    try:
        fence, planned = ranks.on_main(take), plan
        # Whoever held the run until now may have begun it, or changed it.
        plan = plan_run(request, stop)
        if planned.is_new and not plan.is_new and plan.config.train.precision != precision:
            raise LostRunError(
                f"{plan.run.uri} was begun by another attempt meanwhile, with train.precision="
                f"{plan.config.train.precision}: the same command goes on"
            )
        config, attempt = ranks.on_main(lambda: _begin(plan, fence, precision, ranks, lease.holder if lease else ""))
        with Progress("reading images", unit="images", total=plan.index.images, disable=not ranks.is_main) as bar:
            cache = open_cache(
                plan.bucket,
                plan.dataset_key,
                plan.index,
                cache_dir=default_cache_dir(),
                budget_bytes=int(config.data.cache_gigabytes * 1e9),
                progress=lambda done, total: bar.update(done),
                stop=stop,
            )
        session = TrainingSession(plan, config, ranks, cache, stop)
        with session.restored(attempt, lease):
            session.train()
            session.finish()
    finally:
        if lease is not None:
            lease.close(stop.seconds_left() - _LAST_SECONDS)
    ranks.accelerator.end_training()


def _begin(plan: Plan, fence: int, precision: str, ranks: Ranks, holder: str) -> tuple[RunConfig, Attempt]:
    config = plan.config
    if plan.is_new:
        resolved = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
        config = records.create_config(plan.run, resolved)
        if config != resolved:
            raise LostRunError(f"{plan.run.uri} was begun by another attempt meanwhile: the same command goes on")
    before = records.last_attempt(plan.run)
    device = compute.describe_device(ranks.accelerator.device)
    attempt = records.record_attempt(plan.run, fence, plan.changes, ranks.world_size, device, holder)
    for difference in records.what_is_otherwise(before, attempt) if before else []:
        note(difference)
    return config, attempt
