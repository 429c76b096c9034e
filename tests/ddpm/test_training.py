"""The training loop: equal bits for any processes and threads, frozen parts, steps that are left, what is minimised."""

from __future__ import annotations

import gc
import hashlib
import math
import random
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from ddpm import precision as precision_module
from ddpm import training
from ddpm.augment import Augmentation
from ddpm.catalogue import NETWORKS, Conditioning, Consistency, Diffusion, Train
from ddpm.consistency import TEACHER, ConsistencyObjective
from ddpm.ema import EMA, Exponential, HostEMA, PowerFunction
from ddpm.networks.layers import Dropout, dropout_of
from ddpm.objective import Condition, Objective
from ddpm.precision import autocast
from ddpm.process import Prediction, make_process
from ddpm.slots import Slots, kernels_of, subtrees
from ddpm.state import TrainState, create_state, loss_row
from ddpm.threads import Threads, group_of
from tests.ddpm.known import TOLD, build, normal, randomise
from tests.little_memory import LittleMemory

BATCH_IMAGES, SIZE, CLASSES = 16, 8, 3
UNTOLD = Conditioning()
WORLDS, DIVIDED = (1, 2, 3, 4, 5, 7, 8), (2, 3, 4)
CASES: list[dict[str, Any]] = [
    *({"kind": kind, "network": {"dropout": dropout}} for kind, dropout in product(TOLD, (0.0, 0.1))),
    {"kind": "unet", "network": {"dropout": 0.1}, "micro_batch_size": 1, "memory_format": torch.channels_last},
    {"kind": "unet", "network": {"dropout": 0.1, "gradient_checkpointing": True}, "precision": "bf16"},
    {"kind": "unet", "network": {"dropout": 0.1}, "precision": "fp16", "steps": 6},
    {"kind": "unet", "optimizer": "muon"},
    {"kind": "unet", "optimizer": "adamw8bit", "average": HostEMA},
    {"kind": "unet", "freeze": ("down", "mid", "up", "time_embedding", "conv_norm", "conv_out", "class", "augm")},
    {"kind": "unet", "conditioning": Conditioning("mask:brush", noise=0.5, channels=4), "micro_batch_size": 1},
    {"kind": "edm2", "conditioning": Conditioning(noise=0.5, channels=1, vector=2)},
    {"kind": "dit", "conditioning": Conditioning("jpeg:30", channels=3, vector=2)},
    {"kind": "unet", "network": {"dropout": 0.1}, "conditioning": Conditioning("downscale:2", channels=3, vector=2)}
    | {"guidance": 2.0},
]
CPU = SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, backward=Tensor.backward, no_sync=lambda network: nullcontext()
)
ON = training.Hooks(lambda state: False)
OVERFLOWING = 2.0**30, 2
"""The first loss scale, at which the gradients overflow, and the steps to a larger one."""


class Slow(nn.Module):
    """A network under autocast in any thread, each of which may be late by another time, as on a busy machine."""

    def __init__(self, network: nn.Module, precision: str, seconds: float) -> None:
        super().__init__()
        self.network, self.precision, self.seconds = network, precision, seconds

    def forward(self, *inputs: object) -> Tensor:
        time.sleep(self.seconds * random.random())
        with autocast(self.precision, "cpu"):
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
    precision: str = "fp32",
    memory_format: torch.memory_format = torch.contiguous_format,
    seconds: float = 0.0,
    hooks: training.Hooks = ON,
    network: dict[str, Any] | None = None,
    average: type[EMA] = EMA,
    conditioning: Conditioning = UNTOLD,
    guidance: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """Returns weights, moments, averages and sums of the losses after some steps."""
    objective, settings = objective_and_settings(kind, precision=precision, **options)
    settings = replace(settings, conditioning=conditioning)
    if guidance != 1:
        parts = objective.process, objective.prediction, replace(objective.diffusion, self_conditioning=False)
        objective = ConsistencyObjective(
            *parts, tuning=Consistency(BATCH_IMAGES, guidance=guidance), null_class=CLASSES
        )
    told = {"self_conditioning": objective.diffusion.self_conditioning}
    told |= {"augmentation_labels": settings.augmentation.labels, **({"uncertainty": True} if kind == "edm2" else {})}
    told |= {"condition_channels": conditioning.channels, "vector_size": conditioning.vector}
    told |= {"condition_noise": conditioning.noise > 0}
    model = build(kind, image_size=SIZE, num_classes=CLASSES, null_class=True, **told, **(network or {})).to(
        memory_format=memory_format
    )
    place = {"rank": slots.rank, "world_size": slots.world_size} if slots else {}
    averages = [*settings.averages, *([TEACHER] if guidance != 1 else [])]
    state = create_state(model, settings.train, averages, average, **place)
    if isinstance(objective, ConsistencyObjective):
        teacher = deepcopy(model).eval()
        randomise(teacher, seed=1)
        state.load_average(TEACHER, teacher)
        objective = replace(objective, teacher=Slow(teacher, precision, seconds))
    batches = batches_of(steps, list(slots.places if slots else range(BATCH_IMAGES)), conditioning)
    slow = Slow(model, precision, seconds)
    training.train(state, slow, batches, objective, settings, CPU, hooks, slots, threads)
    return tensors_of(state) | {"losses": state.log.reduced()}


def batches_of(steps: int, places: list[int], conditioning: Conditioning = UNTOLD) -> list[Any]:
    """The images at some places of the first batches."""
    images = np.random.default_rng(0)
    return [
        SimpleNamespace(
            image_numbers=np.arange(BATCH_IMAGES * step, BATCH_IMAGES * (step + 1))[places],
            images=torch.from_numpy(images.integers(0, 256, (BATCH_IMAGES, 3, SIZE, SIZE), dtype=np.uint8))[places],
            labels=(torch.arange(BATCH_IMAGES) % CLASSES)[places],
            conditions=torch.from_numpy(images.integers(0, 256, (BATCH_IMAGES, 1, SIZE, SIZE), dtype=np.uint8))[places]
            if conditioning.channels and not conditioning.derive
            else None,
            vectors=torch.from_numpy(images.standard_normal((BATCH_IMAGES, 2), dtype=np.float32))[places]
            if conditioning.vector
            else None,
        )
        for step in range(steps)
    ]


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    groups = {group: dict(named) for group, named in state.tensors().items()}
    of_others = {key for key, tensor in state.divided().items() if tensor.is_meta}
    for group, name in of_others:
        groups[group][name] = torch.zeros(groups[group][name].shape, dtype=groups[group][name].dtype)
    sent = state.send()
    if state.owners.rank == 0:
        state.receive(groups)
    for work in sent:
        work.wait()
    for group, name in state.divided():
        dist.broadcast(read := groups[group][name].contiguous().clone(), 0)
        groups[group][name] = read if (group, name) in of_others else groups[group][name]
    return {f"{group}.{name}": value.clone() for group, named in groups.items() for name, value in named.items()}


def held_bytes() -> str:
    """The bytes of all tensors of this process."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and not each.is_meta]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return str(sum(storages.values()))


def learn_in_groups(rank: int, folder: Path) -> None:
    """Learns every case in groups of each size, the first processes of all; writes down a hash of each."""
    precision_module.INITIAL_SCALE, precision_module.GROWTH_STEPS = OVERFLOWING
    for world_size in WORLDS[sum(rank >= count for count in WORLDS) :]:
        if world_size > 1:
            dist.init_process_group("gloo", f"file://{folder}/meet-{world_size}", rank=rank, world_size=world_size)
        slots = Slots(8, BATCH_IMAGES, rank, world_size)
        threads = Threads(2 if world_size == 1 else 1)
        for (number, case), is_divided in product(enumerate(CASES), (False, True)):
            if is_divided and world_size not in DIVIDED:
                continue
            name = f"{world_size}-{rank}-{is_divided}"
            measured = training.Hooks(lambda state, name=name: not (folder / f"held-{name}").write_text(held_bytes()))
            with threads.outside():
                hooks = ON if number else measured
                tensors = learnt(slots, threads=threads, shard_optimizer=is_divided, hooks=hooks, **case)
            content = b"".join(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
            (folder / f"{number}-{name}").write_text(hashlib.sha256(content).hexdigest())
            del tensors
        if world_size > 1:
            dist.destroy_process_group()


@pytest.mark.slow
def test_any_number_of_processes_learns_the_same_bits(tmp_path: Path) -> None:
    """Also where they divide moments and averages; each holds its share then, up to one parameter."""
    multiprocessing.spawn(learn_in_groups, (tmp_path,), max(WORLDS))
    found = [{path.read_text() for path in tmp_path.glob(f"{number}-*")} for number in range(len(CASES))]
    assert [len(hashes) for hashes in found] == [1] * len(CASES)
    assert len(set.union(*found)) == len(CASES)
    assert len(list(tmp_path.glob("[0-9]*"))) == len(CASES) * (sum(WORLDS) + sum(DIVIDED))
    sizes = [each.nbytes for name, each in learnt(None, kind="unet", steps=0).items() if name.startswith("model.")]
    whole = int((tmp_path / "held-1-0-False").read_text())
    for world_size in DIVIDED:
        saved = [whole - int(path.read_text()) for path in tmp_path.glob(f"held-{world_size}-*-True")]
        # Two moments and two averages; the images of a process take less than 8 kB.
        expected = 4 * sum(sizes) * (1 - 1 / world_size)
        assert saved == pytest.approx([expected] * world_size, abs=4 * max(sizes) + 8000)


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


class LateAverage(HostEMA):
    """An average whose thread begins when the next step has long had its gradient."""

    def _add(self, *how: Any) -> None:
        time.sleep(0.3)
        super()._add(*how)


@pytest.mark.parametrize("kind", ["unet", "edm2"])
def test_late_averages_change_no_bit(kind: str) -> None:
    """`edm2` changes its weights after its averages, too."""
    steps: list[dict[str, Tensor]] = []
    for average in (EMA, LateAverage):
        hooks = training.Hooks(lambda state: steps.append(tensors_of(state)) or state.images_seen > 2 * BATCH_IMAGES)
        steps.append(learnt(None, kind=kind, steps=5, average=average, hooks=hooks))
        steps.append(learnt(None, kind=kind, steps=3, average=average))
    assert len(steps) == 10
    for now, later in zip(steps[:5], steps[5:], strict=True):
        assert all(torch.equal(value, later[name]) for name, value in now.items())


@pytest.mark.parametrize(
    ("kind", "freeze", "slots"),
    [
        ("unet", ("down", "time_embedding", "conv_out"), None),
        ("unet", ("conv", "mid"), Slots(3, BATCH_IMAGES)),
        ("edm2", ("encoder", "conv", "class", "unc"), None),
        ("dit", ("blocks",), None),
    ],
)
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


@pytest.mark.parametrize("share", [0.95, 0.7])
def test_a_step_without_memory_runs_again_in_halves(share: float) -> None:
    """Nothing of the failed pass remains; the results are those of enough memory, up to rounding."""
    with LittleMemory() as enough:
        expected = learnt(None, kind="unet", steps=3)
    sizes = list[int]()
    with LittleMemory(share * enough.peak_bytes) as little:
        found = learnt(
            None,
            kind="unet",
            steps=3,
            hooks=training.Hooks(lambda state: False, halved=lambda images: not sizes.append(images)),
        )
    assert sizes == [8] and little.refused_in
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", [None, Slots(1, BATCH_IMAGES)])
def test_the_loss_scale_is_that_of_pytorch(slots: Slots | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So are the weights: a step that overflows is left out by both, and a resumed Adam counts only the others."""
    for name, value in zip(("INITIAL_SCALE", "GROWTH_STEPS"), OVERFLOWING, strict=True):
        monkeypatch.setattr(precision_module, name, value)
    objective, settings = objective_and_settings("dit", precision="fp16", adam_eps=1e-3)
    told = {"num_classes": CLASSES, "null_class": True}
    ours, theirs = (build("dit", image_size=SIZE, **told).train() for _ in range(2))
    state, found, steps = create_state(ours, settings.train, settings.averages), list[list[float]](), list[float]()

    def after_step(state: TrainState) -> bool:
        assert state.loss_scale
        found.append(state.loss_scale.values.tolist())
        steps.append(next(iter(state.optimizer.steps.values())).item())
        state.resume_at(state.images_seen, BATCH_IMAGES)
        assert steps[-1] == next(iter(state.optimizer.steps.values())).item()
        return False

    batches, hooks = batches_of(40, [*range(BATCH_IMAGES)]), training.Hooks(after_step)
    training.train(state, Slow(ours, "fp16", 0), batches, objective, settings, CPU, hooks, slots)

    initial_scale, growth_steps = OVERFLOWING
    scaler = torch.amp.GradScaler("cpu", init_scale=initial_scale, growth_interval=growth_steps)
    adam, scales = torch.optim.AdamW(theirs.parameters(), 0.01, eps=1e-3, weight_decay=0, fused=True), []
    for step, batch in enumerate(batches):
        whole = [slice(0, BATCH_IMAGES)]
        drawn = training.draw(batch, step * BATCH_IMAGES, whole, objective, settings, torch.device("cpu"))
        adam.zero_grad()
        scaler.scale(drawn.losses(Slow(theirs, "fp16", 0), objective, settings).mean()).backward()
        scaler.unscale_(adam)
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        scaler.step(adam)
        scaler.update()
        scales.append(scaler.get_scale())
    assert [factor for factor, *_ in found] == scales
    halved = sum(now < before for before, now in pairwise([initial_scale, *scales]))
    assert found[-1][2] == halved and steps[-1] == 40 - halved and state.images_seen == 40 * BATCH_IMAGES
    # It overflows at first, and again after it grew.
    assert 5 < halved < 30 and any(a < b > c for a, b, c in zip(scales, scales[1:], scales[2:], strict=False))
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_a_step_that_overflows_changes_the_loss_scale_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "INITIAL_SCALE", 2.0**60)
    before, after = (learnt(Slots(1, BATCH_IMAGES), kind="edm2", steps=n, precision="fp16") for n in (0, 3))
    assert before.pop("optimizer.loss_scale").tolist() == [2.0**60, 0, 0]
    assert after.pop("optimizer.loss_scale").tolist() == [2.0**57, 0, 3]
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == set()


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
        found.append(tuple(map(kernels_of, ("fp32", "bf16", "fp16"))))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(usual)
    assert found == [found[0]] * 3 and len(set(found[0])) == 3


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
