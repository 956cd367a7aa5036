"""Eight twins are planted into a trained layer; correlation over the test set finds each pair."""

import torch
from _common import VISUALIZATIONS, quick, wrote
from _planting import plant_twin
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

set_seed(0)
train, test = get_data_loaders(batch_size=64, train_limit=quick(20_000), test_limit=quick(10_000))
model = FashionMLP([64, 16])
print(f"Data: {train.source}")
train_epoch(model, train, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))

# A twin says what its original says, half as loud to three times as loud.
scales = torch.linspace(0.5, 3.0, 8).tolist()
for original, scale in enumerate(scales):
    plant_twin(model.fc2, original, original + 8, scale, lift=3.0)

tracker = NeuronTracker()
first = tracker.track_model(model, "FashionMLP")["fc2"][0]
tracker.register_activation_hooks(model)
tracker.start_tracking(enable_correlation_analysis=True)
evaluate(model, test)
tracker.stop_tracking()
tracker.print_correlation_analysis()

redundant = tracker.find_redundant_neurons(correlation_threshold=0.999)["fc2"]
found = {(a - first, b - first) for a, b, _ in redundant}
planted = {(slot, slot + 8) for slot in range(8)}
print(f"\nPlanted twins found at |r| >= 0.999: {len(planted & found)} of {len(planted)}")
print(f"Other pairs as strong as that: {len(found - planted)}")
for layer, stats in tracker.get_redundancy_summary().items():
    print(f"{layer}: {stats['redundant_pairs']} pairs, {stats['redundancy_rate']:.1%} of all pairs")

path = VISUALIZATIONS / "correlation_demo_fc2.png"
tracker.plot_correlation_matrix("fc2", path)
wrote(path)
