"""Networks, by the `kind` of a configuration's model section."""

from typing import Any

from torch import nn

from ddpm.networks.dit import DiT
from ddpm.networks.dome import DomeUNet
from ddpm.networks.edm2 import EDM2
from ddpm.networks.layers import Block
from ddpm.networks.unet import UNet

KINDS: dict[str, type[nn.Module]] = {"unet": UNet, "edm2": EDM2, "dit": DiT, "dome": DomeUNet}


def build(
    kind: str,
    *,
    image_size: int,
    in_channels: int,
    out_channels: int,
    num_classes: int,
    null_class: bool = False,
    self_conditioning: bool = False,
    augmentation_labels: int = 0,
    gradient_checkpointing: bool = False,
    **options: Any,
) -> nn.Module:
    """A network with initial weights from PyTorch's global random state.

    Args:
        kind: one of `KINDS`.
        image_size: height and width in pixels.
        in_channels: of the images.
        out_channels: as many, or twice that for a network that predicts variances as well.
        num_classes: 0 for a network without classes.
        null_class: whether there is a class number `num_classes`, for none of them (Ho & Salimans 2022).
        self_conditioning: whether it takes `Condition.x_start`.
        augmentation_labels: width of `Condition.augmentation`; 0 if it takes none.
        gradient_checkpointing: whether training keeps the ends of blocks alone and computes the rest again.
        options: what this kind of network takes beside that.

    Raises:
        ValueError: there is no such network, it does not fit the images, or cannot be told that.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no network {kind!r}: choose one of {', '.join(KINDS)}")
    if null_class and not num_classes:
        raise ValueError("null_class stands for none of the classes: set num_classes")
    if kind == "dome" and (self_conditioning or augmentation_labels):
        raise ValueError("the network dome is told t and the class alone, as in its checkpoints: choose unet")
    if augmentation_labels:
        options["augmentation_labels"] = augmentation_labels
    network = KINDS[kind](
        image_size=image_size,
        in_channels=in_channels * (1 + self_conditioning),
        out_channels=out_channels,
        num_classes=num_classes + null_class,
        **options,
    )
    for module in network.modules():
        if isinstance(module, Block):
            module.recompute = gradient_checkpointing
    return network
