"""One training step: ours against the loop of diffusers' unconditional example at its defaults, on the same U-Net."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Figure, seconds, take_turns
from benchmarks.subject import (
    DATASET,
    HALF_WIDTH,
    PRESET,
    SIZE,
    TINY,
    compiled,
    diffusers_twin,
    forget_accelerator,
    pack_noise,
    write_noise,
)
from ddpm.training import train
from job.config import RunConfig, method
from job.data.reading.cache import open_cache
from job.data.reading.order import LoadedBatch
from job.plan import plan_run
from job.processes import compute
from job.processes.ranks import meet
from job.requests import TrainRequest
from job.stop import NEVER
from job.training.session import TrainingSession

AT_LEAST = 1.8
NO_SAVES = (
    *("checkpoint.every_epochs=9999", "checkpoint.every_minutes=9999", "checkpoint.keep_every_epochs=0"),
    "sample.every_epochs=0",
)
IMAGES = 1024


def measure(quick: bool) -> list[Figure]:
    """Times both loops step by step in turn, and the parts of a step."""
    precision = compute.best_precision()
    with TemporaryDirectory(prefix="ddpm-bench-") as name:
        pack_for_loops(Path(name), quick)
        ours = OurLoop(Path(name), quick, precision)
        peer = DiffusersLoop(ours.session.config, ours.session.state.model)
        turns = take_turns("training steps", ours.step, peer.step, 2 if quick else 5, 1 if quick else 2)
        ours.close()
    waits = [wait / step for wait, step in zip(ours.wait_seconds[-len(turns.ours) :], turns.ours, strict=True)]
    flop = ours.step_flop()
    ours_in = torch.bfloat16 if precision == "bf16" else torch.float32
    # Without instructions for it, a product in bf16 takes minutes.
    peak = {kind: matmul_flop_per_second(kind, quick) for kind in dict.fromkeys((torch.float32, ours_in))}
    our_peak = peak[ours_in]
    our_seconds, peer_seconds = median(turns.ours), median(turns.peer)
    batch_size, parameters = ours.session.batch_size, sum(p.numel() for p in ours.session.state.model.parameters())
    raw = {
        **turns.raw(),
        "batch_size_images": batch_size,
        "parameters": parameters,
        "precision": precision,
        "step_flop": flop,
        "matmul_peak_flop_per_second": {str(kind).removeprefix("torch."): value for kind, value in peak.items()},
        "our_share_of_peak": flop / our_seconds / our_peak,
        "peer_share_of_fp32_peak": flop / peer_seconds / peak[torch.float32],
    }
    return [
        Figure(
            "training_step_ratio",
            "training step: diffusers' example / ours, ×",
            turns.speedups,
            at_least=AT_LEAST if precision == "bf16" else None,
            beside=f"{parameters / 1e6:.1f} M parameters, batch {batch_size}: "
            f"{our_seconds:.3g} s in {precision}, peer {peer_seconds:.3g} s in fp32",
            raw=raw,
        ),
        Figure(
            "training_share_of_matmul_peak",
            "training step: FLOP/s over this machine's matmul peak",
            [flop / one / our_peak for one in turns.ours],
            beside=f"{flop / our_seconds / 1e9:.0f} of {our_peak / 1e9:.0f} GFLOP/s in {precision}; "
            f"peer {flop / peer_seconds / 1e9:.0f} of {peak[torch.float32] / 1e9:.0f} in fp32",
        ),
        Figure(
            "training_waits_for_data_ratio",
            "training step: share spent waiting for data",
            waits,
            at_most=0.01,
            beside=f"{median(ours.wait_seconds) * 1e6:.0f} µs of a step; "
            f"an infinitely fast loader would give {1 / (1 - median(waits)):.4f} × the speed",
        ),
    ]


def pack_for_loops(folder: Path, quick: bool) -> None:
    """Writes the dataset of `OurLoop` into a bucket in this folder."""
    write_noise(folder / "images", 32 if quick else IMAGES, SIZE)
    pack_noise(str(folder / "bucket"), folder / "images", SIZE)


class OurLoop:
    """Runs `ddpm.training.train` on the data of `pack_for_loops`, with the hooks of a real run; one step per call."""

    def __init__(
        self,
        folder: Path,
        quick: bool,
        precision: str,
        preset: str = PRESET,
        sets: tuple[str, ...] = HALF_WIDTH,
        exact: str = "null",
    ) -> None:
        bucket = str(folder / "bucket")
        sets = (*(TINY if quick else sets), *NO_SAVES, f"train.precision={precision}", f"train.exact={exact}")
        request = TrainRequest(DATASET, bucket=bucket, preset=preset, epochs=1000, sets=sets)
        plan = plan_run(request.check(), suited=compute.suited)
        forget_accelerator()
        cache = open_cache(plan.bucket, plan.index, 1 << 40, cache_dir=folder / "cache")
        # The run saves nothing, so the rows of the log have no destination.
        writer = SimpleNamespace(overdue=False, troubled=False, before_change=lambda: None)
        recorder: Any = SimpleNamespace(writer=writer, record=lambda row: None, show=lambda bar: None)
        ranks = meet(NEVER)
        state = method.initial_state(method.build_network(plan.config, ranks.device), plan.config)
        about: dict[str, Any] = {"plan": plan, "ranks": ranks, "state": state, "images": cache, "recorder": recorder}
        attempt: Any = SimpleNamespace(**about, held_out=None, restored=None, stop=NEVER)
        self.session = TrainingSession(attempt)
        self.threads = self.session.threads
        self.wait_seconds: list[float] = []
        self._batches = self._timed_batches()

    def _timed_batches(self) -> Iterator[LoadedBatch]:
        while True:
            start = time.perf_counter()
            batch = next(self.session.batches)
            self.wait_seconds.append(time.perf_counter() - start)
            yield batch

    def step(self) -> None:
        """Runs one whole step."""
        session, batch = self.session, islice(self._batches, 1)
        how = {"settings": session.settings, "accelerator": session.accelerator, "hooks": session.hooks}
        shared = {"slots": session.slots, "threads": self.threads}
        with self.threads.outside() if self.threads else nullcontext():
            train(session.state, session.network, batch, session.objective, **how, **shared)

    def step_flop(self) -> int:
        """Returns the floating-point operations of the network's forward and backward pass over one batch."""
        session = self.session
        shape = (session.batch_size, *session.config.image_shape)
        x, t = torch.randn(shape, device=session.device), torch.zeros(shape[0], device=session.device)
        with FlopCounterMode(display=False) as counter:
            session.state.model(x, t).sum().backward()
        session.state.model.zero_grad()
        return counter.get_total_flops()

    def close(self) -> None:
        """Ends the thread that reads images."""
        self.session.batches.close()


class DiffusersLoop:
    """Runs the step of diffusers' example of unconditional training, with EMA.

    By default as the example does: Accelerate in fp32, AdamW, cosine schedule, clipping at 1, `EMAModel`. At its best
    with `--mixed_precision bf16`, channels_last and `torch.compile`. Its images are ready in memory, so the comparison
    leaves its reading of images out.
    """

    def __init__(self, config: RunConfig, network: Any, best: bool = False) -> None:
        from accelerate import Accelerator
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        forget_accelerator()
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if best else "no")
        model = diffusers_twin(network, config)
        if best:
            model.to(memory_format=torch.channels_last)
        self._ema = EMAModel(
            model.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
            model_cls=type(model),
            model_config=model.config,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        self._noise_scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        images = torch.rand(max(IMAGES, config.train.batch_size), *config.image_shape) * 2 - 1
        loader = DataLoader(TensorDataset(images), batch_size=config.train.batch_size, shuffle=True, drop_last=True)
        rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
        self._model, self._optimizer, self._loader, self._rates = self._accelerator.prepare(
            model, optimizer, loader, rates
        )
        if best:
            compiled(self._model)
        self._ema.to(self._accelerator.device)
        self._batches = self._endless()

    def _endless(self) -> Iterator[Tensor]:
        while True:
            for (images,) in self._loader:
                yield images

    def step(self) -> None:
        """Runs one whole step, and reads the loss as the example does for its progress bar."""
        self._model.train()
        clean = next(self._batches)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
        noisy = self._noise_scheduler.add_noise(clean, noise, timesteps)
        with self._accelerator.accumulate(self._model):
            loss = F.mse_loss(self._model(noisy, timesteps).sample.float(), noise.float())
            self._accelerator.backward(loss)
            self._accelerator.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._rates.step()
            self._optimizer.zero_grad()
        self._ema.step(self._model.parameters())
        loss.detach().item()


def matmul_flop_per_second(dtype: torch.dtype, quick: bool) -> float:
    """Returns the best rate of several products of large square matrices: the limit of its GPU or CPU."""
    side = 256 if quick else 4096
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        # A GPU is done when a number of the product can be read.
        (a @ b)[0, 0].item()

    product()
    return 2 * side**3 / min(seconds(product) for _ in range(4))
