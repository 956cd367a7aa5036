"""The main job: train on Fashion-MNIST while every neuron is watched, then say what was found.

Leaves the history and the recommendations as JSON, a report, and pictures in outputs/.
"""

import time

import torch
from _common import LOGS, REPORTS, VISUALIZATIONS, quick, wrote
from torch import nn

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
    print(
        "An activation is what a layer puts out, before its ReLU: there nearly all neurons fire,\n"
        "and what is silent only behind the ReLU does not count as dead yet. The network was\n"
        "watched, not changed: demos/surgery_demo.py removes neurons in mid-training.\n"
    )


def main() -> None:
    started = time.perf_counter()
    set_seed(0)
    train, test = get_data_loaders(train_limit=quick(60_000), test_limit=quick(10_000))
    print(f"Data: {train.source}; {train.num_samples:,} to train, {test.num_samples:,} to test")
    model = FashionMLP(list(HIDDEN.values()))
    engine = NeuronEngine()
    engine.track_model(model, "FashionMLP")
    print(f"Watching {engine.get_summary()['total_neurons']} neurons of {list(HIDDEN)} and fc_out")

    train_and_watch(model, engine, train, test)

    engine.start_tracking(enable_correlation_analysis=True)
    _, accuracy = evaluate(model, test, progress=True)
    engine.stop_tracking()
    print(f"\nTest accuracy {accuracy:.2%}. What {test.num_samples:,} test images showed:")
    summarise(engine)
    write_results(engine)
    print(f"Done in {time.perf_counter() - started:.0f} s. Read neuron_report.txt first.")


if __name__ == "__main__":
    main()
