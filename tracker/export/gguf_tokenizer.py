"""A tokenizer of transformers in the metadata of a GGUF file."""

from __future__ import annotations

import json
import tempfile
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from tracker.errors import ExportError
from tracker.export.record import needed

# How llama.cpp names the ways to split a text before byte pairs are merged, by a pattern in `tokenizer.json`.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {f"{_WORDS}{{1,3}}{_REST}": "llama-bpe", f"{_WORDS}{_REST}": "qwen2"}


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Write tokens, merges, special tokens and the way to split texts.

    Args:
        writer: A `gguf.GGUFWriter`.
        tokenizer: One of transformers, or a directory of one.
        size: Rows of the embedding; tokens that the tokenizer has not are filled up.

    Raises:
        ExportError: It is no tokenizer of byte pairs, or splits texts in a way that llama.cpp has no name for.
    """
    gguf = needed("gguf", "gguf")
    if isinstance(tokenizer, str | PathLike):
        auto = needed("transformers", "gguf").AutoTokenizer
        tokenizer = auto.from_pretrained(fspath(tokenizer), local_files_only=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ExportError(
                f"{type(tokenizer).__name__} has no tokenizer.json, and that is what can be written: use a fast one."
            )
        data = json.loads(file.read_text(encoding="utf-8"))
        split = _split(data, type(tokenizer).__name__)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(names) >= size:
        raise ExportError(
            f"The tokenizer has {max(names) + 1} tokens, and the model's embedding {size} rows."
        )
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(size):
        tokens.append(names.get(i, f"[PAD{i}]"))
        kind = gguf.TokenType.NORMAL
        if i not in names:
            kind = gguf.TokenType.UNUSED
        elif i in added:
            kind = gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def _split(data: dict[str, Any], name: str) -> str:
    """llama.cpp's name of the way in which texts are split."""
    before = data.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if data.get("model", {}).get("type") != "BPE" or "ByteLevel" not in kinds:
        raise ExportError(
            f"{name} is no tokenizer of byte pairs (as Llama 3, SmolLM and Qwen have): export without it, "
            "and pass token ids."
        )
    last = steps[kinds.index("ByteLevel")]
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex", "") if kinds[0] == "Split" else ""
    if pattern in _SPLITS:
        return _SPLITS[pattern]
    raise ExportError(
        f"{name} splits texts in a way that llama.cpp has no name for here ({kinds}): export without it, "
        "and pass token ids."
    )
