"""Recommendations, checked: planted faults are named, the JSON fits, nothing conflicts."""

import json

import numpy as np
import torch
from _checks import Checks, schema_problems, stored
from _common import LOGS, quick, wrote
from _planting import plant_busy, plant_dead, plant_twin
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

DEAD, TWINS = [3, 30, 61], {(4, 20): 1.0, (9, 31): 2.0}
PRUNING, REDUNDANCY, SATURATION = 0.01, 0.99, 0.95

set_seed(0)
checks = Checks("Optimization recommendations")
train, test = get_data_loaders(train_limit=quick(10_000), test_limit=quick(10_000))
model = FashionMLP([64, 32, 8])
train_epoch(model, train, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
plant_dead(model.fc1, DEAD)
for (original, twin), scale in TWINS.items():
    plant_twin(model.fc2, original, twin, scale, lift=3.0)
plant_busy(model, model.fc3, test.images)

tracker = NeuronTracker()
neuron_map = tracker.track_model(model, "FashionMLP")
tracker.register_activation_hooks(model)
tracker.start_tracking(enable_correlation_analysis=True)
with stored(model, list(neuron_map)) as kept:
    evaluate(model, test)
tracker.stop_tracking()
values = {layer: np.concatenate(batches) for layer, batches in kept.items()}
everything = np.concatenate(list(values.values()), axis=1)  # columns are neuron ids
frequencies = (np.abs(everything) > tracker.activation_threshold).mean(0)

returned = tracker.generate_optimization_recommendations(PRUNING, REDUNDANCY, SATURATION)
path = tracker.save_optimization_recommendations(LOGS / "validation_recommendations.json")
advice = json.loads(path.read_text(encoding="utf-8"))
prune, merge, expand = advice["prune"], advice["merge"], advice["expand"]

problems = schema_problems(advice, "optimization_recommendations.json")
checks.check("the JSON fits its schema", not problems, "; ".join(problems[:3]) or "no deviation")
checks.check(
    "the file holds what was returned", advice == returned, f"{path.stat().st_size:,} bytes"
)

reasons = {(c["layer_name"], c["local_index"]): c["reason"] for c in prune}
found = [reasons.get(("fc1", slot)) for slot in DEAD]
checks.check("planted dead neurons are to be pruned", found == ["dead"] * 3, f"reasons {found}")
seldom = {
    n for layer in ("fc1", "fc2", "fc3") for n in neuron_map[layer] if frequencies[n] < PRUNING
}
still = set(np.flatnonzero(everything.std(0) == 0).tolist())
named = {c["neuron_id"] for c in prune}
checks.check(
    "to be pruned are exactly those that seldom fire or never vary",
    named == seldom | still,
    f"{len(named)} named, {len(seldom | still)} recomputed",
)

for pair, scale in TWINS.items():
    hits = [c for c in merge if c["layer_name"] == "fc2" and tuple(c["local_indices"]) == pair]
    right = len(hits) == 1 and abs(hits[0]["scale"] - scale) < 1e-3
    shown = f"scale {hits[0]['scale']:.4f}, {hits[0]['merge_strategy']}" if hits else "not there"
    checks.check(f"planted twins fc2{list(pair)} are to be merged", right, shown)
residues, correlations = [], []
for candidate in merge:
    keep, drop = (everything[:, n] for n in candidate["neuron_pair"])
    left = drop - candidate["scale"] * keep - candidate["offset"]
    residues.append(1 - left.var() / drop.var() - candidate["explained_variance"])
    correlations.append(np.corrcoef(keep, drop)[0, 1] - candidate["correlation"])
checks.close("correlation of each pair", correlations, np.zeros(len(merge)), 1e-5)
checks.close("explained variance of each pair", residues, np.zeros(len(merge)), 1e-5)

layers = [c["layer_name"] for c in expand]
grown = [c["current_size"] + c["suggested_expansion"] for c in expand]
checks.check("the busy layer is to be expanded", "fc3" in layers, f"{layers} to {grown} neurons")
busy = [frequencies[neuron_map[c["layer_name"]]].mean() for c in expand]
checks.close("its activity", [c["avg_activity"] for c in expand], busy, 1e-9)
checks.check(
    "expanded layers are above the threshold",
    min((c["saturation"] for c in expand), default=0) >= SATURATION,
    str([round(c["saturation"], 3) for c in expand]),
)

folded = [c["neuron_pair"][1] for c in merge]
kept_ids = {c["neuron_pair"][0] for c in merge}
clash = named & (set(folded) | kept_ids)
checks.check("no neuron is to be pruned and merged", not clash, f"{len(clash)} clashes")
twice = len(folded) - len(set(folded)) + len(set(folded) & kept_ids)
checks.check("no neuron is folded away twice, or into one that goes", twice == 0, f"{twice} cases")
shrinking = {c["layer_name"] for c in prune + merge} & set(layers)
checks.check("no layer is to shrink and grow", not shrinking, f"{len(shrinking)} layers")
untouched = "fc_out" not in {c["layer_name"] for c in prune + merge + expand}
checks.check(
    "the output layer is left alone", untouched, "fc_out not named" if untouched else "named"
)
counts = list(advice["statistics"].values())
lengths = [len(prune), len(merge), len(expand)]
checks.check("statistics count the lists", counts == lengths, f"{counts}, lists have {lengths}")
wrote(path)
checks.finish()
