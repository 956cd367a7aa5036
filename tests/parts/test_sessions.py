"""What an engine keeps of a model belongs to that model alone; what is only tried leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine, Receipt
from tracker.errors import SurgeryError

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(3))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    with torch.no_grad():
        model[3].bias[:3] = -100.0
    return model


def state(model: nn.Module, *optimizers: Any) -> list[Tensor]:
    found = [*model.state_dict().values()]
    for optimizer in optimizers:
        found += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [t.clone() for t in found]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


CHANGES: dict[str, Callable[..., Any]] = {
    "prune_units": lambda e, **k: e.prune_units({e.structure.groups[0].name: [0]}, **k),
    "prune_neurons": lambda e, **k: e.prune_neurons({"3": [0, 1]}, **k),
    "merge_neurons": lambda e, **k: e.merge_neurons(
        [tuple(e.tracker.current.layers["3"].ids[:2])], **k
    ),
    "expand_layer": lambda e, **k: e.expand_layer("3", 2, **k),
    "expand_layers": lambda e, **k: e.expand_layers({"0": 2, "3": 1}, **k),
    "recycle_neurons": lambda e, **k: e.recycle_neurons({"3": [0]}, **k),
    "compress": lambda e, **k: e.compress(0.7, progress=False, **k),
    "insert_layer": lambda e, **k: e.insert_layer("3", **k),
    "remove_layer": lambda e, **k: e.remove_layer("3", force=True, **k),
    "apply_recommendations": lambda e, **k: e.apply_recommendations(
        e.generate_optimization_recommendations(), **k
    ),
}


def watched(model: nn.Module, engine: NeuronEngine | None = None, name: str = "m") -> NeuronEngine:
    engine = engine or NeuronEngine()
    engine.track_model(model, name, example_inputs=X)
    engine.start_tracking(enable_correlation_analysis=True)
    model.eval()(X)
    model.train()
    engine.stop_tracking()
    return engine


@pytest.mark.parametrize("name", CHANGES)
def test_a_dry_run_leaves_no_trace(name: str) -> None:
    """Between forward and backward: counters of versions, ids, random state, hooks, statistics, journal."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = watched(model)
    engine.attach_optimizer(optimizer)
    model(X).sum().backward()
    optimizer.step()
    tensors = [*model.parameters(), *model.buffers()]
    for mode in (True, False):
        loss = model.train(mode)(X).square().mean()
        facts = [
            [(id(t), t._version, t.data_ptr()) for t in tensors],
            {n: list(x.ids) for n, x in engine.tracker.current.layers.items()},
            engine.tracker.registry._next,
            [id(m) for m in model.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            engine.tracker.current.observer.version,
            len(engine.journal),
        ]
        before, noise = state(model, optimizer), torch.get_rng_state()
        receipt = CHANGES[name](engine, dry_run=True)
        assert receipt.dry_run
        assert receipt.parameters_before == sum(p.numel() for p in model.parameters())
        assert same(state(model, optimizer), before)
        assert torch.equal(torch.get_rng_state(), noise)
        assert facts == [
            [(id(t), t._version, t.data_ptr()) for t in tensors],
            {n: list(x.ids) for n, x in engine.tracker.current.layers.items()},
            engine.tracker.registry._next,
            [id(m) for m in model.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            engine.tracker.current.observer.version,
            len(engine.journal),
        ]
        loss.backward()
    with pytest.raises(SurgeryError, match="no change to undo"):
        engine.undo()
    told, done = CHANGES[name](engine, dry_run=True), CHANGES[name](engine)
    assert (told.parameters_after, told.units) == (done.parameters_after, done.units)
    assert done.parameters_after == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["prune_neurons", "apply_recommendations", "insert_layer"])
def test_two_models_of_one_engine_know_nothing_of_each_other(name: str) -> None:
    a, b = net(0), net(1)
    engine = watched(a, name="a")
    following, ema = torch.optim.Adam(a.parameters()), copy.deepcopy(a)
    engine.attach_optimizer(following)
    engine.attach_follower(ema)
    both = torch.optim.Adam([*a.parameters(), *b.parameters()])
    engine.attach_optimizer(both)
    a(X).sum().backward()
    following.step()
    before = state(a, following), state(ema)
    watched(b, engine, "b")
    b(X).sum().backward()
    both.step()
    assert isinstance(CHANGES[name](engine), Receipt)
    assert engine.journal
    assert same(state(ema), before[1])
    for parameter in b.parameters():
        if parameter in both.state:
            assert both.state[parameter]["exp_avg"].shape == parameter.shape
    engine.track_model(a)
    assert not engine.journal
    with pytest.raises(SurgeryError, match="no change to undo"):
        engine.undo()
    changed_b = state(b)
    CHANGES[name](engine)
    assert [p.shape for p in ema.parameters()] == [p.shape for p in a.parameters()]
    back = engine.undo()
    assert (back.operation, back.parameters_after) == (
        "undo",
        sum(p.numel() for p in a.parameters()),
    )
    assert same(state(ema), before[1])
    assert same(state(b), changed_b)
    engine.track_model(b)
    assert engine.undo().parameters_after == sum(p.numel() for p in net().parameters())


def test_what_does_not_fit_is_not_attached() -> None:
    model = net()
    engine = NeuronEngine()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(SurgeryError, match="track_model"):
        engine.attach_optimizer(optimizer)
    engine.track_model(model, "m", example_inputs=X)
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), 0.1)
    for wrong in ("adam", None, model.parameters(), model, other):
        with pytest.raises(SurgeryError, match=r"no optimizer|holds no parameter"):
            engine.attach_optimizer(optimizer, wrong)
        with pytest.raises(SurgeryError, match="not attached"):
            engine.detach_optimizer(optimizer)
    for stranger in ("ema", optimizer, model, nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 4))):
        with pytest.raises(SurgeryError, match=r"copy|follow"):
            engine.attach_follower(stranger)  # type: ignore[arg-type]
    follower = torch.optim.swa_utils.AveragedModel(model)
    engine.attach_optimizer(optimizer)
    engine.attach_follower(follower)
    engine.prune_neurons({"3": [0]})
    assert follower.module[3].weight.shape == model[3].weight.shape
    engine.detach_optimizer(optimizer)
    engine.detach_follower(follower)
    engine.prune_neurons({"3": [0]})
    assert len(follower.module[3].weight) == len(model[3].weight) + 1
    with pytest.raises(SurgeryError, match="does not follow"):
        engine.detach_follower(follower)
