"""The one tree of errors. Each message says what was asked, what stands in the way, and what to do.

Catch `TrackerError` for all of them. Where a more general Python error fits as well (`KeyError` for an unknown id,
`ValueError` for a bad argument) the class derives from it too, so that ordinary `except` clauses work.
"""


class TrackerError(Exception):
    """Root of everything that this library raises on purpose.

    Examples:
        >>> from tracker import TrackerError
        >>> try:
        ...     engine.expand_layer("nowhere", 4)
        ... except TrackerError as error:
        ...     print(error)
        No tracked layer is named 'nowhere'. Tracked layers: '0', '2', '4'.
    """


class NotTrackedError(TrackerError):
    """The model, or a layer of it, is not known to the engine: `track_model` comes first.

    Examples:
        >>> NeuronEngine().get_summary()
        Traceback (most recent call last):
        tracker.errors.NotTrackedError: No model is tracked yet. Call track_model(model) first.
    """


class UnknownNeuronError(TrackerError, KeyError):
    """No neuron has this id, or it has left the network.

    Examples:
        >>> engine.get_neuron_info(99)
        Traceback (most recent call last):
        tracker.errors.UnknownNeuronError: There is no neuron 99. Ids given out so far: 0 to 16.
    """

    # KeyError shows the repr of its argument; a message is for reading.
    __str__ = Exception.__str__


class StatisticsError(TrackerError, ValueError):
    """A question that the statistics at hand cannot answer, or a history file that cannot be read.

    Examples:
        >>> engine.start_tracking(every=0)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        tracker.errors.StatisticsError
    """


class WriteError(TrackerError, OSError):
    """A file cannot be written; what was there is as it was.

    Examples:
        >>> engine.save_training_history("/dev/null/history.json")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        tracker.errors.WriteError
    """

    # OSError looks for an error number among its arguments.
    __str__ = Exception.__str__


class StructureError(TrackerError):
    """The model could not be traced.

    Examples:
        >>> silent = nn.Linear(4, 2)
        >>> _ = engine.track_model(silent, "it has not run, and there are no example inputs")
        >>> engine.structure  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        tracker.errors.StructureError
    """


class SurgeryError(TrackerError):
    """A change was refused; nothing was touched.

    Examples:
        >>> engine.prune_neurons({"4": [0]})
        Traceback (most recent call last):
        tracker.errors.SurgeryError: Neuron 0 of layer '4' cannot be removed: it is part of the model's output.
    """


class VerificationError(TrackerError):
    """A change did not keep its promise and was undone.

    Examples:
        >>> from tracker import VerificationError
        >>> try:
        ...     _ = engine.prune_neurons({"0": [1]})
        ... except VerificationError as error:  # model and optimizer are as they were
        ...     print(error)
    """


class CheckpointError(TrackerError):
    """A checkpoint is damaged, foreign, or belongs to another model; nothing was changed.

    Examples:
        >>> NeuronEngine.load_checkpoint("nowhere", model)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        tracker.errors.CheckpointError
    """


class ExportError(TrackerError):
    """A model cannot be written in a format; nothing was written.

    Examples:
        >>> from tracker.export import to_hugging_face
        >>> to_hugging_face(engine, "folder")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        tracker.errors.ExportError
    """
