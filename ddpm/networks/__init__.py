"""Networks, by the `kind` of a configuration's model section."""

from typing import Any

from torch import nn


def build(kind: str, *, image_size: int, in_channels: int, num_classes: int, **options: Any) -> nn.Module:
    """A network with initial weights from PyTorch's global random state.

    Args:
        kind: `unet`.
        image_size: height and width in pixels.
        in_channels: of the images, in and out.
        num_classes: 0 for a network without classes.
        options: what this kind of network takes beside that.

    Raises:
        ValueError: there is no such network, or it does not fit the images.
    """
    sizes: dict[str, Any] = {"image_size": image_size, "in_channels": in_channels, "num_classes": num_classes}
    if kind == "unet":
        from ddpm.networks.unet import UNet

        return UNet(**sizes, **options)
    raise ValueError(f"there is no network {kind!r}")
