"""Small language models of transformers, changed: layers of unequal widths and numbers of heads."""

from __future__ import annotations

from typing import Any

import torch

from tracker import NeuronEngine

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def llama(**options: Any) -> Any:
    """A llama of three layers: 32 features, 8 heads of 4, each two of queries sharing one of keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shared = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**{**shared, **heads, "max_position_embeddings": 64, **options})
    return LlamaForCausalLM(config).eval()


def tracked(model: Any) -> NeuronEngine:
    engine = NeuronEngine()
    engine.track_model(model, "lm", example_inputs={"input_ids": IDS})
    return engine


def make_uneven(engine: NeuronEngine, kinds: tuple[str, ...] = ("neuron", "head")) -> None:
    """Take one more unit from each layer than from the one before, and none from the first; then move all weights."""
    for kind in kinds:
        names = [g.name for g in engine.structure.groups if g.kind == kind]
        engine.prune_units(
            {name: list(range(i)) for i, name in enumerate(names) if i}, verify=False
        )
    model = engine.tracker.current.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
