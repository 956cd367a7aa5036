"""The activity report on screen, the same and more in a file, and a heatmap of every neuron."""

import torch
from _common import REPORTS, VISUALIZATIONS, quick, wrote
from _planting import plant_dead
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

set_seed(0)
train, test = get_data_loaders(batch_size=64, train_limit=quick(20_000), test_limit=quick(10_000))
model = FashionMLP([96, 48])
plant_dead(model.fc1, [7, 20, 63])  # so that the report has something to say
print(f"Data: {train.source}")
train_epoch(model, train, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))

tracker = NeuronTracker()
tracker.track_model(model, "FashionMLP [96, 48]")
tracker.register_activation_hooks(model)
tracker.start_tracking(enable_correlation_analysis=True)
evaluate(model, test)
tracker.stop_tracking()

heatmap = VISUALIZATIONS / "reporting_demo_heatmap.png"
tracker.generate_neuron_report(show_heatmap=False, save_heatmap=heatmap, top_n=5)

print("\nThe five least useful hidden neurons:")
tracker.generate_pruning_recommendations(top_n=5)

stats = tracker.get_dataset_statistics()
ranked = sorted(stats, key=lambda n: stats[n]["firing_frequency"])
for word, neuron_id in (("least", ranked[0]), ("most", ranked[-1])):
    layer, index = tracker.get_neuron_info(neuron_id)
    frequency = stats[neuron_id]["firing_frequency"]
    print(f"The {word} active neuron is {neuron_id} ({layer}[{index}]): fires in {frequency:.1%}")

report = tracker.save_report_to_file(REPORTS / "reporting_demo.txt", include_heatmap=True)
wrote(heatmap, report, report.with_name("reporting_demo_heatmap.png"))
