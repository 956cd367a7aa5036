"""Which neurons a model has, and that each is observed where it should be."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.statistics import oracle
from tests.zoo_layers import CASES, Attention, example
from tracker import (
    NeuronEngine,
    NeuronTracker,
    NotTrackedError,
    StatisticsError,
    StructureError,
    UnknownNeuronError,
)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def watched(model: nn.Module, *, correlate: bool = False, **options: object) -> NeuronEngine:
    engine = NeuronEngine()
    engine.track_model(model, "model", **options)
    engine.start_tracking(enable_correlation_analysis=correlate)
    return engine


# Identity


def test_both_names_are_one_class() -> None:
    assert NeuronTracker is NeuronEngine


def test_ids_count_up_in_module_order() -> None:
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    engine = NeuronEngine()
    neuron_map = engine.track_model(model, "My Model")
    assert neuron_map == {"0": list(range(256)), "2": list(range(256, 266))}
    assert engine.get_neuron_info(neuron_id=128) == ("0", 128)
    assert engine.get_neuron_info(np.int64(256)) == ("2", 0)
    assert engine.get_summary()["total_neurons"] == 266


def test_a_second_model_goes_on_counting() -> None:
    engine = NeuronEngine()
    first, second = mlp(), mlp()
    engine.track_model(first, "first")
    assert engine.track_model(second, "second") == {"0": list(range(11, 19)), "2": [19, 20, 21]}
    assert engine.get_summary()["model_name"] == "second"
    assert engine.get_neuron_info(3) == ("0", 3)
    # The same model again is the same model.
    assert engine.track_model(first, "again") == {"0": list(range(8)), "2": [8, 9, 10]}


def test_calls_speak_of_the_model_registered_last() -> None:
    engine = NeuronEngine()
    first, second = mlp(), mlp()
    engine.track_model(first, "first")
    engine.track_model(second, "second")
    engine.register_activation_hooks(first)
    engine.start_tracking()
    first(torch.randn(5, 6))
    assert engine.get_neuron_stats(0)["observations"] == 5
    with pytest.raises(StatisticsError, match="belongs to the model 'second'"):
        engine.get_neuron_stats(11)


@pytest.mark.parametrize("neuron_id", [-1, 11, 10**9, "3", 1.5, None])
def test_unknown_ids_are_refused(neuron_id: object) -> None:
    engine = NeuronEngine()
    engine.track_model(mlp())
    with pytest.raises(UnknownNeuronError):
        engine.get_neuron_info(neuron_id)


def test_without_a_model_every_call_says_what_to_do() -> None:
    engine = NeuronEngine()
    for call in (
        engine.get_summary,
        engine.start_tracking,
        engine.stop_tracking,
        engine.get_dead_neurons,
        engine.print_dataset_summary,
        engine.generate_optimization_recommendations,
    ):
        with pytest.raises(NotTrackedError, match="track_model"):
            call()
    with pytest.raises(NotTrackedError):
        engine.register_activation_hooks(mlp())


def test_what_cannot_be_tracked_is_refused() -> None:
    engine = NeuronEngine()
    with pytest.raises(NotTrackedError, match="no layer with neurons"):
        engine.track_model(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    with pytest.raises(NotTrackedError, match="not function"):
        engine.track_model(lambda x: x)
    with pytest.raises(StatisticsError, match="correlation_threshold"):
        NeuronEngine(correlation_threshold=1.5)
    with pytest.raises(StatisticsError, match="activation_threshold"):
        NeuronEngine(activation_threshold=-1)


# Layers


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_observed_at_its_neurons(name: str) -> None:
    """Equal to an oracle over the layer's stored output, along the axis of its neurons."""
    case = CASES[name]
    torch.manual_seed(0)
    layer = case.build()
    model = nn.Sequential(layer)
    outputs: list[Tensor] = []
    layer.register_forward_hook(
        lambda m, a, out: outputs.append(
            (out if isinstance(out, Tensor) else out[0]).detach().clone()
        )
    )
    engine = watched(model)
    model(example(case))
    model(example(case, seed=1))

    assert len(engine.track_model(model)["0"]) == case.neurons
    rows = [out.movedim(case.axis, -1).reshape(-1, case.neurons) for out in outputs]
    expected = oracle.activity(torch.cat(rows))
    for slot in range(case.neurons):
        stats = engine.get_neuron_stats(slot)
        assert stats["observations"] == expected["observations"][slot]
        assert stats["mean"] == pytest.approx(expected["mean"][slot], rel=1e-5, abs=1e-7)
        assert stats["variance"] == pytest.approx(expected["variance"][slot], rel=1e-5)
        assert stats["firing_frequency"] == pytest.approx(expected["firing_frequency"][slot])
        assert stats["batches"] == 2


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("Custom")])
def test_width_of_a_known_layer_needs_no_data(name: str) -> None:
    case = CASES[name]
    engine = NeuronEngine()
    assert len(engine.track_model(nn.Sequential(case.build()))["0"]) == case.neurons


def test_attention_is_one_layer() -> None:
    """Its inner projection is never called: it is not a second layer that looks dead."""
    model = Attention()
    engine = watched(model)
    assert {k: len(v) for k, v in engine.track_model(model).items()} == {"attention": 8, "out": 3}
    model(torch.randn(4, 5, 8))
    summary = engine.get_layer_summary()
    assert summary["attention"]["observed_neurons"] == 8
    assert engine.get_neuron_stats(0)["observations"] == 20


def test_transformer_encoder_layer_is_observed_in_eval_mode() -> None:
    """Its fast path would call none of its children."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    engine = watched(model)
    with torch.no_grad():
        model(torch.randn(4, 5, 8))
    summary = engine.get_layer_summary()
    assert list(summary) == ["self_attn", "linear1", "linear2", "norm1", "norm2"]
    assert all(row["observed_neurons"] == row["total_neurons"] for row in summary.values())


def test_weight_norm_is_one_layer() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)))
    engine = watched(model)
    model(torch.randn(4, 5))
    assert engine.get_summary()["layers"] == {"0": 7}
    assert engine.get_neuron_stats(6)["observations"] == 4


def test_layer_norm_over_several_dimensions() -> None:
    model = nn.Sequential(nn.LayerNorm((3, 4)))
    engine = watched(model)
    x = torch.randn(10, 3, 4)
    expected = model(x).detach().flatten(1).mean(0)
    assert engine.get_summary()["total_neurons"] == 12
    assert engine.get_neuron_stats(7)["mean"] == pytest.approx(float(expected[7]), abs=1e-6)


def test_a_packed_sequence_has_no_padding() -> None:
    lstm = nn.LSTM(5, 6, batch_first=True)
    engine = watched(lstm)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 5) for n in (4, 2, 1)])
    lstm(packed)
    assert engine.get_neuron_stats(0)["observations"] == 7


def test_custom_layers_get_ids_with_example_inputs_or_at_the_first_pass() -> None:
    case = CASES["Custom, last axis"]

    def build() -> nn.Sequential:
        return nn.Sequential(case.build(), nn.ReLU(), nn.Linear(7, 2))

    x = example(case)
    eager = NeuronEngine().track_model(build(), "m", example_inputs=(x,))
    assert eager == {"0": list(range(7)), "2": [7, 8]}
    late, model = NeuronEngine(), build()
    neuron_map = late.track_model(model, "m")
    assert neuron_map == {"2": [0, 1]}
    late.start_tracking()
    model(x)
    assert neuron_map == {"2": [0, 1]}  # what a call returned stays as it was
    assert late.track_model(model) == {"2": [0, 1], "0": list(range(2, 9))}
    assert late.get_neuron_info(2) == ("0", 0)


def test_lazy_modules_tell_their_width_at_the_first_pass() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    engine = watched(model)
    assert engine.get_summary()["layers"] == {"0": 4}
    model(torch.randn(3, 2, 8, 6))
    assert engine.get_summary()["layers"] == {"0": 4, "1": 4}
    assert engine.get_neuron_stats(7)["observations"] == 3 * 6 * 4


def test_axes_name_the_neurons_of_a_custom_layer() -> None:
    class Mixer(nn.Module):
        """Its 5 neurons lie on axis 0, which no rule could know."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 9))

        def forward(self, x: Tensor) -> Tensor:
            return self.w @ x

    model = nn.Sequential(Mixer())
    engine = watched(model, axes={"0": 0}, batch_dim=1)
    model(torch.randn(9, 30))
    assert engine.get_summary()["total_neurons"] == 5
    assert engine.get_neuron_stats(0)["observations"] == 30
    assert engine.get_neuron_stats(0)["total_samples"] == 30


def test_example_inputs_leave_no_trace() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(4, 6, generator=torch.Generator()))
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model] == [True, True, False]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(StructureError, match="example inputs failed"):
        NeuronEngine().track_model(mlp(), "m", example_inputs={"nonsense": 1})


def test_a_shared_module_is_one_layer_and_sees_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x[:, :3].repeat(1, 2)[:, :5]))

    model = Twice()
    engine = watched(model)
    model(torch.randn(7, 5))
    stats = engine.get_neuron_stats(0)
    assert (stats["observations"], stats["batches"], stats["total_samples"]) == (14, 2, 7)


def test_never_called_is_not_dead() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Branch()
    engine = watched(model)
    model(torch.randn(7, 5))
    assert engine.get_dead_neurons() == {"used": []}
    assert engine.get_neuron_stats(4)["status"] == "not observed"
    assert np.isnan(engine.get_neuron_stats(4)["mean"])
    assert engine.get_layer_summary()["unused"]["problem"] == "never called in this window"
    assert 4 not in engine.get_dataset_statistics()
    recommendations = engine.generate_optimization_recommendations()
    assert recommendations["prune"] == []
    assert any("not observed" in note for note in recommendations["metadata"]["notes"])


def test_outputs_of_several_tensors_and_records() -> None:
    class Record(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"index": torch.arange(3), "hidden": (x @ self.w, None)}

    model = nn.Sequential(Record())
    engine = watched(model)
    model(torch.randn(6, 5))
    assert engine.get_neuron_stats(3)["observations"] == 6


# Windows


def test_train_and_eval_do_not_mix() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4), nn.BatchNorm1d(4))
    engine = watched(model)
    model.train()(torch.randn(10, 6))
    model.eval()(torch.randn(7, 6) + 100)
    assert engine.get_neuron_stats(0)["observations"] == 10
    assert engine.get_neuron_stats(0)["mean"] < 50

    engine.start_tracking(mode="eval")
    model.train()(torch.randn(10, 6))
    model.eval()(torch.randn(7, 6))
    assert engine.get_neuron_stats(0)["observations"] == 7

    engine.start_tracking(mode="all")
    model.train()(torch.randn(10, 6))
    model.eval()(torch.randn(7, 6))
    assert engine.get_neuron_stats(0)["observations"] == 17
    with pytest.raises(StatisticsError, match="mode is one of"):
        engine.start_tracking(mode="both")


def test_the_mode_is_the_models_own() -> None:
    """A frozen norm of a model in training belongs to the training pass."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    engine = watched(model)
    model.train()
    model[1].eval()
    model(torch.randn(10, 6))
    assert engine.get_neuron_stats(4)["observations"] == 10


def test_windows_begin_and_end() -> None:
    model = mlp()
    engine = NeuronEngine()
    engine.track_model(model)
    model(torch.randn(5, 6))  # not yet
    engine.start_tracking()
    model(torch.randn(5, 6))
    engine.stop_tracking()
    model(torch.randn(5, 6))  # no more
    assert engine.get_neuron_stats(0)["observations"] == 5
    engine.start_tracking()
    assert engine.get_neuron_stats(0)["observations"] == 0
    engine.clear_hooks()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    engine.start_tracking()  # registers again
    model(torch.randn(3, 6))
    assert engine.get_neuron_stats(0)["observations"] == 3
    assert len(model[2]._forward_pre_hooks) == 1  # where the first layer is read


def test_padding_is_left_out() -> None:
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 4))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens = torch.randint(20, (2, 3))
    engine = watched(model, correlate=True)
    with engine.padding_mask(mask):
        output = model(tokens)
    stats = engine.get_neuron_stats(6)
    assert stats["observations"] == 3
    assert stats["mean"] == pytest.approx(float(output.detach()[mask].mean(0)[0]), abs=1e-6)
    model(tokens)
    assert engine.get_neuron_stats(6)["observations"] == 9


def test_the_model_is_not_kept_alive() -> None:
    model = mlp()
    engine = watched(model)
    model(torch.randn(5, 6))
    del model
    gc.collect()
    assert engine.get_neuron_stats(0)["observations"] == 5
    with pytest.raises(NotTrackedError, match="no longer exists"):
        engine.start_tracking()


def test_an_engine_that_is_gone_leaves_inert_hooks() -> None:
    model = mlp()
    engine = watched(model)
    del engine
    gc.collect()
    model(torch.randn(5, 6))


def test_correlation_is_asked_for() -> None:
    model = mlp()
    engine = watched(model)
    model(torch.randn(50, 6))
    with pytest.raises(StatisticsError, match="enable_correlation_analysis=True"):
        engine.find_redundant_neurons()
    with pytest.raises(StatisticsError, match="enable_correlation_analysis=True"):
        engine.print_correlation_analysis()


def test_correlations_are_pearsons_of_all_pairs() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 40))
    engine = watched(model, correlate=True)
    with torch.no_grad():
        outputs = [model(torch.randn(50, 6)) for _ in range(20)]
    expected = oracle.correlation(torch.cat(outputs))
    pairs = engine.find_redundant_neurons(correlation_threshold=0.0)["0"]
    assert len(pairs) == 40 * 39 / 2
    for i, j, r in pairs:
        assert i < j
        assert r == pytest.approx(expected[i, j], abs=1e-6)
    conv = nn.Sequential(nn.Conv2d(2, 5, 3))
    engine = watched(conv, correlate=True)
    y = conv(torch.randn(20, 2, 9, 9))
    expected = oracle.correlation(y.detach().movedim(1, -1).reshape(-1, 5))
    for i, j, r in engine.find_redundant_neurons(0.0)["0"]:
        assert r == pytest.approx(expected[i, j], abs=1e-6)
