"""What tests of self-modification share: a quick policy, a candidate, and a training that checks its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.surgery.subjects import holds_exactly_the_live
from tracker import NeuronEngine
from tracker.training.policy import Candidate, Size

QUICK = {"warm_up": 10, "every": 12, "look": 4, "settle": 6, "floor": 2}


def candidate(name: str = "g", size: int = 10, dead: tuple[int, ...] = ()) -> Candidate:
    """Two units that nobody misses much, and eight that matter; 3 parameters and 6 FLOPs each."""
    errors = (0.0, 0.1, *[5.0] * (size - 3))
    return Candidate(name, name, size, tuple(range(size - 1)), errors, Size(3, 6), dead)


def trained(
    model: nn.Module,
    opt: Any,
    engine: NeuronEngine,
    x: torch.Tensor,
    steps: int,
    *,
    seed: int = 1,
    after: Callable[[], object] = lambda: None,
) -> list[Any]:
    """Receipts of a training of a model that modifies itself; `after` each optimizer step, the optimizer is checked."""
    torch.manual_seed(seed)
    target = torch.randn(len(x), model(x).shape[1])
    receipts = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        after()
        receipts.append(engine.step(loss))
        assert bool(loss.isfinite())
        holds_exactly_the_live(model, opt)
    return [r for r in receipts if r is not None]
