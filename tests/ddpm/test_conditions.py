"""Conditions made from images: Pillow and torchvision are the judges; each depends on its own image alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms import functional as torchvision

from ddpm.catalogue import DERIVATIONS, Conditioning
from ddpm.conditions import VectorStatistics, derived, learnt, masked, of_pictures, read_pictures, without
from ddpm.image_size import ImageSize
from ddpm.objective import Condition
from tests.ddpm.known import levels, normal

ALL = ("downscale:4", "grey", "blur:1.5", "jpeg:30", "mask:centre", "mask:brush", "noise:0.5")
NUMBERS = torch.arange(9) + 2**33


def pictures(channels: int = 3, size: tuple[int, int] = (24, 16)) -> Tensor:
    """Smooth pictures, so that JPEG has little to lose."""
    small = normal(3, (9, channels, 6, 4), torch.float32) * 0.5
    return levels(torch.nn.functional.interpolate(small, size, mode="bicubic")).float()


def by_pillow(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resized in floating point, channel by channel."""
    planes = [Image.fromarray(plane.numpy()) for plane in x.flatten(0, 1)]
    made = [np.asarray(plane.resize(size[::-1], Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(made)).view(*x.shape[:2], *size).clamp(-1, 1)


def test_derived_conditions_are_those_of_other_libraries() -> None:
    x = pictures()
    small = by_pillow(x, (6, 4))
    torch.testing.assert_close(derived("downscale:4", x, 0, NUMBERS), by_pillow(small, (24, 16)), rtol=0, atol=2e-6)
    grey = torchvision.rgb_to_grayscale(x)
    torch.testing.assert_close(derived("grey", x, 0, NUMBERS), grey, rtol=0, atol=1e-3)
    # Their kernel ends at the same place; at the border they mirror the image.
    blurred = torchvision.gaussian_blur(x, [11, 11], [1.5, 1.5])
    torch.testing.assert_close(derived("blur:1.5", x, 0, NUMBERS)[..., 5:-5, 5:-5], blurred[..., 5:-5, 5:-5])
    constant = torch.full((1, 3, 24, 16), 0.25)
    torch.testing.assert_close(derived("blur:1.5", constant, 0, NUMBERS[:1]), constant)
    for colours in (x, x[:, :1]):
        pixels = ((colours + 1) * 127.5).round().byte()
        theirs = torch.stack([decode_jpeg(encode_jpeg(one, 30)) for one in pixels]).float() / 127.5 - 1
        ours = derived("jpeg:30", colours, 0, NUMBERS)
        assert (ours - theirs).abs().mean() < 1 / 127.5 < (ours - colours).abs().mean()
    noisy = derived("noise:0.5", 0 * x, 0, NUMBERS)
    within = noisy[noisy.abs() < 1]
    # A normal distribution cut at two deviations has the deviation 0.88.
    assert within.mean().abs() < 0.01 and within.std().item() == pytest.approx(0.5 * 0.8796, abs=0.01)


def test_masks_hide_a_part() -> None:
    x = pictures(size=(32, 48))
    centre, brush = (derived(f"mask:{name}", x, 0, NUMBERS) for name in ("centre", "brush"))
    for made in (centre, brush):
        hidden = made[:, 3:] == 1
        assert torch.equal(made[:, :3], torch.where(hidden, 0, x)) and torch.equal(~hidden, made[:, 3:] == -1)
    assert torch.equal(centre[:, 3], (centre[:, 3] == 1).float() * 2 - 1) and (centre[:, 3] == 1).sum() == 9 * 16 * 24
    shares = (brush[:, 3] == 1).float().mean(dim=(1, 2))
    assert len(shares.unique()) == 9 and shares.min() > 0.1 and shares.max() < 0.8
    half = torch.arange(48).expand(32, 48) < 24
    assert torch.equal(of_pictures("mask:brush", x, ImageSize(32, 48), half), masked(x, half))


@pytest.mark.parametrize("derive", ALL)
def test_a_condition_depends_on_its_image_alone(derive: str) -> None:
    x = pictures()
    whole = derived(derive, x, 5, NUMBERS)
    assert whole.shape == (9, Conditioning(derive).channels_of(3), 24, 16) and whole.abs().max() <= 1
    for size in (1, 2, 5):
        parts = [slice(start, start + size) for start in range(0, 9, size)]
        assert torch.equal(torch.cat([derived(derive, x[part], 5, NUMBERS[part]) for part in parts]), whole)
    assert torch.equal(derived(derive, x.contiguous(memory_format=torch.channels_last), 5, NUMBERS), whole)


def test_pictures_of_people_become_the_conditions_of_training(tmp_path) -> None:
    """A small picture, a colour one for a network of grey ones, and a picture of another size."""
    x, size = pictures(), ImageSize(24, 16)
    saved = [Image.fromarray((((one + 1) * 127.5).round().byte()).permute(1, 2, 0).numpy()) for one in x]
    saved[0].save(tmp_path / "0.png")
    for derive in ("downscale:4", "grey", "mask:centre", "mask:brush", "blur:2"):
        given = read_pictures([tmp_path / "0.png", *saved[1:]], 3, Conditioning(derive).small_size(size))
        expected = x if derive == "blur:2" else derived(derive, x, 0, torch.arange(9))
        torch.testing.assert_close(of_pictures(derive, given, size), expected, rtol=0, atol=0.02)
    assert read_pictures([saved[0].resize((40, 8))], 1, size).shape == (1, 1, 24, 16)


def test_noise_of_the_condition_keeps_its_variance() -> None:
    """Ho et al.'s augmentation at a level that is uniform up to the setting; evaluation has none."""
    numbers, x = torch.arange(2000), normal(1, (2000, 1, 4, 4), torch.float32)
    told = learnt(Condition(image=x), x, 3, numbers, Conditioning(noise=0.6, channels=1))
    assert told.image_noise.min() > 0 and told.image_noise.max() < 0.6
    assert told.image_noise.mean().item() == pytest.approx(0.3, abs=0.02)
    assert told.image.std().item() == pytest.approx(1, abs=0.02)
    # The part that is left of the condition is its covariance with it.
    for low in (0.0, 0.5):
        near = (told.image_noise > low) & (told.image_noise < low + 0.1)
        kept = (told.image * x)[near].mean() / x[near].square().mean()
        assert kept.item() == pytest.approx((1 - (low + 0.05) ** 2) ** 0.5, abs=0.05)
    still = learnt(Condition(image=x), x, 3, numbers, Conditioning(noise=0.6, channels=1), noise=False)
    assert torch.equal(still.image, x) and not still.image_noise.any()


def test_conditions_are_left_out_together_and_alone() -> None:
    labels, ones = torch.zeros(5000, dtype=torch.int64), torch.ones(5000, 1, 2, 2)
    whole = Condition(labels, image=ones, vector=torch.ones(5000, 3))
    told = learnt(whole, ones, 1, torch.arange(5000), Conditioning(channels=1, vector=2), dropout=0.1, null_class=7)
    lost = torch.stack([told.labels == 7, told.image[:, 0, 0, 0] == 0, told.vector[:, 2] == 0]).int()
    assert (lost.float().mean(dim=1) - 0.2).abs().max() < 0.02 and (lost.sum(dim=0) == 3).float().mean() > 0.08
    assert (lost.sum(dim=0) != 2).all() and torch.equal(told.vector[:, 0] == 0, told.vector[:, 2] == 0)
    some = without(whole, [("image", True)], 7)
    assert not some.image.any() and torch.equal(some.labels, labels) and some.vector.all()


def test_vectors_are_normalised_or_refused() -> None:
    vectors = VectorStatistics(("age", "angle"), (40.0, 0.0), (10.0, 2.0))
    assert vectors.normalised([50, 1]).tolist() == [[1.0, 0.5]]
    assert vectors.normalised([(30, 0), (40, -2)]).tolist() == [[-1.0, 0.0], [0.0, -1.0]]
    for wrong in ([1], [1, 2, 3], [float("nan"), 1], [1, float("inf")], [[1], [2]]):
        with pytest.raises(ValueError, match="has 2 finite numbers: age, angle"):
            vectors.normalised(wrong)


@pytest.mark.parametrize(
    "wrong",
    ["downscale", "downscale:1", "downscale:2.5", "blur:", "blur:nan", "jpeg:96", "grey:1", "mask:half", "x:1"],
)
def test_unknown_derivations_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"use downscale:4, grey, .*mask:brush \(downscale 2 to 64, "):
        Conditioning(wrong).check()


def test_derivations_refuse_images_that_they_cannot_take() -> None:
    assert {each.partition(":")[0] for each in ALL} == DERIVATIONS.keys()
    for derive, channels, size, message in (
        ("grey", 1, 32, "needs images of 3 channels, and these have 1"),
        ("jpeg:30", 2, 32, "needs images of 1 or 3 channels"),
        ("downscale:4", 3, 30, "30 pixels are no multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            Conditioning(derive).check_images(channels, ImageSize.of(size))
