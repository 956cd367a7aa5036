"""What stands in the place of a removed module, and that the receipt tells the truth about it on data not seen."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine, SurgeryError, apply_journal
from tracker.surgery.inserted_modules import Bypass

ACTIVATIONS = [
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.Softplus, nn.Hardswish,
    nn.PReLU,
]  # fmt: skip


def rows(count: int, seed: int, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def explained(found: Tensor, wanted: Tensor) -> float:
    return float(1 - (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def removed(model: nn.Module, name: str, x: Tensor, **options: Any) -> tuple[Any, float]:
    """The receipt, and the share that it tells to be explained."""
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x[:16])
    receipt = engine.remove_layer(name, batches=x.split(max(4, len(x) // 12)), **options)
    told = re.search(r"explains (-?[\d.]+)%", receipt.notes[0])
    assert told, receipt.notes
    return receipt, float(told[1]) / 100


@pytest.mark.parametrize("make", ACTIVATIONS)
def test_an_activation_goes_and_its_readers_make_up_for_it(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), make(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        model[0].weight *= 3  # far from the origin, where activations are not linear
    new = rows(2000, 1)
    with torch.no_grad():
        wanted = model(new)
        _, told = removed(model, "1", rows(3000, 0))
        found = model(new)
        best = torch.cat((new, torch.ones(len(new), 1)), 1)
        linear = best @ torch.linalg.lstsq(best, wanted).solution
    assert type(model[1]) is Bypass
    assert explained(found, wanted) == pytest.approx(told, abs=0.05)
    assert explained(found, wanted) > explained(linear, wanted) - 0.03  # there is no better one


def test_where_no_linear_layer_reads_it_a_line_stands_in_its_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softplus(), nn.Conv2d(4, 3, 3))
    fresh = copy.deepcopy(model)
    x = torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x[:4])
    with torch.no_grad():
        before = model[0](x)
        after = model[1](before)
        slope, constant = torch.linalg.lstsq(
            torch.stack((before.flatten(), torch.ones(before.numel())), 1), after.flatten()[:, None]
        ).solution.flatten()
    receipt = engine.remove_layer("1", batches=x.split(10))
    assert "stands in its place" in receipt.notes[0]
    assert model[1].scale == pytest.approx(float(slope), rel=1e-2)
    assert model[1].shift == pytest.approx(float(constant), rel=1e-2)
    engine.save_checkpoint(tmp_path / "c")
    assert torch.equal(apply_journal(fresh, tmp_path / "c")(x), model(x))


def test_what_is_told_of_few_rows_holds_on_new_ones() -> None:
    """A fit to ten rows explains them all; what it is worth is told by rows that it did not see."""
    told_, true = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
        ).eval()
        with torch.no_grad():
            model[2].weight *= 5
        new = rows(500, 99)
        wanted = model(new).detach()
        receipt, told = removed(model, "2", rows(16, seed), force=True)
        told_.append(told)
        true.append(explained(model(new).detach(), wanted))
        assert "few observations (4)" in str(receipt)
    assert sum(told_) / 6 < sum(true) / 6 + 0.15, (told_, true)


class Inside(nn.Module):
    """Adds to its input itself, far more than that is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return 20 * torch.tanh(self.linear(x)) + x


class Branch(nn.Module):
    """Gives nearly what it took; the sum stands outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        nn.init.eye_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside, self.branch = nn.Linear(6, 8), Inside(), Branch()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(torch.tanh(self.first(x)))
        return self.head(torch.tanh(x + 0.5 * self.branch(x)))


@pytest.mark.parametrize(("name", "scale"), [("inside", 1.0), ("branch", 0.0)])
def test_sums_are_seen_and_not_guessed_from_sizes(name: str, scale: float) -> None:
    torch.manual_seed(0)
    model = Net()
    removed(model, name, rows(100, 0), force=True)
    assert getattr(model, name).scale == scale


def test_a_function_that_no_line_comes_near_stays() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), Square(), nn.Linear(5, 3))
    x = rows(100, 0)
    with pytest.raises(SurgeryError, match=r"only \d% of what it did, on \d+ rows"):
        removed(model, "1", torch.cat((x, -x)))


def test_merges_are_measured_on_batches_held_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x, new = rows(400, 0), rows(2000, 1)
    engine = NeuronEngine(correlation_threshold=0.3)
    engine.track_model(model, "m", example_inputs=x[:4])
    few = engine.merge_neurons(tolerance=1.0, dry_run=True)
    assert "few observations (2)" in str(few)
    assert few.loss_after is None
    wanted = model(new).detach()
    receipt = engine.merge_neurons(tolerance=0.2, batches=x.split(50))
    assert "2 batches held back from" in str(receipt)
    assert receipt.loss_before == 0.0
    rise = 1 - explained(model(new).detach(), wanted)
    assert receipt.loss_after == pytest.approx(rise, rel=0.3)
    assert "few" not in str(receipt)
