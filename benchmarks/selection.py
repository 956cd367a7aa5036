"""What backward selection costs, beside one float64 Cholesky inversion of the same matrix in the same run.

python benchmarks/selection.py [--large]
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tracker.compensation import backward


def main() -> None:
    widths = [512, 1024, 4096, *([11008] if "--large" in sys.argv[1:] else [])]
    print(
        f"{'n':>6} {'inversion s':>12} {'select s':>9} {'ratio':>6} {'peak MiB':>9} {'n² MiB':>7}"
    )
    for n in widths:
        torch.manual_seed(0)
        x = torch.randn(n + 512, n).relu_()
        c = torch.cov((x + x.roll(1, 1)).T).double()
        c.diagonal().add_(1e-3)
        del x
        w = torch.randn(256, n, dtype=torch.float64)
        start = time.perf_counter()
        torch.cholesky_inverse(torch.linalg.cholesky(c))
        inverted = time.perf_counter()
        backward(c, w, [[j] for j in range(n)], remove=3 * n // 4)
        took, base = time.perf_counter() - inverted, inverted - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{n:6} {base:12.2f} {took:9.2f} {took / base:6.1f} {peak:9.0f} {n * n / 2**17:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
