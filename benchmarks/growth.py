"""Growing a hidden layer in mid-training: what the loss does, beside what people do by hand.

    python benchmarks/growth.py             # 8 -> 32 and 64 -> 128 hidden units, 3 seeds (gromo, if installed)
    python benchmarks/growth.py --write     # and docs/growth.md

784-h-64-10 with ReLU, Adam 1e-3, batch 128, Fashion-MNIST: three epochs, growth, three more. "spike" is the largest
excess of the loss of a training batch over that of the same network left as it is, on the same batches, in 50 steps.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fashion_mnist_mlp import Batches, FashionMLP, evaluate, get_data_loaders, set_seed
from tracker import NeuronEngine

PAGE = ROOT / "docs" / "growth.md"
Pair = tuple[nn.Module, torch.optim.Optimizer]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def step(pair: Pair, batch: tuple[Tensor, Tensor]) -> float:
    model, optimizer = pair
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def nothing(pair: Pair, to: int, batches: list[Any]) -> Pair:
    return pair


def new_adam(pair: Pair, to: int, batches: list[Any]) -> Pair:
    return pair[0], torch.optim.Adam(pair[0].parameters())


def new_layers(pair: Pair, to: int, batches: list[Any]) -> Pair:
    """Layers of the new size with fresh weights, and a new optimizer."""
    model: Any = pair[0]
    model.fc1, model.fc2 = nn.Linear(784, to), nn.Linear(to, 64)
    return model, torch.optim.Adam(model.parameters())


def split(pair: Pair, to: int, batches: list[Any]) -> Pair:
    """Net2Wider (Chen et al., 2016): copies of neurons with a little noise share their outgoing weights."""
    model: Any = pair[0]
    old1, old2 = model.fc1, model.fc2
    pick = torch.cat(
        [
            torch.arange(old1.out_features),
            torch.randint(old1.out_features, (to - old1.out_features,)),
        ]
    )
    times = torch.bincount(pick, minlength=old1.out_features)[pick]
    model.fc1, model.fc2 = nn.Linear(784, to), nn.Linear(to, 64)
    with torch.no_grad():
        model.fc1.weight.copy_(old1.weight[pick] + 1e-2 * old1.weight.std() * torch.randn(to, 784))
        model.fc1.bias.copy_(old1.bias[pick])
        model.fc2.weight.copy_(old2.weight[:, pick] / times)
        model.fc2.bias.copy_(old2.bias)
    return model, torch.optim.Adam(model.parameters())


def grown(directions: bool) -> Callable[[Pair, int, list[Any]], Pair]:
    def grow(pair: Pair, to: int, batches: list[Any]) -> Pair:
        model: Any = pair[0]
        engine = NeuronEngine()
        engine.track_model(model, "m", example_inputs=batches[0][0])
        engine.attach_optimizer(pair[1])
        extra: dict[str, Any] = {}
        if directions:
            extra = {
                "batches": batches,
                "loss": lambda out, b: nn.functional.cross_entropy(out, b[1]),
            }
        engine.expand_layer("fc1", to - model.fc1.out_features, **extra)
        return pair

    return grow


def tiny(pair: Pair, to: int, batches: list[Any]) -> Pair:
    """TINY (Verbockhaven et al., 2024) by gromo's own classes, as its examples drive them: line search, new Adam."""
    from gromo.containers.sequential_growing_container import SequentialGrowingModel
    from gromo.modules.linear_growing_module import LinearGrowingModule
    from gromo.utils.training_utils import compute_statistics

    class Grown(SequentialGrowingModel):
        def __init__(self, old: Any) -> None:
            super().__init__(784, 10)
            linear = [old.fc1, old.fc2, old.fc_out]
            self.layers = nn.ModuleList()
            for one in linear:
                before = {"previous_module": self.layers[-1]} if len(self.layers) else {}
                if one is not linear[-1]:
                    before["post_layer_function"] = nn.ReLU()
                self.layers.append(LinearGrowingModule(one.in_features, one.out_features, **before))
                self.layers[-1].layer.load_state_dict(one.state_dict())
            self._growable_layers = [self.layers[1]]

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            for layer in self.layers:
                x = layer(x)
            return x

        def extended_forward(self, x: Tensor, mask: dict[str, Any] | None = None) -> Tensor:
            x, more = x.flatten(1), None
            for layer in self.layers:
                x, more = layer.extended_forward(x, more)
            return x

    model = Grown(pair[0])
    model.set_growing_layers(index=0)
    compute_statistics(model, batches, nn.CrossEntropyLoss(reduction="sum"))
    model.compute_optimal_updates(
        compute_delta=False, maximum_added_neurons=to - model.layers[0].out_features
    )
    model.reset_computation()
    model.dummy_select_update()

    @torch.no_grad()
    def loss_at(scale: float) -> float:
        model.set_scaling_factor(scale)
        return mean(
            float(nn.functional.cross_entropy(model.extended_forward(x), y))
            for x, y in batches[:20]
        )

    model.set_scaling_factor(min((0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0), key=loss_at))
    model.apply_change()
    return model, torch.optim.Adam(model.parameters())


METHODS: dict[str, Callable[[Pair, int, list[Any]], Pair]] = {
    "no growth": nothing,
    "no growth, Adam re-created": new_adam,
    "layers and Adam re-created": new_layers,
    "Net2Wider, Adam re-created": split,
    **({"gromo TINY, Adam re-created": tiny} if importlib.util.find_spec("gromo") else {}),
    "expand_layer": grown(False),
    "expand_layer, gradient directions": grown(True),
}


def width(model: nn.Module) -> int:
    """Of the first layer."""
    return len(next(p for p in model.parameters() if p.ndim == 2))


def measure(
    start: int, to: int, seed: int, data: Batches, test: Any
) -> dict[str, dict[str, float]]:
    def batches(order: int) -> Batches:
        return Batches(data.images, data.labels, data.batch_size, data.source, seed=order)

    set_seed(seed)
    train = batches(seed)
    model = FashionMLP([start, 64])
    pair: Pair = (model, torch.optim.Adam(model.parameters()))
    for _ in range(3):
        for batch in train:
            step(pair, batch)
    statistics = [b for b, _ in zip(train, range(80), strict=False)]
    first = [b for b, _ in zip(train, range(50), strict=False)]
    found: dict[str, dict[str, float]] = {}
    calm: list[float] = []
    for name, change in tqdm(
        METHODS.items(), desc=f"{start} -> {to}, seed {seed}", leave=False, disable=None
    ):
        set_seed(seed + 100)
        own = copy.deepcopy(model)
        optimizer = torch.optim.Adam(own.parameters())
        optimizer.load_state_dict(copy.deepcopy(pair[1].state_dict()))
        before = evaluate(own, test)[0]
        start_at = time.perf_counter()
        after_pair = change((own, optimizer), to, statistics)
        seconds = time.perf_counter() - start_at
        after = evaluate(after_pair[0], test)[0]
        after_pair[0].train()
        losses = [step(after_pair, batch) for batch in first]
        calm = losses if name == "no growth" else calm
        train = batches(1000 + seed)  # every method sees the same batches in the same order
        for _ in range(3):
            for batch in train:
                step(after_pair, batch)
        loss, accuracy = evaluate(after_pair[0], test)
        found[name] = {
            "at once": after - before,
            "spike": max(a - b for a, b in zip(losses, calm, strict=True)),
            "loss": loss,
            "accuracy": accuracy,
            "seconds": seconds,
            "width": width(after_pair[0]),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--sizes", default="8-32,64-128")
    parser.add_argument("--write", action="store_true", help="write docs/growth.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = get_data_loaders(batch_size=128, train_limit=options.samples)
    lines = [
        "| hidden units | method | reached | change of the test loss at once | spike | test loss after 3 epochs "
        "| accuracy | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sizes in options.sizes.split(","):
        start, to = map(int, sizes.split("-"))
        runs = [measure(start, to, seed, train, test) for seed in range(options.seeds)]
        for name in METHODS:
            row = {k: mean(r[name][k] for r in runs) for k in runs[0][name]}
            lines.append(
                f"| {start} to {to} | {name} | {row['width']:.0f} | {row['at once']:+.1e} | {row['spike']:+.3f} | "
                f"{row['loss']:.4f} ({min(r[name]['loss'] for r in runs):.4f} to "
                f"{max(r[name]['loss'] for r in runs):.4f}) | {row['accuracy']:.2%} | {row['seconds']:.1f} |"
            )
    text = "\n".join(lines)
    print(text)
    if options.write:
        known = importlib.util.find_spec("gromo")
        gromo = f", gromo {importlib.metadata.version('gromo')}" if known else ""
        PAGE.write_text(
            f"# Growth in mid-training\n\nMade by `benchmarks/growth.py` on {datetime.date.today()}, torch "
            f"{torch.__version__}{gromo}, {os.cpu_count()} cores, one thread, {options.seeds} seeds (in brackets: the "
            "least and the greatest). 784-h-64-10 with ReLU, Adam 1e-3, "
            "Fashion-MNIST: three epochs, growth of h, three more. Spike: the largest excess of a training batch's "
            "loss over that of the network left as it is, on the same batches, in 50 steps. Seconds: of the growth "
            "itself, with its statistics over 10,240 training images where it takes any.\n\n"
            + text
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
