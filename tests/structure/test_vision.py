"""All of torchvision.ops between convolutions: channels are followed, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.structure.oracle_masks import masked_copy, randomise, relative_difference
from tracker import NeuronEngine

ops: Any = pytest.importorskip("torchvision.ops")
BOXES = [torch.tensor([[0.0, 0.0, 3.0, 4.0], [1.0, 2.0, 6.0, 5.0]])] * 2


class Deformed(nn.Module):
    """Its offsets are made of the same map."""

    def __init__(self, masked: bool = False, **options: int) -> None:
        super().__init__()
        many = options.get("offset_groups", 1) * 9
        self.offset = nn.Conv2d(12, 2 * many, 3, padding=1)
        self.mask = nn.Conv2d(12, many, 3, padding=1) if masked else None
        groups = options.get("groups", 1)
        self.conv = ops.DeformConv2d(12, 12, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask(x).sigmoid()
        return self.conv(x, self.offset(x), mask)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fpn = ops.FeaturePyramidNetwork([12, 12], 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fpn({"a": x, "b": nn.functional.max_pool2d(x, 2)})["a"]


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Kept(nn.Module):
    """Boxes chosen by scores that are made of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2).mean(0).T
        boxes = torch.cat([flat[:, :2], flat[:, :2] + 1 + flat[:, 2:4].abs()], 1)
        return ops.roi_align(x, [boxes[ops.nms(boxes, flat[:, 4], 0.5)]] * len(x), 3)


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "deform_conv2d": Deformed,
    "deform_conv2d, masked": lambda: Deformed(masked=True),
    "roi_align": lambda: Called(lambda x: ops.roi_align(x, BOXES, 3)),
    "roi_align, module": lambda: Called(lambda x: ops.RoIAlign(3, 0.5, 2)(x, BOXES)),
    "roi_pool": lambda: Called(lambda x: ops.roi_pool(x, BOXES, 3)),
    "multiscale": lambda: Called(
        lambda x: ops.MultiScaleRoIAlign(["a"], 3, 2)({"a": x}, BOXES, [(8, 8)] * 2)
    ),
    "stochastic depth": lambda: Called(lambda x: x + ops.stochastic_depth(x, 0.3, "row", False)),
    "stochastic depth, module": lambda: ops.StochasticDepth(0.2, "batch"),
    "drop_block": lambda: ops.DropBlock2d(0.2, 3),
    "frozen norm": lambda: ops.FrozenBatchNorm2d(12),
    "squeeze and excite": lambda: ops.SqueezeExcitation(12, 4),
    "convolution, norm, activation": lambda: ops.Conv2dNormActivation(12, 12, 3),
    "pyramid": Pyramid,
    "mlp": lambda: nn.Sequential(
        ops.Permute([0, 2, 3, 1]), ops.MLP(12, [10, 12]), ops.Permute([0, 3, 1, 2])
    ),
}
# What picks or mixes by channel: (operation, channels left behind it, words of the reason).
REFUSED: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "nms": (Kept, 12, "nms|index|select|slice"),
    "deform_conv2d in offset groups": (lambda: _in_offset_groups(), 12, "deform_conv2d"),
    "deform_conv2d in groups": (lambda: Deformed(groups=2), 12, "deform_conv2d"),
}


def _in_offset_groups() -> nn.Module:
    module = Deformed()
    module.offset = nn.Conv2d(12, 36, 3, padding=1)
    return module


def between(middle: nn.Module, channels: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), middle, nn.Conv2d(channels, 4, 1)
    )


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_are_followed(name: str) -> None:
    torch.manual_seed(0)
    model, x = randomise(between(FOLLOWED[name]()), 0).double().eval(), images().double()
    for boxes in BOXES:
        boxes.data = boxes.data.double()
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x)
    groups = [g.name for g in engine.structure.groups if g.prunable]
    assert any("0" in engine.structure[g].layers for g in groups)
    for group in groups:
        found = engine.structure[group]
        units = list(range(0, found.size - 1, 3))
        expected = [masked_copy(model, found, units, silence=s)(x) for s in (False, True)]
        receipt = engine.prune_units({group: units})
        if receipt.promise == "masked":
            with torch.no_grad():
                assert min(relative_difference(model(x), e) for e in expected) < 1e-9
    for mode in (True, False):
        model.train(mode)(x).square().mean().backward()
    for p in model.parameters():
        assert p.grad is None or p.grad.shape == p.shape


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name: str) -> None:
    build, channels, words = REFUSED[name]
    torch.manual_seed(0)
    model = between(build(), channels).eval()
    for boxes in BOXES:
        boxes.data = boxes.data.float()
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=images())
    assert not [g for g in engine.structure.groups if g.prunable and "0" in g.layers]
    reasons = [f.reason for f in engine.structure.frozen if f.tensor == "0.weight" and f.dim == 0]
    reasons += [g.reason for g in engine.structure.groups if "0" in g.layers]
    assert any(part in reason for reason in reasons for part in words.split("|")), reasons


@pytest.mark.parametrize("kind", ["ps_roi_align", "ps_roi_pool"])
def test_position_sensitive_boxes_keep_their_bins(kind: str) -> None:
    """Of 3 channels for each of 4 bins whole ones go."""
    torch.manual_seed(0)
    for boxes in BOXES:
        boxes.data = boxes.data.double()
    middle = Called(lambda x: getattr(ops, kind)(x, BOXES, 2))
    model, x = randomise(between(middle, 3), 0).double().eval(), images().double()
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x)
    (group,) = (g for g in engine.structure.groups if g.prunable)
    assert (group.size, len(group.neurons(0))) == (3, 4)
    expected = masked_copy(model, group, [1])(x)
    assert engine.prune_units({group.name: [1]}).promise == "masked"
    assert model[0].out_channels == 8
    with torch.no_grad():
        assert relative_difference(model(x), expected) < 1e-9
