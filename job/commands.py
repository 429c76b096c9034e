"""The commands that can be jobs: request → plan → launch → work.

The launcher checks that the work is possible. Its processes run the same command, and do the work.
"""

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from ddpm.image_size import ImageSize
from job.config import EMBEDDED, pack_config
from job.coordination.outcome import command_on
from job.coordination.pieces import IF_NONE_RUNS, Slice
from job.data.pack_request import EncodeRequest, EnsureRequest, PackRequest
from job.data.shards import PREVIEW, DatasetIndex, NoDatasetError, dataset_key
from job.evaluation.evaluation_plan import check_library, check_scores_in_training, plan_evaluation
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.options import LaunchedOptions
from job.plan import Plan, plan_run
from job.printing import in_lines, open_page
from job.processes.group import Group, check_gpus, default_processes, gpu_gib
from job.processes.launcher import await_go, is_rank, launch, this_command
from job.progress import note
from job.requests import EvaluateRequest, SampleRequest, TrainRequest, check_world_size
from job.runs.layout import ObjectKind
from job.runs.records import check_writable
from job.sampling.sampling_plan import plan_sampling
from job.stop import Stop
from job.store import Store, is_foreign, open_bucket, split_chain
from job.training.tracking import check_tracker


def train_command(request: TrainRequest, go: Callable[[], int] | None = None) -> None:
    """Starts or resumes training; prints the URIs of the results when the run is finished.

    Args:
        request: the run. Under torchrun or accelerate these decide the number of processes.
        go: lets ranks work that wait for it already.

    Raises:
        BadConfigError: there are more processes than images in a batch.
        SystemExit: the ranks ended with another code than 0.
    """
    if is_rank():
        _train(request)
        return
    here = Group.of(1)
    with command_on(request, Slice(here.node, here.nodes)) as stop:
        request = request.check()
        try:
            plan = plan_run(request, stop, gpu_gib=gpu_gib)
        except MissingInputError as error:
            from job.verbs.datasets import how_packed, how_to_pack

            # A local bucket without its folder has no dataset either, and the packing makes it.
            if not isinstance(error, NoDatasetError) and how_packed(request.bucket, request.dataset, None)[0]:
                raise
            stated = error.size if isinstance(error, NoDatasetError) else request.changes.get("data.size")
            size = ImageSize.of(stated) if stated else _usual_size(request.preset_name())
            raise MissingInputError(how_to_pack(request.bucket, request.dataset, size)) from None
        check_world_size((request.processes or default_processes()) * here.nodes, plan.config.train)
        check_scores_in_training(plan)
        check_tracker(plan.config.log.tracker, is_asked_for="log.tracker" in request.changes)
        if plan.is_finished():
            _say_finished(plan, "is finished already")
            if request.open_page:
                open_page(plan.run, ObjectKind.PAGE.value)
        else:
            note(f"the page of this run: {plan.run.uri_of(ObjectKind.PAGE.value)}")
            _launch(request, plan.run, go)


def _train(request: TrainRequest) -> None:
    """Does the work of `train_command` in one of its processes."""
    # Nothing that an import makes is garbage, and the collector would take a sixth of its time.
    gc.disable()
    from job.training.session import run_training

    gc.freeze()
    gc.enable()
    # Before this line the process must print and write nothing: the launcher may still refuse the command.
    await_go()
    with command_on(request) as stop:
        plan = run_training(request.check(), stop)
        if os.environ.get("RANK", "0") == "0":
            _say_finished(plan, "is finished")


def sample_command(request: SampleRequest) -> None:
    """Samples, and prints the URIs of the pictures.

    Raises:
        SystemExit: the ranks ended with another code than 0.
    """
    with command_on(request) as stop:
        plan = plan_sampling(request.check(), stop)
        if is_rank():
            from job.sampling.pictures import run_sampling

            run_sampling(plan, stop)
        else:
            _launch(request, plan.run)


def evaluate_command(request: EvaluateRequest) -> None:
    """Samples and scores.

    Raises:
        BadRequestError: a library for scores is not installed.
        SystemExit: the ranks ended with another code than 0.
    """
    check_library()
    with command_on(request) as stop:
        plan = plan_evaluation(request.check(), stop)
        if is_rank():
            from job.evaluation.evaluate import run_evaluation

            run_evaluation(plan, stop)
        else:
            _launch(request, plan.sampling.run)


def pack_command(request: PackRequest) -> None:
    """Packs a source, or indexes tars in place, and prints the facts of the dataset."""
    from job.data.making import check_absent, existing_index
    from job.data.pack import pack
    from job.data.source import forget
    from job.verbs.upkeep import check_unused

    with command_on(request) as stop:
        stop.install()
        request = request.check()
        bucket = open_bucket(request.bucket, stop)
        # A dataset of this name must be an error before hours of packing its held-out part.
        check_absent(bucket, request.key, unless=request.slice or request.replaces)
        for part in request.parts():
            if part.is_held_out and not request.replaces and existing_index(bucket, part.key):
                # An interrupted command has finished this part.
                continue
            if request.replaces:
                check_unused(bucket, request.key)
            try:
                index = pack(bucket, part, stop=stop)
            except BadDataError:
                # The next attempt must not find the damaged download in the cache.
                forget(request.source, request.condition)
                raise
            _say_made(index, bucket, part.name, part.slice)
        forget(request.source, request.condition)


def encode_command(request: EncodeRequest) -> None:
    """Encodes a dataset into latents, and prints the facts of the new one."""
    from job.data.latents import encode_dataset
    from job.exchange.other_programs import opened_autoencoder

    with command_on(request) as stop:
        stop.install()
        request = request.check()
        bucket = open_bucket(request.bucket, stop)
        _say_made(encode_dataset(bucket, request, opened_autoencoder, stop), bucket, request.to, request.slice)


def _say_made(index: DatasetIndex | None, bucket: Store, name: str, slice_text: str) -> None:
    from job.verbs.datasets import describe_dataset

    if index is None:
        print(f"{name}: slice {slice_text} is done; other machines are making the rest; {IF_NONE_RUNS}")
    else:
        print(describe_dataset(index, bucket))
        if bucket.exists(preview := f"{dataset_key(index.name, index.size)}/{PREVIEW}"):
            print(f"look at  {bucket.uri_of(preview)}")


def ensure_command(request: EnsureRequest) -> None:
    """Packs a dataset if the bucket lacks it.

    Raises:
        BadRequestError: the source would make another dataset than the one that is there.
        MissingInputError: the dataset is missing, and the request has no source; the message has the commands to type.
    """
    from job.verbs.datasets import how_packed, how_to_pack

    name = request.name
    asked = ImageSize.of(request.size) if request.size else None
    size = asked or _usual_size(name)
    filled = replace(request, source=request.source or name, size=size).check()
    there, index = how_packed(request.bucket, name, asked)
    if index:
        filled = replace(filled, size=index.size)
    if there and not request.replaces:
        has_options = request.labels or request.split or request.classes is not None
        kept = "; labels, classes and split stay as they are" if has_options else ""
        note(there + (_compared(filled, there, index) if request.source else kept))
        return
    if not request.source and name != EMBEDDED:
        raise MissingInputError(how_to_pack(request.bucket, name, size, request.on))
    pack_command(filled)


def _compared(request: PackRequest, there: str, index: DatasetIndex | None) -> str:
    """Returns how the source of a request compares with a dataset that is there, for people."""
    from job.data.pack import is_source_of

    # A source of another kind of URL would be fetched.
    if index is None or not index.listing_sha256 or is_foreign(split_chain(request.source)[1]):
        return "; SOURCE is not compared"
    stop = Stop().install()
    try:
        if is_source_of(open_bucket(request.bucket, stop), request, index, stop):
            return "; SOURCE has not changed"
    except MissingInputError as error:
        return f"; SOURCE is not compared: {error}"
    other = f"{there}, and {request.source} has other images, labels, classes or pixels"
    raise BadRequestError(f"{other}: choose another name (make: DATASET=NAME), or --replace it (make: PACK=--replace)")


def _usual_size(preset: str) -> ImageSize:
    # A dataset without a preset gets the network of the embedded preset, so it needs the size of that.
    pack = pack_config(preset) or pack_config(EMBEDDED)
    assert pack is not None
    return pack.size


def _launch(request: LaunchedOptions, run: Store, go: Callable[[], int] | None = None) -> None:
    """Runs this command line again in each process; there `is_rank()` is true, and the work begins."""
    check_writable(run)
    check_gpus()
    processes = request.processes or default_processes()
    note("loading PyTorch" + (f" in {processes} processes" if processes > 1 else ""))
    if code := go() if go else launch(this_command(), processes, request.hang_after_seconds):
        raise SystemExit(code)


def _say_finished(plan: Plan, what: str) -> None:
    images_seen = plan.images_seen
    # The run may have seen more epochs than this command asks for.
    epochs = images_seen // plan.index.images
    outputs = {"page": ObjectKind.PAGE.value, "samples": plan.grid_key(images_seen)}
    there = [(title, plan.run.uri_of(key)) for title, key in outputs.items() if plan.run.exists(key)]
    # The work is done: a closed pipe must not make a failure of it.
    with suppress(OSError):
        print(f"Run {plan.request.run!r} {what}: {epochs:,} epoch{'s' * (epochs > 1)}, {images_seen:,} images seen.")
        print(in_lines([*there, ("train more", f"add --epochs {epochs * 2} (make: EPOCHS={epochs * 2})")]))
