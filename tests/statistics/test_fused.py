"""Triton's code for GPUs, without one: it computes the right numbers by interpretation, and compiles for real GPUs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tracker.statistics.native import SWITCH, loading

pytest.importorskip("triton", reason="no Triton here")
HERE = Path(__file__).parent


def test_by_interpretation_every_statistic_is_right() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(HERE / "interpreted.py"),
        ],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_it_compiles_for_gpus(
    generation: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, for Ampere and Hopper; only running it needs one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tracker.statistics.native import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", generation, 32)
    whole = ("observations", "neurons", "inner", "by_outer", "by_neuron", "by_inner", "length")
    reduce = {"x": f"*{kind}", "parts": "*fp64", **dict.fromkeys(whole, "i32"), "threshold": "fp32"}
    merge = {"parts": "*fp64", "table": "*fp64", "programs": "i32", "neurons": "i32"}
    for function, types, sizes in (
        (fused._reduce, reduce, {"wide": 64, "tall": 64}),
        (fused._reduce, reduce, {"wide": 1, "tall": 4096}),
        (fused._merge, merge, {"wide": 128}),
    ):
        signature = {**types, **dict.fromkeys(sizes, "constexpr")}
        done = triton.compile(ASTSource(function, signature, sizes), target=target)
        assert done.asm["cubin"]


def test_without_it_torch_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tracker")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        patch.delitem(sys.modules, "tracker.statistics.native.fused", raising=False)
        assert loading.load_for(torch.device("cpu")) is None
    assert "by torch, without compiled code" in caplog.text
    monkeypatch.setenv(SWITCH, "0")
    assert loading.load_for(torch.device("cpu")) is None
    assert f"{SWITCH} turns compiled code off" in caplog.text
    x = torch.randn(4, 3, 1)
    assert loading.on_gpu(x, torch.zeros(9, 3).double()) is None
