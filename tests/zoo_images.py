"""Convolutional models of the zoo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_dense import Gone


def conv_bn(inside: int, out: int, **how: int) -> nn.Sequential:
    kernel = how.pop("kernel", 3)
    conv = nn.Conv2d(inside, out, kernel, padding=kernel // 2, bias=False, **how)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def pooled_head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class BasicBlock(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != out:
            conv = nn.Conv2d(inside, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        h += self.downsample(x)
        return F.relu(h)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = conv_bn(3, 12)
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.last = nn.Conv2d(18, 8, 1)
        self.head = pooled_head(8)
        self.groups = 3

    def refit(self, gone: Gone) -> None:
        self.groups = self.grouped.groups

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.grouped(self.first(x)))
        n, c, height, width = h.shape
        h = h.view(n, self.groups, c // self.groups, height, width).transpose(1, 2)
        return self.head(F.relu(self.last(h.reshape(n, c, height, width))))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.relu(self.down(pooled))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.middle = conv_bn(3, 6), conv_bn(6, 10, stride=2), conv_bn(10, 9)
        self.up = nn.ConvTranspose2d(9, 7, 2, stride=2)
        self.merge = conv_bn(13, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        h = F.relu(self.up(self.middle(self.down(skip))))
        return self.out(self.merge(torch.cat([skip, h], 1)))


def resnet18() -> nn.Module:
    from torchvision.models import resnet18 as build

    return build(weights=None, num_classes=10)
