"""From the statistics of a layer's hooks to the frozen record that the analysis reads."""

from __future__ import annotations

from tracker.observation.hooks import Observer, Site, Window
from tracker.observation.neuron_ids import LayerIds
from tracker.observation.records import LayerObservation
from tracker.statistics import Activity


def first_mode(observer: Observer) -> str:
    """The mode that was seen first: "train" or "eval"."""
    seen = next(iter(observer.samples), None)
    if seen is None:
        seen = next((flag for site in observer.sites for flag in site.windows), False)
    return "train" if seen else "eval"


def observed_layer(
    ids: LayerIds, site: Site, flags: tuple[bool, ...], fallback: str
) -> LayerObservation:
    """What one layer's neurons did in the given modes, merged."""
    windows: list[Window] = [site.windows[flag] for flag in flags if flag in site.windows]
    activity = Activity.empty(len(ids.ids))
    covariance = None
    for window in windows:
        activity = activity.merge(Activity(window.activity.value().table.cpu()))
        if window.covariance is not None:
            value = window.covariance.value()
            covariance = value if covariance is None else covariance.merge(value)
    problem = (site.leader or site).problem or ("" if windows else "never called in this window")
    place = "its own output" if site.tap is None else f"the input of {site.tap.module}"
    return LayerObservation(
        site.name,
        site.kind,
        tuple(ids.ids),
        activity.value(),
        covariance,
        site.is_output,
        problem,
        place,
        fallback,
    )
