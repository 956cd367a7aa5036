"""What nobody attached, what broke off and what was forgotten: refused, noted, or let go of."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from tests.parts.test_sessions import X, net, same, state, watched
from tracker import NeuronEngine, Policy
from tracker.errors import SurgeryError


@pytest.mark.parametrize("how", ["fused", "foreach", "single"])
@pytest.mark.parametrize("change", ["grow", "shrink"])
def test_an_optimizer_that_nobody_attached_takes_no_step(how: str, change: str) -> None:
    """Its moments are of the old shapes: fused kernels would write beyond them."""
    model = net()
    options = {} if how == "single" else {how: True}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    model(X).sum().backward()
    optimizer.step()
    engine = watched(model)
    if change == "grow":
        receipt = engine.expand_layer("3", 64)
    else:
        receipt = engine.prune_neurons({"3": [0, 1]}, compensate=False)
    assert any("AdamW" in note and "not attached" in note for note in receipt.notes)
    optimizer.zero_grad()
    model(X).sum().backward()
    before = state(model, optimizer)
    with pytest.raises(SurgeryError, match="attach_optimizer"):
        optimizer.step()
    assert same(state(model, optimizer), before)
    engine.undo()
    optimizer.step()  # its state fits again
    engine.attach_optimizer(optimizer)
    assert not engine.expand_layer("3", 2).notes
    model(X).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("tracking", [True, False])
def test_a_pass_that_broke_off_blocks_nothing(error: type[BaseException], tracking: bool) -> None:
    model = net()
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=X)
    if tracking:
        engine.start_tracking()
    inside: list[str] = []

    def stop(*_: object) -> None:
        with pytest.raises(SurgeryError, match="under way") as caught:
            engine.expand_layer("3", 1)
        inside.append(str(caught.value))
        raise error

    _ = engine.structure
    handle = model[3].register_forward_hook(stop)
    with pytest.raises(error):
        model(X)
    handle.remove()
    assert inside
    assert engine.expand_layer("3", 1).added_ids


def test_the_example_keeps_nothing_alive_of_what_made_it() -> None:
    encoder, model, engine = nn.Linear(4, 6), net(), NeuronEngine()
    engine.track_model(model)
    hidden = encoder(torch.randn(8, 4)).tanh()
    alive = weakref.ref(hidden)
    model(hidden).sum().backward()
    assert encoder.weight.grad is not None
    del hidden
    gc.collect()
    assert alive() is None
    assert engine.structure.groups


def test_each_change_of_shape_has_a_receipt() -> None:
    """Those that a run takes back, too: a wrapper has to be renewed after each."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=X)
    engine.attach_optimizer(optimizer)
    engine.start_self_modification(
        Policy(warm_up=4, every=12, look=4, settle=4, tolerance=10.0, regret=0.1)
    )
    operations = []
    for step in range(40):
        before = sum(p.numel() for p in model.parameters())
        loss = model(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        receipt = engine.step(float(step))  # as if each change did harm
        after = sum(p.numel() for p in model.parameters())
        assert (receipt is None) == (before == after)
        if receipt is not None:
            operations.append(receipt.operation)
            assert (receipt.parameters_before, receipt.parameters_after) == (before, after)
    assert {"prune_units", "undo"} <= set(operations)


def test_two_models_of_one_engine_live_side_by_side() -> None:
    models, engine = [net(0), net(1)], NeuronEngine()
    for number, model in enumerate(models):
        engine.track_model(model, str(number), example_inputs=X)
        engine.start_self_modification(
            Policy(warm_up=0, every=6 + number, look=2, settle=2, tolerance=10.0, regret=1e9)
        )
    with pytest.raises(SurgeryError, match="which"):
        _step_of_no_one(engine)
    for _ in range(16):
        for model in models:
            model(X)
            engine.step(1.0, model=model)
    for model in models:
        engine.track_model(model)
        assert engine.journal
        assert [d for d in engine.life if d.what == "pruned"]


def _step_of_no_one(engine: NeuronEngine) -> None:
    engine.track_model(net(2), "third", example_inputs=X)
    engine.step(1.0)


@pytest.mark.parametrize("observe", ["reads", "output"])
def test_layers_are_observed_where_they_are_after_each_change_of_depth(observe: str) -> None:
    """Inserted, removed again, and each taken back: every layer counts each sample of the next pass."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    engine = NeuronEngine(observe=observe)
    engine.track_model(model, "m", example_inputs=X)

    def all_see() -> None:
        engine.start_tracking()
        model(X)
        seen = {k: v["observations"] for k, v in engine.get_dataset_statistics().items()}
        assert len(seen) == sum(map(len, engine.track_model(model).values()))
        assert set(seen.values()) == {len(X)}

    all_see()
    engine.insert_layer("0")
    engine.undo()
    all_see()
    engine.insert_layer("0")
    all_see()
    engine.remove_layer("0.inserted", force=True)
    engine.undo()
    all_see()
    engine.remove_layer("0.inserted", force=True)
    all_see()
