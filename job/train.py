"""`ddpm train`: begins a run or goes on with it. There is no resume flag; the same command does both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from job.config import RunConfig
from job.data.cache import default_cache_dir, open_cache
from job.exits import LostRunError
from job.plan import Plan, plan_run
from job.processes import compute
from job.processes.ranks import Ranks
from job.processes.stopping import StopFlag
from job.progress import Progress, note
from job.requests import TrainRequest
from job.runs import records
from job.runs.grace import Notice, grace_seconds
from job.runs.lease import Lease
from job.runs.records import Attempt
from job.session import TrainingSession

_LAST_SECONDS = 0.5
"""For the process itself to end, of the time that a preemption leaves."""


def run_training(
    request: TrainRequest, stop: StopFlag, waiting: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Trains until the run is finished; on return everything is committed and the pictures are in the bucket.

    Args:
        request: which run.
        stop: polled all the while.
        waiting: entered until all processes have met: one that is to stop before that has nothing to save.

    Raises:
        StoppedError: a signal came; the state is committed, the same command goes on.
        NotANumberError: a gradient was not finite; the last checkpoint is from before that.
        LostRunError: another attempt holds the run, or took it.
        BucketAwayError: the bucket stayed away beyond the limit.
        JobError: see the message.
    """
    grace = grace_seconds()
    notice = Notice(stop, grace)
    plan = plan_run(request, notice)
    precision = plan.config.train.precision
    if precision == "auto":
        precision = compute.best_precision()
    with waiting():
        accelerator = compute.build_accelerator(precision, plan.config.train.deterministic)
        ranks = Ranks(accelerator, notice)
    lease: Lease | None = None

    def take() -> int:
        nonlocal lease
        floor = records.highest_fence(plan.run)
        # The lease itself keeps to its own times, so its store must not wait.
        lease = plan.run.insist(Lease.take, plan.run.inner, floor, request.wait_seconds, notice, note)
        return lease.fence

    try:
        fence, planned = ranks.on_main(take), plan
        # Whoever held the run until now may have begun it, or changed it.
        plan = plan_run(request, notice)
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
                should_stop=notice,
            )
        session = TrainingSession(plan, config, ranks, cache, notice)
        with session.restored(attempt, lease, grace):
            session.train()
            session.finish()
    finally:
        if lease is not None:
            lease.close(notice.seconds_left() - _LAST_SECONDS)
    accelerator.end_training()


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
