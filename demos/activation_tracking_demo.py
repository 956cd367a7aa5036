"""What excites a neuron? One window of statistics for each kind of clothing answers."""

import torch
from _common import quick
from torch import nn

from data.fashion_mnist import CLASSES
from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

LAYER = "fc2"

set_seed(0)
train, test = get_data_loaders(batch_size=64, train_limit=quick(20_000), test_limit=quick(10_000))
model = FashionMLP([64, 32])
optimizer = torch.optim.Adam(model.parameters())
train_epoch(model, train, nn.CrossEntropyLoss(), optimizer)
print(f"Data: {train.source}")
print(
    f"After one epoch on {train.num_samples:,} pictures: {evaluate(model, test)[1]:.1%} correct\n"
)

tracker = NeuronTracker()
ids = tracker.track_model(model, "FashionMLP")[LAYER]
tracker.register_activation_hooks(model)
means = torch.zeros(len(CLASSES), len(ids))
with torch.no_grad():
    for label in range(len(CLASSES)):
        tracker.start_tracking()  # a fresh window
        model.eval()(test.images[test.labels == label])
        tracker.stop_tracking()
        means[label] = torch.tensor([tracker.get_neuron_stats(n)["mean"] for n in ids])

# All classes together, for the scale of each neuron.
tracker.start_tracking()
evaluate(model, test)
tracker.stop_tracking()
stats = tracker.get_dataset_statistics()
overall = torch.tensor([stats[n]["mean"] for n in ids])
spread = torch.tensor([stats[n]["std_deviation"] for n in ids])
excitement = (means - overall) / spread.clamp(min=1e-6)  # a silent neuron has no spread

print(f"The neuron of {LAYER} that each kind of clothing excites most:")
print(f"{'class':<14} {'neuron':<8} {'mean on class':<15} {'mean on all':<13} deviations above")
for label, name in enumerate(CLASSES):
    best = int(excitement[label].argmax())
    print(
        f"{name:<14} {ids[best]:<8} {means[label, best]:<15.2f} {overall[best]:<13.2f} "
        f"{excitement[label, best]:.2f}"
    )
