"""`ddpm ema`: averages of any width, combined after training (Karras et al. 2024, section 3.2).

    RUN/snapshots/000001-000000048000/ema-0.05-00.safetensors …         every `ema.snapshot_epochs`, in half precision
    RUN/checkpoints/000002-000000096000/averages/UNIQUE/ema-0.13-00.safetensors …   combined, uploaded first
                                        averages/ema-0.13.json          created once, last: the commit

A manifest names all snapshots of its run so far, as it does with metrics. Snapshots stay as long as the run; a combined
average belongs to a checkpoint and is deleted with it. `ddpm ema` has no lease: it marks the checkpoint as being read,
and writes under a fresh prefix.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ddpm.ema import Stored, reconstruct
from job.config import RunConfig
from job.config.schema import average_name
from job.coordination.sealed import NamedObject
from job.exits import BadDataError, BadRequestError
from job.progress import Progress, note
from job.runs import records
from job.runs.checkpoints import AverageRecord, Manifest, choose, load_average, load_manifest
from job.runs.layout import CheckpointRef, ObjectKind, located
from job.runs.retention import reading_chosen
from job.runs.run import label_at
from job.runs.writer import plan_parts, write_part
from job.stop import Stop
from job.store import ObjectExistsError, ObjectMissingError, Store, open_bucket
from job.store.files import scratch_folder

if TYPE_CHECKING:
    from torch import Tensor


_Sources = list[tuple[Stored, list[NamedObject]]]
"""Stored averages of the run, and the files of each."""


def make_averages(bucket_uri: str, name: str, std: float, checkpoints: str) -> None:
    """Makes the average of width `std` for each chosen checkpoint that lacks it, and prints its URI.

    Raises:
        MissingInputError: the bucket lacks the run or the checkpoint.
        BadRequestError: the run keeps no averages of this kind.
        BadDataError: a checkpoint is damaged.
        StoppedError: a signal came; the same command begins the unfinished average again.
    """
    stop = Stop().install()
    bucket = open_bucket(bucket_uri, stop)
    run, config, group = records.run_store(bucket, name), records.existing_config(bucket, name), average_name(std)
    if not config.ema.stds:
        raise BadRequestError(f"run {name!r} has no averages to combine: set ema.stds and ema.snapshot_epochs to train")
    dataset_images, batch_size = records.dataset_images_of(bucket, config), config.train.batch_size
    find = partial(choose, run, checkpoints, dataset_images, batch_size)
    with reading_chosen(run, find) as (refs, renew):

        def check() -> None:
            stop.check("while averages were added up")
            renew()

        for ref in refs:
            of = f"{group} of {label_at(ref.images_seen, dataset_images, batch_size)}"
            manifest = load_manifest(run, ref)
            if group in manifest.groups:
                print(f"{run.uri}/{ref.key}  ({of} is in the checkpoint itself)")
                continue
            try:
                average = load_average(run, ref, group)
            except ObjectMissingError:
                average = _make(run, manifest, _sources(config, manifest), std, check)
            how = f"of {average.made_of:,} averages, {average.error:.2%} from its profile"
            print(f"{run.uri_of(ObjectKind.AVERAGE.key(checkpoint=ref, group=group))}  ({of}, {how})")


def _sources(config: RunConfig, manifest: Manifest) -> _Sources:
    """Returns the averages in a checkpoint, and the snapshots before."""
    stds = dict(zip(config.ema.names, config.ema.stds, strict=True))
    found: dict[tuple[CheckpointRef, str], list[NamedObject]] = {}
    # The checkpoint has its averages in full precision, so that its snapshots are not needed.
    for file in manifest.files:
        if (group := manifest.group_of(file)) in stds:
            found.setdefault((manifest.ref, group), []).append(file)
    for file in manifest.snapshots:
        place = located(file.key)
        if place.checkpoint.images_seen < manifest.images_seen:
            found.setdefault((place.checkpoint, place.group), []).append(file)
    return [(Stored(stds[group], ref.images_seen), files) for (ref, group), files in found.items()]


def _make(run: Store, manifest: Manifest, sources: _Sources, std: float, check: Callable[[], None]) -> AverageRecord:
    """Combines an average for a checkpoint and commits it; returns another process's if that was committed first."""
    ref, group, unique = manifest.ref, average_name(std), uuid.uuid4().hex
    with Progress(f"{group} of {manifest.images_seen:,} images", total=len(sources), unit="averages") as bar:

        def advance(done: int) -> None:
            check()
            bar.update(done)

        sources, tensors, error = _combined(run, sources, Stored(std, manifest.images_seen), advance)
    files = []
    with scratch_folder("average") as folder:
        for number, part in enumerate(plan_parts({group: tensors}).values()):
            key = ObjectKind.AVERAGE_TENSORS.key(checkpoint=ref, unique=unique, group=group, number=number)
            files.append(write_part(folder / "part", key, part))
            run.move(folder / "part", key, fresh=True)
    average = AverageRecord(std=std, made_of=len(sources), error=error, files=tuple(files))
    try:
        run.create(ObjectKind.AVERAGE.key(checkpoint=ref, group=group), average.to_json())
    except ObjectExistsError:
        for file in files:
            run.delete(file.key)
        return load_average(run, ref, group)
    return average


def _combined(
    run: Store, sources: _Sources, wanted: Stored, advance: Callable[[int], None]
) -> tuple[_Sources, dict[str, Tensor], float]:
    """Combines the sound sources; returns them, the float32 sum, and the distance of its profile from the wanted one.

    Raises:
        BadDataError: an average of the checkpoint itself is damaged.
    """
    from safetensors.torch import load

    factors, error = reconstruct([stored for stored, _ in sources], wanted)
    total: dict[str, Tensor] = {}
    for done, ((stored, files), factor) in enumerate(zip(sources, factors.tolist(), strict=True)):
        advance(done)
        try:
            contents = [file.read(run) for file in files]
        except BadDataError as damage:
            if stored.images_seen == wanted.images_seen:
                raise
            note(f"going on without the averages of {stored.images_seen:,} images: {damage}")
            return _combined(run, sources[:done] + sources[done + 1 :], wanted, advance)
        for content in contents:
            for name, tensor in load(content).items():
                # Factors alternate in sign: a sum in float32 would cancel most digits.
                part = tensor.double() * factor
                total[name] = total[name] + part if name in total else part
    return sources, {name: tensor.float() for name, tensor in total.items()}, error
