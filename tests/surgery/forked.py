"""Random networks whose forward takes several paths, and an oracle that zeroes what consumers read.

Each tensor of hidden units has a name, its space. Whatever consumes a space reads it through a module
`Read` of its own, so that zeros can be put where consumers look, while every parameter stays as it is:
a weight that is normalised in the forward does not move.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

Pick = Callable[[Sequence[Any]], Any]
INPUTS, OUTPUTS = 5, 3


class Read(nn.Module):
    """Where a space is read."""

    def __init__(self, space: str) -> None:
        super().__init__()
        self.space = space

    def forward(self, x: Tensor) -> Tensor:
        return x


class Halved(nn.Module):
    """A weight that is computed from a weight, unit by unit."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


class UnitRows(nn.Module):
    """A weight whose rows have length one: without some inputs all outputs would be others."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.norm(dim=1, keepdim=True)


def linear(inputs: int, outputs: int, kind: str) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).double()
    if kind == "halved":
        parametrize.register_parametrization(layer, "weight", Halved())
    elif kind == "unit rows":
        parametrize.register_parametrization(layer, "weight", UnitRows())
    elif kind == "weight norm":
        parametrizations.weight_norm(layer)
    elif kind == "spectral norm":
        parametrizations.spectral_norm(layer)
    return layer


class Block(nn.Module):
    """x → w units → x's space, or a space of its own."""

    def __init__(
        self, source: str, inputs: int, space: str, width: int, kind: str, act: Any
    ) -> None:
        super().__init__()
        self.read, self.inner = Read(source), Read(space)
        self.up, self.act = linear(inputs, width, kind), act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.up(self.read(x)))


class Forked(nn.Module):
    """A trunk of blocks, and whatever else may read what they make.

    Args:
        pick: Chooses one of several values; all that is random comes from it.
    """

    def __init__(self, pick: Pick) -> None:
        super().__init__()
        torch.manual_seed(pick(range(1001)))
        kinds = ["plain", "plain", "halved", "unit rows", "weight norm", "spectral norm"]
        acts = (nn.ReLU, nn.Tanh, nn.Sigmoid)
        self.widths, source, width = {"x": INPUTS}, "x", INPUTS
        self.blocks = nn.ModuleList()
        self.residual: list[bool] = []
        for i in range(pick(range(2, 4))):
            residual = i > 0 and pick([True, False])
            new = width if residual else pick(range(6, 10))
            space = source if residual else f"h{i}"
            self.blocks.append(Block(source, width, space, new, pick(kinds), pick(acts)))
            self.residual.append(residual)
            source, width = space, new
            self.widths[space] = width
        spaces = [s for s in self.widths if s != "x"]

        def reader(outputs: int = OUTPUTS) -> nn.Sequential:
            space = pick(spaces)
            return nn.Sequential(Read(space), linear(self.widths[space], outputs, pick(kinds)))

        self.head = nn.Sequential(Read(source), linear(width, OUTPUTS, pick(kinds)))
        self.aux = reader() if pick([True, False]) else None  # of train mode only
        self.more = reader() if pick([True, False]) else None  # if asked for
        self.decoder = reader(INPUTS) if pick([True, False]) else None  # of another method
        self.otherwise = reader() if pick([True, False]) else None  # if the data say so
        self.experts = None
        if pick([True, False]):
            space, units = source, self.widths[source]
            self.experts = nn.ModuleList(
                nn.Sequential(
                    Read(space),
                    linear(units, 4, "plain"),
                    nn.ReLU(),
                    linear(4, OUTPUTS, "plain"),
                )
                for _ in range(4)
            )

    def features(self, x: Tensor) -> dict[str, Tensor]:
        made = {"x": x}
        for block, residual in zip(self.blocks, self.residual, strict=True):
            source, space = block.read.space, block.inner.space
            y = block(made[source])
            made[space] = made[source] + y if residual else y
        return made

    def read(self, reader: nn.Sequential, made: dict[str, Tensor]) -> Tensor:
        return reader(made[reader[0].space])

    def routed(self, made: dict[str, Tensor]) -> Tensor | float:
        """Each row through the expert that its input asks for: of few rows some experts get none."""
        if self.experts is None:
            return 0.0
        h = made[self.experts[0][0].space]
        chosen = (made["x"][:, 0] * 10).long() % len(self.experts)
        y = h.new_zeros(len(h), OUTPUTS)
        for j, expert in enumerate(self.experts):
            rows = (chosen == j).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, expert(h[rows]))
        return y

    def forward(self, x: Tensor, more: bool = False) -> Any:
        made = self.features(x)
        y = self.read(self.head, made) + self.routed(made)
        if self.otherwise is not None and bool(x.sum() < 0):
            y = y + self.read(self.otherwise, made)
        if more and self.more is not None:
            y = y + self.read(self.more, made)
        if self.training and self.aux is not None:
            return y, self.read(self.aux, made)
        return y

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.read(self.decoder, self.features(x)) if self.decoder is not None else x


# A call: the method, its arguments, whether the batch is many rows whose sum is negative
PATHS: dict[str, tuple[str, dict[str, Any], int]] = {
    "forward": ("forward", {}, 1),
    "asked for more": ("forward", {"more": True}, 1),
    "other data": ("forward", {}, -1),
    "reconstruct": ("reconstruct", {}, 1),
}


def batch(sign: int, rows: int = 64) -> Tensor:
    x = torch.randn(
        rows, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)
    )
    return x + sign * (x.mean().abs() + 0.05)


def everything(model: Forked, training: bool) -> dict[str, list[Tensor]]:
    """What each path gives in a mode; the model as it was."""
    state, mode = copy.deepcopy(model.state_dict()), model.training
    found = {}
    model.train(training)
    for name, (method, kwargs, sign) in PATHS.items():
        with torch.no_grad():
            out = getattr(model, method)(batch(sign), **kwargs)
        found[name] = list(out) if isinstance(out, tuple) else [out]
        model.load_state_dict(state)  # spectral norm's vectors move in train mode
    model.train(mode)
    return found


@contextmanager
def zeroed(model: Forked, space: str, units: Iterable[int]) -> Iterator[None]:
    """Whoever reads the space sees zeros in the place of the units."""
    gone = torch.tensor(sorted(units))
    handles = [
        module.register_forward_hook(lambda _m, _i, out: out.index_fill(-1, gone, 0.0))
        for module in model.modules()
        if isinstance(module, Read) and module.space == space
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def space_of(model: Forked, group: Any) -> str | None:
    """Whose units a group's are, told by the parameters that make them; None where it is not one of ours."""
    makers = {f"blocks.{i}.up": block.inner.space for i, block in enumerate(model.blocks)}
    for part in group.slices([0]):
        for prefix, space in makers.items():
            if part.tensor.startswith(prefix) and part.dim == 0 and part.role != "reads":
                return space
    return None


def difference(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> float:
    """The largest over all paths, relative to the path's largest value; inf where shapes differ."""
    worst = 0.0
    for name, tensors in expected.items():
        if [t.shape for t in found[name]] != [t.shape for t in tensors]:
            return float("inf")
        for a, b in zip(found[name], tensors, strict=True):
            worst = max(worst, float(F.l1_loss(a, b, reduction="none").max() / b.abs().max()))
    return worst
