"""The main job: train on Fashion-MNIST while every neuron is watched, say what was found, and act on it.

Neurons are merged and pruned as recommended, the network is compressed, and a layer is expanded; accuracy, parameters,
FLOPs and latency are shown after each. Leaves the history and the recommendations as JSON, a report, and pictures in
outputs/.
"""

import time
from pathlib import Path

import torch
from _common import LOGS, REPORTS, VISUALIZATIONS, quick, wrote
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronEngine

EPOCHS = 5
HIDDEN = {"fc1": 128, "fc2": 64}


def train_and_watch(model: nn.Module, engine: NeuronEngine, train, test) -> None:
    """Train; the statistics of each epoch go into the history."""
    optimizer = torch.optim.Adam(model.parameters())
    for epoch in range(1, EPOCHS + 1):
        loss, accuracy = train_epoch(model, train, nn.CrossEntropyLoss(), optimizer, engine)
        engine.log_epoch_statistics(epoch, loss, accuracy)
        _, test_accuracy = evaluate(model, test)
        print(
            f"Epoch {epoch} of {EPOCHS}: loss {loss:.4f}, accuracy {accuracy:.2%}, "
            f"on the test set {test_accuracy:.2%}"
        )


def write_results(engine: NeuronEngine) -> None:
    """Everything that the engine knows, for programs and for people."""
    history = engine.save_training_history(LOGS / "training_history.json")
    recommended = engine.save_optimization_recommendations(LOGS / "recommendations.json")
    report = engine.save_report_to_file(REPORTS / "neuron_report.txt", include_heatmap=False)
    pictures = [VISUALIZATIONS / f"{name}.png" for name in ("activity_heatmap", "evolution")]
    engine.plot_activity_heatmap(pictures[0])
    engine.plot_evolution(pictures[1])
    for layer in HIDDEN:
        pictures.append(VISUALIZATIONS / f"correlation_{layer}.png")
        engine.plot_correlation_matrix(layer, pictures[-1])
    wrote(history, recommended, report, *pictures)


def summarise(engine: NeuronEngine) -> None:
    """A few lines for the screen."""
    redundancy = engine.get_redundancy_summary()
    print(
        f"\n{'layer':<8} {'neurons':<8} {'dead':<6} {'constant':<9} pairs with |correlation| >= 0.9"
    )
    for layer, row in engine.get_layer_summary().items():
        print(
            f"{layer:<8} {row['total_neurons']:<8} {row['dead_neurons']:<6} "
            f"{row['constant_neurons']:<9} {redundancy[layer]['redundant_pairs']}"
        )
    recommendations = engine.generate_optimization_recommendations()
    counts = recommendations["statistics"]
    print(
        f"\nRecommended: neurons to prune: {counts['total_prunable_neurons']}, pairs to merge: "
        f"{counts['total_mergeable_pairs']}, layers to expand: {counts['layers_needing_expansion']}"
    )
    for pair in recommendations["merge"][:3]:
        keep, drop = pair["local_indices"]
        print(
            f"  {pair['layer_name']}[{drop}] into {pair['layer_name']}[{keep}]: "
            f"correlation {pair['correlation']:+.3f}"
        )
    for layer in recommendations["expand"]:
        print(f"  {layer['layer_name']}: {layer['reason']}, fires in {layer['avg_activity']:.1%}")
    print("An activation is what the next layer reads, behind the ReLU.\n")


def change(engine: NeuronEngine, model: nn.Module, train, test) -> None:
    """Act on what was found, without any training in between, and measure after each change."""
    sample = next(iter(test))[0]
    rows = [measured("as trained", model, test, sample)]
    engine.calibrate((images for images, _ in train), limit=80)
    advice = engine.generate_optimization_recommendations()
    steps = {"recommendations applied": lambda: engine.apply_recommendations(advice)}
    if not advice["prune"] and not advice["merge"]:
        steps = {}
        print("Nothing was recommended.")
    steps["compressed to half its neurons"] = lambda: engine.compress(
        0.5, of="neurons", progress=False
    )
    steps["fc1 expanded by 32"] = lambda: engine.expand_layer("fc1", 32)
    for name, step in steps.items():
        receipt = step()
        print(f"{receipt}\n")
        rows.append(measured(name, model, test, sample))
    print(f"{'':<32} {'accuracy':>9} {'parameters':>11} {'FLOPs':>13} {'latency':>9}")
    for name, accuracy, parameters, flops, seconds in rows:
        print(
            f"{name:<32} {accuracy:>9.2%} {parameters:>11,} {flops:>13,} {seconds * 1e6:>6.0f} µs"
        )
    wrote(picture(rows, VISUALIZATIONS / "changes.png"))


def measured(name: str, model: nn.Module, test, sample: torch.Tensor) -> tuple:
    """Name, test accuracy, parameters, FLOPs of one batch, seconds of one batch (median of 50)."""
    _, accuracy = evaluate(model, test)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(sample)
    times = []
    with torch.no_grad():
        for _ in range(50):
            start = time.perf_counter()
            model(sample)
            times.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    return name, accuracy, parameters, counter.get_total_flops(), sorted(times)[25]


def picture(rows: list[tuple], path: Path) -> Path:
    """Accuracy beside what it costs, change by change."""
    import matplotlib.pyplot as plt

    names = [row[0] for row in rows]
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True, layout="constrained")
    titles = ("test accuracy", "parameters", "FLOPs of a batch", "latency of a batch, µs")
    for column, (ax, title) in enumerate(zip(axes, titles, strict=True), start=1):
        values = [row[column] * (1e6 if column == 4 else 1) for row in rows]
        ax.barh(names, values, color=["#7f7f7f"] + ["#1f77b4"] * (len(rows) - 1))
        ax.set_title(title, fontsize=10)
        if column == 1:
            ax.set_xlim(min(values) - 0.02, max(values) + 0.005)
        ax.ticklabel_format(
            axis="x", style="plain" if column in (1, 4) else "sci", scilimits=(0, 0)
        )
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def main() -> None:
    started = time.perf_counter()
    set_seed(0)
    train, test = get_data_loaders(train_limit=quick(60_000), test_limit=quick(10_000))
    print(f"Data: {train.source}; {train.num_samples:,} to train, {test.num_samples:,} to test")
    model = FashionMLP(list(HIDDEN.values()))
    engine = NeuronEngine()
    engine.track_model(model, "FashionMLP", example_inputs=next(iter(test))[0])
    print(f"Watching {engine.get_summary()['total_neurons']} neurons of {list(HIDDEN)} and fc_out")

    train_and_watch(model, engine, train, test)

    _, accuracy = evaluate(model, test)
    engine.start_tracking(enable_correlation_analysis=True)
    evaluate(model, train, progress=True)
    engine.stop_tracking()
    print(f"\nTest accuracy {accuracy:.2%}. What {train.num_samples:,} training images showed:")
    summarise(engine)
    write_results(engine)
    print("\nNow the network is changed, without any training in between:\n")
    change(engine, model, train, test)
    print(f"Done in {time.perf_counter() - started:.0f} s. Read neuron_report.txt first.")


if __name__ == "__main__":
    main()
