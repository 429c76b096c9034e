"""Verifying a run: every object of its folder against the hash that it carries itself, or that another has of it.

A checkpoint's manifest, an attempt's record, the status and the lease carry their own; files and metrics are named by
manifests; pictures have it in their provenance. What is there without being named by anything is told as well: what
killed attempts left behind, which harms nobody, and what is no part of a run.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from job.config import RunConfig
from job.data.shards import load_index
from job.exits import BadDataError, JobError, MissingInputError
from job.runs import records
from job.runs.checkpoints import (
    FOLDER,
    LATEST,
    MANIFEST,
    READERS,
    CheckpointRef,
    Manifest,
    load_manifest,
    lost_manifest,
    manifest_key,
)
from job.runs.grace import PROBE
from job.runs.lease import LEASE, load_lease
from job.runs.provenance import picture_problems
from job.runs.records import ATTEMPTS, CONFIG, STATUS, Attempt, Status, dataset_key_of
from job.runs.retention import READING, Reader, Retention, read_of
from job.sampling.names import SAMPLES, how_drawn, label_of
from job.sampling.piece_checks import BatchChecks, batch_of
from job.store import ObjectMissingError, Store

BLOCK_BYTES = 4 << 20
HASHERS = 4

Check = Callable[[], list[str]]


@dataclass
class Findings:
    """What came of it."""

    problems: list[str] = field(default_factory=list)
    """A line for each bad object: its URI and what is wrong with it."""
    objects: int = 0
    size_bytes: int = 0
    leftovers: dict[str, int] = field(default_factory=dict)
    """Sizes in bytes of what killed attempts left behind, by key."""


def verify_run(bucket: Store, name: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
    """Checks every object of a run, also while it trains.

    Args:
        bucket: where it lies.
        name: of the run.
        progress: called with the bytes checked so far and in all; from several threads.

    Raises:
        MissingInputError: there is no such run.
    """
    return _Verification(bucket, name, progress).findings()


def checkpoint_problems(run: Store, ref: CheckpointRef) -> list[str]:
    """What is wrong with one checkpoint: a line for each bad object; none if it can be restored."""
    try:
        manifest = load_manifest(run, ref)
    except (BadDataError, ObjectMissingError) as error:
        return [str(error)]
    return _done(_Objects(run, lambda size_bytes: None).of_manifest(manifest))


def _done(checks: Iterable[Check]) -> list[str]:
    with ThreadPoolExecutor(HASHERS) as pool:
        return [problem for found in pool.map(lambda check: check(), checks) for problem in found]


class _Objects:
    """Objects that manifests name, compared with their hashes there."""

    def __init__(self, run: Store, advance: Callable[[int], None]) -> None:
        self._run, self._advance = run, advance
        self._owners: dict[str, str] = {}
        self.named: set[str] = set()

    def of_manifest(self, manifest: Manifest) -> Iterator[Check]:
        """The checks of what it names, but for what was named before."""
        by = manifest_key(manifest.ref)
        for record in manifest.files:
            yield from self._check(f"{manifest.ref.key}/{record.name}", record.sha256, record.bytes, by)
        for segment in manifest.metric_segments:
            yield from self._check(segment.key, segment.sha256, None, by)
            yield from self._check(segment.events_key, segment.events_sha256, None, by)

    def _check(self, key: str, sha256: str, size_bytes: int | None, by: str) -> Iterator[Check]:
        if key not in self.named:
            self.named.add(key)
            self._owners.setdefault(sha256, key)
            yield partial(self.problems, key, sha256, size_bytes, by)

    def problems(self, key: str, sha256: str, size_bytes: int | None, by: str) -> list[str]:
        """What is wrong with the object at `key`, which the object `by` names: nothing, or one line."""
        uri, digest, found_bytes = self._run.uri_of(key), hashlib.sha256(), 0
        try:
            with self._run.open(key) as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    found_bytes += len(block)
                    self._advance(len(block))
        except ObjectMissingError:
            # What was retired since it was listed is not missed.
            return [f"{uri} is missing, though {by} names it"] if self._run.exists(by) else []
        if digest.hexdigest() == sha256:
            return []
        if owner := self._owners.get(digest.hexdigest()):
            return [f"{uri} holds what belongs to {owner}"]
        if size_bytes is not None and found_bytes != size_bytes:
            return [f"{uri} has {found_bytes:,} bytes instead of {size_bytes:,}"]
        return [f"{uri} is rotten: its SHA-256 is not the one in {by}" if found_bytes else f"{uri} is empty"]


class _Verification:
    """One look at a run. What is listed once may be retired, written over or joined by more while it is checked."""

    def __init__(self, bucket: Store, name: str, progress: Callable[[int, int], None]) -> None:
        self._bucket, self._name, self._progress = bucket, name, progress
        self._run = records.run_store(bucket, name)
        self._sizes = {entry.key: entry.size_bytes for entry in self._run.list()}
        # A lease alone is what is left of a run that was deleted.
        if not self._sizes.keys() - {LEASE}:
            raise MissingInputError(f"there is no run {name!r} in {bucket.uri}: `ddpm runs list` shows those there are")
        self._total_bytes, self._done_bytes, self._lock = sum(self._sizes.values()), 0, threading.Lock()
        self._objects = _Objects(self._run, self._advance)
        self._leftovers: set[str] = set()
        self._problems: list[str] = []
        self._missed: dict[str, str] = {}
        self._manifests: dict[CheckpointRef, Manifest] = {}
        self._attempts: dict[int, Attempt] = {}
        self._config: RunConfig | None = None
        self._dataset_images: int | None = None
        self._status: Status | None = None

    def findings(self) -> Findings:
        """Checks everything; in the order in which one thing is needed to judge the next."""
        self._load_attempts()
        self._load_config()
        self._load_manifests()
        self._load_status()
        self._look_at_latest()
        checks = [check for manifest in self._manifests.values() for check in self._objects.of_manifest(manifest)]
        unnamed = [key for key in self._sizes if key not in self._objects.named]
        pieces = BatchChecks(self._run, set(self._sizes), self._objects.problems, self._attempt_ids)
        checks += pieces.checks()
        checks += [check for key in unnamed if (check := self._check_of(key))]
        self._problems += _done(checks)
        self._look_for_lost_manifests()
        self._look_for_lost_pictures()
        leftovers = self._leftovers | pieces.leftovers
        return Findings(
            sorted([*self._problems, *self._missed.values(), *pieces.problems]),
            len(self._sizes),
            self._total_bytes,
            {key: self._sizes[key] for key in sorted(leftovers)},
        )

    def _advance(self, size_bytes: int) -> None:
        with self._lock:
            self._done_bytes += size_bytes
            done = self._done_bytes
        self._progress(min(done, self._total_bytes), self._total_bytes)

    def _missing(self, key: str, why: str) -> None:
        self._missed.setdefault(key, f"{self._run.uri_of(key)} is missing, though {why}")

    def _load_attempts(self) -> None:
        for fence in records.attempt_fences(self._run):
            try:
                self._attempts[fence] = records.load_attempt(self._run, fence)
            except BadDataError as error:
                self._problems.append(str(error))
        for fence, attempt in self._attempts.items():
            if attempt.previous is not None and records.attempt_key(attempt.previous) not in self._sizes:
                self._missing(records.attempt_key(attempt.previous), f"attempt {fence} came after it")

    def _load_manifests(self) -> None:
        refs = [ref for key in self._sizes if (ref := _manifest_of(key))]

        def load(ref: CheckpointRef) -> Manifest | str | None:
            try:
                return load_manifest(self._run, ref)
            except BadDataError as error:
                return str(error)
            except ObjectMissingError:
                return None

        with ThreadPoolExecutor(READERS) as pool:
            for ref, loaded in zip(refs, pool.map(load, refs), strict=True):
                if isinstance(loaded, Manifest):
                    self._manifests[ref] = loaded
                elif loaded is not None:
                    self._problems.append(loaded)
        for ref, manifest in [*self._manifests.items()]:
            if (attempt := self._attempts.get(ref.fence)) and attempt.id != manifest.attempt:
                self._problems.append(
                    f"{self._run.uri_of(manifest_key(ref))} was not written by attempt {ref.fence} of this run"
                )
                del self._manifests[ref]
            elif records.attempt_key(ref.fence) not in self._sizes:
                self._missing(records.attempt_key(ref.fence), f"{ref.key} is of this attempt")

    def _load_config(self) -> None:
        try:
            config = records.load_config(self._run)
        except BadDataError as error:
            self._problems.append(str(error))
            return
        if config is None:
            # An attempt that begins takes the lease and measures the bucket first.
            if any(key != LEASE and not key.startswith(f"{PROBE}/") for key in self._sizes):
                self._missing(CONFIG, "there are other objects of the run")
            return
        config_file_sha256 = hashlib.sha256(self._run.read(CONFIG).data).hexdigest()
        for fence, attempt in [*self._attempts.items()]:
            if attempt.config_file_sha256 != config_file_sha256:
                self._problems.append(f"{self._run.uri_of(records.attempt_key(fence))} is another run's")
                del self._attempts[fence]
        # Without what was changed later nobody knows which checkpoints are to be there; the damage has been told.
        with suppress(BadDataError):
            self._config = records.as_last_changed(self._run, config)
        # Without its dataset nobody knows where the run's epochs end, but most of it can be checked.
        with suppress(JobError):
            self._dataset_images = load_index(self._bucket, dataset_key_of(config)).images

    def _load_status(self) -> None:
        try:
            self._status = Status.load(self._run, STATUS)
        except BadDataError as error:
            self._problems.append(str(error))
        except ObjectMissingError:
            if self._manifests:
                self._missing(STATUS, "there are checkpoints")
        try:
            lease = load_lease(self._run)
            attempt = self._attempts.get(lease.fence)
            if attempt and attempt.holder and attempt.holder != lease.holder:
                self._problems.append(self._foreign(LEASE, attempt))
        except BadDataError as error:
            self._problems.append(str(error))
        except ObjectMissingError:
            if self._attempts:
                self._missing(LEASE, "there were attempts")
        if self._status and (attempt := self._attempts.get(self._status.fence)):
            if self._status.attempt and attempt.id != self._status.attempt:
                self._problems.append(self._foreign(STATUS, attempt))
                self._status = None
        elif self._status and records.attempt_key(self._status.fence) not in self._sizes:
            self._missing(records.attempt_key(self._status.fence), f"{STATUS} is of this attempt")

    @property
    def _attempt_ids(self) -> dict[int, str]:
        return {fence: attempt.id for fence, attempt in self._attempts.items()}

    def _foreign(self, key: str, attempt: Attempt) -> str:
        return f"{self._run.uri_of(key)} is another run's: attempt {attempt.fence} of this one did not write it"

    def _look_at_latest(self) -> None:
        refs = [ref for key in self._sizes if (ref := _manifest_of(key))]
        try:
            if lost := lost_manifest(self._run, refs):
                self._problems.append(lost)
        except BadDataError as error:
            self._problems.append(str(error))
        # Whoever was killed after the very first one had not said so yet.
        if len(refs) > 1 and LATEST not in self._sizes:
            self._missing(LATEST, "there are checkpoints")

    def _check_of(self, key: str) -> Check | None:
        """What is to be done about an object that no manifest names; what was loaded before has been checked."""
        folder, _, name = key.partition("/")
        uri = self._run.uri_of(key)
        foreign = f"{uri} is no part of the run: move it elsewhere, or delete it"
        is_picture = key.endswith((".png", ".gif")) and "/" not in name
        if key in (CONFIG, STATUS, LATEST, LEASE) or (folder == ATTEMPTS and re.fullmatch(r"\d{6}\.json", name)):
            return None
        if folder in (SAMPLES, "figures") and is_picture:
            return partial(self._look_at_picture, key)
        if batch_of(key):
            return None
        if folder == READING and (ref := read_of(key)):
            return partial(self._look_at_reader, key, ref)
        if folder == PROBE:
            self._leftovers.add(key)
            return None
        if _manifest_of(key):
            return None
        if folder == FOLDER and (ref := CheckpointRef.parse(name.partition("/")[0])):
            if ref in self._manifests:
                return lambda: [foreign]
            # Who knows what a damaged manifest names? Files without any are what killed attempts leave.
            if manifest_key(ref) not in self._sizes:
                self._leftovers.add(key)
            return None
        if (folder == "metrics" and re.fullmatch(r"\d{6}-\d{12}\.jsonl", name)) or (
            folder == "tensorboard" and re.fullmatch(r"events\.out\.tfevents\.\d{6}-\d{12}", name)
        ):
            if all(ref in self._manifests for key in self._sizes if (ref := _manifest_of(key))):
                self._leftovers.add(key)
            return None
        return lambda: [foreign]

    def _look_at_picture(self, key: str) -> list[str]:
        self._advance(self._sizes[key])
        return picture_problems(self._run, key, self._attempt_ids)

    def _look_at_reader(self, key: str, ref: CheckpointRef) -> list[str]:
        try:
            reader = Reader.load(self._run, key)
        except BadDataError as error:
            return [str(error)]
        except ObjectMissingError:
            return []
        if reader.is_over:
            self._leftovers.add(key)
        return [] if reader.checkpoint == ref.key else [f"{self._run.uri_of(key)} belongs to {reader.checkpoint}"]

    def _look_for_lost_manifests(self) -> None:
        """Tells manifests that were lost from those that were retired, or never written, by killed attempts.

        An attempt commits in order, so a checkpoint before another of the same attempt was there, and so was one whose
        metrics another names. If the run's rules would not have retired it, somebody else deleted its manifest.
        """
        if self._config is None:
            return
        refs = {ref for key in self._sizes if (ref := _manifest_of(key))}
        unfinished = {ref for key in self._leftovers if (ref := _checkpoint_of(key))}
        segments = {segment.name for manifest in self._manifests.values() for segment in manifest.metric_segments}
        retention, dataset_images = Retention.of(self._config), self._dataset_images
        if dataset_images is None:
            retention, dataset_images = Retention(retention.keep_last, 0, ()), 1
        for ref in unfinished:
            was_committed = ref.key.removeprefix(f"{FOLDER}/") in segments
            was_committed |= any(other.fence == ref.fence and other.images_seen > ref.images_seen for other in refs)
            old = retention.retire([*refs, ref], dataset_images, self._config.train.batch_size)
            if was_committed and ref not in old and not self._run.exists(manifest_key(ref)):
                self._missing(manifest_key(ref), "its files are there, and the run's rules keep it")

    def _look_for_lost_pictures(self) -> None:
        """A finished run has its last pictures; others may be deleted by whoever likes."""
        config, status, dataset_images = self._config, self._status, self._dataset_images
        if config is None or status is None or status.state != "finished" or dataset_images is None:
            return
        label = label_of(status.images_seen, dataset_images, config.train.batch_size)
        how = how_drawn(config.sample.sampler, config.sample.steps)
        for key in (f"{SAMPLES}/{label}-{how}.png", f"{SAMPLES}/denoising-{label}.gif", "figures/loss.png"):
            if key not in self._sizes:
                self._missing(key, "the run is finished")


def _checkpoint_of(key: str) -> CheckpointRef | None:
    folder, _, name = key.partition("/")
    return CheckpointRef.parse(name.partition("/")[0]) if folder == FOLDER else None


def _manifest_of(key: str) -> CheckpointRef | None:
    """The checkpoint whose manifest lies at `key`; none for other objects."""
    ref = _checkpoint_of(key)
    return ref if ref and key == f"{ref.key}/{MANIFEST}" else None
