"""The magnitude-preserving network: what it promises, and its forward pass written down again."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm import catalogue
from ddpm.augment import Augmentation
from ddpm.catalogue import Diffusion, Train
from ddpm.networks import edm2
from ddpm.networks.edm2 import EDM2, magnitude
from ddpm.objective import Condition, Objective
from ddpm.process import Prediction, VarianceExploding
from ddpm.slots import Slots
from ddpm.state import TrainState, create_state, loss_row
from ddpm.training import Hooks, LoopSettings, train

ALL = {"num_classes": 5, "augmentation_labels": 2}
OBJECTIVE = Objective(VarianceExploding(), Prediction("edm", 0.5), Diffusion(draws="log_normal"))
AS_THEY_ARE = Augmentation(flip=False, crop_scale=(1.0, 1.0), probability=0.0)


def small(**changes: object) -> EDM2:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "in_channels": 3, "out_channels": 3, "channels": 16, "channel_mults": (1, 2)}
    return EDM2(**{**sizes, "attention_sizes": (8,), "layers_per_level": 1, "head_channels": 8, **changes})


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    condition = Condition(torch.tensor([0, 4, 2, 2])[:batch], augmentation=torch.randn(batch, 2, generator=generator))
    t = torch.tensor([-1.55, -0.3, 0.2, 1.1])[:batch]
    return torch.randn(batch, 3, 16, 16, generator=generator), t, condition


def open_gains(network: EDM2) -> EDM2:
    """Of the output and of the embeddings, which a fresh network has closed."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gain" in name:
                parameter.fill_(0.7)
    return network


def test_training_brings_the_weights_back_once() -> None:
    """A second time, in a step that is repeated, changes no bit; sampling changes none."""
    network, (x, t, condition) = open_gains(small(**ALL)), inputs()
    weights = {name: module.weight for name, module in network.named_modules() if isinstance(module, edm2.MPConv)}
    assert len(weights) == 48
    with torch.no_grad():
        for i, weight in enumerate(weights.values()):
            weight.mul_(2.0 ** (i % 5 - 2) * 1.1)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    network.eval()
    expected = network(x, t, condition)
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())

    network.train().normalise()
    output = network(x, t, condition)
    for name, weight in weights.items():
        assert (magnitude(weight) - 1).abs().max() < 1e-5, name
    # What is stored plays no part in what is computed but for its direction.
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-3)
    after = {name: parameter.clone() for name, parameter in network.named_parameters()}
    network.normalise()
    again = network(x, t, condition)
    assert torch.equal(again, output)
    assert all(torch.equal(parameter, after[name]) for name, parameter in network.named_parameters())
    others = after.keys() - {f"{name}.weight" for name in weights}
    assert all(torch.equal(after[name], before[name]) for name in others)

    # No gradient points along the weights, whose length says nothing (equation 51).
    again.square().mean().backward()
    assert {name for name, parameter in network.named_parameters() if parameter.grad is None} == {
        "frequencies",
        "phases",
    }
    for name, weight in weights.items():
        along = (weight.grad * weight).flatten(1).sum(dim=1).norm()
        assert along < 1e-3 * weight.grad.norm() * weight[0].norm(), name


def written_down(network: EDM2, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Figure 21 from the weights alone, in float64, of `small` with `ALL`."""
    weights = {name: parameter.double() for name, parameter in network.named_parameters()}

    def unit(v: Tensor, dim: int) -> Tensor:
        return v / (v.square().mean(dim, keepdim=True).sqrt() + 1e-4)

    def layer(name: str, v: Tensor) -> Tensor:
        w = weights[f"{name}.weight"]
        w = (unit(w.flatten(1), 1) / w[0].numel() ** 0.5).view_as(w)
        return v @ w.T if w.ndim == 2 else F.conv2d(v, w, padding=w.shape[-1] // 2)

    def silu(v: Tensor) -> Tensor:
        return v * torch.sigmoid(v) / 0.596

    def block(name: str, v: Tensor, encoder: bool = False) -> Tensor:
        shortcut = f"{name}.conv_shortcut.weight" in weights
        if encoder:
            v = unit(layer(f"{name}.conv_shortcut", v) if shortcut else v, 1)
        h = layer(f"{name}.conv_1", silu(v))
        h = h * (1 + weights[f"{name}.gain"] * layer(f"{name}.dense", embedding))[:, :, None, None]
        h = layer(f"{name}.conv_2", silu(h))
        if not encoder and shortcut:
            v = layer(f"{name}.conv_shortcut", v)
        v = (0.7 * v + 0.3 * h) / 0.58**0.5
        if f"{name}.to_qkv.weight" in weights:
            B, C, H, W = v.shape
            qkv = layer(f"{name}.to_qkv", v).view(B, 3, C // 8, 8, H * W)
            q, k, value = unit(qkv, 3).unbind(1)
            attended = value @ (q.transpose(2, 3) @ k / 8**0.5).softmax(3).transpose(2, 3)
            v = (0.7 * v + 0.3 * layer(f"{name}.to_out", attended.reshape(B, C, H, W))) / 0.58**0.5
        return v

    def cat(a: Tensor, b: Tensor) -> Tensor:
        total = a.shape[1] + b.shape[1]
        parts = [part * (total / 2 / part.shape[1]) ** 0.5 for part in (a, b)]
        return torch.cat(parts, dim=1)

    x, t = x.double(), t.double()
    fourier = 2**0.5 * torch.cos(2 * math.pi * (t[:, None] * weights["frequencies"] + weights["phases"]))
    one_hot = F.one_hot(condition.labels, 5).double() * 5**0.5
    embedding = (layer("time_embedding", fourier) + layer("class_embedding", one_hot)) / 2**0.5
    embedding = silu(embedding + layer("augmentation_embedding", condition.augmentation.double()))
    skips = [layer("conv_in", F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0))]
    skips.append(block("encoder.0", skips[-1], encoder=True))
    skips.append(block("encoder.1", F.avg_pool2d(skips[-1], 2), encoder=True))
    skips.append(block("encoder.2", skips[-1], encoder=True))
    h = block("middle.1", block("middle.0", skips[-1]))
    h = block("decoder.0", cat(h, skips.pop()))
    h = block("decoder.1", cat(h, skips.pop()))
    h = block("decoder.2", h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    h = block("decoder.3", cat(h, skips.pop()))
    h = block("decoder.4", cat(h, skips.pop()))
    return layer("conv_out", h) * weights["gain_out"]


def test_forward_is_what_the_paper_says() -> None:
    network, (x, t, condition) = open_gains(small(**ALL)).eval(), inputs()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.normal_()
        expected = written_down(network, x, t, condition)
        assert expected.std() > 0.3
        torch.testing.assert_close(network(x, t, condition).double(), expected, rtol=0, atol=2e-5)


def test_a_step_that_is_left_changes_nothing() -> None:
    """A checkpoint of that moment is that of the step before."""
    settings = LoopSettings(Train(batch_size=2, micro_batch_size=1), catalogue.EDM2Config(), {}, AS_THEY_ARE)
    batch = SimpleNamespace(
        image_numbers=np.arange(2), images=torch.zeros(2, 3, 16, 16, dtype=torch.uint8), labels=None
    )
    network, states = small(), []
    state = create_state(network, settings.train, settings.averages)

    def note(state: TrainState) -> bool:
        states.append({name: tensor.clone() for name, tensor in state.tensors()["model"].items()})
        return False

    hooks = Hooks(note, should_abandon=lambda: len(states) == 2)
    train(state, network, [batch] * 3, OBJECTIVE, settings, SimpleNamespace(num_processes=1), hooks, Slots(1, 2))
    assert len(states) == 2
    for name, tensor in state.tensors()["model"].items():
        assert torch.equal(tensor, states[-1][name]), name


def test_learnt_uncertainty_divides_the_error() -> None:
    """Equation 21 by hand for one image; at its minimum u is the logarithm of the error, which stays as it is."""
    train_settings = Train(batch_size=1, learning_rate=0.01, seed=3)
    settings = LoopSettings(train_settings, catalogue.EDM2Config(), {}, AS_THEY_ARE)
    images = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    again = SimpleNamespace(image_numbers=np.arange(1), images=images, labels=None)

    def trained(network: EDM2, steps: int) -> tuple[float, list[float]]:
        """Returns the mean error in the log, and the losses that were differentiated."""
        # The output stays zero, and with it the error.
        network.gain_out.requires_grad_(False)
        losses: list[float] = []

        def backward(loss: Tensor) -> None:
            losses.append(loss.item())
            loss.backward()

        accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, backward=backward)
        state = create_state(network, settings.train, settings.averages)
        train(state, network, [again] * steps, OBJECTIVE, settings, accelerator, Hooks(lambda state: False))
        return loss_row(state.log.reduced())["loss"], losses

    network = small(uncertainty=True)
    part = network.uncertainty
    t = float(OBJECTIVE.draw(3, torch.arange(1), 1)[0])
    weight, f, phi = (each.detach().double().numpy() for each in (part.linear.weight[0], part.frequencies, part.phases))
    features = math.sqrt(2) * np.cos(2 * math.pi * (t * f + phi))
    u = weight @ features / np.linalg.norm(weight)
    assert abs(u) > 0.1
    error, losses = trained(network, 60)
    assert losses[0] == pytest.approx(error / math.exp(u) + u, rel=1e-3)
    assert losses[-1] == pytest.approx(1 + math.log(error), abs=1e-3)
    plain, errors = trained(small(), 1)
    assert plain == pytest.approx(error, rel=1e-5)
    assert errors == [pytest.approx(error, rel=1e-5)]
