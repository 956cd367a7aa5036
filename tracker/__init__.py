"""See every neuron of a PyTorch model, judge it, and rewrite the network while it trains.

`NeuronEngine` is the one facade; `NeuronTracker` is the same class under its other public name.
"""

from tracker.checkpoint.recorder import apply_journal
from tracker.compensation.criteria import criterion
from tracker.distributed.ranks import renew
from tracker.distributed.sharded import gather_sharded, shard_anew
from tracker.engine import NeuronEngine
from tracker.errors import (
    CheckpointError,
    ExportError,
    NotTrackedError,
    StatisticsError,
    StructureError,
    SurgeryError,
    TrackerError,
    UnknownNeuronError,
    VerificationError,
    WriteError,
)
from tracker.inputs.calls import Call
from tracker.journal import Entry, Journal
from tracker.modules.kinds import LayerKind, register_layer_kind
from tracker.reporting.text_reports import register_section
from tracker.structure import (
    Frozen,
    ModuleAdapter,
    Slice,
    Structure,
    UnitGroup,
    register_adapter,
    rule,
)
from tracker.surgery import Receipt
from tracker.training import Bypass, Candidate, Decision, Phases, Policy, Requests, Size

NeuronTracker = NeuronEngine

__version__ = "0.1.0"

__all__ = [
    "Bypass",
    "Call",
    "Candidate",
    "CheckpointError",
    "ExportError",
    "Decision",
    "Entry",
    "Frozen",
    "Journal",
    "LayerKind",
    "ModuleAdapter",
    "NeuronEngine",
    "NeuronTracker",
    "NotTrackedError",
    "Phases",
    "Policy",
    "Receipt",
    "Requests",
    "Size",
    "Slice",
    "StatisticsError",
    "Structure",
    "StructureError",
    "SurgeryError",
    "TrackerError",
    "UnitGroup",
    "UnknownNeuronError",
    "VerificationError",
    "WriteError",
    "__version__",
    "apply_journal",
    "criterion",
    "gather_sharded",
    "register_adapter",
    "register_layer_kind",
    "register_section",
    "renew",
    "rule",
    "shard_anew",
]
