"""The networks of one_shot.py: what is trained or loaded, what may be shown of the training set, how it is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import _bytes
import _smollm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed

CALIBRATION = 80  # batches
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A trained network, what may be shown of the training set, and how it is judged."""

    dense: nn.Module
    pairs: Pairs
    loss: Loss
    score: Callable[[nn.Module], float]
    form: str  # of a score
    batch: Tensor  # to time
    example: Tensor  # to trace


@dataclass(frozen=True)
class Part:
    """What shrinks: layers that make the units, `heads` attention heads each (0: neurons or channels)."""

    title: str
    shares: tuple[float, ...]
    layers: Callable[[nn.Module], list[str]]
    heads: int = 0


def conv_net() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, 32), *block(32, 48), *block(48, 64),
        nn.Flatten(), nn.Linear(64 * 9, 10),
    )  # fmt: skip


def hidden(model: nn.Module) -> list[str]:
    """All layers with weights but the last."""
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][:-1]


def blocks(*names: str) -> Callable[[nn.Module], list[str]]:
    return lambda model: [n for n, _ in model.named_modules() if n.rpartition(".")[2] in names]


PARTS: dict[str, list[Part]] = {
    "mlp": [Part("hidden neurons", (0.5, 0.75, 0.9), hidden)],
    "conv": [Part("channels", (0.5, 0.75), hidden)],
    "gpt": [
        Part("MLP neurons", (0.5, 0.75), blocks("up")),
        Part("heads", (0.25, 0.5), blocks("q", "k", "v"), heads=4),
    ],
    "smollm": [Part("MLP neurons", (0.1, 0.25, 0.5), blocks("gate_proj", "up_proj"))],
}
TITLES = {
    "mlp": "MLP 784-512-256-10, Fashion-MNIST, accuracy",
    "conv": "Convolutions 32-48-64 with batch norms, Fashion-MNIST, accuracy",
    "gpt": "GPT of bytes, 4 blocks of width 128, the standard library's source, perplexity per byte",
    "resnet20": "ResNet-20 to half of its FLOPs, Fashion-MNIST, accuracy",
    "vit": "A small ViT to half of its FLOPs, Fashion-MNIST, accuracy",
    "smollm": "SmolLM2-135M-Instruct as published, the standard library's source, perplexity per token",
    "smollm-all": "SmolLM2-135M-Instruct to a share of all its parameters, perplexity per token",
}


def image_case(name: str, seed: int, quick: bool) -> Case:
    train, test = get_data_loaders(128, 6_000 if quick else None, seed=seed)
    set_seed(seed)
    model = FashionMLP([512, 256]) if name == "mlp" else conv_net()
    optimizer = torch.optim.Adam(model.parameters())
    epochs = 1 if quick else 5 if name == "mlp" else 3
    for _ in tqdm(range(epochs), f"Training {name}, seed {seed}", leave=False, disable=None):
        for images, labels in train:
            optimizer.zero_grad()
            image_loss(model, images, labels).backward()
            optimizer.step()
    pairs = [pair for pair, _ in zip(train, range(CALIBRATION), strict=False)]
    return Case(
        model.eval(), pairs, image_loss, lambda m: evaluate(m, test)[1], "{:.2%}",
        torch.cat([x for x, _ in pairs[:2]]), pairs[0][0],
    )  # fmt: skip


def image_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def text_case(seed: int, quick: bool) -> Case:
    source = _bytes.Source()
    model = _bytes.trained(source, seed, 60 if quick else 1100)
    pairs = list(source.batches(1000 + seed, 10 if quick else CALIBRATION))
    return Case(
        model, pairs, _bytes.loss_of, lambda m: _bytes.perplexity(m, source), "{:.3f}",
        pairs[0][0], pairs[0][0],
    )  # fmt: skip


def smollm_case(seed: int, quick: bool) -> Case:
    model, tokenizer = _smollm.load()
    pairs = [(x, x) for x in _smollm.windows(tokenizer, 2 if quick else 16, seed)]
    held_out = _smollm.windows(tokenizer, 2 if quick else 8, 12345, test=True)
    return Case(
        model, pairs, _smollm.loss_of, lambda m: _smollm.perplexity(m, held_out), "{:.3f}",
        pairs[0][0], pairs[0][0][:, :16],
    )  # fmt: skip
