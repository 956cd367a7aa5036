"""What a notebook shows: pictures inline and once, reports once, lines that fit; an interrupt changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.surgery.bits import FaultAt, everything
from tests.surgery.subjects import equal
from tracker import NeuronEngine, Policy

SETUP = """
import torch
from tracker import NeuronEngine
model = torch.nn.Sequential()
model.add_module("x" * 300, torch.nn.Linear(6, 12))
model.add_module("act", torch.nn.ReLU())
model.add_module("out", torch.nn.Linear(12, 4))
engine = NeuronEngine()
engine.track_model(model, "m" * 300, example_inputs=torch.randn(64, 6))
engine.start_tracking(enable_correlation_analysis=True)
model(torch.randn(64, 6))
None
"""
PICTURES = (
    "engine.plot_activity_heatmap()",
    "engine.structure.plot()",
    "engine.plot_correlation_matrix('out')",
)
TEXTS = (
    "engine",
    "engine.structure",
    "engine.journal",
    "engine.generate_optimization_recommendations()",
    "engine.prune_neurons({'x' * 300: [0]}, dry_run=True)",
    "engine.prune_neurons({'x' * 300: [0]})",
    "engine.undo()",
)
PRINTED = (
    "engine.generate_neuron_report(show_heatmap=False)",
    "engine.generate_pruning_recommendations()",
    "engine.print_dataset_summary()",
    "engine.print_correlation_analysis()",
    "engine.print_optimization_recommendations()",
)


@pytest.mark.slow
def test_what_a_notebook_shows() -> None:
    nbformat = pytest.importorskip("nbformat")  # comes with nbclient
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    first = (SETUP, SETUP, *TEXTS, *PRINTED, *PRINTED, *PICTURES)  # cells may be run twice
    last = (f"text = {PRINTED[0]}", "text", "engine.generate_neuron_report()")
    cells = [nbformat.v4.new_code_cell(source) for source in (*first, *last)]
    nbclient.NotebookClient(
        nbformat.v4.new_notebook(cells=cells), timeout=120, iopub_timeout=60
    ).execute()
    shown = {c.source: [o for o in c.outputs if o.get("name") != "stderr"] for c in cells}
    for source in TEXTS:
        (output,) = shown[source]
        text = output.data["text/plain"]
        assert "(" not in text.split()[0], source  # for people, and no constructor call
        assert "text/html" in output.data
        assert max(map(len, text.splitlines())) <= 290, (source, text)
    for source in PRINTED:
        assert {output.output_type for output in shown[source]} == {"stream"}
        text = "".join(output.text for output in shown[source])
        title = text.splitlines()[0]
        assert text.count(title) == 1  # once
        assert max(map(len, text.splitlines())) <= 250, (source, text)
    for source in PICTURES:
        (output,) = shown[source]
        assert "image/png" in output.data
    assert shown[last[1]][0].text == shown[last[0]][0].text  # asked for in another cell
    assert ["image/png" in o.get("data", {}) for o in shown[last[2]]] == [False, True]


def trained() -> tuple[nn.Module, torch.optim.Optimizer, NeuronEngine, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(40, 6)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x)
    engine.attach_optimizer(optimizer)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    engine.calibrate([x])
    _ = engine.structure
    return model, optimizer, engine, x


CALLS: dict[str, Callable[[NeuronEngine, torch.Tensor], Any]] = {
    "prune": lambda e, x: e.prune_neurons({"0": [1, 3]}),
    "merge": lambda e, x: e.merge_neurons([(0, 1)]),
    "expand": lambda e, x: e.expand_layer("0", 2),
    "recycle": lambda e, x: e.recycle_neurons({"2": [1]}),
    "insert": lambda e, x: e.insert_layer("0"),
    "remove": lambda e, x: e.remove_layer("2", force=True),
    "compress": lambda e, x: e.compress(keep=0.6, batches=[x]),
    "calibrate": lambda e, x: e.calibrate([x, x]),
    "start": lambda e, x: e.start_self_modification(Policy()),
    "widths": lambda e, x: e.uniform_widths(shrink=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_leaves_everything_as_it_was(name: str) -> None:
    model, optimizer, engine, x = trained()
    before = everything(model, optimizer, engine)
    journal, k, hits = len(engine.journal), 1, 0
    while True:
        fault = FaultAt(k, KeyboardInterrupt)
        try:
            with fault:
                CALLS[name](engine, x)
        except KeyboardInterrupt:
            hits += 1
        else:
            break
        assert equal(everything(model, optimizer, engine), before), f"torn at operation {k}"
        assert len(engine.journal) == journal
        k += max(k // 3, 1)
    assert hits > 3 or name in ("start", "widths")
