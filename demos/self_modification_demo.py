"""A network that changes itself while it learns, beside a fixed one: the same data, the same steps.

    python demos/self_modification_demo.py            # starts wide (784-512-256-10) and shrinks
    python demos/self_modification_demo.py --grow     # starts narrow (784-16-10) and grows

Prints what was decided, and accuracy, parameters and training FLOPs of both; leaves a picture of the network's life and
a checkpoint in outputs/.
"""

import argparse
from pathlib import Path

import torch
from _common import CHECKPOINTS, VISUALIZATIONS, quick, wrote
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed
from tracker import NeuronEngine, Policy

SHRINK = Policy(
    warm_up=900, every=300, look=64, tolerance=4e-3, at_most=0.7, floor=8, min_parameters=76_000
)
GROW = Policy(
    warm_up=100, every=100, look=16, shrink=False, grow=True, plateau=0.5, max_parameters=150_000
)


def step_flops(model: nn.Module, images: torch.Tensor) -> int:
    """Of one training step: the backward pass costs twice the forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return 3 * counter.get_total_flops()


def train(hidden: list[int], policy: Policy | None, epochs: int, seed: int, train_set, test_set):
    """Train; return model, engine, FLOPs and test accuracy."""
    set_seed(seed)
    model = FashionMLP(hidden)
    optimizer = torch.optim.Adam(model.parameters())
    engine = NeuronEngine()
    engine.track_model(model, "FashionMLP", example_inputs=next(iter(test_set))[0][:16])
    engine.attach_optimizer(optimizer)
    if policy is not None:
        engine.start_self_modification(policy)
    flops, each = 0, 0
    criterion = nn.CrossEntropyLoss()
    for _ in range(epochs):
        model.train()
        for images, labels in train_set:
            each = each or step_flops(model, images)
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            flops += each
            if policy is not None and engine.step(loss) is not None:
                each = 0
    return model, engine, flops, evaluate(model, test_set)[1]


def picture(engine: NeuronEngine, path: Path) -> Path:
    """Widths and loss over the steps, with what happened."""
    import matplotlib.pyplot as plt

    life = engine.life
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5.5), sharex=True, layout="constrained")
    steps = [d.step for d in life]
    for layer in life[0].widths:
        top.step(steps, [d.widths.get(layer, 0) for d in life], where="post", label=layer)
    top.set_ylabel("neurons")
    top.legend(loc="upper right")
    bottom.plot(steps[1:], [d.loss for d in life[1:]], color="#7f7f7f")
    bottom.set_ylabel("loss between two looks")
    bottom.set_xlabel("steps")
    colors = {"pruned": "#d62728", "expanded": "#2ca02c", "undone": "#ff7f0e", "refused": "#9467bd"}
    for decision in life:
        if decision.what in colors:
            for ax in (top, bottom):
                ax.axvline(decision.step, color=colors[decision.what], alpha=0.4, linewidth=1)
    top.set_title(
        "The life of a network (red: pruned, green: expanded, orange: undone)", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grow", action="store_true", help="start narrow")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    train_set, test_set = get_data_loaders(
        batch_size=128, train_limit=quick(60_000), test_limit=quick(10_000)
    )
    start, fixed = ([16], [256]) if options.grow else ([512, 256], [512, 256])
    rows = []
    for seed in range(options.seeds):
        model, engine, flops, accuracy = train(
            start, GROW if options.grow else SHRINK, options.epochs, seed, train_set, test_set
        )
        if seed == 0:
            for decision in engine.life:
                print(
                    f"step {decision.step:>5}  {decision.what:<8} {decision.why}; {decision.parameters:,} parameters"
                )
            wrote(
                picture(engine, VISUALIZATIONS / "network_life.png"),
                engine.save_checkpoint(CHECKPOINTS / "self_modified"),
            )
        rows.append(("self-modified", seed, accuracy, model, flops))
        model, _, flops, accuracy = train(fixed, None, options.epochs, seed, train_set, test_set)
        rows.append((f"fixed {fixed}", seed, accuracy, model, flops))
    print(f"\n{'':<18} {'seed':>4} {'accuracy':>9} {'parameters':>11} {'training FLOPs':>15}")
    for name, seed, accuracy, model, flops in rows:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name:<18} {seed:>4} {accuracy:>9.2%} {parameters:>11,} {flops:>15.3e}")


if __name__ == "__main__":
    main()
