"""FLAP: units whose values fluctuate least go; their mean stays, as a bias.

An, Zhao, Yu, Tang, Wang: Fluctuation-based Adaptive Structured Pruning for Large Language Models. arXiv 2312.11983:
the fluctuation metric (3.2, "WIFV"), standardised scores over layers and modules (3.3, "AL-AM"), and bias
compensation (3.4). Written from the paper, for grouped attention too: there a unit is a key-value group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from _peer_llama import hooked, narrow_attention, narrow_mlp, parameters, run
from torch import Tensor, nn


@dataclass
class PrunableModule:
    """The MLP or the attention of one block.

    Attributes:
        narrow: Leaves the units with these indices.
        consumer: The linear layer that reads the units.
        width: Of one unit, in inputs of the consumer.
        cost: Parameters of one unit.
        rows, total, squares: How many rows of inputs were seen, their sum, and that of their squares, (inputs,).
    """

    narrow: Callable[[Tensor], None]
    consumer: nn.Linear
    width: int
    cost: int
    rows: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).double()
        self.rows += len(x)
        self.total = self.total + x.sum(0)
        self.squares = self.squares + x.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.total / self.rows

    def scores(self) -> Tensor:
        """Variance of each input times the squared norm of its column, the mean of a unit's; standardised, (units,)."""
        variance = (self.squares - self.rows * self.mean.square()) / (self.rows - 1)
        norms = self.consumer.weight.detach().double().square().sum(0)
        scores = (variance * norms).unflatten(0, (-1, self.width)).mean(1)
        return (scores - scores.mean()) / scores.std()

    def remove(self, gone: Tensor) -> None:
        """Take units out, (units,) of bool; what they gave the consumer on average becomes its bias."""
        inputs = gone.repeat_interleave(self.width)
        weight = self.consumer.weight.detach()
        lost = weight[:, inputs].double() @ self.mean[inputs]
        old = 0 if self.consumer.bias is None else self.consumer.bias.detach()
        self.narrow((~gone).nonzero().flatten())
        self.consumer.bias = nn.Parameter(old + lost.to(weight.dtype))


def modules_of(model: Any, attention: bool) -> list[PrunableModule]:
    found = []
    for block in model.model.layers:
        mlp, attn = block.mlp, block.self_attn
        cost = 3 * mlp.down_proj.out_features
        found.append(PrunableModule(partial(narrow_mlp, mlp), mlp.down_proj, 1, cost))
        if attention:
            width = attn.head_dim * attn.num_key_value_groups
            cost = 2 * (width + attn.head_dim) * attn.o_proj.out_features
            found.append(PrunableModule(partial(narrow_attention, attn), attn.o_proj, width, cost))
    return found


def flap(model: Any, batches: Sequence[Tensor], keep: float, attention: bool = True) -> None:
    """Narrow a Llama in place to a share of its parameters, the new biases counted.

    Args:
        model: A `LlamaForCausalLM` without biases.
        batches: Token ids to calibrate with, (samples, positions) each.
        keep: Share of all parameters that stays, at most.
        attention: Whether key-value groups go, too, or neurons only.
    """
    modules = modules_of(model, attention)
    with hooked([m.consumer.register_forward_pre_hook(m.add) for m in modules]):
        run(model, batches)
    scores = [m.scores() for m in modules]
    owners = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)]).tolist()
    units = torch.cat([torch.arange(len(s)) for s in scores]).tolist()
    gone = [torch.zeros(len(s), dtype=torch.bool) for s in scores]
    excess = (1 - keep) * parameters(model)
    for i in torch.cat(scores).argsort().tolist():
        if excess <= 0:
            break
        mine, unit = gone[owners[i]], units[i]
        if len(mine) - int(mine.sum()) > 1:  # attention without a head has no shape
            bias = 0 if mine.any() else modules[owners[i]].consumer.out_features
            excess -= modules[owners[i]].cost - bias
            mine[unit] = True
    for module, mine in zip(modules, gone, strict=True):
        if mine.any():
            module.remove(mine)
