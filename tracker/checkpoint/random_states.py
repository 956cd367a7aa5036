"""States of the random generators of Python, NumPy and torch, as numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracker.errors import CheckpointError


def gather_noise() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states now: tensors and plain data."""
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = state
    noise = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        noise |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    facts = {
        "python": [version, list(words), gauss],
        "numpy": [kind, int(position), int(has_gauss), float(cached)],
    }
    return noise, facts


def rng_restorer(tables: Mapping[str, Tensor], facts: Any) -> Callable[[], None]:
    """Check such states; what is returned sets them.

    Raises:
        CheckpointError: They are none.
    """
    try:
        noise = {k: v.clone() for k, v in tables.items()}
        version, words, gauss = facts["python"]
        python = (int(version), tuple(int(w) for w in words), gauss)
        if gauss is not None and not isinstance(gauss, float):
            raise TypeError(f"{gauss!r} is no number")
        random.Random().setstate(python)
        kind, position, has_gauss, cached = facts["numpy"]
        keys = noise["numpy"].numpy().astype(np.uint32)
        numpy = (kind, keys, int(position), int(has_gauss), float(cached))
        np.random.RandomState(0).set_state(numpy)
        torch.Generator().set_state(noise["torch"])
        cuda = [v for k, v in noise.items() if k.startswith("cuda.")]
        if any(v.dtype != torch.uint8 or v.ndim != 1 for v in cuda):
            raise TypeError("the states of the devices are no bytes")
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"The random states cannot be read: {error}") from error

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(noise["torch"])
        if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)

    return restore


def rng_snapshot() -> Callable[[], None]:
    """What sets the generators back to where they are now."""
    return rng_restorer(*gather_noise())
