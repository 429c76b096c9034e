"""`make fake-gpu`: training steps and sampling on a fake `cuda:0`, with a CUDA build of PyTorch and without a GPU.

Fake tensors have a shape, a type and a device, and no values. An operation on two devices raises, and so does every
question for a value, for which a program would wait for the GPU. PyTorch's autograd wants a real device: here a step
has gradients of zeros. `docs/not-proven.md` says what remains open.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial, wraps
from itertools import cycle, product
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from ddpm import editing, training
from ddpm.catalogue import PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS
from ddpm.model import Model, Sampling, generate
from ddpm.samplers import Walk, from_noise
from ddpm.slots import Slots
from ddpm.state import learnt_parameters
from job.config import RunConfig, layered, method, parse_sets, validated
from job.exits import BadConfigError
from job.platform import usable_cores
from job.progress import Progress
from job.sampling.painter import model_of

DEVICE = torch.device("cuda:0")
SIZE, IMAGES, STEPS, MODES = 8, 2, 2, 5
"""Steps are those of training and, twice as many, of sampling; the modes are those of `walks`."""
_LEVELS = "model.channels=8 model.channel_mults=1,2 model.attention_sizes=4 model.layers_per_level=1"
_DIT = "model.width=8 model.depth=1 model.heads=2"
NETWORKS = {
    "unet": f"{_LEVELS} model.norm_groups=4 model.dropout=0.1",
    "unet as ADM": f"{_LEVELS} model.norm_groups=4 model.scale_shift=true model.head_channels=8",
    "edm2": f"{_LEVELS} model.head_channels=8 model.uncertainty=true",
    "dit": _DIT,
    "dit as today": f"{_DIT} model.rope=true model.qk_norm=true model.rms_norm=true",
    "dome": "",
}
OPTIONS = (
    "diffusion.draws=log_normal diffusion.stratified=true diffusion.offset_noise=0.1",
    "diffusion.variance=learned_range",
    """diffusion.self_conditioning=true model.num_classes=3 model.label_dropout=0.1 sample.guidance=2
    sample.guidance_rescale=0.5 data.augment=0.1 data.crop_scale=[0.5,1] train.micro_batch_size=1""",
    "diffusion.zero_terminal_snr=true diffusion.draws=uniform",
    "model.num_classes=3 model.gradient_checkpointing=true",
)
"""Further settings of an objective: a schedule with a prediction takes those that fit it, and weightings in turn."""


def objectives(network: str) -> Iterator[RunConfig]:
    """Yields the valid configurations of a network."""
    weightings = cycle(WEIGHTINGS)
    for schedule, prediction, options in product(SCHEDULES, PREDICTIONS, OPTIONS):
        sets = f"""{NETWORKS[network]} model.kind={network.split()[0]} diffusion.timesteps=40 train.batch_size={IMAGES}
            diffusion.schedule={schedule} diffusion.prediction={prediction} diffusion.weighting={next(weightings)}
            sample.steps={2 * STEPS} sample.grid=linspace {options}"""
        whole = {"data.size": SIZE, "data.channels": 3, "model.num_classes": 0, **parse_sets(sets.split())}
        with suppress(BadConfigError):
            yield validated(layered({}, whole))


class FakeGPU(FakeTensorMode):
    """Makes the tensors of a GPU fake; the host computes its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation on the host where nothing of it belongs to the GPU."""
        given = tree_leaves((args, kwargs or {}))
        if any(isinstance(one, FakeTensor) or one == DEVICE for one in given):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs or {})

    def may_turn_const(self, t: Tensor) -> bool:
        """Returns False: PyTorch would compute with tensors of one number, on the device."""
        return False


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Replaces the GPU meanwhile, and what needs a real one."""
    with ExitStack() as stack:
        # `to` replaces parameters, which fake ones do not allow: they are made on the device.
        stack.enter_context(mock.patch.object(method, "build_network", _on_device(method.build_network)))
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_, **__: module))
        stack.enter_context(mock.patch.object(torch.autograd, "grad", _zero_gradients))
        stack.enter_context(FakeGPU(allow_non_fake_inputs=True))
        yield


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any) -> Any:
        with DEVICE:
            return function(*args)

    return call


def _zero_gradients(loss: Tensor, parameters: list[Tensor], **_: Any) -> list[Tensor]:
    assert loss.device == DEVICE and not loss.shape
    return [torch.zeros_like(parameter) for parameter in parameters]


def learn(config: RunConfig, exact: bool) -> None:
    """Runs some steps of `ddpm.training.train`, with the gradient of all images at once or slot by slot."""
    settings, objective = method.settings_of(config), method.objective_of(config)
    labels = torch.zeros(IMAGES, dtype=torch.int64) if config.model.num_classes else None
    images = torch.zeros(IMAGES, 3, SIZE, SIZE, dtype=torch.uint8)
    batches = [SimpleNamespace(image_numbers=np.arange(IMAGES), images=images, labels=labels)] * STEPS
    with fake_gpu():
        network = method.build_network(config, DEVICE)
        state = method.initial_state(network, config)

        def backward(loss: Tensor) -> None:
            for parameter in learnt_parameters(network):
                parameter.grad = _zero_gradients(loss, [parameter])[0]

        accelerator = SimpleNamespace(num_processes=1, no_sync=lambda network: nullcontext(), backward=backward)
        hooks, slots = training.Hooks(lambda state: False), Slots(IMAGES, IMAGES) if exact else None
        training.train(state, network, batches, objective, settings, accelerator, hooks, slots)
    assert state.images_seen == STEPS * IMAGES
    where = {tensor.device for group in state.tensors().values() for tensor in group.values()}
    assert where == {DEVICE}, where


def walks() -> dict[str, Walk]:
    """Returns the ways from noise to images, by mode."""
    with DEVICE:
        image = torch.zeros(IMAGES, 3, SIZE, SIZE)
        unknown, weight = torch.zeros(SIZE, SIZE, dtype=torch.bool), torch.zeros(IMAGES)
    path = editing.resampled(2 * STEPS, jump=2, resamplings=2)
    return {
        "new images": from_noise,
        "inpaint": partial(editing.inpaint, image=image, unknown=unknown, path=path),
        "img2img": partial(editing.from_image, image=image, strength=0.5),
        "invert": partial(editing.inverted, image=image, strength=0.5),
        "interpolate": partial(editing.interpolate, other=lambda draw: image, weight=weight),
    }


def samplings(config: RunConfig) -> list[Sampling]:
    """Returns the settings of each sampler, with the options that take a draw or an estimate more."""
    variance = "learned_range" if config.diffusion.learns_variance else "fixed_small"
    options: list[dict[str, Any]] = [{"sampler": name} for name in SAMPLERS if name != "own"]
    options += [{"sampler": "ddpm", "variance": variance}, {"sampler": "ddim", "eta": 0.5}]
    options += [{"sampler": "heun", "churn": 1.0}]
    return [Sampling(**vars(method.sampling_of(config.sample)) | each) for each in options]


def draw(config: RunConfig, first: int, count: int) -> None:
    """Draws with some pairs of a sampler and a mode, from this number on."""
    with fake_gpu():
        model: Model = model_of(config, DEVICE)
        seeds = torch.arange(IMAGES, device=DEVICE)
        pairs = list(product(samplings(config), walks().values()))
        random.Random(0).shuffle(pairs)
        for number in range(first, first + count):
            sampling, walk = pairs[number % len(pairs)]
            x = generate(model.denoiser(seeds, sampling), model.process, sampling, model.noise_of(seeds), walk)
            assert (x.device, x.shape, x.dtype) == (DEVICE, (IMAGES, 3, SIZE, SIZE), torch.float32)
            assert model.pixels(x).device == DEVICE


def check(network: str, config: RunConfig, number: int, draws: int) -> int:
    """Trains a network with an objective, and draws with some pairs; returns the number of batches."""
    try:
        learn(config, exact=number % 2 == 0)
        draw(config, number * draws, draws)
    except Exception as error:
        raise RuntimeError(f"{network}, {config.diffusion}, {config.data}") from error
    return draws


def checks(network: str) -> list[partial[int]]:
    """Returns the checks of a network: every objective, and over them every pair of a sampler and a mode."""
    configs = list(objectives(network))
    draws = max(2, -(-len(samplings(configs[0])) * MODES // len(configs)))
    return [partial(check, network, config, number, draws) for number, config in enumerate(configs)]


def main() -> None:
    """Checks all configurations, on all cores, and names the first that fails."""
    parser = argparse.ArgumentParser(prog="make fake-gpu", description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"{', '.join(NETWORKS)}; default: all")
    options = parser.parse_args()
    if torch.version.cuda is None:
        sys.exit(f"PyTorch {torch.__version__} is not a CUDA build: `make fake-gpu` installs one")
    found, drawn = [one for network in options.networks or NETWORKS for one in checks(network)], 0
    with (
        get_context("spawn").Pool(usable_cores(), torch.set_num_threads, (1,)) as pool,
        Progress("fake GPU", total=len(found), unit="configurations") as bar,
    ):
        for done, draws in enumerate(pool.imap(partial.__call__, found), 1):
            drawn += draws
            bar.update(done)
    print(f"{len(found)} configurations, {STEPS * len(found)} training steps, {drawn} batches on {DEVICE}: passed")


if __name__ == "__main__":
    main()
