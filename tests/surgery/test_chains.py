"""Laws over random networks and random chains of removals, training steps and undos.

300 chains by default; with TRACKER_LONG=1 (`make long`) 10,000 removals.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.structure.oracle_masks import masked_copy, relative_difference
from tests.zoo_computed import COMPUTED
from tracker import NeuronEngine

# TRACKER_LONG=1 is all of them, n every n-th.
REMOVALS = 10_000 // int(os.environ["TRACKER_LONG"]) if os.environ.get("TRACKER_LONG") else 0
Pick = Callable[[Sequence[Any]], Any]
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


def network(pick: Pick) -> nn.Sequential:
    """One to four blocks between a stem and a head; some compute their weight before they use it."""
    torch.manual_seed(pick(range(1001)))
    width = pick(range(3, 9))
    blocks: list[nn.Module] = [nn.Linear(5, width)]
    for _ in range(pick(range(1, 5))):
        kind = pick(["linear", "linear", "computed", "residual", "branches", "norm"])
        if kind in ("linear", "computed"):
            layer: nn.Module = nn.Linear(width, new := pick(range(3, 9)))
            if kind == "computed":
                layer = COMPUTED[pick(list(COMPUTED))](layer)
            blocks += [layer, pick(ACTIVATIONS)()]
            width = new
        elif kind == "norm":
            blocks.append(nn.BatchNorm1d(width))
        else:
            blocks.append((Residual if kind == "residual" else Branches)(width, pick(range(2, 7))))
    head = nn.Linear(width, 2)
    if pick([False] * 4 + [True]):
        head = COMPUTED[pick(list(COMPUTED))](head)
    return nn.Sequential(*blocks, head)


def some(size: int, pick: Pick) -> list[int]:
    """Some of the units of a group, never all."""
    rest = list(range(size))
    return sorted(rest.pop(pick(range(len(rest)))) for _ in range(pick(range(1, size))))


def chain(pick: Pick) -> int:
    """Each exact removal equals the masked model; each undo gives back the bits; training goes on in between.

    Returns how many removals there were.
    """
    model = network(pick).double()
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine = NeuronEngine()
    engine.track_model(model, "chain", x)
    engine.attach_optimizer(optimizer)
    engine.start_tracking()
    before: dict[str, Tensor] | None = None
    removals = 0
    for _ in range(pick(range(3, 9))):
        action = pick(["prune", "train", "undo"])
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
            group = pick(groups)
            units = some(group.size, pick)
            before = {k: v.clone() for k, v in model.state_dict().items()}
            model.eval()
            with torch.no_grad():
                expected = masked_copy(model, group, units)(x)
                receipt = engine.prune_units({group.name: units})
                assert receipt.promise == ("masked" if group.exact else "changed")
                assert not group.exact or relative_difference(model(x), expected) < 1e-9
            removals += 1
        holds(model, optimizer, engine, engine.track_model(model))
    return removals


def holds(
    model: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    engine: NeuronEngine,
    neuron_map: dict[str, list[int]],
) -> None:
    """Optimizer, statistics and ids are of the model as it is now."""
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert all(id(p) in held for p in model.parameters())
    for p in model.parameters():
        for value in optimizer.state.get(p, {}).values():
            assert not isinstance(value, Tensor) or value.ndim == 0 or value.shape == p.shape
    sizes = engine.get_summary()["layers"]
    assert {k: len(v) for k, v in neuron_map.items()} == sizes
    for name, ids in neuron_map.items():
        assert len(model.get_submodule(name).bias) == len(ids) == len(set(ids))


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
def test_random_chains(data: st.DataObject) -> None:
    chain(lambda options: data.draw(st.sampled_from(options)))


@pytest.mark.skipif(not REMOVALS, reason="make long")
def test_ten_thousand_removals() -> None:
    rng, chains, removals = random.Random(0), 0, 0
    while removals < REMOVALS:
        removals += chain(rng.choice)
        chains += 1
    print(f"{removals} removals in {chains} chains, each equal to the masked model")
