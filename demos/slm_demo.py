"""A small language model that grows while it learns, beside a fixed one of its final size: same compute, same data.

    python demos/slm_demo.py                        # some minutes on one core
    python demos/slm_demo.py --seeds 3 --write      # and its table in docs/self_modification.md

A GPT of bytes learns the source of Python's standard library. The self-modified one begins with an eighth of the MLP
neurons and grows where it pays, up to the fixed one's parameters. Both spend the same training FLOPs, by the same
schedule of the learning rate over FLOPs, on the same batches in the same order: where the model is small, its steps are
cheap, and it sees more. Prints both losses on held-out files and a sample of text; leaves the curves, the picture of
the network's life, an HTML page and a checkpoint in outputs/.
"""

import argparse
import datetime
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _bytes import GPT, WINDOW, Source, loss_of, perplexity
from _common import CHECKPOINTS, REPORTS, ROOT, VISUALIZATIONS, quick, section, table_by_seed, wrote
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tracker import NeuronEngine, Policy

START = 64  # neurons in the MLP of each block, of 512
PEAK = 3e-3  # learning rate
POINTS = 20  # of each curve


@dataclass
class Result:
    """What came of one training. curve: (FLOPs, loss on held-out files)."""

    name: str
    seed: int
    loss: float
    parameters: int
    flops: float
    steps: int
    curve: list[tuple[float, float]] = field(default_factory=list)


def policy_for(steps: int, parameters: int) -> Policy:
    """Growth by half every fortieth of the way, until the model is as large as the fixed one."""
    every = max(steps // 40, 8)
    return Policy(
        warm_up=2 * every, every=every, look=every // 4, settle=every // 2,
        shrink=False, grow=True, plateau=1.0, max_parameters=parameters,
        gradients=False,
    )  # fmt: skip


def step_flops(model: nn.Module, batch) -> int:
    """Of one training step: the backward pass costs twice the forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss_of(model, *batch)
    return 3 * counter.get_total_flops()


def held_out(batches: int) -> int:
    """How many batches to look at, or fewer where TRACKER_DEMO_SAMPLES says so."""
    return max(1, quick(100 * batches) // 100)


def rate(done: float) -> float:
    """Share of the peak learning rate once the share `done` of the budget is spent."""
    return done / 0.1 if done < 0.1 else 0.02 + 0.49 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))


def train(
    name: str, hidden: int | None, policy: Policy | None, budget: float, seed: int, source: Source
):
    """Train until `budget` FLOPs are spent; return model, engine and what came of it."""
    torch.manual_seed(seed)
    model = GPT(hidden=hidden)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    spent, steps, each = 0.0, 0, 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: rate(min(spent / budget, 1.0))
    )
    engine = NeuronEngine()
    first = next(source.batches(seed, 1))
    engine.track_model(model, "GPT of bytes", example_inputs=first[0][:2])
    engine.attach_optimizer(optimizer)
    if policy is not None:
        engine.start_self_modification(policy)
    curve: list[tuple[float, float]] = []
    points = POINTS if policy is None or policy.every > 10 else 4
    with tqdm(total=100, desc=f"{name}, seed {seed}", unit="%", leave=False, disable=None) as bar:
        for batch in source.batches(seed, 10**9):
            each = each or step_flops(model, batch)
            loss = loss_of(model, *batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            spent, steps = spent + each, steps + 1
            schedule.step()
            if policy is not None and engine.step(loss) is not None:
                each = 0
            bar.update(min(100, int(100 * spent / budget)) - bar.n)
            if spent >= budget * (len(curve) + 1) / points or spent >= budget:
                curve.append((spent, math.log(perplexity(model, source, held_out(8)))))
            if spent >= budget:
                break
    parameters = sum(p.numel() for p in model.parameters())
    final = math.log(perplexity(model, source, held_out(40)))
    return model, engine, Result(name, seed, final, parameters, spent, steps, curve)


@torch.no_grad()
def sample(model: nn.Module, prompt: str = "def main(", length: int = 200, seed: int = 0) -> str:
    """Text that the model goes on with, at temperature 0.8."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([list(prompt.encode())])
    model.eval()
    for _ in range(length):
        logits = model(text[:, -WINDOW:])[0, -1] / 0.8
        following = torch.multinomial(logits.softmax(0), 1, generator=generator)
        text = torch.cat((text, following[None]), 1)
    return bytes(text[0].tolist()).decode("utf-8", "replace")


def picture(results: list[Result], path: Path) -> Path:
    """Loss on held-out files over what was spent, a line for each training."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = list(dict.fromkeys(r.name for r in results))
    for r in results:
        label = r.name if r.seed == results[0].seed else None
        ax.plot(*zip(*r.curve, strict=True), color=f"C{names.index(r.name)}", label=label)
    ax.set_xlabel("training FLOPs")
    ax.set_ylabel("loss on held-out files, nats per byte")
    low = min(r.loss for r in results)
    ax.set_ylim(low - 0.05, low + 1.0)
    ax.grid(alpha=0.25)
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def table(results: list[Result]) -> str:
    """As Markdown."""
    return table_by_seed(
        ("model", "seed", "held-out loss", "parameters", "training FLOPs", "steps"),
        results,
        lambda r: (r.loss, r.parameters, r.flops, r.steps),
        lambda loss, parameters, flops, steps: (
            f"{loss:.4f}",
            f"{parameters:,.0f}",
            f"{flops:.3g}",
            f"{steps:,.0f}",
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000, help="of the fixed model")
    parser.add_argument("--write", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    steps = min(options.steps, quick(10_000_000) // 20)
    source = Source()
    fixed = GPT()
    parameters = sum(p.numel() for p in fixed.parameters())
    budget = steps * step_flops(fixed, next(source.batches(0, 1)))
    print(
        f"{len(source.train):,} bytes to train, {len(source.test):,} held out; {budget:.3g} FLOPs for each"
    )
    results = []
    for seed in range(options.seeds):
        *_, result = train("fixed", None, None, budget, seed, source)
        results.append(result)
        policy = policy_for(steps, parameters)
        model, engine, result = train("self-modified", START, policy, budget, seed, source)
        results.append(result)
        if seed == 0:
            show(model, engine)
    wrote(picture(results, VISUALIZATIONS / "slm_curves.png"))
    print(f"\n{table(results)}")
    if options.write:
        measured = (
            f"{datetime.date.today()}, torch {torch.__version__}, {options.seeds} seeds, "
            f"{steps:,} steps of the fixed model."
        )
        section(
            ROOT / "docs" / "self_modification.md",
            "A small language model",
            f"{measured}\n\n{table(results)}",
        )


def show(model: nn.Module, engine: NeuronEngine) -> None:
    """What was decided and why, a sample of text, and the files that are left."""
    for d in engine.life:
        if d.what != "kept":
            print(f"step {d.step:>5}  {d.what:<8} {d.why}; {d.parameters:,} parameters")
    print(f"\nIt writes:\n{sample(model)}\n")
    engine.plot_life(VISUALIZATIONS / "slm_life.png")
    page = engine.save_html_report(REPORTS / "slm_life.html")
    wrote(VISUALIZATIONS / "slm_life.png", page, engine.save_checkpoint(CHECKPOINTS / "slm"))


if __name__ == "__main__":
    main()
