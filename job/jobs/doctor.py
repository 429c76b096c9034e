"""`ddpm doctor`: checks in seconds what a job would otherwise miss in its twentieth minute.

python -m job.jobs.doctor FILE WORLD_SIZE    a sum over processes, which fails if it is wrong
"""

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
from datetime import timedelta
from pathlib import Path
from typing import Any

from job.config.schema import DataConfig
from job.data.shards import SHARD_PIXEL_BYTES
from job.exits import Exit, JobError
from job.jobs.backends import Check
from job.jobs.targets import Target, target_on
from job.platform import allocate
from job.processes.group import check_gpus, local_gpus
from job.progress import note
from job.runs.layout import RUNS
from job.store import Retry, is_remote, open_store
from job.store.files import default_cache_dir, os_errors, scratch_folder

DOCTOR_FOLDER = "doctor"
"""The folder of the bucket in which an object is written, and deleted again."""
TRIAL_SECONDS = 10.0
"""The limit of a request: a late one may arrive after its object was deleted."""
SHARED_MEMORY_BYTES = 1 << 30
"""The need of NCCL and torch for /dev/shm with several GPUs; the default of container engines is 64 MB."""
FREE_DISK_BYTES = 2 << 30
PROGRAM_SECONDS = 60.0
"""The limit of the sum over processes, which itself waits for less:"""
ALL_REDUCE_SECONDS = 20


def check_target(bucket: str, on: str, targets: Path | None, *, no_bucket: bool, as_json: bool) -> None:
    """Prints the checks of a target; ends with the code of the first that failed."""
    target = target_on(on, targets, note)
    if code := report(checks_of(target, "" if no_bucket else bucket), as_json):
        raise SystemExit(int(code))


def checks_of(target: Target, bucket: str) -> Iterator[Check]:
    """Yields the checks of all that a job on `target` needs; without those of a bucket if that is empty."""
    if bucket:
        yield from bucket_checks(bucket)
    try:
        yield from target.checks(bucket)
    except JobError as error:
        yield Check.of_error(target.backend, error)


def bucket_checks(uri: str) -> Iterator[Check]:
    """Yields the checks of the credentials, and of all that a job does to a bucket."""
    try:
        store = open_store(uri, Retry(TRIAL_SECONDS))
    except JobError as error:
        yield Check.of_error("credentials", error)
        return

    def write_once_and_delete() -> str:
        store.check_writable(f"{DOCTOR_FOLDER}/{uuid.uuid4().hex}")
        return f"{store.uri} takes an object, refuses a second writer, and deletes it again"

    yield Check("credentials", True, "found" if is_remote(uri) else "a folder of this machine needs none")
    yield Check.of("bucket write", write_once_and_delete)
    yield Check.of("bucket list", lambda: f"runs found: {len(store.folders(RUNS)):,}")


def report(checks: Iterable[Check], as_json: bool) -> Exit:
    """Prints each check in a line at once, or all as JSON in the end, and returns the first failure's code."""
    done = []
    for check in checks:
        done.append(check)
        if not as_json:
            remedy = f": {check.remedy}" if check.remedy and not check.passed else ""
            print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<24}  {check.message}{remedy}", flush=True)
    if as_json:
        print(json.dumps([asdict(check) for check in done]))
    return next((check.exit_code for check in done if not check.passed), Exit.FINISHED)


def machine_checks() -> Iterator[Check]:
    """Yields the checks of this machine."""
    gpus = local_gpus()
    yield Check.of("GPUs", lambda: _found_gpus(gpus))
    yield Check.of("shared memory", lambda: _shared_memory(gpus))
    yield Check.of("disk", _cache_disk)
    yield Check.of("temporary files", _temporary_disk)
    yield Check.of("all-reduce", lambda: _sum_over_processes(gpus))


def _found_gpus(gpus: int) -> str:
    check_gpus()
    return f"{gpus} by NVIDIA's driver" if gpus else "no NVIDIA GPU"


def _shared_memory(gpus: int) -> str:
    folder = Path("/dev/shm")  # noqa: S108
    size_bytes = shutil.disk_usage(folder).total if folder.is_dir() else 0
    found = f"{size_bytes / 2**20:,.0f} MiB in /dev/shm"
    if gpus > 1 and size_bytes < SHARED_MEMORY_BYTES:
        raise JobError(f"{found}: give the container {SHARED_MEMORY_BYTES >> 30} GiB (--shm-size)", Exit.DISK_FULL)
    return found


def _cache_disk() -> str:
    folder, budget = default_cache_dir(), DataConfig.model_fields["cache_gigabytes"].default
    free_bytes = _free_bytes(folder, "DDPM_CACHE")
    found = f"{free_bytes / 1e9:.1f} GB free for images in {folder}; they take at most {budget:g} GB"
    if free_bytes < FREE_DISK_BYTES:
        raise JobError(f"{found}: free some, or set DDPM_CACHE to another disk", Exit.DISK_FULL)
    return found


def _temporary_disk() -> str:
    # tempfile would silently replace a folder that is full or missing by another.
    folder = Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108
    return f"{_free_bytes(folder, 'TMPDIR') / 1e9:.1f} GB free in {folder}"


def _free_bytes(folder: Path, variable: str) -> int:
    """Returns the free bytes of a folder in which a shard can be written: only the write finds a quota."""
    with os_errors(f"{folder}, which {variable} moves"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            allocate(file.fileno(), SHARD_PIXEL_BYTES)
        return shutil.disk_usage(folder).free


def _sum_over_processes(gpus: int) -> str:
    world_size = 1 if gpus == 1 else 2
    remedy = "set NCCL_DEBUG=INFO and repeat" if gpus else "check the loopback interface and its firewall"
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": PROGRAM_SECONDS}
    with scratch_folder("doctor") as folder:
        program = [sys.executable, "-P", "-m", "job.jobs.doctor", f"{folder}/meeting", str(world_size)]
        try:
            done = subprocess.run(program, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, **how)
        except subprocess.TimeoutExpired:
            raise JobError(f"the processes do not answer: {remedy}", Exit.HUNG) from None
    last = ([*done.stderr.splitlines(), *done.stdout.splitlines()] or ["without output"])[-1]
    if done.returncode:
        raise JobError(f"{last}: {remedy}", Exit.HUNG)
    if gpus and not last.startswith("nccl"):
        raise JobError(f"PyTorch sees none of {gpus} GPUs ({last}): install PyTorch for CUDA", Exit.MISSING_INPUT)
    return f"{world_size} process{'es' * (world_size > 1)} by {last}"


def _all_reduce(rank: int, meeting: str, world_size: int) -> None:
    import torch
    import torch.distributed as dist

    device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    meet: dict[str, Any] = {"init_method": f"file://{meeting}", "rank": rank, "world_size": world_size}
    dist.init_process_group(backend, timeout=timedelta(seconds=ALL_REDUCE_SECONDS), **meet)
    value = torch.full((1,), float(rank + 1), device=device)
    dist.all_reduce(value)
    dist.destroy_process_group()
    if value.item() != world_size * (world_size + 1) / 2:
        raise RuntimeError(f"the sum over {world_size} processes is {value.item():g}")
    if rank == 0:
        names = Counter(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
        found = ", ".join(f"{count} × {name}" for name, count in names.items()) or "0 GPUs"
        print(f"{backend}, PyTorch {torch.__version__}, {found}")


if __name__ == "__main__":
    from torch.multiprocessing import start_processes

    # Forked, so that PyTorch is imported once; a CUDA context, which a fork would break, does not exist yet.
    start_processes(_all_reduce, (sys.argv[1], int(sys.argv[2])), nprocs=int(sys.argv[2]), start_method="fork")
