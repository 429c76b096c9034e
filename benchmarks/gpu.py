"""The parts of `benchmarks/gpu.sh`: the speed of a GPU against diffusers' example, and equal bits."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Figure, seconds
from benchmarks.peers import DiffusersLoop, compiled, diffusers_sampler, diffusers_twin
from benchmarks.saving import megabytes_of, new_state, saves, writing
from benchmarks.subject import DATASET, TINY, OurLoop, pack_noise, painter_of, run_config
from ddpm.model import Sampling
from job.config import RunConfig
from job.processes import compute
from job.runs.checkpoints import list_checkpoints, load_manifest, restore
from job.store import Store, open_store

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
PEERS = {"default": 2.0, "best": 1.2} if find_spec("diffusers") else {}
"""How diffusers is set up, and how many times as fast ours has to be."""
AT_LEAST_UTILISATION = 0.4


def training(folder: Path, tiny: bool) -> list[Figure]:
    """Times steps of the preset `celeba` at 64 pixels, eager and compiled, and those of diffusers' example."""
    pack_noise(str(folder / "bucket"), folder / "images", 16 if tiny else 1024, SIZE // 2 if tiny else SIZE)
    precision, steps = compute.best_precision(), 1 if tiny else 10
    figures, rates, flop = list[Figure](), dict[str, list[float]](), 0
    for kind in ("eager", "compiled"):
        sets = (*(CELEBA_TINY if tiny else ()), f"train.compile={str(kind == 'compiled').lower()}")
        ours = OurLoop(folder, precision, "celeba", sets)
        flop = flop or step_flop(ours)
        batch_size, config = ours.session.batch_size, ours.session.config
        first_seconds = seconds(lambda ours=ours: finished(ours.step))
        rates[kind] = [batch_size / one for one in step_seconds(ours.step, steps)]
        figures.append(Figure(f"training_first_step_{kind}_seconds", f"first step, {kind}, s", [first_seconds]))
        network = ours.session.state.model
        ours.close()
    best = max(("eager", "compiled"), key=lambda kind: median(rates[kind]))
    for kind, at_least in PEERS.items():
        peer = DiffusersLoop(config, network, best=kind == "best")
        finished(peer.step)
        rates[kind] = [batch_size / one for one in step_seconds(peer.step, steps)]
        ratios = [ours / theirs for ours, theirs in zip(rates[best], rates[kind], strict=True)]
        title = f"training step: ours, {best} / diffusers' example, {kind}, ×"
        figures.append(Figure(f"training_{kind}_ratio", title, ratios, at_least))
    rate, source = peak_flop_per_second(tiny)
    used = [images / batch_size * flop / rate for images in rates[best]]
    title = f"training: share of {rate / 1e12:.3g} TFLOP/s ({source}) in the network's forward and backward pass"
    raw = {"images_per_second": rates, "step_flop": flop, "batch_size_images": batch_size, "precision": precision}
    return [*figures, Figure("training_utilisation", title, used, AT_LEAST_UTILISATION, raw=raw)]


def sampling(folder: Path, tiny: bool) -> list[Figure]:
    """Times `ddpm sample` for the network of `celeba`, and diffusers' DDIM pipeline at default and best."""
    steps, batch_size = (2, 2) if tiny else (20, 64)
    painter, way = painter_of(celeba(tiny), compute.best_precision()), Sampling("ddim", steps, "leading")
    ours = step_seconds(lambda: painter.sample_together(range(batch_size), way, batch_size, "our turn"), 1)
    title = f"sampling, {steps} steps: images/s"
    figures = [Figure("sampling_images_per_second", title, [batch_size / one for one in ours])]
    for kind, at_least in PEERS.items():
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


def checkpoint(folder: Path, tiny: bool) -> list[Figure]:
    """Times the part of a save that delays training; changes all weights behind its copy, which must not show."""
    config, run = celeba(tiny), open_store(str(folder / "changed"))
    state = new_state(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    took = saves(open_store(str(folder / "timed")), config, state, 2 if tiny else 5)
    expected = {group: {name: each.clone() for name, each in named.items()} for group, named in state.items()}
    with writing(run, config, state) as writer:
        writer.save(0, [])
        writer.before_change()
        for named in state.values():
            torch._foreach_add_(list(named.values()), 1.0)
        writer.wait()
    restore(run, list_checkpoints(run)[0], state)
    same = [torch.equal(each, state[group][name]) for group, named in expected.items() for name, each in named.items()]
    unchanged = "share of saved tensors with the values of their moment"
    blocked = f"checkpoint of {megabytes_of(state):.0f} MB: training waits, s"
    return [
        Figure("checkpoint_blocked_seconds", blocked, took["ours"]),
        Figure("checkpoint_copy_seconds", "plain copy into page-locked buffers, s", took["peer"]),
        Figure("checkpoint_unchanged", unchanged, [sum(same) / len(same)], 1),
    ]


def equality(folder: Path, tiny: bool) -> list[Figure]:
    """Trains twice with `train.exact=true`: undisturbed, and killed and resumed, by two processes where possible.

    NCCL refuses two processes on one GPU: there both runs have one.
    """
    bucket, images, epochs = str(folder / "bucket"), 32 if tiny else 512, 3
    pack_noise(bucket, folder / "images", images)
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


def celeba(tiny: bool) -> RunConfig:
    """Returns the preset `celeba`, or a network that is quickly tried."""
    return run_config(CELEBA_TINY if tiny else (), "celeba", SIZE // 2 if tiny else SIZE)


def finished(work: Callable[[], object]) -> None:
    """Does something, and waits for the GPU."""
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_seconds(step: Callable[[], object], steps: int) -> list[float]:
    """Returns the seconds of a step, as means over several of them, after a warm-up."""

    def several() -> None:
        for _ in range(steps):
            step()

    finished(several)
    return [seconds(lambda: finished(several)) / steps for _ in range(SAMPLES)]


def step_flop(loop: OurLoop) -> int:
    """Returns the floating-point operations of the network's forward and backward pass over one batch."""
    session = loop.session
    shape = (session.batch_size, *session.config.image_shape)
    x, t = torch.randn(shape, device=session.device), torch.zeros(shape[0], device=session.device)
    with FlopCounterMode(display=False) as counter:
        session.state.model(x, t).sum().backward()
    session.state.model.zero_grad()
    return counter.get_total_flops()


def peak_flop_per_second(tiny: bool) -> tuple[float, str]:
    """Returns the rate of dense products, and its source: the data sheet of a known card, or the best of several."""
    is_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if is_gpu else "CPU"
    for part, rate in PEAK_FLOP_PER_SECOND.items():
        if re.search(rf"\b{part}\b", name):
            return rate, f"data sheet of {part}"
    # A CPU without instructions for bf16 would take minutes.
    dtype, side = torch.bfloat16 if compute.best_precision() == "bf16" else torch.float32, 256 if tiny else 4096
    a, b = (torch.randn(side, side, device="cuda" if is_gpu else "cpu").to(dtype) for _ in range(2))
    # A GPU is done when a number of the product can be read; the first product warms up.
    spent = [seconds(lambda: (a @ b)[0, 0].item()) for _ in range(5)][1:]
    return 2 * side**3 / min(spent), "measured product"
