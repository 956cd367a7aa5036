"""A forward pass of a GGUF file, in numpy, from the file alone: what its metadata and tensors say."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracker.errors import ExportError
from tracker.export.record import needed

Array = NDArray[np.float64]


class GgufModel:
    """A llama-like model in a GGUF file: each tensor's shape is held against the metadata.

    Args:
        path: The file.

    Raises:
        ExportError: A tensor is missing, or of another shape than the metadata says.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        gguf = needed("gguf", "gguf")
        reader = gguf.GGUFReader(path)
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self.tensors: dict[str, Array] = {
            t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64)
            for t in reader.tensors
        }
        self.architecture: str = self.fields["general.architecture"]
        self.layers: int = self._field("block_count")
        self.heads = self._each("attention.head_count")
        self.kv_heads = self._each("attention.head_count_kv")
        self.hidden = self._each("feed_forward_length")
        self.width: int = self._field("embedding_length")
        self.head_dim: int = self._field("attention.key_length")
        self._require_shapes()

    def logits(self, tokens: NDArray[np.int64]) -> Array:
        """Logits at each position of one text; tokens: (positions,); returns (positions, vocabulary)."""
        x = self.tensors["token_embd.weight"][tokens]
        for i in range(self.layers):
            x = x + self._attention(i, self._norm(x, f"blk.{i}.attn_norm.weight"))
            y = self._norm(x, f"blk.{i}.ffn_norm.weight")
            gate = self._linear(y, f"blk.{i}.ffn_gate")
            hidden = gate / (1 + np.exp(-gate)) * self._linear(y, f"blk.{i}.ffn_up")
            x = x + self._linear(hidden, f"blk.{i}.ffn_down")
        x = self._norm(x, "output_norm.weight")
        found: Array = x @ self.tensors.get("output.weight", self.tensors["token_embd.weight"]).T
        return found

    def _attention(self, i: int, x: Array) -> Array:
        heads, shared = self.heads[i], self.kv_heads[i]
        q = self._rotated(self._linear(x, f"blk.{i}.attn_q").reshape(len(x), heads, -1))
        k = self._rotated(self._linear(x, f"blk.{i}.attn_k").reshape(len(x), shared, -1))
        v = self._linear(x, f"blk.{i}.attn_v").reshape(len(x), shared, -1)
        k, v = (a.repeat(heads // shared, axis=1) for a in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.head_dim)
        scores += np.triu(np.full((len(x), len(x)), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
        return self._linear(mixed, f"blk.{i}.attn_output")

    def _rotated(self, x: Array) -> Array:
        """Rotary embedding of neighbouring features; x: (positions, heads, features)."""
        base = float(self._field("rope.freq_base"))
        frequency = base ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        if "rope_freqs.weight" in self.tensors:
            frequency = frequency / self.tensors["rope_freqs.weight"]
        angle = np.arange(len(x))[:, None, None] * frequency
        even, odd = x[..., ::2], x[..., 1::2]
        turned = (
            even * np.cos(angle) - odd * np.sin(angle),
            even * np.sin(angle) + odd * np.cos(angle),
        )
        return np.stack(turned, axis=-1).reshape(x.shape)

    def _norm(self, x: Array, name: str) -> Array:
        eps = float(self._field("attention.layer_norm_rms_epsilon"))
        found: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.tensors[name]
        return found

    def _linear(self, x: Array, name: str) -> Array:
        found: Array = x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)
        return found

    def _field(self, name: str) -> Any:
        key = f"{self.architecture}.{name}"
        if key not in self.fields:
            raise ExportError(f"The metadata lacks {key}.")
        return self.fields[key]

    def _each(self, name: str) -> list[int]:
        value = self._field(name)
        return list(value) if isinstance(value, list) else [value] * self.layers

    def _require_shapes(self) -> None:
        wide = self.width
        wanted: dict[str, tuple[int, ...]] = {"output_norm.weight": (wide,)}
        wanted["token_embd.weight"] = (self._field("vocab_size"), wide)
        for i in range(self.layers):
            q, kv, f = (
                self.heads[i] * self.head_dim,
                self.kv_heads[i] * self.head_dim,
                self.hidden[i],
            )
            shapes: dict[str, tuple[int, ...]] = {"attn_norm": (wide,), "ffn_norm": (wide,)}
            shapes["attn_q"] = (q, wide)
            shapes |= {"attn_k": (kv, wide), "attn_v": (kv, wide), "attn_output": (wide, q)}
            shapes |= {"ffn_gate": (f, wide), "ffn_up": (f, wide), "ffn_down": (wide, f)}
            wanted |= {f"blk.{i}.{name}.weight": shape for name, shape in shapes.items()}
        for name, shape in wanted.items():
            found = self.tensors[name].shape if name in self.tensors else None
            if found != shape:
                raise ExportError(f"{name} is {found}, and {shape} by the metadata.")
