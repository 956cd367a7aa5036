"""See every neuron of a PyTorch model, judge it, and rewrite the network while it trains.

`NeuronEngine` is the one facade; `NeuronTracker` is the same class under its other public name.
"""

from tracker.engine import NeuronEngine, apply_journal
from tracker.errors import (
    CheckpointError,
    NotTrackedError,
    StatisticsError,
    StructureError,
    SurgeryError,
    TrackerError,
    UnknownNeuronError,
    VerificationError,
)
from tracker.training import Policy

NeuronTracker = NeuronEngine

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "NeuronEngine",
    "NeuronTracker",
    "NotTrackedError",
    "Policy",
    "StatisticsError",
    "StructureError",
    "SurgeryError",
    "TrackerError",
    "UnknownNeuronError",
    "VerificationError",
    "__version__",
    "apply_journal",
]
