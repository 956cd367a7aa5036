"""Policies of short runs, and when two runs are the same."""

from __future__ import annotations

from typing import Any

from tests.surgery.subjects import equal
from tracker import Policy

# Changes after steps 6, 12, 18, which are judged 3 steps later; looks begin 3 steps before.
WHEN = {"warm_up": 6, "every": 6, "look": 3, "settle": 3}
POLICIES = {
    "shrink": Policy(**WHEN, floor=2, tolerance=0.3, regret=9.0),
    "grow": Policy(**WHEN, shrink=False, grow=True, plateau=1.0, regret=9.0, max_parameters=2_000),
    "insert": Policy(**WHEN, shrink=False, insert=2, plateau=1.0, regret=9.0),
    "drop": Policy(**WHEN, shrink=False, drop=5.0, regret=1.0),
    "regret": Policy(**WHEN, floor=2, tolerance=0.3, regret=1.0, patience=1),
    "regret inserting": Policy(**WHEN, shrink=False, insert=2, plateau=1.0, regret=1.0, patience=1),
}


def same(one: Any, two: Any) -> None:
    (module, engine, optimizer), (other, again, other_optimizer) = one, two
    assert f"{module}" == f"{other}", "modules differ"
    told, retold = ([vars_of(d) for d in e.life] for e in (engine, again))
    assert told == retold, [pair for pair in zip(told, retold, strict=False) if pair[0] != pair[1]]
    assert changes(engine) == changes(again)
    assert engine.track_model(module) == again.track_model(other)
    weights, others = (
        {n: t for n, t in m.state_dict().items() if not n.startswith("_tracker")}
        for m in (module, other)
    )
    assert equal(weights, others)
    mine, theirs = states(module, optimizer), states(other, other_optimizer)
    assert equal(mine, theirs)


def states(module: Any, optimizer: Any) -> Any:
    return {name: optimizer.state[p] for name, p in module.named_parameters()}


def changes(engine: Any) -> Any:
    """The journal without its times; what was measured in float64 may differ in the last bit."""
    return [
        {**entry, "time": "", "output_difference": f"{entry['output_difference'] or 0:.6e}"}
        for entry in engine.journal.to_dict()["entries"]
    ]


def vars_of(decision: Any) -> Any:
    return decision.step, decision.what, decision.why, repr(decision.loss), decision.widths
