"""`benchmarks/gpu.sh`: the speed of a GPU against diffusers' example, and equal bits; each part has its own process.

A part has a limit of time. One that fails, takes too long or lacks a package is recorded as such, and the others go on.
The report is written after each part.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.measuring import Figure
    from job.store import Store

ROOT = Path(__file__).parents[1]
LIMITS_SECONDS = {"training": 180, "sampling": 80, "loader": 80, "checkpoint": 70, "equality": 120}
"""By part: nine minutes in all."""
PEAK_FLOP_PER_SECOND = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bf16 products by words of the card's name, the first that fit (NVIDIA's data sheets; half of "sparse")."""
SIZE, SAMPLES = 64, 3
CELEBA_TINY = ("model.channels=32", "model.channel_mults=1,2", "train.batch_size=4", "train.warmup_images=0")
AT_LEAST_DEFAULT, AT_LEAST_BEST, AT_LEAST_UTILISATION = 2.0, 1.2, 0.4


def training(folder: Path, tiny: bool) -> list[Figure]:
    """Times steps of the preset `celeba` at 64 pixels, eager and compiled, and those of diffusers' example."""
    from benchmarks.measuring import Figure, seconds
    from benchmarks.subject import pack_noise, write_noise
    from benchmarks.training_step import DiffusersLoop, OurLoop, matmul_flop_per_second
    from job.processes import compute

    size = SIZE // 2 if tiny else SIZE
    write_noise(folder / "images", 16 if tiny else 1024, size)
    pack_noise(str(folder / "bucket"), folder / "images", size)
    precision, steps = compute.best_precision(), 1 if tiny else 10
    figures, rates, flop = list[Figure](), dict[str, list[float]](), 0
    for kind in ("eager", "compiled"):
        sets = (*(CELEBA_TINY if tiny else ()), f"train.compile={str(kind == 'compiled').lower()}")
        ours = OurLoop(folder, False, precision, preset="celeba", sets=sets)
        flop = flop or ours.step_flop()
        batch_size, config = ours.session.batch_size, ours.session.config
        first_seconds = seconds(lambda ours=ours: finished(ours.step))
        rates[kind] = [batch_size / one for one in step_seconds(ours.step, steps)]
        figures.append(Figure(f"training_first_step_{kind}_seconds", f"first step, {kind}, s", [first_seconds]))
        network = ours.session.state.model
        ours.close()
    best = max(("eager", "compiled"), key=lambda kind: median(rates[kind]))
    for kind, at_least in (("default", AT_LEAST_DEFAULT), ("best", AT_LEAST_BEST)):
        if find_spec("diffusers"):
            peer = DiffusersLoop(config, network, best=kind == "best")
            finished(peer.step)
            rates[kind] = [batch_size / one for one in step_seconds(peer.step, steps)]
            ratios = [ours / theirs for ours, theirs in zip(rates[best], rates[kind], strict=True)]
            title = f"training step: ours, {best} / diffusers' example, {kind}, ×"
            figures.append(Figure(f"training_{kind}_ratio", title, ratios, at_least))
    rate, peak = peak_flop_per_second(lambda: matmul_flop_per_second(bf16(), tiny))
    used = [images / batch_size * flop for images in rates[best]]
    title = f"training: share of {rate / 1e12:.3g} TFLOP/s ({peak}) that the network's forward and backward pass takes"
    raw = {"images_per_second": rates, "step_flop": flop, "batch_size_images": batch_size, "precision": precision}
    return [
        *figures,
        Figure("training_utilisation", title, [one / rate for one in used], AT_LEAST_UTILISATION, raw=raw),
    ]


def sampling(folder: Path, tiny: bool) -> list[Figure]:
    """Times `ddpm sample` for the network of `celeba`, and diffusers' DDIM pipeline at default and best."""
    import torch

    from benchmarks.measuring import Figure
    from benchmarks.sampling import diffusers_sampler, painter_of
    from benchmarks.subject import compiled, diffusers_twin
    from ddpm.model import Sampling
    from job.config import draft, parse_sets
    from job.processes import compute

    sets = {"data.size": SIZE // 2 if tiny else SIZE, "data.channels": 3, **parse_sets(CELEBA_TINY if tiny else ())}
    steps, batch_size = (2, 2) if tiny else (20, 64)
    painter = painter_of(draft("celeba", sets), compute.best_precision())
    way = Sampling("ddim", steps, "leading")
    ours = step_seconds(lambda: painter.sample_together(range(batch_size), way, batch_size, "our turn"), 1)
    figures = [
        Figure("sampling_images_per_second", f"sampling, {steps} steps: images/s", [batch_size / s for s in ours])
    ]
    for kind, at_least in (("default", AT_LEAST_DEFAULT), ("best", AT_LEAST_BEST)):
        if find_spec("diffusers"):
            twin = diffusers_twin(painter.network, painter.config).to(painter.device)
            if kind == "best":
                # Its pipeline makes NumPy arrays, which have no bf16.
                half = torch.float16 if torch.cuda.is_available() else torch.float32
                compiled(twin.to(half, memory_format=torch.channels_last))
            peer = step_seconds(diffusers_sampler(twin, steps, batch_size), 1)
            ratios = [theirs / one for one, theirs in zip(ours, peer, strict=True)]
            title = f"sampling: ours / diffusers' DDIM pipeline, {kind}, ×"
            figures.append(Figure(f"sampling_{kind}_ratio", title, ratios, at_least))
    return figures


def loader(folder: Path, tiny: bool) -> list[Figure]:
    """Reads a packed dataset of 64 pixels from the local disk, as `python -m benchmarks loader`."""
    from benchmarks import loader

    return loader.measure(tiny)


def checkpoint(folder: Path, tiny: bool) -> list[Figure]:
    """Times the part of a save that delays training; changes all weights behind its copy, which must not show."""
    import torch

    from benchmarks.checkpoint import saves, writing
    from benchmarks.measuring import Figure
    from job.config import draft, method, parse_sets
    from job.runs.checkpoints import list_checkpoints, restore
    from job.store import open_store

    sets = {"data.size": SIZE // 2 if tiny else SIZE, "data.channels": 3, **parse_sets(CELEBA_TINY if tiny else ())}
    config, device = draft("celeba", sets), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = method.initial_state(method.build_network(config, device), config).tensors()
    turns, committed = saves(open_store(str(folder / "timed")), config, state, 2 if tiny else 5)
    run = open_store(str(folder / "changed"))
    expected = {group: {name: each.clone() for name, each in named.items()} for group, named in state.items()}
    with writing(run, config, state) as writer:
        writer.save(0, [])
        writer.before_change()
        for named in state.values():
            torch._foreach_add_(list(named.values()), 1.0)
        writer.wait()
    restore(run, list_checkpoints(run)[0], state)
    same = [torch.equal(each, state[group][name]) for group, named in expected.items() for name, each in named.items()]
    megabytes = sum(each.nbytes for named in state.values() for each in named.values()) / 1e6
    return [
        Figure("checkpoint_blocked_seconds", f"checkpoint of {megabytes:.0f} MB: training waits, s", turns.ours),
        Figure("checkpoint_copy_seconds", "plain copy into page-locked buffers, s", turns.peer),
        Figure("checkpoint_committed_seconds", "from save to commit, folder, s", committed),
        Figure(
            "checkpoint_unchanged", "share of saved tensors with the values of their moment", [sum(same) / len(same)], 1
        ),
    ]


def equality(folder: Path, tiny: bool) -> list[Figure]:
    """Trains twice with `train.exact=true`: undisturbed, and killed and resumed, by two processes where possible.

    NCCL refuses two processes on one GPU: there both runs have one.
    """
    import torch

    from benchmarks.measuring import Figure
    from benchmarks.subject import DATASET, TINY, pack_noise, write_noise
    from job.runs.checkpoints import list_checkpoints, load_manifest
    from job.store import open_store

    bucket, images, epochs = str(folder / "bucket"), 32 if tiny else 512, 3
    write_noise(folder / "images", images, 32)
    pack_noise(bucket, folder / "images", 32)
    processes = 2 if not torch.cuda.is_available() or torch.cuda.device_count() > 1 else 1
    sets = (*TINY[:-1], "train.exact=true", "train.slots=2", "train.compile=false", "train.batch_size=16")
    sets += ("sample.every_epochs=0", "sample.images=1", "sample.steps=2", "sample.grid=trailing")

    def command(run: str, processes: int) -> list[str]:
        words = ["--dataset", DATASET, "--bucket", bucket, "--run", run, "--preset", "celeba", "--epochs", str(epochs)]
        words += [word for each in sets for word in ("--set", each)]
        return [sys.executable, "-m", "job", "train", *words, "--processes", str(processes)]

    def last_hashes(run: Store) -> dict[str, str]:
        files = load_manifest(run, max(list_checkpoints(run))).files
        return {file.name: file.sha256 for file in files}

    subprocess.run(command("whole", 1), check=True)
    killed = open_store(bucket).sub("runs/killed")
    attempt = subprocess.Popen(command("killed", 1))
    while attempt.poll() is None and not list_checkpoints(killed):
        time.sleep(0.02)
    attempt.kill()
    attempt.wait()
    left = max((ref.images_seen for ref in list_checkpoints(killed)), default=0)
    if not 0 < left < epochs * images:
        sys.exit(f"not interrupted: the attempt had saved {left} of {epochs * images} images when it ended")
    subprocess.run(command("killed", processes), check=True)
    whole, resumed = last_hashes(open_store(bucket).sub("runs/whole")), last_hashes(killed)
    title = f"equal bits: killed after {left} of {epochs * images} images and resumed on {processes} / undisturbed on 1"
    return [Figure("equality", title, [float(whole == resumed)], 1, raw={"processes": processes, "hashes": whole})]


PARTS: dict[str, Callable[[Path, bool], list[Figure]]] = {
    part.__name__: part for part in (training, sampling, loader, checkpoint, equality)
}


def missing_packages() -> list[str]:
    """Returns the names of the project's dependencies, and of theirs, that are not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    left, missing, known = list(project["dependencies"]), list[str](), set[str]()
    while left:
        name = re.split(r"[^\w.-]", left.pop())[0]
        if name not in known:
            known.add(name)
            try:
                left += [one for one in requires(name) or () if ";" not in one]
            except PackageNotFoundError:
                missing.append(name)
    return sorted(missing)


def bf16() -> torch.dtype:
    """Returns the type of the best products here; a CPU without instructions for bf16 would take minutes."""
    import torch

    from job.processes import compute

    return torch.bfloat16 if compute.best_precision() == "bf16" else torch.float32


def finished(work: Callable[[], object]) -> None:
    """Does something, and waits for the GPU."""
    import torch

    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_seconds(step: Callable[[], object], steps: int) -> list[float]:
    """Returns the seconds of a step, as means over several of them, after a warm-up."""
    from benchmarks.measuring import seconds

    def several() -> None:
        for _ in range(steps):
            step()

    finished(several)
    return [seconds(lambda: finished(several)) / steps for _ in range(SAMPLES)]


def peak_flop_per_second(measured: Callable[[], float]) -> tuple[float, str]:
    """Returns the rate of dense products, and its source: the data sheet of a known card, or a measurement."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for part, rate in PEAK_FLOP_PER_SECOND.items():
        if re.search(rf"\b{part}\b", name):
            return rate, f"data sheet of {part}"
    return measured(), "measured product"


def run_part(part: str, tiny: bool, limit_seconds: float) -> dict[str, Any]:
    """Runs one part in a process of its own, and returns its entry of the report."""
    began = time.monotonic()
    with TemporaryDirectory(prefix="ddpm-gpu-") as folder:
        words = [sys.executable, "-m", "benchmarks.gpu", "--inside", folder, *(["--tiny"] if tiny else []), part]
        # Its own session: a part that takes too long ends with all its processes.
        process = subprocess.Popen(words, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, start_new_session=True)
        entry: dict[str, Any] = {"state": "done"}
        try:
            _, errors = process.communicate(timeout=limit_seconds)
            if process.returncode:
                entry = {"state": "failed", "exit_code": process.returncode, "why": errors[-2000:]}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, errors = process.communicate()
            entry = {"state": "out of time", "limit_seconds": limit_seconds, "why": errors[-2000:]}
        figures = Path(folder) / "figures.json"
        return entry | {
            "seconds": round(time.monotonic() - began, 1),
            "figures": json.loads(figures.read_text()) if figures.exists() else {},
        }


def main() -> None:
    """Runs the parts one after the other, and writes the report after each."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and no goals: shows that everything runs")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), metavar="FILE", help="default: gpu.json")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}: use {', '.join(PARTS)}")
    if missing := missing_packages():
        sys.exit(f"missing packages: {' '.join(missing)}; the head of benchmarks/gpu.sh says how to bring them")
    if options.inside:
        found = PARTS[options.parts[0]](options.inside, options.tiny)
        figures = {figure.key: figure.to_dict() for figure in found}
        (options.inside / "figures.json").write_text(json.dumps(figures))
        return
    from benchmarks.measuring import machine
    from job.coordination.sealed import utc_now

    skipped = [] if find_spec("diffusers") else ["diffusers is not installed: no peers in training and sampling"]
    report: dict[str, Any] = {"date": utc_now(), "machine": machine() | gpus(), "skipped": skipped, "parts": {}}
    for part in options.parts or PARTS:
        print(f"measuring: {part}, at most {LIMITS_SECONDS[part]} s", file=sys.stderr)
        report["parts"][part] = entry = run_part(part, options.tiny, LIMITS_SECONDS[part])
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        for figure in entry["figures"].values():
            goal = {True: ", met", False: ", MISSED", None: ""}[None if options.tiny else figure["met"]]
            print(f"{figure['what']}: {figure['value']:.4g}{goal}")
        print(f"{part}: {entry['state']} in {entry['seconds']} s")
    print("\n".join([*skipped, f"written: {options.output}"]))
    if any(entry["state"] != "done" for entry in report["parts"].values()):
        sys.exit(1)


def gpus() -> dict[str, Any]:
    """Returns the facts of the GPUs."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"gpus": names, "cuda": torch.version.cuda}


if __name__ == "__main__":
    main()
