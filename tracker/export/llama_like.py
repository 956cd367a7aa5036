"""Models built as Llama is (Mistral, SmolLM, Qwen2 too): what each layer has, and what no such file can say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracker.errors import ExportError

KINDS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# GGUF's names of a layer's parts.
PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LlamaLike:
    """The sizes of a model, layer by layer.

    Attributes:
        width: Of the stream.
        head_dim: Of each head.
        heads, kv_heads, hidden: For each layer: heads of queries, heads of keys and values, neurons of the MLP.
        rope: Base of the rotary embedding's frequencies.
        factors: By which each frequency is divided, None where all are 1.
        context: Positions.
        eps: Of the norms.
        tied: The embedding is the output matrix.
    """

    width: int
    head_dim: int
    heads: list[int]
    kv_heads: list[int]
    hidden: list[int]
    rope: float
    factors: np.ndarray[Any, Any] | None
    context: int
    eps: float
    tied: bool

    @property
    def even(self) -> bool:
        """Whether all layers are of the same sizes, as the format's plain llama has them."""
        return all(len(set(sizes)) == 1 for sizes in (self.heads, self.kv_heads, self.hidden))


def llama_sizes(model: Any) -> LlamaLike:
    """The sizes of a llama-like model of transformers.

    Raises:
        ExportError: It is built otherwise, or has what the format cannot express; the message names it.
    """
    name = type(model).__name__
    if name not in KINDS:
        raise ExportError(
            f"A {name} cannot be written as GGUF: {', '.join(KINDS)} can. For other models: to_onnx, to_hugging_face."
        )
    config, layers = model.config, model.model.layers
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(
            f"An MLP with {config.hidden_act} is not llama.cpp's: it knows SiLU here."
        )
    for i, layer in enumerate(layers):
        _require_llama(layer, i)
    attentions = [layer.self_attn for layer in layers]
    dims = {attention.head_dim for attention in attentions}
    head_dim = dims.pop()
    for i, attention in enumerate(attentions):
        made = [attention.q_proj, attention.k_proj, attention.v_proj]
        odd = any(p.out_features % head_dim for p in made) or bool(dims)
        if odd or attention.o_proj.in_features != made[0].out_features:
            raise ExportError(
                f"The heads of layer {i} are not all of one width ({head_dim}), and the format has one for all. Export "
                "to ONNX or to_hugging_face."
            )
        if made[1].out_features != made[2].out_features:
            raise ExportError(f"Layer {i} has other heads of keys than of values.")
        groups = made[0].out_features // made[1].out_features
        if made[1].out_features * groups != made[0].out_features:
            raise ExportError(
                f"Layer {i} has {made[0].out_features // head_dim} heads of queries on "
                f"{made[1].out_features // head_dim} of keys: the format wants a multiple."
            )
        if abs(attention.scaling * head_dim**0.5 - 1) > 1e-6:
            raise ExportError(
                f"Layer {i} scales its scores by {attention.scaling:.4g}, and the format by 1/√{head_dim}."
            )
    base, factors = _frequencies(model, head_dim)
    window = getattr(config, "sliding_window", None)
    if name == "Qwen2ForCausalLM" and not config.use_sliding_window:
        window = None
    return LlamaLike(
        width=model.model.embed_tokens.embedding_dim,
        head_dim=head_dim,
        heads=[a.q_proj.out_features // head_dim for a in attentions],
        kv_heads=[a.k_proj.out_features // head_dim for a in attentions],
        hidden=[layer.mlp.gate_proj.out_features for layer in layers],
        rope=base,
        factors=factors,
        context=min(config.max_position_embeddings, window or config.max_position_embeddings),
        eps=float(config.rms_norm_eps),
        tied=model.lm_head.weight is model.model.embed_tokens.weight,
    )


def tensors(model: Any, sizes: LlamaLike) -> Iterator[tuple[str, Tensor]]:
    """All tensors by GGUF's names, in the order of the format; a head's rows of queries and keys as it rotates them.

    Where `sizes` has more neurons of an MLP than the model, the others make zero and nothing reads them.
    """
    yield "token_embd.weight", model.model.embed_tokens.weight
    for i, layer in enumerate(model.model.layers):
        for name, place in PARTS.items():
            for own, tensor in layer.get_submodule(place).named_parameters():
                rows = tensor
                if name in ("attn_q", "attn_k"):
                    rows = interleaved(tensor, sizes.head_dim)
                more = sizes.hidden[i] - layer.mlp.gate_proj.out_features
                if name in ("ffn_gate", "ffn_up"):
                    rows = nn.functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, more))
                elif name == "ffn_down" and own == "weight":
                    rows = nn.functional.pad(rows, (0, more))
                yield f"blk.{i}.{name}.{own}", rows
    yield "output_norm.weight", model.model.norm.weight
    if not sizes.tied:
        yield "output.weight", model.lm_head.weight
    if sizes.factors is not None:
        yield "rope_freqs.weight", torch.from_numpy(sizes.factors)


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order: it rotates neighbours, where transformers rotates halves."""
    result: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return result


def _require_llama(layer: nn.Module, number: int) -> None:
    for place in PARTS.values():
        try:
            part = layer.get_submodule(place)
        except AttributeError:
            part = nn.Identity()
        kind = type(part).__name__
        if not (isinstance(part, nn.Linear) or kind.endswith("RMSNorm")):
            raise ExportError(
                f"Layer {number} has {kind} as its {place}: what was inserted, removed or replaced there is no part of "
                "a llama. Take it back (remove_layer, undo), or export to ONNX."
            )


def _frequencies(model: Any, head_dim: int) -> tuple[float, np.ndarray[Any, Any] | None]:
    rotary, parameters = model.model.rotary_emb, model.config.rope_parameters
    base = float(parameters["rope_theta"])
    if (
        abs(getattr(rotary, "attention_scaling", 1.0) - 1) > 1e-6
        or parameters["rope_type"] == "dynamic"
    ):
        raise ExportError(
            f"The rotary embedding is of type {parameters['rope_type']!r}, which scales with the length or the scores; "
            "a table of frequencies cannot say so."
        )
    own = rotary.inv_freq.detach().double().cpu().numpy()
    if len(own) != head_dim // 2:
        raise ExportError(
            f"{2 * len(own)} of the {head_dim} features of a head are rotated: llama.cpp rotates all."
        )
    factors = base ** (-np.arange(0, head_dim, 2) / head_dim) / own
    if np.allclose(factors, 1, rtol=1e-5):
        return base, None
    return base, factors.astype(np.float32)
