"""Self-modification while training: policies say when to look and what to do, the loop carries it out and watches."""

from tracker.training.loop import Decision, SelfModification
from tracker.training.policy import Phases, Policy

__all__ = ["Decision", "Phases", "Policy", "SelfModification"]
