"""The one tree of errors. Each message says what was asked, what stands in the way, and what to do.

Catch `TrackerError` for all of them. Where a more general Python error fits as well (`KeyError` for an unknown id,
`ValueError` for a bad argument) the class derives from it too, so that ordinary `except` clauses work.
"""


class TrackerError(Exception):
    """Root of everything that this library raises on purpose."""


class NotTrackedError(TrackerError):
    """The model, or a layer of it, is not known to the engine: `track_model` comes first."""


class UnknownNeuronError(TrackerError, KeyError):
    """No neuron has this id, or it has left the network."""

    # KeyError shows the repr of its argument; a message is for reading.
    __str__ = Exception.__str__


class StatisticsError(TrackerError, ValueError):
    """A question that the statistics at hand cannot answer, or a history file that cannot be read."""


class WriteError(TrackerError, OSError):
    """A file cannot be written; what was there is as it was."""

    # OSError looks for an error number among its arguments.
    __str__ = Exception.__str__


class StructureError(TrackerError):
    """The model could not be traced."""


class SurgeryError(TrackerError):
    """A change was refused; nothing was touched."""


class VerificationError(TrackerError):
    """A change did not keep its promise and was undone."""


class CheckpointError(TrackerError):
    """A checkpoint is damaged, foreign, or belongs to another model; nothing was changed."""


class ExportError(TrackerError):
    """A model cannot be written in a format; nothing was written."""
