"""The compiled code: found, loaded, tried, and called."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tracker.statistics.activity import BATCHES, M2, MAXIMUM, MEAN, MINIMUM, Activity
from tracker.statistics.native.build import UnavailableError, capability, library
from tracker.statistics.native.calls import TYPES, Kernel
from tracker.statistics.native.products import NativeProducts
from tracker.statistics.reduce import masked

SWITCH = "TRACKER_NATIVE"  # environment variable: 0 turns compiled code off
# Of an output (outer, neurons, inner), with a threshold, into a table (9, neurons).
Merge = Callable[[Tensor, float, Tensor], None]
log = logging.getLogger("tracker")


def kernel() -> Kernel | None:
    """The kernel, built at the first call ever, found and loaded at the first call of the process; or None."""
    if not _state:
        with _lock:
            if not _state:
                _state.append(load())
    return _state[0]


def on_gpu(x: Tensor, table: Tensor) -> Merge | None:
    """What merges an output x (outer, neurons, inner) into a table where both lie on one GPU; None: torch does it."""
    if (
        not x.is_cuda
        or x.dtype not in TYPES
        or type(x) is not Tensor
        or x.is_neg()
        or x.device != table.device
    ):
        return None
    if x.device not in _gpus:
        if torch.cuda.is_current_stream_capturing():  # trying it would wait
            return None
        with _lock:
            if x.device not in _gpus:
                _gpus[x.device] = load_for(x.device)
    return _gpus[x.device]


def load_for(device: torch.device) -> Merge | None:
    """Triton's code, tried on a GPU; the log says what came of it."""
    if _switched_off():
        log.info("Activity statistics on %s by torch: %s turns compiled code off.", device, SWITCH)
        return None
    try:
        from tracker.statistics.native.fused import add

        for x in _samples(device):
            expected = masked(x.double(), 0.5).table
            got = Activity.empty(x.shape[1], device).table
            add(x, 0.5, got)
            _compare(got, expected)
    except Exception as error:
        log.info("Activity statistics on %s by torch, without compiled code: %s", device, error)
        return None
    log.info("Activity statistics on %s by compiled code.", device)
    return add


def load() -> Kernel | None:
    """Find or build, load and try the kernel; the log says what came of it."""
    if _switched_off():
        log.info("Activity statistics by torch: %s turns compiled code off.", SWITCH)
        return None
    start = time.perf_counter()
    try:
        path, built = library()
        found = _opened(str(path))
        _try(found)
    except Exception as error:
        log.info("Activity statistics by torch, without compiled code: %s", error)
        return None
    how = f"built, once, in {time.perf_counter() - start:.1f} s" if built else "found"
    log.info("Activity statistics by compiled code for %s, %s: %s", capability(), how, path)
    return found


def _opened(path: str) -> Kernel:
    code = ctypes.CDLL(path)
    number, address = ctypes.c_int64, ctypes.c_void_p
    reduce, stage, flush = code.tracker_activity, code.tracker_covariance, code.tracker_flush
    search = code.tracker_pairs
    reduce.argtypes = [address, *[number] * 5, ctypes.c_double, address, address, number, address]
    stage.argtypes = [address, address, *[number] * 4, address, address, number, address]
    flush.argtypes = [address, number, address]
    search.argtypes = [address, number, *[address] * 3, number]
    stage.restype = flush.restype = None
    search.restype = number
    try:
        # The threads that torch itself runs on: a second pool would fight them for the processors.
        fork = ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, address).value
    except (AttributeError, OSError):
        fork = None
    return Kernel(reduce, stage, flush, search, code.tracker_width, fork)


def _try(found: Kernel) -> None:
    """Compare with torch on small known inputs.

    Raises:
        UnavailableError: They disagree.
    """
    for x in _samples(torch.device("cpu")):
        neurons = x.shape[1]
        got = Activity.empty(neurons).table
        done = found.add(x, 1, neurons, 0.5, got, None)
        _compare(got, masked(x.double(), 0.5).table)
        x[-1, -1, -1] = torch.nan
        before = got.clone()
        refused = found.add(x, 1, neurons, 0.5, got, None) is False
        if not (done and refused and torch.equal(before, got)):
            raise UnavailableError(f"the compiled code does something else for {x.dtype}")
    wave = _wave()
    for rows in (wave.view(33, 70), wave.view(15, 154)):  # narrow, wide
        _try_products(found, rows)


def _wave() -> Tensor:
    steps = torch.arange(2310, dtype=torch.float64)
    return (steps * 0.7).sin() * 3 + steps.remainder(5)


def _samples(device: torch.device) -> Iterator[Tensor]:
    """Small outputs (outer, neurons, inner) of every type."""
    wave = _wave()
    for dtype in TYPES:
        for shape in ((210, 11, 1), (33, 14, 5), (6, 11, 35)):
            yield torch.where(wave > 0, wave, 0).to(device, dtype).view(shape)


def _compare(got: Tensor, expected: Tensor) -> None:
    """Of two tables (9, neurons).

    Raises:
        UnavailableError: They differ by more than rounding.
    """
    exact = [*range(BATCHES + 1), MINIMUM, MAXIMUM]
    same = torch.equal(got[exact], expected[exact])
    if not same or not torch.allclose(
        got[MEAN : M2 + 1], expected[MEAN : M2 + 1], rtol=1e-5, atol=0
    ):
        raise UnavailableError("the compiled code computes something else")


def _switched_off() -> bool:
    return os.environ.get(SWITCH, "").lower() in ("0", "off", "false", "no")


def _try_products(found: Kernel, rows: Tensor) -> None:
    size = rows.shape[1]
    own = torch.zeros(size, dtype=torch.int64), torch.zeros(size).double()
    products = NativeProducts(found, *own, torch.zeros(size, size).double())
    for part in rows.split(10):
        products.add(part.float()[:, :, None], part.mean(0))
    centred = rows - rows.mean(0)
    if not torch.allclose(products.totals()[2].triu(), (centred.T @ centred).triu(), atol=1e-3):
        raise UnavailableError("the compiled code computes other products")


_state: list[Kernel | None] = []
_gpus: dict[torch.device, Merge | None] = {}
_lock = threading.Lock()
