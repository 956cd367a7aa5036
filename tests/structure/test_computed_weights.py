"""Weights that are computed before they are used: whose neurons are whose, and what a removal changes.

The oracle zeroes the activations themselves, where the consumer reads them: no weight of it is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.structure.oracle_masks import relative_difference
from tracker import NeuronEngine
from tracker.structure.axes import Labels

UNITS = [1, 4, 7]


class Made(nn.Linear):
    """A linear layer whose weight is made by a function of what it keeps."""

    def __init__(self, make: Callable[[Made], Tensor], inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.make = make
        used = make.__code__.co_names
        if "mask" in used:
            self.register_buffer("mask", (torch.rand(outer, inner) > 0.3).float())
        if "up" in used:
            self.down = nn.Parameter(torch.randn(2, inner) / 4)
            self.up = nn.Parameter(torch.randn(outer, 2) / 4)
        if "gain" in used:
            self.gain = nn.Parameter(torch.rand(outer, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.make(self), self.bias)


def _rounded(m: Made) -> Tensor:
    rounded = torch.round(m.weight * 31) / 31
    return m.weight + (rounded - m.weight).detach()


def _standard(w: Tensor) -> Tensor:
    return (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)


# Each column of these is made of this column alone.
APART: dict[str, Callable[[Made], Tensor]] = {
    "plain": lambda m: m.weight,
    "scaled": lambda m: m.weight * 0.5,
    "masked": lambda m: m.weight * m.mask,
    "low rank": lambda m: m.weight + m.up @ m.down,
    "rounded": _rounded,
    "signs": lambda m: torch.sign(m.weight),
    "gained": lambda m: m.weight * m.gain,
    "transposed": lambda m: (m.weight.T * 2).contiguous().T,
    "stacked": lambda m: torch.cat([m.weight[:2] * 2, m.weight[2:]]),
}
# A column more or less changes what is left of these.
TOGETHER: dict[str, Callable[[Made], Tensor]] = {
    "unit rows": lambda m: m.weight / m.weight.norm(dim=1, keepdim=True),
    "sums to one": lambda m: m.weight.abs() / m.weight.abs().sum(1, keepdim=True),
    "whole norm": lambda m: m.weight / m.weight.norm(),
    "standard": lambda m: _standard(m.weight),
    "sign and mean": lambda m: torch.sign(m.weight) * m.weight.abs().mean(1, keepdim=True),
    "gram": lambda m: (m.weight @ m.weight.T) @ m.weight / 9,
    "weight norm by hand": lambda m: m.gain * m.weight / m.weight.norm(dim=1, keepdim=True),
    "softmax": lambda m: m.weight.softmax(1),
}


class Net(nn.Module):
    def __init__(self, reader: nn.Module, maker: nn.Module | None = None) -> None:
        super().__init__()
        self.a = maker or nn.Linear(6, 16)
        self.seen = nn.Identity()
        self.b = reader

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.seen(F.relu(self.a(x))))


class Demodulated(nn.Linear):
    """The outputs are scaled by the length of the filters, beside the product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * torch.rsqrt(self.weight.square().sum(1) + 1e-8)


class Normed(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / w.norm(dim=1, keepdim=True)


def _parametrized() -> nn.Module:
    layer = nn.Linear(16, 5)
    parametrize.register_parametrization(layer, "weight", Normed())
    return layer


def _pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(16, 5), "weight", 0.5)


BUILDS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda make=make: Net(Made(make, 16, 5))
        for name, make in {**APART, **TOGETHER}.items()
    },
    "demodulated": lambda: Net(Demodulated(16, 5)),
    "spectral norm": lambda: Net(spectral_norm(nn.Linear(16, 5))),
    "older spectral norm": lambda: Net(nn.utils.spectral_norm(nn.Linear(16, 5))),
    "spectral norm of the maker": lambda: Net(nn.Linear(16, 5), spectral_norm(nn.Linear(6, 16))),
    "weight norm": lambda: Net(weight_norm(nn.Linear(16, 5))),
    "weight norm of the maker": lambda: Net(nn.Linear(16, 5), weight_norm(nn.Linear(6, 16))),
    "parametrized": lambda: Net(_parametrized()),
    "pruned": lambda: Net(_pruned()),
    "whole norm of the maker": lambda: Net(nn.Linear(16, 5), Made(TOGETHER["whole norm"], 6, 16)),
    "unit rows of the maker": lambda: Net(nn.Linear(16, 5), Made(TOGETHER["unit rows"], 6, 16)),
}
EXACT = {
    *APART, "pruned", "weight norm of the maker", "unit rows of the maker",
}  # fmt: skip


def _silenced(model: Net, units: list[int]) -> Net:
    """A copy in float64 of which the reader sees zero in the units' place."""
    masked = copy.deepcopy(model).double()
    masked.seen.register_forward_hook(
        lambda _, args, out: out.index_fill(1, torch.tensor(units), 0)
    )
    return masked


@pytest.mark.parametrize("name", BUILDS)
def test_a_computed_weight_keeps_its_neurons_and_promises_what_holds(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x, engine = BUILDS[name]().eval(), torch.randn(8, 6), NeuronEngine()
    ids = {k: list(v) for k, v in engine.track_model(model, "m", example_inputs=x).items()}
    model(x).sum().backward()  # old hooks keep a weight with its graph
    with torch.no_grad():
        model(x)
        masked, before = _silenced(model, UNITS), copy.deepcopy(model)
        expected = masked(x.double())
    (group,) = (g for g in engine.structure.groups if g.prunable and g.size == 16)
    assert group.layers == ("a",)
    assert {role for (tensor, _), role in group.roles.items() if tensor.startswith("b.")} == {"reads"}  # fmt: skip
    receipt = engine.prune_neurons({"a": UNITS}, compensate=False)
    assert receipt.removed_ids == [ids["a"][i] for i in UNITS]
    assert engine.get_summary()["layers"]["b"] == 5
    assert receipt.promise == ("masked" if name in EXACT else "changed"), group.inexact_reason
    with torch.no_grad():
        model(x)
        found = copy.deepcopy(model).double()(x.double())
    if receipt.promise == "masked":
        assert relative_difference(found, expected) < 1e-9
    engine.save_checkpoint(tmp_path / "c")
    torch.manual_seed(0)
    again = BUILDS[name]().eval()
    NeuronEngine.load_checkpoint(tmp_path / "c", again)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    engine.undo()
    with torch.no_grad():
        assert torch.equal(model(x), before(x))


class Modulated(nn.Module):
    """Filters times a style of the sample, divided by their length or not: they differ from sample to sample."""

    def __init__(self, demodulated: bool) -> None:
        super().__init__()
        self.a, self.style = nn.Linear(6, 16), nn.Linear(6, 16)
        self.weight, self.demodulated = nn.Parameter(torch.randn(5, 16)), demodulated

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * (1 + self.style(x))[:, None, :]
        if self.demodulated:
            weight = weight * torch.rsqrt(weight.square().sum(2, keepdim=True) + 1e-8)
        return torch.bmm(weight, F.relu(self.a(x))[:, :, None])[:, :, 0]


@pytest.mark.parametrize("demodulated", [True, False])
def test_modulated_weights_that_add_up_over_the_units_are_inexact(demodulated: bool) -> None:
    torch.manual_seed(0)
    model, engine = Modulated(demodulated), NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(8, 6))
    receipt = engine.prune_neurons({"a": UNITS}, compensate=False)
    assert receipt.promise == ("changed" if demodulated else "masked")


class WithNothing(nn.Module):
    """A parameter of no rows: an option that was left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.prefix = nn.Parameter(torch.zeros(0, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(torch.cat([x, self.prefix]))))


def test_a_parameter_without_numbers_is_no_obstacle() -> None:
    model, x = WithNothing(), torch.randn(6, 5)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x)
    receipt = engine.prune_units({engine.structure.groups[0].name: [1]})
    assert receipt.promise == "masked"
    assert model.first.out_features == 7
    model(x).sum().backward()


@pytest.mark.parametrize("name", [*TOGETHER, "demodulated", "spectral norm", "weight norm"])
def test_a_trial_sees_what_a_rule_forgot(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that all is exact, the trial compares with consumers that see zero, and refuses."""
    monkeypatch.setattr(Labels, "mark_inexact", lambda *_: None)
    torch.manual_seed(0)
    model, engine = BUILDS[name]().eval(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(8, 6))
    (group,) = (g for g in engine.structure.groups if g.size == 16)
    assert group.exact
    assert not group.prunable
    assert "differs from the masked model's" in group.reason


class ModulatesAConstant(nn.Module):
    """Grouped convolutions of a learned constant, filters of each sample, divided by their length or not."""

    def __init__(self, demodulated: bool) -> None:
        super().__init__()
        self.const = nn.Parameter(torch.randn(1, 16, 4, 4))
        self.style, self.rgb = nn.Linear(6, 16), nn.Conv2d(10, 3, 1)
        self.weight, self.demodulated = nn.Parameter(torch.randn(10, 16, 3, 3)), demodulated

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        weight = self.weight * (1 + self.style(x))[:, None, :, None, None]
        if self.demodulated:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        given = self.const.repeat(n, 1, 1, 1).reshape(1, -1, 4, 4)
        made = F.conv2d(given, weight.flatten(0, 1), padding=1, groups=n)
        return self.rgb(made.reshape(n, -1, 4, 4).relu())


@pytest.mark.parametrize("demodulated", [True, False])
def test_a_learned_constant_is_read_as_an_activation_is(demodulated: bool) -> None:
    torch.manual_seed(0)
    model, engine = ModulatesAConstant(demodulated), NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(8, 6))
    for group in engine.structure.groups:
        if group.prunable and group.size == 16:
            receipt = engine.prune_units({group.name: UNITS})
            assert receipt.promise == ("changed" if demodulated else "masked")
            break
    else:
        raise AssertionError("no group of the constant's channels")
    model(torch.randn(5, 6)).sum().backward()
