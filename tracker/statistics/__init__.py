"""Streaming statistics: `of`, `merge`, `remap`, `value`.

`Activity` holds a fixed number of values per neuron, `Covariance` one number per pair of neurons. Both are
algebras: merging the statistics of two samples equals the statistics of the two samples together, whatever the
order; so batches, epochs, ranks and restarts all use the one formula.
"""

from tracker.statistics.activity import Activity, ActivityValue
from tracker.statistics.covariance import Covariance, CovarianceStream
from tracker.statistics.reduce import Scratch, split_at
from tracker.statistics.stream import ActivityStream, observe

__all__ = [
    "Activity",
    "ActivityStream",
    "ActivityValue",
    "Covariance",
    "CovarianceStream",
    "Scratch",
    "observe",
    "split_at",
]
