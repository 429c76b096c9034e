"""Checkpoints in a bucket: how one is committed, found, verified and loaded.

    RUN/checkpoints/{fence:06d}-{images_seen:012d}/model-00.safetensors …     uploaded first, under a fresh prefix
                                                   unet/ …                    the weights that draw: see `pipeline`
                                                   MANIFEST.json              created once, last: the commit
                                                   averages/ema-0.13.json …   what `ddpm ema` made for it: see there
    RUN/LATEST                                                                the last commit, a hint

A checkpoint exists when its manifest does. The newest is the one with the highest (fence, images seen) whose objects
verify: a writer that was replaced, and does not know it, has a lower fence and harms nobody. `LATEST` only tells that a
manifest was lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field

from ddpm.epochs import epochs_completed_by
from job.config import average_name
from job.exits import BadDataError, MissingInputError
from job.runs.layout import CHECKPOINTS, CheckpointRef, Located, ObjectKind, located, places_in
from job.runs.records import RunRecord, attempt_id
from job.sealed import NamedObject, Sealed
from job.store import ObjectMissingError, Store
from job.store.files import scratch_folder

LATEST_KEY = ObjectKind.LATEST.value
PARALLEL_DOWNLOADS = 4


class Manifest(RunRecord):
    """What was committed. Its existence is the commit."""

    format: int = Field(default=2, ge=2, le=2)
    fence: int = Field(ge=1)
    attempt: str
    """The id of the attempt that wrote it, which tells runs apart."""
    images_seen: int = Field(ge=0)
    created: str
    world_size: int = Field(ge=1)
    loss_sums: list[list[float]]
    """What has been added up for the next row of the metrics."""
    files: tuple[NamedObject, ...]
    drawn: str = ""
    """Which weights lie in `unet/`, such as `ema`; none where diffusers has no such network."""
    metrics: tuple[NamedObject, ...] = ()
    """Of the run until here: what `job.runs.metrics` makes of the rows since the checkpoint before, and so on."""
    snapshots: tuple[NamedObject, ...] = ()
    """Of the run until here: power-function averages in half precision, for `ddpm ema`."""

    @property
    def ref(self) -> CheckpointRef:
        """Its place in the order."""
        return CheckpointRef(self.fence, self.images_seen)

    def is_at(self, place: Located) -> bool:
        """In the folder of its checkpoint."""
        return self.ref == place.checkpoint

    @property
    def objects(self) -> dict[str, str]:
        """SHA-256 of each object that it names, by key."""
        return {named.key: named.sha256 for named in (*self.files, *self.metrics, *self.snapshots)}

    @property
    def groups(self) -> tuple[str, ...]:
        """What it holds: `model`, `optimizer` and the averages."""
        return tuple(dict.fromkeys(filter(None, map(self.group_of, self.files))))

    def group_of(self, file: NamedObject) -> str:
        """Which tensors one of its files holds: `model`, `optimizer` or an average, such as `ema`; empty for others."""
        place = located(file.key)
        is_drawn = place.kind is ObjectKind.PIPELINE and file.key.endswith(".safetensors")
        return self.drawn if is_drawn else place.group


class Average(RunRecord):
    """An average that `ddpm ema` made for a checkpoint, with which it goes. Its existence is the commit."""

    fence: int
    attempt: str
    """The id of the attempt that wrote the checkpoint."""
    images_seen: int
    std: float
    made_of: int = Field(ge=1)
    """Stored averages."""
    error: float
    """See `ddpm.ema.reconstruct`."""
    created: str
    code_version: str
    files: tuple[NamedObject, ...]

    def is_at(self, place: Located) -> bool:
        """Beside its checkpoint, under its name."""
        ref = CheckpointRef(self.fence, self.images_seen)
        return (ref, average_name(self.std)) == (place.checkpoint, place.group)


class Latest(Sealed):
    """The content of `LATEST`. It is written after the manifest, so that it may name the checkpoint before."""

    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")


def commit_manifest(run: Store, manifest: Manifest) -> None:
    """The commit: creates the manifest once, after all its objects are there."""
    run.create(manifest.ref.manifest_key, manifest.to_json())
    run.put(LATEST_KEY, Latest(checkpoint=manifest.ref.key).to_json())


def list_checkpoints(run: Store) -> list[CheckpointRef]:
    """All committed checkpoints, oldest first."""
    places = places_in(run, CHECKPOINTS).values()
    return sorted(place.checkpoint for place in places if place.kind is ObjectKind.MANIFEST)


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
    manifest = Manifest.load(run, ref.manifest_key)
    if attempt_id(run, ref.fence) not in ("", manifest.attempt):
        raise BadDataError(f"{run.uri_of(ref.manifest_key)} was not written by attempt {ref.fence} of this run")
    return manifest


def lost_manifest(run: Store, refs: list[CheckpointRef]) -> str:
    """What is wrong if `LATEST` names a checkpoint newer than all that are there, which are `refs`, or is rotten."""
    try:
        ref = CheckpointRef.parse(Latest.load(run, LATEST_KEY).checkpoint.removeprefix(f"{CHECKPOINTS}/"))
    except ObjectMissingError:
        return ""
    except BadDataError as error:
        return str(error)
    # One that is older was retired after somebody was killed, or replaced, before saying what came after it.
    if (refs and ref <= max(refs)) or run.exists(ref.manifest_key):
        return ""
    return f"{run.uri_of(ref.manifest_key)} is missing, though {run.uri_of(LATEST_KEY)} names it"


def sound_manifest(run: Store, ref: CheckpointRef) -> Manifest | None:
    """A checkpoint's manifest, if it is sound and the files have the sizes that it says; reads no more than that."""
    with suppress(BadDataError, ObjectMissingError):
        manifest = load_manifest(run, ref)
        sizes = {entry.key: entry.size_bytes for entry in run.list(ref.key)}
        if all(sizes.get(file.key) == file.size_bytes for file in manifest.files):
            return manifest
    return None


def newest_sound(run: Store, refs: list[CheckpointRef]) -> Manifest | None:
    """The manifest of the newest of these checkpoints that is sound: what lies beside them may be anybody's."""
    return next((manifest for ref in sorted(refs, reverse=True) if (manifest := sound_manifest(run, ref))), None)


@contextmanager
def newest_good(
    run: Store, warn: Callable[[str], None], aside: set[CheckpointRef] | None = None
) -> Iterator[Restored | None]:
    """The newest checkpoint whose every file verifies, or none if there are none: what an attempt goes on from.

    Damaged ones are named through `warn` and go into `aside`. Metrics that are damaged cost no work: see `read_rows`.

    Raises:
        BadDataError: there are checkpoints, but none of them verifies.
    """
    refs, problems = list_checkpoints(run), list[str]()
    if lost := lost_manifest(run, refs):
        problems.append(lost)
        warn(f"{lost}; the manifests that are there tell which checkpoint is the newest")
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
                yield found
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

    A group that is not in the checkpoint itself is an average that was made for it later.

    Raises:
        BadDataError: it is damaged, or another run's; the message names the object.
        ObjectMissingError: there is no such average.
    """
    manifest = load_manifest(run, ref)
    # What describes the weights to others is not needed here: its damage costs no work.
    wanted = [(file, group) for file in manifest.files if (group := manifest.group_of(file))]
    wanted = [(file, group) for file, group in wanted if not groups or group in groups]
    for group in set(groups) - {*manifest.groups}:
        wanted += [(file, group) for file in load_average(run, manifest, group).files]
    with scratch_folder("restore") as folder:

        def fetch(named: NamedObject) -> Path:
            path, uri = folder / named.name, run.uri_of(named.key)
            try:
                run.download(named.key, path)
            except ObjectMissingError:
                raise BadDataError(f"{uri} is missing, though its manifest is there") from None
            with path.open("rb") as file:
                if sha256_of(file) != named.sha256:
                    raise BadDataError(f"{uri} is rotten: its SHA-256 is not the one in the manifest")
            return path

        files: dict[str, list[Path]] = {}
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            paths = pool.map(fetch, (file for file, _ in wanted))
            for (_, group), path in zip(wanted, paths, strict=True):
                files.setdefault(group, []).append(path)
        yield Restored(manifest, files)


def load_average(run: Store, manifest: Manifest, group: str) -> Average:
    """The record of an average that was made for a checkpoint.

    Raises:
        BadDataError: it is rotten, or another run's.
        ObjectMissingError: there is none.
    """
    average = Average.load(run, key := ObjectKind.AVERAGE.key(checkpoint=manifest.ref, group=group))
    if average.attempt != manifest.attempt:
        raise BadDataError(f"{run.uri_of(key)} was made for another run's checkpoint")
    return average


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

        keys = {file.name: file.key for file in self.manifest.files}
        for group, wanted in tensors.items():
            missing = set(wanted)
            for path in self.files.get(group, []):
                where = keys.get(path.name, f"{self.manifest.ref.key}/{path.name}")
                try:
                    with safe_open(path, framework="pt") as file:
                        for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                            target, value = wanted.get(name), file.get_tensor(name)
                            if target is None or target.shape != value.shape:
                                raise BadDataError(f"{where}: tensor {name!r} does not fit this configuration")
                            target.copy_(value)
                            missing.discard(name)
                except SafetensorError as error:
                    raise BadDataError(f"{where} holds no tensors ({error})") from None
            if missing:
                raise BadDataError(f"{self.manifest.ref.key}: tensor {min(missing)!r} is in no {group} file")


def choose(run: Store, wanted: str, dataset_images: int, batch_size_images: int) -> list[CheckpointRef]:
    """Checkpoints by a person's words: `latest`, `all`, or epochs such as `30,80,490`.

    Raises:
        MissingInputError: there are none, or not for one of the epochs; the message names those there are.
        BadDataError: there was one.
    """
    refs = by_progress(list_checkpoints(run))
    if not refs:
        if lost := lost_manifest(run, []):
            raise BadDataError(f"{run.uri} has no checkpoint any more: {lost}")
        raise MissingInputError(f"{run.uri} has no checkpoint yet: train it first")
    if wanted == "latest":
        return [max(refs.values())]
    if wanted == "all":
        return list(refs.values())
    ends = {
        epoch: ref
        for images_seen, ref in refs.items()
        for epoch in epochs_completed_by(images_seen, dataset_images, batch_size_images)
    }
    try:
        return list(dict.fromkeys(ends[int(epoch)] for epoch in wanted.split(",")))
    except KeyError as error:
        there = ", ".join(map(str, sorted(ends))) or "none that ends an epoch; use latest"
        raise MissingInputError(
            f"{run.uri} has no checkpoint of epoch {error}: not kept or not reached (there are: {there})"
        ) from None
