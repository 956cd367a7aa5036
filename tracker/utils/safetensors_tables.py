"""Tables of tensors as bytes: safetensors, written piece by piece; read without a copy, and believed in nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (16, 32, 64) if hasattr(torch, f"uint{bits}")},
}  # fmt: skip
LARGEST_HEADER = 10**8  # bytes, as in the format
MOST_DIMENSIONS = 64
LONGEST = 2**48  # a dimension


def bytes_of(table: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file of these tensors, in pieces: of the larger types first, so that all are aligned.

    Raises:
        ValueError: One is of a type that the format does not have.
    """
    names = {dtype: name for name, dtype in TYPES.items()}
    header, end = dict[str, Any](), 0
    order = sorted(table, key=lambda name: (-table[name].dtype.itemsize, name))
    for name in order:
        tensor = table[name]
        if tensor.dtype not in names:
            raise ValueError(f"{name!r} is of {tensor.dtype}, which cannot be written")
        size = tensor.numel() * tensor.dtype.itemsize
        facts = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**facts, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise ValueError("there are more tensors than a file can hold")
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if table[name].numel():
            own = table[name].detach().cpu().contiguous().resolve_conj().resolve_neg()
            yield own.flatten().view(torch.uint8).numpy().data


def table_of(data: bytearray) -> dict[str, Tensor]:
    """The tensors of a safetensors file; they are views of `data`.

    Raises:
        ValueError: It is none.
    """
    if len(data) < 8:
        raise ValueError("it is shorter than a header")
    size = int.from_bytes(data[:8], "little")
    if size > min(len(data) - 8, LARGEST_HEADER):
        raise ValueError("its header is longer than the file")
    header = json.loads(bytes(data[8 : 8 + size]).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    start, end, found = 8 + size, 0, dict[str, Tensor]()
    places = sorted(((*_place(name, facts), name) for name, facts in header.items()), key=_order)
    for first, last, dtype, shape, name in places:
        if first != end or start + last > len(data):
            raise ValueError(f"{name!r} does not lie where it should")
        end = last
        found[name] = _tensor(data, start + first, start + last, dtype, shape)
    if start + end != len(data):
        raise ValueError("it is longer than its tensors")
    return {name: found[name] for name in header}


def _order(place: tuple[Any, ...]) -> tuple[int, int]:
    return place[0], place[1]


def _place(name: str, facts: Any) -> tuple[int, int, torch.dtype, list[int]]:
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header says other things of {name!r} than it should")
    kind, shape, places = facts["dtype"], facts["shape"], facts["data_offsets"]
    dtype = TYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise ValueError(f"{name!r} is of the unknown type {str(kind)[:20]!r}")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_size, shape)):
        raise ValueError(f"{name!r} has no shape")
    if not isinstance(places, list) or len(places) != 2 or not all(map(_size, places)):
        raise ValueError(f"{name!r} has no place")
    first, last = places
    # Also without the empty dimensions: strides of such a tensor are products of the others.
    if math.prod(max(n, 1) for n in shape) > LONGEST:
        raise ValueError(f"{name!r} is larger than any tensor")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has another size than its shape and type say")
    return first, last, dtype, shape


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LONGEST


def _tensor(data: bytearray, first: int, last: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if first == last:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=first)
    if dtype is torch.bool:
        return raw.ne(0).view(shape)  # a bool of another byte than 0 and 1 is none
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)
