"""What a model keeps from pass to pass is as it was: no pass that the engine makes leaves anything in it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine, StructureError, SurgeryError


class Two(nn.Module):
    """Two layers, and something that is kept between passes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.kept: Any = None

    def keep(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.keep(self.a(x).relu()))


class Counted(Two):
    def keep(self, h: Tensor) -> Tensor:
        self.kept = (self.kept or 0) + 1
        return h


class Streamed(Two):
    """The graph of the last pass hangs on what is kept."""

    def keep(self, h: Tensor) -> Tensor:
        self.kept = h if self.kept is None else h + self.kept / 2
        return h


class Written(Two):
    """Kept in a plain tensor, which is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(())

    def keep(self, h: Tensor) -> Tensor:
        self.kept.add_(h.detach().mean())
        return h + self.kept


class Listed(Two):
    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def keep(self, h: Tensor) -> Tensor:
        self.kept.append(h)
        return h


class Named(Two):
    def __init__(self) -> None:
        super().__init__()
        self.kept = {"calls": 0}

    def keep(self, h: Tensor) -> Tensor:
        self.kept["calls"] += 1
        self.kept["last"] = h
        return h


class Renormalised(nn.Module):
    """Each pass writes into the rows that it looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.b = nn.Embedding(11, 16, max_norm=0.5), nn.Linear(16, 3)

    def forward(self, i: Tensor) -> Tensor:
        return self.b(self.e(i))


class Drawn(Two):
    """Something is drawn in eval mode, too, by a generator that is not torch's."""

    def keep(self, h: Tensor) -> Tensor:
        return h * random.random()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.arange(10).reshape(2, 5)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    **{kind.__name__: (kind, X, X) for kind in (Counted, Streamed, Written, Listed, Named, Drawn)},
    "Renormalised": (Renormalised, ROWS[:, :1], ROWS),
}


def kept(model: nn.Module) -> Any:
    """All that a model holds, as plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else copy.copy(value)

    return plain(getattr(model, "kept", None)), plain(dict(model.state_dict())), random.getstate()


@pytest.mark.parametrize("name", CASES)
def test_no_pass_of_the_engine_leaves_anything_in_a_model(name: str) -> None:
    build, first, x = CASES[name]
    torch.manual_seed(0)
    model, engine = build(), NeuronEngine()
    model(first)  # the user's own pass, with its graph
    before = kept(model)
    engine.track_model(model, "m", example_inputs=x)
    groups = [group.name for group in engine.structure.groups if group.prunable]
    with suppress(SurgeryError):  # what is kept may have the units' width
        engine.prune_units({name: [0, 3] for name in groups}, dry_run=True)
    with suppress(SurgeryError):
        engine.expand_layer("b" if name == "Renormalised" else "a", 2, dry_run=True)
    assert kept(model) == before
    with suppress(SurgeryError):
        engine.prune_units({name: [0, 3] for name in groups})
        assert kept(model)[0] == before[0]


def test_a_model_that_nobody_ran_keeps_nothing_of_the_trace() -> None:
    torch.manual_seed(0)
    model, engine = Streamed(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=X)
    assert engine.prune_units({"a": [0, 3]}, compensate=False).promise == "masked"
    assert model.kept is None
    assert model(X).shape == (4, 3)


class Prepared(Two):
    """Registers hooks in its first pass, and notes that it did, as models of transformers do."""

    def keep(self, h: Tensor) -> Tensor:
        if not getattr(self, "is_prepared", False):
            self.a.register_forward_hook(lambda _module, _args, y: y * 2)
            self.b.register_forward_pre_hook(
                lambda _module, args, _kwargs: ((args[0] + 1,), {}), with_kwargs=True
            )
            self.is_prepared = True
        return h


def test_what_prepares_itself_in_its_first_pass_is_prepared_once() -> None:
    torch.manual_seed(0)
    model, engine = Prepared(), NeuronEngine()
    untouched = copy.deepcopy(model)
    engine.track_model(model, "m", example_inputs=X)
    engine.start_tracking()
    assert engine.prune_units({"a": [0, 3]}, dry_run=True).promise == "masked"
    for _ in range(3):
        assert torch.equal(model(X), untouched(X))
    engine.stop_tracking()
    assert len(untouched.a._forward_hooks) == len(untouched.b._forward_pre_hooks) == 1


def test_a_hook_that_takes_itself_away_is_still_there() -> None:
    torch.manual_seed(0)
    model, engine = Counted(), NeuronEngine()
    seen = []

    def first(module: nn.Module, args: Any, y: Tensor) -> None:
        handle.remove()
        seen.append(len(y))

    handle = model.a.register_forward_hook(first, always_call=True)
    engine.track_model(model, "m", example_inputs=X)
    assert list(model.a._forward_hooks_always_called) == [handle.id]
    seen.clear()
    model(X)
    model(X)
    assert seen == [4]


def test_what_a_model_draws_is_the_same_in_each_pass() -> None:
    """Else a masked and a cut model, each with numbers of its own, would be taken for different."""
    torch.manual_seed(0)
    model, engine = Drawn(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=X)
    receipt = engine.prune_units({"a": [0, 3]}, compensate=False)
    assert receipt.promise == "masked"
    assert receipt.output_difference is not None
    assert receipt.output_difference < 1e-9


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("part", [nn.ReLU(), nn.Linear(16, 16)], ids=["activation", "layer"])
def test_a_scripted_part_is_watched_around_and_refused_by_name(part: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), torch.jit.script(part), nn.Linear(16, 3))
    engine = NeuronEngine()
    assert list(engine.track_model(model, "m", example_inputs=X)) == ["0", "2"]
    engine.start_tracking()
    model(X)
    assert engine.get_dataset_statistics()
    with pytest.raises(StructureError, match="1 is scripted"):
        _ = engine.structure
