"""What the peers of this folder share: reading and narrowing a plain `LlamaForCausalLM` of transformers.

All that they build has real, narrower weights: what `parameters` counts is what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def parameters(model: nn.Module) -> int:
    """How many numbers the model stores, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def replace_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Another weight, (out, in), and the widths that go with it."""
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = weight.shape


def narrow_mlp(mlp: Any, kept: Tensor) -> None:
    """Leave the neurons `kept` (indices) in a gated MLP."""
    for linear in (mlp.gate_proj, mlp.up_proj):
        replace_weight(linear, linear.weight.detach()[kept])
    replace_weight(mlp.down_proj, mlp.down_proj.weight.detach()[:, kept])
    mlp.intermediate_size = len(kept)


def narrow_attention(attention: Any, kept: Tensor) -> None:
    """Leave the key-value groups `kept` (indices): heads of keys and values, each with all query heads that read it."""
    one = torch.arange(attention.head_dim)
    several = torch.arange(attention.head_dim * attention.num_key_value_groups)
    keys = (kept[:, None] * len(one) + one).flatten()
    queries = (kept[:, None] * len(several) + several).flatten()
    replace_weight(attention.q_proj, attention.q_proj.weight.detach()[queries])
    for linear in (attention.k_proj, attention.v_proj):
        replace_weight(linear, linear.weight.detach()[keys])
    replace_weight(attention.o_proj, attention.o_proj.weight.detach()[:, queries])


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Takes hooks off at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: Any, batches: Sequence[Tensor]) -> None:
    """All batches of token ids, (samples, positions) each, through the blocks, for what hooks take from them."""
    for x in batches:
        model.model(input_ids=x, use_cache=False)
