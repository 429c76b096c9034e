"""The commands that may be jobs: request → plan → launch → work.

The launcher sees whether the work can be done. The processes that it starts run the same command, and do it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING

from job.config import EMBEDDED, pack_config
from job.evaluation.evaluation_plan import check_formulas, check_scores, plan_evaluation
from job.exits import BadDataError, MissingInputError
from job.outcome import outcome_written
from job.pieces import WHOLE, Slice
from job.plan import Plan, plan_run
from job.processes.group import Group, check_gpus, default_processes
from job.processes.launched import is_rank
from job.processes.launcher import launch
from job.processes.preemption import watch_for_preemption
from job.progress import note
from job.requests import EncodeRequest, EvaluateRequest, SampleRequest, TrainRequest, check_world_size
from job.runs.records import check_writable
from job.sampling.sampling_plan import plan_sampling, plan_sets
from job.stop import Stop, deadline
from job.store import ObjectMissingError, Store, open_bucket
from job.training.tracking import check_tracker

if TYPE_CHECKING:
    from job.data.pack import PackRequest
    from job.data.shards import DatasetIndex


def train_command(request: TrainRequest, processes: int | None, hang_after_seconds: float, stop_after: str) -> None:
    """Trains or goes on; says where everything lies when the run is finished.

    Args:
        request: which run.
        processes: on this machine; None is one per GPU, or one. Under torchrun or accelerate these decide.
        hang_after_seconds: see `launch`.
        stop_after: a duration, see `deadline`.

    Raises:
        BadConfigError: there are more processes than images in a batch.
        SystemExit: the ranks ended with another code than 0.
    """
    here = Group(1) if is_rank() else Group.of(1)
    with _command_on(request.bucket, stop_after, Slice(here.node, here.nodes)) as stop:
        request = request.check()
        if is_rank():
            from job.training.attempt import run_training

            plan = run_training(request, stop)
            if os.environ.get("RANK", "0") == "0":
                _say_finished(plan, "is finished")
            return
        plan = plan_run(request, stop)
        processes = processes or default_processes()
        check_world_size(processes * here.nodes, plan.config.train.batch_size)
        check_scores(plan)
        check_tracker(plan.config.log.tracker, is_asked_for="log.tracker" in request.changes)
        if plan.is_finished():
            _say_finished(plan, "is finished already")
        else:
            check_writable(plan.run)
            _launch(processes, hang_after_seconds)


def sample_command(request: SampleRequest, processes: int | None, hang_after_seconds: float, stop_after: str) -> None:
    """Samples, and says where the pictures lie; arguments are those of `train_command`.

    Raises:
        SystemExit: the ranks ended with another code than 0.
    """
    with _command_on(request.bucket, stop_after, Slice.parse(request.slice)) as stop:
        plan = plan_sampling(request.check(), stop)
        if is_rank():
            from job.sampling.draw import run_sampling

            run_sampling(plan, stop)
            return
        # The processes choose again where a checkpoint was retired since it was chosen.
        with suppress(ObjectMissingError):
            sets = plan_sets(plan)
            for sample_set in sets:
                sample_set.check()
            if sets and all(sample_set.index() for sample_set in sets):
                for sample_set in sets:
                    print(sample_set.describe("complete already"))
                return
        check_writable(plan.run)
        _launch(processes or default_processes(), hang_after_seconds)


def evaluate_command(
    request: EvaluateRequest, processes: int | None, hang_after_seconds: float, stop_after: str
) -> None:
    """Draws and scores; arguments are those of `train_command`.

    Raises:
        BadRequestError: what computes scores is not installed.
        SystemExit: the ranks ended with another code than 0.
    """
    check_formulas()
    with _command_on(request.bucket, stop_after) as stop:
        plan = plan_evaluation(request.check(), stop)
        if is_rank():
            from job.evaluation.evaluate import run_evaluation

            run_evaluation(plan, stop)
        else:
            check_writable(plan.sampling.run)
            _launch(processes or default_processes(), hang_after_seconds)


def pack_command(request: PackRequest, bucket_uri: str, stop_after: str = "") -> None:
    """Packs a source, or indexes tars where they lie, and prints what came of it."""
    from job.data.fetched import forget
    from job.data.pack import check_free, is_whole, pack

    share = Slice.parse(request.slice)
    with _command_on(bucket_uri, stop_after, share) as stop:
        stop.install()
        request = request.check()
        if request.source == EMBEDDED:
            request = replace(request, source=str(resources.files("job") / "datasets" / f"{EMBEDDED}.zip"))
        bucket = open_bucket(bucket_uri, stop)
        if not request.slice:
            # Before its held-out part is packed.
            check_free(bucket, request)
        for part in request.parts():
            if part.held and is_whole(bucket, part):
                # The same command goes on where it was interrupted.
                continue
            try:
                index = pack(bucket, part, stop=stop)
            except BadDataError:
                # A damaged download would be found again otherwise.
                forget(request.source)
                raise
            _say_made(index, bucket, part.name, part.slice)
        forget(request.source)


def encode_command(request: EncodeRequest, stop_after: str = "") -> None:
    """Encodes a dataset, and prints what came of it."""
    from job.exchange.encoding import encode_dataset

    with _command_on(request.bucket, stop_after, Slice.parse(request.slice)) as stop:
        stop.install()
        request = request.check()
        bucket = open_bucket(request.bucket, stop)
        _say_made(encode_dataset(bucket, request, stop), bucket, request.to, request.slice)


def _say_made(index: DatasetIndex | None, bucket: Store, name: str, slice_text: str) -> None:
    from job.report.datasets import describe_dataset

    if index is None:
        print(f"{name}: slice {slice_text} is done; other machines are making the rest")
    else:
        print(describe_dataset(index, bucket))


def ensure_command(name: str, bucket_uri: str, *, size: int | None = None, source: str = "", on: str = "") -> None:
    """Packs a dataset unless the bucket has it; `on` is the target that wants it.

    Raises:
        MissingInputError: it is not there and there is nothing to pack; the message has the lines to type.
    """
    from job.data.pack import PackRequest
    from job.report.datasets import how_to_pack, is_packed

    # A dataset without a preset of its own is trained with the embedded one's network, which is made for its size.
    preset = pack_config(name) or pack_config(EMBEDDED)
    assert preset is not None
    size_pixels = size or preset.size
    request = PackRequest(source or name, name, size_pixels).check()
    if is_packed(bucket_uri, name, size):
        return
    if not source and name != EMBEDDED:
        raise MissingInputError(how_to_pack(bucket_uri, name, size_pixels, on))
    pack_command(request, bucket_uri)


@contextmanager
def _command_on(bucket_uri: str, stop_after: str, share: Slice = WHOLE) -> Iterator[Stop]:
    """What all commands share: a bucket that learns how it ends, a deadline, and no signal that goes unnoticed."""
    with outcome_written(bucket_uri, share.index, share.count), deadline(stop_after):
        # Until its work begins, signals end this process.
        stop = Stop().install(signals=False)
        watch_for_preemption(stop)
        yield stop


def _launch(processes: int, hang_after_seconds: float) -> None:
    """Runs this very command line once more in each process: there `is_rank()` is true, and the work begins."""
    check_gpus()
    note("loading PyTorch" + (f" in {processes} processes" if processes > 1 else ""))
    # -P: a job.py in the working folder must not stand in for the program.
    if code := launch([sys.executable, "-P", "-m", "job", *sys.argv[1:]], processes, hang_after_seconds):
        raise SystemExit(code)


def _say_finished(plan: Plan, what: str) -> None:
    from job.runs.listing import describe_outputs

    images_seen, outputs = plan.images_seen, describe_outputs(plan.run)
    epochs = max(plan.config.train.epochs, images_seen // plan.index.images)
    # All is done: that nobody reads it is no failure.
    with suppress(OSError):
        print(f"Run {plan.request.run!r} {what}: {epochs:,} epoch{'s' * (epochs > 1)}, {images_seen:,} images seen.")
        print(outputs)
        print(f"To go on: the same command with more epochs (EPOCHS={epochs * 2}, or --epochs {epochs * 2}).")
