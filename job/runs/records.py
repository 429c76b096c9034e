"""What a run's folder says about the run as a whole: its configuration, its attempts, its state."""

from __future__ import annotations

import hashlib
import math
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import yaml
from pydantic import Field

from job.code_version import code_version
from job.config import RunConfig, flatten, parse_yaml, validated
from job.data.shards import dataset_key, load_index
from job.exits import BadConfigError, BadDataError, BadRequestError, JobError, LostRunError, MissingInputError
from job.progress import all_printable
from job.runs.layout import CHECKPOINTS, MAX_IMAGES_SEEN, RUNS, Located, ObjectKind, located, places_in
from job.sealed import SHA256_PATTERN, Moment, Part, Sealed, utc_now
from job.store import ObjectExistsError, ObjectMissingError, Store
from job.store.retry import PATIENCE_SECONDS

CONFIG_KEY, STATUS_KEY = ObjectKind.CONFIG.value, ObjectKind.STATUS.value
STATUS_SECONDS, STATUS_CLOSE_SECONDS = 30.0, 5.0
DOLLARS = "DDPM_DOLLARS_PER_HOUR"
"""Variable of a job: what its machines cost together."""


def validated_run_name(name: str) -> str:
    """Returns `name` if it can be part of a key, a Kubernetes name, a label and an argument.

    Raises:
        BadRequestError: it cannot.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise BadRequestError(f"{name!r} cannot be a run's name: use up to 63 lower-case letters, digits, inner '-'")
    return name


def run_store(bucket: Store, name: str) -> Store:
    """The run's folder."""
    return bucket.sub(f"{RUNS}/{validated_run_name(name)}")


def load_config(run: Store) -> RunConfig | None:
    """The run's stored configuration, or none if there is no such run.

    Raises:
        BadDataError: it is missing, rotten, another run's, or not readable by this version.
    """
    attempt, uri = last_attempt(run), run.uri_of(CONFIG_KEY)
    try:
        data = run.read(CONFIG_KEY).data
    except ObjectMissingError:
        if attempt is None:
            return None
        delete = f"ddpm runs delete {run.uri.rpartition('/')[2]} --yes"
        raise BadDataError(
            f"{uri} is missing, though the run was begun: restore it, or delete the rest of the run ({delete})"
        ) from None
    what_to_do = "Restore it, or start another run; what may change is changed with --set"
    if attempt and attempt.config_sha256 != hashlib.sha256(data).hexdigest():
        raise BadDataError(f"{uri} is not as attempt {attempt.fence} found it, or another run's. {what_to_do}")
    try:
        return validated(flatten(all_printable(parse_yaml(data))), uri)
    except (yaml.YAMLError, AttributeError, UnicodeError, JobError) as error:
        raise BadDataError(f"{uri} is no configuration, or another version's ({error}). {what_to_do}") from None


def existing_config(bucket: Store, name: str) -> RunConfig:
    """Like `load_config`, for commands that need the run.

    Raises:
        MissingInputError: there is no such run.
    """
    if config := load_config(run_store(bucket, name)):
        return config
    raise no_such_run(bucket, name)


def no_such_run(bucket: Store, name: str) -> MissingInputError:
    """The error about a run that is not there."""
    return MissingInputError(f"there is no run {name!r} in {bucket.uri}: `ddpm runs list` shows those there are")


def as_last_changed(run: Store, config: RunConfig) -> RunConfig:
    """The run's configuration with what its last attempt changed about it.

    Raises:
        BadDataError: the record of that attempt is damaged, or its changes are wrong; with those of an earlier one,
            checkpoints that are to stay would go.
    """
    if not (fences := attempt_fences(run)):
        return config
    try:
        changes = load_attempt(run, fences[-1]).changes
        return validated(config.flat() | changes, run.uri_of(ObjectKind.ATTEMPT.key(fence=fences[-1])))
    except (BadDataError, BadConfigError) as error:
        what_to_do = "restore it, or delete it and say that again"
        raise BadDataError(f"{error}; it says what was changed with --set since the run began: {what_to_do}") from None


def hash_of_config(run: Store) -> str:
    """Of `config.yaml`, as it lies there."""
    return hashlib.sha256(run.read(CONFIG_KEY).data).hexdigest()


def dataset_key_of(config: RunConfig) -> str:
    """Folder of a run's dataset below the bucket."""
    assert config.data.size is not None
    return dataset_key(config.data.dataset, config.data.size)


def dataset_images_of(bucket: Store, config: RunConfig) -> int:
    """Images of an epoch. Without its dataset nobody knows where a run's epochs end: then more than it can count."""
    with suppress(JobError):
        return load_index(bucket, dataset_key_of(config)).images
    return MAX_IMAGES_SEEN + 1


def create_config(run: Store, config: RunConfig) -> None:
    """Stores a new run's configuration.

    Raises:
        LostRunError: another attempt was first, with another one.
    """
    try:
        run.create(CONFIG_KEY, config.to_yaml().encode())
    except ObjectExistsError:
        raise LostRunError(f"{run.uri} was begun by another attempt meanwhile: the same command goes on") from None


class RunRecord(Sealed):
    """A record that says itself where in its run's folder it belongs."""

    def is_at(self, place: Located) -> bool:
        """Whether it was written for this place."""
        raise NotImplementedError

    @classmethod
    def load(cls, store: Store, key: str) -> Self:
        """As `Sealed.load`.

        Raises:
            BadDataError: it is also not in its place.
        """
        record = super().load(store, key)
        if not record.is_at(located(key)):
            raise BadDataError(f"{store.uri_of(key)} is not in its place: it was written for another")
        return record


class LastStatus(Part):
    """How an attempt was going when its status was written for the last time."""

    state: str
    images_seen: int
    updated: Moment


class Attempt(RunRecord):
    """One try at a run. Fences grow, so that a later attempt's checkpoints always win over an earlier one's."""

    fence: int
    id: str
    """As which it held the run's lease; no other attempt at any run has it."""
    started: Moment
    host: str
    code_version: str
    world_size: int
    device: str
    """What it computes on, and with which PyTorch: rounding depends on both."""
    changes: dict[str, Any]
    """What this attempt does otherwise than the run's stored configuration says."""
    config_sha256: str = Field(pattern=SHA256_PATTERN)
    """Of `config.yaml`, which is never rewritten: that of another run would not be noticed otherwise."""
    imported: str = ""
    """Where the checkpoint lay that it made its own, if it did not train."""
    previous: int | None
    """The fence of the attempt before, so that a record that was lost is missed; none for the first."""
    previous_seen: LastStatus | None = None
    """What the run's status said of that one, before it was this one's."""
    dollars_per_hour: float | None = None
    """Of all its machines together, as whoever submitted it said."""

    def is_at(self, place: Located) -> bool:
        """In the record of its fence."""
        return self.fence == place.fence


def attempt_fences(run: Store) -> list[int]:
    """The fences of the attempts that are recorded, in order; they have gaps where others held the run."""
    return sorted(place.fence for place in places_in(run, ObjectKind.ATTEMPT.folder).values() if place.kind)


def load_attempt(run: Store, fence: int) -> Attempt:
    """The record of an attempt.

    Raises:
        BadDataError: it is rotten, or another's.
        ObjectMissingError: it is not there.
    """
    return Attempt.load(run, ObjectKind.ATTEMPT.key(fence=fence))


def attempt_id(run: Store, fence: int) -> str:
    """The id of an attempt; empty where nobody can tell."""
    with suppress(ObjectMissingError, BadDataError):
        return load_attempt(run, fence).id
    return ""


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
    places = places_in(run, ObjectKind.ATTEMPT.folder, CHECKPOINTS).values()
    return max((max(place.fence, place.checkpoint.fence) for place in places), default=0)


def record_attempt(
    run: Store, fence: int, holder: str, *, changes: dict[str, Any], world_size: int, device: str, imported: str = ""
) -> Attempt:
    """Writes down who works on the run under this fence, which the run's lease gave to `holder`."""
    previous, status = max(attempt_fences(run), default=None), read_status(run)
    seen = None
    if status is not None and status.fence == previous:
        seen = LastStatus(state=status.state, images_seen=status.images_seen, updated=status.updated)
    attempt = Attempt(
        fence=fence,
        id=holder,
        started=utc_now(),
        host=socket.gethostname(),
        code_version=code_version(),
        world_size=world_size,
        device=device,
        changes=changes,
        config_sha256=hash_of_config(run),
        imported=imported,
        previous=previous,
        previous_seen=seen,
        dollars_per_hour=_dollars_per_hour(),
    )
    run.create(ObjectKind.ATTEMPT.key(fence=fence), attempt.to_json())
    return attempt


def _dollars_per_hour() -> float | None:
    with suppress(ValueError):
        dollars = float(os.environ.get(DOLLARS) or "nan")
        return dollars if 0 <= dollars < math.inf else None
    return None


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


class Status(Sealed):
    """How a run is going. A hint for people: nothing is decided by it but whether to say that a run is finished."""

    state: str
    """`running`, `finished`, `stopped`, `failed` or `imported`."""
    fence: int
    attempt: str
    """The id of the attempt, without which another run's status would not be noticed."""
    images_seen: int
    target_images: int
    epoch: float
    loss: float | None
    images_per_second: float | None
    updated: Moment


def read_status(run: Store) -> Status | None:
    """The last status, or none if there is none that is whole and that this version understands."""
    with suppress(ObjectMissingError, BadDataError):
        return Status.load(run, STATUS_KEY)
    return None


def check_writable(run: Store) -> None:
    """See `Store.check_writable`: a lease and every save need both."""
    run.check_writable(ObjectKind.PROBE.key(unique=uuid.uuid4().hex))


class StatusReporter:
    """Writes what `current()` returns, now and then and at the end. A bucket that is away is no reason to stop."""

    def __init__(self, run: Store, current: Callable[[str], Status], warn: Callable[[str], None]) -> None:
        # The last state is written when a stop has been asked for.
        self._run, self._current, self._warn = run.within(PATIENCE_SECONDS), current, warn
        self._state, self._ended = "running", threading.Event()
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)
        self._thread.start()

    def close(self, state: str, timeout_seconds: float = STATUS_CLOSE_SECONDS) -> None:
        """Has the last state written, `finished`, `stopped` or `failed`, if the bucket takes it in time."""
        self._state = state
        self._ended.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._warn(f"the run's status does not say that it {state}: the bucket did not answer in time")

    def _work(self) -> None:
        is_failing = is_last = False
        while not is_last:
            is_last = self._ended.is_set()
            try:
                self._run.put(STATUS_KEY, self._current(self._state).to_json())
                is_failing = False
            except JobError as error:
                # Once per outage is enough.
                if not is_failing:
                    self._warn(f"could not write the run's status: {error}")
                is_failing = True
            self._ended.wait(STATUS_SECONDS)
