"""Latents: what is drawn of an encoded image is a function of its number, and has mean 0 and deviation 1."""

import torch

from ddpm.augment import Latents

LATENTS = Latents((3.0, -1.0), (2.0, 0.5))


def moments(images):
    mean = (
        torch.randn(images, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.6, 0.4])[:, None, None]
    )
    mean += torch.tensor([3.0, -1.0])[:, None, None]
    log_variance = 2 * torch.tensor([1.2, 0.3]).log()[:, None, None].expand(images, 2, 4, 4)
    return torch.cat([mean, log_variance], dim=1).half()


def test_draws_depend_on_seed_and_number():
    of_images = moments(6)
    numbers = torch.tensor([5, 0, 2**40, 7, 8, 9])
    whole = LATENTS.drawn(3, numbers, of_images)
    assert torch.equal(LATENTS.drawn(3, numbers[2:4], of_images[2:4]), whole[2:4])
    assert not torch.equal(LATENTS.drawn(4, numbers, of_images), whole)
    assert not torch.equal(LATENTS.drawn(3, numbers + 1, of_images), whole)
    assert whole.dtype == torch.float32


def test_it_is_normalised_and_restored():
    """1.6² + 1.2² = 2² and 0.4² + 0.3² = 0.5²: the deviation of what is drawn is of the mean and of the draw."""
    drawn = LATENTS.drawn(0, torch.arange(4000), moments(4000))
    assert drawn.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (drawn.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    mean, log_variance = moments(4000).float().chunk(2, dim=1)
    difference = (LATENTS.restored(drawn) - mean) / (0.5 * log_variance).exp()
    assert difference.mean().abs() < 0.01
    assert abs(difference.std().item() - 1) < 0.01
