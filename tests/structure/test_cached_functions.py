"""Shapes that Python's caches computed before: what ran first decides nothing."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine


@functools.lru_cache(maxsize=64)
def heads_first(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    return (*shape[:-1], heads, shape[-1] // heads)


@functools.cache
def the_one() -> list[int]:
    return []


class Cached(nn.Module):
    """Heads by shapes from a cached function, or from a cached method."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 2)
        self.how, self.heads = how, 4

    @functools.cached_property
    def other(self) -> int:
        return 3

    @staticmethod
    def plain(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
        return heads_first.__wrapped__(shape, heads)

    @functools.lru_cache  # noqa: B019
    def of_method(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], self.heads, shape[-1] // self.heads)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        if self.how == "einops":
            import einops

            h = einops.rearrange(h, "b t (h d) -> b h t d", h=self.heads)
            return self.last(einops.rearrange(h, "b h t d -> b t (h d)"))
        shape = (
            self.plain(tuple(h.shape), self.heads)
            if self.how == "plain"
            else self.of_method(tuple(h.shape))
            if self.how == "method"
            else heads_first(tuple(h.shape), self.heads)
        )
        the_one().append(1)
        return self.last(h.view(*shape).transpose(1, 2).transpose(1, 2).reshape(*h.shape[:-1], -1))


def found(how: str) -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    model, engine = Cached(how), NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(2, 5, 6))
    groups = [(g.name, g.size, g.prunable) for g in engine.structure.groups]
    for group in [g for g in engine.structure.groups if g.prunable]:
        engine.prune_units({group.name: [1]})
        model(torch.randn(3, 5, 6)).sum().backward()
        engine.undo()
    return groups


@pytest.mark.parametrize("how", ["function", "method", "einops"])
def test_what_ran_first_decides_nothing(how: str) -> None:
    if how == "einops":
        pytest.importorskip("einops")
    heads_first.cache_clear()
    cold, warm = found(how), None
    for width in (6, 9):
        Cached(how)(torch.randn(2, 5, 6))
        heads_first((2, 5, width * 2), 4)
    warm = found(how)
    assert cold == warm == found("plain")
    assert any(prunable for *_, prunable in cold)


def test_caches_stay_what_they_are() -> None:
    """The same objects afterwards, nothing traced in them, and what is made once is made once."""
    before, once = heads_first, the_one()
    method = vars(Cached)["of_method"]
    found("function")
    assert sys.modules[__name__].heads_first is before
    assert vars(Cached)["of_method"] is method
    assert the_one() is once
    assert once
    assert all(type(n) is int for n in heads_first((2, 5, 12), 4))
