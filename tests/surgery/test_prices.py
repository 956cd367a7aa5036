"""Removals have a price in the loss: exact where that can be known, and in one currency for all groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.subjects import MODELS, equal, prepared, snapshot
from tracker import NeuronEngine, SurgeryError


def squared(output: Tensor, batch: Any) -> Tensor:
    return (output - batch[1]).square().sum(-1).mean()


def linear_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 9), nn.Linear(9, 4))


def engine_of(model: nn.Module, x: Tensor) -> NeuronEngine:
    engine = NeuronEngine()
    engine.track_model(model, "m", x[:8])
    return engine


@pytest.mark.parametrize("units", [{"0": [0, 1, 3, 4, 5, 7, 9, 10]}, {"1": [0, 8, 3, 2, 1]}])
@pytest.mark.parametrize("fitted", [True, False])
def test_the_price_is_the_measured_rise_of_a_quadratic_loss(
    units: dict[str, list[int]], fitted: bool
) -> None:
    """Of a linear network it is exact but for the noise of the probes: with and without a slope to pay for."""
    model = linear_net()
    batches = []
    for seed in range(16):
        x = torch.randn(256, 6, generator=torch.Generator().manual_seed(seed))
        batches.append((x, model(x).detach() * (1.0 if fitted else 1.2)))
    whole = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    engine = engine_of(model, whole[0])
    engine.calibrate(batches, loss=squared)
    before = float(squared(model(whole[0]), whole).detach())
    receipt = engine.prune_units(units, compensate=True)
    rise = float(squared(model(whole[0]), whole).detach()) - before
    assert abs(rise) > 1e-4
    assert receipt.predicted_loss_change == pytest.approx(rise, rel=0.05)


@pytest.mark.parametrize("given", [True, False])
def test_what_says_nothing_costs_nothing(given: bool) -> None:
    """A dead unit, a constant one, and one that depends on others."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    with torch.no_grad():
        model[0].weight[[1, 2]], model[0].bias[1], model[0].bias[2] = 0.0, -1.0, 2.0
        model[0].weight[3], model[0].bias[3] = 2 * model[0].weight[4], 2 * model[0].bias[4]
    x = torch.randn(512, 6)
    batches: list[Any] = [(x, torch.randint(5, (512,))) if given else x]
    loss = (lambda o, b: nn.functional.cross_entropy(o, b[1])) if given else None
    engine = engine_of(model, x)
    engine.calibrate(batches, loss=loss)
    dry = engine.prune_units({"0": [0]}, compensate=True, dry_run=True)
    assert dry.predicted_loss_change is not None
    receipt = engine.prune_units({"0": [1, 2, 3]}, compensate=True)
    assert receipt.predicted_loss_change is not None
    assert abs(receipt.predicted_loss_change) < 1e-6 < abs(dry.predicted_loss_change)


def test_prices_do_not_depend_on_scale_or_order() -> None:
    """A unit made larger and read with less weight is the same unit, in whatever place."""
    torch.manual_seed(2)
    x = torch.randn(400, 6)
    batches = [(x, torch.randint(4, (400,)))]
    found = []
    order = torch.randperm(12)
    for changed in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
        if changed:
            scale = torch.rand(12) + 0.5
            with torch.no_grad():
                model[0].weight.copy_(model[0].weight[order] * scale[:, None])
                model[0].bias.copy_(model[0].bias[order] * scale)
                model[2].weight.copy_(model[2].weight[:, order] / scale)
        engine = engine_of(model, x)
        engine.calibrate(batches, loss=lambda o, b: nn.functional.cross_entropy(o, b[1]))
        gone = [int((order == u).nonzero()) if changed else u for u in (0, 5, 7)]
        # The ridge of the fit knows the scale; what it adds is small.
        found.append(engine.prune_units({"0": gone}, compensate=True).predicted_loss_change)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_the_weighing_decides_which_group_pays() -> None:
    """Two equal branches, of which the loss hears one a hundred times more: the other one shrinks."""
    torch.manual_seed(0)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.soft = nn.Linear(6, 16), nn.Linear(6, 16)
            self.loud_out, self.soft_out = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            loud = self.loud_out(torch.relu(self.loud(x)))
            return torch.cat((10 * loud, self.soft_out(torch.relu(self.soft(x)))), -1)

    model = Branches()
    with torch.no_grad():
        model.soft.load_state_dict(model.loud.state_dict())
        model.soft_out.load_state_dict(model.loud_out.state_dict())
    batches = [(x, model(x).detach()) for x in torch.randn(12, 64, 6)]
    engine = engine_of(model, batches[0][0])
    receipt = engine.compress(0.75, "neurons", batches=batches, loss=squared, progress=False)
    gone = {name: len(units) for name, units in receipt.units.items()}
    assert gone.get("soft", 0) > 2 * gone.get("loud", 0)
    assert receipt.candidates["priced"] == receipt.loss_after


@pytest.mark.parametrize("name", MODELS)
def test_compression_is_never_worse_than_even_shares_on_what_was_held_back(name: str) -> None:
    model, opt, engine, x = prepared(name)
    batches = list(x.chunk(12))
    before = snapshot(model, opt)
    receipt = engine.compress(0.6, batches=batches, progress=False, dry_run=True)
    assert equal(snapshot(model, opt), before)
    assert receipt.loss_before == 0.0  # of no change
    assert receipt.loss_after is not None
    tried = receipt.candidates
    assert {"priced", "even"} <= set(tried)
    assert receipt.loss_after == min(tried.values())
    assert receipt.loss_after <= tried["even"]
    assert "held back" in " ".join(receipt.notes)
    assert receipt.predicted_loss_change is not None


def test_what_is_measured_is_the_model_that_comes_out() -> None:
    """With one batch nothing can be held back: the measured loss is that of the model afterwards, on it."""
    model, _, engine, x = prepared("mlp")
    y = torch.randn(len(x), 4)
    batch = (x, y)
    receipt = engine.compress(0.7, batches=[batch], loss=squared, progress=False)
    assert receipt.loss_after == pytest.approx(float(squared(model(x), batch).detach()), rel=1e-4)
    engine.undo()
    assert receipt.loss_before == pytest.approx(float(squared(model(x), batch).detach()), rel=1e-5)


def test_rounds_come_to_the_same_share_and_go_back_together() -> None:
    model, opt, engine, x = prepared("mlp")
    before, batches = snapshot(model, opt), list(x.chunk(6))
    receipt = engine.compress(0.5, batches=batches, rounds=2, progress=False)
    assert abs(receipt.parameters_after / receipt.parameters_before - 0.5) <= 0.03
    assert receipt.parameters_after == sum(p.numel() for p in model.parameters())
    assert len(engine.journal) == 2
    engine.undo()
    assert equal(snapshot(model, opt), before)
    assert len(engine.journal) == 0


@pytest.mark.parametrize("given", [True, False])
def test_rounds_tell_the_loss_before_the_first_and_after_the_last(given: bool) -> None:
    model, _, engine, x = prepared("mlp")
    batch = (x, torch.randn(len(x), 4))
    old = model(x).detach().double()
    receipt = engine.compress(
        0.4, batches=[batch], loss=squared if given else None, rounds=3, progress=False
    )
    new = model(x).detach().double()
    if given:
        before, after = (float(squared(out, (x, batch[1].double()))) for out in (old, new))
    else:
        before, spread = 0.0, (old - old.mean(0)).square().sum()
        after = float((new - old).square().sum() / spread)
    assert receipt.loss_before == pytest.approx(before, rel=1e-4)
    assert receipt.loss_after == pytest.approx(after, rel=1e-4)


def test_what_was_held_back_counts_once_and_is_called_so_until_it_counts() -> None:
    model, _, engine, x = prepared("mlp")
    batches = list(x.chunk(8))
    receipt = engine.compress(0.7, batches=batches, rounds=2, progress=False)
    assert any("batches held back from the calibration data" in n for n in receipt.notes)  # of each
    assert "measured on 2 batches of the calibration data" in receipt.notes  # of the whole
    engine.compress(0.8, progress=False)
    counts = {int(r.covariance.count.max()) for r in engine.tracker.current.reads.values()}
    assert counts == {len(x)}
    assert bool(model(x).isfinite().all())


def test_units_are_chosen_by_what_was_held_back_as_well() -> None:
    """How many of each group go is settled by then; a unit that is silent until the fourth batch is not among them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = torch.tensor([20.0, 0, 0, 0, 0, 0]), -20.0
        model[2].weight[:, 5] = 3.0
    x = torch.randn(4, 256, 6).clamp(max=0.9)
    x[3, :, 0] = 3.0  # the one that is held back
    engine = engine_of(model, x[3])
    receipt = engine.compress(0.75, "neurons", batches=list(x), progress=False)
    assert len(receipt.units["0"]) == 3
    assert 5 not in receipt.units["0"]


def test_recommendations_carried_out_tell_the_loss_of_all_of_them() -> None:
    model, _, engine, x = prepared("mlp")
    batch = (x, torch.randn(len(x), 4))
    engine.calibrate([batch], loss=squared)
    engine.start_tracking(enable_correlation_analysis=True)
    model(x)
    engine.stop_tracking()
    advice = engine.generate_optimization_recommendations(pruning_threshold=0.4)
    for dry_run in (True, False):
        before = float(squared(model(x), batch).detach())
        receipt = engine.apply_recommendations(advice, dry_run=dry_run)
        assert receipt.removed_ids
        assert receipt.loss_before == pytest.approx(before, rel=1e-5)
        assert any(note.startswith("measured on") for note in receipt.notes)
    assert receipt.loss_after == pytest.approx(float(squared(model(x), batch).detach()), rel=1e-4)


def test_steps_that_miss_the_budget_stop_below_it_or_refuse() -> None:
    model, _, engine, x = prepared("mlp")
    engine.calibrate([x])
    size = sum(p.numel() for p in model.parameters())
    with pytest.raises(SurgeryError, match="cannot be kept"):
        engine.compress(0.9, round_to=4, strict=True, progress=False)
    receipt = engine.compress(0.9, round_to=4, progress=False)
    assert 0.5 * size < receipt.parameters_after < 0.9 * size
    assert any("nearest below" in note for note in receipt.notes)


def test_a_loss_that_does_not_fit_says_so() -> None:
    model, opt, engine, x = prepared("mlp")
    before = snapshot(model, opt)
    with pytest.raises(SurgeryError, match="loss\\(output, batch\\) failed"):
        engine.calibrate([(x, x)], loss=lambda output, batch: output.nothing)
    assert equal(snapshot(model, opt), before)
    assert all(p.requires_grad for p in model.parameters())
