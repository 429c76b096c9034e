"""Saving and resuming: the time that training waits, the speed of uploads, and the time to the next step."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.measuring import Figure, Turns, take_turns
from benchmarks.resume import resumptions
from benchmarks.subject import TINY, run_config
from ddpm.threads import Threads
from job.config import RunConfig, method
from job.coordination.lease import Lease
from job.progress import Progress
from job.runs.checkpoints import list_checkpoints
from job.runs.records import create_config, record_attempt
from job.runs.retention import Retention, delete_checkpoint
from job.runs.writer import PARALLEL_UPLOADS, CheckpointWriter, LeasedRun, plan_parts
from job.stop import NEVER
from job.store import Store, open_store
from tests.servers import fake_gcs_server

State = dict[str, dict[str, Tensor]]
BUCKET = "benchmarks"


def measure(quick: bool) -> list[Figure]:
    """Saves Ho et al.'s CIFAR-10 network, 572 MB with averages and moments, to a folder and to an object server."""
    sets, cpu = TINY if quick else (), torch.device("cpu")
    config = run_config(sets)
    state = method.initial_state(method.build_network(config, cpu), config).tensors()
    megabytes = sum(tensor.nbytes for named in state.values() for tensor in named.values()) / 1e6
    # As in a run, whose slots have a thread each: several threads wait for each other at each tensor.
    with TemporaryDirectory(prefix="ddpm-bench-") as name, object_server(Path(name)), Threads(1).outside():
        blocked, committed = saves(open_store(f"{name}/run"), config, state, 1 if quick else 5)
        _, far_committed = saves(open_store(f"gs://{BUCKET}/run"), config, state, 1 if quick else 2)
        uploads = uploads_in_turn(state, Path(name), 1 if quick else 3)
        peer = torch_checkpointing_saves(state, Path(name) / "peer", 1 if quick else 3)
        resumed = resumptions(f"gs://{BUCKET}", Path(name), sets, state, 1 if quick else 2)
    return [
        Figure(
            "checkpoint_blocked_ratio",
            "checkpoint: training blocked / plain copy into touched buffers, ×",
            [1 / speedup for speedup in blocked.speedups],
            at_most=2.0,
            beside=f"{megabytes:.0f} MB: {median(blocked.ours):.3g} s, plain copy {median(blocked.peer):.3g} s",
            raw={"state_megabytes": megabytes, **blocked.raw()},
        ),
        Figure(
            "checkpoint_committed_seconds",
            "checkpoint: from save to commit, in the background, folder, s",
            committed,
            beside=f"emulated gs://: {median(far_committed):.3g} s",
            raw={"gs_seconds": far_committed},
        ),
        Figure(
            "checkpoint_upload_ratio",
            "checkpoint: upload speed / google-cloud-storage's own, ×",
            uploads.speedups,
            at_least=0.8,
            beside=f"{PARALLEL_UPLOADS} parts at a time, emulated gs://: {megabytes / median(uploads.ours):.0f} MB/s, "
            f"raw client {megabytes / median(uploads.peer):.0f} MB/s",
            raw=uploads.raw(),
        ),
        resumed,
        *torch_checkpointing_figures(blocked.ours, peer),
    ]


def torch_checkpointing_saves(state: State, folder: Path, turns: int) -> list[float]:
    """Returns the seconds for which a step waits for torch_checkpointing, as its manual has it; none without it.

    Its `save` returns at once, and `lock` holds up the update of the weights until they are copied.
    """
    if not find_spec("torch_checkpointing"):
        return []
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    # Its direct writes are refused by file systems that want them aligned.
    disk = LocalFileSystemStorageConfig(use_direct_io=False)
    manager, blocked = CheckpointManager.Config(storage_config=disk).build(), list[float]()
    with Progress("saving with torch_checkpointing", total=turns + 1, unit="saves") as bar:
        for turn in range(turns + 1):
            start = time.perf_counter()
            written = manager.save(str(folder / str(turn)), state)
            with manager.lock():
                blocked.append(time.perf_counter() - start)
            written.result()
            shutil.rmtree(folder / str(turn))
            bar.update(turn + 1)
    manager.close()
    return blocked[1:]


def torch_checkpointing_figures(ours: list[float], peer: list[float]) -> list[Figure]:
    """Returns the ratio of the times that a step waits."""
    if not peer:
        return []
    ratios = [theirs / median(ours) for theirs in peer]
    beside = f"torch_checkpointing {median(peer):.3g} s, into shared memory, ours {median(ours):.3g} s"
    return [Figure("checkpoint_peer_ratio", "checkpoint: torch_checkpointing blocks / ours, ×", ratios, beside=beside)]


def saves(run: Store, config: RunConfig, state: State, turns: int) -> tuple[Turns, list[float]]:
    """Returns the seconds that `CheckpointWriter.save` blocks, in turn with a plain copy, and those to its commit."""
    live = list(chain.from_iterable(named.values() for named in state.values()))
    cuda = live[0].is_cuda
    buffers = [torch.empty_like(tensor, device="cpu", pin_memory=cuda).fill_(0) for tensor in live]
    images_seen, started, committed = count(), [0.0], []

    def save() -> None:
        started[0] = time.perf_counter()
        writer.save(next(images_seen), [])
        if cuda:
            # The next step would wait as long.
            torch.cuda.current_stream().synchronize()

    def finish() -> None:
        writer.wait()
        committed.append(time.perf_counter() - started[0])
        for ref in list_checkpoints(run):
            delete_checkpoint(run, ref)

    def copy() -> None:
        torch._foreach_copy_(buffers, live, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()

    title = f"saving to {run.uri.partition('://')[0] if '://' in run.uri else 'a folder'}"
    with writing(run, config, state) as writer:
        measured = take_turns(title, save, copy, turns, after_turn=finish)
    return measured, committed[1:]


@contextmanager
def writing(run: Store, config: RunConfig, state: State) -> Iterator[CheckpointWriter]:
    """Opens the writer of a new run, which saves these tensors."""
    lease = Lease.take(run, 0, 0.0, NEVER, print)
    create_config(run, config)
    attempt = record_attempt(run, lease.fence, lease.holder, changes={}, world_size=1, device="cpu")
    leased = LeasedRun(run, Retention(config, 10**6), attempt, lease, ())
    writer = CheckpointWriter(leased, state, before=None, stop=NEVER)
    yield writer
    writer.close(wait=True)
    lease.close()


def uploads_in_turn(state: State, folder: Path, turns: int) -> Turns:
    """Uploads the files of one checkpoint through our store and with the bare client, with equal parallelism."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage
    from safetensors.torch import save_file

    paths = []
    for name, tensors in plan_parts(state).items():
        paths.append(folder / name)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, paths[-1])
    store = open_store(f"gs://{BUCKET}/ours")
    bare = storage.Client(project=BUCKET, credentials=AnonymousCredentials()).bucket(BUCKET)
    with ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:

        def ours() -> None:
            list(pool.map(lambda path: store.upload(path, path.name), paths))

        def client() -> None:
            list(pool.map(lambda path: bare.blob(f"bare/{path.name}").upload_from_filename(str(path)), paths))

        def clean() -> None:
            for path in paths:
                store.delete(path.name)
                bare.blob(f"bare/{path.name}").delete()

        return take_turns("uploading", ours, client, turns, after_turn=clean)


@contextmanager
def object_server(folder: Path) -> Iterator[None]:
    """Starts the object server of the tests with an empty bucket, for `gs://` here and in child processes.

    `folder` takes its log, and the cached images of these processes.
    """
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    before = dict(os.environ)
    with fake_gcs_server(folder) as url:
        try:
            os.environ |= {"STORAGE_EMULATOR_HOST": url, "DDPM_CACHE": str(folder / "cache")}
            storage.Client(project=BUCKET, credentials=AnonymousCredentials()).create_bucket(BUCKET)
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
