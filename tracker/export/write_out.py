"""Modules of this library as graphs over modules of torch: files and TorchScript take their code along."""

from __future__ import annotations

import math
import operator
from typing import Any, Optional, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tracker.structure.adapters.attention import DecoupledMultiheadAttention
from tracker.surgery.inserted_modules import Bypass, ResidualBlock

# torch.fx writes the annotation as it is, and TorchScript reads this one.
_Mask = Optional[Tensor]  # noqa: UP045


def residual(block: ResidualBlock) -> nn.Module:
    """Give x + out(relu(into(x))), with the two layers of the block."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    hidden = graph.call_function(torch.relu, (graph.call_module("into", (x,)),))
    graph.output(graph.call_function(operator.add, (x, graph.call_module("out", (hidden,)))))
    return _module({"into": block.into, "out": block.out}, graph, block)


def write_out_bypass(bypass: Bypass, *, simple: bool) -> nn.Module:
    """Give scale · x + shift of the first input. `simple`: it is called with that one only."""
    if simple and bypass.returns == "tensor" and (bypass.scale, bypass.shift) == (1, 0):
        return nn.Identity().train(bypass.training)
    graph = fx.Graph()
    y = x = graph.placeholder("x")
    if not simple:
        graph.placeholder("*args")
        graph.placeholder("**kwargs")
    if not bypass.scale:
        y = graph.call_function(torch.zeros_like, (x,))
    elif bypass.scale != 1:
        y = graph.call_function(operator.mul, (x, bypass.scale))
    if bypass.shift:
        y = graph.call_function(operator.add, (y, bypass.shift))
    graph.output((y,) if bypass.returns == "tuple" else y)
    return _module({}, graph, bypass)


@torch.no_grad()
def write_out_attention(free: DecoupledMultiheadAttention) -> nn.Module:
    """The same as torch's own `nn.MultiheadAttention`, behind a projection of the queries where sizes need one.

    Torch's takes the width of its queries for that of all heads together. So the queries are brought to that width
    first, and torch's own projection of them is the identity, no parameter.
    """
    (q, q_bias), (k, k_bias), (v, v_bias) = free.projections()
    heads, width, v_width = free.num_heads, free.head_dim, free.v_head_dim
    widest = max(width, v_width)
    # Torch divides by the root of the width that the heads have here.
    factor = free.scale * widest**0.5
    factor = 1.0 if math.isclose(factor, 1.0) else factor
    q, k = _wider(q * factor, heads, widest), _wider(k, heads, widest)
    v = _wider(v, heads, widest)
    biases = None
    if q_bias is not None and k_bias is not None and v_bias is not None:
        parts = (q_bias * factor, k_bias, v_bias)
        biases = torch.cat([_wider(b[:, None], heads, widest)[:, 0] for b in parts])
    out = _wider(free.out_proj.weight.T, heads, widest).T
    inner = heads * widest
    fits = q.shape == (inner, inner) and out.shape == (inner, inner)
    packed = fits and k.shape == v.shape == (inner, inner)
    own: Any = nn.MultiheadAttention(
        inner,
        heads,
        free.dropout,
        bias=biases is not None,
        kdim=None if packed else k.shape[1],
        vdim=None if packed else v.shape[1],
        batch_first=free.batch_first,
        device=q.device,
        dtype=q.dtype,
    )
    flag = free.out_proj.weight.requires_grad
    own._qkv_same_embed_dim = packed
    if packed:
        _fill(own, "in_proj_weight", torch.cat([q, k, v]))
    else:
        if own.q_proj_weight is None:  # inputs as wide as the heads, another width behind
            own = _unpacked(own)
        _fill(own, "k_proj_weight", k)
        _fill(own, "v_proj_weight", v)
        _fill(own, "q_proj_weight", q if fits else torch.eye(inner, dtype=q.dtype, device=q.device))
    if biases is not None:
        _fill(own, "in_proj_bias", biases)
    bias = free.out_proj.bias
    own.out_proj = NonDynamicallyQuantizableLinear(
        inner, out.shape[0], bias is not None, device=q.device, dtype=q.dtype
    )
    _fill(own.out_proj, "weight", out)
    if bias is not None:
        _fill(own.out_proj, "bias", bias)
    for parameter in own.parameters():
        parameter.requires_grad_(flag)
    if fits:
        return cast(nn.Module, own.train(free.training))
    identity = own.q_proj_weight.detach()
    del own.q_proj_weight
    own.register_buffer("q_proj_weight", identity, persistent=False)
    query = nn.Linear(q.shape[1], inner, bias=False, device=q.device, dtype=q.dtype)
    _fill(query, "weight", q)
    query.requires_grad_(flag)
    return _behind_projection(query, own.train(free.training), free)


def _behind_projection(query: nn.Module, own: Any, free: DecoupledMultiheadAttention) -> nn.Module:
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("query", "key", "value")]
    options = [
        graph.placeholder("key_padding_mask", _Mask, None),
        graph.placeholder("need_weights", bool, True),
        graph.placeholder("attn_mask", _Mask, None),
        graph.placeholder("average_attn_weights", bool, True),
        graph.placeholder("is_causal", bool, False),
    ]
    # Layers of torch ask their attention for these before they decide against fused kernels. What no node of the graph
    # names would not follow it into a copy.
    asked = {name: getattr(free, name) for name in ("batch_first", "num_heads", "embed_dim")}
    asked |= {"_qkv_same_embed_dim": False, "in_proj_bias": None}
    for name in asked:
        graph.get_attr(name)
    projected = graph.call_module("query", (inputs[0],))
    graph.output(graph.call_module("attention", (projected, *inputs[1:], *options)))
    return _module({"query": query, "attention": own, **asked}, graph, free)


def _module(parts: dict[str, Any], graph: fx.Graph, like: nn.Module) -> nn.Module:
    root = nn.Module()
    for name, part in parts.items():
        setattr(root, name, part)
    module = fx.GraphModule(root, graph, type(like).__name__)
    module.training = like.training
    return module


def _wider(rows: Tensor, heads: int, width: int) -> Tensor:
    """Rows of all heads, those of each filled up with zeros to `width`."""
    each = rows.unflatten(0, (heads, -1))
    return nn.functional.pad(each, (0, 0, 0, width - each.shape[1])).flatten(0, 1)


def _unpacked(packed: Any) -> Any:
    """The same attention with one weight for each of queries, keys and values."""
    inner = packed.embed_dim
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        setattr(packed, name, nn.Parameter(packed.in_proj_weight.new_empty(inner, inner)))
    packed.register_parameter("in_proj_weight", None)
    return packed


def _fill(module: Any, name: str, value: Tensor) -> None:
    held: Tensor = getattr(module, name)
    with torch.no_grad():
        if held.shape == value.shape:
            held.copy_(value)
        else:
            setattr(module, name, nn.Parameter(value.detach().clone()))
