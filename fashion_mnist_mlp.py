"""A multilayer perceptron for Fashion-MNIST, and the loops that train and judge it.

Run it for a plain training without tracking: `python fashion_mnist_mlp.py --help`.
"""

import argparse
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.fashion_mnist import FashionMNIST, load_fashion_mnist, normalised

Criterion = Callable[[Tensor, Tensor], Tensor]
Loader = Iterable[tuple[Tensor, Tensor]]


class Tracker(Protocol):
    """What `train_epoch` needs of a tracker."""

    def start_tracking(self) -> object:
        """Begin a fresh window of statistics."""

    def stop_tracking(self) -> object:
        """Close the window."""


class FashionMLP(nn.Module):
    """Linear layers fc1, fc2, ..., fc_out with a ReLU after each but the last.

    Every activation is a module of its own, so that each step of the network has a name.
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (128, 64),
        input_size: int = 784,
        num_classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _require_sizes(hidden_sizes)
        self.flatten = nn.Flatten()
        width = input_size
        for number, size in enumerate(hidden_sizes, start=1):
            self.add_module(f"fc{number}", nn.Linear(width, size))
            self.add_module(f"relu{number}", nn.ReLU())
            if dropout:
                self.add_module(f"dropout{number}", nn.Dropout(dropout))
            width = size
        self.fc_out = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 1, 28, 28), (N, 28, 28) or (N, `input_size`) → logits (N, `num_classes`)."""
        for layer in self.children():  # in the order of their making
            x = layer(x)
        return x


def _require_sizes(hidden_sizes: Sequence[int]) -> None:
    listed = isinstance(hidden_sizes, Sequence) and len(hidden_sizes) > 0
    if not listed or not all(type(size) is int and size > 0 for size in hidden_sizes):
        raise ValueError(
            f"Cannot build a FashionMLP with hidden_sizes={hidden_sizes!r}: it takes a list with "
            f"the whole number of neurons, at least 1, of each hidden layer, such as [128, 64]."
        )


class Batches:
    """Batches of tensors that are in memory as a whole: no workers, no work per item.

    Iterating gives (images, labels) on the device of `images`. With a `seed`, each pass has a new
    order, and the same seed gives the same orders; without, the order is that of the tensors.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, source: str, seed: int | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Cannot make batches of {batch_size} samples: at least 1 is needed.")
        self.images, self.labels = images, labels
        self.batch_size, self.source = batch_size, source
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    @property
    def num_samples(self) -> int:
        """Samples in one pass."""
        return len(self.labels)

    def __len__(self) -> int:
        """Batches in one pass; the last one may be smaller."""
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._generator is None:
            images, labels = (whole.split(self.batch_size) for whole in (self.images, self.labels))
            yield from zip(images, labels, strict=True)
            return
        order = torch.randperm(self.num_samples, generator=self._generator)
        for chosen in order.to(self.images.device).split(self.batch_size):
            yield self.images[chosen], self.labels[chosen]


def get_data_loaders(
    batch_size: int = 64,
    train_limit: int | None = None,
    test_limit: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    data: FashionMNIST | None = None,
) -> tuple[Batches, Batches]:
    """Training batches, in a new order each epoch, and test batches, in a fixed order.

    Images are normalised, (N, 1, 28, 28). The limits take the first so many samples.
    """
    data = load_fashion_mnist() if data is None else data

    def batches(images: Tensor, labels: Tensor, limit: int | None, seed: int | None) -> Batches:
        if limit is not None and limit < 1:
            raise ValueError(f"Cannot limit the data to {limit} samples: at least 1 is needed.")
        images = normalised(images[:limit]).to(device)
        return Batches(images, labels[:limit].to(device), batch_size, data.source, seed)

    return (
        batches(data.train_images, data.train_labels, train_limit, seed),
        batches(data.test_images, data.test_labels, test_limit, None),
    )


class _Totals:
    """Loss and hits over samples; kept on the device, since reading a value there waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch; loss: its mean over the samples; logits: (N, classes); labels: (N,)."""
        self.loss += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.samples += len(labels)

    def means(self) -> tuple[float, float]:
        """Mean loss, and accuracy in [0, 1]."""
        if self.samples == 0:
            raise ValueError("Cannot average over no samples: the loader gave no batches.")
        return self.loss.item() / self.samples, self.correct.item() / self.samples


def train_epoch(
    model: nn.Module,
    loader: Loader,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> tuple[float, float]:
    """Train for one pass over `loader`. Returns (mean loss, accuracy in [0, 1]) over its samples.

    Both are of the outputs that the steps were made from, so of a model that changed meanwhile.
    `criterion` gives the mean over a batch. `tracker` sees exactly this pass: its window of
    statistics begins here and is closed at the end, after an error too.
    """
    device = _device(model)
    totals = _Totals(device)
    model.train()
    with _window(tracker):
        for images, labels in _bar(loader, "train", progress):
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad(set_to_none=True)
            logits = model(images)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            totals.add(loss, logits, labels)
    return totals.means()


def evaluate(
    model: nn.Module, loader: Loader, criterion: Criterion | None = None, progress: bool = False
) -> tuple[float, float]:
    """(Mean loss, accuracy in [0, 1]) of the model in eval mode; cross-entropy unless given."""
    device = _device(model)
    totals = _Totals(device)
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    with _eval_mode(model), torch.no_grad():
        for images, labels in _bar(loader, "test", progress):
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            totals.add(criterion(logits, labels), logits, labels)
    return totals.means()


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _bar(loader: Loader, text: str, progress: bool) -> Loader:
    total = len(loader) if isinstance(loader, Sized) else None
    # disable=None: shown on a terminal only.
    return tqdm(loader, text, total, leave=False, disable=None if progress else True)


@contextmanager
def _window(tracker: Tracker | None) -> Iterator[None]:
    if tracker is None:
        yield
        return
    tracker.start_tracking()
    try:
        yield
    finally:
        tracker.stop_tracking()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: a part that was frozen in eval mode stays so afterwards.
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an MLP on Fashion-MNIST.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--train-limit", type=int, help="use only the first so many samples")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print a line per epoch."""
    options = _parse(arguments)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    set_seed(options.seed)
    train, test = get_data_loaders(
        options.batch_size, options.train_limit, device=device, seed=options.seed
    )
    model = FashionMLP(options.hidden_sizes, dropout=options.dropout).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    print(f"Data: {train.source}; {train.num_samples:,} to train, {test.num_samples:,} to test")
    for epoch in range(1, options.epochs + 1):
        loss, accuracy = train_epoch(model, train, nn.CrossEntropyLoss(), optimizer)
        test_loss, test_accuracy = evaluate(model, test)
        print(
            f"Epoch {epoch}: training loss {loss:.4f}, accuracy {accuracy:.2%}; "
            f"test loss {test_loss:.4f}, accuracy {test_accuracy:.2%}"
        )


if __name__ == "__main__":
    main()
