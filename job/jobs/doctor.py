"""`ddpm doctor`: looks in seconds at what a job would otherwise miss in its twentieth minute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from job.exits import Exit, JobError
from job.jobs.backends import backend_for, extra_named
from job.jobs.checks import Check
from job.jobs.targets import Target
from job.store import ObjectExistsError, Retry, Store, is_remote, open_store
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
ALL_REDUCE_SECONDS = 60.0


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
    yield from _clock(uri)


def machine_checks() -> Iterator[Check]:
    """Shared memory, disk, GPUs, and a sum over two processes, on this machine."""
    gpus, check = _gpus()
    yield check
    yield _shared_memory(gpus)
    yield _disk()
    yield _all_reduce(gpus)


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
    began = time.monotonic()
    try:
        store.create(key, content)
    except JobError as error:
        yield Check.of_error("bucket write", error)
        if error.exit_code is not Exit.BUCKET_AWAY:
            yield from _listing(store, None)
        return
    yield Check("bucket write", True, f"{store.uri}, {(time.monotonic() - began) * 1000:.0f} ms")
    try:
        read = store.read(key).data
        yield Check("bucket read", read == content, "as written" if read == content else "not what was written")
    except JobError as error:
        yield Check.of_error("bucket read", error)
    yield _create_once(store, key)
    yield from _listing(store, key)
    try:
        store.delete(key)
        yield Check("bucket delete", True, "the object is gone")
    except JobError as error:
        yield Check.of_error("bucket delete", error)


def _create_once(store: Store, key: str) -> Check:
    name = "bucket create-once"
    try:
        store.create(key, uuid.uuid4().bytes)
    except ObjectExistsError:
        return Check(name, True, "a second writer is refused")
    except JobError as error:
        return Check.of_error(name, error)
    return Check(
        name, False, "a second writer overwrites the first", "use a bucket that honours preconditions", Exit.BAD_REQUEST
    )


def _listing(store: Store, key: str | None) -> Iterator[Check]:
    try:
        found = [entry.key for entry in store.list(FOLDER)]
    except JobError as error:
        yield Check.of_error("bucket list", error)
        return
    seen = key is None or key in found
    message = "it answers" if key is None else "what was written is in it" if seen else "what was written is not in it"
    yield Check("bucket list", seen, message, "use a bucket whose listings are up to date", Exit.BAD_REQUEST)


def _clock(uri: str) -> Iterator[Check]:
    """The bucket server's clock, by the Date that it puts on every answer; nothing if it tells none."""
    if not is_remote(uri):
        return
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    defaults = {"gs": ("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")}
    variable, server = defaults.get(uri.partition("://")[0].lower(), ("AWS_ENDPOINT_URL", "https://s3.amazonaws.com"))
    server = os.environ.get(variable) or server
    if not server.startswith(("http://", "https://")):
        server = f"http://{server}"
    try:
        with urlopen(Request(server, method="HEAD"), timeout=CLOCK_ANSWER_SECONDS) as answer:  # noqa: S310
            said = answer.headers.get("Date", "")
    except HTTPError as error:
        # It has a clock, whatever it thinks of the question.
        said = error.headers.get("Date", "")
    except (OSError, ValueError):
        return
    try:
        seconds = (datetime.now(UTC) - parsedate_to_datetime(said)).total_seconds()
    except (TypeError, ValueError):
        return
    passed = abs(seconds) <= CLOCK_SECONDS
    message = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the bucket's" if not passed else "right"
    remedy = "set it by NTP, such as `timedatectl set-ntp true`"
    yield Check("clock", passed, message, remedy, Exit.NO_PERMISSION)


def _gpus() -> tuple[int, Check]:
    if shutil.which("nvidia-smi") is None:
        return 0, Check("GPUs", True, "none that nvidia-smi would show: jobs here compute on the CPU")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, check=False, timeout=ALL_REDUCE_SECONDS)
    except subprocess.TimeoutExpired:
        return 0, Check("GPUs", False, "nvidia-smi does not answer", "restart the machine", Exit.HUNG)
    lines = [line.strip() for line in asked.stdout.splitlines() if line.strip()]
    if asked.returncode or not lines:
        said = " ".join((asked.stdout + asked.stderr).split())[:200]
        return 0, Check("GPUs", False, f"nvidia-smi: {said}", "install or restart NVIDIA's driver")
    kinds = {line: lines.count(line) for line in lines}
    described = "; ".join(f"{count} × {kind}" for kind, count in kinds.items())
    return len(lines), Check("GPUs", True, f"{described} (name, driver, memory)")


def _shared_memory(gpus: int) -> Check:
    folder = Path("/dev/shm")  # noqa: S108
    if not folder.is_dir():
        return Check("shared memory", gpus < 2, "there is no /dev/shm", "mount a tmpfs there")
    size_bytes = shutil.disk_usage(folder).total
    passed = gpus < 2 or size_bytes >= SHARED_MEMORY_BYTES
    remedy = f"give the container {SHARED_MEMORY_BYTES / 2**30:g} GiB: --shm-size 1g, or an emptyDir in memory"
    return Check("shared memory", passed, f"{size_bytes / 2**20:,.0f} MiB in /dev/shm", remedy, Exit.DISK_FULL)


def _disk() -> Check:
    from job.config import DataConfig
    from job.data.cache import default_cache_dir

    budget = float(DataConfig.model_fields["cache_gigabytes"].default)
    try:
        folder = existing = default_cache_dir()
        while not existing.exists():
            existing = existing.parent
        free_bytes = shutil.disk_usage(existing).free
    except JobError as error:
        return Check.of_error("disk", error)
    except OSError as error:
        return Check("disk", False, f"{error.filename}: {error.strerror}", "set DDPM_CACHE", Exit.NO_PERMISSION)
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        what = "cannot be written" if existing.is_dir() else "is no folder"
        return Check("disk", False, f"{existing} {what}", "set DDPM_CACHE to a folder that can", Exit.NO_PERMISSION)
    message = f"{free_bytes / 1e9:.1f} GB free for images in {folder}; they take at most {budget:g} GB"
    remedy = "free some, or set DDPM_CACHE to another disk"
    return Check("disk", free_bytes >= FREE_DISK_BYTES, message, remedy, Exit.DISK_FULL)


def _all_reduce(gpus: int) -> Check:
    name, world_size = "all-reduce", 1 if gpus == 1 else 2
    remedy = "set NCCL_DEBUG=INFO and look again" if gpus else "see to the loopback interface and its firewall"
    with scratch_folder("doctor") as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "job.jobs.all_reduce", f"{folder}/meeting", str(rank), str(world_size)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            said = [rank.communicate(timeout=ALL_REDUCE_SECONDS)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            return Check(name, False, f"no answer within {ALL_REDUCE_SECONDS:g} s", remedy, Exit.HUNG)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    last = (said[0].strip().splitlines() or ["nothing was said"])[-1]
    if any(rank.returncode for rank in ranks):
        return Check(name, False, last, remedy, Exit.HUNG)
    if gpus and not last.startswith("nccl"):
        wheel = "install PyTorch for CUDA: this one computes on the CPU"
        return Check(name, False, f"PyTorch sees none of {gpus} GPUs ({last})", wheel)
    return Check(name, True, f"{world_size} process{'es' * (world_size > 1)} by {last}")
