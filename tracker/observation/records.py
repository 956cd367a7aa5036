"""Frozen records of what was observed: all that the analysis reads."""

from __future__ import annotations

from dataclasses import dataclass

from tracker.statistics import ActivityValue, Covariance


@dataclass(frozen=True, slots=True)
class LayerObservation:
    """What one layer's neurons did during a window."""

    name: str
    kind: str  # class name of the module
    ids: tuple[int, ...]
    activity: ActivityValue
    covariance: Covariance | None  # None unless correlation analysis was on
    is_output: bool  # its output is the model's output
    problem: str  # why nothing was observed, or ""
    place: str = "its own output"  # where its neurons were observed
    fallback: str = ""  # why at its own output, where what reads it cannot be told of any layer

    @property
    def label(self) -> str:
        """The layer's name for people: the root module's own name is empty."""
        return self.name or "(model)"


@dataclass(frozen=True, slots=True)
class Observation:
    """What the neurons of one model did during a window."""

    model: str
    layers: tuple[LayerObservation, ...]
    samples: int  # of the model's input; observations may be more (positions of maps and sequences)
    mode: str  # "train", "eval", or "all"
    other_samples: int  # seen in the other mode and kept apart
    threshold: float
