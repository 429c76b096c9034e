"""Saving and restoring: the time that training waits, the speed of uploads, and the way from a bucket into weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.measuring import Figure, faster, in_turn, timed
from benchmarks.subject import TINY, bucket, run_config
from ddpm.threads import Threads
from job.config import RunConfig, method
from job.coordination.lease import Lease
from job.runs.checkpoints import Manifest, commit_manifest, list_checkpoints, newest_good
from job.runs.layout import CheckpointRef
from job.runs.records import create_config, record_attempt
from job.runs.retention import Retention, delete_checkpoint
from job.runs.writer import PARALLEL_UPLOADS, CheckpointWriter, LeasedRun, plan_parts, write_part
from job.stop import NEVER
from job.store import Store, open_store
from job.store.local import LocalStore

State = dict[str, dict[str, Tensor]]
GIGABYTES_A_SECOND = (0.1, 0.3, 1.0, 1.5)
LARGE_BYTES = int(5e9)
TENSOR_BYTES = 16 << 20


def checkpoint(folder: Path, quick: bool) -> list[Figure]:
    """Saves Ho et al.'s CIFAR-10 network, 572 MB with averages and moments, to a folder and to an object server."""
    config = run_config(TINY if quick else ())
    state = new_state(config, torch.device("cpu"))
    megabytes = megabytes_of(state)
    # As in a run, whose slots have a thread each: several threads wait for each other at each tensor.
    with Threads(1).outside():
        blocked = saves(open_store(str(folder / "run")), config, state, 1 if quick else 5)
        with bucket("gs", folder / "server") as uri:
            uploads = uploads_in_turn(uri, state, folder, 1 if quick else 3)
    return [
        Figure(
            "checkpoint_blocked_ratio",
            "checkpoint: training blocked / plain copy into touched buffers, ×",
            [ours / copy for ours, copy in zip(blocked["ours"], blocked["peer"], strict=True)],
            at_most=2.0,
            beside=f"{megabytes:.0f} MB: {median(blocked['ours']):.3g} s, plain copy {median(blocked['peer']):.3g} s",
            raw={"state_megabytes": megabytes, **blocked},
        ),
        faster(
            "checkpoint_upload_ratio",
            "checkpoint: upload speed / google-cloud-storage's own",
            uploads,
            at_least=0.8,
            beside=f": {megabytes:.0f} MB to an emulated gs://, {PARALLEL_UPLOADS} parts at a time",
        ),
    ]


def new_state(config: RunConfig, device: torch.device) -> State:
    """Returns the tensors of a new run: weights, averages and moments."""
    return method.initial_state(method.build_network(config, device), config).tensors()


def megabytes_of(state: State) -> float:
    """Returns the size of all tensors."""
    return sum(tensor.nbytes for named in state.values() for tensor in named.values()) / 1e6


def saves(run: Store, config: RunConfig, state: State, turns: int) -> dict[str, list[float]]:
    """Returns the seconds that `CheckpointWriter.save` blocks, in turn with a plain copy."""
    live = list(chain.from_iterable(named.values() for named in state.values()))
    cuda = live[0].is_cuda
    buffers = [torch.empty_like(tensor, device="cpu", pin_memory=cuda).fill_(0) for tensor in live]
    images_seen = count()

    def save() -> None:
        writer.save(next(images_seen), [])
        if cuda:
            # The next step would wait as long.
            torch.cuda.current_stream().synchronize()

    def finish() -> None:
        writer.wait()
        for ref in list_checkpoints(run):
            delete_checkpoint(run, ref)

    def copy() -> None:
        torch._foreach_copy_(buffers, live, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()

    with writing(run, config, state) as writer:
        return in_turn("saving", timed(peer=copy, ours=save), turns, after_turn=finish)


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


def uploads_in_turn(uri: str, state: State, folder: Path, turns: int) -> dict[str, list[float]]:
    """Uploads the files of one checkpoint through our store and with the bare client, with equal parallelism."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage
    from safetensors.torch import save_file

    paths = []
    for name, tensors in plan_parts(state).items():
        paths.append(folder / name)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, paths[-1])
    store = open_store(f"{uri}/ours")
    bare = storage.Client(project="test", credentials=AnonymousCredentials()).bucket(uri.removeprefix("gs://"))
    with ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:

        def ours() -> None:
            list(pool.map(lambda path: store.upload(path, path.name), paths))

        def client() -> None:
            list(pool.map(lambda path: bare.blob(f"bare/{path.name}").upload_from_filename(str(path)), paths))

        def clean() -> None:
            for path in paths:
                store.delete(path.name)
                bare.blob(f"bare/{path.name}").delete()

        return in_turn("uploading", timed(peer=client, ours=ours), turns, after_turn=clean)


def restore(folder: Path, quick: bool) -> list[Figure]:
    """Reads a checkpoint of 5 GB into weights over links of several speeds, beside the time of the bytes alone."""
    figures = []
    live = save_large(LocalStore(folder / "bucket"), LARGE_BYTES // (100 if quick else 1), folder)
    for speed in GIGABYTES_A_SECOND:
        link, alone = Link(folder / "bucket", speed * 1e9), megabytes_of(live) / speed / 1e3
        began = time.monotonic()
        assert newest_good(link, into=live) is not None
        took = time.monotonic() - began
        what = f"restore over {speed:g} GB/s: seconds / those of the bytes alone, ×"
        beside = f"{took:.1f} s, the bytes alone {alone:.1f} s"
        figures.append(Figure(f"restore_{speed:g}_ratio", what, [took / alone], at_most=1.1, beside=beside))
    return figures


class Link(LocalStore):
    """A folder behind a link, whose downloads share `bytes_a_second`."""

    def __init__(self, root: Path, bytes_a_second: float) -> None:
        super().__init__(root)
        self._bytes_a_second, self._free_at, self._lock = bytes_a_second, 0.0, threading.Lock()

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        def carry(block: bytes) -> None:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + len(block) / self._bytes_a_second
                arrives_at = self._free_at
            time.sleep(max(0.0, arrives_at - time.monotonic()))
            consume(block)

        return super()._fetch(key, carry)


def save_large(run: Store, size_bytes: int, folder: Path) -> State:
    """Commits a checkpoint of noise; returns live tensors of the same shapes, touched as those of a network are."""
    noise = torch.randn(TENSOR_BYTES // 4)
    tensors = {"model": {f"layer.{number}": noise for number in range(size_bytes // TENSOR_BYTES)}}
    ref, files = CheckpointRef(1, 1000), []
    for name, part in plan_parts(tensors).items():
        files.append(write_part(folder / name, key := f"{ref.key}/{name}", part))
        run.upload(folder / name, key)
        (folder / name).unlink()
    about = {"fence": 1, "attempt": "", "images_seen": 1000, "loss_sums": []}
    commit_manifest(run, Manifest.model_validate(about | {"files": tuple(files)}))
    return {"model": {name: torch.zeros_like(tensor) for name, tensor in tensors["model"].items()}}
