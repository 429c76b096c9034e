"""`ddpm doctor`: looks in seconds at what a job would otherwise miss in its twentieth minute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from job.data.shards import SHARD_PIXEL_BYTES
from job.exits import Exit, JobError
from job.jobs.backends import backend_for
from job.jobs.backends.base import Check
from job.jobs.targets import Target
from job.processes.group import local_gpus
from job.runs.layout import RUNS
from job.store import Retry, Store, is_remote, open_store
from job.store.files import os_errors, scratch_folder

DOCTOR_FOLDER = "doctor"
"""Of the bucket: where an object is tried out, and deleted again."""
TRIAL_SECONDS = 10.0
"""A request that is given up too early may still arrive, after its object was deleted."""
SHARED_MEMORY_BYTES = 1 << 30
"""What NCCL and torch take of /dev/shm with several GPUs; container engines give 64 MB unless told otherwise."""
FREE_DISK_BYTES = 2 << 30
PROGRAM_SECONDS = 60.0
"""For nvidia-smi, and for the sum over processes."""


def checks_of(target: Target, bucket: str) -> Iterator[Check]:
    """All that a job on `target` needs, and can be looked at from here; no bucket if that is empty."""
    if bucket:
        yield from bucket_checks(bucket)
    if target.backend == "local":
        yield from machine_checks()
    try:
        with backend_for(target) as backend:
            yield from backend.checks()
    except JobError as error:
        yield Check.of_error(target.backend, error)


def bucket_checks(uri: str) -> Iterator[Check]:
    """Credentials, and all that a job does to a bucket."""
    try:
        store = open_store(uri, Retry(TRIAL_SECONDS))
    except JobError as error:
        yield Check.of_error("credentials", error)
        return
    yield Check("credentials", True, "found" if is_remote(uri) else "a folder of this machine needs none")
    yield Check.of("bucket write", partial(_write_once_and_delete, store))
    yield Check.of("bucket list", lambda: f"{len(store.folders(RUNS)):,} runs are there")


def machine_checks() -> Iterator[Check]:
    """GPUs, shared memory, disk, and a sum over two processes, on this machine."""
    gpus = local_gpus()
    yield Check.of("GPUs", _ask_nvidia_smi)
    yield Check.of("shared memory", partial(_measure_shared_memory, gpus))
    yield Check.of("disk", _measure_disk)
    yield Check.of("temporary files", _measure_temporary)
    yield Check.of("all-reduce", partial(_sum_over_processes, gpus))


def tell(checks: Iterable[Check], as_json: bool) -> Exit:
    """Prints each check in a line as soon as it is known, or all as JSON, and returns the first failure's code."""
    told = []
    for check in checks:
        told.append(check)
        if not as_json:
            remedy = f": {check.remedy}" if check.remedy and not check.passed else ""
            print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<24}  {check.message}{remedy}", flush=True)
    if as_json:
        print(json.dumps([asdict(check) for check in told]))
    return next((check.exit_code for check in told if not check.passed), Exit.FINISHED)


def _write_once_and_delete(store: Store) -> str:
    store.check_writable(f"{DOCTOR_FOLDER}/{uuid.uuid4().hex}")
    return f"{store.uri} takes an object, refuses a second writer, and deletes it again"


def _ask_nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none that nvidia-smi would show: jobs here compute on the CPU"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    asked = _output_of(query, "restart the machine")
    gpus = [line.strip() for line in asked.stdout.splitlines() if line.strip()]
    if asked.returncode or not gpus:
        said = " ".join((asked.stdout + asked.stderr).split())[:200]
        raise JobError(f"nvidia-smi says {said!r}: install or restart NVIDIA's driver", Exit.MISSING_INPUT)
    return "; ".join(f"{count} × {kind}" for kind, count in Counter(gpus).items()) + " (name, driver, memory)"


def _measure_shared_memory(gpus: int) -> str:
    folder = Path("/dev/shm")  # noqa: S108
    size_bytes = shutil.disk_usage(folder).total if folder.is_dir() else 0
    said = f"{size_bytes / 2**20:,.0f} MiB in /dev/shm"
    if gpus > 1 and size_bytes < SHARED_MEMORY_BYTES:
        raise JobError(f"{said}: give the container {SHARED_MEMORY_BYTES >> 30} GiB (--shm-size)", Exit.DISK_FULL)
    return said


def _measure_disk() -> str:
    from job.config import DataConfig
    from job.data.cache import default_cache_dir

    folder, budget = default_cache_dir(), DataConfig.model_fields["cache_gigabytes"].default
    free_bytes = _free_bytes(folder, "DDPM_CACHE")
    said = f"{free_bytes / 1e9:.1f} GB free for images in {folder}; they take at most {budget:g} GB"
    if free_bytes < FREE_DISK_BYTES:
        raise JobError(f"{said}: free some, or set DDPM_CACHE to another disk", Exit.DISK_FULL)
    return said


def _measure_temporary() -> str:
    # tempfile would take another folder in the place of one that is full or not there.
    folder = Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108
    return f"{_free_bytes(folder, 'TMPDIR') / 1e9:.1f} GB free in {folder}"


def _free_bytes(folder: Path, variable: str) -> int:
    """Of a folder in which a shard can be written: only that finds a quota."""
    with os_errors(f"{folder}, which {variable} moves"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, SHARD_PIXEL_BYTES)
        return shutil.disk_usage(folder).free


def _sum_over_processes(gpus: int) -> str:
    world_size = 1 if gpus == 1 else 2
    remedy = "set NCCL_DEBUG=INFO and look again" if gpus else "see to the loopback interface and its firewall"
    with scratch_folder("doctor") as folder:
        command = [sys.executable, "-P", "-m", "job.jobs.all_reduce", f"{folder}/meeting", str(world_size)]
        done = _output_of(command, remedy, OMP_NUM_THREADS="1")
    last = ([*done.stderr.splitlines(), *done.stdout.splitlines()] or ["nothing was said"])[-1]
    if done.returncode:
        raise JobError(f"{last}: {remedy}", Exit.HUNG)
    if gpus and not last.startswith("nccl"):
        raise JobError(f"PyTorch sees none of {gpus} GPUs ({last}): install PyTorch for CUDA", Exit.MISSING_INPUT)
    return f"{world_size} process{'es' * (world_size > 1)} by {last}"


def _output_of(command: list[str], remedy: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=PROGRAM_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise JobError(f"{Path(command[0]).name} does not answer: {remedy}", Exit.HUNG) from None
