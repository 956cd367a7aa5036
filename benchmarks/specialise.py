"""Is it worth something to shrink while the text is learnt? Beside other ways to the same size, with the same tokens.

    python benchmarks/specialise.py --keep 0.6 --tokens 20000     # hours on two cores; where it was stopped, it goes on
    python benchmarks/specialise.py --only dense,once             # some of them
    python benchmarks/specialise.py --only "" --write             # docs/slm.md, of what was measured so far

All train on the same windows in the same order, with the same optimizer and learning rates, and are judged on the same
windows of files that none trains on (those of one_shot.py). What is changed once is changed before the first step, by
the first 16 windows. demos/specialise_demo.py is the first of them, by turns the second; where outputs/ has a run of it
with the same settings, that is taken.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos"), str(ROOT / "benchmarks")]

import torch
import transformers
from _common import OUTPUTS
from _one_shot_cases import PARTS, Case
from _one_shot_methods import theirs
from _run_export import peak_memory
from _smollm import loss_of as loss
from _smollm import perplexity
from specialise_demo import (
    CALIBRATION,
    Settings,
    Start,
    begin,
    by_turns,
    next_token_loss,
    shrinking,
    table,
    train,
)
from torch import Tensor, nn

from tracker import NeuronEngine, Policy
from tracker.surgery.prices.removal_problem import Limits, chosen_units, problems_of
from tracker.utils.files import write_whole

PAGE = ROOT / "docs" / "slm.md"
RESULTS = ROOT / "benchmarks" / "results" / "slm"
MEASURED = ("settings.json", "dense.json", "result.json", "speed.json")
IDLE = Policy(warm_up=10**9)
Row = dict[str, Any]


def batches(engine: NeuronEngine, settings: Settings) -> list[dict[str, Tensor]]:
    _, tokenizer = settings.load()
    return [{"input_ids": x, "labels": x} for x in settings.windows(tokenizer)[:CALIBRATION]]


def turns(engine: NeuronEngine, settings: Settings) -> None:
    """As the demo does it with `--turns 3`."""
    engine.start_self_modification(by_turns(engine, settings))


def dense(engine: NeuronEngine, settings: Settings) -> None:
    """Nothing goes."""


def even(engine: NeuronEngine, settings: Settings) -> None:
    """All goes at once, the same share of each layer."""
    goal = settings.keep * engine.count_parameters()
    engine.calibrate(batches(engine, settings), loss=next_token_loss)
    groups, problems, _ = problems_of(engine.tracker, Limits())
    able = {g.name for g in shrinking(engine)}
    price = {g.name: unit_parameters(engine, g) for g in groups if g.name in able}
    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        counts = {
            i: min(round(share * g.size), g.size - 1)
            for i, g in enumerate(groups)
            if g.name in able
        }
        gone = sum(n * price[groups[i].name] for i, n in counts.items())
        left = engine.count_parameters() - gone
        low, high = (share, high) if left > goal else (low, share)
    units = {
        groups[i].name: chosen_units(problems, i, groups[i], n) for i, n in counts.items() if n
    }
    engine.prune_units(units, compensate=True)


def unit_parameters(engine: NeuronEngine, group: Any) -> int:
    """Numbers that go with one unit, of a model in which no two groups share any."""
    told = engine.prune_units({group.name: [0]}, dry_run=True, verify=False)
    return int(told.parameters_before - told.parameters_after)


def taylor(engine: NeuronEngine, settings: Settings) -> None:
    """All goes at once, the same share of every MLP, the neurons that Torch-Pruning's Taylor chooses."""
    model, _ = settings.load()
    whole = dict(model.named_modules())
    part, size = PARTS["smollm"][0], sum(p.numel() for p in model.parameters())
    mlps = sum(p.numel() for n, m in whole.items() if n.endswith(".mlp") for p in m.parameters())
    weights = {n: whole[n].weight.detach().clone() for n in part.layers(model)}
    windows = [b["input_ids"] for b in batches(engine, settings)]
    case = Case(
        model, [(x, x) for x in windows], loss, lambda m: 0.0, "", windows[0], windows[0][:, :16]
    )
    theirs(model, case, part, (1 - settings.keep) * size / mlps, taylor=True)
    units = {}
    for group in engine.structure.groups:
        for name in weights.keys() & set(group.layers):
            left = {tuple(row.tolist()) for row in model.get_submodule(name).weight[:, :8]}
            rows = enumerate(weights[name][:, :8])
            units[group.name] = [i for i, row in rows if tuple(row.tolist()) not in left]
    engine.prune_units(units, compensate=False)


def blocks(engine: NeuronEngine, settings: Settings) -> None:
    """Whole blocks go: those that turn the stream least (ShortGPT: Men et al., 2024); what is left is refitted."""
    model = engine.tracker.current.model()
    layers = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("DecoderLayer")]
    turned = dict.fromkeys([n for n, _ in layers], 0.0)

    def hook(name: str) -> Any:
        def seen(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = output if isinstance(output, Tensor) else output[0]
            turned[name] += float(1 - nn.functional.cosine_similarity(x, y, dim=-1).mean())

        return seen

    some = [{"input_ids": b["input_ids"]} for b in batches(engine, settings)]
    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in layers]
    with torch.no_grad():
        for batch in some:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    goal = settings.keep * engine.count_parameters()
    for name in sorted(turned, key=lambda n: turned[n]):
        if engine.count_parameters() <= goal:
            break
        engine.remove_layer(name, batches=some[: CALIBRATION // 4], force=True)


def scratch(engine: NeuronEngine, settings: Settings) -> None:
    """The shape that the specialised model ends with, its weights drawn anew."""
    widths = result("specialised", settings)["widths"]
    now = {n: len(layer.ids) for n, layer in engine.tracker.current.layers.items()}
    going = {}
    for group in shrinking(engine):
        layer = next(n for n in group.layers if n in widths)
        left = group.size * widths[layer] // now[layer]
        if left < group.size:
            going[group.name] = range(group.size - left)
    engine.prune_units(going, compensate=False)
    torch.manual_seed(settings.seed)
    for parameter in engine.tracker.current.model().parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)


WAYS: dict[str, tuple[str, Start]] = {
    "specialised": ("compressed once, then fine-tuned", begin),
    "turns": ("by turns, in the first quarter", turns),
    "dense": ("dense, fine-tuned", dense),
    "even": ("even shares once, then fine-tuned", even),
    "taylor": ("Torch-Pruning's Taylor once, then fine-tuned", taylor),
    "blocks": ("blocks removed, then fine-tuned", blocks),
    "scratch": ("its final shape, trained from scratch", scratch),
}
OLD = {
    "slow": "by turns, in the first two thirds"
}  # as the demo did it before it was seen to be worse


def folder_of(name: str, settings: Settings) -> Path:
    """Where a way's results are; of the demo itself where its settings are these."""
    kept = f"{100 * settings.keep:.0f}"
    demo = OUTPUTS / "slm" / kept
    known = demo / "settings.json"
    if (
        name == "specialised"
        and known.exists()
        and json.loads(known.read_text()) == asdict(settings)
    ):
        return demo
    return OUTPUTS / "slm" / f"{kept}-{settings.steps}x{settings.window}-{name}"


def result(name: str, settings: Settings) -> Row:
    """What was measured of one way, now or before."""
    folder = folder_of(name, settings)
    path = folder / "result.json"
    if path.exists():
        return dict(json.loads(path.read_text("utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    cut: dict[str, float] = {}

    def start(engine: NeuronEngine, settings: Settings) -> None:
        WAYS[name][1](engine, settings)
        if engine.trainer.run is None:
            engine.start_self_modification(IDLE)
        tokenizer = settings.load()[1]
        model = engine.tracker.current.model().eval()
        cut["perplexity before tuning"] = perplexity(model, settings.held_out(tokenizer))
        write_whole(folder / "before.json", json.dumps(cut).encode())

    begun = time.perf_counter()
    model, tokenizer, engine = train(settings, folder, 10, start)
    row = json.loads((folder / "before.json").read_text()) | {
        "name": name,
        "settings": asdict(settings),
        "perplexity": perplexity(model, settings.held_out(tokenizer)),
        "parameters": engine.count_parameters(),
        "widths": engine.life[-1].widths,
        "training": {"seconds": time.perf_counter() - begun, **peak_memory()},
    }
    write_whole(path, json.dumps(row, indent=1).encode())
    return dict(row)


def keep() -> None:
    """Put what was measured beside the code: other machines go on from there."""
    for path in (OUTPUTS / "slm").glob("*/result.json"):
        folder = RESULTS / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for name in MEASURED:
            if (path.parent / name).exists():
                shutil.copy(path.parent / name, folder / name)


def page() -> str:
    """docs/slm.md, of all that was measured."""
    found = sorted(RESULTS.glob("*/result.json"))
    runs = {p.parent: read(p) for p in found}
    demos = {f: r for f, r in runs.items() if (f / "speed.json").exists()}
    parts = [INTRODUCTION.format(machine=machine()).strip()]
    for folder, row in sorted(demos.items(), key=lambda pair: -pair[1]["parameters"]):
        rows = [read(folder / "dense.json"), row]
        parts += [f"## {title(settings_of(folder))}", table(rows, read(folder / "speed.json"))]
        parts.append(faster(rows, read(folder / "speed.json")))
        parts.append(cost(settings_of(folder), row))
    controls = [r for f, r in runs.items() if f not in demos]
    if controls:
        parts += ["## Controls", CONTROLS, control_table(controls, demos)]
    parts.append(f"## Not measured yet\n\n{missing([*map(settings_of, demos)], controls)}")
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# A small language model, made smaller for a text

Written by `python benchmarks/specialise.py --write` from what its runs and those of `demos/specialise_demo.py`
measured (`benchmarks/results/slm/`): {machine}.

SmolLM2-135M-Instruct, as published, and the source of Python's standard library. *Perplexity* is per token, on eight
windows of 512 tokens of files that were not trained on, the same as in [one_shot.md](one_shot.md). Each exported model
is run by a process of its own that cannot import this library, one thread, one text: *prompt* is the reading of 256
tokens, *generation* the writing of 32 after them, both per second of the process's own time, the two models in turns,
the median of three; *memory* is the most that the process held. By transformers the weights are float32. The machine is
shared, so compare speeds within one table only.
"""


CONTROLS = """Other ways to the same size, with the same windows in the same order and the same learning rate.
`benchmarks/specialise.py` says how each is done. Minutes are those of a machine that other work shared; where a run was
stopped, of its last part."""


def machine() -> str:
    return (
        f"{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores ({platform.machine()})"
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def settings_of(folder: Path) -> Settings:
    return Settings(**read(folder / "settings.json"))


def title(s: Settings) -> str:
    return f"{s.keep:.0%} of the {s.of}, {s.steps * s.window:,} tokens"


def faster(rows: list[Row], speeds: dict[str, Any]) -> str:
    """How much faster it is, beside how much smaller."""
    ideal = rows[0]["parameters"] / rows[1]["parameters"]
    told = []
    for by, measured in speeds.items():
        gains = {what: measured[what][1] / measured[what][0] for what in ("prompt", "generation")}
        each = [f"{what} {gain:.2f} ({gain / ideal:.2f})" for what, gain in gains.items()]
        told.append(f"{by}: {', '.join(each)}")
    return f"{ideal:.2f} times smaller. Times as fast, and in brackets the part of {ideal:.2f}: {'; '.join(told)}."


def cost(s: Settings, row: Row) -> str:
    """What training took."""
    spent = row["training"]
    memory = f"{spent['memory']:,.0f} MB" if "memory" in spent else "unknown"
    return (
        f"{s.steps} steps of {s.window} tokens, highest learning rate {s.rate:g}, what learns: {s.train}. Training "
        f"took {spent['seconds'] / 60:.0f} minutes with all changes, or its last part where it was stopped, "
        f"and at most {memory} of memory."
    )


def control_table(controls: list[Row], demos: dict[Path, Row]) -> str:
    lines = [
        "| share | tokens | way | parameters | perplexity before tuning | after | minutes |",
        "|---" * 7 + "|",
    ]
    rows = [(Settings(**r["settings"]), r) for r in controls]
    for folder, row in demos.items():
        s = settings_of(folder)
        others = [r["name"] for other, r in rows if s == other]
        if others and row["name"] not in others:
            rows.append((s, row))
    for s, r in sorted(
        rows, key=lambda pair: (-pair[0].keep, pair[0].tokens, pair[1]["perplexity"])
    ):
        way = OLD.get(r["name"]) or WAYS[r["name"]][0]
        before = r.get("perplexity before tuning")
        first, minutes = "" if before is None else f"{before:.3f}", r["training"]["seconds"] / 60
        lines.append(
            f"| {s.keep:.0%} | {s.steps * s.window:,} | {way} | {r['parameters']:,} | "
            f"{first} | {r['perplexity']:.3f} | {minutes:.0f} |"
        )
    return "\n".join(lines)


def missing(demos: list[Settings], controls: list[Row]) -> str:
    told = {r["name"] for r in controls}
    left = [words for name, (words, _) in WAYS.items() if name not in told | {"specialised"}]
    shares = [f"{share:.0%}" for share in (0.8, 0.6, 0.5) if share not in {s.keep for s in demos}]
    lines = [f"- Controls: {'; '.join(left)}."] if left else []
    lines += [f"- Shares: {', '.join(shares)}."] if shares else []
    return "\n".join(
        [
            *lines,
            "- More than one seed, distillation, widths rounded to what kernels like.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(WAYS), help="names, separated by commas")
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--keep", type=float, default=Settings.keep)
    parser.add_argument("--tokens", type=int, default=Settings.tokens)
    parser.add_argument("--window", type=int, default=Settings.window)
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--write", action="store_true", help="write docs/slm.md")
    options = vars(parser.parse_args())
    names, write = [n for n in options.pop("only").split(",") if n], options.pop("write")
    for name in names:
        row = result(name, Settings(**options))
        print(
            f"{name}: {row['parameters']:,} parameters, perplexity {row['perplexity']:.3f}",
            flush=True,
        )
    if write:
        keep()
        write_whole(PAGE, page().encode())


if __name__ == "__main__":
    main()
