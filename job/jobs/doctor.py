"""`ddpm doctor`: looks in seconds at what a job would otherwise miss in its twentieth minute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from job.exits import Exit, JobError
from job.jobs.backends import backend_for, extra_named
from job.jobs.checks import Check, looked_at
from job.jobs.targets import Target
from job.store import ObjectExistsError, Retry, Store, is_remote, open_store
from job.store.files import os_errors
from job.store.scratch import scratch_folder

FOLDER = "doctor"
"""Of the bucket: where objects are tried out, and deleted again."""
DEADLINE_SECONDS = 10.0
"""A request that is given up too early may still arrive, after its object was deleted."""
CLOCK_ANSWER_SECONDS = 3.0
CLOCK_SECONDS = 60.0
"""S3 and Google refuse what is signed five minutes ago or later; a clock that drifts gets there."""
SHARED_MEMORY_BYTES = 1 << 30
"""What NCCL and torch take of /dev/shm with several GPUs; container engines give 64 MB unless told otherwise."""
FREE_DISK_BYTES = 2 << 30
ANSWER_SECONDS = 60.0
"""For nvidia-smi, and for the sum over processes."""
_SERVERS = {
    "gs": ("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com"),
    "s3": ("AWS_ENDPOINT_URL", "https://s3.amazonaws.com"),
}


def checks_of(target: Target, bucket: str) -> Iterator[Check]:
    """All that a job on `target` needs, and can be looked at from here; no bucket if that is empty."""
    if bucket:
        yield from bucket_checks(bucket)
    if target.backend == "local":
        yield from machine_checks()
    try:
        with extra_named(target):
            yield from backend_for(target).checks()
    except JobError as error:
        yield Check.of_error(target.backend, error)


def bucket_checks(uri: str) -> Iterator[Check]:
    """Credentials, and all that a job does to a bucket, with a tiny object that is deleted again."""
    try:
        store = open_store(uri, Retry(DEADLINE_SECONDS))
    except JobError as error:
        yield Check.of_error("credentials", error)
        return
    yield Check("credentials", True, "found" if is_remote(uri) else "a folder of this machine needs none")
    yield from _trials(store)
    if is_remote(uri):
        yield from _clock(uri)


def machine_checks() -> Iterator[Check]:
    """Shared memory, disk, GPUs, and a sum over two processes, on this machine."""
    gpus: list[str] = []
    try:
        gpus = _gpus()
        kinds = "; ".join(f"{count} × {kind}" for kind, count in Counter(gpus).items())
        none = "none that nvidia-smi would show: jobs here compute on the CPU"
        yield Check("GPUs", True, f"{kinds} (name, driver, memory)" if gpus else none)
    except JobError as error:
        yield Check.of_error("GPUs", error)
    yield looked_at("shared memory", lambda: _shared_memory(len(gpus)))
    yield looked_at("disk", _disk)
    yield looked_at("all-reduce", lambda: _all_reduce(len(gpus)))


def tell(checks: Iterable[Check], as_json: bool) -> Exit:
    """Prints each check in a line as soon as it is known, or all as JSON, and returns the first failure's code."""
    told, code = [], Exit.FINISHED
    for check in checks:
        told.append(check)
        if not check.passed and code is Exit.FINISHED:
            code = check.exit_code
        if not as_json:
            remedy = f": {check.remedy}" if check.remedy and not check.passed else ""
            print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<24}  {check.message}{remedy}", flush=True)
    if as_json:
        print(json.dumps([asdict(check) for check in told]))
    return code


def _trials(store: Store) -> Iterator[Check]:
    key, content = f"{FOLDER}/{uuid.uuid4().hex}", uuid.uuid4().bytes

    def write() -> str:
        began = time.monotonic()
        store.create(key, content)
        return f"{store.uri}, {(time.monotonic() - began) * 1000:.0f} ms"

    def read() -> str:
        if store.read(key).data != content:
            raise JobError("not what was written: use a bucket that keeps what it is given")
        return "as written"

    def create_once() -> str:
        try:
            store.create(key, uuid.uuid4().bytes)
        except ObjectExistsError:
            return "a second writer is refused"
        raise JobError("a second writer overwrites the first: use a bucket that honours preconditions")

    def find() -> str:
        if all(entry.key != key for entry in store.list(FOLDER)):
            raise JobError("what was written is not in it: use a bucket whose listings are up to date")
        return "what was written is in it"

    def read_listing() -> str:
        list(store.list(FOLDER))
        return "it answers"

    def delete() -> str:
        store.delete(key)
        return "the object is gone"

    written = looked_at("bucket write", write)
    yield written
    if written.passed:
        trials = {"read": read, "create-once": create_once, "list": find, "delete": delete}
        yield from (looked_at(f"bucket {what}", trial) for what, trial in trials.items())
    elif written.exit_code is not Exit.BUCKET_AWAY:
        yield looked_at("bucket list", read_listing)


def _clock(uri: str) -> Iterator[Check]:
    """The bucket server's clock, by the Date that it puts on every answer; nothing if it tells none."""
    variable, usual = _SERVERS[uri.partition("://")[0].lower()]
    server = os.environ.get(variable) or usual
    parts = urlsplit(server if "://" in server else f"http://{server}")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=CLOCK_ANSWER_SECONDS)
        connection.request("HEAD", "/")
        said = parsedate_to_datetime(connection.getresponse().headers.get("Date", ""))
        connection.close()
        seconds = (datetime.now(UTC) - said).total_seconds()
    except (OSError, HTTPException, ValueError, TypeError):
        return
    passed = abs(seconds) <= CLOCK_SECONDS
    message = "right" if passed else f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the bucket's"
    yield Check("clock", passed, message, "set it by NTP, such as `timedatectl set-ntp true`", Exit.NO_PERMISSION)


def _gpus() -> list[str]:
    """Name, driver and memory of each."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    asked = _answer(query, "restart the machine")
    lines = [line.strip() for line in asked.stdout.splitlines() if line.strip()]
    if asked.returncode or not lines:
        said = " ".join((asked.stdout + asked.stderr).split())[:200]
        raise JobError(f"nvidia-smi says {said!r}: install or restart NVIDIA's driver", Exit.MISSING_INPUT)
    return lines


def _shared_memory(gpus: int) -> str:
    folder = Path("/dev/shm")  # noqa: S108
    size_bytes = shutil.disk_usage(folder).total if folder.is_dir() else 0
    said = f"{size_bytes / 2**20:,.0f} MiB in /dev/shm"
    if gpus > 1 and size_bytes < SHARED_MEMORY_BYTES:
        wanted = f"{SHARED_MEMORY_BYTES / 2**30:g} GiB"
        raise JobError(f"{said}: give the container {wanted} (--shm-size, or an emptyDir in memory)", Exit.DISK_FULL)
    return said


def _disk() -> str:
    from job.config import DataConfig
    from job.data.cache import default_cache_dir

    budget = float(DataConfig.model_fields["cache_gigabytes"].default)
    folder = existing = default_cache_dir()
    with os_errors(folder):
        while not existing.exists():
            existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        what = "cannot be written" if existing.is_dir() else "is no folder"
        raise JobError(f"{existing} {what}: set DDPM_CACHE to a folder that can", Exit.NO_PERMISSION)
    free_bytes = shutil.disk_usage(existing).free
    said = f"{free_bytes / 1e9:.1f} GB free for images in {folder}; they take at most {budget:g} GB"
    if free_bytes < FREE_DISK_BYTES:
        raise JobError(f"{said}: free some, or set DDPM_CACHE to another disk", Exit.DISK_FULL)
    return said


def _all_reduce(gpus: int) -> str:
    world_size = 1 if gpus == 1 else 2
    remedy = "set NCCL_DEBUG=INFO and look again" if gpus else "see to the loopback interface and its firewall"
    with scratch_folder("doctor") as folder:
        command = [sys.executable, "-P", "-m", "job.jobs.all_reduce", f"{folder}/meeting", str(world_size)]
        done = _answer(command, remedy, OMP_NUM_THREADS="1")
    last = ([*done.stderr.splitlines(), *done.stdout.splitlines()] or ["nothing was said"])[-1]
    if done.returncode:
        raise JobError(f"{last}: {remedy}", Exit.HUNG)
    if gpus and not last.startswith("nccl"):
        wheel = "install PyTorch for CUDA, as this one computes on the CPU"
        raise JobError(f"PyTorch sees none of {gpus} GPUs ({last}): {wheel}", Exit.MISSING_INPUT)
    return f"{world_size} process{'es' * (world_size > 1)} by {last}"


def _answer(command: list[str], remedy: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        said = f"{Path(command[0]).name} does not answer within {ANSWER_SECONDS:g} s"
        raise JobError(f"{said}: {remedy}", Exit.HUNG) from None
