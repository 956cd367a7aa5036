"""What went wrong in code of the user's own, kept to be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RuleFailure:
    """A user's rule that raised: for which operation, a sentence about it, and the exception itself."""

    operation: str
    why: str
    error: Exception
