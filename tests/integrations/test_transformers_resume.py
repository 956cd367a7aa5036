"""The Trainer of transformers resumes by the callback alone, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.runs import POLICIES, same

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

from tracker.integrations.transformers import SelfModificationCallback  # noqa: E402


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2, n_inner=12, resid_pdrop=0.1,
        attn_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def trained(policy: Any, folder: Path, resume: Any = None) -> Any:
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 30, (8,), generator=g) for _ in range(40)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    callback, network = SelfModificationCallback(policy), model()
    trainer = transformers.Trainer(
        network,
        transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=4, max_steps=21, save_steps=7, use_cpu=True, report_to=[],
            disable_tqdm=True, logging_strategy="no", learning_rate=1e-2,
        ),
        train_dataset=rows,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return network, callback.engine, trainer.optimizer.optimizer


@pytest.mark.parametrize("name", ["shrink", pytest.param("grow", marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = trained(POLICIES[name], tmp_path)
    assert len(whole[1].journal) > 0
    for step in (7, 14):
        same(whole, trained(POLICIES[name], tmp_path, str(tmp_path / f"checkpoint-{step}")))
