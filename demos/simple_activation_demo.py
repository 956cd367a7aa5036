"""Activations in three steps: register hooks, run the model, ask. Only statistics are kept."""

import torch
from _common import quick

from fashion_mnist_mlp import FashionMLP, get_data_loaders, set_seed
from tracker import NeuronTracker

NEURON = 5

set_seed(0)
_, test = get_data_loaders(batch_size=64, test_limit=quick(640))
model = FashionMLP([32, 16]).eval()

# 1. Hooks are silent until tracking starts.
tracker = NeuronTracker()
tracker.track_model(model, "FashionMLP")
tracker.register_activation_hooks(model)

# 2. From here on every forward pass counts.
tracker.start_tracking()
with torch.no_grad():
    for images, _ in test:
        model(images)
tracker.stop_tracking()

# 3. The first neurons of each layer, then one of them in full.
tracker.print_activation_summary(limit=4)
clothes = tracker.get_neuron_stats(NEURON)
print(f"\nNeuron {NEURON} is number {clothes['local_index']} of {clothes['layer_name']}:")
for key in ("mean", "variance", "min_activation", "max_activation", "sparsity", "batches"):
    print(f"  {key:<15} {clothes[key]:.4f}")

# Another start begins a fresh window: the same network, now looking at noise.
noise = torch.randn(640, 1, 28, 28, generator=torch.Generator().manual_seed(0))
tracker.start_tracking()
with torch.no_grad():
    model(noise)
tracker.stop_tracking()
static = tracker.get_neuron_stats(NEURON)
print(f"\nWhat neuron {NEURON} does with two kinds of pictures, a window for each:")
for kind, stats in (("clothes", clothes), ("noise", static)):
    print(f"  {kind:<8} mean {stats['mean']:+.3f}, standard deviation {stats['std_deviation']:.3f}")
