"""Self-modification while training: policies say when to look and what to do, the loop carries it out and watches."""

from tracker.training.choices import Bypass, Candidate, Requests, Size
from tracker.training.custom_policies import OwnPolicy, as_policy
from tracker.training.decisions import Decision
from tracker.training.loop import SelfModification
from tracker.training.policy import Phases, Policy

__all__ = [
    "Bypass", "Candidate", "Decision", "OwnPolicy", "Phases", "Policy", "Requests", "SelfModification", "Size",
    "as_policy",
]  # fmt: skip
