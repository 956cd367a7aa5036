"""Structure is of all paths: after a removal every call of the model runs, or the units were refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import Call, NeuronEngine, StructureError, SurgeryError
from tracker.inputs.serialized import calls_from

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """A hidden layer `a`, read by `out`, and in some calls by `other`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out, self.other = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def h(self, x: Tensor) -> Tensor:
        return self.a(x).relu()


class TrainHead(Net):
    def forward(self, x: Tensor) -> Any:
        h = nn.functional.dropout(self.h(x), 0.4, self.training)
        return (self.out(h), self.other(h)) if self.training else self.out(h)


class Optional(Net):
    def forward(self, x: Tensor, more: bool = False) -> Any:
        h = self.h(x)
        return (self.out(h), self.other(h)) if more else self.out(h)


class Method(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.h(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.other(self.h(x))


class ByData(Net):
    def forward(self, x: Tensor) -> Tensor:
        return (self.out if x.sum() > 0 else self.other)(self.h(x))


CASES: dict[str, tuple[Callable[[], Net], list[Call]]] = {
    "train mode": (TrainHead, [Call(X)]),
    "argument": (Optional, [Call(X), Call(X, more=True)]),
    "method": (Method, [Call(X), Call(X, method="reconstruct")]),
    "data": (ByData, [Call(X.abs()), Call(-X.abs())]),
}
cases = pytest.mark.parametrize(("build", "calls"), CASES.values(), ids=CASES)


def outputs(model: nn.Module, calls: list[Call], training: bool) -> list[Tensor]:
    model.train(training)
    found: list[Tensor] = []
    with torch.no_grad():
        for call in calls:
            torch.manual_seed(7)
            out = getattr(model, call.method)(*call.args, **call.kwargs)
            found += out if isinstance(out, tuple) else [out]
    return found


@cases
def test_every_call_of_the_cut_model_is_the_masked_one(
    build: Callable[[], Net], calls: list[Call]
) -> None:
    torch.manual_seed(0)
    model, engine = build(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=calls)
    assert engine.structure.unseen == ()
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for reader in (masked.out, masked.other):
            reader.weight[:, [1, 6]] = 0
    receipt = engine.prune_neurons({"a": [1, 6]}, compensate=False)
    assert receipt.promise == "masked"
    for a, b in zip(outputs(model, calls, False), outputs(masked, calls, False), strict=True):
        torch.testing.assert_close(a, b)
    model.train()
    sum(t.sum() for call in calls for t in _flat(model, call)).backward()
    assert model.other.weight.grad is not None
    assert model.other.weight.grad.shape == (4, 6)


def _flat(model: nn.Module, call: Call) -> tuple[Tensor, ...]:
    out = getattr(model, call.method)(*call.args, **call.kwargs)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", ["argument", "method", "data"])
def test_what_an_unseen_module_could_read_is_refused_by_its_name(name: str) -> None:
    build, calls = CASES[name]
    torch.manual_seed(0)
    model, engine = build(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=calls[0])
    assert engine.structure.unseen == ("other.weight", "other.bias")
    assert "other: 36 parameters" in str(engine.structure)
    with pytest.raises(SurgeryError, match=r"no example call ran other.*assume_unread=\['other'\]"):
        engine.prune_neurons({"a": [1]}, compensate=False)
    outputs(model, calls, True)
    free = NeuronEngine()
    free.track_model(model, "m", example_inputs=calls[0], assume_unread=["other"])
    receipt = free.prune_neurons({"a": [1]}, compensate=False)
    assert receipt.notes == ["assumed to be run by nobody: other"]


def test_assumed_modules_have_to_be_there() -> None:
    with pytest.raises(StructureError, match=r"no such module or parameter\. Near: other"):
        NeuronEngine().track_model(Method(), "m", example_inputs=X, assume_unread=["othr"])
    with pytest.raises(StructureError, match="a list of names"):
        NeuronEngine().track_model(Method(), "m", example_inputs=X, assume_unread="other")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.gate, self.o = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(5, 2)
        self.e = nn.ModuleList(nn.Linear(12, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x).relu()
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros(x.shape[0], self.e[0].out_features)
        for j, expert in enumerate(self.e):
            at = (chosen == j).nonzero()[:, 0]
            if len(at):
                y = y.index_add(0, at, expert(x[at]))
        return self.o(y)


def test_experts_that_no_row_chose_are_named_and_never_torn() -> None:
    torch.manual_seed(0)
    model, engine = Experts(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(1, 6))
    unseen = {name.rpartition(".")[0] for name in engine.structure.unseen}
    assert len(unseen) == 3
    assert all(name in str(engine.structure) for name in unseen)
    assert not any(group.prunable for group in engine.structure.groups)
    model(torch.randn(64, 6))


class Targets(Net):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.training and y is None:
            raise ValueError("targets are wanted")
        found = self.out(self.h(x))
        return found if y is None else (self.other(self.h(x)).sum() + found - y).square().mean()


def test_a_mode_that_cannot_run_is_said() -> None:
    model, engine = Targets(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=X)
    ((call, why),) = engine.structure.passes.failed
    assert call.training
    assert "targets are wanted" in why
    assert "in train mode: targets are wanted" in str(engine.structure)
    told = NeuronEngine()
    told.track_model(model, "m", example_inputs=[X, Call(X, torch.randn(6, 3), training=True)])
    assert told.structure.passes.failed == []
    assert told.structure.unseen == ()
    assert told.prune_neurons({"a": [0]}, compensate=False).notes == []


class Moving(nn.Module):
    """All that train mode moves: statistics, random numbers, attributes, weights that the forward writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.code = nn.Parameter(torch.randn(4), requires_grad=False)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.dropout(self.norm(self.a(x)), 0.5, self.training)
        if self.training:
            self.steps += 1
            self.code.data.mul_(0.9)
            h = h + torch.rand(len(h), 1) * self.code.sum()
        return self.out(h.relu())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows", [6, 1])
def test_passes_in_train_mode_leave_nothing_behind(double: bool, rows: int) -> None:
    torch.manual_seed(0)
    model = Moving().double() if double else Moving()
    x = X.double() if double else X
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x[:rows])
    before = copy.deepcopy(model.state_dict())
    noise = torch.get_rng_state()
    assert engine.structure.passes.failed == []
    engine.prune_neurons({"a": [0]}, compensate=False, dry_run=True)
    assert torch.equal(noise, torch.get_rng_state())
    assert model.steps == 0
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert engine.prune_neurons({"a": [0, 3]}, compensate=False).promise == "masked"
    assert model.steps == 0
    assert torch.equal(model.code, before["code"])


def test_paths_that_differ_by_chance_alone_are_recorded_once() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
            self.gru, self.out = nn.GRU(8, 6, 2, dropout=0.3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.dropout(self.norm(self.a(x)), 0.2, self.training, inplace=True)
            branch = self.b(h)
            if self.training:  # stochastic depth
                branch = branch * branch.new_empty(len(h), 1).bernoulli_(0.8).div_(0.8)
            return self.out(self.gru(h + branch)[0])

    model, engine = Dropping(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=X)
    passes = engine.structure.passes
    assert [c.training for c in passes.recorded] == [False]
    assert [c.training for c in passes.alike] == [True]


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(11, 12), nn.Linear(12, 11)
        self.pos = nn.Parameter(torch.randn(1, 64, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.e(x) + self.pos[:, : x.shape[1]])


@pytest.mark.parametrize("length", [1, 8])
def test_rows_that_no_call_reached_are_no_units(length: int) -> None:
    model, engine = Positions(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randint(0, 11, (2, length)))
    structure = engine.structure
    assert not any(("pos", 1) in group.roles for group in structure.groups)
    why = next(f.reason for f in structure.frozen if (f.tensor, f.dim) == ("pos", 1))
    assert length == 1 or "combined with values of a fixed size" in why or "8 to 63" in why
    engine.compress(keep=0.6, progress=False)
    model(torch.randint(0, 11, (2, 64)))


def test_what_only_train_mode_reads_is_compensated_too() -> None:
    torch.manual_seed(0)
    model, engine = TrainHead(), NeuronEngine()
    x = torch.randn(64, 5)
    with torch.no_grad():
        model.a.weight[3], model.a.bias[3] = model.a.weight[1], model.a.bias[1]
    engine.track_model(model, "m", example_inputs=x)
    model.train()
    torch.manual_seed(1)
    before = model.other(model.h(x)).detach()
    receipt = engine.prune_neurons({"a": [3]}, compensate=True)
    assert receipt.promise == "exact"
    torch.testing.assert_close(model.other(model.h(x)).detach(), before)


@pytest.mark.parametrize("assumed", [[], ["other"]], ids=["all calls", "assumed"])
@cases
def test_a_checkpoint_keeps_the_calls(
    build: Callable[[], Net], calls: list[Call], assumed: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, engine = build(), NeuronEngine()
    shown = calls[:1] if assumed else calls
    engine.track_model(model, "m", example_inputs=shown, assume_unread=assumed)
    fresh = build()  # kept: engines hold models weakly
    loaded = NeuronEngine.load_checkpoint(engine.save_checkpoint(tmp_path / "c"), fresh)
    assert str(loaded.structure.passes) == str(engine.structure.passes)
    assert loaded.structure.unseen == engine.structure.unseen
    assert str(loaded.structure) == str(engine.structure)
    assert loaded.structure.assumed == engine.structure.assumed


def test_a_file_names_no_method_of_every_module() -> None:
    model = Method()
    how: dict[str, Any] = {"how": [["forward", None], ["double", None]]}
    how["more"] = {"list": [{"tuple": [{"tuple": []}, {"dict": {}}]}]}
    with pytest.raises(ValueError, match="'double' is no call of the model"):
        calls_from({}, how, ((X,), {}), model)
    how["how"] = [["forward", None], ["reconstruct", None]]
    assert [c.method for c in calls_from({}, how, ((X,), {}), model)] == ["forward", "reconstruct"]
