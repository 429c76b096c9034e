"""From a checked request to the work: in this process, or one process per GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from job.checkpoints import list_checkpoints
from job.exits import BadConfigError
from job.launcher import LAUNCHED, default_processes, launch, under_launcher
from job.plan import Plan, plan_run, plan_sampling
from job.requests import SampleRequest, TrainRequest
from job.runs import read_status
from job.stopping import StopFlag


def train_command(request: TrainRequest, processes: int | None) -> None:
    """Trains or goes on; says where everything lies when the run is finished.

    Raises:
        BadConfigError: there are more processes than images in a batch.
        JobError: see the message.
    """
    request = request.check()
    plan = plan_run(request)
    world_size, batch_size = _world_size(processes), plan.config.train.batch_size
    if world_size > batch_size:
        raise BadConfigError(
            f"{world_size} processes cannot share train.batch_size={batch_size} images: use fewer with --processes N"
        )
    if not under_launcher() and _finished(plan):
        _tell(plan, request, "is finished already")
        return

    def work() -> None:
        from job.train import run_training

        run_training(request, StopFlag().install())

    if _run(work, processes):
        _tell(plan_run(request), request, "is finished")


def sample_command(request: SampleRequest, processes: int | None) -> None:
    """Samples, and says where the pictures lie. What is missing shows before there are several processes to say so."""
    request = request.check()
    if not under_launcher():
        plan_sampling(request)

    def work() -> None:
        from job.sample import run_sampling

        run_sampling(request, StopFlag().install())

    _run(work, processes)


def _world_size(processes: int | None) -> int:
    return int(os.environ["WORLD_SIZE"]) if under_launcher() else processes or default_processes()


def _run(work: Callable[[], None], processes: int | None) -> bool:
    """Does the work here or in ranks; whether this process should speak for all of them."""
    if under_launcher():
        work()
        return os.environ["RANK"] == "0" and LAUNCHED not in os.environ
    world_size = _world_size(processes)
    if world_size == 1:
        work()
        return True
    code = launch(sys.argv[1:], world_size)
    if code:
        raise SystemExit(code)
    return True


def _finished(plan: Plan) -> bool:
    status = read_status(plan.run)
    return status is not None and status.state == "finished" and _images_seen(plan) >= plan.target_images


def _images_seen(plan: Plan) -> int:
    checkpoints = list_checkpoints(plan.run)
    return max(checkpoints).images_seen if checkpoints else 0


def _tell(plan: Plan, request: TrainRequest, what: str) -> None:
    from job.overview import describe_outputs

    images_seen = _images_seen(plan)
    epochs = max(plan.config.train.epochs, images_seen // plan.index.images)
    print(f"Run {request.run!r} {what}: {epochs:,} epoch{'s' * (epochs > 1)}, {images_seen:,} images seen.")
    print(describe_outputs(plan.run))
    print(f"To go on: the same command with more epochs (EPOCHS={epochs * 2}, or --epochs {epochs * 2}).")
