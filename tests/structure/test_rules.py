"""Each rule for itself: one operation between two layers, removal against the masked original in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.oracle_masks import masked_copy, randomise, relative_difference, run
from tracker import NeuronEngine
from tracker.structure import trace_structure
from tracker.structure.axes import Labels

HIDDEN = 16


class Between(nn.Module):
    """A layer, the operation, and a layer that reads what comes out."""

    def __init__(self, first: nn.Module, operation: Callable[[Tensor], Tensor], last: nn.Module):
        super().__init__()
        self.first, self.last = first, last
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)))


def rows(operation: Callable[[Tensor], Tensor], width: int = HIDDEN) -> tuple[nn.Module, Tensor]:
    """Between linear layers, on (batch, 5 positions, hidden)."""
    torch.manual_seed(0)
    model = Between(nn.Linear(3, HIDDEN), operation, nn.Linear(width, 2))
    return randomise(model, 0).eval(), torch.randn(4, 5, 3)


def flat(operation: Callable[[Tensor], Tensor], width: int = HIDDEN) -> tuple[nn.Module, Tensor]:
    """Between linear layers, on (batch, hidden)."""
    torch.manual_seed(0)
    model = Between(nn.Linear(3, HIDDEN), operation, nn.Linear(width, 2))
    return randomise(model, 0).eval(), torch.randn(4, 3)


def maps(operation: Callable[[Tensor], Tensor], width: int = HIDDEN) -> tuple[nn.Module, Tensor]:
    """Between convolutions, on (batch, hidden, 6, 6)."""
    torch.manual_seed(0)
    model = Between(nn.Conv2d(2, HIDDEN, 1), operation, nn.Conv2d(width, 2, 1))
    return randomise(model, 0).eval(), torch.randn(2, 2, 6, 6)


def signals(operation: Callable[[Tensor], Tensor], width: int = HIDDEN) -> tuple[nn.Module, Tensor]:
    """Between convolutions, on (batch, hidden, 6)."""
    torch.manual_seed(0)
    model = Between(nn.Conv1d(2, HIDDEN, 1), operation, nn.Conv1d(width, 2, 1))
    return randomise(model, 0).eval(), torch.randn(2, 2, 6)


def volumes(operation: Callable[[Tensor], Tensor], width: int = HIDDEN) -> tuple[nn.Module, Tensor]:
    """Between convolutions, on (batch, hidden, 4, 4, 4)."""
    torch.manual_seed(0)
    model = Between(nn.Conv3d(2, HIDDEN, 1), operation, nn.Conv3d(width, 2, 1))
    return randomise(model, 0).eval(), torch.randn(2, 2, 4, 4, 4)


AT = torch.tensor([[3, 1, 0], [2, 2, 4]])
PLACES = torch.arange(4 * 3 * HIDDEN).reshape(4, 3, HIDDEN) % 5
CHOSEN = torch.arange(60).reshape(4, 5, 3) % HIDDEN
GRID = torch.rand(2, 3, 3, 2) * 2 - 1


def written(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, torch.tensor([4, 1, 0])] = h[:, :3]
    return out


def index_add(h: Tensor) -> Tensor:
    return h.index_add(1, torch.tensor([4, 1, 0]), h[:, :3] * 2)


def index_copy(h: Tensor) -> Tensor:
    return h.index_copy(1, torch.tensor([4, 1, 0]), h[:, :3] * 2)


def filled(h: Tensor, mask: Tensor, at: tuple[Any, ...] = ()) -> Tensor:
    out = h * 1
    out[(*at, mask)] = 2.0
    return out


def restrided(h: Tensor) -> Tensor:
    pooled = F.adaptive_avg_pool2d(h.contiguous(memory_format=torch.channels_last), 1)
    return pooled.flatten(1)[:, :, None, None]


def unpool(h: Tensor) -> Tensor:
    return F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2)


def normalised(h: Tensor) -> Tensor:
    return h / torch.linalg.vector_norm(h, dim=-1, keepdim=True)


def spectrum(h: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.rfft(h, dim=1)).sum(-1)


def complex_rows(h: Tensor) -> Tensor:
    pairs = torch.view_as_complex(torch.stack([h, h * 2], -1))
    return torch.view_as_real(pairs * pairs).sum(-1)


def added(h: Tensor) -> Tensor:
    at = AT[0, :, None].expand(4, 3, h.shape[-1])
    return torch.zeros_like(h).scatter_add(1, at, h[:, :3] * h[:, :3].amax(1, keepdim=True))


def turned(h: Tensor) -> Tensor:
    pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * pairs[:, :1]).flatten(-2)


# The hidden units can go, and the rest is as if they were masked.
PASSES: dict[str, tuple[Callable[..., Any], ...]] = {
    "roll": (rows, lambda h: h.roll(1, 1)),
    "flip": (rows, lambda h: h.flip(1)),
    "cumsum": (rows, lambda h: h.cumsum(1)),
    "cumprod": (rows, lambda h: h.cumprod(-2)),
    "cummax": (rows, lambda h: h.cummax(1).values),
    "logcumsumexp": (rows, lambda h: h.logcumsumexp(1)),
    "sort": (rows, lambda h: h.sort(1).values),
    "sort stable": (rows, lambda h: h.sort(dim=1, stable=True).values),
    "topk": (rows, lambda h: h.topk(2, 1).values),
    "kthvalue": (rows, lambda h: h.kthvalue(2, 1).values),
    "median": (rows, lambda h: h.median(1).values),
    "max": (rows, lambda h: h.max(1).values),
    "min keepdim": (rows, lambda h: h.min(1, keepdim=True).values),
    "argmax": (rows, lambda h: h.argmax(1).to(h.dtype)),
    "normalize": (rows, lambda h: F.normalize(h, dim=-1)),
    "expand_as": (rows, lambda h: h * h.sum(-1, keepdim=True).expand_as(h)),
    "expand": (rows, lambda h: h + torch.arange(5.0).to(h)[:, None].expand(4, 5, h.shape[-1])),
    "broadcast_to": (rows, lambda h: h * h.norm(dim=-1, keepdim=True).broadcast_to(h.shape)),
    "repeat of a sum": (rows, lambda h: h * h.sum(-1, keepdim=True).repeat(1, 1, h.shape[-1])),
    "scatter_add at repeated places": (rows, added),
    "gather of repeated places": (
        rows,
        lambda h: h.gather(1, AT[0, :, None].expand(4, 3, h.shape[-1])),
    ),
    "argsort and gather": (rows, lambda h: h.gather(1, h.argsort(1))),
    "index": (rows, lambda h: h[:, torch.tensor([3, 1])]),
    "index of two": (rows, lambda h: h[torch.tensor([1, 0]), torch.tensor([3, 1])]),
    "index by a mask": (rows, lambda h: h[torch.arange(20).reshape(4, 5) % 2 == 0]),
    "index apart": (
        rows,
        lambda h: h.transpose(1, 2)[torch.tensor([1, 0, 2]), :, torch.tensor([3, 1, 1])],
    ),
    "index to the front": (
        rows,
        lambda h: h.permute(2, 0, 1).unsqueeze(2)[:, AT[0], :, AT[1]].squeeze(-1),
    ),
    "index by a matrix": (rows, lambda h: h[:, AT]),
    "index_select": (rows, lambda h: h.index_select(1, torch.tensor([3, 1]))),
    "index_put": (rows, written),
    "index_add": (rows, index_add),
    "index_copy": (rows, index_copy),
    "index_fill": (rows, lambda h: h.index_fill(1, torch.tensor([3, 1]), 2.0)),
    "scatter": (rows, lambda h: h.scatter(1, h.argsort(1), h * 3)),
    "scatter_add": (rows, lambda h: torch.zeros_like(h).scatter_add(1, h.argsort(1), h)),
    "scatter_reduce": (rows, lambda h: h.scatter_reduce(1, h.argsort(1), h * 2, "amax")),
    "scatter_": (rows, lambda h: torch.zeros_like(h).scatter_(1, h.argsort(1), h)),
    "repeat": (rows, lambda h: h.repeat(1, 1, 3), 3 * HIDDEN),
    "repeat of others": (rows, lambda h: h.repeat(2, 1, 3, 1)[0, :, :5]),
    "repeat_interleave": (rows, lambda h: h.repeat_interleave(2, -1), 2 * HIDDEN),
    "repeat_interleave of positions": (rows, lambda h: h.repeat_interleave(2, 1)),
    "vector_norm": (rows, lambda h: torch.linalg.vector_norm(h, dim=1)),
    "vector_norm over units": (rows, normalised),
    "norm 1 over units": (rows, lambda h: h / h.norm(p=1, dim=-1, keepdim=True)),
    "norm inf over units": (rows, lambda h: h / h.norm(p=float("inf"), dim=-1, keepdim=True)),
    "prod": (rows, lambda h: h.prod(1)),
    "std": (rows, lambda h: h.std(1)),
    "var_mean": (rows, lambda h: sum(torch.var_mean(h, 1))),
    "logsumexp": (rows, lambda h: h.logsumexp(1)),
    "aminmax": (rows, lambda h: h.aminmax(dim=1).max),
    "nansum over units": (rows, lambda h: h / (1 + h.square().nansum(-1, keepdim=True))),
    "rfft": (rows, spectrum),
    "fft": (rows, lambda h: torch.view_as_real(torch.fft.fft(h, dim=1))[..., 1]),
    "irfft": (rows, lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1), dim=1)),
    "view_as_complex": (rows, complex_rows),
    "view_as_complex of pairs": (rows, turned),
    "unfold": (rows, lambda h: h.unfold(1, 3, 1)[..., 1]),
    "diagonal": (rows, lambda h: h[:4, :4].diagonal(0, 0, 1).t()),
    "glu": (rows, F.glu, HIDDEN // 2),
    "where": (rows, lambda h: torch.where(h > 0, h, h * 0.1)),
    "masked_fill": (rows, lambda h: h.masked_fill(h < 0, -1.0)),
    "masked_fill_": (rows, lambda h: h.clone().masked_fill_(h < 0, -1.0)),
    "mish_": (rows, lambda h: F.mish(h * 1, inplace=True)),
    "threshold_": (rows, lambda h: F.threshold(h * 1, 0.1, 20.0, inplace=True)),
    "copysign_": (rows, lambda h: (h * 1).copysign_(h.roll(1, 1))),
    "index_put by a mask of all": (rows, lambda h: filled(h, h < 0)),
    "index_put by a mask of rows": (rows, lambda h: filled(h, h.sum(-1) < 0)),
    "index_put of one mask for all": (rows, lambda h: filled(h, h[0] < 0, at=(...,))),
    "cdist of rows": (
        rows,
        lambda h: h * torch.cdist(h.mT, torch.ones(4, 3, 5).to(h)).sum(-1)[:, None],
    ),
    "tril_": (rows, lambda h: (h.permute(2, 0, 1) * 1).tril_().permute(1, 2, 0)),
    "matrix times vector": (flat, lambda h: h * (h.t() @ torch.ones(4).to(h))),
    "addmv": (flat, lambda h: h * torch.addmv(h[0], h.t(), torch.ones(4).to(h))),
    "dot over units": (flat, lambda h: h / torch.dot(h[0], h[1]).abs()),
    "mv over units": (flat, lambda h: h * torch.mv(h, h[0])[:, None]),
    "as_strided": (maps, restrided),
    "im2col": (maps, lambda h: F.unfold(h, 2)[..., None], 4 * HIDDEN),
    "col2im": (maps, lambda h: F.fold(F.unfold(h, 2, stride=2), (6, 6), 2, stride=2)),
    "pixel_shuffle": (maps, lambda h: F.pixel_shuffle(h, 2), HIDDEN // 4),
    "pixel_unshuffle": (maps, lambda h: F.pixel_unshuffle(h, 2), 4 * HIDDEN),
    "channel_shuffle": (maps, lambda h: F.channel_shuffle(h, 2)),
    "nearest": (maps, lambda h: F.interpolate(h, scale_factor=2)),
    "nearest-exact": (maps, lambda h: F.interpolate(h, size=8, mode="nearest-exact")),
    "bilinear": (maps, lambda h: F.interpolate(h, size=4, mode="bilinear")),
    "bilinear antialias": (maps, lambda h: F.interpolate(h, 4, mode="bilinear", antialias=True)),
    "bicubic": (maps, lambda h: F.interpolate(h, size=8, mode="bicubic")),
    "bicubic antialias": (maps, lambda h: F.interpolate(h, 4, mode="bicubic", antialias=True)),
    "linear": (signals, lambda h: F.interpolate(h, size=8, mode="linear")),
    "nearest 1d": (signals, lambda h: F.interpolate(h, size=8)),
    "nearest 3d": (volumes, lambda h: F.interpolate(h, size=(5, 6, 7))),
    "trilinear": (volumes, lambda h: F.interpolate(h, size=(5, 6, 7), mode="trilinear")),
    "reflection pad": (maps, lambda h: F.pad(h, (1, 2, 1, 1), mode="reflect")),
    "reflection pad 1d": (signals, lambda h: F.pad(h, (1, 2), mode="reflect")),
    "replication pad": (maps, lambda h: F.pad(h, (1, 2, 1, 1), mode="replicate")),
    "replication pad 3d": (volumes, lambda h: F.pad(h, (1, 2, 1, 1, 1, 1), mode="replicate")),
    "adaptive max": (maps, lambda h: F.adaptive_max_pool2d(h, 3)),
    "adaptive max 1d": (signals, lambda h: F.adaptive_max_pool1d(h, 3)),
    "adaptive average 1d": (signals, lambda h: F.adaptive_avg_pool1d(h, 3)),
    "adaptive average 3d": (volumes, lambda h: F.adaptive_avg_pool3d(h, 2)),
    "max 1d": (signals, lambda h: F.max_pool1d(h, 2)),
    "max 3d": (volumes, lambda h: F.max_pool3d(h, 2)),
    "max unpool": (maps, unpool),
    "grid_sample": (maps, lambda h: F.grid_sample(h, GRID.to(h), align_corners=False)),
}


def hidden(structure: Any) -> list[Any]:
    """Groups that the first layer makes."""
    return [g for g in structure.groups if "first" in g.layers]


@pytest.mark.parametrize("name", PASSES)
def test_units_pass(name: str) -> None:
    build, operation, *width = PASSES[name]
    model, x = build(operation, *width)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    (group,) = hidden(trace_structure(model, x))
    assert group.prunable, group.reason
    assert group.exact, group.inexact_reason
    units = [0, group.size - 1] if group.size > 2 else [0]
    whole = run(copy.deepcopy(model).double(), (x,))
    wanted = [run(masked_copy(model, group, units, silence=s), (x,)) for s in (False, True)]
    assert max(relative_difference(w, whole) for w in wanted) > 1e-3  # else nothing is compared
    engine.prune_units({group.name: units})
    assert group.size - len(units) == hidden(engine.structure)[0].size
    pruned = run(copy.deepcopy(model).double(), (x,))
    assert min(relative_difference(pruned, w) for w in wanted) < 1e-9


def by_position(n: int) -> Tensor:
    return torch.arange(n)


# Nothing of the hidden units can go; the reason names the operation.
FREEZES: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Tensor], int, str]] = {
    "roll": (rows, lambda h: h.roll(1, -1), HIDDEN, "roll"),
    "roll of all": (rows, lambda h: h.roll(1), HIDDEN, "roll"),
    "flip": (rows, lambda h: h.flip(1, 2), HIDDEN, "flip"),
    "cumsum": (rows, lambda h: h.cumsum(-1), HIDDEN, "cumsum"),
    "cummin": (rows, lambda h: h.cummin(-1).values, HIDDEN, "cummin"),
    "sort": (rows, lambda h: h.sort().values, HIDDEN, "sort"),
    "sort stable": (rows, lambda h: h.sort(stable=True).values, HIDDEN, "sort"),
    "topk": (rows, lambda h: h.topk(4).values, 4, "topk"),
    "argmax": (rows, lambda h: h.argmax(-1, True).to(h.dtype), 1, "argmax"),
    "argmax of all": (rows, lambda h: h[:, :1, :2] * h.argmax(), 2, "argmax"),
    "place of the max": (rows, lambda h: h[:, :, :1] * h.max(-1, keepdim=True).indices, 1, "max"),
    "mode": (rows, lambda h: h.mode(-1, True).values, 1, "mode"),
    "gather": (rows, lambda h: h.gather(2, CHOSEN), 3, "gather"),
    "gather by data": (
        rows,
        lambda h: h.gather(1, PLACES),
        HIDDEN,
        "gather",
    ),
    "index": (rows, lambda h: h[..., by_position(4)], 4, "index"),
    "index of two": (rows, lambda h: h[:, AT[0], AT[1]], 3, "index"),
    "index apart": (rows, lambda h: h[torch.tensor([0, 1]), :, by_position(2)].mT, 2, "index"),
    "index by a mask": (rows, lambda h: h[..., by_position(HIDDEN) % 2 == 0], HIDDEN // 2, "index"),
    "index_select": (rows, lambda h: h.index_select(-1, by_position(4)), 4, "index_select"),
    "index_put": (rows, lambda h: put(h), HIDDEN, "index_put_"),
    "index_put by a mask of columns": (
        rows,
        lambda h: filled(h, by_position(HIDDEN) % 2 == 0, at=(...,)),
        HIDDEN,
        "index_put_",
    ),
    "index_add": (rows, lambda h: h.index_add(2, by_position(2), h[..., :2]), HIDDEN, "index_add"),
    "scatter": (rows, lambda h: h.scatter(2, CHOSEN, h), HIDDEN, "scatter"),
    "scatter a number": (rows, lambda h: h.scatter(2, CHOSEN, 1.0), HIDDEN, "scatter"),
    "rfft": (rows, lambda h: torch.fft.rfft(h).abs(), HIDDEN // 2 + 1, "_fft_r2c"),
    "fft2": (rows, lambda h: torch.fft.fft2(h).abs(), HIDDEN, "_fft_c2c"),
    "unfold": (rows, lambda h: h.unfold(2, HIDDEN, 1)[:, :, 0], HIDDEN, "unfold"),
    "diagonal": (rows, lambda h: h.diagonal(0, 1, 2), 5, "diagonal"),
    "nonzero": (rows, lambda h: h[..., :2] * len(h.nonzero()), 2, "nonzero"),
    "histc": (rows, lambda h: torch.histc(h, 4), 4, "histc"),
    "unique": (rows, lambda h: h[..., :2] * h.unique().numel(), 2, "_unique2"),
    "as_strided": (maps, lambda h: h.as_strided((2, 3, 2, 2), (1, 2, 3, 4)), 3, "as_strided"),
    "channel_shuffle": (maps, lambda h: F.channel_shuffle(h, HIDDEN), HIDDEN, "channel_shuffle"),
    "pixel_shuffle": (maps, lambda h: F.pixel_shuffle(h, 4), 1, "pixel_shuffle"),
    "pixel_unshuffle of channels": (
        maps,
        lambda h: F.pixel_unshuffle(h.transpose(1, 2), 2).transpose(1, 2),
        HIDDEN // 2,
        "pixel_unshuffle",
    ),
    "pad": (rows, lambda h: F.pad(h, (1, 1), mode="replicate"), HIDDEN + 2, "replication_pad1d"),
    "max pool": (rows, lambda h: F.max_pool1d(h, 2), HIDDEN // 2, "max_pool2d_with_indices"),
    "nearest": (rows, lambda h: F.interpolate(h, size=7), 7, "upsample_nearest1d"),
    "grid": (
        maps,
        lambda h: F.grid_sample(h.transpose(1, 2), GRID.to(h), align_corners=False).transpose(1, 2),
        3,
        "grid_sampler_2d",
    ),
    "an embedding's index": (
        flat,
        lambda h: F.embedding((h > 0).long(), torch.ones(2, 3).to(h)).sum(1),
        3,
        "embedding",
    ),
    "unknown": (flat, lambda h: torch.linalg.pinv(h).mT, HIDDEN, "linalg_pinv"),
}


def put(h: Tensor) -> Tensor:
    out = h * 1
    out[:, :, torch.tensor([1, 0])] = h[..., :2]
    return out


@pytest.mark.parametrize("name", FREEZES)
def test_units_freeze(name: str) -> None:
    build, operation, width, word = FREEZES[name]
    model, x = build(operation, width)
    found = trace_structure(model, x, trial=False)
    assert [g for g in hidden(found) if g.prunable] == []
    reasons = [f.reason for f in found.frozen if (f.tensor, f.dim) == ("first.weight", 0)]
    assert any(f" {word} in " in reason for reason in reasons), reasons


# The hidden units can go, but the others see it: not exact, for a reason that names the operation.
INEXACT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "max": (lambda h: h - h.max(-1, keepdim=True).values, "max"),
    "max of all": (lambda h: h - h.max(), "max"),
    "max beside mean": (
        lambda h: h * torch.stack([h.max(-1)[0], h.mean(-1)], -1).prod(-1, keepdim=True),
        "max",
    ),
    "prod": (lambda h: h * h.prod(-1, keepdim=True), "prod"),
    "std": (lambda h: h / h.std(-1, keepdim=True), "std"),
    "var_mean": (lambda h: h - torch.var_mean(h, -1, keepdim=True)[1], "var_mean"),
    "logsumexp": (lambda h: h - h.logsumexp(-1, keepdim=True), "logsumexp"),
    "aminmax": (lambda h: h - h.aminmax(dim=-1, keepdim=True).min, "aminmax"),
    "cdist": (lambda h: h * torch.cdist(h, h.roll(1, 1)).sum(-1, keepdim=True), "_cdist_forward"),
    "cdist to a table": (
        lambda h: h * torch.cdist(h, torch.zeros_like(h[0, :1]) + 0.5).sum(-1, keepdim=True),
        "_cdist_forward",
    ),
    "negative norm": (lambda h: h * h.norm(p=-1, dim=-1, keepdim=True), "linalg_vector_norm"),
}


@pytest.mark.parametrize("name", INEXACT)
def test_units_are_not_exact(name: str) -> None:
    operation, word = INEXACT[name]
    model, x = rows(operation)
    (group,) = hidden(trace_structure(model, x))
    assert group.prunable, group.reason
    assert not group.exact
    assert f" {word} in " in group.inexact_reason


def test_rows_of_an_embedding_bag_are_picked_by_data() -> None:
    model = nn.Sequential(nn.EmbeddingBag(9, HIDDEN), nn.Linear(HIDDEN, 2))
    found = trace_structure(model, torch.randint(0, 9, (3, 4)))
    (group,) = found.groups
    assert group.prunable, group.reason
    assert group.exact, group.inexact_reason
    assert {(s.tensor, s.dim) for s in group.slices([0])} == {("0.weight", 1), ("1.weight", 1)}
    (rows_of_it,) = (f for f in found.frozen if f.tensor == "0.weight")
    assert "_embedding_bag" in rows_of_it.reason


def test_what_writes_in_other_strides_is_not_followed() -> None:
    """Same shape, other values: channels have changed places with examples."""

    def restride(h: Tensor) -> Tensor:
        return h.contiguous().as_strided_(h.shape, (1, len(h)))

    model, x = flat(restride)
    found = trace_structure(model, x, trial=False)
    assert hidden(found) == []
    assert any("as_strided_" in f.reason for f in found.frozen)


def test_sets_are_rows_and_uniting_at_once_is_uniting_one_by_one() -> None:
    """Of axes with one label and with several, before and after they stand for others."""
    labels = Labels()
    plain, wide = labels.fresh(6), labels.merge([2, 3], [labels.fresh(2), labels.fresh(3)])
    other = labels.fresh(6)
    labels.freeze(other[2:3], "kept")
    labels.unify(plain, other[::-1], "at once")
    labels.unify(plain[:2], plain[2:4], "one meets two")
    assert labels.rows(plain)[:4] == labels.rows(other[::-1])[:4] == labels.rows(plain[[2, 3]]) * 2
    assert [bool(row & labels.frozen.keys()) for row in labels.rows(plain)] == [
        False,
        True,
        False,
        True,
        False,
        False,
    ]
    labels.unify(wide, labels.fresh(6), "factors")
    labels.unify(other, wide, "composite")
    for axis in (plain, other, wide, np.concatenate((wide, plain.repeat(2, axis=1)))):
        rows = labels.rows(axis)
        assert [frozenset(row) - {0} for row in labels.sets(axis).tolist()] == rows
        assert rows == [labels.leaves(row) for row in axis.tolist()]
        assert labels.every(axis) == frozenset().union(*rows)
