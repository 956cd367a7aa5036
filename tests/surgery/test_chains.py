"""Laws over random networks and random chains of removals, training steps and undos."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.structure.oracle_masks import masked_copy, relative_difference
from tracker import NeuronEngine

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid)


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Branches(nn.Module):
    """Two branches side by side, of which one is cut in halves that gate each other."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, hidden), nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(2 * hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.b(x).chunk(2, dim=-1)
        return self.out(torch.cat((self.a(x), left * torch.sigmoid(right)), -1))


@st.composite
def networks(draw: st.DrawFn) -> nn.Sequential:
    """Two to five blocks between a stem and a head."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    width = draw(st.integers(3, 8))
    blocks: list[nn.Module] = [nn.Linear(5, width)]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["linear", "residual", "branches", "norm"]))
        if kind == "linear":
            new = draw(st.integers(3, 8))
            blocks += [nn.Linear(width, new), draw(st.sampled_from(ACTIVATIONS))()]
            width = new
        elif kind == "norm":
            blocks.append(nn.BatchNorm1d(width))
        else:
            blocks.append(
                (Residual if kind == "residual" else Branches)(width, draw(st.integers(2, 6)))
            )
    return nn.Sequential(*blocks, nn.Linear(width, 2))


@pytest.mark.slow
@given(
    model=networks(),
    actions=st.lists(st.sampled_from(["prune", "train", "undo"]), min_size=3, max_size=8),
    data=st.data(),
)
@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
def test_random_chains(model: nn.Sequential, actions: list[str], data: st.DataObject) -> None:
    """Each removal equals the masked model; each undo gives back the bits; training goes on in between."""
    model = model.double()
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine = NeuronEngine()
    neuron_map = engine.track_model(model, "chain", x)
    engine.attach_optimizer(optimizer)
    engine.start_tracking()
    before: dict[str, Tensor] | None = None
    for action in actions:
        groups = [g for g in engine.structure.groups if g.prunable]
        if action == "train":
            model.train()(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            before = None  # an undo now would take back more than the removal
        elif action == "undo" and before is not None:
            engine.undo()
            assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
            before = None
        elif action == "prune" and groups:
            group = data.draw(st.sampled_from(groups))
            units = data.draw(
                st.sets(st.integers(0, group.size - 1), min_size=1, max_size=group.size - 1)
            )
            before = {k: v.clone() for k, v in model.state_dict().items()}
            model.eval()
            with torch.no_grad():
                expected = masked_copy(model, group, sorted(units))(x)
                engine.prune_units({group.name: sorted(units)})
                assert relative_difference(model(x), expected) < 1e-9
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert all(id(p) in held for p in model.parameters())
        for p in model.parameters():
            for value in optimizer.state.get(p, {}).values():
                assert not isinstance(value, Tensor) or value.ndim == 0 or value.shape == p.shape
        sizes = engine.get_summary()["layers"]
        assert {k: len(v) for k, v in neuron_map.items()} == sizes
        for name, ids in neuron_map.items():
            assert len(model.get_submodule(name).bias) == len(ids) == len(set(ids))
