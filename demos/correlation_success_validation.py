"""Correlation analysis, checked: planted twins are found, and all pairs equal numpy.corrcoef."""

import numpy as np
import torch
from _checks import Checks, stored
from _common import quick
from _planting import plant_dead, plant_twin
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

# (layer, original, twin, scale); the negated twin sits where no ReLU cuts it in half.
TWINS = [("fc1", 0, 8, 1.0), ("fc1", 5, 30, 2.5), ("fc2", 1, 9, 0.3), ("fc_out", 2, 7, -1.0)]
STILL = {"fc1": 20, "fc2": 4}  # neurons that never vary
THRESHOLD = 0.9

set_seed(0)
checks = Checks("Correlation analysis")
train, test = get_data_loaders(train_limit=quick(10_000), test_limit=quick(10_000))
model = FashionMLP([32, 16])
train_epoch(model, train, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
for layer, original, twin, scale in TWINS:
    plant_twin(model.get_submodule(layer), original, twin, scale, lift=3.0)
for layer, slot in STILL.items():
    plant_dead(model.get_submodule(layer), [slot])

tracker = NeuronTracker()
neuron_map = tracker.track_model(model, "FashionMLP")
tracker.register_activation_hooks(model)


def window(batch_size: int) -> dict[str, dict[tuple[int, int], float]]:
    """Correlations of all pairs of slots, by layer, in a fresh window over the test set."""
    tracker.start_tracking(enable_correlation_analysis=True)
    batches = zip(test.images.split(batch_size), test.labels.split(batch_size), strict=True)
    evaluate(model, list(batches))
    tracker.stop_tracking()
    return {
        layer: {(a - neuron_map[layer][0], b - neuron_map[layer][0]): r for a, b, r in pairs}
        for layer, pairs in tracker.find_redundant_neurons(correlation_threshold=0.0).items()
    }


with stored(model, list(neuron_map)) as kept:
    found = window(batch_size=64)
expected = {}
with np.errstate(invalid="ignore"):  # a neuron that does not vary: NaN
    for layer, batches in kept.items():
        r = np.corrcoef(np.concatenate(batches), rowvar=False)
        i, j = np.triu_indices(len(r), 1)
        varies = ~np.isnan(r[i, j])
        rows = zip(i[varies].tolist(), j[varies].tolist(), r[i, j][varies].tolist(), strict=True)
        expected[layer] = {(a, b): value for a, b, value in rows}

for layer, original, twin, scale in TWINS:
    r = found[layer].get((original, twin), 0.0)
    name = f"planted twin {layer}[{twin}] = {scale:g} * {layer}[{original}]"
    checks.check(name, r * np.sign(scale) > 0.9999, f"correlation {r:+.6f}")
for layer, slot in STILL.items():
    pairs = sum(slot in pair for pair in found[layer])
    checks.check(f"constant {layer}[{slot}] is in no pair", pairs == 0, f"{pairs} pairs")

for layer in found:
    same = found[layer].keys() == expected[layer].keys()
    checks.check(f"all pairs of {layer} are there", same, f"{len(found[layer])} pairs")
    ours = [found[layer].get(pair, np.nan) for pair in expected[layer]]
    checks.close(
        f"pairs of {layer} equal numpy.corrcoef", ours, list(expected[layer].values()), 1e-5
    )

again, larger = window(batch_size=64), window(batch_size=500)
equal = again == found
checks.check(
    "a second run gives the same numbers, bit for bit", equal, "equal" if equal else "differ"
)
for layer in found:
    other = [larger[layer].get(pair, np.nan) for pair in found[layer]]
    checks.close(f"{layer} in batches of 500", other, list(found[layer].values()), 1e-5)

summary = tracker.get_redundancy_summary(THRESHOLD)
for layer, row in summary.items():
    strong = sum(abs(r) >= THRESHOLD for r in expected[layer].values())
    rate = strong / (row["total_neurons"] * (row["total_neurons"] - 1) / 2)
    right = row["redundant_pairs"] == strong and abs(row["redundancy_rate"] - rate) < 1e-12
    checks.check(f"summary of {layer}", right, f"{row['redundant_pairs']} pairs, expected {strong}")
checks.finish()
