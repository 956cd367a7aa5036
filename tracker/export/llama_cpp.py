"""Logits of a GGUF file by llama.cpp, where `llama-cpp-python` is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from tracker.errors import ExportError


def llama_cpp_logits(path: str | PathLike[str], texts: Sequence[Tensor]) -> list[Tensor] | None:
    """Logits at each position of each text, (positions, vocabulary); None where the package is not installed.

    Raises:
        ExportError: llama.cpp does not load or run the file.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    llama = _loaded(path, max(len(ids) for ids in texts))
    found = []
    try:
        for ids in texts:
            llama.reset()
            llama.eval(ids.tolist())
            found.append(torch.from_numpy(llama.scores[: len(ids)].copy()))
    except Exception as error:
        raise ExportError(f"llama.cpp does not run what was written: {error}") from error
    finally:
        llama.close()
    return found


def _loaded(path: str | PathLike[str], positions: int) -> Any:
    import llama_cpp

    try:
        return llama_cpp.Llama(
            fspath(path), n_ctx=max(positions, 64), logits_all=True, verbose=False, n_gpu_layers=0
        )
    except Exception as error:
        raise ExportError(
            f"llama.cpp does not load what was written ({error}): it may be older than the architecture."
        ) from error
