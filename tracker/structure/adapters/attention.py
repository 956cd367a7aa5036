"""Modules of torch whose forward ties sizes that removal must be able to part, and forwards that do not."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tracker.structure.adapters.registry import ModuleAdapter, register_adapter


class DecoupledMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` after a removal: heads and their widths are free of the width around them.

    Torch's own takes `embed_dim` for the width of the inputs and of all heads together. Parameters, their names and the
    meaning of all arguments are the same, and the scale stays that of the width that the module was built with.
    """

    scale: float
    v_head_dim: int

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention; see `nn.MultiheadAttention.forward`."""
        batched = query.dim() == 3
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        parts = [query, key, value]
        if not batched:
            parts = [x.unsqueeze(0) for x in parts]
        elif not self.batch_first:
            parts = [x.transpose(0, 1) for x in parts]
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.num_heads, width)).transpose(1, 2)
            for x, (w, b), width in zip(
                parts,
                self.projections(),
                (self.head_dim, self.head_dim, self.v_head_dim),
                strict=True,
            )
        )
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, attn_mask, key_padding_mask, batched)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=self.scale)
        out = F.linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of queries, keys and values."""
        inner = self.num_heads * self.head_dim
        bounds = ((None, inner), (inner, 2 * inner), (2 * inner, None))
        packed, bias = cast("Tensor | None", self.in_proj_weight), self.in_proj_bias
        if packed is None:
            own = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = [cast(Tensor, w) for w in own]
        else:
            weights = [packed[start:stop] for start, stop in bounds]
        biases = [None if bias is None else bias[start:stop] for start, stop in bounds]
        return list(zip(weights, biases, strict=True))

    def _mask(
        self, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None, batched: bool
    ) -> Tensor | None:
        """What is added to the scores."""
        mask = None
        if attn_mask is not None:
            mask = _added(attn_mask, q)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            hidden = _added(padding if batched else padding.unsqueeze(0), q)[:, None, None, :]
            mask = hidden if mask is None else mask + hidden
        return mask


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as values that are added; where a boolean one is true nothing is seen."""
    if mask.is_floating_point():
        return mask
    return like.new_zeros(mask.shape).masked_fill_(mask, float("-inf"))


def _fits(module: Any) -> bool:
    """Whether torch's own forward can run with the weights as they are."""
    width = module.embed_dim
    packed, out = module.in_proj_weight, module.out_proj.weight
    own = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    shapes = [packed.shape] if packed is not None else [w.shape for w in own]
    built = (
        [(3 * width, width)]
        if packed is not None
        else [(width, n) for n in (width, module.kdim, module.vdim)]
    )
    return [*map(tuple, shapes), tuple(out.shape)] == [*built, (width, width)]


def _adapt(module: Any) -> bool:
    if module.bias_k is not None or module.add_zero_attn:
        return False
    # The fused kernels of nn.TransformerEncoderLayer take embed_dim for everything, and refuse where this is so.
    module._qkv_same_embed_dim = False
    free_heads(module, module.head_dim)
    return True


def free_heads(module: Any, size: int) -> None:
    """Note the width of a module's heads, and the scale that follows from it, as it was built."""
    module.scale = float(size) ** -0.5
    module.v_head_dim = size


register_adapter(ModuleAdapter(nn.MultiheadAttention, DecoupledMultiheadAttention, _fits, _adapt))
