"""All calls for watching, on real images: a network is observed, reported, advised, and made smaller by the advice."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

set_seed(0)
folder = Path(tempfile.mkdtemp())
train, test = get_data_loaders(batch_size=64, train_limit=2_000, test_limit=500)
model = FashionMLP(hidden_sizes=[64, 32])
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
tracker = NeuronTracker()

neuron_map = tracker.track_model(model, "Training Experiment", example_inputs=test.images[:16])
assert tracker.get_summary()["total_neurons"] == sum(map(len, neuron_map.values())) == 106
print(tracker.get_neuron_info(neuron_id=70))

tracker.register_activation_hooks(model)
tracker.attach_optimizer(optimizer)
for epoch in range(3):
    loss, accuracy = train_epoch(model, train, nn.CrossEntropyLoss(), optimizer, tracker)
    tracker.log_epoch_statistics(epoch, loss, accuracy)
tracker.save_training_history(folder / "training_history.json")
tracker.load_training_history(folder / "training_history.json")
print(tracker.get_neuron_evolution(neuron_id=42)["mean"])

tracker.start_tracking(enable_correlation_analysis=True)
before = evaluate(model, test)[1]
tracker.stop_tracking()
tracker.print_activation_summary()
tracker.print_dataset_summary()
for layer, stats in tracker.get_layer_summary().items():
    print(
        f"{layer}: {stats['dead_percentage']:.1f}% dead, fires {stats['avg_firing_frequency']:.2f}"
    )
print({layer: len(dead) for layer, dead in tracker.get_dead_neurons().items()})
tracker.print_correlation_analysis()
print(tracker.find_redundant_neurons(correlation_threshold=0.9)["fc1"][:2])
print(tracker.get_redundancy_summary()["fc1"]["redundancy_rate"])

tracker.generate_neuron_report(show_heatmap=True, save_heatmap=folder / "heatmap.png")
tracker.generate_pruning_recommendations(top_n=20)
tracker.save_report_to_file(folder / "report.txt", include_heatmap=True)

tracker.calibrate(train)
advice = tracker.generate_optimization_recommendations(
    pruning_threshold=0.01, redundancy_threshold=0.9, saturation_threshold=0.95
)
tracker.save_optimization_recommendations(folder / "optimization.json")
tracker.print_optimization_recommendations()
print({kind: len(advice[kind]) for kind in ("prune", "merge", "expand")})

receipt = tracker.apply_recommendations(folder / "optimization.json")
print(receipt)
after = evaluate(model, test)[1]
print(f"test accuracy {before:.1%}, after the advice {after:.1%}")
assert {p.name for p in folder.iterdir()} > {"heatmap.png", "report.txt", "optimization.json"}
assert after > before - 0.03
