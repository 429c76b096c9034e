"""Networks of users: they get what they take, and those that could not resume with equal bits are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddpm.networks.adapter import build_adapted, check_adapted
from ddpm.networks.layers import Dropout
from ddpm.objective import Condition

GIVEN = {"image_shape": (3, 4, 4), "num_classes": 2, "out_channels": 3, "augmentation_labels": 0}
CONDITION = Condition(torch.zeros(2, dtype=torch.int64))


class Good(nn.Module):
    def __init__(self, image_shape, num_classes, width=8):
        super().__init__()
        self.conv, self.out = nn.Conv2d(image_shape[0], width, 1), nn.Conv2d(width, 3, 1)
        self.classes, self.dropout = nn.Embedding(num_classes, width), Dropout(0.5)
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, t, labels=None):
        return self.out(self.dropout(self.conv(x) * self.fixed + self.classes(labels)[:, :, None, None]))


class Shape(Good):
    def forward(self, x, t, labels=None):
        return super().forward(x, t, labels)[:, :, ::2]


class Kind(Good):
    def forward(self, x, t, labels=None):
        return [super().forward(x, t, labels)]


class Unused(Good):
    def forward(self, x, t, labels=None):
        return self.out(self.conv(x))


class Buffer(Good):
    def __init__(self, image_shape, num_classes):
        super().__init__(image_shape, num_classes)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x, t, labels=None):
        return self.norm(super().forward(x, t, labels))


class Random(Good):
    def forward(self, x, t, labels=None):
        return nn.functional.dropout(super().forward(x, t, labels), 0.1)


FAULTS = {
    Shape: r"forward returns \[2, 3, 2, 4\] for x of \[2, 3, 4, 4\], and the training needs \[2, 3, 4, 4\]",
    Kind: "forward returns list for x",
    Unused: r"does not use the parameter classes.weight \(1 in all\): it gets no gradient",
    Buffer: r"changes the buffer norm.running_mean, as batch normalisation does: .* use group normalisation",
    Random: "draws random numbers, as nn.Dropout does: .* use ddpm.networks.layers.Dropout",
}


def test_a_network_gets_what_it_takes_and_keeps_its_names():
    torch.manual_seed(0)
    network = build_adapted(Good, {"width": 4}, **GIVEN)
    torch.manual_seed(0)
    plain = Good((3, 4, 4), 2, width=4)
    check_adapted(network, (3, 4, 4), 3, CONDITION)
    assert all(parameter.grad is None for parameter in network.parameters())
    plain.load_state_dict(network.state_dict())
    x, t, labels = torch.randn(2, 3, 4, 4), torch.zeros(2), torch.tensor([0, 1])
    assert torch.equal(network.eval()(x, t, Condition(labels, x)), plain.eval()(x, t, labels))
    assert type(network).__name__ == "Good" and network.dropout.number > 0


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_networks_that_cannot_resume_are_refused(kind):
    with pytest.raises(ValueError, match=FAULTS[kind]):
        check_adapted(build_adapted(kind, {}, **GIVEN), (3, 4, 4), 3, CONDITION)
