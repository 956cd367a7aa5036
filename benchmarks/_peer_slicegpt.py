"""SliceGPT: the residual stream in the basis of its principal components, the last of them cut off.

Ashkboos, Croci, do Nascimento, Hoefler, Hensman: SliceGPT: Compress Large Language Models by Deleting Rows and Columns.
arXiv 2401.15024, section 3: scales of norms folded into what reads them (3.2), a rotation for each norm by PCA of what
it puts out, products of neighbouring rotations on the shortcuts (3.3), rows and columns deleted (3.4). Written from
the paper. Each PCA sees what the blocks before it, already sliced, put out.

Rotated embeddings and a rotated head cannot be one tensor: of a model that ties them, both are stored. `shared=True`
is kinder to such models than the paper: the tied tensor stays as it is, a matrix behind the embedding rotates, and the
last block writes all dimensions in the old basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from _peer_llama import parameters, replace_weight
from torch import Tensor, nn


class RMSNormWithoutScale(nn.Module):
    """x / rms(x), where the mean of squares is over the dimensions that there were before slicing."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().sum(-1, keepdim=True) / self.width + self.eps).rsqrt()


class SlicedBlock(nn.Module):
    """A block whose shortcuts lead from one basis to the next."""

    def __init__(self, block: Any, norm: RMSNormWithoutScale) -> None:
        super().__init__()
        self.norm, self.self_attn, self.mlp = norm, block.self_attn, block.mlp
        self.to_mlp, self.to_next = nn.Identity(), nn.Identity()  # nn.Linear, once sliced

    def after_attention(self, hidden: Tensor, **arguments: Any) -> Tensor:
        return self.to_mlp(hidden) + self.self_attn(self.norm(hidden), **arguments)[0]

    def after_mlp(self, hidden: Tensor) -> Tensor:
        return self.to_next(hidden) + self.mlp(self.norm(hidden))

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        return self.after_mlp(self.after_attention(hidden, **arguments))


class FirstInputs(nn.Module):
    """In place of all blocks: notes what the first would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[dict[str, Any]] = []

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.arguments.append(arguments)
        return hidden


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    replace_weight(made, weight)
    return made


def principal(hidden: Sequence[Tensor], norm: nn.Module, width: int) -> Tensor:
    """The first eigenvectors of the second moments of what the norm puts out, (dimensions, width)."""
    moments = sum(x.mT @ x for h in hidden for x in [norm(h).flatten(0, -2).double()])
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :width].to(hidden[0].dtype)


def stored(model: Any, width: int, shared: bool) -> int:
    """Parameters of a Llama once it is sliced to a width."""
    config, layers = model.config, model.model.layers
    embeddings = config.vocab_size * (config.hidden_size if shared else 2 * width)
    count = embeddings + (config.hidden_size * (width + 1) if shared else 0)  # a matrix and a norm
    for i, block in enumerate(layers):
        last = config.hidden_size if shared and i + 1 == len(layers) else width
        attention, mlp = block.self_attn, block.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        count += width * (sum(r.out_features for r in readers) + attention.o_proj.in_features)
        count += last * mlp.down_proj.in_features + width * (width + last)  # and two shortcuts
    return count


def widest(model: Any, keep: float, shared: bool) -> int:
    """The most dimensions with which no more than a share `keep` of the parameters is stored.

    Raises:
        ValueError: Even one dimension stores more.
    """
    target = keep * parameters(model)
    fitting = [
        w for w in range(1, model.config.hidden_size + 1) if stored(model, w, shared) <= target
    ]
    if not fitting:
        raise ValueError(f"No width leaves {keep:.0%} of the parameters or less.")
    return fitting[-1]


def fold_scales(model: Any, head: bool) -> None:
    """The scales of norms into the weights that read what the norms put out."""

    def fold(norm: Any, *readers: nn.Linear) -> None:
        for reader in readers:
            replace_weight(reader, reader.weight.detach() * norm.weight.detach())

    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        fold(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        fold(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    if head:
        fold(model.model.norm, model.lm_head)


def read_in(basis: Tensor, *readers: nn.Linear) -> None:
    for reader in readers:
        replace_weight(reader, reader.weight.detach() @ basis)


def slice_block(
    block: SlicedBlock, basis: Tensor, hidden: list[Tensor], given: Sequence[dict[str, Any]],
    width: int, last: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Rotate and slice a block in place.

    Args:
        block: With an input in the original basis.
        basis: Of its input from now on, (dimensions, width).
        hidden: Its inputs in that basis, (samples, positions, width) each.
        given: Its other arguments, for each of `hidden`.
        width: How many dimensions stay.
        last: The basis of its output; None: the principal components.

    Returns:
        The basis of the output, and the outputs in it.
    """
    attention, mlp, norm = block.self_attn, block.mlp, block.norm
    read_in(basis, attention.q_proj, attention.k_proj, attention.v_proj)
    block.to_mlp = linear(basis)
    hidden = [block.after_attention(h, **a) for h, a in zip(hidden, given, strict=True)]
    middle = principal(hidden, norm, width)
    replace_weight(attention.o_proj, middle.mT @ attention.o_proj.weight.detach())
    block.to_mlp = linear(middle.mT @ basis)
    read_in(middle, mlp.gate_proj, mlp.up_proj)
    block.to_next = linear(middle)
    hidden = [block.after_mlp(h @ middle) for h in hidden]
    after = principal(hidden, norm, width) if last is None else last
    replace_weight(mlp.down_proj, after.mT @ mlp.down_proj.weight.detach())
    block.to_next = linear(after.mT @ middle)
    return after, [h @ after for h in hidden]


@torch.no_grad()
def slice_to_width(model: Any, batches: Sequence[Tensor], width: int, shared: bool = False) -> None:
    """Rotate and slice a Llama in place.

    Args:
        model: A `LlamaForCausalLM` without biases.
        batches: Token ids to calibrate with, (samples, positions) each.
        width: How many dimensions of the residual stream stay.
        shared: Whether embeddings and head stay one tensor.
    """
    inner = model.model
    norm = RMSNormWithoutScale(model.config.hidden_size, model.config.rms_norm_eps)
    final, inner.norm = inner.norm, nn.Identity()
    blocks, first = inner.layers, FirstInputs()
    inner.layers = nn.ModuleList([first])
    hidden = [inner(input_ids=x, use_cache=False).last_hidden_state for x in batches]
    inner.layers, inner.norm = blocks, final

    fold_scales(model, head=not shared)
    inner.layers = nn.ModuleList(SlicedBlock(b, norm) for b in blocks)
    basis = principal(hidden, norm, width)
    table = inner.embed_tokens
    if shared:
        inner.embed_tokens = nn.Sequential(table, linear(basis.mT))
    else:
        rotated = table.weight.detach() @ basis
        inner.embed_tokens = nn.Embedding.from_pretrained(rotated, freeze=False)
    hidden = [h @ basis for h in hidden]
    whole = torch.eye(model.config.hidden_size) if shared else None
    for block in inner.layers:
        last = whole if block is inner.layers[-1] else None
        basis, hidden = slice_block(block, basis, hidden, first.arguments, width, last)
    if not shared:
        read_in(basis, model.lm_head)
        inner.norm = norm
        model.config.tie_word_embeddings = False


def slicegpt(model: Any, batches: Sequence[Tensor], keep: float, shared: bool = False) -> None:
    """Slice a Llama in place to a share of its parameters at most, shortcuts and embeddings counted as stored."""
    slice_to_width(model, batches, widest(model, keep, shared), shared)
