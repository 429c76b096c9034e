"""The records of a run as a whole: its configuration, its attempts, its status."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml
from pydantic import Field

from job.config import RunConfig, flatten, parse_yaml, validated
from job.config.schema import OwnSection
from job.coordination.sealed import SHA256_PATTERN, Moment, RecordPart, Sealed, code_version, utc_now
from job.data.shards import dataset_key, load_index
from job.exits import BadConfigError, BadDataError, BadRequestError, JobError, LostRunError, MissingInputError, State
from job.own_code import network_named, other_network
from job.progress import all_printable, note, printable
from job.runs.layout import CHECKPOINTS, MAX_IMAGES_SEEN, RUNS, ObjectKind, places_in
from job.store import ObjectExistsError, ObjectMissingError, Store, open_store, redacted
from job.store.retry import PATIENCE_SECONDS

CONFIG_KEY, STATUS_KEY = ObjectKind.CONFIG.value, ObjectKind.STATUS.value
STATUS_SECONDS, STATUS_CLOSE_SECONDS = 30.0, 5.0
DOLLARS = "DDPM_DOLLARS_PER_HOUR"
"""Variable of a job: the price of its machines together."""


def validated_run_name(name: str) -> str:
    """Returns `name` if it can be part of a key, a Kubernetes name, a label and an argument.

    Raises:
        BadRequestError: it cannot.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise BadRequestError(
            f"{redacted(name)!r} cannot be a run's name: use up to 63 lower-case letters, digits, inner '-'"
        )
    return name


def run_store(bucket: Store, name: str) -> Store:
    """Returns the run's folder."""
    return bucket.sub(f"{RUNS}/{validated_run_name(name)}")


def split_run(uri: str) -> tuple[str, str]:
    """Splits the folder of a run, such as `gs://my-bucket/runs/celeba` or `bucket/runs/celeba`, into bucket and name.

    Raises:
        BadRequestError: it is not the folder of a run.
    """
    uri = uri.rstrip("/")
    match = re.fullmatch(rf"(?:(.*)/)?{RUNS}/([^/?#]+)", uri)
    if match is None:
        raise BadRequestError(
            f"{redacted(uri)!r} is not the folder of a run: use one such as gs://my-bucket/runs/celeba"
        )
    # A bucket may lie at the root of a disk.
    return match[1] or ("/" if uri.startswith("/") else "."), match[2]


def place_of_run(bucket: Store, run: str) -> tuple[Store, str]:
    """Returns the bucket and the name of a run: `run` is its name in `bucket`, or the URI of its folder."""
    if "/" not in run:
        return bucket, run
    uri, name = split_run(run)
    return open_store(uri, bucket.retry), name


def load_config(run: Store) -> RunConfig | None:
    """Returns the run's stored configuration; None if the bucket lacks the run.

    Raises:
        BadDataError: it is missing, corrupt, another run's, or not readable by this version.
    """
    attempt, uri = last_attempt(run), run.uri_of(CONFIG_KEY)
    try:
        data = run.read(CONFIG_KEY).data
    except ObjectMissingError:
        if attempt is None:
            return None
        delete = f"ddpm runs delete {run.uri.rpartition('/')[2]} --yes"
        raise BadDataError(
            f"{uri} is missing, though the run has attempts: restore it, or delete the rest of the run ({delete})"
        ) from None
    what_to_do = "Restore it, or start another run; --set changes the settings that may change"
    if attempt and attempt.config_sha256 != hashlib.sha256(data).hexdigest():
        raise BadDataError(f"{uri} differs from the one of attempt {attempt.fence}, or is another run's. {what_to_do}")
    return parsed_config(data, uri, what_to_do)


def parsed_config(data: bytes, uri: str, what_to_do: str) -> RunConfig:
    """Returns the configuration in the bytes of `RunConfig.to_yaml`; an error names `uri`, and ends with `what_to_do`.

    Raises:
        BadDataError: it is corrupt, or not readable by this version.
    """
    try:
        return validated(flatten(all_printable(parse_yaml(data))), uri)
    except (yaml.YAMLError, AttributeError, UnicodeError, JobError) as error:
        raise BadDataError(f"{uri} is not a configuration, or is another version's ({error}). {what_to_do}") from None


def existing_config(bucket: Store, name: str) -> RunConfig:
    """Returns the run's stored configuration, as `load_config`, for commands that need the run.

    Raises:
        MissingInputError: the bucket lacks the run.
    """
    if config := load_config(run_store(bucket, name)):
        return config
    raise no_such_run(bucket, name)


def no_such_run(bucket: Store, name: str) -> MissingInputError:
    """Returns the error about a missing run."""
    return MissingInputError(f"there is no run {name!r} in {bucket.uri}: `ddpm runs list` shows those there are")


def as_last_changed(run: Store, config: RunConfig) -> RunConfig:
    """Returns the run's configuration with the changes of its last attempt.

    Raises:
        BadDataError: the record of that attempt is damaged, or its changes are invalid. Those of an earlier attempt
            must not be used: by them checkpoints could be deleted that are to stay.
    """
    if not (fences := attempt_fences(run)):
        return config
    try:
        changes = load_attempt(run, fences[-1]).changes
        return validated(config.flat() | changes, run.uri_of(ObjectKind.ATTEMPT.key(fence=fences[-1])))
    except (BadDataError, BadConfigError) as error:
        what_to_do = "restore it, or delete it and give these --set again"
        raise BadDataError(f"{error}; it holds the changes made with --set since the run began: {what_to_do}") from None


def dataset_key_of(config: RunConfig) -> str:
    """Returns the folder of a run's dataset below the bucket."""
    return dataset_key(config.data.dataset, config.image_size)


def dataset_images_of(bucket: Store, config: RunConfig) -> int:
    """Returns the images of an epoch; without the dataset more than a run can see, so that no epoch ends."""
    with suppress(JobError):
        return load_index(bucket, dataset_key_of(config)).images
    return MAX_IMAGES_SEEN + 1


def check_network_named(run: Store, config: RunConfig) -> None:
    """Checks that this process may execute the network of a run, if that is one of the user.

    Raises:
        BadRequestError: no command named it.
        BadConfigError: the file that a command named differs; the message has the first lines that do.
    """
    model, ours = config.model, other_network()
    if not isinstance(model, OwnSection) or (ours and ours.sha256 == model.sha256):
        return
    if ours:
        with suppress(ObjectMissingError):
            texts = (run.read(ObjectKind.NETWORK.value).data, ours.text)
            before, after = (text.decode(errors="replace").splitlines() for text in texts)
            lines = difflib.unified_diff(before, after, n=0, lineterm="")
            changed = "; ".join(f"{line:.100}" for line in lines if not line.startswith(("---", "+++", "@@")))
            raise BadConfigError(
                f"{ours.path} is not the network that the run began with ({printable(changed):.500}): its file is "
                f"{run.uri_of(ObjectKind.NETWORK.value)}; or start another run with --run NAME"
            )
    network_named(model.sha256, model.file, model.network)


def put_network(run: Store, config: RunConfig) -> None:
    """Puts the file of a network of the user into a new run; one that is there already may be of another network."""
    if isinstance(config.model, OwnSection):
        run.put(ObjectKind.NETWORK.value, network_named(config.model.sha256, "", "").text)


def create_config(run: Store, config: RunConfig) -> None:
    """Stores a new run's configuration.

    Raises:
        LostRunError: another attempt stored a different one first.
    """
    try:
        run.create(CONFIG_KEY, config.to_yaml().encode())
    except ObjectExistsError:
        raise LostRunError(f"{run.uri} was begun by another attempt meanwhile: the same command goes on") from None


class LastStatus(RecordPart):
    """The last status of an attempt."""

    state: str
    images_seen: int
    updated: Moment


class Attempt(Sealed):
    """The record of one attempt at a run. Fences grow, so that checkpoints of a later attempt win."""

    fence: int
    id: str
    """The holder in the run's lease; no other attempt at any run has it."""
    started: Moment
    host: str
    code_version: str
    config_sha256: str = Field(pattern=SHA256_PATTERN)
    """Of `config.yaml`, which is never rewritten; reveals that of another run."""
    changes: dict[str, Any]
    """Settings that differ from the run's stored configuration, by key."""
    world_size: int
    device: str
    """The device and the version of PyTorch: rounding depends on both."""
    is_exact: bool = False
    """Whether rounding depends on the device alone, not on the number of processes."""
    imported: str = ""
    """The source of the imported checkpoint, if it did not train."""
    previous: int | None
    """The fence of the attempt before, which reveals the loss of its record; None for the first."""
    previous_seen: LastStatus | None = None
    """The last status of that attempt."""
    dollars_per_hour: float | None = None
    """The price of all its machines together, as given when it was submitted."""


class ImagesThatFit(Sealed):
    """The number of images at once that fits the memory of each process, by the GPUs and the number of processes."""

    images: int = Field(gt=0)
    world_size: int
    gpu_gib: float
    """The memory of the smallest GPU; 0 without one."""


def images_that_fit(run: Store, world_size: int, gpu_gib: float) -> int | None:
    """Returns the images at once that an earlier attempt with the same memory found to fit, if one did."""
    with suppress(ObjectMissingError, BadDataError):
        found = ImagesThatFit.load(run, ObjectKind.FITTING.value)
        if (found.world_size, found.gpu_gib) == (world_size, gpu_gib):
            return found.images
    return None


def put_images_that_fit(run: Store, images: int, world_size: int, gpu_gib: float) -> None:
    """Writes down what `images_that_fit` returns; without the bucket the next attempt tries anew."""
    with suppress(JobError):
        record = ImagesThatFit(images=images, world_size=world_size, gpu_gib=gpu_gib)
        run.within(PATIENCE_SECONDS).put(ObjectKind.FITTING.value, record.to_json())


def attempt_fences(run: Store) -> list[int]:
    """Returns the fences of the recorded attempts, in order; other holders of the lease leave gaps."""
    return sorted(place.fence for place in places_in(run, ObjectKind.ATTEMPT.folder).values() if place.kind)


def load_attempt(run: Store, fence: int) -> Attempt:
    """Returns the record of an attempt.

    Raises:
        BadDataError: it is corrupt, or another attempt's.
        ObjectMissingError: it is missing.
    """
    attempt = Attempt.load(run, key := ObjectKind.ATTEMPT.key(fence=fence))
    if attempt.fence != fence:
        raise BadDataError(f"{run.uri_of(key)} is the record of attempt {attempt.fence}")
    return attempt


def readable_attempt(run: Store, fence: int) -> Attempt | None:
    """Returns the record of an attempt; None if it is missing or corrupt."""
    with suppress(ObjectMissingError, BadDataError):
        return load_attempt(run, fence)
    return None


def last_attempt(run: Store) -> Attempt | None:
    """Returns the newest readable record of an attempt, if there is one."""
    # A local bucket may be a folder that does not exist yet.
    with suppress(MissingInputError):
        return next(filter(None, (readable_attempt(run, fence) for fence in reversed(attempt_fences(run)))), None)
    return None


def highest_fence(run: Store) -> int:
    """Returns the highest fence of an attempt or a checkpoint; 0 for a new run."""
    places = places_in(run, ObjectKind.ATTEMPT.folder, CHECKPOINTS).values()
    return max((max(place.fence, place.checkpoint.fence) for place in places), default=0)


def record_attempt(run: Store, fence: int, holder: str, **circumstances: Any) -> Attempt:
    """Creates the record of an attempt, which has the run's lease with this fence as `holder`.

    The circumstances are the other fields of `Attempt` from `changes` to `imported`.
    """
    previous, status = max(attempt_fences(run), default=None), read_status(run)
    seen = status.model_dump(include={*LastStatus.model_fields}) if status and status.fence == previous else None
    dollars = None
    with suppress(ValueError):
        dollars = float(os.environ.get(DOLLARS) or "")
    attempt = Attempt(
        fence=fence,
        id=holder,
        started=utc_now(),
        host=socket.gethostname(),
        code_version=code_version(),
        config_sha256=hashlib.sha256(run.read(CONFIG_KEY).data).hexdigest(),
        previous=previous,
        previous_seen=LastStatus(**seen) if seen else None,
        dollars_per_hour=dollars,
        **circumstances,
    )
    run.create(ObjectKind.ATTEMPT.key(fence=fence), attempt.to_json())
    return attempt


def what_is_otherwise(before: Attempt, now: Attempt, this: str = "this one") -> list[str]:
    """Returns a sentence for each change of circumstances from an attempt to `this` that may change the results."""
    found = []
    if before.code_version != now.code_version:
        found.append(
            f"attempt {before.fence} ran code {before.code_version}, and {this} runs {now.code_version}: images and "
            "noise stay the same, unless the code for them changed; the weights may differ from an undisturbed run"
        )
    ran_on, runs_on = (
        attempt.device if attempt.is_exact else f"{attempt.world_size} × {attempt.device}" for attempt in (before, now)
    )
    if ran_on != runs_on:
        found.append(
            f"attempt {before.fence} ran on {ran_on}, and {this} runs on {runs_on}: images and noise stay the same, "
            "rounding differs"
        )
    return found


class Status(Sealed):
    """The progress of a run, for people; it decides only whether the run counts as finished."""

    state: str
    """See `State`."""
    fence: int
    images_seen: int
    target_images: int
    epoch: float
    """At most the number of epochs, though the last batch may go beyond them."""
    loss: float | None
    images_per_second: float | None
    updated: Moment


def read_status(run: Store) -> Status | None:
    """Returns the last status; None if it is missing, corrupt or another version's."""
    with suppress(ObjectMissingError, BadDataError):
        return Status.load(run, STATUS_KEY)
    return None


def check_writable(run: Store) -> None:
    """Raises if the run's folder does not permit what a lease and every save need; see `Store.check_writable`."""
    run.check_writable(ObjectKind.PROBE.key(unique=uuid.uuid4().hex))


class StatusReporter:
    """Writes the status in a thread, at intervals and at the end; an unavailable bucket does not stop the run."""

    def __init__(self, run: Store, current: Callable[[State], Status]) -> None:
        # The store has a limit of its own, because the last state is written after a stop request.
        self._run, self._current = run.within(PATIENCE_SECONDS), current
        self._state, self._ended = State.RUNNING, threading.Event()
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)
        self._thread.start()

    def close(self, state: State, timeout_seconds: float = STATUS_CLOSE_SECONDS) -> None:
        """Writes the last state, `finished`, `stopped` or `failed`, if the bucket answers in time."""
        self._state = state
        self._ended.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            note(f"the run's status could not be set to {state}: the bucket did not answer in time")

    def _work(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.is_set()
            try:
                self._run.put(STATUS_KEY, self._current(self._state).to_json())
            except JobError as error:
                # The next one is written soon, and lease and saves report an outage.
                if is_last:
                    note(f"could not write the run's status: {error}")
            self._ended.wait(STATUS_SECONDS)
