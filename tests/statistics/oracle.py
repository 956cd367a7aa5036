"""Independent two-pass statistics in float64 over stored values: what streaming must agree with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def columns(x: Tensor, axis: int) -> list[np.ndarray]:
    """The finite observations of each neuron."""
    rows = x.detach().double().movedim(axis, 0).reshape(x.shape[axis], -1).numpy()
    return [row[np.isfinite(row)] for row in rows]


def activity(x: Tensor, axis: int = -1, threshold: float = 0.01) -> dict[str, np.ndarray]:
    """Each statistic of each neuron: (neurons,)."""
    seen = columns(x, axis)
    return {
        "observations": np.array([len(c) for c in seen]),
        "mean": np.array([c.mean() for c in seen]),
        "variance": np.array([((c - c.mean()) ** 2).mean() for c in seen]),
        "minimum": np.array([c.min() for c in seen]),
        "maximum": np.array([c.max() for c in seen]),
        "firing_frequency": np.array([(np.abs(c) > threshold).mean() for c in seen]),
        "zero_fraction": np.array([(c == 0).mean() for c in seen]),
        "nonfinite": x.numel() // x.shape[axis] - np.array([len(c) for c in seen]),
    }


def correlation(rows: Tensor) -> np.ndarray:
    """rows (observations, neurons) → Pearson correlations, two passes in float64."""
    return np.corrcoef(rows.double().numpy(), rowvar=False)


def streams(seed: int = 0) -> dict[str, list[Tensor]]:
    """Streams that break careless formulas, as batches (observations, neurons)."""
    g = torch.Generator().manual_seed(seed)

    def normal(n: int, d: int = 24) -> Tensor:
        return torch.randn(n, d, generator=g)

    return {
        "standard normal": [normal(64) for _ in range(40)],
        "mean 1e4, std 1e-2": [normal(64) * 1e-2 + 1e4 for _ in range(40)],
        "drift to 1e3": [normal(64) + 25.0 * i for i in range(40)],
        "jump after the first batch": [normal(64)] + [normal(64) + 1e3 for _ in range(39)],
        "jump within a batch": [torch.cat((normal(500), normal(12) + 1e4)) for _ in range(5)],
        "first row an outlier": [torch.cat((normal(1) + 1e5, normal(511)))],
        "bfloat16": [(normal(64) + 3).bfloat16() for _ in range(40)],
        "float16": [(normal(64) * 3).half() for _ in range(40)],
        "float64": [normal(64).double() * 1e-9 + 1 for _ in range(10)],
        "heavy tails": [normal(64) ** 5 for _ in range(40)],
        "batches of one": [normal(1) for _ in range(300)],
        "with an empty batch": [normal(64), torch.empty(0, 24), normal(64)],
        "relu": [normal(64).relu() for _ in range(40)],
        "tiny": [normal(64) * 1e-20 for _ in range(10)],
        "huge": [normal(64) * 1e25 for _ in range(10)],
    }
