"""Three layers with three planted faults: the recommendations name each one, as JSON for tools."""

import torch
from _common import LOGS, quick, wrote
from _planting import plant_busy, plant_dead, plant_twin
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

set_seed(0)
train, test = get_data_loaders(batch_size=64, train_limit=quick(20_000), test_limit=quick(10_000))
model = FashionMLP([64, 32, 8])
print(f"Data: {train.source}")
train_epoch(model, train, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))

plant_dead(model.fc1, [3, 30, 61])
plant_twin(model.fc2, original=4, twin=20, lift=3.0)
plant_twin(model.fc2, original=9, twin=31, scale=2.0, lift=3.0)
plant_busy(model, model.fc3, test.images)
print("Planted: fc1 3, 30, 61 dead; fc2 4 and 20, 9 and 31 twins; all of fc3 busy\n")

tracker = NeuronTracker()
tracker.track_model(model, "FashionMLP with faults")
tracker.register_activation_hooks(model)
tracker.start_tracking(enable_correlation_analysis=True)
evaluate(model, test)
tracker.stop_tracking()

recommendations = tracker.generate_optimization_recommendations(
    pruning_threshold=0.01, redundancy_threshold=0.99, saturation_threshold=0.95
)
tracker.print_optimization_recommendations()

print("\nThe same for a program:")
for candidate in recommendations["prune"]:
    print(f"prune  neuron {candidate['neuron_id']} ({candidate['reason']})")
for candidate in recommendations["merge"]:
    keep, drop = candidate["neuron_pair"]
    print(
        f"merge  {drop} into {keep} ({candidate['merge_strategy']}, scale {candidate['scale']:.3f})"
    )
for candidate in recommendations["expand"]:
    size, more = candidate["current_size"], candidate["suggested_expansion"]
    print(f"expand {candidate['layer_name']}: {size} to {size + more} neurons")

path = LOGS / "optimization_demo.json"
tracker.save_optimization_recommendations(path)
wrote(path)
