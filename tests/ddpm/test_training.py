"""The training loop: equal bits for any processes and threads, frozen parts, steps that are left, what is minimised."""

from __future__ import annotations

import hashlib
import math
import random
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from mpmath import mp, mpf
from torch import Tensor, multiprocessing, nn

from ddpm import training
from ddpm.augment import Augmentation
from ddpm.catalogue import NETWORKS, Diffusion, Train
from ddpm.ema import EMA, Exponential, PowerFunction, Stored, reconstruct
from ddpm.networks.layers import Dropout, dropout_of
from ddpm.objective import Condition, Objective
from ddpm.optimizer import Adam, Muon, learning_rate_at
from ddpm.process import Prediction, make_process
from ddpm.slots import Slots, kernels_of, subtrees
from ddpm.state import TrainState, create_state, loss_row
from ddpm.threads import Threads, group_of
from tests.ddpm.known import TOLD, build, normal

BATCH_IMAGES, SIZE, CLASSES = 16, 8, 3
WORLDS = (1, 2, 3, 4, 5, 7, 8)
CASES: list[dict[str, Any]] = [
    *({"kind": kind, "network": {"dropout": dropout}} for kind, dropout in product(TOLD, (0.0, 0.1))),
    {"kind": "unet", "network": {"dropout": 0.1}, "micro_batch_size": 1, "memory_format": torch.channels_last},
    {"kind": "unet", "network": {"dropout": 0.1, "gradient_checkpointing": True}, "precision": torch.bfloat16},
    {"kind": "unet", "optimizer": "muon"},
]
CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=1, backward=Tensor.backward)
ON = training.Hooks(lambda state: False)


class Slow(nn.Module):
    """A network under autocast in any thread, each of which may be late by another time, as on a busy machine."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, seconds: float) -> None:
        super().__init__()
        self.network, self.dtype, self.seconds = network, dtype, seconds

    def forward(self, *inputs: object) -> Tensor:
        time.sleep(self.seconds * random.random())
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.network(*inputs)


def objective_and_settings(kind: str, **options: Any) -> tuple[Objective, training.LoopSettings]:
    """The objective and the settings of a training with all that can be drawn."""
    schedule, prediction = ("edm", "edm") if kind == "edm2" else ("cosine", "v")
    diffusion = Diffusion(schedule=schedule, prediction=prediction, self_conditioning=kind != "dit")
    return Objective(make_process(diffusion), Prediction(prediction), diffusion), training.LoopSettings(
        train=Train(**{"batch_size": BATCH_IMAGES, "learning_rate": 0.01, **options}),
        network=NETWORKS[kind](num_classes=CLASSES, label_dropout=0.1),
        averages={"ema": Exponential(0.9, "none"), "ema-0.1": PowerFunction(0.1)},
        augmentation=Augmentation(True, (0.7, 1.0), 0.3 * (kind != "dit")),
    )


def learnt(
    slots: Slots | None,
    *,
    kind: str,
    steps: int = 2,
    threads: Threads | None = None,
    precision: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    seconds: float = 0.0,
    hooks: training.Hooks = ON,
    network: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Returns weights, moments, averages and sums of the losses after some steps."""
    objective, settings = objective_and_settings(kind, **options)
    told = {"self_conditioning": objective.diffusion.self_conditioning}
    told |= {"augmentation_labels": settings.augmentation.labels, **({"uncertainty": True} if kind == "edm2" else {})}
    model = build(kind, image_size=SIZE, num_classes=CLASSES, null_class=True, **told, **(network or {}))
    state = create_state(model.to(memory_format=memory_format), settings.train, settings.averages)
    places, images = list(slots.places if slots else range(BATCH_IMAGES)), np.random.default_rng(0)
    batches = [
        SimpleNamespace(
            image_numbers=np.arange(BATCH_IMAGES * step, BATCH_IMAGES * (step + 1))[places],
            images=torch.from_numpy(images.integers(0, 256, (BATCH_IMAGES, 3, SIZE, SIZE), dtype=np.uint8))[places],
            labels=(torch.arange(BATCH_IMAGES) % CLASSES)[places],
        )
        for step in range(steps)
    ]
    slow = Slow(model, precision, seconds)
    training.train(state, slow, batches, objective, settings, CPU, hooks, slots, threads)
    return tensors_of(state) | {"losses": state.log.reduced()}


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    groups = state.tensors().items()
    return {f"{group}.{name}": value.clone() for group, tensors in groups for name, value in tensors.items()}


def learn_in_groups(rank: int, folder: Path) -> None:
    """Learns every case in groups of each size, the first processes of all; writes down a hash of each."""
    for world_size in WORLDS[sum(rank >= count for count in WORLDS) :]:
        if world_size > 1:
            dist.init_process_group("gloo", f"file://{folder}/meet-{world_size}", rank=rank, world_size=world_size)
        slots = Slots(8, BATCH_IMAGES, rank, world_size)
        threads = Threads(2 if world_size == 1 else 1)
        for number, case in enumerate(CASES):
            with threads.outside():
                tensors = learnt(slots, threads=threads, **case)
            content = b"".join(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
            (folder / f"{number}-{world_size}-{rank}").write_text(hashlib.sha256(content).hexdigest())
        if world_size > 1:
            dist.destroy_process_group()


@pytest.mark.slow
def test_any_number_of_processes_learns_the_same_bits(tmp_path: Path) -> None:
    multiprocessing.spawn(learn_in_groups, (tmp_path,), max(WORLDS))
    found = [{path.read_text() for path in tmp_path.glob(f"{number}-*")} for number in range(len(CASES))]
    assert [len(hashes) for hashes in found] == [1] * len(CASES)
    assert len(set.union(*found)) == len(CASES)
    assert len(list(tmp_path.glob("*-*-*"))) == len(CASES) * sum(WORLDS)


@pytest.mark.parametrize("kind", TOLD)
def test_slots_add_up_to_the_whole_gradient(kind: str) -> None:
    """PyTorch's backward pass over all images at once is the judge."""
    whole = learnt(None, kind=kind)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        of_slots = learnt(Slots(5, BATCH_IMAGES), kind=kind, threads=Threads(2), memory_format=memory_format)
        for name, value in whole.items():
            if not name.startswith("optimizer"):
                # Adam divides by the size of a gradient: where that is rounding alone, so is the step.
                torch.testing.assert_close(of_slots[name], value, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_late_threads_change_no_bit(micro_batch_size: int | None) -> None:
    case = {"kind": "unet", "micro_batch_size": micro_batch_size}
    slots = Slots(3, BATCH_IMAGES)
    with Threads(1).outside():
        alone = learnt(slots, **case)
    assert alone["losses"][1, 0] == 2 * BATCH_IMAGES
    for count in (1, 3):
        late = learnt(slots, threads=Threads(count), seconds=0.02 * (count > 1), **case)
        assert all(torch.equal(value, late[name]) for name, value in alone.items())


FROZEN = [
    ("unet", ("down", "time_embedding", "conv_out"), None),
    ("unet", ("conv", "mid"), Slots(3, BATCH_IMAGES)),
    ("edm2", ("encoder", "conv", "class", "unc"), None),
    ("dit", ("blocks",), None),
]


@pytest.mark.parametrize(("kind", "freeze", "slots"), FROZEN)
def test_frozen_parts_keep_every_bit(kind: str, freeze: tuple[str, ...], slots: Slots | None) -> None:
    """No step, decay, normalisation or average changes them, they have no moments, and all others learn."""
    before, after = (learnt(slots, kind=kind, steps=steps, weight_decay=0.1, freeze=freeze) for steps in (0, 2))
    names = {name.removeprefix("model.") for name in before if name.startswith("model.")}
    frozen = {name for name in names if name.startswith(freeze)}
    constant = {name for name in names if name.endswith(("frequencies", "phases"))}
    for group in ("model", "ema", "ema-0.1"):
        equal = {name for name in names if torch.equal(before[f"model.{name}"], after[f"{group}.{name}"])}
        assert frozen and equal == frozen | constant, group
    moments = [name.partition(".")[2] for name in after if name.startswith("optimizer")]
    assert {name.partition(".")[2] for name in moments} == names - frozen


def test_a_step_that_is_left_changes_nothing() -> None:
    """A checkpoint of that moment is that of the step before."""
    states: list[dict[str, Tensor]] = []

    def note(state: TrainState) -> bool:
        states.append(tensors_of(state))
        return False

    hooks = training.Hooks(note, should_abandon=lambda: len(states) == 2)
    left = learnt(Slots(1, BATCH_IMAGES), kind="edm2", steps=3, hooks=hooks, micro_batch_size=8)
    assert len(states) == 2
    for name, tensor in states[-1].items():
        assert torch.equal(left[name], tensor), name


def test_learnt_uncertainty_divides_the_error() -> None:
    """Equation 21 by hand for one image; at its minimum u is the logarithm of the error, which stays as it is."""
    objective, settings = objective_and_settings("edm2", batch_size=1, freeze=("gain_out",))
    images = (normal(0, (1, 3, SIZE, SIZE)) * 50 + 128).clamp(0, 255).byte()
    again = SimpleNamespace(image_numbers=np.arange(1), images=images, labels=torch.tensor([1]))
    told = {"num_classes": CLASSES, "null_class": True, "self_conditioning": True, "augmentation_labels": 9}
    with_u, without = (build("edm2", image_size=SIZE, uncertainty=has, **told) for has in (True, False))
    part, t = with_u.uncertainty, float(objective.draw(0, torch.arange(1), 1)[0])
    weight, f, phi = (each.detach().double().numpy() for each in (part.linear.weight[0], part.frequencies, part.phases))
    u = weight @ (math.sqrt(2) * np.cos(2 * math.pi * (t * f + phi))) / np.linalg.norm(weight)
    assert abs(u) > 0.1
    logged, minimised = [], []
    for network, steps in ((with_u, 60), (without, 1)):
        # The output stays zero, and with it the error.
        nn.init.zeros_(network.gain_out)
        losses: list[float] = []

        def backward(loss: Tensor, losses: list[float] = losses) -> None:
            losses.append(loss.item())
            loss.backward()

        state = create_state(network, settings.train, settings.averages)
        accelerator = SimpleNamespace(num_processes=1, backward=backward)
        training.train(state, network, [again] * steps, objective, settings, accelerator, ON)
        logged.append(loss_row(state.log.reduced())["loss"])
        minimised.append(losses)
    error = logged[0]
    assert minimised[0][0] == pytest.approx(error / math.exp(u) + u, rel=1e-3)
    assert minimised[0][-1] == pytest.approx(1 + math.log(error), abs=1e-3)
    assert [logged[1], *minimised[1]] == [pytest.approx(error, rel=1e-5)] * 2


def test_dropout_depends_on_the_images_and_the_layer() -> None:
    model = build("unet", dropout=0.5)
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    ones = torch.ones(200, 200)
    masks = []
    for seed, first_image in ((0, 0), (0, 16), (1, 0)):
        with dropout_of(seed, first_image):
            masks += [layer(ones) for layer in layers]
            again = [layer(ones) for layer in layers]
            assert all(map(torch.equal, again, masks[-len(layers) :]))
    for mask in masks:
        assert mask.unique().tolist() == [0.0, 2.0]
        # The standard deviation is 0.005.
        assert abs(mask.mean() - 1) < 0.025
    agree = [(a == b).double().mean() for i, a in enumerate(masks) for b in masks[:i]]
    assert all(abs(share - 0.5) < 0.02 for share in agree)


def test_processes_share_slots_and_images() -> None:
    for count, batch_size, world_size in product((1, 5, 6, 8, 13), (13, 16, 100), (1, 2, 3, 5)):
        if world_size > count:
            continue
        ranks = [Slots(count, batch_size, rank, world_size) for rank in range(world_size)]
        assert [slot for slots in ranks for slot in slots.own] == list(range(count))
        assert [place for slots in ranks for place in slots.places] == list(range(batch_size))
        assert max(len(slots.own) for slots in ranks) - min(len(slots.own) for slots in ranks) <= 1
        for slots in ranks:
            parts = slots.parts()
            assert [i for part in parts for i in range(len(slots.places))[part]] == list(range(len(slots.places)))
            # A slot holds the same images whoever holds it.
            starts = [slots.places[part.start] for part in parts]
            assert starts == [batch_size * slot // count for slot in slots.own]
    with pytest.raises(ValueError, match="8 slots: use 9 to 16"):
        Slots(8, 16, world_size=9)


def test_few_sums_cross_the_wire() -> None:
    assert subtrees((0, 8), range(3, 8)) == [(3, 4), (4, 8)]


def test_the_fingerprint_of_kernels_depends_on_no_threads_and_on_the_precision():
    usual, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((kernels_of(False), kernels_of(True)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(usual)
    assert found == [found[0]] * 3 and found[0][0] != found[0][1]


def test_shared_network_gives_the_same_answers() -> None:
    network, threads = build("unet", num_classes=3).eval(), Threads(2)
    x, t, labels = torch.randn(5, 3, 16, 16), torch.arange(5.0), torch.arange(5) % 3
    shared = threads.sharing(network, lambda: torch.autocast("cpu", enabled=False), 2)
    for rows in (slice(0, 5), slice(0, 1)):
        answer = shared(x[rows], t[rows], Condition(labels[rows]))
        assert not answer.requires_grad
        torch.testing.assert_close(answer, network(x[rows], t[rows], Condition(labels[rows])).detach())
    with torch.inference_mode():
        assert shared(x, t, Condition(labels)).is_inference()


def test_threads_compute_alone_and_in_order() -> None:
    usual, parts = torch.get_num_threads(), [slice(3, 5), slice(5, 8), slice(8, 9)]
    for each in (1, 2):
        threads = Threads(2, each)
        found = list(threads.map(lambda part: (part, torch.get_num_threads()), parts))
        assert found == [(part, each) for part in parts]
        with threads.outside():
            assert torch.get_num_threads() == each
        assert torch.get_num_threads() == usual
    with pytest.raises(ZeroDivisionError):
        list(threads.map(lambda part: 1 // (part.start - 5), parts))


def test_groups_are_small_and_an_even_number() -> None:
    assert [group_of(images) for images in (1, 2, 8, 10, 16, 20, 32, 40, 64)] == [1, 1, 4, 5, 8, 5, 8, 7, 8]
    assert max(map(group_of, range(1, 1000))) == 8


# --- steps, the learning rate and the averages of the weights, against other libraries and formulas


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", [Adam, Muon])
def test_steps_are_pytorchs(kind: type[Adam], weight_decay: float) -> None:
    """Adam's are equal; Muon's are so within bf16, in which PyTorch's own computes, and of matrices alone."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 50), nn.Conv2d(8, 24, 3))
    theirs = {name: nn.Parameter(p.detach().clone().flatten(min(p.ndim - 1, 1))) for name, p in ours.named_parameters()}
    turned = {name for name in theirs if kind is Muon and name.endswith("weight")}
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    of_adam = torch.optim.AdamW if weight_decay else torch.optim.Adam
    peers = [of_adam([p for name, p in theirs.items() if name not in turned], fused=True, **options)]
    if turned:
        matrices = [theirs[name] for name in turned]
        peers.append(torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    optimizer = kind(ours.named_parameters(), Train(adam_betas=(0.8, 0.95), adam_eps=1e-6, weight_decay=weight_decay))
    assert optimizer.exp_avg_sq.keys() == theirs.keys() - turned
    for step in range(5):
        rate = 1e-2 / (step + 1)
        for name, parameter in ours.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            theirs[name].grad = parameter.grad.clone().view_as(theirs[name])
        optimizer.step(rate)
        for peer in peers:
            peer.param_groups[0]["lr"] = rate
            peer.step()
        for name, parameter in ours.named_parameters():
            # A step has a size of about the rate, and bf16 has eight bits.
            bound = 4e-4 if name in turned else 0
            torch.testing.assert_close(parameter.view_as(theirs[name]), theirs[name], rtol=0, atol=bound)


def test_learning_rate_follows_images_seen() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    peer = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=20)
    train = Train(24, None, 2e-4, 4 * 24, "cosine", 20 * 24)
    for step in range(25):
        # Theirs begins with a step at a learning rate of zero.
        theirs = peer.get_last_lr()[0] if step >= 4 else 2e-4 * (step + 1) / 4
        if step <= 20:
            assert learning_rate_at(train, 24 * step) == pytest.approx(theirs, abs=1e-18), step
        optimizer.step()
        peer.step()
    assert learning_rate_at(train, 24 * 21) == learning_rate_at(train, 24 * 20) == 0
    train = Train(24, None, 2e-4, 48, "inverse_root", 24 * 4)
    found = [learning_rate_at(train, 24 * step) / 2e-4 for step in (0, 1, 4, 16, 36)]
    assert found == pytest.approx([0.5, 1, 1, 1 / 2, 1 / 3])


def test_decay_warms_up_with_batches_seen() -> None:
    assert Exponential(0.9999, warmup="none").decay_at(0, 128) == 0.9999
    for images_seen, expected in {0: 0.1, 64: 1.5 / 10.5, 128: 2 / 11, 128 * 90: 0.91, 128 * 10**6: 0.9999}.items():
        found = Exponential(0.9999, warmup="ratio").decay_at(images_seen, 128)
        assert found == pytest.approx(expected), images_seen


def test_other_warm_ups_are_published() -> None:
    for inv_gamma, power in ((1.0, 2 / 3), (7.0, 0.9)):
        theirs = EMAModel([], decay=0.995, use_ema_warmup=True, inv_gamma=inv_gamma, power=power)
        ours = Exponential(0.995, "power", inv_gamma, power)
        for n in (1, 2, 3, 10, 500, 10**6):
            assert ours.decay_at(24 * n, 24) == pytest.approx(theirs.get_decay(n), rel=1e-12), n
    # A half-life of 500,000 images, and of 5 % of the images before this batch until these are 10 million.
    for images_seen in (512, 1024, 51_200, 5_000_192, 10_000_384, 200_000_000):
        half_life = min(500_000, 0.05 * (images_seen - 512))
        expected = 0.5 ** (512 / half_life) if half_life else 0.0
        found = Exponential(0.5 ** (512 / 500_000), "edm").decay_at(images_seen, 512)
        assert found == pytest.approx(expected, rel=1e-12), images_seen


def test_power_functions_have_their_width() -> None:
    """The standard deviation of a density γ τ^γ, by its moments in 50 digits; and the two γ that the paper names."""
    assert [PowerFunction(std).gamma for std in (0.05, 0.1)] == pytest.approx([16.97, 6.94], abs=5e-3)
    with mp.workdps(50):
        for std in (0.001, 0.05, 0.13, 0.28):
            gamma = mpf(PowerFunction(std).gamma)
            mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
            assert float(mp.sqrt(square - mean**2)) == pytest.approx(std, rel=1e-7), std


def profiles(std: float, steps: int) -> np.ndarray:
    """Row n: what the weights after each step count in the average after step n, by the recurrence; [steps, steps]."""
    rows = np.zeros((steps, steps))
    for step in range(steps):
        decay = PowerFunction(std).decay_at(24 * (step + 1), 24)
        rows[step] = decay * rows[step - 1]
        rows[step, step] = 1 - decay
    return rows


def test_averages_add_up_to_others() -> None:
    """By the profiles themselves, step by step, where `reconstruct` integrates."""
    total, stds = 600, (0.05, 0.1)
    kept = {std: profiles(std, total) for std in stds}
    for std in (0.04, 0.05, 0.07, 0.15, 0.2):
        wanted = profiles(std, total)[-1]
        for every, bound in ((20, 0.03), (150, 0.3)):
            ends = [(std, step) for std in stds for step in range(every, total + 1, every)]
            terms = np.stack([kept[std][step - 1] for std, step in ends])
            factors, error = reconstruct([Stored(std, 24 * step) for std, step in ends], Stored(std, 24 * total))
            found = np.linalg.norm(factors @ terms - wanted) / np.linalg.norm(wanted)
            assert error == pytest.approx(found, rel=0.05, abs=1e-7), (std, every)
            assert error < bound, (std, every)
            # No factors that add up to one come nearer.
            assert factors.sum() == pytest.approx(1, abs=1e-12)
            heavy = np.vstack([terms.T, np.full(len(ends), 1e3)])
            best = np.linalg.lstsq(heavy, np.append(wanted, 1e3))[0]
            nearest = np.linalg.norm(best @ terms - wanted) / np.linalg.norm(wanted)
            assert found == pytest.approx(nearest, rel=0.02, abs=1e-6), (std, every)


def test_average_follows_the_recurrence() -> None:
    """In float32 for any weights: in bfloat16 a step of 1e-4 of the way is lost, as 1 + 1e-4 is 1."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6)).to(dtype)
        ema = EMA(model)
        expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        for decay in (0.1, 0.5, 0.9, *[0.9999] * 10, 0.0, 0.9):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            ema.update(model, decay)
            for name, parameter in model.named_parameters():
                expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
            assert ema.shadow.keys() == expected.keys()
            for name, average in ema.shadow.items():
                assert average.dtype == torch.float32 and not average.requires_grad
                torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)
        target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6)).to(dtype, memory_format=torch.channels_last)
        ema.copy_to(target)
        assert target[0].weight.is_contiguous(memory_format=torch.channels_last)
        for name, parameter in target.named_parameters():
            assert parameter.dtype == dtype and parameter.requires_grad
            assert torch.equal(parameter, ema.shadow[name].to(dtype))
            # It is a copy.
            nn.init.zeros_(parameter)
            assert ema.shadow[name].any()


def test_update_never_waits_for_the_device() -> None:
    """On the meta device any look at a value raises."""
    model = nn.Linear(3, 3, device="meta")
    ema = EMA(model)
    ema.update(model, 0.99)
    assert ema.shadow["weight"].device.type == "meta"
