"""Main verification: every documented call, on NeuronEngine and on NeuronTracker, in seconds.

Run it with `python test_tracker.py`; it needs nothing but requirements.txt. A line per check, and
exit status 1 if one fails. The deeper tests are in tests/ (`make test`).
"""

import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # no window, also where there could be one

import torch
from torch import nn

from fashion_mnist_mlp import FashionMLP, get_data_loaders, set_seed, train_epoch
from tracker import NeuronEngine, NeuronTracker

results: list[bool] = []


def check(call: str, passed: bool) -> None:
    results.append(passed)
    print(f"  {'ok  ' if passed else 'FAIL'} {call}")


def near(value: float, expected: torch.Tensor) -> bool:
    return abs(value - expected.item()) < 1e-5


def printed(call: Callable[..., object], *args: object, **options: object) -> str:
    """What a call prints."""
    with redirect_stdout(io.StringIO()) as screen:
        call(*args, **options)
    return screen.getvalue()


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def identity(tracker_class: type[NeuronEngine]) -> None:
    engine = tracker_class()
    neuron_map = engine.track_model(sequential(), "My Model")
    check("track_model", neuron_map == {"0": list(range(256)), "2": list(range(256, 266))})
    check("get_summary", engine.get_summary()["total_neurons"] == 266)
    check("get_neuron_info", engine.get_neuron_info(neuron_id=128) == ("0", 128))


def activations(tracker_class: type[NeuronEngine]) -> None:
    model, tracker = sequential(), tracker_class()
    tracker.track_model(model, "My Model")
    with torch.no_grad():
        model[0].weight[[7, 99]] = 0.0  # two neurons that put out zero
        model[0].bias[[7, 99]] = 0.0
        model[0].weight[42] = 2 * model[0].weight[41]  # and one that repeats another, twice as loud
        model[0].bias[42] = 2 * model[0].bias[41]
    batches = torch.randn(5, 64, 784).unbind()

    tracker.register_activation_hooks(model)
    tracker.start_tracking()
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    tracker.stop_tracking()

    # What the engine should have seen: neurons as their consumers read them, behind the ReLU.
    observed = model[:2](torch.cat(batches)).detach().double()
    fired = (observed.abs() > 0.01).double()
    check("print_activation_summary", "Neuron ID" in printed(tracker.print_activation_summary))
    stats = tracker.get_neuron_stats(neuron_id=42)
    check("get_neuron_stats: mean", near(stats["mean"], observed[:, 42].mean()))
    check("get_neuron_stats: variance", near(stats["variance"], observed[:, 42].var(correction=0)))
    check(
        "get_neuron_stats: sparsity",
        near(stats["sparsity"], (observed[:, 42] != 0).double().mean()),
    )
    check("get_neuron_stats: batches", stats["batches"] == 5)

    check("print_dataset_summary", "processed: 320" in printed(tracker.print_dataset_summary))
    layer = tracker.get_layer_summary()["0"]
    check("get_layer_summary: dead_percentage", layer["dead_percentage"] == 100 * 2 / 256)
    frequency = layer["avg_firing_frequency"]
    check("get_layer_summary: avg_firing_frequency", near(frequency, fired.mean()))
    check("get_dead_neurons", tracker.get_dead_neurons() == {"0": [7, 99], "2": []})
    statistics = tracker.get_dataset_statistics()
    activities = [(nid, stats["firing_frequency"]) for nid, stats in statistics.items()]
    activities.sort(key=lambda pair: pair[1], reverse=True)
    check("get_dataset_statistics", len(activities) == 266 and activities[-1][1] == 0)

    tracker.start_tracking(enable_correlation_analysis=True)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    tracker.stop_tracking()
    check("print_correlation_analysis", "(41, 42)" in printed(tracker.print_correlation_analysis))
    pairs = tracker.find_redundant_neurons(correlation_threshold=0.9)["0"]
    check("find_redundant_neurons", [pair[:2] for pair in pairs] == [(41, 42)])
    summary = tracker.get_redundancy_summary()["0"]
    check("get_redundancy_summary: redundant_pairs", summary["redundant_pairs"] == 1)
    check("get_redundancy_summary: rate", summary["redundancy_rate"] == 1 / (256 * 255 / 2))


def history(tracker_class: type[NeuronEngine], folder: Path) -> None:
    set_seed(0)
    train_loader, _ = get_data_loaders(train_limit=1_000, test_limit=1)
    model = FashionMLP(hidden_sizes=[64, 32])
    optimizer = torch.optim.Adam(model.parameters())
    tracker = tracker_class()
    tracker.track_model(model, "Training Experiment")
    tracker.register_activation_hooks(model)
    losses = []
    for epoch in range(3):
        train_loss, train_acc = train_epoch(
            model, train_loader, nn.CrossEntropyLoss(), optimizer, tracker, progress=False
        )
        tracker.log_epoch_statistics(epoch, train_loss, train_acc)
        losses.append(train_loss)
    before = tracker.get_neuron_evolution(neuron_id=42)
    check("log_epoch_statistics", before["loss"] == losses and losses[2] < losses[0])

    path = folder / "training_history.json"
    tracker.save_training_history(path)
    size = json.loads(path.read_text(encoding="utf-8"))["metadata"]["total_neurons"]
    check("save_training_history", size == 106)
    tracker.load_training_history(path)
    after = tracker.get_neuron_evolution(neuron_id=42)
    check("load_training_history", after == before)
    check("get_neuron_evolution", len(after["mean"]) == 3 and after["loss"] == losses)


def reports(tracker_class: type[NeuronEngine], folder: Path) -> None:
    set_seed(0)
    model, tracker = FashionMLP(hidden_sizes=[64, 32]), tracker_class()
    with torch.no_grad():
        model.fc1.weight[5], model.fc1.bias[5] = 0.0, 0.0  # dead
        model.fc2.weight[9], model.fc2.bias[9] = model.fc2.weight[2], model.fc2.bias[2]  # twins
    tracker.track_model(model, "Reports")
    tracker.start_tracking(enable_correlation_analysis=True)
    with torch.no_grad():
        model(torch.randn(500, 784))
    tracker.stop_tracking()

    picture = folder / "activity_heatmap.png"
    text = printed(tracker.generate_neuron_report, show_heatmap=True, save_heatmap=picture)
    check("generate_neuron_report", "TOP 10 MOST ACTIVE" in text)
    check("generate_neuron_report: heatmap", picture.read_bytes().startswith(b"\x89PNG"))
    text = printed(tracker.generate_pruning_recommendations, top_n=20)
    check("generate_pruning_recommendations", "TOP 20" in text and "DEAD" in text)
    path = folder / "comprehensive_report.txt"
    tracker.save_report_to_file(path, include_heatmap=True)
    check("save_report_to_file", "LAYER SUMMARY" in path.read_text(encoding="utf-8"))
    check("save_report_to_file: heatmap", path.with_name(f"{path.stem}_heatmap.png").exists())

    recommendations = tracker.generate_optimization_recommendations(
        pruning_threshold=0.01, redundancy_threshold=0.9, saturation_threshold=0.95
    )
    candidates = [(c["neuron_id"], c["reason"]) for c in recommendations["prune"]]
    check("generate_optimization_recommendations: prune", candidates == [(5, "dead")])
    pairs = [c["neuron_pair"] for c in recommendations["merge"]]
    check("generate_optimization_recommendations: merge", pairs == [[66, 73]])
    sizes = [(c["layer_name"], c["current_size"]) for c in recommendations["expand"]]
    check("generate_optimization_recommendations: expand", ("fc1", 64) not in sizes)
    path = folder / "optimization.json"
    tracker.save_optimization_recommendations(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    check("save_optimization_recommendations", saved == recommendations)
    text = printed(tracker.print_optimization_recommendations)
    check("print_optimization_recommendations", "PRUNE: 1 neuron\n" in text)


def run(section: Callable[..., None], *args: object) -> None:
    """One broken section must not hide the others."""
    try:
        section(*args)
    except Exception:
        traceback.print_exc()
        check(f"{section.__name__} runs to its end", False)


def main() -> int:
    set_seed(0)
    for name, tracker_class in (("NeuronEngine", NeuronEngine), ("NeuronTracker", NeuronTracker)):
        print(name)
        with tempfile.TemporaryDirectory() as folder:
            run(identity, tracker_class)
            run(activations, tracker_class)
            run(history, tracker_class, Path(folder))
            run(reports, tracker_class, Path(folder))
    print(f"{sum(results)} of {len(results)} checks passed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
