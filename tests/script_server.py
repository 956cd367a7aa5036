"""Runs scripts one after the other, each in a process that is forked from one which has imported torch.

Started as a script of its own, without the repository on its path: a script has to find this library by itself, and
imports it anew.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401
import torch
import torch._dynamo


def run(script: str, folder: str, settings: dict[str, str], printed: str, seconds: int) -> None:
    """As `python -W error SCRIPT` would in this folder; what it prints goes to a file."""
    signal.alarm(seconds)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    os.chdir(folder)
    os.environ.update(settings)
    torch.set_num_threads(int(settings.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [script]
    sys.path[0] = str(Path(folder, script).resolve().parent)
    warnings.resetwarnings()
    warnings.simplefilter("error")
    runpy.run_path(script, run_name="__main__")


def ended(job: dict[str, Any]) -> int:
    """The exit code of a script, negative if a signal ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        run(**job)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    assert "tracker" not in sys.modules
    for line in sys.stdin:
        print(ended(json.loads(line)), flush=True)
