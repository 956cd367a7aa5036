"""What every demo needs: the repository on sys.path, the folders for results, how much data.

TRACKER_DEMO_SAMPLES=500 makes each demo use at most so many samples; TRACKER_OUTPUTS=folder has the
results written elsewhere.
"""

import os
import sys
from pathlib import Path

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
