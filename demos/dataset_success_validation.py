"""Dataset analysis, checked: dead neurons and statistics against stored activations in float64."""

import numpy as np
import torch
from _checks import Checks, stored
from _common import quick
from _planting import plant_dead
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

THRESHOLD = 0.01
PLANTED = {"fc1": [3, 17, 40], "fc2": [0, 5, 31]}

set_seed(0)
checks = Checks("Dataset analysis")
train, test = get_data_loaders(train_limit=quick(10_000), test_limit=quick(10_000))
model = FashionMLP([64, 32])
for layer, slots in PLANTED.items():
    plant_dead(model.get_submodule(layer), slots)
train_epoch(model, train, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))

tracker = NeuronTracker(activation_threshold=THRESHOLD)
neuron_map = tracker.track_model(model, "FashionMLP")
tracker.register_activation_hooks(model)
tracker.start_tracking()
with stored(model, list(neuron_map)) as kept:
    evaluate(model, test)
tracker.stop_tracking()

values = {layer: np.concatenate(batches) for layer, batches in kept.items()}
fired = {layer: np.abs(a) > THRESHOLD for layer, a in values.items()}
silent = {layer: np.flatnonzero(~f.any(0)).tolist() for layer, f in fired.items()}
dead = tracker.get_dead_neurons()
found = {layer: [tracker.get_neuron_info(n)[1] for n in ids] for layer, ids in dead.items()}

planted_found = sum(slot in found[layer] for layer in PLANTED for slot in PLANTED[layer])
checks.check("every planted dead neuron is found", planted_found == 6, f"{planted_found} of 6")
checks.check(
    "dead are exactly those whose stored activations never fire",
    found == silent,
    f"reported {found}, recomputed {silent}",
)

stats = tracker.get_dataset_statistics()
ids = [n for layer in neuron_map for n in neuron_map[layer]]
for key, expected, tolerance in (
    ("firing_frequency", [f.mean(0) for f in fired.values()], 1e-12),
    ("mean_activation", [a.mean(0) for a in values.values()], 1e-5),
    ("std_deviation", [a.std(0) for a in values.values()], 1e-5),
    ("sparsity", [(a != 0).mean(0) for a in values.values()], 1e-12),
    ("min_activation", [a.min(0) for a in values.values()], 1e-12),
    ("max_activation", [a.max(0) for a in values.values()], 1e-12),
):
    checks.close(
        f"{key} of each neuron", [stats[n][key] for n in ids], np.concatenate(expected), tolerance
    )

samples = {stats[n]["total_samples"] for n in ids} | {stats[n]["observations"] for n in ids}
checks.check("every sample is counted once", samples == {test.num_samples}, f"{samples}")

summary = tracker.get_layer_summary()
checks.close(
    "dead_percentage of each layer",
    [summary[layer]["dead_percentage"] for layer in values],
    [100 * len(silent[layer]) / a.shape[1] for layer, a in values.items()],
    1e-9,
)
checks.close(
    "avg_firing_frequency of each layer",
    [summary[layer]["avg_firing_frequency"] for layer in values],
    [f.mean() for f in fired.values()],
    1e-9,
)
checks.finish()
