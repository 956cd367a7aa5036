"""Training history, checked: every logged number against a recomputation from stored values."""

import json

import numpy as np
import torch
from _checks import Checks, schema_problems, stored
from _common import LOGS, quick, wrote
from torch import Tensor, nn

from fashion_mnist_mlp import FashionMLP, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

EPOCHS, THRESHOLD = 3, 0.01

set_seed(0)
checks = Checks("Training history")
train, _ = get_data_loaders(train_limit=quick(5_000), test_limit=1)
model = FashionMLP([32, 16])
optimizer = torch.optim.Adam(model.parameters())
tracker = NeuronTracker(activation_threshold=THRESHOLD)
neuron_map = tracker.track_model(model, "FashionMLP")
tracker.register_activation_hooks(model)

logits_of_epochs: list[list[np.ndarray]] = []
labels_of_epochs: list[list[np.ndarray]] = []
values_of_epochs: list[dict[str, np.ndarray]] = []


def criterion(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss; what it is computed from is kept."""
    logits_of_epochs[-1].append(logits.detach().double().numpy())
    labels_of_epochs[-1].append(labels.numpy())
    return nn.functional.cross_entropy(logits, labels)


for epoch in range(EPOCHS):
    logits_of_epochs.append([])
    labels_of_epochs.append([])
    with stored(model, list(neuron_map)) as kept:
        loss, accuracy = train_epoch(model, train, criterion, optimizer, tracker, progress=False)
    tracker.log_epoch_statistics(epoch, loss, accuracy)
    values_of_epochs.append({layer: np.concatenate(b) for layer, b in kept.items()})

losses, accuracies = [], []
for logits, labels in zip(logits_of_epochs, labels_of_epochs, strict=True):
    z, y = np.concatenate(logits), np.concatenate(labels)
    z = z - z.max(1, keepdims=True)
    losses.append((np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]).mean())
    accuracies.append((z.argmax(1) == y).mean())

ids = [n for layer in neuron_map.values() for n in layer]
evolutions = [tracker.get_neuron_evolution(n) for n in ids]
checks.close("logged loss", evolutions[0]["loss"], losses, 1e-6)
checks.close("logged accuracy", evolutions[0]["accuracy"], accuracies, 1e-12)
shown = [f"{value:.4f}" for value in evolutions[0]["loss"]]
checks.check("the loss falls", losses == sorted(losses, reverse=True), " ".join(shown))
for key, statistic, tolerance in (
    ("mean", lambda a: a.mean(0), 1e-5),
    ("variance", lambda a: a.var(0), 1e-4),
    ("frequency", lambda a: (np.abs(a) > THRESHOLD).mean(0), 1e-12),
):
    expected = [np.concatenate([statistic(a) for a in v.values()]) for v in values_of_epochs]
    logged = np.array([evolution[key] for evolution in evolutions], np.float64).T
    checks.close(f"logged {key} of each neuron and epoch", logged, expected, tolerance)
epochs = {tuple(evolution["epochs"]) for evolution in evolutions}
checks.check("every neuron has every epoch", epochs == {tuple(range(EPOCHS))}, f"{epochs}")

path = tracker.save_training_history(LOGS / "validation_history.json")
content = json.loads(path.read_text(encoding="utf-8"))
problems = schema_problems(content, "training_history.json")
checks.check("the JSON fits its schema", not problems, "; ".join(problems[:3]) or "no deviation")
size = (content["metadata"]["total_epochs"], content["metadata"]["total_neurons"])
checks.check("the JSON counts right", size == (EPOCHS, len(ids)), f"(epochs, neurons) = {size}")

reader = NeuronTracker()
reader.load_training_history(path)
same = sum(reader.get_neuron_evolution(n) == e for n, e in zip(ids, evolutions, strict=True))
checks.check(
    "a fresh tracker reads it back", same == len(ids), f"{same} of {len(ids)} neurons equal"
)
copy = reader.save_training_history(LOGS / "validation_history_again.json")
equal = copy.read_bytes() == path.read_bytes()
checks.check("saved again, the same bytes", equal, f"{path.stat().st_size:,} bytes")
wrote(path, copy)
checks.finish()
