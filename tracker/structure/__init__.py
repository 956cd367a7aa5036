"""What lives and dies together: for any module, which slices of which tensors make up each unit.

One real forward pass is recorded operation by operation (`trace`), every operation relates the axes of its inputs to
those of its result (`rules`, an open registry) in an algebra of labels (`axes`), and what dies together becomes
units, in groups of alternatives (`units`). What the rules do not understand is frozen, with the reason.
"""

from tracker.structure.adapters.registry import ModuleAdapter, register_adapter
from tracker.structure.read_points import ReadPoint
from tracker.structure.rules.registry import rule
from tracker.structure.structure import Structure, trace_structure
from tracker.structure.trace import Passes
from tracker.structure.units import Frozen, Slice, UnitGroup
from tracker.structure.unseen import require_known

__all__ = [
    "Frozen",
    "ModuleAdapter",
    "Passes",
    "Slice",
    "Structure",
    "ReadPoint",
    "UnitGroup",
    "register_adapter",
    "require_known",
    "rule",
    "trace_structure",
]
