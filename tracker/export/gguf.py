"""A changed language model as a GGUF file, for llama.cpp: layers of unequal widths as they are."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracker.engine import NeuronEngine
from tracker.errors import ExportError
from tracker.export.compare import apart, current_model, example_calls, require_small
from tracker.export.destination import whole_or_nothing
from tracker.export.gguf_reference import GgufModel
from tracker.export.gguf_tokenizer import add_tokenizer
from tracker.export.llama_cpp import llama_cpp_logits
from tracker.export.llama_like import LlamaLike, llama_sizes, tensors
from tracker.export.plain import to_plain
from tracker.export.record import Exported, needed, size_of
from tracker.inputs.calls import Call
from tracker.inputs.forward_pass import forward_once

# Of the largest logit: the rounding of weights to each format, which adds up over the layers.
CLOSE = {"f32": 1e-3, "f16": 1e-2, "q8_0": 1e-1}
BLOCK = 32  # weights of a row that share a scale in q8_0
MOST = 64  # positions that are compared


def to_gguf(
    engine: NeuronEngine,
    path: str | PathLike[str],
    tokenizer: Any = None,
    dtype: str = "f16",
    *,
    verify: bool = True,
) -> Exported:
    """Write the current model as a GGUF file, which llama.cpp runs.

    For models built as Llama is: Llama, Mistral, SmolLM, Qwen2. Where layers differ in heads or in neurons, the file is
    of the architecture `deci`, of which llama.cpp reads each layer's own numbers; else it is a plain `llama`.

    Args:
        engine: Its current model is written; it is not changed.
        path: The file. One that is there is replaced once the new one is checked.
        tokenizer: One of transformers, or a directory of one; None: the file has no vocabulary, and is for callers
            that pass token ids.
        dtype: Of matrices: "f32", "f16" or "q8_0" (8 bits and a scale for each 32 weights; MLPs are filled up with
            zeros to the next multiple of 32, and other matrices whose rows are none are kept in f16). Vectors are f32.
        verify: Run the file and compare its logits on the example inputs: by a forward pass in numpy that knows only
            the file, and by llama.cpp where `llama-cpp-python` is installed.

    Raises:
        ExportError: The package `gguf` is missing, or the format cannot express the model, which the message explains.
        VerificationError: Logits differ by more than rounding to `dtype` explains; nothing was written.
        SurgeryError, StructureError: As `to_plain`.

    Examples:
        >>> from tracker.export import to_gguf
        >>> to_gguf(engine, "lm.gguf", dtype="f16")  # doctest: +SKIP
    """
    needed("gguf", "gguf")
    if dtype not in CLOSE:
        raise ExportError(f"dtype is one of {', '.join(CLOSE)}, and not {dtype!r}.")
    model: Any = current_model(engine)
    if not hasattr(model, "config"):
        raise ExportError(
            f"A {type(model).__name__} is no language model of transformers: to_onnx takes any model."
        )
    plain = to_plain(engine, verify=verify)
    sizes = llama_sizes(plain)
    tokens = _tokens(engine) if verify else []
    difference, checked = None, ""
    with whole_or_nothing(path) as made:
        notes = _write(plain, sizes, made, tokenizer, dtype)
        if verify:
            difference, checked = _checked(model, made, tokens, dtype)
        size = size_of(made)
    return Exported(Path(path), "gguf", size, difference, checked, tuple(notes))


def _write(model: Any, sizes: LlamaLike, path: Path, tokenizer: Any, dtype: str) -> list[str]:
    gguf = needed("gguf", "gguf")
    kinds = gguf.GGMLQuantizationType
    if dtype == "q8_0":
        whole = [-(-width // BLOCK) * BLOCK for width in sizes.hidden]
        filled = sum(whole) - sum(sizes.hidden)
        sizes = replace(sizes, hidden=whole)
    else:
        filled = 0
    writer = gguf.GGUFWriter(path, "llama" if sizes.even else "deci")
    files = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[files[dtype]])
    writer.add_name(type(model).__name__)
    writer.add_block_count(len(sizes.heads))
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.width)
    even = sizes.even
    writer.add_feed_forward_length(sizes.hidden[0] if even else sizes.hidden)
    writer.add_head_count(sizes.heads[0] if even else sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads[0] if even else sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(sizes.rope)
    writer.add_layer_norm_rms_eps(sizes.eps)
    writer.add_vocab_size(model.model.embed_tokens.num_embeddings)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(writer, tokenizer, model.model.embed_tokens.num_embeddings)
    kept = 0
    for name, tensor in tensors(model, sizes):
        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        kind = kinds.F32 if array.ndim < 2 or dtype == "f32" else kinds.F16
        if dtype == "q8_0" and array.ndim == 2:
            kind = kinds.F16 if array.shape[1] % BLOCK else kinds.Q8_0
            kept += array.shape[1] % BLOCK > 0
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    notes = [] if even else ["layers of unequal sizes: architecture deci"]
    if filled:
        notes.append(f"{filled:,} neurons of zeros, to multiples of {BLOCK} for each MLP")
    if kept:
        notes.append(f"{kept} matrices kept in f16: rows no multiple of {BLOCK} long")
    return notes


def _tokens(engine: NeuronEngine) -> list[Tensor]:
    """Texts of the example calls, as ids: of each call the first rows."""
    found = []
    for call in example_calls(engine):
        ids = call.kwargs.get("input_ids", call.args[0] if call.args else None)
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            found += [row[:MOST].cpu() for row in ids[:4]]
    if not found:
        raise ExportError(
            "No example call has input_ids of shape (texts, positions): pass example_inputs={'input_ids': ids} to "
            "track_model."
        )
    return found


def _checked(model: Any, path: Path, tokens: list[Tensor], dtype: str) -> tuple[float, str]:
    device = next(model.parameters()).device
    expected = [_logits(model, ids.to(device)) for ids in tokens]
    reference = GgufModel(path)
    found = [torch.from_numpy(reference.logits(ids.numpy().astype(np.int64))) for ids in tokens]
    worst = apart(expected, found)
    require_small(worst, CLOSE[dtype], "The GGUF file, run by numpy,")
    answers = llama_cpp_logits(path, tokens)
    if answers is None:
        return worst, "numpy (llama-cpp-python is not installed)"
    difference = apart(expected, answers)
    require_small(difference, CLOSE[dtype], "The GGUF file, run by llama.cpp,")
    return max(worst, difference), "llama.cpp and numpy"


def _logits(model: Any, ids: Tensor) -> Tensor:
    output: Any = forward_once(model, Call(input_ids=ids[None], training=False))
    logits: Tensor = output.logits[0]
    return logits.double().cpu()
