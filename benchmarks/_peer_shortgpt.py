"""ShortGPT: whole blocks go, those first whose output has nearly the direction of their input.

Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen: ShortGPT: Layers in Large Language Models are More Redundant Than You Expect.
arXiv 2403.03853, section 3: Block Influence, and removal in its order. Written from the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from _peer_llama import hooked, parameters, run
from torch import Tensor, nn


def block_influence(model: Any, batches: Sequence[Tensor]) -> Tensor:
    """1 - the mean cosine between a block's input and its output at each position, (blocks,)."""
    similarity: list[list[Tensor]] = [[] for _ in model.model.layers]

    def take(mine: list[Tensor]) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            mine.append(torch.cosine_similarity(inputs[0], output, dim=-1).flatten())

        return hook

    blocks = zip(model.model.layers, similarity, strict=True)
    with hooked([block.register_forward_hook(take(mine)) for block, mine in blocks]):
        run(model, batches)
    return torch.stack([1 - torch.cat(s).mean() for s in similarity])


def shortgpt(model: Any, batches: Sequence[Tensor], keep: float) -> None:
    """Remove blocks from a Llama in place until a share `keep` of its parameters is left, or less."""
    order = block_influence(model, batches).argsort().tolist()
    layers, left, gone = model.model.layers, parameters(model), set()
    target = keep * left
    for i in order:
        if left <= target:
            break
        gone.add(i)
        left -= parameters(layers[i])
    model.model.layers = nn.ModuleList(b for i, b in enumerate(layers) if i not in gone)
    for i, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(model.model.layers)
