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

from job.pieces import PieceRecord
from job.processes.lease import MAX_FENCE
from job.progress import Progress
from job.runs.checkpoints import Average, Manifest, sha256_of
from job.runs.cross_checks import check_attempts, check_batches, check_config, check_lost
from job.runs.inventory import Inventory
from job.runs.layout import OF_CHECKPOINT, PICTURES, ObjectKind
from job.runs.retention import leftovers
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

    The order matters: a check judges only records that the checks before it left as sound.

    Raises:
        MissingInputError: the bucket lacks the run.
    """
    inventory = Inventory(bucket, name)
    configs = check_config(inventory)
    check_attempts(inventory)
    check_batches(inventory)
    left = leftovers(inventory.run, inventory.places, MAX_FENCE + 1)
    check_lost(inventory, configs, left)
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
