"""Kills at random moments of saves: is a checkpoint lost, mixed of two, or anything touched that is not ours?

One to three processes save to one path at once, each with one or two threads, while a reader loads without a pause.
They are ended by SIGKILL, or by SIGTERM with a handler that saves once more. A checkpoint's weights, optimizer moments
and learning rate all hold one number: of a mixed one they differ.

    python benchmarks/kills.py            500 kills; about five minutes
    python benchmarks/kills.py 50
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tracker import NeuronEngine

FOREIGN = {
    "site/manifest.json": '{"name": "my web app"}',
    "site/src/main.js": "x",
    ".run.new-notes/thesis.tex": "years of work",
    ".run.new-4711/thesis.tex": "years of work",
    ".run.old-4711-0/manifest.json": "{}",
    ".run.lock.mine": "mine",
    "run-other.txt": "mine",
}


def parts() -> tuple[nn.Module, torch.optim.Optimizer, NeuronEngine]:
    """A small model, its optimizer, and an engine of it."""
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    engine = NeuronEngine()
    engine.track_model(model, "model")
    engine.attach_optimizer(optimizer)
    return model, optimizer, engine


def save(k: float, path: Path, own: tuple[Any, ...]) -> None:
    """Save one checkpoint that says k everywhere."""
    model, optimizer, engine = own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(k)
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, k)
    optimizer.param_groups[0]["lr"] = k
    engine.save_checkpoint(path)


def verdict(path: Path) -> str:
    """What loading says: "whole", "mixed", or why it is lost."""
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    try:
        NeuronEngine.load_checkpoint(path, model, optimizer)
    except Exception as error:
        return f"lost: {type(error).__name__}: {error}"
    said = {v for p in model.parameters() for v in p.detach().unique().tolist()}
    said |= {
        v for s in optimizer.state.values() for v in s["momentum_buffer"].detach().unique().tolist()
    }
    return "whole" if said == {optimizer.param_groups[0]["lr"]} else f"mixed: {sorted(said)}"


def writer(path: Path, threads: int, first: float, ready: int) -> None:
    """Save for ever, by several threads; on SIGTERM save once more, and end in one of three ways."""
    mine = [parts() for _ in range(threads + 1)]
    draw = random.Random(first)

    def handler(number: int, frame: object) -> None:
        save(first + 0.5, path, mine[-1])
        way = draw.randrange(3)
        if way == 0:
            os._exit(0)
        if way == 1:
            raise SystemExit
        signal.setitimer(signal.ITIMER_REAL, 0.02)  # goes on for a while

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))

    def loop(own: tuple[Any, ...], k: float) -> None:
        while True:
            save(k, path, own)
            k += 1

    for i in range(1, threads):
        threading.Thread(target=loop, args=(mine[i], first + 1000 * i), daemon=True).start()
    os.write(ready, b"x")
    loop(mine[0], first)


def reader(path: Path, out: int) -> None:
    """Load until told to stop; tell what was seen."""
    seen: Counter[str] = Counter()
    going = [True]
    signal.signal(signal.SIGTERM, lambda *_: going.clear())
    while going:
        seen[verdict(path)] += 1
    os.write(out, "\n".join(f"{count}\t{what}" for what, count in seen.items()).encode()[:60000])


def child(job: Callable[..., None], *args: Any) -> int:
    """The process id of a copy of this process that does one job and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        job(*args)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            print(f"{job.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(0)


def fingerprints(root: Path) -> dict[str, str]:
    """Of all that is not ours."""
    return {
        n: hashlib.sha256((root / n).read_bytes()).hexdigest()
        for n in FOREIGN
        if (root / n).exists()
    }


def kills(number: int, root: Path, seed: int = 0) -> Counter[str]:
    """Kill so many writers; what happened, counted."""
    torch.set_num_threads(1)
    draw, path, found = random.Random(seed), root / "run", Counter[str]()
    for name, text in FOREIGN.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    before = fingerprints(root)
    save(1.0, path, parts())
    out, told = os.pipe()
    watching = child(reader, path, told)
    while found["kills"] < number:
        ready, tell = os.pipe()
        count, threads = draw.randint(1, 3), draw.randint(1, 2)
        count = min(count, number - found["kills"])
        writers = [
            child(writer, path, threads, 10.0 + 10_000 * i + found["kills"], tell)
            for i in range(count)
        ]
        for _ in writers:
            os.read(ready, 1)
        os.close(ready), os.close(tell)
        for pid in writers:
            time.sleep(draw.random() * 0.06)
            how = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            os.kill(pid, how)
            found["kills"] += 1
            found[f"by {how.name}"] += 1
        time.sleep(0.03 * draw.random())
        for pid in writers:
            os.waitpid(pid, 0)
        found["drafts left behind"] += (
            sum(p.name.startswith(".run.new-") for p in root.iterdir()) - 2
        )
        found[verdict(path).partition(":")[0] + " after a kill"] += 1
    os.kill(watching, signal.SIGTERM)
    with os.fdopen(out, "rb") as pipe:
        os.close(told)
        lines = pipe.read().decode().splitlines()
    os.waitpid(watching, 0)
    for line in lines:
        times, _, what = line.partition("\t")
        found[what.partition(":")[0] + " beside"] += int(times)
        if not what.startswith("whole"):
            print("reader:", what)
    save(2.0, path, parts())
    found["saves afterwards that failed"] += verdict(path) != "whole"
    after = fingerprints(root)
    found["foreign files touched"] = sum(after.get(n) != before[n] for n in FOREIGN)
    ours = {p.name for p in root.iterdir()} - {Path(n).parts[0] for n in FOREIGN}
    found["left behind for good"] = len(ours - {"run"})
    return found


def total(found: Counter[str], what: str) -> int:
    """Of a sort, after kills and beside them."""
    return sum(count for name, count in found.items() if name.startswith(what))


if __name__ == "__main__":
    asked = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = kills(asked, Path(folder))
    for name, times in sorted(result.items()):
        print(f"{times:7}  {name}")
    lost, mixed, foreign = (
        total(result, "lost"),
        total(result, "mixed"),
        result["foreign files touched"],
    )
    took = time.perf_counter() - start
    print(
        f"{asked} kills in {took:.0f} s: {lost} lost, {mixed} mixed, {foreign} foreign files touched"
    )
    sys.exit(bool(lost or mixed or foreign or result["saves afterwards that failed"]))
