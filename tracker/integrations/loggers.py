"""What an engine knows, for TensorBoard's SummaryWriter, or for anything that logs a dict of numbers."""

from __future__ import annotations

from typing import Any

from tracker.engine import NeuronEngine
from tracker.errors import StatisticsError


def numbers(engine: NeuronEngine) -> dict[str, float]:
    """Parameters, changes, and layer by layer: neurons, and where a window was observed, dead ones and firing.

    Args:
        engine: Of the model that is logged.

    Examples:
        >>> from tracker.integrations import numbers
        >>> numbers(engine)["tracker/parameters"]
        115.0
    """
    found = {
        "tracker/parameters": float(engine.count_parameters()),
        "tracker/changes": float(len(engine.journal)),
    }
    if engine.life:
        found["tracker/loss"] = engine.life[-1].loss
    for name, row in engine.get_layer_summary().items():
        found[f"tracker/neurons/{name}"] = float(row["total_neurons"])
        if row["observed_neurons"]:
            found[f"tracker/dead/{name}"] = row["dead_neurons"] / row["total_neurons"]
            found[f"tracker/firing/{name}"] = row["avg_firing_frequency"]
    return {name: value for name, value in found.items() if value == value}


def log_to(logger: Any, engine: NeuronEngine, step: int) -> None:
    """Log `numbers` at a step, and where the logger takes figures, the life of the network.

    Args:
        logger: With `add_scalar` (TensorBoard's SummaryWriter), `log_metrics` (Lightning's loggers), or `log(dict)`
            (wandb, trackio and others).
        engine: Of the model.
        step: On the logger's axis.

    Raises:
        StatisticsError: The logger has none of these.

    Examples:
        >>> from tracker.integrations import log_to
        >>> class Printer:
        ...     def log(self, values):
        ...         print(int(values["tracker/parameters"]))
        >>> log_to(Printer(), engine, step=7)
        115
    """
    values = numbers(engine)
    if hasattr(logger, "add_scalar"):
        for name, value in values.items():
            logger.add_scalar(name, value, step)
        if hasattr(logger, "add_figure") and engine.life and engine.journal:
            logger.add_figure("tracker/life", engine.plot_life(), step)
    elif hasattr(logger, "log_metrics"):
        logger.log_metrics(values, step)
    elif hasattr(logger, "log"):
        logger.log({**values, "step": step})
    else:
        raise StatisticsError(
            f"{type(logger).__name__} is no logger that is known here: it has neither add_scalar, log_metrics nor log."
        )
