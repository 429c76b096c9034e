"""`ddpm train`: begins a run or goes on with it. There is no resume flag; the same command does both."""

from __future__ import annotations

from ddpm.training import NonFiniteError
from job.data.cache import default_cache_dir, open_cache
from job.exits import NotANumberError
from job.plan import Plan, plan_run
from job.processes import compute
from job.processes.ranks import Ranks, meet
from job.progress import Progress, note
from job.runs import records
from job.runs.lease import Lease
from job.runs.records import Attempt
from job.session import TrainingSession
from job.stop import NEVER, Stop

_EXIT_SECONDS = 0.5
"""For the process itself to end, of the time that a preemption leaves."""


def run_training(plan: Plan, stop: Stop = NEVER) -> Plan:
    """Trains until the run is finished; on return everything is committed and the pictures are in the bucket.

    Args:
        plan: which run.
        stop: asked all the while.

    Returns:
        The plan that was carried out: whoever held the run until the lease was taken may have begun or changed it.

    Raises:
        StoppedError: the state is committed, the same command goes on.
        NotANumberError: a gradient was not finite; the last checkpoint is from before that.
        LostRunError: another attempt holds the run, or took it.
        BucketAwayError: the bucket stayed away beyond the limit.
    """
    precision = plan.config.train.precision
    if precision == "auto":
        precision = compute.best_precision()
    ranks = meet(stop, precision, plan.config.train.deterministic)
    lease: Lease | None = None

    def take() -> int:
        nonlocal lease
        lease = Lease.take(plan.run, records.highest_fence(plan.run), plan.request.wait_seconds, stop, note)
        return lease.fence

    try:
        fence = ranks.on_main(take)
        plan = plan_run(plan.request, stop).computing_in(precision)
        attempt = ranks.on_main(lambda: _begin(plan, fence, ranks, lease.holder if lease else ""))
        with Progress("reading images", total=plan.index.images, disable=not ranks.is_main) as bar:
            images = open_cache(
                plan.bucket,
                records.dataset_key_of(plan.config),
                plan.index,
                cache_dir=default_cache_dir(),
                budget_bytes=plan.config.data.cache_bytes,
                progress=lambda done, total: bar.update(done),
                stop=stop,
            )
        session = TrainingSession(plan, ranks, images, stop)
        with session.restored(attempt, lease):
            session.train()
            session.finish()
    except NonFiniteError as error:
        raise NotANumberError(
            f"{error}; what {plan.run.uri} holds is from before. It would happen again at the same image: "
            "start another run with a lower train.learning_rate, or with train.precision=fp32"
        ) from None
    finally:
        if lease is not None:
            lease.close(stop.seconds_left() - _EXIT_SECONDS)
    ranks.accelerator.end_training()
    return plan


def _begin(plan: Plan, fence: int, ranks: Ranks, holder: str) -> Attempt:
    """Writes down the run, if it is new, and this attempt; says what is otherwise than in the one before."""
    if plan.is_new:
        records.create_config(plan.run, plan.config)
    before = records.last_attempt(plan.run)
    device = compute.describe_device(ranks.accelerator.device)
    attempt = records.record_attempt(plan.run, fence, plan.changes, ranks.world_size, device, holder)
    for difference in records.what_is_otherwise(before, attempt) if before else []:
        note(difference)
    return attempt
