"""What pretrained networks see in images: the features by which sets of images are compared.

A network takes uint8 [b, C, H, W] (C = 1 is grey) and makes of each image what it was trained on. Which file of weights
it is given is for the caller to check: a score is worth what its network is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Seen = tuple[Tensor, Tensor | None]
"""Features [b, D] and, where the network has classes, logits [b, classes]; float32."""


def _inception(path: Path, device: torch.device) -> Callable[[Tensor], Seen]:
    # TorchScript runs what its file says: to be called with a file whose hash is known.
    network = torch.jit.load(str(path), map_location=device).eval()

    def see(images: Tensor) -> Seen:
        x = F.interpolate(_in_colour(images), (299, 299), mode="bilinear", align_corners=False)
        return network((x - 128) / 128), None

    return see


def _mobilenet(path: Path, device: torch.device) -> Callable[[Tensor], Seen]:
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.to(device).eval()
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def see(images: Tensor) -> Seen:
        x = F.interpolate(_in_colour(images) / 255, (224, 224), mode="bilinear", align_corners=False)
        features = network.features((x - mean) / std).mean(dim=(2, 3))
        return features, network.classifier(features)

    return see


def _in_colour(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)


LOADERS: dict[str, Callable[[Path, torch.device], Callable[[Tensor], Seen]]] = {
    "inception": _inception,
    "mobilenet": _mobilenet,
}
"""By the name of the network: from its file of weights to what it sees, on a device."""
