"""An exported language model, run without this library, one thread, one text at a time: speed and memory, as JSON.

python demos/_run_export.py outputs/slm/60/specialised              # a directory, by transformers
python demos/_run_export.py outputs/slm/60/specialised-f16.gguf     # a file, by llama.cpp
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


def in_its_own_process(path: Path) -> dict[str, float]:
    """What `measured` says.

    Raises:
        RuntimeError: It does not run there.
    """
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": f"{path}.modules"}
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        env=os.environ | offline,
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(f"{path} does not run: {done.stderr[-2000:]}")
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
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measured(path: str) -> dict[str, float]:
    """Tokens per second of a prompt and of what is written after it, and the most memory of this process, in MB."""
    read, write = (by_llama_cpp if path.endswith(".gguf") else by_transformers)(path)
    read()
    pairs = [(seconds(read), seconds(write)) for _ in range(TIMES)]
    reading = statistics.median(r for r, _ in pairs)
    writing = statistics.median(w for _, w in pairs) - reading
    speed = {"prompt": PROMPT / reading, "generation": LENGTH / max(writing, 1e-9)}
    return speed | peak_memory()


def peak_memory() -> dict[str, float]:
    """The most memory that this process held so far, in MB; nothing where the system does not tell."""
    # Not resource.getrusage: a process that was started by another begins with that one's peak.
    status = Path("/proc/self/status")
    told = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return {} if told is None else {"memory": int(told[1]) / 1000}


if __name__ == "__main__":
    sys.modules["tracker"] = None  # type: ignore[assignment]  # an export needs nothing of it
    print(json.dumps(measured(sys.argv[1])))
