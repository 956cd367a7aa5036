"""Models in float64 whose weights are made when they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.structure.oracle_masks import copied
from tests.structure.subjects import fresh, models
from tracker import NeuronEngine, SurgeryError
from tracker.inputs.calls import calls_of
from tracker.inputs.forward_pass import forward_once
from tracker.structure.trace import plain_kernels
from tracker.structure.trials.float64_mode import double
from tracker.structure.trials.temporary_copies import (
    InFloat64,
    copy_sharing_storage,
    relative_difference,
)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@models()
def test_it_computes_what_a_copy_in_float64_does(name: str) -> None:
    model, example = fresh(name)
    before, inputs = state(model), double(calls_of(example)[0])
    with plain_kernels():
        expected = forward_once(copied(model).double(), inputs)
        found = InFloat64(copy_sharing_storage(model)).run(inputs)
    assert relative_difference(found, expected) < 1e-14
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Listed(nn.Module):
    """Its weights stand in a list as well, and that is where the forward takes them from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.weights = [self.first, self.second]

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


def test_weights_that_are_held_elsewhere_are_doubled_too() -> None:
    torch.manual_seed(0)
    model, x = Listed(), torch.randn(3, 4)
    found = InFloat64(copy_sharing_storage(model)).run(double(calls_of(x)[0]))
    with torch.no_grad():
        expected = copied(model).double()(x.double())
    assert relative_difference(found, expected) == 0.0


class Asking(nn.Module):
    """It wants its weights to be parameters, on the device and of the dtype that it expects."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.a.weight, nn.Parameter):
            raise TypeError("no parameter")
        x = x.to(next(self.parameters()).dtype)
        named = dict(self.named_parameters())
        return self.b(torch.relu(nn.functional.linear(x, named["a.weight"], self.a.bias.data)))


class Selective(nn.Module):
    """Some of it is cast to float32 in every pass, as routers of experts are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.b = self.b.to(torch.float32)
        return self.b(torch.relu(self.a(x)).to(torch.float32)).to(x.dtype)


class Closed(nn.Module):
    """Its weight is also in a closure, where none but the model finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10, bias=False), nn.Linear(10, 3)
        weight = self.a.weight
        self.f = lambda x: nn.functional.linear(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.f(x)))


def spectral() -> nn.Module:
    first = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 10))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(10, 3))


@pytest.mark.parametrize(
    ("build", "promise"),
    [(Asking, "masked"), (spectral, "changed")],
    ids=["types", "parametrizations"],
)
def test_what_code_asks_of_its_weights_is_answered(build: Any, promise: str) -> None:
    torch.manual_seed(0)
    model, engine = build().eval(), NeuronEngine()
    engine.track_model(model, "m", torch.randn(5, 6))
    (group,) = (g for g in engine.structure.groups if g.prunable)
    assert engine.prune_units({group.name: [1, 4]}).promise == promise


def test_what_code_casts_is_made_in_float64_and_stays_as_it_was() -> None:
    """In float32 all of it would differ by rounding, and be taken for wrong."""
    torch.manual_seed(0)
    model, x = Selective().eval(), torch.randn(5, 6)
    found = InFloat64(copy_sharing_storage(model)).run(double(calls_of(x)[0]))
    exact = copied(model).double()
    with torch.no_grad():
        expected = exact.b.double()(torch.relu(exact.a(x.double())))
    assert relative_difference(found, expected) < 1e-14
    assert model.b.weight.dtype == torch.float32


def test_what_is_read_behind_the_modules_back_is_refused_with_the_line() -> None:
    model, engine = Closed().eval(), NeuronEngine()
    engine.track_model(model, "m", torch.randn(5, 6))
    (group,) = engine.structure.groups
    assert not group.prunable
    assert "test_temporary_copies.py" in group.reason


def test_parameters_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    engine, before = NeuronEngine(), state(model)
    engine.track_model(model, "m", torch.randn(5, 6))
    with pytest.raises(SurgeryError, match="made in inference mode"):
        engine.prune_units({"0": [1]})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_what_is_set_in_a_light_copy_stays_there() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before, light = state(model), copy_sharing_storage(model)
    with torch.no_grad():
        light[0].weight.set_(torch.zeros(2, 3))
        light[1].running_mean += 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert light[0].bias.data_ptr() == model[0].bias.data_ptr()


PEAK = """
import torch
from torch import nn
from tracker import NeuronEngine

def status(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024

torch.manual_seed(0)
model = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(2048, 2048), nn.ReLU())])
engine = NeuronEngine()
small = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
engine.track_model(small, "small", torch.randn(2, 4))
engine.prune_units({"0": [1]})  # what comes with the first use is no cost of this model
engine = NeuronEngine()
engine.track_model(model, "wide", torch.randn(2, 2048))
size, base = sum(p.numel() * 4 for p in model.parameters()), status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
groups = engine.structure.groups
engine.prune_units({g.name: list(range(0, g.size, 2)) for g in groups if g.prunable})
print((status("VmHWM") - base) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_removal_takes_less_memory_than_another_copy_of_the_model() -> None:
    """Half of all units go: a quarter of the weights is left, computed once to try and once to swap in."""
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}  # what is freed is no peak
    run: Any = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, env=given_back
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.9  # it was above 4 with copies in float64
