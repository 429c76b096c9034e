"""A run's folder in the bucket: its configuration, its attempts, its state.

BUCKET/runs/NAME/config.yaml             resolved when the run began; never rewritten
                 lease.json              who may write to it now
                 attempts/000003.json    one per attempt, created once: its number is the attempt's fence
                 status.json             how it is going; a convenience for people
                 checkpoints/ metrics/ tensorboard/ samples/ figures/
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
import uuid
from calendar import timegm
from contextlib import suppress
from typing import Any

import yaml
from pydantic import Field, field_validator

from job.code_version import code_version
from job.config import RunConfig, flatten, validated
from job.config_input import parse_yaml
from job.data.shards import dataset_key
from job.exits import BadDataError, BadRequestError, JobError, MissingInputError
from job.runs.checkpoints import Manifest, list_checkpoints, manifest_key
from job.sealed import Sealed
from job.store import ObjectExistsError, ObjectMissingError, Store

RUNS = "runs"
CONFIG = "config.yaml"
STATUS = "status.json"
ATTEMPTS = "attempts"

UTC = "%Y-%m-%dT%H:%M:%SZ"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def validated_run_name(name: str) -> str:
    """Returns `name` if it can be part of a key, a Kubernetes name, a label and an argument.

    Raises:
        BadRequestError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise BadRequestError(
            f"{name!r} cannot be a run's name: use 1 to 63 lower-case letters, digits and '-', "
            "beginning and ending with a letter or digit"
        )
    return name


def run_store(bucket: Store, name: str) -> Store:
    """The run's folder."""
    return bucket.sub(f"{RUNS}/{validated_run_name(name)}")


def load_config(run: Store) -> RunConfig | None:
    """The run's stored configuration, or none if there is no such run.

    Raises:
        BadDataError: it is missing, rotten, another run's, or not readable by this version.
    """
    attempt = last_attempt(run)
    try:
        data = run.read(CONFIG).data
    except ObjectMissingError:
        if attempt is None:
            return None
        raise BadDataError(
            f"{run.uri_of(CONFIG)} is missing, though the run was begun: restore it, or delete the rest of the run "
            f"(ddpm runs delete {run.uri.rsplit('/', 1)[-1]} --yes)"
        ) from None
    first_line, _, text = data.partition(b"\n")
    if first_line != _seal(text):
        raise BadDataError(
            f"{run.uri_of(CONFIG)} is not as it was written: its SHA-256 differs. Restore it, or start another run; "
            "what may change is changed with --set"
        )
    if attempt is not None and attempt.config_file_sha256 != hashlib.sha256(data).hexdigest():
        raise BadDataError(
            f"{run.uri_of(CONFIG)} is not the one that {run.uri_of(attempt_key(attempt.fence))} says: one of them is "
            "another run's. Restore it, or start another run"
        )
    try:
        document = parse_yaml(text)
        return validated(flatten(document), run.uri_of(CONFIG))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
        raise BadDataError(f"{run.uri_of(CONFIG)} is not a configuration: restore it or start another run") from None
    except JobError as error:
        raise BadDataError(f"{error}: another version of the program wrote it, or it is damaged") from None


def existing_config(bucket: Store, name: str) -> RunConfig:
    """Like `load_config`, for commands that need the run.

    Raises:
        MissingInputError: there is no such run.
    """
    config = load_config(run_store(bucket, name))
    if config is None:
        raise MissingInputError(f"there is no run {name!r} in {bucket.uri}: `ddpm runs list` shows those there are")
    return config


def as_last_changed(run: Store, config: RunConfig) -> RunConfig:
    """The run's configuration with what its last attempt changed about it.

    Raises:
        BadDataError: the record of that attempt is damaged; with the changes of an earlier one, checkpoints that are to
            stay would go.
    """
    fences = attempt_fences(run)
    if not fences:
        return config
    try:
        attempt = load_attempt(run, fences[-1])
    except BadDataError as error:
        raise BadDataError(
            f"{error}; it says what was changed with --set since the run began: restore it, or delete it and say that "
            "again"
        ) from None
    return validated({**flatten(config.model_dump(mode="json")), **attempt.changes}, run.uri_of(CONFIG))


def dataset_key_of(config: RunConfig) -> str:
    """Folder of a run's dataset below the bucket."""
    assert config.data.size is not None
    return dataset_key(config.data.dataset, config.data.size)


def create_config(run: Store, config: RunConfig) -> RunConfig:
    """Stores a new run's configuration; if another attempt was first, returns what it stored."""
    try:
        text = config.to_yaml().encode()
        run.create(CONFIG, _seal(text) + b"\n" + text)
    except ObjectExistsError:
        stored = load_config(run)
        if stored is not None:
            return stored
        raise
    return config


class Attempt(Sealed):
    """One try at a run. Fences grow, so that a later attempt's checkpoints always win over an earlier one's."""

    fence: int
    id: str
    started: str
    host: str
    pid: int
    code_version: str
    world_size: int
    device: str
    """What it computes on, and with which PyTorch: rounding depends on both."""
    changes: dict[str, Any]
    """What this attempt does otherwise than the run's stored configuration says."""
    config_file_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of `config.yaml`, which is never rewritten: that of another run would not be noticed otherwise."""
    holder: str = ""
    """As which it held the run's lease; empty in the records of earlier versions."""
    previous: int | None
    """The fence of the attempt before, so that a record that was lost is missed; none for the first."""


def attempt_key(fence: int) -> str:
    """Where an attempt's record lies."""
    return f"{ATTEMPTS}/{fence:06d}.json"


def attempt_fences(run: Store) -> list[int]:
    """The fences of the attempts that are recorded, in order; they have gaps where others held the run."""
    names = (entry.key.removeprefix(f"{ATTEMPTS}/") for entry in run.list(ATTEMPTS))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"(\d{6})\.json", name)))


def load_attempt(run: Store, fence: int) -> Attempt:
    """Reads an attempt's record and checks it against its own hash and place.

    Raises:
        BadDataError: it is rotten, or another's.
        ObjectMissingError: it is not there.
    """
    attempt = Attempt.load(run, attempt_key(fence))
    if attempt.fence != fence:
        raise BadDataError(f"{run.uri_of(attempt_key(fence))} belongs to attempt {attempt.fence}")
    return attempt


def attempt_id(run: Store, fence: int) -> str:
    """The id of an attempt; empty where nobody can tell."""
    with suppress(ObjectMissingError, BadDataError):
        return load_attempt(run, fence).id
    return ""


def check_written_here(run: Store, manifest: Manifest) -> None:
    """Returns if a checkpoint was written by an attempt of this run, as far as that can be told.

    Raises:
        BadDataError: it is another run's, moved or copied here.
    """
    known = attempt_id(run, manifest.fence)
    if known and known != manifest.attempt:
        where = run.uri_of(manifest_key(manifest.ref))
        raise BadDataError(f"{where} was not written by attempt {manifest.fence} of this run")


def last_attempt(run: Store) -> Attempt | None:
    """The newest record of an attempt that can be read, if there is one."""
    # A bucket that is a folder which is not there yet has no attempts either.
    with suppress(MissingInputError):
        for fence in reversed(attempt_fences(run)):
            with suppress(BadDataError):
                return load_attempt(run, fence)
    return None


def highest_fence(run: Store) -> int:
    """The highest fence that an attempt or a checkpoint bears; 0 for a new run."""
    return max([*attempt_fences(run), *(ref.fence for ref in list_checkpoints(run))], default=0)


def record_attempt(
    run: Store, fence: int, changes: dict[str, Any], world_size: int, device: str, holder: str = ""
) -> Attempt:
    """Writes down who works on the run under this fence, which the run's lease gave to `holder`."""
    attempt = Attempt(
        fence=fence,
        id=uuid.uuid4().hex,
        started=utc_now(),
        host=socket.gethostname(),
        pid=os.getpid(),
        code_version=code_version(),
        world_size=world_size,
        device=device,
        changes=changes,
        config_file_sha256=hashlib.sha256(run.read(CONFIG).data).hexdigest(),
        holder=holder,
        previous=max(attempt_fences(run), default=None),
    )
    run.create(attempt_key(fence), attempt.to_json())
    return attempt


def what_is_otherwise(before: Attempt, now: Attempt) -> list[str]:
    """What a person should know when a run goes on under other circumstances: a sentence for each, mostly none."""
    found = []
    if before.code_version != now.code_version:
        found.append(
            f"attempt {before.fence} was made by code {before.code_version}, and this is {now.code_version}: the same "
            "images and noise come, unless that is what was changed; what is learnt may differ from an undisturbed run"
        )
    circumstances = [f"{attempt.world_size} × {attempt.device}" for attempt in (before, now)]
    if circumstances[0] != circumstances[1]:
        found.append(
            f"attempt {before.fence} computed on {circumstances[0]}, and this one does on {circumstances[1]}: "
            "the same images and noise, another rounding"
        )
    return found


def _seal(text: bytes) -> bytes:
    return b"# sha256: " + hashlib.sha256(text).hexdigest().encode()


class Status(Sealed):
    """How a run is going. A hint for people: nothing is decided by it but whether to say that a run is finished."""

    state: str
    """`running`, `finished`, `stopped` or `failed`."""
    fence: int
    attempt: str = ""
    """The id of the attempt, without which another run's status would not be noticed; empty before there was one."""
    images_seen: int
    target_images: int
    epoch: float
    loss: float | None
    images_per_second: float | None
    updated: str
    message: str = ""

    @field_validator("updated")
    @classmethod
    def _is_a_time(cls, updated: str) -> str:
        time.strptime(updated, UTC)
        return updated


def write_status(run: Store, status: Status) -> None:
    """Replaces `status.json`."""
    run.put(STATUS, status.to_json())


def read_status(run: Store) -> Status | None:
    """The last status, or none if there is none that is whole and that this version understands."""
    with suppress(ObjectMissingError, BadDataError):
        return Status.load(run, STATUS)
    return None


def utc_now() -> str:
    """Now, as ISO 8601 in UTC, to the second."""
    return time.strftime(UTC, time.gmtime())


def age_seconds(status: Status) -> float:
    """How long ago the run said so."""
    return time.time() - timegm(time.strptime(status.updated, UTC))
