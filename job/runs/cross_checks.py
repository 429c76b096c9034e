"""Checks of a run's objects against each other, which find records of other runs and missing objects."""

from __future__ import annotations

from collections.abc import Iterable

from job.config import RunConfig
from job.exits import BadDataError, State
from job.pieces import PieceRecord
from job.processes.lease import LEASE_KEY, LeaseRecord
from job.runs import drawings, records
from job.runs.checkpoints import LATEST_KEY, Average, Manifest, lost_manifest
from job.runs.drawings import BatchIndex, DrawingRecord, Provenance, named_piece
from job.runs.inventory import Inventory
from job.runs.layout import MAX_IMAGES_SEEN, OF_CHECKPOINT, SAMPLES, ObjectKind, located
from job.runs.records import CONFIG_KEY, STATUS_KEY, Attempt, Status
from job.runs.retention import Retention


def check_config(inventory: Inventory) -> tuple[RunConfig, RunConfig] | None:
    """Checks the configuration; returns it as the run began and as it was last changed, if both are sound."""
    try:
        config = records.load_config(inventory.run)
    except BadDataError as error:
        inventory.problems[CONFIG_KEY] = str(error)
        return None
    if config is None:
        # A new attempt takes the lease and measures the bucket before it stores the configuration.
        if len(inventory.keys(ObjectKind.LEASE, ObjectKind.PROBE)) < len(inventory.sizes):
            inventory.missing(CONFIG_KEY, "there are other objects of the run")
        return None
    sha256 = records.hash_of_config(inventory.run)
    for key, attempt in inventory.all(Attempt).items():
        if attempt.config_sha256 != sha256:
            inventory.foreign(key, "it is about another configuration")
    try:
        return config, records.as_last_changed(inventory.run, config)
    except BadDataError as error:
        # Without the last changes the rules of retention are unknown, so that lost checkpoints cannot be found.
        inventory.problems.setdefault(max(inventory.keys(ObjectKind.ATTEMPT)), str(error))
        return None


def check_attempts(inventory: Inventory) -> None:
    """Checks attempts against each other, and records against the attempt that wrote them."""
    ids = {attempt.fence: attempt.id for attempt in inventory.all(Attempt).values()}
    for key, record in list(inventory.records.items()):
        match record:
            case Attempt(previous=int(previous)):
                inventory.missing(ObjectKind.ATTEMPT.key(fence=previous), f"attempt {record.fence} came after it")
            case Manifest() | Average() | Status() | Provenance():
                inventory.missing(ObjectKind.ATTEMPT.key(fence=record.fence), f"{key} is of this attempt")
                if record.attempt not in ("", ids.get(record.fence, record.attempt)):
                    inventory.foreign(key, f"attempt {record.fence} of this one did not write it")
            case LeaseRecord() if record.holder != ids.get(record.fence, record.holder):
                inventory.foreign(key, f"attempt {record.fence} of this one did not hold it")


def check_batches(inventory: Inventory) -> None:
    """Checks records of pieces against the drawing, and the index against the records."""
    for key, record in inventory.all(PieceRecord).items():
        batch = inventory.places[key].batch
        drawing_key, index_key = ObjectKind.DRAWING.key(batch=batch), ObjectKind.INDEX.key(batch=batch)
        drawing, index = inventory.records.get(drawing_key), inventory.records.get(index_key)
        if record.number != inventory.places[key].piece:
            inventory.bad(key, "is not in its place: it was written for another piece")
        if isinstance(drawing, DrawingRecord) and record.fingerprint != drawing.drawing.fingerprint:
            inventory.bad(key, f"is about another drawing than {drawing_key}")
        if isinstance(index, BatchIndex):
            named = named_piece(record, index.drawing)
            if named not in index.pieces[record.number : record.number + 1]:
                inventory.bad(index_key, "differs from the records of its pieces")
    for key, index in inventory.all(BatchIndex).items():
        batch = inventory.places[key].batch
        recorded = [ObjectKind.RECORD.key(batch=batch, piece=number) for number in range(len(index.pieces))]
        for other in (ObjectKind.GRID.key(batch=batch), *recorded):
            inventory.missing(other, f"{key} says that everything is there")
    drawn = (place for place in inventory.places.values() if place.kind and place.kind.folder == SAMPLES)
    for batch in {place.batch for place in drawn if place.batch}:
        inventory.missing(ObjectKind.DRAWING.key(batch=batch), "there are images of it")


def check_lost(inventory: Inventory, configs: tuple[RunConfig, RunConfig] | None, left: Iterable[str]) -> None:
    """Reports objects that are lost: those that a run in this state must have.

    Files without a manifest are among the `left` objects of killed attempts. If their attempt has a later checkpoint,
    or another manifest names their metrics, the checkpoint was committed; if the run's rules keep it, its manifest is
    lost. A finished run has its last pictures; other pictures may be deleted.
    """
    refs = [inventory.places[key].checkpoint for key in inventory.keys(ObjectKind.MANIFEST)]
    if inventory.keys(ObjectKind.ATTEMPT):
        inventory.missing(LEASE_KEY, "there were attempts")
    if refs:
        inventory.missing(STATUS_KEY, "there are checkpoints")
    # An attempt that was killed after its first manifest has not written `LATEST` yet.
    if len(refs) > 1:
        inventory.missing(LATEST_KEY, "there are checkpoints")
    if lost := lost_manifest(inventory.run, refs):
        inventory.problems[LATEST_KEY] = lost
    if configs is None:
        return
    stored, config = configs
    dataset_images = records.dataset_images_of(inventory.bucket, config)
    retention = Retention(config, dataset_images)
    committed = {located(key).checkpoint for manifest in inventory.all(Manifest).values() for key in manifest.objects}
    for ref in {inventory.places[key].checkpoint for key in left if inventory.places[key].kind in OF_CHECKPOINT}:
        came_later = [other for other in refs if other.fence == ref.fence and other > ref]
        if (came_later or ref in committed) and ref not in retention.retire([*refs, ref]):
            inventory.missing(ref.manifest_key, "its files are there, and the run's rules keep it")
    status = inventory.records.get(STATUS_KEY)
    if isinstance(status, Status) and status.state == State.FINISHED and dataset_images <= MAX_IMAGES_SEEN:
        label = drawings.label_of(status.images_seen, dataset_images, config.train.batch_size)
        how = config.sample.name(stored.sample)
        for key in (drawings.grid_key(label, how), drawings.denoising_key(label, how), drawings.LOSS_FIGURE):
            inventory.missing(key, "the run is finished")
