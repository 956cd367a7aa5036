"""The same model through Torch-Pruning, driven as its own examples do, with every attribute that it leaves to the user.

github.com/VainF/Torch-Pruning, examples/: magnitude importance, 30% of each group, output layers ignored, the heads of
attention named. Which slices it takes is recorded; the masked original has zeros there, its norms go over the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import compress
from typing import Any

import torch
import torch_pruning as tp
from _masks import attention_widths, difference, masked_with_norms, tensors_of
from _measure import SHARE, Subject, brief, clock, place
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

Send = Callable[[dict[str, Any]], None]
QKV = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
)  # fmt: skip
Attention = tuple[nn.Module, list[nn.Module], list[int]]
Attentions = list[Attention]
WHOLE = ("transformers", "depth")  # families where it takes whole heads
FUSED = ("qkv", "qkv_proj", "query_key_value", "Wqkv")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
SIZES = ("embed_dim", "all_head_size", "hidden_size", "inner_dim", "attn_dim", "dim", "d_model")


def measure(family: str, name: str, send: Send) -> None:
    """Send what comes of one model: seconds, status, and a note."""

    def say(**values: Any) -> None:
        send({"rival": values})

    say(status="not built")
    warm_up()
    subject = Subject(family, name)
    if family == "zoo":
        subject.watch = ()
    model = subject.model
    for module in model.modules():  # a cache's concatenations make its graph endless
        if hasattr(config := getattr(module, "config", None), "use_cache"):
            config.use_cache = False
    if hasattr(model, "set_attn_implementation"):
        with suppress(
            Exception
        ):  # repeated keys and values can be followed, a fused kernel's cannot
            model.set_attn_implementation("eager")
    untie(model)
    original = copy.deepcopy(model)
    say(status="exception")
    widths: list[int] = []
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide attention from the record
    with attention_widths(widths, replay=False):
        subject.outputs(model)
    size = sum(p.numel() for p in model.parameters())
    known = list(attentions(model))
    start = clock()
    try:
        with recorded(model) as lost:
            pruner = make_pruner(subject, family)
            say(status="exception", stage="step")
            pruner.step()
            say(seconds=clock() - start)
        follow(model, pruner, known, family in WHOLE)
    except Exception as error:
        return say(seconds=clock() - start, note=f"{brief(error)} {place(error)}")
    after = sum(p.numel() for p in model.parameters())
    say(parameters_after=after)
    if after == size:
        return say(status="silent no-op")
    try:
        found = subject.outputs(model)
    except Exception as error:
        return say(note=f"forward afterwards: {brief(error)} {place(error)}")
    try:
        reference = subject.outputs(masked_with_norms(original, lost, model))
    except Exception as error:
        return say(status="runs", note=f"its mask cannot be compared: {brief(error)}")
    alike = [a.shape == b.shape for a, b in zip(found, reference, strict=False)]
    if len(found) != len(reference) or not any(alike):
        return say(status="runs", note="the output changed its shape: its mask cannot be compared")
    # A hidden state among the outputs may have become narrower: that was asked for.
    found, reference = list(compress(found, alike)), list(compress(reference, alike))
    gap = difference(found, reference)
    say(difference=gap)
    if gap <= subject.tolerance:
        return say(status="correct")
    with attention_widths(widths, replay=True):
        rescaled = list(compress(subject.outputs(model), alike))
    if widths and difference(rescaled, reference) <= subject.tolerance:
        return say(status="softmax scale", note=f"output changed by {gap:.1e}")
    torch.backends.mha.set_fastpath_enabled(fast)
    return say(status="differs", note=f"from its mask by {gap:.1e}")


def warm_up() -> None:
    """What is imported and compiled at the first call is not the model's time."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(
        model, torch.randn(2, 4), importance, num_heads={}, pruning_ratio=SHARE
    ).step()


def untie(model: nn.Module) -> None:
    """Torch-Pruning breaks ties: each place is cut by itself, and only so can its cuts be told apart."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
            seen.add(id(parameter))


def make_pruner(subject: Subject, family: str) -> Any:
    model, example = subject.model, subject.kwargs or subject.args
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    heads: dict[nn.Module, int] = {}
    groups: dict[nn.Module, int] = {}
    for _, layers, counts in attentions(model):
        heads.update(zip(layers, counts, strict=True))
    for module in model.modules():
        fused = getattr(module, "gate_up_proj", None)
        if isinstance(fused, nn.Linear):
            groups[fused] = 2
    # Whole heads where widths of heads are fixed by a rotation or an attribute; dimensions of heads elsewhere.
    whole = family in WHOLE
    return tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=SHARE,
        global_pruning=False,
        ignored_layers=ignored(subject),
        num_heads=heads,
        out_channel_groups=groups,
        in_channel_groups={},
        prune_num_heads=whole,
        prune_head_dims=not whole,
        head_pruning_ratio=SHARE if whole else 0.0,
        forward_fn=lambda m, _: subject.run(m),
        output_transform=lambda out: [t for t in tensors_of(out) if t.grad_fn is not None],
    )


def ignored(subject: Subject) -> list[nn.Module]:
    """Layers that make the output, and what the examples ignore for a detector."""
    found = [subject.model.get_submodule(name) for name in subject.blocks]
    made: list[tuple[nn.Module, Tensor]] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
    handles = [
        m.register_forward_hook(lambda m, _, out: made.append((m, out)))
        for m in subject.model.modules()
        if isinstance(m, kinds)
    ]
    with torch.no_grad():
        outputs = tensors_of(subject.run(subject.model))
    for handle in handles:
        handle.remove()
    ends = {t.untyped_storage().data_ptr() for t in outputs}
    found += [m for m, out in made if out.untyped_storage().data_ptr() in ends]
    widths = {t.shape[d] for t in outputs if t.ndim for d in (1, -1) if t.ndim > 1}
    if made and not subject.blocks:  # the last layer, where a pooling or an upsampling follows it
        last = next(
            (m for m, out in reversed(made) if out.shape[1] in widths or out.shape[-1] in widths),
            None,
        )
        found += [last] if last is not None else []
    return found


def attentions(model: nn.Module) -> Iterator[Attention]:
    """Attention modules, their layers of queries, keys and values (or the one of all), and heads of each."""
    config = getattr(model, "config", None)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module, [module], [module.num_heads]
            continue
        values = [getattr(module, c, None) or getattr(config, c, None) for c in COUNTS]
        count = next((v for v in values if isinstance(v, int)), None)
        if count is None:
            continue
        kv = next(
            (
                v
                for o in (module, config)
                if isinstance(v := getattr(o, "num_key_value_heads", None), int)
            ),
            count,
        )
        for names in QKV:
            layers = [getattr(module, n, None) for n in names]
            if all(isinstance(x, nn.Linear) for x in layers):
                yield module, layers, [count, kv, kv]
                break
        else:
            fused = [x for n in FUSED if isinstance(x := getattr(module, n, None), nn.Linear)]
            if fused:
                yield module, fused[:1], [count]


def follow(model: nn.Module, pruner: Any, known: Attentions, whole: bool) -> None:
    """Attributes that Torch-Pruning leaves to its user, as its examples set them and where they do not."""
    config = getattr(model, "config", None)
    for module, layers, counts in known:
        if isinstance(module, nn.MultiheadAttention):
            continue
        first, parts = layers[0], 3 if len(layers) == 1 else 1
        width = first.out_features // parts
        before = pruner.layer_init_out_ch.get(first, first.out_features) // parts
        size = before // counts[0] if whole else width // counts[0]  # of a head
        count = max(width // max(size, 1), 1)
        for name in COUNTS:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, count)
        for name in ("head_dim", "attention_head_size"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, size)
        for name in SIZES:
            if getattr(module, name, None) == before:
                setattr(module, name, width)
        kv = count if parts == 3 else max(layers[-1].out_features // max(size, 1), 1)
        for owner in (module, config):
            if isinstance(getattr(owner, "num_key_value_heads", None), int):
                owner.num_key_value_heads = kv
        if isinstance(getattr(module, "num_key_value_groups", None), int):
            module.num_key_value_groups = count // kv
        for name in COUNTS:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, count)
    if type(model).__name__ == "VisionTransformer" and hasattr(model, "hidden_dim"):
        model.hidden_dim = model.conv_proj.out_channels
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, nn.Linear) and hasattr(config, "hidden_size"):
        config.hidden_size = head.in_features


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, dict[int, set[int]]]]:
    """Which slices of which parameters go, in indices of the original; the statistics of norms go with these."""
    state: dict[int, tuple[str, dict[int, list[int]]]] = {
        id(p): (n, {}) for n, p in model.named_parameters()
    }
    sizes = {n: p.shape for n, p in model.named_parameters()}
    objects: list[Any] = list(model.parameters())  # ids stay theirs
    cuts: list[tuple[str, dict[int, list[int]]]] = []
    real = BasePruningFunc._prune_parameter_and_grad

    def cut(self: Any, weight: Any, keep_idxs: Any, pruning_dim: int) -> Any:
        fresh = real(self, weight, keep_idxs, pruning_dim)
        if id(weight) in state:
            name, before = state[id(weight)]
            dim = pruning_dim % weight.ndim
            left = before.get(dim, list(range(sizes[name][dim])))
            state[id(fresh)] = name, {**before, dim: [left[int(i)] for i in keep_idxs]}
            objects.append(fresh)
            cuts.append(state[id(fresh)])
        return fresh

    lost: dict[str, dict[int, set[int]]] = {}
    BasePruningFunc._prune_parameter_and_grad = cut
    try:
        yield lost
    finally:
        BasePruningFunc._prune_parameter_and_grad = real
        for name, dims in cuts:
            for dim, left in dims.items():
                gone = lost.setdefault(name, {}).setdefault(dim, set())
                gone.update(set(range(sizes[name][dim])) - set(left))
