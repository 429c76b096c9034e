"""From a checked request to the work: in this process, or one process per GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from job.launcher import LAUNCHED, default_processes, launch, under_launcher
from job.plan import Plan, plan_run
from job.requests import SampleRequest, TrainRequest
from job.runs import read_status
from job.stopping import StopFlag


def train_command(request: TrainRequest, processes: int | None) -> None:
    """Trains or goes on; says where everything lies when the run is finished."""
    request = request.check()
    plan = plan_run(request)
    if not under_launcher() and _finished(plan):
        _tell(plan, request, "is finished already")
        return

    def work() -> None:
        from job.train import run_training

        run_training(request, StopFlag().install())

    if _run(work, processes):
        _tell(plan_run(request), request, "is finished")


def sample_command(request: SampleRequest, processes: int | None) -> None:
    """Samples, and says where the pictures lie."""
    request = request.check()

    def work() -> None:
        from job.sample import run_sampling

        run_sampling(request, StopFlag().install())

    _run(work, processes)


def _run(work: Callable[[], None], processes: int | None) -> bool:
    """Does the work here or in ranks; whether this process should speak for all of them."""
    if under_launcher():
        work()
        return os.environ["RANK"] == "0" and LAUNCHED not in os.environ
    processes = processes or default_processes()
    if processes == 1:
        work()
        return True
    code = launch(sys.argv[1:], processes)
    if code:
        raise SystemExit(code)
    return True


def _finished(plan: Plan) -> bool:
    status = read_status(plan.run)
    return status is not None and status.state == "finished" and status.images_seen >= plan.target_images


def _tell(plan: Plan, request: TrainRequest, what: str) -> None:
    from job.overview import describe_outputs

    epochs = plan.config.train.epochs
    print(f"Run {request.run!r} {what}: {epochs} epochs, {plan.target_images:,} images seen.")
    print(describe_outputs(plan.run))
    print(f"To go on: the same command with more epochs (EPOCHS={epochs * 2}, or --epochs {epochs * 2}).")
