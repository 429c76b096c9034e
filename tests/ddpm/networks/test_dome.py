"""dome272's network against its published size and names, and its forward pass written down once more."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.networks.dome import DomeUNet
from ddpm.objective import Condition
from tests.ddpm.networks.weights import randomise


def test_names_are_those_of_its_checkpoints() -> None:
    with torch.device("meta"):
        network = DomeUNet(image_size=64, in_channels=3, out_channels=3)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == (23_332_739, 182)
    published = {
        "inc.double_conv.0.weight": (64, 3, 3, 3),
        "down1.maxpool_conv.1.double_conv.0.weight": (64, 64, 3, 3),
        "down1.emb_layer.1.weight": (128, 256),
        "sa1.mha.in_proj_weight": (384, 128),
        "bot1.double_conv.0.weight": (512, 256, 3, 3),
        "up1.conv.0.double_conv.0.weight": (512, 512, 3, 3),
        "up1.conv.1.double_conv.0.weight": (256, 512, 3, 3),
        "outc.weight": (3, 64, 1, 1),
    }
    assert published.items() <= shapes.items()


def written_down(weights: dict[str, Tensor], x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The published forward pass, from its weights alone: attention as a matrix, frequencies as they are there."""

    def double_conv(name: str, x: Tensor, residual: bool = False) -> Tensor:
        h = F.conv2d(x, weights[f"{name}.double_conv.0.weight"], padding=1)
        h = F.gelu(F.group_norm(h, 1, weights[f"{name}.double_conv.1.weight"], weights[f"{name}.double_conv.1.bias"]))
        h = F.conv2d(h, weights[f"{name}.double_conv.3.weight"], padding=1)
        h = F.group_norm(h, 1, weights[f"{name}.double_conv.4.weight"], weights[f"{name}.double_conv.4.bias"])
        return F.gelu(x + h) if residual else h

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attention(name: str, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = x.view(B, C, H * W).swapaxes(1, 2)
        qkv = norm(f"{name}.ln", tokens) @ weights[f"{name}.mha.in_proj_weight"].T + weights[f"{name}.mha.in_proj_bias"]
        q, k, v = qkv.view(B, H * W, 3, 4, C // 4).permute(2, 0, 3, 1, 4)
        heads = (q @ k.transpose(2, 3) / math.sqrt(C // 4)).softmax(-1) @ v
        tokens = tokens + linear(f"{name}.mha.out_proj", heads.transpose(1, 2).reshape(B, H * W, C))
        h = F.gelu(linear(f"{name}.ff_self.1", norm(f"{name}.ff_self.0", tokens)))
        return (linear(f"{name}.ff_self.3", h) + tokens).swapaxes(2, 1).view(B, C, H, W)

    def embedded(name: str, x: Tensor) -> Tensor:
        return x + linear(f"{name}.emb_layer.1", F.silu(embedding))[:, :, None, None]

    def down(number: int, x: Tensor) -> Tensor:
        name = f"down{number}.maxpool_conv"
        x = double_conv(f"{name}.2", double_conv(f"{name}.1", F.max_pool2d(x, 2), residual=True))
        return attention(f"sa{number}", embedded(f"down{number}", x))

    def up(number: int, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([skip, F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)], dim=1)
        x = double_conv(f"up{number}.conv.1", double_conv(f"up{number}.conv.0", x, residual=True))
        return attention(f"sa{number + 3}", embedded(f"up{number}", x))

    frequencies = 1.0 / 10000 ** (torch.arange(0, 256, 2).float() / 256)
    embedding = torch.cat([torch.sin(t[:, None] * frequencies), torch.cos(t[:, None] * frequencies)], dim=-1)
    embedding = embedding + weights["label_emb.weight"][labels]
    x1 = double_conv("inc", x)
    x2 = down(1, x1)
    x3 = down(2, x2)
    h = down(3, x3)
    for number in (1, 2, 3):
        h = double_conv(f"bot{number}", h)
    h = up(3, up(2, up(1, h, x3), x2), x1)
    return F.conv2d(h, weights["outc.weight"], weights["outc.bias"])


@pytest.mark.parametrize("image_size", [16, 24])
def test_forward_is_what_the_weights_say(image_size: int) -> None:
    network = DomeUNet(image_size=image_size, in_channels=3, out_channels=3, num_classes=10)
    randomise(network)
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, image_size, image_size, generator=generator), torch.tensor([1.0, 999.0])
    labels = torch.tensor([0, 9])
    with torch.no_grad():
        output = network(x, t, Condition(labels))
        expected = written_down(network.state_dict(), x, t, labels)
    assert output.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
