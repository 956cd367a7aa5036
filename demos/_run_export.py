"""Exported language models, run without this library, one thread, one text at a time: speed and memory, as JSON.

python demos/_run_export.py --times=3 outputs/slm/60/specialised                 # a directory, by transformers
python demos/_run_export.py --times=3 outputs/slm/60/*-f16.gguf                  # files, by llama.cpp, in turns

Speed is per second of the process's own time, and models that are compared run in turns: so what else the machine does
hits them alike.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, LENGTH, TIMES = 256, 32, 3  # tokens, tokens, how often; the median counts
IDS = [
    3 + 7 * i % 89 for i in range(PROMPT)
]  # of any vocabulary: speed does not depend on what is said


def in_its_own_process(*paths: Path, times: int = TIMES) -> dict[str, list[float]]:
    """What `measured` says of these.

    Raises:
        RuntimeError: One does not run there.
    """
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, f"--times={times}", *map(str, paths)],
        env=os.environ | offline | {"HF_MODULES_CACHE": str(paths[0].parent / "modules")},
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(f"{[*map(str, paths)]} do not run: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def by_transformers(path: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What reads the prompt, and what reads it and writes LENGTH tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    ids = torch.tensor([IDS])

    def write() -> None:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
            min_new_tokens=LENGTH, max_new_tokens=LENGTH, pad_token_id=0,
        )  # fmt: skip

    def read() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return read, write


def by_llama_cpp(path: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same by llama.cpp."""
    from llama_cpp import Llama

    llama = Llama(path, n_ctx=2 * PROMPT, n_threads=1, n_threads_batch=1, verbose=False)

    def read() -> None:
        llama.reset()
        llama.eval(IDS)

    def write() -> None:
        read()
        for _ in range(LENGTH):
            llama.eval([llama.sample(temp=0.0)])

    return read, write


def seconds(call: Callable[[], Any]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def measured(paths: list[str], times: int) -> dict[str, list[float]]:
    """Of each model tokens per second of a prompt and of what is written after it; the most memory, in MB."""
    calls = [(by_llama_cpp if p.endswith(".gguf") else by_transformers)(p) for p in paths]
    for read, _ in calls:
        read()
    rounds = [[(seconds(read), seconds(write)) for read, write in calls] for _ in range(times)]
    found: dict[str, list[float]] = {"prompt": [], "generation": []}
    for pairs in zip(*rounds, strict=True):
        reading = statistics.median(r for r, _ in pairs)
        writing = statistics.median(w - r for r, w in pairs)
        found["prompt"].append(PROMPT / max(reading, 1e-9))
        found["generation"].append(LENGTH / max(writing, 1e-9))
    return found | {"memory": [*peak_memory().values()]}


def peak_memory() -> dict[str, float]:
    """The most memory that this process held so far, in MB; nothing where the system does not tell."""
    # Not resource.getrusage: a process that was started by another begins with that one's peak.
    status = Path("/proc/self/status")
    told = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return {} if told is None else {"memory": int(told[1]) / 1000}


if __name__ == "__main__":
    sys.modules["tracker"] = None  # type: ignore[assignment]  # an export needs nothing of it
    print(json.dumps(measured(sys.argv[2:], int(sys.argv[1].removeprefix("--times=")))))
