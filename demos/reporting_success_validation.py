"""Reports, checked: rankings and columns against stored activations, and the pictures."""

import io
import re
from contextlib import redirect_stdout

import matplotlib.image
import numpy as np
import torch
from _checks import Checks, stored
from _common import REPORTS, VISUALIZATIONS, quick, wrote
from _planting import plant_dead, plant_twin
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

THRESHOLD, TOP, DEAD = 0.01, 10, [4, 33]

set_seed(0)
checks = Checks("Reporting")
train, test = get_data_loaders(train_limit=quick(10_000), test_limit=quick(10_000))
model = FashionMLP([64, 32])
train_epoch(model, train, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
plant_dead(model.fc1, DEAD)
plant_twin(model.fc2, original=2, twin=21)

tracker = NeuronTracker(activation_threshold=THRESHOLD)
neuron_map = tracker.track_model(model, "FashionMLP")
tracker.register_activation_hooks(model)
tracker.start_tracking(enable_correlation_analysis=True)
with stored(model, list(neuron_map)) as kept:
    evaluate(model, test)
tracker.stop_tracking()

heatmap = VISUALIZATIONS / "validation_heatmap.png"
with redirect_stdout(io.StringIO()) as screen:
    report = tracker.generate_neuron_report(False, save_heatmap=heatmap, top_n=TOP)
checks.check(
    "the report is printed", screen.getvalue() == report + "\n", f"{len(report):,} letters"
)


def table(head: str, text: str) -> list[list[str]]:
    """The words of each line of the table below the line that has `head`."""
    lines = text.partition(head)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    rows = lines[start : lines.index("", start)]
    return [line.split() for line in rows if not line.startswith("---")]


# Rankings: each neuron's own numbers, and no neuron left out that belongs there.
values = np.concatenate([np.concatenate(batches) for batches in kept.values()], axis=1)
frequencies = (np.abs(values) > THRESHOLD).mean(0)
for title, best in (
    (f"TOP {TOP} MOST ACTIVE", np.sort(frequencies)[::-1][:TOP]),
    (f"TOP {TOP} LEAST ACTIVE", np.sort(frequencies)[:TOP]),
):
    rows = table(title, report)
    ids = [int(row[1]) for row in rows]
    places = [(row[2], int(row[3])) for row in rows] == [tracker.get_neuron_info(n) for n in ids]
    checks.check(
        f"{title}: {TOP} different neurons, each in its place",
        len(set(ids)) == TOP and places,
        f"{ids}",
    )
    checks.close(f"{title}: frequency", [float(row[4]) for row in rows], frequencies[ids], 5.1e-4)
    checks.close(f"{title}: mean", [float(row[5]) for row in rows], values.mean(0)[ids], 6e-5)
    checks.close(f"{title}: the right ones", frequencies[ids], best, 1e-12)

*layers, total = table("Redundant    Red %", report)
sums = [sum(int(row[column]) for row in layers) for column in (1, 2, 4)]
shown = [int(total[column]) for column in (1, 2, 4)]
checks.check("neurons, dead and redundant add up", sums == shown and shown[0] == 106, f"{shown}")
dead = int((frequencies == 0).sum())
checks.check("dead of all layers", shown[1] == dead, f"{shown[1]}, recomputed {dead}")
shares = [[float(row[3]), float(row[5])] for row in (*layers, total)]
expected = [[100 * int(row[c]) / int(row[1]) for c in (2, 4)] for row in (*layers, total)]
checks.close("percentages of the layers", shares, expected, 0.051)

candidates = table("PRUNING CANDIDATES", report)
scores = [float(row[5]) for row in candidates]
checks.check("pruning candidates come in order", scores == sorted(scores), f"scores {scores}")
marks = [row[4] == "DEAD" for row in candidates]
led = marks == [rank < dead for rank in range(TOP)]
checks.check("the dead lead them", led, f"{sum(marks)} marked, {dead} dead in all")

path = tracker.save_report_to_file(REPORTS / "validation_report.txt", include_heatmap=True)
text = path.read_text(encoding="utf-8")
titles = re.findall(r"^([A-Z][A-Z -]+)\n={20,}$", text, re.MULTILINE)
checks.check(
    "the file has all four reports", len(titles) == 4 and report in text, ", ".join(titles)
)
with redirect_stdout(io.StringIO()) as screen:
    tracker.print_dataset_summary()
checks.check("the file has what was printed", screen.getvalue().strip() in text, "dataset summary")

beside = path.with_name("validation_report_heatmap.png")
for picture in (heatmap, beside):
    pixels = matplotlib.image.imread(picture)[..., :3]
    height, width = pixels.shape[:2]
    signature = picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    large = signature and width >= 800 and height >= 300
    checks.check(f"{picture.name} is a PNG of some size", large, f"{width} x {height}")
    red = np.all(np.abs(pixels - np.array([214, 39, 40]) / 255) < 0.02, axis=2)
    checks.check("it shows the dead in red", red.sum() > 100, f"{red.sum():,} red pixels")
wrote(heatmap, path, beside)
checks.finish()
