"""Thin callbacks for training frameworks, and loggers by what they can do; a framework is imported when it is used."""

from tracker.integrations.loggers import log_to, numbers

__all__ = ["log_to", "numbers"]
