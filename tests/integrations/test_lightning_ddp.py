"""Lightning with DistributedDataParallel: all ranks change alike, and a checkpoint goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch")
ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
from lightning.pytorch import Trainer
from tests.integrations.runs import POLICIES
from tests.integrations.test_lightning_resume import Net, data
from tracker.integrations.lightning import SelfModificationCallback

for epochs, path in ((2, None), (4, sys.argv[1] + "/run.ckpt")):
    callback, module = SelfModificationCallback(POLICIES["shrink"]), Net()
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1], callbacks=[callback],
    )
    trainer.fit(module, data(), ckpt_path=path)
    trainer.save_checkpoint(sys.argv[1] + "/run.ckpt")
    total = sum(float(p.detach().double().sum()) for p in module.parameters())
    changes = [entry.step for entry in callback.engine.journal]
    print(f"<{trainer.global_step} {changes} {module.net[0].out_features} {total!r}>", flush=True)
"""


@pytest.mark.slow
def test_two_processes_change_alike_and_resume(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=200, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    told = re.findall("<([^<>]*)>", run.stdout)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(told) == 4
    resumed, first = sorted(set(told))  # both ranks say the same
    assert resumed.startswith("16 [6, 12]")
    assert first.startswith("8 [6]")
