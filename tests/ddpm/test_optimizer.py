"""Steps of the optimisers, the learning rate and the averages of the weights, against other libraries and formulas."""

import numpy as np
import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from mpmath import mp, mpf
from torch import nn
from torchao.optim.subclass_8bit import OptimState8bit

from ddpm.catalogue import Train
from ddpm.ema import EMA, Exponential, PowerFunction, Stored, reconstruct
from ddpm.optimizer import Adam, AdamW8bit, Muon, encoded, learning_rate_at, shares_of_codes


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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_8_bit_moments_are_torchaos(memory_format: torch.memory_format) -> None:
    """PyTorch's AdamW with moments that torchao codes and decodes after each step; other tensors keep fp32 moments."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(64, 100), nn.Linear(100, 41)).to(memory_format=memory_format)
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in ours.named_parameters()}
    optimizer = AdamW8bit(ours.named_parameters(), Train(weight_decay=0.1))
    assert optimizer.exp_avg_scale.keys() == optimizer.exp_avg_sq_scale.keys() == {"0.weight", "1.weight"}
    peer = torch.optim.AdamW(theirs.values(), lr=1e-3, weight_decay=0.1, fused=True)
    signs = {"exp_avg": True, "exp_avg_sq": False}
    coded = {
        name: {moment: OptimState8bit.zeros(theirs[name].shape, is_signed) for moment, is_signed in signs.items()}
        for name in optimizer.exp_avg_scale
    }
    for moment, state in (item for of_name in coded.values() for item in of_name.items()):
        shares = shares_of_codes(signs[moment])
        torch.testing.assert_close(shares, state.qmap, rtol=2e-7, atol=0)
        # Theirs are rounded more than once.
        state.qmap.copy_(shares)
    for step in range(6):
        for name, parameter in ours.named_parameters():
            if (name, step) != ("1.weight", 3):
                parameter.grad = torch.randn_like(parameter) * 10.0 ** (step % 3)
                theirs[name].grad = parameter.grad.clone()
        moved = {name for name, parameter in theirs.items() if parameter.grad is not None}
        optimizer.step(1e-3)
        peer.step()
        peer.zero_grad()
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, theirs[name]) and parameter.grad is None, (name, step)
            for moment, state in coded.get(name, {}).items() if name in moved else ():
                exact = peer.state[theirs[name]][moment]
                state.copy_(exact.contiguous())
                assert torch.equal(getattr(optimizer, f"{moment}_scale")[name], state.scale)
                # In the middle between two codes rounding decides.
                off = (codes := getattr(optimizer, moment)[name]).int() - state.codes
                assert off.abs().max() <= 1 and off.count_nonzero() <= 1e-3 * off.numel()
                state.codes.copy_(codes)
                exact.copy_(state.dequantize())


def test_codes_are_of_the_nearest_shares() -> None:
    for is_signed in (True, False):
        shares = shares_of_codes(is_signed)
        values = torch.linspace(-1.0 if is_signed else 0.0, 1.0, 256 * 64)
        codes, scales = encoded(values, shares)
        distances = (values.view(-1, 256) / scales[:, None]).view(-1, 1).sub(shares).abs()
        assert torch.equal(distances.gather(1, codes.long()[:, None])[:, 0], distances.amin(dim=1))
        # The run must end at a moment that is not a number, and not go on with another.
        of_nothing, scales = encoded(torch.full((256,), torch.nan), shares)
        assert (shares[of_nothing.int()] * scales).isnan().all()


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
