"""Every benchmark, one after the other, each in a process of its own; their pages in docs/ are written anew.

python benchmarks/all.py                # hours; needs the extra .[zoo], and gromo for its row
python benchmarks/all.py --list         # what there is, and what it writes
python benchmarks/all.py --only growth,recycling
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
# Name → script with its options, and the page that it writes.
BENCHMARKS: dict[str, tuple[list[str], str]] = {
    "tracking": (["benchmarks/tracking_overhead.py", "--write"], "docs/performance.md"),
    "growth": (["benchmarks/growth.py", "--write"], "docs/growth.md"),
    "recycling": (["benchmarks/recycling.py", "--write"], "docs/recycling.md"),
    "one_shot": (["benchmarks/one_shot.py", "--write"], "docs/one_shot.md"),
    "shrinking": (
        ["demos/self_modification_demo.py", "--seeds", "3", "--write"],
        "docs/self_modification.md",
    ),
    "growing": (
        ["demos/self_modification_demo.py", "--grow", "--seeds", "3", "--write"],
        "docs/self_modification.md",
    ),
    "language": (["demos/slm_demo.py", "--seeds", "3", "--write"], "docs/self_modification.md"),
    "specialise": (["benchmarks/specialise.py", "--write"], "docs/slm.md"),
    "looks": (["benchmarks/look_cost.py", "--write"], "docs/self_modification.md"),
    "controls": (["benchmarks/controls.py", "--resume", "--write"], "docs/controls.md"),
    "young": (["benchmarks/young.py", "--write"], "docs/self_modification.md"),
    "verdicts": (["benchmarks/verdicts.py", "--write"], "docs/self_modification.md"),
    "coverage": (["benchmarks/coverage.py", "--resume", "--write"], "docs/coverage.md"),
    "large": (["benchmarks/large_models.py", "--write"], "docs/large_models.md"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, separated by commas")
    parser.add_argument("--list", action="store_true", help="what there is")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}: {', '.join(BENCHMARKS)}")
    if options.list:
        for name in names:
            print(f"{name:<10} {' '.join(BENCHMARKS[name][0]):<58} -> {BENCHMARKS[name][1]}")
        return 0
    failed = []
    for name in tqdm(names, "benchmarks", disable=None):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *BENCHMARKS[name][0]], cwd=ROOT, check=False)
        tqdm.write(f"{name}: {time.perf_counter() - start:.0f} s, {BENCHMARKS[name][1]}")
        failed += [name] * (done.returncode != 0)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
