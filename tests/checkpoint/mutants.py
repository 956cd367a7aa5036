"""Checkpoints that someone changed: from a seed, bytes, and every field of every file with hashes made anew."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXTS = ("engine.json", "journal.json", "manifest.json")
TABLES = tuple(f"{t}.safetensors" for t in ("model", "optimizer", "statistics", "random"))
NAME = re.compile(r"[a-z_]{2,}")
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Mutant:
    """One change of a checkpoint on the disk. name: which one, for people and as its identity."""

    name: str
    apply: Callable[[Path], None]


def mutants(folder: Path, seed: int) -> list[Mutant]:
    """All changes of one checkpoint: two of each sort of field, five of each sort of tensor, and of bytes."""
    draw = random.Random(seed)
    found = [m for name in TEXTS for m in _fields(folder, name, draw)]
    found += [m for name in TABLES for m in _tensors(folder, name, draw)]
    found += [m for name in (*TEXTS, *TABLES) for m in _bytes(name, draw)]
    return [*found, *_whole()]


# Fields of JSON


def _fields(folder: Path, name: str, draw: random.Random) -> Iterator[Mutant]:
    data = json.loads((folder / name).read_text())
    sorts: dict[tuple[str, ...], list[Place]] = {}
    for place in _places(data, ()):
        sorts.setdefault(tuple(map(_sort, place)), []).append(place)
    for sort, places in sorts.items():
        place = draw.choice(places)
        value = _at(data, place)
        peers = [_at(data, p) for p in places if p != place]
        for told, other in draw.sample(_others(value, peers, draw), 2):
            yield Mutant(f"{name} {'.'.join(sort)} = {told}", _field(name, place, other))
        if place:
            yield Mutant(f"{name} {'.'.join(sort)} gone", _field(name, place, ...))


def _places(data: Any, at: Place) -> Iterator[Place]:
    yield at
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _places(value, (*at, key))
    elif isinstance(data, list):
        for i, value in enumerate(data[:40]):
            yield from _places(value, (*at, i))


def _sort(key: str | int) -> str:
    """Names of layers and places in lists are all of one sort."""
    return key if isinstance(key, str) and NAME.fullmatch(key) else "*"


def _others(value: Any, peers: list[Any], draw: random.Random) -> list[tuple[str, Any]]:
    """Values for the place of this one, each with a word for it."""
    found: list[tuple[str, Any]] = [
        ("null", None), ("true", True), ("-1", -1), ("2**31", 2**31), ("2**63", 2**63), ("10**40", 10**40),
        ("half", 0.5), ("NaN", float("nan")), ("1e308", 1e308), ("text", "../x\0\x1b[2J<script>"), ("empty text", ""),
        ("nothing", []), ("no fields", {}), ("deep", _deep(400)), ("itself in a list", [value]),
        ("its text", json.dumps(value)), ("a long text", "x" * 10**6), ("a long list", [0] * 10**5),
    ]  # fmt: skip
    if type(value) is int:
        near = (0, 1, value + 1, value - 1, value * 2 + 1, 2**24, 2**53, float(value))
        found += [(f"{type(n).__name__} near or far {i}", n) for i, n in enumerate(near)] * 2
    if isinstance(value, bool):
        found += [("the other", not value)] * 4
    if isinstance(value, float):
        found += [("more", value + 1.0), ("less than nothing", -value - 1.0), ("whole", 3)] * 2
    if isinstance(value, str):
        found += [("longer", value + "x"), ("shorter", value[:-1]), ("0", "0")] * 2
    if isinstance(value, list) and value:
        moved = [*value]
        draw.shuffle(moved)
        found += [("twice", value + value), ("backwards", value[::-1]), ("moved", moved)] * 2
        found += [("a part", value[:-1]), ("one more", [*value, copy.deepcopy(value[0])])] * 2
    if isinstance(value, dict) and value:
        key = draw.choice([*value])
        rest = {k: v for k, v in value.items() if k != key}
        found += [
            ("a foreign name", {**rest, "nope": value[key]}),
            ("one too many", {**value, "nope": value[key]}),
        ] * 2
        found += [
            ("one given to another", dict(zip(value, [*value.values()][::-1], strict=True)))
        ] * 2
    others = [p for p in peers if p != value]
    if others:
        found += [("that of another", draw.choice(others))] * 4
    return found


def _deep(depth: int) -> Any:
    data: Any = 0
    for _ in range(depth):
        data = {"tuple": [data]}
    return data


def _at(data: Any, place: Place) -> Any:
    for key in place:
        data = data[key]
    return data


def _field(name: str, place: Place, value: Any) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        if not place:
            data = value
        elif value is ...:
            del _at(data, place[:-1])[place[-1]]
        else:
            _at(data, place[:-1])[place[-1]] = value
        (folder / name).write_text(json.dumps(data))
        rehash(folder, name)

    return do


# Tensors

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool, torch.float8_e4m3fn,
)  # fmt: skip


def _tensors(folder: Path, name: str, draw: random.Random) -> Iterator[Mutant]:
    table = load_file(folder / name)
    sorts: dict[str, list[str]] = {}
    for key in table:
        parts = [p if re.fullmatch(r"[a-z_]{3,}(/.*)?", p) else "*" for p in re.split(r"[/.]", key)]
        sorts.setdefault(".".join(parts), []).append(key)
    for sort, keys in sorts.items():
        key = draw.choice(keys)
        changes = {**_shapes(table[key], draw), **_values(table[key], draw)}
        some = draw.sample([*changes], min(4, len(changes)))
        dtype = draw.choice([d for d in DTYPES if d != table[key].dtype])
        for told in some:
            yield Mutant(f"{name} {sort} {told}", _tensor(name, key, changes[told]))
        yield Mutant(f"{name} {sort} as {dtype}", _tensor(name, key, _as(dtype)))
        yield Mutant(f"{name} {sort} called otherwise", _renamed(name, key, draw))
        yield Mutant(f"{name} {sort} gone", _tensor(name, key, None))
        told, header = draw.choice([*_HEADERS.items()])
        yield Mutant(f"{name} {sort} header: {told}", _header(name, key, header))


Change = Callable[[Tensor], Tensor]


def _shapes(value: Tensor, draw: random.Random) -> dict[str, Change]:
    found: dict[str, Change] = {
        "as a number": lambda t: torch.zeros((), dtype=t.dtype),
        "of nothing": lambda t: t.flatten()[:0],
        "of a rank more": lambda t: t[None],
        "of three ranks more": lambda t: t[None, None, None],
        "flat": lambda t: t.flatten(),
        "of one number": lambda t: torch.ones(1, dtype=t.dtype),
    }
    if value.ndim:
        dim = draw.randrange(value.ndim)
        found["shorter"] = lambda t: t.narrow(dim, 0, t.shape[dim] - 1)
        found["longer"] = lambda t: torch.cat([t, t.narrow(dim, 0, 1)], dim)
        found["much longer"] = lambda t: torch.cat([t] * 50, dim)
    if value.ndim > 1:
        found["with its dimensions turned"] = lambda t: t.transpose(0, 1)
        found["as another matrix"] = lambda t: t.reshape(-1, t.shape[0])
    return found


def _values(value: Tensor, draw: random.Random) -> dict[str, Change]:
    found: dict[str, Change] = {
        "of zeros": torch.zeros_like,
        "of random bits": _random_bits,
        "of the largest": lambda t: torch.full_like(t, _largest(t.dtype)),
        "negative": lambda t: (-t.double() - 1).to(t.dtype),
    }
    if value.is_floating_point():
        found["of NaN"] = lambda t: torch.full_like(t, torch.nan)
        found["of infinity"] = lambda t: torch.full_like(t, torch.inf)
    return found


def _largest(dtype: torch.dtype) -> Any:
    if dtype is torch.bool:
        return True
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return info.max


def _random_bits(value: Tensor) -> Tensor:
    bits = torch.Generator().manual_seed(value.numel())
    raw = torch.randint(
        0, 256, (value.numel() * value.itemsize,), generator=bits, dtype=torch.uint8
    )
    return raw.view(value.dtype).view(value.shape) if value.dtype is not torch.bool else value


def _as(dtype: torch.dtype) -> Change:
    return lambda t: t.to(dtype)


def _tensor(name: str, key: str, change: Change | None) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        table = {k: v.clone() for k, v in load_file(folder / name).items()}
        value = table.pop(key)
        if change is not None:
            table[key] = change(value).contiguous().clone()
        save_file(table, folder / name)
        rehash(folder, name)

    return do


def _renamed(name: str, key: str, draw: random.Random) -> Callable[[Path], None]:
    at = draw.randrange(len(key))
    other = draw.choice(
        [key + "x", f"{key[:at]}/{key[at:]}", key[:at] + "9" + key[at + 1 :], "../" + key, "\0", ""]
    )

    def do(folder: Path) -> None:
        table = {k: v.clone() for k, v in load_file(folder / name).items()}
        table[other] = table.pop(key)
        save_file(table, folder / name)
        rehash(folder, name)

    return do


_HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "turned shape": lambda f: f.update(shape=f["shape"][::-1]),
    "flat shape": lambda f: f.update(shape=[(f["data_offsets"][1] - f["data_offsets"][0]) // 4]),
    "huge shape": lambda f: f.update(shape=[2**31, 2**31, 4]),
    "empty and huge": lambda f: f.update(shape=[0, 2**62]),
    "negative shape": lambda f: f.update(shape=[-1, -4]),
    "shape of text": lambda f: f.update(shape="x"),
    "shape of true": lambda f: f.update(shape=[True] * len(f["shape"])),
    "many ranks": lambda f: f.update(shape=[1] * 60 + f["shape"]),
    "another type": lambda f: f.update(dtype={"F32": "I32", "F64": "I64", "I64": "F64"}.get(f["dtype"], "I8")),
    "an unknown type": lambda f: f.update(dtype="Q4"),
    "places beyond the end": lambda f: f.update(data_offsets=[n + 8 for n in f["data_offsets"]]),
    "places of others": lambda f: f.update(data_offsets=[0, f["data_offsets"][1] - f["data_offsets"][0]]),
    "places backwards": lambda f: f.update(data_offsets=f["data_offsets"][::-1]),
    "places of text": lambda f: f.update(data_offsets=["0", "4"]),
    "a field more": lambda f: f.update(stride=[0, 0]),
}  # fmt: skip


def _header(
    name: str, key: str, change: Callable[[dict[str, Any]], None]
) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        data = (folder / name).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header[key])
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        rehash(folder, name)

    return do


# Bytes


def _bytes(name: str, draw: random.Random) -> Iterator[Mutant]:
    for number in range(2):
        at, bit = draw.random(), 1 << draw.randrange(8)
        yield Mutant(f"{name} a bit {number}, hash as it was", _raw(name, _flipped(at, bit), False))
        yield Mutant(f"{name} a bit {number}", _raw(name, _flipped(draw.random(), bit)))
    many = [draw.random() for _ in range(30)]
    yield Mutant(f"{name} thirty bits", _raw(name, lambda d: _all_flipped(d, many)))
    cut = draw.random()
    yield Mutant(f"{name} cut", _raw(name, lambda d: d[: int(cut * len(d))]))
    yield Mutant(f"{name} a part twice", _raw(name, lambda d: d + d[int(cut * len(d)) :]))
    yield Mutant(
        f"{name} zeros",
        _raw(name, lambda d: d[: int(cut * len(d))] + bytes(len(d) - int(cut * len(d)))),
    )
    yield Mutant(f"{name} noise", _raw(name, lambda d: random.Random(cut).randbytes(len(d))))


def _flipped(at: float, bit: int) -> Callable[[bytes], bytes]:
    def do(data: bytes) -> bytes:
        place = int(at * len(data))
        return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]

    return do


def _all_flipped(data: bytes, places: list[float]) -> bytes:
    changed = bytearray(data)
    for at in places:
        changed[int(at * len(data))] ^= 4
    return bytes(changed)


def _raw(
    name: str, change: Callable[[bytes], bytes], hashed: bool = True
) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        if hashed:
            rehash(folder, name)

    return do


# What is made by hand


def _whole() -> Iterator[Mutant]:
    yield Mutant("a huge file with nothing in it", _sparse)
    yield Mutant("scalar moments, and fused", _scalars)
    yield Mutant("fused with moments of another type", _fused_halves)
    yield Mutant("more entries than are believed", _entries(100_001))
    yield Mutant("ten thousand entries that change nothing", _entries(10_000))
    yield Mutant(
        "deep without end", _raw("engine.json", lambda d: b'{"a":' * 10**5 + b"1" + b"}" * 10**5)
    )


def _sparse(folder: Path) -> None:
    name = "statistics.safetensors"
    size = 2**36
    header = json.dumps(
        {"input.0": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    ).encode()
    with (folder / name).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    _facts(folder, name, 8 + len(header) + size, "0" * 64)


def _scalars(folder: Path) -> None:
    table = load_file(folder / "optimizer.safetensors")
    save_file({k: torch.zeros(()) for k in table}, folder / "optimizer.safetensors")
    rehash(folder, "optimizer.safetensors")
    _fuse(folder)


def _fused_halves(folder: Path) -> None:
    table = load_file(folder / "optimizer.safetensors")
    halves = {k: v.half() if v.ndim else v for k, v in table.items()}
    save_file(halves, folder / "optimizer.safetensors")
    rehash(folder, "optimizer.safetensors")
    _fuse(folder)


def _fuse(folder: Path) -> None:
    data = json.loads((folder / "engine.json").read_text())
    for optimizer in data["optimizers"]:
        for group in optimizer["groups"]:
            group["options"] |= {"fused": True, "foreach": False}
    (folder / "engine.json").write_text(json.dumps(data))
    rehash(folder, "engine.json")


def _entries(number: int) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        data = json.loads((folder / "journal.json").read_text())
        last = data["entries"][-1]
        nothing = {"slots": {}, "layers": {}, "attributes": [], "modules": {}, "units": {}}
        nothing |= {"added_ids": [], "removed_ids": [], "before": last["after"]}
        more = range(len(data["entries"]) + 1, number + 1)
        data["entries"] += [{**last, **nothing, "number": n} for n in more]
        (folder / "journal.json").write_text(json.dumps(data))
        rehash(folder, "journal.json")

    return do


def rehash(folder: Path, name: str) -> None:
    """Have the manifest say what the file is now."""
    if name != "manifest.json":
        data = (folder / name).read_bytes()
        _facts(folder, name, len(data), hashlib.sha256(data).hexdigest())


def _facts(folder: Path, name: str, size: int, digest: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": size, "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What lies in a directory, to see that nobody wrote to it."""
    return {
        str(p.relative_to(folder)): (s.st_mtime_ns, s.st_size, s.st_mode)
        for p in sorted(folder.rglob("*"))
        for s in [os.lstat(p)]
    }
