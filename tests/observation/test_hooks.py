"""What goes wrong with forward hooks in real training scripts, and must not go wrong here."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tracker import NeuronEngine


def mlp(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 3))


def watched(model: nn.Module, **options: bool) -> NeuronEngine:
    engine = NeuronEngine()
    engine.track_model(model)
    engine.start_tracking(**options)
    return engine


def observations(engine: NeuronEngine, neuron: int = 0) -> int:
    return engine.get_neuron_stats(neuron)["observations"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once(reentrant: bool) -> None:
    """The recomputation in the backward pass is not new data."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=reentrant)

    model = Checkpointed()
    engine = watched(model)
    for _ in range(3):
        model(torch.randn(5, 6, requires_grad=True)).sum().backward()
    assert observations(engine) == 15
    assert engine.get_neuron_stats(0)["batches"] == 3


def test_inplace_activation_behind_the_layer() -> None:
    """The layer's own output had negative values; a reference kept would have lost them."""
    plain, inplace = mlp(), mlp(inplace=True)
    x = torch.randn(50, 6)
    minima = []
    for model in (plain, inplace):
        engine = NeuronEngine(observe="output")
        engine.track_model(model)
        engine.start_tracking()
        model(x)
        minima.append([engine.get_neuron_stats(i)["min_activation"] for i in range(8)])
    assert minima[0] == minima[1]
    assert min(minima[0]) < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Outputs are low precision, statistics are not; products inside the hook are not cast either."""
    model = mlp()
    engine = watched(model, enable_correlation_analysis=True)
    x = torch.randn(4000, 6)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        y = model[:2](x).double()
        model(x)
    assert engine.get_neuron_stats(0)["variance"] == pytest.approx(
        float(y[:, 0].var(correction=0)), rel=1e-6
    )
    expected = torch.corrcoef(y.T)
    for i, j, r in engine.find_redundant_neurons(0.0)["0"]:
        assert r == pytest.approx(float(expected[i, j]), abs=1e-6)


def test_inference_mode_inside_and_outside() -> None:
    """State that was begun inside is written outside, and the other way round."""
    model = mlp()
    engine = watched(model, enable_correlation_analysis=True)
    for _ in range(3):
        with torch.inference_mode():
            model(torch.randn(300, 6))
        model(torch.randn(300, 6)).sum().backward()
    assert observations(engine) == 1800
    assert engine.find_redundant_neurons(0.0)["0"]
    with torch.inference_mode():
        inside = watched(model, enable_correlation_analysis=True)
        model(torch.randn(700, 6))
    model(torch.randn(700, 6))
    assert observations(inside) == 1400
    assert inside.find_redundant_neurons(0.0)["0"]


def test_gradients_and_outputs_are_untouched() -> None:
    """Bit for bit, with and without tracking."""
    results = []
    for track in (False, True):
        model = mlp()
        if track:
            engine = watched(model, enable_correlation_analysis=True)
        x = torch.randn(30, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters())])
    assert observations(engine) == 30
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_an_exception_inside_forward_leaves_tracking_whole() -> None:
    """The aborted pass is no sample of the model; the next pass counts as ever."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            if len(x) == 13:
                raise RuntimeError("unlucky")
            return self.head(h)

    model = Fragile()
    engine = watched(model)
    model(torch.randn(5, 6))
    with pytest.raises(RuntimeError, match="unlucky"):
        model(torch.randn(13, 6))
    model.eval()
    model(torch.randn(7, 6))
    model.train()
    model(torch.randn(5, 6))
    head = engine.get_layer_summary()["head"]
    assert head["observed_neurons"] == 2
    assert engine.get_neuron_stats(11)["observations"] == 10
    assert engine.get_neuron_stats(11)["total_samples"] == 10


def test_a_failing_observation_never_stops_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns, and the layer says what is the matter."""
    from tracker.statistics import ActivityStream

    real = ActivityStream.add

    def fail_for_the_first(self: ActivityStream, output: Tensor, *rest: object) -> object:
        if output.shape[-1] == 8:
            raise MemoryError("no room")
        return real(self, output, *rest)

    monkeypatch.setattr(ActivityStream, "add", fail_for_the_first)
    model = mlp()
    engine = watched(model)
    with pytest.warns(RuntimeWarning, match="'0': observation stopped: MemoryError: no room"):
        model(torch.randn(5, 6))
    assert observations(engine, 8) == 5
    assert "no room" in engine.get_layer_summary()["0"]["problem"]
    model(torch.randn(5, 6))  # warns once
    assert observations(engine, 8) == 10


def test_a_copy_reports_to_nobody() -> None:
    model = mlp()
    engine = watched(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(torch.randn(5, 6))
        assert observations(engine) == 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)(torch.randn(5, 6))
    assert observations(engine) == 0
    model(torch.randn(5, 6))
    assert observations(engine) == 5
    # A copy can be tracked in its own right.
    twin = copy.deepcopy(model)
    other = watched(twin)
    twin(torch.randn(4, 6))
    assert (observations(other), observations(engine)) == (4, 5)


def test_state_dict_is_untouched() -> None:
    model = mlp()
    keys = list(model.state_dict())
    watched(model)
    model(torch.randn(2, 6))
    assert list(model.state_dict()) == keys


def test_registering_again_does_not_count_twice() -> None:
    model = mlp()
    engine = watched(model)
    for _ in range(3):
        engine.register_activation_hooks(model)
    engine.start_tracking()
    model(torch.randn(5, 6))
    assert observations(engine) == 5


def test_two_engines_on_one_model() -> None:
    model = mlp()
    first, second = watched(model), watched(model)
    model(torch.randn(5, 6))
    first.clear_hooks()
    model(torch.randn(5, 6))
    assert (observations(first), observations(second)) == (5, 10)


def test_function_transforms_and_tracing_are_not_data() -> None:
    model = mlp()
    engine = watched(model)
    torch.func.vmap(model)(torch.randn(5, 6))
    torch.func.grad(lambda x: model(x).sum())(torch.randn(6))
    torch.export.export(model, (torch.randn(2, 6),))
    assert observations(engine) == 0


def test_an_exported_graph_holds_no_trace_of_us() -> None:
    model = mlp()
    watched(model)
    graph = torch.export.export(model, (torch.randn(2, 6),)).graph
    assert not [node for node in graph.nodes if "tracker" in str(node.target)]


def test_a_meta_model_is_not_observed() -> None:
    model = mlp().to("meta")
    engine = watched(model)
    model(torch.randn(5, 6, device="meta"))
    assert "meta" in engine.get_layer_summary()["0"]["problem"]


def test_channels_last_and_half_precision_models() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3)).to(memory_format=torch.channels_last).bfloat16()
    engine = watched(model)
    x = torch.randn(4, 3, 9, 9).bfloat16().to(memory_format=torch.channels_last)
    y = model(x).detach().double()
    assert engine.get_neuron_stats(2)["mean"] == pytest.approx(float(y[:, 2].mean()), rel=1e-6)


def test_data_parallel_wrappers_are_looked_through() -> None:
    model = mlp()
    wrapped = nn.DataParallel(model)
    engine = NeuronEngine()
    assert list(engine.track_model(wrapped)) == ["0", "2"]
    engine.register_activation_hooks(wrapped)
    engine.start_tracking()
    wrapped(torch.randn(5, 6))
    assert observations(engine) == 5


COMPILED = """
import torch
from torch import nn
from tracker import NeuronEngine

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))

x = torch.randn(5, 6)

# Registered before: no graph break, and every call is seen.
model = build()
engine = NeuronEngine()
engine.track_model(model, example_inputs=x)
engine.register_activation_hooks()
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
engine.start_tracking()
for _ in range(4):
    compiled(x).sum().backward()
eager = build()
reference = NeuronEngine()
reference.track_model(eager)
reference.start_tracking()
for _ in range(4):
    eager(x)
for neuron in range(11):
    a, b = engine.get_neuron_stats(neuron), reference.get_neuron_stats(neuron)
    assert a["observations"] == b["observations"] == 20, a
    assert abs(a["mean"] - b["mean"]) < 1e-6 and a["total_samples"] == 20, (a, b)
engine.stop_tracking()
compiled(x)
assert engine.get_neuron_stats(0)["observations"] == 20

# Registered after the graph was compiled: it is compiled anew, not silently blind.
late = build()
compiled = torch.compile(late, backend="aot_eager")
compiled(x)
engine = NeuronEngine()
engine.track_model(compiled)
engine.start_tracking()
compiled(x)
assert engine.get_neuron_stats(0)["observations"] == 5, engine.get_neuron_stats(0)
print("fine")
"""


@pytest.mark.slow
def test_torch_compile() -> None:
    """In a process of its own: compilation leaves global state behind."""
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "fine", run.stderr
