"""The tasks of `controls.py`: networks, their data, and the policy that one of them changes itself by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from _bytes import GPT, Source, perplexity
from torch import Tensor, nn

from data.fashion_mnist import load_fashion_mnist, normalised
from fashion_mnist_mlp import FashionMLP
from tracker import Policy
from tracker.training.schedule import LEAST

Batch = tuple[Tensor, Tensor]
HELD_BACK = 5_000  # of the training images: what is chosen, is chosen by them
BATCH = 128


class Images:
    """Fashion-MNIST. The value of a model is its accuracy."""

    name, greater_is_better = "test accuracy", True

    def __init__(self) -> None:
        raw = load_fashion_mnist()
        images, self.source = normalised(raw.train_images), raw.source
        self.train = images[:-HELD_BACK], raw.train_labels[:-HELD_BACK]
        self.parts = {
            "validation": (images[-HELD_BACK:], raw.train_labels[-HELD_BACK:]),
            "test": (normalised(raw.test_images), raw.test_labels),
        }

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Without end; each epoch in a new order."""
        generator, (images, labels) = torch.Generator().manual_seed(seed), self.train
        while True:
            order = torch.randperm(len(labels), generator=generator)
            for chosen in order.split(BATCH)[:-1]:
                yield images[chosen], labels[chosen]

    @torch.no_grad()
    def value(self, model: nn.Module, part: str) -> float:
        """Share of a part that is classified as it should be."""
        images, labels = self.parts[part]
        found = torch.cat([model(x).argmax(1) for x in images.split(1000)])
        return float((found == labels).double().mean())


class Permuted(Images):
    """Twelve tasks, one after the other: the pixels are permuted anew in each. The value is that on the present one."""

    name = "test accuracy, last 5 tasks"

    def __init__(self) -> None:
        super().__init__()
        self.pixels = torch.arange(784)

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """6,000 images of each task."""
        generator = torch.Generator().manual_seed(1000 + seed)
        images, labels = self.train[0].flatten(1), self.train[1]
        for _ in range(TASKS + 1):
            self.pixels = torch.randperm(784, generator=generator)
            some = torch.randperm(len(labels), generator=generator)[:6000]
            for _ in range(math.ceil(steps / TASKS)):
                chosen = some[torch.randint(6000, (64,), generator=generator)]
                yield images[chosen][:, self.pixels], labels[chosen]

    @torch.no_grad()
    def value(self, model: nn.Module, part: str) -> float:
        """On the images of a part, permuted as in the present task."""
        images, labels = self.parts[part]
        found = model(images.flatten(1)[:, self.pixels]).argmax(1)
        return float((found == labels).double().mean())


TASKS = 12


class Bytes:
    """Source code of Python's standard library. The value of a model is its loss on held-out files."""

    name, greater_is_better = "held-out loss", False

    def __init__(self) -> None:
        self.data, self.source = Source(), "Python's standard library"

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Without end."""
        return self.data.batches(seed, 10**9)

    def value(self, model: nn.Module, part: str) -> float:
        """In nats per byte."""
        # The windows that are drawn first are for choosing, all of them for the table.
        return math.log(perplexity(model, self.data, 8 if part == "validation" else 40))


class ConvNet(nn.Module):
    """Three convolutions with BatchNorm, and a linear layer on the mean over positions."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        before, layers = 1, list[nn.Module]()
        for number, width in enumerate(widths):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number < 2 else []
            before = width
        self.features, self.head = nn.Sequential(*layers), nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 1, 28, 28) → logits (N, 10)."""
        return self.head(self.features(x).mean((2, 3)))


@dataclass(frozen=True)
class Task:
    """A network that changes itself, and what it is compared with.

    Attributes:
        title: For people.
        data: Its class.
        start: The network at the beginning.
        steps: Of the network that changes itself.
        policy: By which it does so, in a run of so many steps.
        sweep: Fixed networks, by name.
        rates: Learning rates that are tried for each of them; the first is that of all other runs.
        tail: The value is the mean of the last so many points of the curve; 1: that at the end.
        anneals: Whether the learning rate falls, by a cosine, to zero.
        keep: Parameters of what is compressed once; 0: nothing is.
    """

    title: str
    data: Callable[[], Any]
    start: Callable[[], nn.Module]
    steps: int
    policy: Callable[[int], Policy]
    sweep: Mapping[str, Callable[[], nn.Module]]
    rates: tuple[float, ...] = (1e-3, 3e-3, 3e-4)
    tail: int = 1
    anneals: bool = True
    keep: int = 0
    decay: float = 0.0


def _mlp(*hidden: int) -> tuple[str, Callable[[], nn.Module]]:
    return "-".join(map(str, (784, *hidden, 10))), partial(FashionMLP, list(hidden))


def _conv(*widths: int) -> tuple[str, Callable[[], nn.Module]]:
    return "conv " + "-".join(map(str, widths)), partial(ConvNet, widths)  # type: ignore[arg-type]


def _gpt(hidden: int) -> tuple[str, Callable[[], nn.Module]]:
    return f"MLP of {hidden}", partial(GPT, hidden=hidden)


def growth(parameters: int, part: float = 1.0, **more: Any) -> Callable[[int], Policy]:
    """The policy that grows to so many parameters within this part of a run."""
    settings = {"shrink": False, "grow": True, "max_parameters": parameters, **more}
    return lambda steps: Policy.over(_within(steps, part), **settings)


def shrinking(parameters: int, part: float = 1.0, **more: Any) -> Callable[[int], Policy]:
    """The policy that shrinks to so many parameters within this part of a run."""
    least = int(0.95 * parameters)
    settings = {"max_parameters": parameters, "min_parameters": least, "floor": 8, **more}
    return lambda steps: Policy.over(_within(steps, part), **settings)


def _within(steps: int, part: float) -> int:
    return max(int(part * steps), LEAST)


EARLY = 0.1  # of a run, within which it changes: see levers.py
GPT_GROWTH: dict[str, Any] = {"insert": 2, "gradients": False}
GPT_RATES = (3e-3, 1.5e-3, 6e-3)
GPTS = dict(map(_gpt, (64, 128, 256, 512, 1024)))
TASKS_BY_NAME: dict[str, Task] = {
    "mlp-shrink": Task(
        "MLP on Fashion-MNIST, shrinking from 784-512-256-10 to 80,000 parameters",
        Images, _mlp(512, 256)[1], 4000, shrinking(80_000, EARLY),
        dict([_mlp(32, 16), _mlp(64, 32), _mlp(96, 48), _mlp(128, 64), _mlp(256, 128)]), keep=80_000,
    ),
    "mlp-grow": Task(
        "MLP on Fashion-MNIST, growing from 784-16-10 to 150,000 parameters",
        Images, _mlp(16)[1], 4000, growth(150_000, EARLY),
        dict([_mlp(32), _mlp(64), _mlp(128), _mlp(188), _mlp(256)]),
    ),
    "conv-shrink": Task(
        "Conv net with BatchNorm on Fashion-MNIST, shrinking from 32-64-128 to 23,000 parameters",
        Images, _conv(32, 64, 128)[1], 1700, shrinking(23_000, EARLY),
        dict([_conv(8, 16, 32), _conv(12, 24, 48), _conv(16, 32, 64), _conv(24, 48, 96), _conv(32, 64, 128)]),
        keep=23_000,
    ),
    "conv-grow": Task(
        "Conv net with BatchNorm on Fashion-MNIST, growing from 8-16-32 to 93,000 parameters",
        Images, _conv(8, 16, 32)[1], 1700, growth(93_000, EARLY),
        dict([_conv(8, 16, 32), _conv(12, 24, 48), _conv(16, 32, 64), _conv(24, 48, 96), _conv(32, 64, 128)]),
    ),
    "gpt-6e12": Task(
        "Byte GPT, about 6e12 FLOPs, growing from an eighth of the MLP neurons to 875,520 parameters",
        Bytes, _gpt(64)[1], 660, growth(875_520, 0.5, **GPT_GROWTH), GPTS, GPT_RATES, decay=0.1,
    ),
    "gpt-6e13": Task(
        "Byte GPT, about 6e13 FLOPs, growing from an eighth of the MLP neurons to 875,520 parameters",
        Bytes, _gpt(64)[1], 6600, growth(875_520, 0.5, **GPT_GROWTH), {}, GPT_RATES, decay=0.1,
    ),
    "recycling": Task(
        "12 permuted tasks, 784-128-128-10, recycling",
        Permuted, _mlp(128, 128)[1], 12 * 188,
        lambda steps: Policy.over(steps, every=100, until=None, shrink=False, recycle=True, dormant=0.1),
        {}, (5e-3,), 5, anneals=False,
    ),
}  # fmt: skip


def data_of(task: Task) -> Any:
    """Loaded once."""
    return _loaded(task.data)


@cache
def _loaded(kind: Callable[[], Any]) -> Any:
    return kind()
