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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks import computing, loading, peers, saving
from benchmarks.measuring import in_turn, machine, timed
from benchmarks.subject import HALF_WIDTH, pack_noise, run_config
from job.coordination.sealed import utc_now
from job.processes import compute
from job.store import open_store

RECORDED = Path(__file__).with_name("recorded.json")
ALLOWED_SHARE = 0.7
"""The smallest share of a recorded ratio that passes."""
IMAGES = 4000
Took = dict[str, list[float]]
"""The seconds of each turn of `ours` and of a `peer`."""


def training_ratio(folder: Path) -> Took:
    """Times a training step and that of diffusers' example."""
    ours, peer = computing.both_loops(folder, compute.best_precision(), quick=False)
    took = in_turn("training steps", timed(time.process_time, peer=peer.step, ours=ours.step), turns=3)
    ours.close()
    return took


def sampling_ratio(folder: Path) -> Took:
    """Times our painter and diffusers' DDIM pipeline."""
    return computing.samples_in_turn(HALF_WIDTH, 4, 8, compute.best_precision(), turns=4, clock=time.process_time)


def loader_ratio(folder: Path) -> Took:
    """Times an epoch of our warm stream and one of webdataset."""
    bucket, cache = str(folder / "bucket"), folder / "cache"
    pack_noise(bucket, folder / "images", IMAGES, loading.SIZE)
    readers = loading.readers(bucket, cache)

    def in_this_process() -> DataLoader[Any]:
        return DataLoader(readers["webdataset"]().dataset, peers.BATCH_SIZE_IMAGES)  # type: ignore[attr-defined]

    epochs = {"peer": in_this_process, "ours": readers["ours"]}
    works = {name: partial(loading.one_epoch, batches, IMAGES) for name, batches in epochs.items()}
    return in_turn("reading images", timed(time.process_time, **works), turns=5)


def checkpoint_ratio(folder: Path) -> Took:
    """Times the part of a save for which training waits, and a plain copy."""
    config = run_config(HALF_WIDTH)
    state = saving.new_state(config, torch.device("cpu"))
    return saving.saves(open_store(str(folder / "run")), config, state, turns=7)


RATIOS: dict[str, Callable[[Path], Took]] = {
    "training_step": training_ratio,
    "sampling": sampling_ratio,
    "loader": loader_ratio,
    "checkpoint_blocked": checkpoint_ratio,
}
"""How many times as fast as the peer: more is better."""


def measured(name: str) -> float:
    """Returns a ratio of this machine."""
    with TemporaryDirectory(prefix="ddpm-bench-") as folder:
        took = RATIOS[name](Path(folder))
    return round(min(took["peer"]) / min(took["ours"]), 3)


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
