"""`python -m benchmarks.check`: fails if a ratio to a peer is 30 % below the one recorded for this kind of processor.

It measures four comparisons of `python -m benchmarks`, smaller and shorter: its ratios are its own. All but that of a
save are of processor seconds, with one thread of PyTorch and no workers of the peer: by the clock, a peer whose threads
wait for each other looks slow beside other processes. A ratio is that of the shortest turns; one that is too low is
measured once more. With `--record` it writes what it measures to `recorded.json`; without a record of its kind of
processor it measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import checkpoint, loader, peers, sampling, training_step
from benchmarks.measuring import Turns, machine, take_turns
from benchmarks.subject import DATASET, HALF_WIDTH, pack_noise, run_config, write_noise
from job.config import method
from job.coordination.sealed import utc_now
from job.data.shards import dataset_key
from job.processes import compute
from job.store import open_store

RECORDED = Path(__file__).with_name("recorded.json")
ALLOWED_SHARE = 0.7
"""The smallest share of a recorded ratio that passes."""
IMAGES = 4000


def training_ratio(folder: Path) -> Turns:
    """Times a training step and that of diffusers' example."""
    precision = compute.best_precision()
    training_step.pack_for_loops(folder, quick=False)
    ours = training_step.OurLoop(folder, False, precision)
    peer = training_step.DiffusersLoop(ours.session.config, ours.session.state.model)
    turns = take_turns("training steps", ours.step, peer.step, turns=3, clock=time.process_time)
    ours.close()
    return turns


def sampling_ratio(folder: Path) -> Turns:
    """Times our painter and diffusers' DDIM pipeline."""
    return sampling.in_turn(HALF_WIDTH, 4, 8, compute.best_precision(), turns=4, clock=time.process_time)


def loader_ratio(folder: Path) -> Turns:
    """Times an epoch of our warm stream and one of webdataset."""
    from torch.utils.data import DataLoader

    bucket, cache = str(folder / "bucket"), folder / "cache"
    write_noise(folder / "images", IMAGES, loader.SIZE)
    index = pack_noise(bucket, folder / "images", loader.SIZE)
    key = dataset_key(DATASET, loader.SIZE)
    urls, batch = [f"{bucket}/{key}/{shard.name}" for shard in index.shards], peers.BATCH_SIZE_IMAGES
    return take_turns(
        "reading images",
        lambda: loader.timed_epoch(lambda: loader.our_epoch(loader.opened(bucket, key, cache)), IMAGES),
        lambda: loader.timed_epoch(lambda: DataLoader(peers.webdataset_epoch(urls).dataset, batch), IMAGES),
        turns=5,
        clock=time.process_time,
    )


def checkpoint_ratio(folder: Path) -> Turns:
    """Times the part of a save for which training waits, and a plain copy."""
    config, cpu = run_config(HALF_WIDTH), torch.device("cpu")
    state = method.initial_state(method.build_network(config, cpu), config).tensors()
    turns, _ = checkpoint.saves(open_store(str(folder / "run")), config, state, turns=7)
    return turns


RATIOS: dict[str, Callable[[Path], Turns]] = {
    "training_step": training_ratio,
    "sampling": sampling_ratio,
    "loader": loader_ratio,
    "checkpoint_blocked": checkpoint_ratio,
}
"""How many times as fast as the peer: more is better."""


def measured(name: str) -> float:
    """Returns a ratio of this machine."""
    with TemporaryDirectory(prefix="ddpm-bench-") as folder:
        turns = RATIOS[name](Path(folder))
    return round(min(turns.peer) / min(turns.ours), 3)


def compare(recorded: dict[str, float], measure: Callable[[str], float]) -> dict[str, float]:
    """Measures the recorded ratios, and a low one again; returns those that stay below their limit."""
    low = {}
    for name, before in recorded.items():
        tries = [measure(name)]
        if tries[0] < ALLOWED_SHARE * before:
            tries.append(measure(name))
        best = max(tries)
        if best < ALLOWED_SHARE * before:
            low[name] = best
        verdict = "SLOWER" if name in low else "as recorded"
        print(f"{name}: {' and '.join(f'{one:.3g}' for one in tries)} ×, recorded {before:.3g} ×: {verdict}")
    return low


def main() -> None:
    """Compares, or records; exits with 1 if a ratio is too low."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description="Ratios against recorded ones.")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name} for this kind of processor")
    options = parser.parse_args()
    recorded: dict[str, Any] = json.loads(RECORDED.read_text())
    kind = compute.best_precision()
    torch.set_num_threads(1)
    if options.record:
        there, ratios = machine(), {name: measured(name) for name in RATIOS}
        about = {"date": utc_now(), "cpu": there["cpu"], "cores": there["cores"], "torch": there["torch"]}
        RECORDED.write_text(json.dumps(recorded | {kind: about | {"ratios": ratios}}, indent=1) + "\n")
        return
    if kind not in recorded:
        print(f"{RECORDED.name} has no ratios of {kind}, so nothing is compared: record them here with --record")
        return
    before = recorded[kind]
    print(f"recorded on {before['date']}: {before['cpu']}, {before['cores']} cores, torch {before['torch']}")
    if low := compare(before["ratios"], measured):
        sys.exit(
            f"slower than recorded by more than {1 - ALLOWED_SHARE:.0%}: {', '.join(low)}. Find the change that did "
            "it, or record anew with `python -m benchmarks.check --record` and say why in the commit"
        )


if __name__ == "__main__":
    main()
