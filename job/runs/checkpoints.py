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
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ddpm.epochs import epochs_completed_by
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.sealed import Sealed
from job.store import ObjectMissingError, Store
from job.store.scratch import scratch_folder

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
LATEST = "LATEST"
READERS = 16
"""Small objects that are read at a time."""
MAX_IMAGES_SEEN = 10**12 - 1
"""What the twelve digits in a checkpoint's name can count."""


@dataclass(frozen=True, order=True, slots=True)
class CheckpointRef:
    """A committed checkpoint's place in the order: attempts first, then progress."""

    fence: int
    images_seen: int

    @property
    def key(self) -> str:
        """Its folder below the run."""
        return f"{FOLDER}/{self.fence:06d}-{self.images_seen:012d}"

    @classmethod
    def parse(cls, folder: str) -> CheckpointRef | None:
        """The inverse of `key`, for the folder's own name; none if it is something else."""
        match = re.fullmatch(r"(\d{6})-(\d{12})", folder)
        return cls(int(match[1]), int(match[2])) if match else None


class FileRecord(BaseModel):
    """One object of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z]+-\d{2,}\.safetensors$")
    group: str = Field(pattern=r"^[a-z]+$")
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class MetricSegment(BaseModel):
    """Metric rows up to this checkpoint and since the one before, in an object of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^\d{6}-\d{12}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    events_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def key(self) -> str:
        """The rows, as JSON lines."""
        return f"metrics/{self.name}.jsonl"

    @property
    def events_key(self) -> str:
        """The same rows, as TensorBoard events."""
        return f"tensorboard/events.out.tfevents.{self.name}"


class Manifest(Sealed):
    """What was committed. Its existence is the commit."""

    format: int = Field(default=1, ge=1, le=1)
    fence: int = Field(ge=1)
    attempt: str
    images_seen: int = Field(ge=0)
    epoch: int | None
    created: str
    code_version: str
    config_sha256: str
    world_size: int = Field(ge=1)
    loss_sums: list[list[float]]
    files: tuple[FileRecord, ...]
    metric_segments: tuple[MetricSegment, ...] = ()

    @property
    def ref(self) -> CheckpointRef:
        """Its place in the order."""
        return CheckpointRef(self.fence, self.images_seen)


class Latest(Sealed):
    """The content of `LATEST`. It is written after the manifest, so that it may name the checkpoint before."""

    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")

    @property
    def ref(self) -> CheckpointRef:
        """What it names."""
        ref = CheckpointRef.parse(self.checkpoint.removeprefix(f"{FOLDER}/"))
        assert ref is not None
        return ref


def list_checkpoints(run: Store) -> list[CheckpointRef]:
    """All committed checkpoints, oldest first."""
    refs = []
    for entry in run.list(FOLDER):
        folder, _, name = entry.key.removeprefix(f"{FOLDER}/").partition("/")
        if name == MANIFEST and (ref := CheckpointRef.parse(folder)):
            refs.append(ref)
    return sorted(refs)


def by_progress(refs: list[CheckpointRef]) -> dict[int, CheckpointRef]:
    """One checkpoint per `images_seen`, of the highest fence where several attempts made the same one."""
    return {ref.images_seen: ref for ref in sorted(refs)}


def manifest_key(ref: CheckpointRef) -> str:
    """Where a checkpoint's manifest lies."""
    return f"{ref.key}/{MANIFEST}"


def load_manifest(run: Store, ref: CheckpointRef) -> Manifest:
    """Reads a manifest and checks it against its own hash and place.

    Raises:
        BadDataError: it is rotten, or not the one of this place.
        ObjectMissingError: it is gone.
    """
    key = manifest_key(ref)
    manifest = Manifest.load(run, key)
    if manifest.ref != ref:
        raise BadDataError(f"{run.uri_of(key)} belongs to {manifest.ref.key}")
    return manifest


def commit_manifest(run: Store, manifest: Manifest) -> None:
    """The commit: creates the manifest once, after all its objects are there."""
    run.create(manifest_key(manifest.ref), manifest.to_json())
    put_latest(run, manifest.ref)


def put_latest(run: Store, ref: CheckpointRef) -> None:
    """Says which checkpoint was committed last."""
    run.put(LATEST, Latest(checkpoint=ref.key).to_json())


def lost_manifest(run: Store, refs: list[CheckpointRef]) -> str:
    """What is wrong if `LATEST` names a checkpoint newer than all that are there, which are `refs`; or nothing.

    Raises:
        BadDataError: `LATEST` is rotten.
    """
    try:
        ref = Latest.load(run, LATEST).ref
    except ObjectMissingError:
        return ""
    # One that is older was retired after somebody was killed, or replaced, before saying what came after it.
    if ref in refs or (refs and ref < max(refs)) or run.exists(manifest_key(ref)):
        return ""
    return f"{run.uri_of(manifest_key(ref))} is missing, though {run.uri_of(LATEST)} names it"


def is_there(run: Store, ref: CheckpointRef) -> bool:
    """Whether a checkpoint's manifest is whole and its files have the sizes that it says; reads no more than that."""
    try:
        manifest = load_manifest(run, ref)
    except (BadDataError, ObjectMissingError):
        return False
    sizes = {entry.key.rsplit("/", 1)[-1]: entry.size_bytes for entry in run.list(ref.key)}
    return all(sizes.get(record.name) == record.bytes for record in manifest.files)


def fetch(run: Store, manifest: Manifest, groups: tuple[str, ...], folder: Path) -> dict[str, list[Path]]:
    """Downloads the files of `groups` into `folder`, each checked by size and SHA-256.

    Returns:
        The local paths by group.

    Raises:
        BadDataError: an object is missing, or is not what was committed; the message names it.
    """
    records = [record for record in manifest.files if record.group in groups]

    def fetch_one(record: FileRecord) -> Path:
        key, path = f"{manifest.ref.key}/{record.name}", folder / record.name
        try:
            run.download(key, path)
        except ObjectMissingError:
            raise BadDataError(f"{run.uri_of(key)} is missing, though its manifest is there") from None
        if path.stat().st_size != record.bytes:
            raise BadDataError(f"{run.uri_of(key)} has {path.stat().st_size} bytes instead of {record.bytes}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                raise BadDataError(f"{run.uri_of(key)} is rotten: its SHA-256 is not the one in the manifest")
        return path

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch_one, records))
    found: dict[str, list[Path]] = {group: [] for group in groups}
    for record, path in zip(records, paths, strict=True):
        found[record.group].append(path)
    return found


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint on the local disk, deleted when the context ends."""

    manifest: Manifest
    files: dict[str, list[Path]]

    def copy_into(self, tensors: dict[str, dict[str, Any]]) -> None:
        """Copies the files' values into live tensors, by group and name, keeping the live memory layout.

        Raises:
            BadDataError: names or shapes do not match, or a file is none of tensors, whatever its manifest says.
        """
        from safetensors import SafetensorError, safe_open

        for group, paths in self.files.items():
            missing = set(tensors[group])
            for path in paths:
                try:
                    with safe_open(path, framework="pt") as file:
                        for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                            target, value = tensors[group].get(name), file.get_tensor(name)
                            if target is None or target.shape != value.shape:
                                raise BadDataError(
                                    f"{self.manifest.ref.key}/{path.name}: tensor {name!r} does not fit this "
                                    "configuration"
                                )
                            target.copy_(value)
                            missing.discard(name)
                except SafetensorError as error:
                    raise BadDataError(f"{self.manifest.ref.key}/{path.name} holds no tensors ({error})") from None
            if missing:
                raise BadDataError(f"{self.manifest.ref.key}: tensor {min(missing)!r} is in no {group} file")


@contextmanager
def opened(run: Store, ref: CheckpointRef, groups: tuple[str, ...]) -> Iterator[Restored]:
    """The verified files of one checkpoint, on the local disk until the context ends.

    Raises:
        BadDataError: it is damaged; the message names the object.
    """
    with scratch_folder("restore") as folder:
        manifest = load_manifest(run, ref)
        yield Restored(manifest, fetch(run, manifest, groups, folder))


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
        BadRequestError: the words are none of the above.
    """
    refs = by_progress(list_checkpoints(run))
    if not refs:
        if lost := lost_manifest(run, []):
            raise BadDataError(f"run {run_name!r} has no checkpoint any more: {lost}")
        raise MissingInputError(f"run {run_name!r} has no checkpoint in {run.uri} yet: train it first")
    ordered = [refs[images] for images in sorted(refs)]
    epochs = {
        epoch: ref
        for ref in ordered
        for epoch in epochs_completed_by(ref.images_seen, dataset_images, batch_size_images)
    }
    if wanted == "latest":
        return [max(refs.values())]
    if wanted == "all":
        return ordered
    chosen = []
    for word in wanted.split(","):
        if not word.strip().isdecimal():
            raise BadRequestError(f"--checkpoints {wanted!r}: use epochs such as 30,80,490, or latest, or all")
        if int(word) not in epochs:
            there = ", ".join(map(str, sorted(epochs))) or "none that ends an epoch; use latest"
            raise MissingInputError(
                f"run {run_name!r} has no checkpoint of epoch {int(word)}: not kept or not reached (there are: {there})"
            )
        chosen.append(epochs[int(word)])
    return list(dict.fromkeys(chosen))
