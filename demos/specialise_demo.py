"""A pretrained small language model that becomes smaller while it learns your text, and is then shipped.

    python demos/specialise_demo.py                          # SmolLM2-135M, the standard library's source, 60%
    python demos/specialise_demo.py --text notes --keep 0.8 --tokens 100000
    python demos/specialise_demo.py --turns 3                # gives up units while it learns
    python demos/specialise_demo.py --lora                   # less memory: adapters learn, the rest is frozen

It gives up MLP neurons and attention heads, those without which the loss is predicted to rise least, until the budget
is met; the others take over what they can; then it trains. With `--turns 3` they go at three looks within the first
quarter of the training, which was not better (docs/slm.md). Every tenth file is for testing only.
Where it was stopped, it goes on when it is run again (--fresh: from the start). It leaves in its folder: the model for
transformers and for llama.cpp, dense and specialised, each run once; the picture of its life; a checkpoint; what was
measured, in dense.json and result.json. Needs the extra .[smollm].
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _common import OUTPUTS, wrote
from _run_export import in_its_own_process, peak_memory
from _smollm import TOKENS, held_out, load, perplexity, sample, stream
from torch import Tensor, nn
from tqdm import tqdm

from tracker import NeuronEngine, Policy
from tracker.errors import ExportError, VerificationError
from tracker.export import to_gguf, to_hugging_face
from tracker.utils.files import write_whole

LEAST = 12  # steps of a run, and of each of its turns
CALIBRATION = 16  # windows, of those that it trains on


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        model: A directory that transformers wrote; None: SmolLM2-135M.
        text: A folder; None: the standard library's source.
        keep: Share that is left at the end.
        of: Of what: parameters, FLOPs, or milliseconds of a pass.
        tokens: To train on, in windows of `window`, one for each step.
        window: Tokens of one step.
        rate: Highest learning rate.
        train: Which parameters learn: "all", "blocks" (no embedding), "lora" (adapters of rank 16).
        distil: Learn from what the dense model says as well.
        turns: 1: units go before the first step; more: at so many looks while it learns. Milliseconds take several.
        seed: Of the order of files, and of adapters.
    """

    model: str | None = None
    text: str | None = None
    keep: float = 0.6
    of: str = "parameters"
    tokens: int = 20_000
    window: int = TOKENS
    rate: float = 1e-4
    train: str = "all"
    distil: bool = False
    turns: int = 1
    seed: int = 0

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return max(self.tokens // self.window, LEAST)

    def load(self) -> tuple[Any, Any]:
        """The dense model, as it is trained, and its tokenizer."""
        model, tokenizer = load(self.model and Path(self.model))
        if self.train == "blocks":
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.requires_grad_(False)
        if self.train == "lora":
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(self.seed)
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        return model.eval(), tokenizer

    def windows(self, tokenizer: Any) -> list[Tensor]:
        """What each step trains on."""
        folder = self.text and Path(self.text)
        return stream(tokenizer, self.steps, self.seed, folder=folder, length=self.window)

    def held_out(self, tokenizer: Any) -> list[Tensor]:
        """What models are judged on."""
        return held_out(tokenizer, folder=self.text and Path(self.text))


def shrinking(engine: NeuronEngine) -> list[Any]:
    """The groups that may shrink: MLP neurons and heads.

    Widths of heads stay, since llama.cpp rotates whole ones, as do the ranks of adapters and the residual stream.
    """
    groups = [g for g in engine.structure.groups if g.prunable and g.exact]
    return [g for g in groups if g.kind != "head_dim" and "lora_" not in g.name]


def begin(engine: NeuronEngine, settings: Settings) -> None:
    """Units go at once, or will go by turns; from now on the picture of its life is drawn."""
    if settings.turns > 1 or settings.of == "latency":
        engine.start_self_modification(by_turns(engine, settings))
        return
    # It looks at nothing; of the loss the picture has eight points for each `every`.
    quiet = Policy(warm_up=10**9, every=max(settings.steps // 4, 8), look=1, settle=1)
    engine.start_self_modification(quiet)
    compress(engine, settings)


def by_turns(engine: NeuronEngine, settings: Settings) -> Policy:
    """At a few looks in the first quarter of the run, units go until the budget is met, most of them at the first."""
    turns = settings.turns if settings.turns > 1 else 3
    looks = max(min(turns, settings.steps // LEAST), 1)
    every = max(settings.steps // (4 * looks), 1)
    size = {
        "parameters": engine.count_parameters,
        "flops": lambda: (
            engine.prune_units({shrinking(engine)[0].name: [0]}, dry_run=True).flops_before
        ),
        "latency": engine.measure_latency,
    }
    budget = settings.keep * size[settings.of]()
    budget = budget if settings.of == "latency" else int(budget)
    return Policy(
        warm_up=every, every=every, look=min(max(every - 1, 1), CALIBRATION), settle=1, until=looks * every,
        ramp=2.0, floor=1, protect=spared(engine), regret=math.inf,
        **{f"max_{settings.of}": budget, f"min_{settings.of}": budget},
    )  # fmt: skip


def spared(engine: NeuronEngine) -> list[str]:
    """The groups that may not shrink."""
    able = shrinking(engine)
    return [g.name for g in engine.structure.groups if g not in able]


def compress(engine: NeuronEngine, settings: Settings) -> None:
    """To the budget, before the first step, by the first windows of those that it trains on."""
    windows = settings.windows(settings.load()[1])[:CALIBRATION]
    receipt = engine.compress(
        settings.keep,
        settings.of,
        batches=[{"input_ids": x, "labels": x} for x in windows],
        loss=next_token_loss,
        protect=spared(engine),
    )
    tqdm.write(str(receipt))


def next_token_loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean cross-entropy of the next token, in nats."""
    logits = output.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())


Start = Callable[[NeuronEngine, Settings], None]


def rate(done: float) -> float:
    """Share of the highest learning rate after the share `done` of the steps."""
    return min(done / 0.1, 1.0) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))


def begun(settings: Settings, folder: Path, start: Start) -> tuple[Any, ...]:
    """Model, tokenizer, optimizer and engine, where the folder's checkpoint has them, or at the start."""
    model, tokenizer = settings.load()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, settings.rate, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        return (
            model,
            tokenizer,
            optimizer,
            NeuronEngine.load_checkpoint(checkpoint, model, optimizer),
        )
    engine = NeuronEngine()
    example = settings.windows(tokenizer)[0][:, :64]
    engine.track_model(model, "language model", example_inputs={"input_ids": example})
    engine.attach_optimizer(optimizer)
    start(engine, settings)
    return model, tokenizer, optimizer, engine


def train(
    settings: Settings, folder: Path, save_every: int, start: Start = begin
) -> tuple[Any, ...]:
    """Train to the end, saved every so many steps; model, tokenizer and engine.

    Args:
        settings: Of the run.
        folder: Of its checkpoint.
        save_every: Steps.
        start: What is done before the first step; it starts the run of a policy.
    """
    model, tokenizer, optimizer, engine = begun(settings, folder, start)
    windows = settings.windows(tokenizer)
    teacher = load(settings.model and Path(settings.model))[0] if settings.distil else None
    first = engine.trainer.run.steps
    if first == 0:  # what took minutes is not done again
        engine.save_checkpoint(folder / "checkpoint")
    model.train()
    with tqdm(
        total=settings.steps, initial=first, desc="Training", unit="step", disable=None
    ) as bar:
        for step in range(first, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * rate((step + 1) / settings.steps)
            loss, aim = losses(model, windows[step], teacher)
            aim.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()  # before anything else is held
            if engine.step(loss) is not None:
                d = engine.life[-1]
                bar.write(f"step {d.step:>5}  {d.what:<7} {d.why}; {d.parameters:,} parameters")
            bar.set_postfix(
                loss=f"{loss:.3f}", parameters=f"{engine.count_parameters():,}", refresh=False
            )
            bar.update()
            if (step + 1) % save_every == 0 or step + 1 == settings.steps:
                engine.save_checkpoint(folder / "checkpoint")
    return model.eval(), tokenizer, engine


def losses(model: nn.Module, x: Tensor, teacher: nn.Module | None) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of the next token, and the aim: that or, with a teacher, half what he says."""
    logits = model(input_ids=x, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    if teacher is None:
        return loss.detach(), loss
    with torch.no_grad():
        said = teacher(input_ids=x, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    mine = logits.flatten(0, 1).log_softmax(-1)
    distance = nn.functional.kl_div(mine, said, reduction="batchmean", log_target=True)
    return loss.detach(), (loss + distance) / 2


def shipped(model: Any, tokenizer: Any, folder: Path, name: str, example: Tensor) -> dict[str, Any]:
    """Write the model for transformers and for llama.cpp, and run what was written, each in a process of its own."""
    engine = NeuronEngine()
    engine.track_model(model, name, example_inputs={"input_ids": example})
    made = {"transformers": to_hugging_face(engine, folder / name, tokenizer)}
    for dtype in ("f16", "q8_0") if find_spec("gguf") else ():
        path = folder / f"{name}-{dtype}.gguf"
        try:
            made[f"llama.cpp, {dtype}"] = to_gguf(engine, path, tokenizer, dtype)
        except (ExportError, VerificationError) as error:
            print(f"No {path.name}: {error}")
    found: dict[str, Any] = {}
    for by, report in made.items():
        print(report)
        found[by] = {"file": report.path.name, "bytes": report.bytes}
        if by == "transformers" or find_spec("llama_cpp"):
            found[by]["memory"] = max(in_its_own_process(report.path, times=1)["memory"], default=0)
    return found


def in_turns(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Speeds of the models of the rows, by what runs them: {by: {"prompt": [...], "generation": [...]}}."""
    able = [by for by, run in rows[-1]["runs"].items() if "memory" in run]
    able = [by for by in able if all(by in row["runs"] for row in rows)]
    return {by: in_its_own_process(*(folder / r["runs"][by]["file"] for r in rows)) for by in able}


def judged(
    model: Any, tokenizer: Any, windows: list[Tensor], folder: Path, name: str
) -> dict[str, Any]:
    """What there is to know of a model; it is shipped as well."""
    print(
        f"The {name} model: perplexity on {len(windows)} windows of {windows[0].shape[1]} tokens, and exports"
    )
    found = {"name": name, "perplexity": perplexity(model, windows)}
    found["text"] = sample(model, tokenizer, windows[0][:, :32])
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    found["parameters"] = sum(p.numel() for p in plain.parameters())
    found["runs"] = shipped(plain, tokenizer, folder, name, windows[0][:, :64])
    return found


def table(rows: list[dict[str, Any]], speeds: dict[str, Any]) -> str:
    """As Markdown: a line for each model and each way to run it."""
    heads = ["model", "parameters", "perplexity", "run by", "file, MB", "memory, MB"]
    heads += ["prompt, tokens/s", "generation, tokens/s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for number, row in enumerate(rows):
        share = row["parameters"] / rows[0]["parameters"]
        cells = [row["name"], f"{row['parameters']:,} ({share:.0%})", f"{row['perplexity']:.3f}"]
        for by, run in row["runs"].items():
            sizes = [
                f"{run['bytes'] / 1e6:,.0f}",
                f"{run['memory']:,.0f}" if "memory" in run else "",
            ]
            fast = [
                f"{speeds[by][n][number]:.1f}" if by in speeds else ""
                for n in ("prompt", "generation")
            ]
            lines.append(f"| {' | '.join([*cells, by, *sizes, *fast])} |")
    return "\n".join(lines)


def remembered(path: Path, what: Any) -> Any:
    """What the file says or, where there is none, what is then written into it, whole or not at all."""
    if not path.exists():
        write_whole(path, json.dumps(what(), indent=1).encode())
    return json.loads(path.read_text("utf-8"))


def dense(settings: Settings, folder: Path) -> dict[str, Any]:
    """What there is to know of the model as it was published."""
    model, tokenizer = load(settings.model and Path(settings.model))
    return judged(model, tokenizer, settings.held_out(tokenizer), folder, "dense")


def specialised(settings: Settings, folder: Path, save_every: int) -> dict[str, Any]:
    """Train, and what there is to know of the model that comes of it."""
    begin = time.perf_counter()
    model, tokenizer, engine = train(settings, folder, save_every)
    cost = {"seconds": time.perf_counter() - begin, **peak_memory()}
    engine.plot_life(folder / "life.png")
    wrote(folder / "life.png", folder / "checkpoint")
    found = judged(model, tokenizer, settings.held_out(tokenizer), folder, "specialised")
    return found | {"training": cost, "widths": engine.life[-1].widths}


def apart(call: Callable[..., Any], *args: Any) -> Any:
    """What a call gives, from a process of its own, with which its memory goes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def specialise(settings: Settings, folder: Path, save_every: int = 10) -> list[dict[str, Any]]:
    """The whole story, or what of it is still to be done; a row for the dense model, and one for what came of it."""
    asked = remembered(folder / "settings.json", lambda: asdict(settings))
    if asked != asdict(settings):
        raise SystemExit(
            f"{folder} holds a run of other settings, {asked}. Name another --out, or say --fresh."
        )
    rows = [
        remembered(folder / "dense.json", lambda: apart(dense, settings, folder)),
        remembered(folder / "result.json", lambda: specialised(settings, folder, save_every)),
    ]
    for row in rows:
        print(f"\nThe {row['name']} model writes:\n{row['text']}")
    print(f"\n{table(rows, remembered(folder / 'speed.json', lambda: in_turns(rows, folder)))}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory that transformers wrote; else SmolLM2-135M")
    parser.add_argument("--text", help="a folder; else the standard library's source")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--of", choices=("parameters", "flops", "latency"), default="parameters")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=TOKENS)
    parser.add_argument("--rate", type=float, default=1e-4, help="highest learning rate")
    parser.add_argument(
        "--freeze-embeddings", dest="train", action="store_const", const="blocks", default="all"
    )
    parser.add_argument(
        "--lora", dest="train", action="store_const", const="lora", help="needs peft"
    )
    parser.add_argument("--distil", action="store_true", help="learn from the dense model too")
    parser.add_argument(
        "--turns", type=int, default=1, help="in which units go, while it learns; 1: before"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=10, help="steps")
    parser.add_argument("--out", type=Path, help="folder for all that is left")
    parser.add_argument("--fresh", action="store_true", help="forget what is in that folder")
    options = vars(parser.parse_args())
    out, fresh, save_every = (options.pop(n) for n in ("out", "fresh", "save_every"))
    settings = Settings(**options)
    out = out or OUTPUTS / "slm" / f"{settings.keep:.0%}".rstrip("%")
    if fresh and (out / "settings.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    specialise(settings, out, save_every)


if __name__ == "__main__":
    main()
