"""Groups that no mask can stand for: each removal against the whole model with its norms taken over the kept units."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.oracle_masks import masked_copy, no_fast_path, randomise, relative_difference
from tests.zoo import ZOO
from tests.zoo_dense import Between, EinsumMoE
from tracker import NeuronEngine


class Rooted(nn.Module):
    """A residual stream under root mean squares, one of them written out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 10), nn.RMSNorm(10, eps=1e-6)
        self.up, self.down = nn.Linear(10, 7), nn.Linear(7, 10)
        self.gamma, self.head = nn.Parameter(torch.ones(10)), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        return self.head(self.gamma * h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt())


def kept(size: int, units: list[int]) -> list[int]:
    return [i for i in range(size) if i not in units]


def over(module: nn.Module, keep: list[int]) -> Callable[[Tensor], Tensor]:
    """The norm's forward over the kept units alone; zero in the place of the others."""

    def forward(x: Tensor) -> Tensor:
        part, w = x[..., keep], module.weight[keep]
        centred = part - part.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else part
        result = centred * (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt() * w
        if isinstance(module, nn.LayerNorm):
            result = result + module.bias[keep]
        out = torch.zeros_like(x)
        out[..., keep] = result
        return out

    return forward


def normed_over_the_kept(model: nn.Module, group: Any, units: list[int]) -> nn.Module:
    whole = masked_copy(model, group, units)
    names = {part.tensor.rpartition(".")[0] for part in group.slices(units)}
    for name, module in whole.named_modules():
        if name in names and isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.forward = over(module, kept(len(module.weight), units))
    if isinstance(whole, Rooted):
        keep = kept(10, units)

        def forward(x: Tensor) -> Tensor:
            h = whole.stem(x)
            h = h + whole.down(torch.relu(whole.up(whole.norm(h))))
            root = (h[..., keep].square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            return whole.head(whole.gamma * h * root)

        whole.forward = forward
    return whole


BUILDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    **{
        n: (ZOO[n].build, ZOO[n].inputs)
        for n in ("transformer", "transformer_fused", "transformer_gqa", "encoder_layer")
    },
    "root mean square": (Rooted, lambda: (torch.randn(5, 6),)),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 3)),
        lambda: (torch.randn(5, 6),),
    ),
}


def prepared(build: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = randomise(build(), 0).double().eval()
    x = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    return model, x, engine


@pytest.mark.parametrize("name", BUILDS)
def test_norms_over_the_kept_units(name: str) -> None:
    build, inputs = BUILDS[name]
    model, x, engine = prepared(build, inputs())
    groups = [g for g in engine.structure.groups if g.prunable and not g.exact]
    assert groups
    for group in groups:
        units = [1, *range(2, group.size, 4)]
        oracle, plain = normed_over_the_kept(model, group, units), masked_copy(model, group, units)
        receipt = engine.prune_units({group.name: units})
        assert receipt.promise == "changed"
        with torch.no_grad(), no_fast_path():
            found = model(*x)
            assert relative_difference(found, oracle(*x)) < 1e-12
            assert relative_difference(found, plain(*x)) > 1e-3  # the mask is another function
        engine.undo()


def test_softmax_over_the_kept_units() -> None:
    x = (torch.randn(5, 6),)
    model, x, engine = prepared(ZOO["softmax_units"].build, x)
    before = copy.deepcopy(model)
    assert isinstance(before, Between)
    engine.prune_units({"first": [0, 4]})
    keep = kept(10, [0, 4])
    shares = before.first(*x)[:, keep].softmax(-1)
    expected = F.linear(shares, before.last.weight[:, keep], before.last.bias)
    with torch.no_grad():
        assert relative_difference(model(*x), expected.detach()) < 1e-12


def test_experts_share_among_the_kept() -> None:
    model, x, engine = prepared(EinsumMoE, (torch.randn(5, 6),))
    before = copy.deepcopy(model)
    (group,) = [g for g in engine.structure.groups if ("w1", 0) in g.roles and not g.exact]
    engine.prune_units({group.name: [1]})
    keep = kept(group.size, [1])
    with torch.no_grad():
        for name in ("w1", "w2"):
            getattr(before, name).set_(getattr(before, name)[keep].clone())
        before.router.weight.set_(before.router.weight[keep].clone())
        if before.router.bias is not None:
            before.router.bias.set_(before.router.bias[keep].clone())
        assert relative_difference(model(*x), before(*x)) < 1e-12
