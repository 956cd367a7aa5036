"""From the statistics of a layer's hooks to the frozen record that the analysis reads."""

from __future__ import annotations

from tracker.observation.hooks import LayerStatistics, ObservationPoint, Observer
from tracker.observation.neuron_ids import LayerIds
from tracker.observation.records import LayerObservation
from tracker.statistics import Activity


def first_mode(observer: Observer) -> str:
    """The mode that was seen first: "train" or "eval"."""
    seen = next(iter(observer.samples), None)
    if seen is None:
        seen = next((flag for point in observer.points for flag in point.windows), False)
    return "train" if seen else "eval"


def observed_layer(
    ids: LayerIds, point: ObservationPoint, flags: tuple[bool, ...], fallback: str
) -> LayerObservation:
    """What one layer's neurons did in the given modes, merged."""
    windows: list[LayerStatistics] = [
        point.windows[flag] for flag in flags if flag in point.windows
    ]
    activity = Activity.empty(len(ids.ids))
    covariance = None
    for window in windows:
        activity = activity.merge(Activity(window.activity.value().table.cpu()))
        if window.covariance is not None:
            value = window.covariance.value()
            covariance = value if covariance is None else covariance.merge(value)
    problem = (point.shares_with or point).problem or (
        "" if windows else "never called in this window"
    )
    place = (
        "its own output" if point.read_point is None else f"the input of {point.read_point.module}"
    )
    return LayerObservation(
        point.name,
        point.kind,
        tuple(ids.ids),
        activity.value(),
        covariance,
        point.is_output,
        problem,
        place,
        fallback,
    )
