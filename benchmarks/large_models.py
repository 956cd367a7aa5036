"""What large models cost: graph and removal beside Torch-Pruning, and a compression of a billion parameters.

    python benchmarks/large_models.py                 # four models; then 1.1 billion parameters: 14 GB, half an hour
    python benchmarks/large_models.py --layers 4      # a part of the large model
    python benchmarks/large_models.py --write         # and docs/large_models.md

Needs the extra .[zoo]. Peak memory is what the process held at most (Linux), over what it held before the call.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))  # what is freed is given back
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])

import torch
from coverage import alone
from tqdm import tqdm

from tracker import NeuronEngine

PAGE = ROOT / "docs" / "large_models.md"
FOUR = (
    ("classification", "resnet50"),
    ("classification", "vit_b_16"),
    ("depth", "llama_32"),
    ("classification", "swin_t"),
)
SECONDS = 240  # of one thread, for each of the four and each library
TOKENS, LENGTH = 6144, 256  # that calibrate sees, in sequences of this length
KEEP = 0.8
Row = list[str]


def status(key: str) -> int:
    """Bytes, of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(key + ":")[1].split()[0]) * 1024


def four() -> list[Row]:
    """Each library in a process of its own, one thread, one after the other."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for family, name in tqdm(FOUR, "models beside Torch-Pruning", disable=None):
        own = alone(context, "own", family, name, SECONDS, 10)
        rival = alone(context, "rival", family, name, SECONDS, 10).get("rival", {})
        bare, theirs = own.get("bare_seconds"), rival.get("seconds")
        both = "-" if bare is None or theirs is None else f"{bare / theirs:.2f}"
        checked = [own.get("trace_seconds"), own.get("prune_seconds")]
        seconds = [bare, theirs, *checked]
        cells = ["-" if s is None else f"{s:.2f}" for s in seconds]
        rows.append([name, *cells[:2], both, *cells[2:], own["status"], rival.get("status", "-")])
        tqdm.write(" ".join(rows[-1]))
    return rows


def model_of(layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def compressed(layers: int) -> tuple[list[Row], list[str]]:
    """Trace, calibrate, compress: seconds, and memory over the model's own."""
    model = model_of(layers)
    size = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    engine, rows = NeuronEngine(), []
    example = {"input_ids": torch.randint(0, 32000, (1, 16))}
    engine.track_model(model, "large", example_inputs=example)
    base = status("VmRSS")

    def staged(name: str, do: Callable[[], Any]) -> Any:
        start, before = time.perf_counter(), status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        found = do()
        peak, now = status("VmHWM"), status("VmRSS")
        seconds = time.perf_counter() - start
        figures = [(peak - before) / weights, (peak - base) / weights, (now - base) / weights]
        rows.append([name, f"{seconds:.0f}", *(f"{f:.2f}" for f in figures), f"{peak / 2**30:.1f}"])
        tqdm.write(" ".join(rows[-1]))
        return found

    def batches() -> Any:
        generator = torch.Generator().manual_seed(1)
        for _ in tqdm(range(TOKENS // LENGTH), "calibration", disable=None, leave=False):
            yield {"input_ids": torch.randint(0, 32000, (1, LENGTH), generator=generator)}

    staged("trace, with trials", lambda: engine.structure)
    staged("calibrate", lambda: engine.calibrate(batches()))
    receipt = staged(f"compress, keep={KEEP}", lambda: engine.compress(KEEP))
    facts = [
        f"{size:,} parameters in float32 ({weights / 2**30:.1f} GB), {layers} layers, random weights;",
        f"{receipt.parameters_before:,} → {receipt.parameters_after:,} parameters,",
        f"{receipt.flops_before:,} → {receipt.flops_after:,} FLOPs. Calibrated on {TOKENS:,} random tokens.",
    ]
    return rows, facts


def table(head: str, rows: list[Row]) -> list[str]:
    columns = head.count("|") - 1
    return [head, "|---" * columns + "|", *("| " + " | ".join(r) + " |" for r in rows)]


def page(four_rows: list[Row], large: list[Row], facts: list[str]) -> str:
    lines = [
        "# Large models",
        "",
        f"Written by `python benchmarks/large_models.py --write` on {datetime.date.today().isoformat()}: "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__},",
        f"Python {platform.python_version()}. The machine is shared; seconds are not steady.",
    ]
    if four_rows:
        lines += [
            "",
            "## Graph and removal",
            "",
            "CPU seconds of one thread in float64, 30% of every group. *graph and cut*: what Torch-Pruning's seconds",
            "are, and no more; *trace* and *prune*: with trials, verification, and a second call for groups that are",
            "not exact.",
            "",
            *table(
                "| model | graph and cut | Torch-Pruning | ratio | trace | prune | result | Torch-Pruning's |",
                four_rows,
            ),
        ]
    if large:
        lines += [
            "",
            "## A billion parameters",
            "",
            *facts,
            "",
            "Memory in multiples of the model's weights: of the call alone, over the model, and what stays. A",
            "covariance takes (columns)² numbers of 8 bytes; consumers that read the same share one.",
            "",
            *table(
                "| call | s | peak of the call | peak over the model | stays | process, GB |", large
            ),
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=22, help="of the large model")
    parser.add_argument("--no-four", dest="four", action="store_false")
    parser.add_argument("--no-large", dest="large", action="store_false")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    rows = four() if options.four else []
    large, facts = compressed(options.layers) if options.large else ([], [])
    text = page(rows, large, facts)
    print(text)
    if options.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
