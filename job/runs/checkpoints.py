"""Checkpoints in a bucket: how one is committed, found, verified and loaded.

    RUN/checkpoints/{fence:06d}-{images_seen:012d}/model-00.safetensors …     uploaded first, under a fresh prefix
                                                   MANIFEST.json              created once, last: the commit
    RUN/LATEST                                                                the last commit, a hint

A checkpoint exists when its manifest does. The newest is the one with the highest (fence, images seen) whose objects
verify: a writer that was replaced, and does not know it, has a lower fence and harms nobody. `LATEST` only tells that a
manifest was lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from ddpm.epochs import epochs_completed_by
from job.exits import BadDataError, MissingInputError
from job.runs.layout import CHECKPOINTS, CheckpointRef, ObjectKind, located
from job.runs.records import attempt_id
from job.sealed import SHA256_PATTERN, Sealed
from job.store import ObjectMissingError, Store
from job.store.files import scratch_folder

LATEST_KEY = ObjectKind.LATEST.value
PARALLEL_DOWNLOADS = 4
PARALLEL_READS = 16
"""Small objects that are read at a time."""


class FileRecord(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z]+-\d{2,}\.safetensors$")
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=SHA256_PATTERN)

    @property
    def group(self) -> str:
        """Of its tensors: `model`, `ema` or `optimizer`."""
        return self.name.partition("-")[0]


class MetricSegment(BaseModel):
    """Metric rows up to this checkpoint and since the one before, in an object of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^\d{6}-\d{12}$")
    sha256: str = Field(pattern=SHA256_PATTERN)
    events_sha256: str = Field(pattern=SHA256_PATTERN)

    @property
    def key(self) -> str:
        """The rows, as JSON lines."""
        return ObjectKind.METRICS.key(checkpoint=self.name)

    @property
    def events_key(self) -> str:
        """The same rows, as TensorBoard events."""
        return ObjectKind.EVENTS.key(checkpoint=self.name)


class Manifest(Sealed):
    """What was committed. Its existence is the commit."""

    format: int = Field(default=1, ge=1, le=1)
    fence: int = Field(ge=1)
    attempt: str
    """The id of the attempt that wrote it, which tells runs apart."""
    images_seen: int = Field(ge=0)
    created: str
    world_size: int = Field(ge=1)
    loss_sums: list[list[float]]
    """What has been added up for the next row of the metrics."""
    files: tuple[FileRecord, ...]
    metric_segments: tuple[MetricSegment, ...] = ()

    @property
    def ref(self) -> CheckpointRef:
        """Its place in the order."""
        return CheckpointRef(self.fence, self.images_seen)

    @property
    def objects(self) -> dict[str, str]:
        """SHA-256 of each object that it names, by key."""
        files = {f"{self.ref.key}/{file.name}": file.sha256 for file in self.files}
        rows = {segment.key: segment.sha256 for segment in self.metric_segments}
        return files | rows | {segment.events_key: segment.events_sha256 for segment in self.metric_segments}


class Latest(Sealed):
    """The content of `LATEST`. It is written after the manifest, so that it may name the checkpoint before."""

    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")

    @property
    def ref(self) -> CheckpointRef:
        """What it names."""
        return CheckpointRef.parse(self.checkpoint.removeprefix(f"{CHECKPOINTS}/"))


def commit_manifest(run: Store, manifest: Manifest) -> None:
    """The commit: creates the manifest once, after all its objects are there."""
    run.create(manifest.ref.manifest_key, manifest.to_json())
    run.put(LATEST_KEY, Latest(checkpoint=manifest.ref.key).to_json())


def list_checkpoints(run: Store) -> list[CheckpointRef]:
    """All committed checkpoints, oldest first."""
    found = (located(entry.key) for entry in run.list(CHECKPOINTS))
    return sorted(place.checkpoint for place in found if place and place.kind is ObjectKind.MANIFEST)


def by_progress(refs: list[CheckpointRef]) -> dict[int, CheckpointRef]:
    """One checkpoint per `images_seen`, of the highest fence where several attempts made the same one; in order."""
    newest = {ref.images_seen: ref for ref in sorted(refs)}
    return dict(sorted(newest.items()))


def load_manifest(run: Store, ref: CheckpointRef) -> Manifest:
    """Reads a manifest and checks it against its own hash, its place, and the attempt that should have written it.

    Raises:
        BadDataError: it is rotten, or not the one of this place, or another run's, moved or copied here.
        ObjectMissingError: it is gone.
    """
    manifest, uri = Manifest.load(run, ref.manifest_key), run.uri_of(ref.manifest_key)
    if manifest.ref != ref:
        raise BadDataError(f"{uri} belongs to {manifest.ref.key}")
    if attempt_id(run, ref.fence) not in ("", manifest.attempt):
        raise BadDataError(f"{uri} was not written by attempt {ref.fence} of this run")
    return manifest


def lost_manifest(run: Store, refs: list[CheckpointRef]) -> str:
    """What is wrong if `LATEST` names a checkpoint newer than all that are there, which are `refs`; or nothing.

    Raises:
        BadDataError: `LATEST` is rotten.
    """
    try:
        ref = Latest.load(run, LATEST_KEY).ref
    except ObjectMissingError:
        return ""
    # One that is older was retired after somebody was killed, or replaced, before saying what came after it.
    if (refs and ref <= max(refs)) or run.exists(ref.manifest_key):
        return ""
    return f"{run.uri_of(ref.manifest_key)} is missing, though {run.uri_of(LATEST_KEY)} names it"


def is_there(run: Store, ref: CheckpointRef) -> bool:
    """Whether a checkpoint's manifest is sound and its files have the sizes that it says; reads no more than that."""
    try:
        manifest = load_manifest(run, ref)
    except (BadDataError, ObjectMissingError):
        return False
    sizes = {entry.key.rpartition("/")[2]: entry.size_bytes for entry in run.list(ref.key)}
    return all(sizes.get(record.name) == record.bytes for record in manifest.files)


@contextmanager
def newest_good(
    run: Store, warn: Callable[[str], None], aside: set[CheckpointRef] | None = None
) -> Iterator[Restored | None]:
    """The newest checkpoint whose every file verifies, or none if there are none: what an attempt goes on from.

    Damaged ones are named through `warn` and go into `aside`. Metrics that are damaged cost rows and no work: the
    checkpoint is used without them, and its manifest then does not name them any more.

    Raises:
        BadDataError: there are checkpoints, but none of them verifies.
    """
    refs, problems = list_checkpoints(run), list[str]()
    try:
        if lost := lost_manifest(run, refs):
            problems.append(lost)
            warn(f"set aside a checkpoint: {lost}")
    except BadDataError as error:
        warn(f"{error}; the manifests tell which checkpoint is the newest")
    with ExitStack() as stack:
        for ref in reversed(refs):
            try:
                found = stack.enter_context(opened(run, ref))
            except (BadDataError, ObjectMissingError) as error:
                problems.append(str(error))
                warn(f"set aside checkpoint {run.uri}/{ref.key}: {error}")
                if aside is not None:
                    aside.add(ref)
            else:
                yield replace(found, manifest=_without_damaged_rows(run, found.manifest, warn))
                return
    if problems:
        raise BadDataError(
            f"no checkpoint of {run.uri} can be used: {'; '.join(problems)}. Restore one of them, or start another "
            "run with --run NAME"
        )
    yield None


@contextmanager
def opened(run: Store, ref: CheckpointRef, groups: tuple[str, ...] = ()) -> Iterator[Restored]:
    """The verified files of one checkpoint, or of some of its groups, on the local disk until the context ends.

    Raises:
        BadDataError: it is damaged, or another run's; the message names the object.
    """
    manifest = load_manifest(run, ref)
    records = [record for record in manifest.files if not groups or record.group in groups]
    with scratch_folder("restore") as folder:

        def fetch(record: FileRecord) -> Path:
            key, path = f"{ref.key}/{record.name}", folder / record.name
            try:
                run.download(key, path)
            except ObjectMissingError:
                raise BadDataError(f"{run.uri_of(key)} is missing, though its manifest is there") from None
            with path.open("rb") as file:
                if sha256_of(file) != record.sha256:
                    raise BadDataError(f"{run.uri_of(key)} is rotten: its SHA-256 is not the one in the manifest")
            return path

        files: dict[str, list[Path]] = {}
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            for record, path in zip(records, pool.map(fetch, records), strict=True):
                files.setdefault(record.group, []).append(path)
        yield Restored(manifest, files)


def sha256_of(file: BinaryIO) -> str:
    """The SHA-256 of all that is left to read."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint on the local disk, deleted when the context ends."""

    manifest: Manifest
    files: dict[str, list[Path]]
    """By group."""

    def copy_into(self, tensors: dict[str, dict[str, Any]]) -> None:
        """Copies the files' values into live tensors, by group and name, keeping the live memory layout.

        Raises:
            BadDataError: names or shapes do not match, or a file is none of tensors, whatever its manifest says.
        """
        from safetensors import SafetensorError, safe_open

        for group, paths in self.files.items():
            missing = set(tensors[group])
            for path in paths:
                where = f"{self.manifest.ref.key}/{path.name}"
                try:
                    with safe_open(path, framework="pt") as file:
                        for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                            target, value = tensors[group].get(name), file.get_tensor(name)
                            if target is None or target.shape != value.shape:
                                raise BadDataError(f"{where}: tensor {name!r} does not fit this configuration")
                            target.copy_(value)
                            missing.discard(name)
                except SafetensorError as error:
                    raise BadDataError(f"{where} holds no tensors ({error})") from None
            if missing:
                raise BadDataError(f"{self.manifest.ref.key}: tensor {min(missing)!r} is in no {group} file")


def _without_damaged_rows(run: Store, manifest: Manifest, warn: Callable[[str], None]) -> Manifest:
    whole, lost = list[MetricSegment](), list[str]()

    def check(segment: MetricSegment) -> str:
        try:
            read_segment(run, segment)
        except BadDataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        for segment, problem in zip(manifest.metric_segments, pool.map(check, manifest.metric_segments), strict=True):
            if problem:
                lost.append(problem)
            else:
                whole.append(segment)
    if lost:
        warn(f"using checkpoint {run.uri}/{manifest.ref.key} without metrics that are lost: {'; '.join(lost)}")
    return manifest.model_copy(update={"metric_segments": tuple(whole)})


def read_segment(run: Store, segment: MetricSegment) -> bytes:
    """The rows of a segment, as JSON lines.

    Raises:
        BadDataError: it is missing or rotten; the message names it.
    """
    uri = run.uri_of(segment.key)
    try:
        data = run.read(segment.key).data
    except ObjectMissingError:
        raise BadDataError(f"{uri} is missing, though a checkpoint names it") from None
    if hashlib.sha256(data).hexdigest() != segment.sha256:
        raise BadDataError(f"{uri} is rotten: its SHA-256 is not the one in the checkpoint")
    return data


def choose(run: Store, run_name: str, wanted: str, dataset_images: int, batch_size_images: int) -> list[CheckpointRef]:
    """Checkpoints by a person's words: `latest`, `all`, or epochs such as `30,80,490`.

    Raises:
        MissingInputError: there are none, or not for one of the epochs; the message names those there are.
        BadDataError: there was one.
    """
    ordered = list(by_progress(list_checkpoints(run)).values())
    if not ordered:
        if lost := lost_manifest(run, []):
            raise BadDataError(f"run {run_name!r} has no checkpoint any more: {lost}")
        raise MissingInputError(f"run {run_name!r} has no checkpoint in {run.uri} yet: train it first")
    if wanted == "latest":
        return [max(ordered)]
    if wanted == "all":
        return ordered
    epochs = {
        epoch: ref
        for ref in ordered
        for epoch in epochs_completed_by(ref.images_seen, dataset_images, batch_size_images)
    }
    chosen = list(dict.fromkeys(map(int, wanted.split(","))))
    for epoch in chosen:
        if epoch not in epochs:
            there = ", ".join(map(str, sorted(epochs))) or "none that ends an epoch; use latest"
            raise MissingInputError(
                f"run {run_name!r} has no checkpoint of epoch {epoch}: not kept or not reached (there are: {there})"
            )
    return list(dict.fromkeys(epochs[epoch] for epoch in chosen))
