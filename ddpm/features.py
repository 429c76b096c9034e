"""Features of images by pretrained networks, with which sets of images are compared.

A network takes uint8 [b, C, H, W] (C = 1 is grey) and does the preprocessing of its training. The caller checks the
file of weights, on which every score depends.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ExtractorOutput = tuple[Tensor, Tensor | None]
"""Features [b, D] and, where the network has classes, logits [b, classes]; float32."""
ExtractorFunction = Callable[[Tensor], ExtractorOutput]
"""uint8 images [b, C, H, W] → their features."""


def inception(path: Path, device: torch.device) -> ExtractorFunction:
    """Loads Inception-v3 of the FID papers, a TorchScript file."""
    # TorchScript runs code from its file: call this only with a file of a known hash.
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    network = torch.jit.load(str(path), map_location=device).eval()

    def extract(images: Tensor) -> ExtractorOutput:
        # PyTorch's own interpolation is shifted by half a pixel.
        x = interpolate_bilinear_2d_like_tensorflow1x(_in_colour(images), size=(299, 299), align_corners=False)
        return network((x - 128) / 128), None

    return extract


def mobilenet(path: Path, device: torch.device) -> ExtractorFunction:
    """Loads MobileNetV2, with torchvision's names."""
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.to(device).eval()
    mean, std = _imagenet(device)

    def extract(images: Tensor) -> ExtractorOutput:
        x = F.interpolate(_in_colour(images) / 255, (224, 224), mode="bilinear", align_corners=False)
        features = network.features((x - mean) / std).mean(dim=(2, 3))
        return features, network.classifier(features)

    return extract


def _in_colour(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)


def dinov2(path: Path, device: torch.device) -> ExtractorFunction:
    """Loads a DINOv2 of any size, with timm's or Meta's names."""
    import timm
    from safetensors.torch import load_file

    tensors = load_file(path)
    # Meta's files have it, for training alone; timm's do not.
    tensors.pop("mask_token", None)
    size = _VIT_SIZES[tensors["cls_token"].shape[-1]]
    # The positions are for 518 pixels, and timm interpolates between them.
    network = timm.create_model(f"vit_{size}_patch14_dinov2", pretrained=False, num_classes=0, dynamic_img_size=True)
    network.load_state_dict(tensors)
    network.to(device).eval()
    mean, std = _imagenet(device)

    def extract(images: Tensor) -> ExtractorOutput:
        x = F.interpolate(_in_colour(images) / 255, (224, 224), mode="bicubic", align_corners=False, antialias=True)
        return network((x.clamp(0, 1) - mean) / std), None

    return extract


_VIT_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
"""Names of the sizes by the width of the class token."""


def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
    return mean, torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)


LOADERS: dict[str, Callable[[Path, torch.device], ExtractorFunction]] = {
    "inception": inception,
    "mobilenet": mobilenet,
    "dinov2": dinov2,
}
"""The networks by name, as functions of a file of weights and a device that return the function of images."""
