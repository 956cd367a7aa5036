"""The native path: one call of compiled code reduces a layer output and merges it. Where it cannot, torch does."""

from tracker.statistics.native.calls import Kernel
from tracker.statistics.native.loading import SWITCH, kernel, load, on_gpu

__all__ = ["SWITCH", "Kernel", "kernel", "load", "on_gpu"]
