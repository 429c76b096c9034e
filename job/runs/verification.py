"""Verification of a run: every object of its folder against its own hash, or against the hash in another object.

Records carry their own hash. Manifests hold the hashes of tensors and metrics, records of pieces those of images, and
the provenance of a picture that of the picture. Verification also reports objects that no record names: harmless
leftovers of killed attempts, and objects that are not part of the run. The page has no hash: `ddpm report` makes it
again from the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from job.config import RunConfig
from job.exits import BadDataError, State
from job.pieces import PieceRecord
from job.processes.lease import LEASE_KEY, MAX_FENCE
from job.progress import Progress
from job.runs import drawings, records
from job.runs.checkpoints import LATEST_KEY, Average, Manifest, lost_manifest, sha256_of
from job.runs.drawings import BatchIndex, Provenance
from job.runs.inventory import Inventory
from job.runs.layout import MAX_IMAGES_SEEN, OF_CHECKPOINT, PICTURES, SAMPLES, ObjectKind, located
from job.runs.records import CONFIG_KEY, STATUS_KEY, Attempt, Status
from job.runs.retention import Retention, leftovers
from job.store import ObjectMissingError, Store

HASHERS = 4


@dataclass(frozen=True)
class Findings:
    """The result of a verification."""

    problems: list[str]
    """A line for each bad object: its URI and the problem."""
    objects: int
    size_bytes: int
    leftovers: dict[str, int]
    """Sizes in bytes of the objects that killed attempts left, by key."""


class _Named(NamedTuple):
    """The hashes of one object in another."""

    by: str
    sha256s: list[str]
    """A single one, but for pictures, which may be drawn again."""


def verify_run(bucket: Store, name: str) -> Findings:
    """Checks every object of a run, also while it trains.

    Raises:
        MissingInputError: the bucket lacks the run.
    """
    inventory = Inventory(bucket, name)
    configs = _check_config(inventory)
    _check_named(inventory)
    left = leftovers(inventory.run, inventory.places, MAX_FENCE + 1)
    _check_lost(inventory, configs, left)
    named = _named(inventory)
    _check_strangers(inventory, inventory.sizes.keys() - named.keys() - left.keys())
    bar = Progress(f"verifying {name}", total=len(named), unit="objects")
    with bar, ThreadPoolExecutor(HASHERS) as pool:
        for done, _ in enumerate(pool.map(lambda key: _check_hash(inventory, key, named[key]), named), 1):
            bar.update(done)
    return Findings(
        sorted(inventory.problems.values()),
        len(inventory.sizes),
        sum(inventory.sizes.values()),
        {key: inventory.sizes[key] for key in sorted(left)},
    )


def _check_config(inventory: Inventory) -> tuple[RunConfig, RunConfig] | None:
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
    try:
        return config, records.as_last_changed(inventory.run, config)
    except BadDataError as error:
        # Without the last changes the rules of retention are unknown, so that lost checkpoints cannot be found.
        inventory.problems.setdefault(max(inventory.keys(ObjectKind.ATTEMPT)), str(error))
        return None


def _check_named(inventory: Inventory) -> None:
    """Reports missing attempts that records name, and missing records of batches."""
    for key, record in inventory.records.items():
        match record:
            case Attempt(previous=int(previous)):
                inventory.missing(ObjectKind.ATTEMPT.key(fence=previous), f"attempt {record.fence} came after it")
            case Manifest() | Average() | Status() | Provenance():
                inventory.missing(ObjectKind.ATTEMPT.key(fence=record.fence), f"{key} is of this attempt")
            case BatchIndex():
                batch = inventory.places[key].batch
                recorded = [ObjectKind.RECORD.key(batch=batch, piece=number) for number in range(len(record.pieces))]
                for other in (ObjectKind.GRID.key(batch=batch), *recorded):
                    inventory.missing(other, f"{key} says that everything is there")
    drawn = (place for place in inventory.places.values() if place.kind and place.kind.folder == SAMPLES)
    for batch in {place.batch for place in drawn if place.batch}:
        inventory.missing(ObjectKind.DRAWING.key(batch=batch), "there are images of it")


def _check_lost(inventory: Inventory, configs: tuple[RunConfig, RunConfig] | None, left: Iterable[str]) -> None:
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


def _named(inventory: Inventory) -> dict[str, _Named]:
    """Returns the hashes of objects in manifests, records of pieces and provenances, by key."""
    named: dict[str, _Named] = {}
    for by, manifest in inventory.all(Manifest).items():
        named |= {key: _Named(by, [sha256]) for key, sha256 in manifest.objects.items()}
    for by, record in (inventory.all(PieceRecord) | inventory.all(Average)).items():
        named |= {file.key: _Named(by, [file.sha256]) for file in record.files}
    named |= {key: _Named(f"{ObjectKind.PROVENANCE.folder}/{key}", []) for key in inventory.keys(*PICTURES)}
    for place in inventory.places.values():
        if place.of in named:
            named[place.of].sha256s.append(place.sha256)
    return named


def _check_strangers(inventory: Inventory, unnamed: Iterable[str]) -> None:
    """Reports objects that are not part of a run, or that a sound manifest or record should name and does not."""
    for key in unnamed:
        place, by = inventory.places[key], ""
        if place.kind in OF_CHECKPOINT:
            by = place.checkpoint.manifest_key
        elif place.kind is ObjectKind.AVERAGE_TENSORS:
            by = ObjectKind.AVERAGE.key(checkpoint=place.checkpoint, group=place.group)
        elif place.kind in (ObjectKind.PIECE, ObjectKind.IMAGE):
            by = ObjectKind.RECORD.key(batch=place.batch, piece=place.piece)
        if place.kind is None or by in inventory.records:
            inventory.bad(key, "is not part of the run: move it elsewhere, or delete it")


def _check_hash(inventory: Inventory, key: str, named: _Named) -> None:
    """Reports an object that is missing, or whose hash differs from the one in another object."""
    (by, sha256s), run = named, inventory.run
    try:
        with run.open(key) as file:
            sha256 = sha256_of(file)
    except ObjectMissingError:
        # An object may have been deleted by the rules since it was listed, with the one that names it.
        if run.exists(by):
            inventory.bad(key, f"is missing, though {by} names it")
        return
    # A picture may have been drawn again since the run was listed.
    if sha256 not in sha256s and not run.exists(ObjectKind.PROVENANCE.key(of=key, sha256=sha256)):
        inventory.bad(key, f"is corrupt, or another program wrote it: nothing in {by} has its SHA-256")
