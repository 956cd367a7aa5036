"""Is what the structure says true? Models of every family: traced, 30% of every group removed, compared, trained.

Each model goes through the public calls alone, in a process of its own: `engine.structure`, then 30% of each exact
group in one call, compared with the masked original (masked here, in float64, constants random), then the inexact
groups, then a step of training. Torch-Pruning, if it is installed, does the same model beside it. Nothing is
downloaded.

    python benchmarks/coverage.py --family zoo                       # families: see --help; default: what is installed
    python benchmarks/coverage.py --only gpt2,llama --no-rival
    python benchmarks/coverage.py --resume --write                   # all, going on where it stopped; docs/coverage.md
    python benchmarks/coverage.py --subset                           # a few minutes, for continuous integration

It exits with 1 if any model comes out wrong, or is left torn.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
# Before torch is imported, here and in every process from here on.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])

from _families import FAMILIES, SUBSET
from _page import cell, installed, page, summary
from tqdm import tqdm

PAGE = ROOT / "docs" / "coverage.md"
RESULTS = ROOT / "outputs" / "reports" / "coverage.jsonl"
Result = dict[str, Any]
BAD = ("wrong", "crashed", "benchmark failed")


# One model, in a process of its own


def child(pipe: Connection, kind: str, family: str, name: str, seconds: int, memory: float) -> None:
    gc.freeze()  # what came with the process need not be searched for garbage again and again
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 20))
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30), -1))
    try:
        if kind == "rival":
            import _rival

            _rival.measure(family, name, pipe.send)
        else:
            import _measure

            _measure.measure(family, name, pipe.send)
    except Exception as error:
        import traceback

        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        failed = {"status": "benchmark failed", "note": text}
        pipe.send({"rival": failed} if kind == "rival" else failed)
    pipe.send({"ended": True})


def alone(context: Any, kind: str, family: str, name: str, seconds: int, memory: float) -> Result:
    """What a process told before it ended, or was ended."""
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(send, kind, family, name, seconds, memory))
    process.start()
    send.close()
    told: Result = {}
    deadline = time.monotonic() + 4 * seconds + 60  # of the wall, on a busy machine
    while time.monotonic() < deadline:
        if receive.poll(1):
            try:
                news = receive.recv()
            except EOFError:
                break
            inner = news.pop("rival", {})
            told |= news
            told.setdefault("rival", {}).update(inner)
    if process.is_alive() and not told.get("ended"):
        process.join(2)
        process.kill()
    process.join()
    mine = told.get("rival", {}) if kind == "rival" else told
    if not told.pop("ended", False):
        slow = process.exitcode in (-getattr(signal, "SIGXCPU", 24), -signal.SIGKILL)
        why = f"not done within {seconds} s" if slow else f"its process died ({process.exitcode})"
        mine |= {
            "status": "hang" if kind == "rival" else "limit",
            "note": f"{mine.get('stage', '')}: {why}",
        }
        if kind == "rival":
            told["rival"] = mine
    elif re.search(r"not enough memory|allocate memory|MemoryError", mine.get("note", "")):
        ended = "hang" if kind == "rival" else "limit"
        mine["status"] = ended if "torn" not in mine["note"] else mine["status"]
    return told


def measure(context: Any, family: str, name: str, options: argparse.Namespace) -> Result:
    result: Result = {"family": family, "name": name}
    result |= alone(context, "own", family, name, options.seconds, options.memory)
    result["rival"] = {}
    if options.rival:
        seconds = min(options.seconds, options.rival_seconds)
        result |= alone(context, "rival", family, name, seconds, options.memory)
    return result


# The run


def line(r: Result) -> str:
    share = f"{r['share']:.1%}" if "share" in r else "-"
    own = f"{r.get('trace_seconds', 0):.1f}+{r.get('prune_seconds', 0):.1f}"
    gap = f"{r['difference']:.0e}" if "difference" in r else "-"
    rival = r["rival"].get("status", "-")
    if "seconds" in r["rival"]:
        rival += f" {r['rival']['seconds']:.1f}"
    note = cell(r.get("note", ""), 150)
    name = f"{r['family']}/{r['name']}"
    return f"{name:<46} {r['status']:<13} {share:>6} {gap:>6} {own:>10} s  {rival:<18} {note}"


def known(path: Path) -> dict[tuple[str, str], Result]:
    """The newest result of each model."""
    if not path.exists():
        return {}
    rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines() if row]
    return {(r["family"], r["name"]): r for r in rows}


def tasks(options: argparse.Namespace) -> tuple[list[tuple[str, str]], list[str]]:
    """Models to run, and what is missing for the others."""
    chosen, missing = [], []
    only = {n for n in options.only.split(",") if n}
    families = (
        [f for f in FAMILIES if f == "zoo" or f in SUBSET] if options.subset else list(FAMILIES)
    )
    for family in options.family or families:
        if not FAMILIES[family].installed:
            missing.append(
                f"Family {family} was left out: {FAMILIES[family].package} is not installed."
            )
            continue
        names = SUBSET.get(family) if options.subset else None
        names = [n for n in names or FAMILIES[family].names() if not only or n in only]
        chosen += [(family, n) for n in names[: options.limit]]
    return chosen, missing


def not_run(tasks: list[tuple[str, str]]) -> list[str]:
    """A line for each family that lacks results."""
    names: dict[str, list[str]] = {}
    for family, name in tasks:
        names.setdefault(family, []).append(name)
    return [f"Not run of {family}: {', '.join(of_it)}." for family, of_it in names.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.rival = options.rival and installed("torch-pruning") is not None
    chosen, missing = tasks(options)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    done = known(options.results) if options.resume or options.report else {}
    todo = [task for task in chosen if task not in done]
    if options.report:
        missing += not_run(todo)
        chosen, todo = [task for task in chosen if task in done], []
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # imported once, not once for each model
        packages = sorted({FAMILIES[f].package for f, _ in todo} - {"torch"})
        context.set_forkserver_preload(
            ["_measure", "torch._dynamo", *packages, *["_rival"] * options.rival]
        )
    print(*missing, sep="\n", end="\n" if missing else "")
    print(
        "model, status, share of parameters prunable, difference, trace + prune, Torch-Pruning, note"
    )
    with options.results.open("a", encoding="utf-8") as file:
        for family, name in tqdm(todo, disable=None):
            result = measure(context, family, name, options)
            done[family, name] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
            tqdm.write(line(result))
    results = [done[task] for task in chosen]
    print("", *summary(results), sep="\n")
    if options.write:
        PAGE.write_text(
            page(results, missing, options.seconds, options.rival_seconds), encoding="utf-8"
        )
        print(f"Written: {PAGE.relative_to(ROOT)}")
    bad = Counter(r["status"] for r in results if r["status"] in BAD)
    for r in results:
        if r["status"] in BAD:
            print(f"{r['status']}: {r['family']}/{r['name']}: {r.get('note', '')}")
    return 1 if bad else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument(
        "--family", choices=FAMILIES, action="append", help="default: all that are installed"
    )
    p.add_argument("--only", default="", help="names of models, separated by commas")
    p.add_argument("--limit", type=int, help="models of each family at most")
    p.add_argument(
        "--subset", action="store_true", help="the zoo and a few models of each family: minutes"
    )
    p.add_argument(
        "--seconds",
        type=int,
        default=240,
        help="of one thread, for each model, at most",
    )
    p.add_argument("--memory", type=float, default=10, help="GB for each process, at most")
    p.add_argument(
        "--rival-seconds", type=int, default=120, help="the same of Torch-Pruning, if less"
    )
    p.add_argument("--no-rival", dest="rival", action="store_false", help="without Torch-Pruning")
    p.add_argument(
        "--resume", action="store_true", help="leave out what the file of results has already"
    )
    p.add_argument(
        "--report", action="store_true", help="run nothing; what has no result yet is named"
    )
    p.add_argument("--results", type=Path, default=RESULTS, help="JSON lines; new ones are added")
    p.add_argument("--write", action="store_true", help="write docs/coverage.md")
    return p


if __name__ == "__main__":
    sys.exit(main())
