"""What every demo needs: the repository on sys.path, the folders for results, how much data.

TRACKER_DEMO_SAMPLES=500 makes each demo use at most so many samples; TRACKER_OUTPUTS=folder has the
results written elsewhere.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Demos run from a clone, from any folder, with nothing installed but requirements.txt.
sys.path.insert(0, str(ROOT))

OUTPUTS = Path(os.environ.get("TRACKER_OUTPUTS") or ROOT / "outputs").resolve()
LOGS = OUTPUTS / "logs"
REPORTS = OUTPUTS / "reports"
VISUALIZATIONS = OUTPUTS / "visualizations"
CHECKPOINTS = OUTPUTS / "checkpoints"


def quick(samples: int) -> int:
    """`samples`, or fewer where TRACKER_DEMO_SAMPLES says so."""
    limit = os.environ.get("TRACKER_DEMO_SAMPLES")
    return min(samples, int(limit)) if limit else samples


def wrote(*paths: Path) -> None:
    """Say which files were written, as seen from the current folder."""
    for path in paths:
        print(f"Wrote {os.path.relpath(path)}")


def section(page: Path, title: str, content: str) -> None:
    """Put `content` under the heading `title` of a Markdown page, in place of what is there."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    head, found, rest = text.partition(f"## {title}\n")
    after = rest.find("\n## ")
    tail = rest[after + 1 :] if found and after >= 0 else ""
    parts = [head.rstrip(), f"## {title}\n\n{content.strip()}", tail.strip()]
    page.write_text("\n\n".join(p for p in parts if p) + "\n", encoding="utf-8")


def table_by_seed(
    heads: Sequence[str],
    results: Sequence[Any],
    numbers: Callable[[Any], tuple[float, ...]],
    cells: Callable[..., Sequence[str]],
) -> str:
    """Markdown: for each result its name, seed and `cells(*numbers(result))`; of several seeds their means as well."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(r.name for r in results):
        rows = [(str(r.seed), *numbers(r)) for r in results if r.name == name]
        if len(rows) > 1:
            columns = list(zip(*rows, strict=True))[1:]
            rows.append(("mean", *(sum(column) / len(column) for column in columns)))
        lines += [f"| {name} | {seed} | {' | '.join(cells(*values))} |" for seed, *values in rows]
    return "\n".join(lines)
