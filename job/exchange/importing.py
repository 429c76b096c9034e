"""`ddpm import`: makes a run from a network of another program, or from a checkpoint or an export of this one.

The run gets a configuration, an attempt that names the source, and one checkpoint per import: the imported weights and
averages, with zero as the optimiser's moments. Everything else is as in a run that was trained here.

A checkpoint of ours states its whole configuration, and one of another program only its network and its process.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ddpm.catalogue import LARGEST
from ddpm.interop import NoCounterpartError
from job.config import RunConfig, draft, is_free, layered, preset_names, validated
from job.coordination.lease import Lease
from job.coordination.sealed import utc_now
from job.data.reading.order import images_at_epoch
from job.data.shards import DatasetIndex, find_dataset, load_index
from job.exchange.other_programs import OtherCheckpoint, opened_checkpoint, settings_of_diffusers
from job.exits import BadConfigError, BadDataError, BadRequestError, State
from job.plan import check_sampling, follow_dataset
from job.processes.compute import describe_device
from job.progress import note, printable
from job.requests import ImportRequest
from job.runs import checkpoints, records
from job.runs.checkpoints import RUN_CONFIG, SCHEDULER_CONFIG, UNET_CONFIG
from job.runs.layout import MAX_IMAGES_SEEN, CheckpointRef
from job.runs.retention import Retention
from job.runs.run import RunHandle
from job.runs.writer import CheckpointWriter, LeasedRun
from job.stop import Stop
from job.store import Store, open_bucket, without_queries

if TYPE_CHECKING:
    from ddpm.state import TrainState

_NOT_IMPORTED: dict[str, Any] = {
    "data.dataset": "",
    "data.dataset_id": "",
    "data.latents": False,
    "sample.autoguidance": 0,
    "sample.autoguidance_run": "",
    "log.tracker": "none",
    **{key: None for key in RunConfig().flat() if key.startswith("parent.")},
}
"""Settings that name something in the bucket or in the account of the source, with their values in an import."""


def import_run(request: ImportRequest) -> None:
    """Makes a run from a checkpoint, or adds the checkpoint to an imported run; prints its kind and URI.

    Raises:
        MissingInputError: nothing to import, or no such dataset.
        BadDataError: the checkpoint is damaged, or its network has no counterpart here.
        BadConfigError: the network does not fit the dataset.
        BadRequestError: the existing run has another configuration, or has trained.
        LostRunError: another process holds the run.
        StoppedError: a signal came before the commit of the checkpoint.
    """
    sets, stop = request.check(), Stop().install()
    bucket = open_bucket(request.bucket, stop)
    run = records.run_store(bucket, request.run)
    retry, with_config = bucket.retry.elsewhere(), not request.preset
    with opened_checkpoint(request.source, request.size, retry, with_config=with_config) as given:
        # The query of a URL may be a signature, which must not enter records.
        request = replace(request, source=without_queries(request.source))
        config, index = _config(bucket, request, given, sets)
        of_run = RunHandle(bucket, run, index, config, config)
        state = _state(config, given, request.source)
    batch_size = config.train.batch_size
    state.resume_at(images_at_epoch(request.epoch, of_run.dataset_images, batch_size), batch_size)
    records.check_writable(run)
    lease = Lease.take(run, records.highest_fence(run), 0.0, stop, note)
    try:
        _check_run(run, request.run, config, sets)
        where = _commit(of_run, state, lease, stop=stop, source=request.source)
    finally:
        lease.close(stop.seconds_left())
    weights = sum(parameter.numel() for parameter in state.model.parameters())
    settings = "" if given.run_config is None else ", with the settings of its run"
    print(f"{where}  ({given.what}, {weights:,} weights{settings})")
    print(f"To sample from it: ddpm sample --run {request.run}")


def _config(
    bucket: Store, request: ImportRequest, given: OtherCheckpoint, sets: dict[str, Any]
) -> tuple[RunConfig, DatasetIndex | None]:
    """Returns the configuration, and the dataset if the request names one."""
    size = given.settings["data.size"]
    if request.size and request.size.stated != size:
        raise BadConfigError(f"--size {request.size}: the checkpoint states {size} pixels")
    always = {"imported": True, "data.classes": given.classes}
    where = f"{request.source} as a run"
    if given.run_config is not None:
        ours = _of_our_run(f"{request.source}/{RUN_CONFIG}", given.run_config, given.settings)
        config = validated(layered(ours, sets) | always, where)
    else:
        told = _of_other_program(request.source, given.settings, sets) | always
        # The default number of steps may exceed the timesteps of this process.
        steps = min(RunConfig().sample.steps, told.get("diffusion.timesteps", LARGEST))
        usual = RunConfig().flat() | {"sample.steps": steps}
        config = draft(request.preset, told) if request.preset else validated(layered(usual, told), where)
    check_sampling(config)
    if not request.dataset:
        return config, None
    index = load_index(bucket, find_dataset(bucket, request.dataset, config.data.size))
    return follow_dataset(config, index), index


def _of_our_run(where: str, text: bytes, found: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the run that the checkpoint is of, but for those about another bucket or account.

    Args:
        where: the URI of its configuration, for messages.
        text: its configuration.
        found: the settings that the files for diffusers beside it state.

    Raises:
        BadDataError: the configuration is damaged, or of another network or process than the checkpoint.
    """
    what_to_do = "Restore it, or give --preset NAME, whose settings replace it"
    config = records.parsed_config(text, where, what_to_do)
    objects = checkpoints.described(config, ()).objects if config.data.size and config.data.channels else {}
    unet, scheduler = (json.loads(objects.get(key, b"null")) for key in (UNET_CONFIG, SCHEDULER_CONFIG))
    try:
        stated = settings_of_diffusers(unet or {}, scheduler)
    except NoCounterpartError as error:
        raise BadDataError(f"{where} is of another checkpoint ({error}). {what_to_do}") from None
    for key in sorted(stated.keys() & found.keys()):
        # Another scheduler of diffusers may sample from the same process.
        if stated[key] != found[key] and not key.startswith("sample."):
            differs = f"{key}: {stated[key]!r:.60}, not {found[key]!r:.60}"
            raise BadDataError(f"{where} is of another checkpoint ({differs}). {what_to_do}")
    preset = config.preset if config.preset in preset_names() else ""
    return config.flat() | _NOT_IMPORTED | {"preset": preset}


def _of_other_program(source: str, found: dict[str, Any], sets: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that are known of a network of another program, with those of `--set`.

    Raises:
        BadConfigError: its process is unknown.
    """
    told = found | sets
    channels, out_channels = told["data.channels"], told.pop("out_channels")
    if sets.get("diffusion.self_conditioning"):
        channels //= 2
    told |= {"data.channels": channels}
    if out_channels != channels:
        told |= {"diffusion.variance": "learned_range"}
    if "diffusion.schedule" not in told:
        raise BadConfigError(
            f"{source} has no scheduler_config.json: state the process of its training, such as "
            "--set diffusion.schedule=linear --set diffusion.prediction=epsilon"
        )
    if sets.get("model.label_dropout") and found["model.kind"] == "unet":
        # The last embedding means "no class".
        told["model.num_classes"] = found["model.num_classes"] - 1
    return told


def _check_run(run: Store, name: str, config: RunConfig, sets: dict[str, Any]) -> None:
    """Checks that the checkpoint can become one of this run.

    Raises:
        BadRequestError: the run learns otherwise or has other values of `--set`, or has checkpoints of training here.
    """
    stored = records.load_config(run)
    if stored is None:
        return
    # A run of ours may have been changed in these keys between two of its checkpoints.
    free = {key for key in stored.flat() if is_free(key)} - sets.keys()
    others = [key for key, value in stored.flat().items() if key not in free and config.flat().get(key) != value]
    trained = [fence for fence in records.attempt_fences(run) if not records.load_attempt(run, fence).imported]
    if others or trained:
        why = f"has another {others[0]}" if others else f"has trained since (attempt {trained[0]})"
        raise BadRequestError(f"run {name!r} exists and {why}: import under another name")


def _state(config: RunConfig, given: OtherCheckpoint, source: str) -> TrainState:
    """Returns a state with the imported weights and averages, and moments of zero.

    Raises:
        BadDataError: the tensors do not fit the network of the configuration, or are not finite numbers.
    """
    import torch

    from job.config import method

    try:
        # At first without memory, which a forged configuration would fill; there the tensors are those of the file.
        for device in (torch.device("meta"), torch.device("cpu")):
            with device:
                network = method.build_network(config, device)
            network.load_state_dict(given.tensors, assign=device.type == "meta")
            for name, parameter in network.named_parameters():
                if not parameter.is_floating_point() or not parameter.isfinite().all():
                    raise BadDataError(f"{source}: the tensor {name} holds values that are not finite numbers")
    except RuntimeError as error:
        said = printable(" ".join(str(error).split()))
        raise BadDataError(f"{source} looks like {given.what}, and is not: {said:.400}") from None
    return method.initial_state(network, config)


def _commit(of_run: RunHandle, state: TrainState, lease: Lease, *, stop: Stop, source: str) -> str:
    """Records the run, if it is new, the attempt and its checkpoint; returns the URI of the checkpoint."""
    run, config = of_run.run, of_run.config
    if records.load_config(run) is None:
        records.create_config(run, config)
    device = describe_device(state.first_nonfinite.device, config.train)
    attempt = records.record_attempt(
        run, lease.fence, lease.holder, changes={}, world_size=1, device=device, imported=source
    )
    # Of no epoch, and the last of very many: the next import into this run must not retire this checkpoint.
    retention = Retention(config.updated({"checkpoint.keep_last": LARGEST}), MAX_IMAGES_SEEN + 1)
    leased = LeasedRun(run, retention, attempt, lease, of_run.classes)
    writer = CheckpointWriter(leased, state.tensors(), before=None, stop=stop)
    try:
        writer.save(state.images_seen, state.log.reduced().tolist())
        writer.wait()
    finally:
        writer.close(wait=False)
    status = records.Status(
        state=State.IMPORTED,
        fence=attempt.fence,
        images_seen=state.images_seen,
        target_images=state.images_seen,
        epoch=round(state.images_seen / of_run.dataset_images, 3),
        loss=None,
        images_per_second=None,
        updated=utc_now(),
    )
    run.put(records.STATUS_KEY, status.to_json())
    return f"{run.uri}/{CheckpointRef(attempt.fence, state.images_seen).key}"
