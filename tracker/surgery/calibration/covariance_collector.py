"""Covariances of what consumers read: one for all that read the same tensor, as queries, keys and values do."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tracker.statistics import Covariance, CovarianceStream


@dataclass(slots=True)
class _Stream:
    """What several readers read, as long as all of them read the same tensor in each pass."""

    covariance: CovarianceStream
    readers: set[str]
    first: weakref.ref[Tensor] | None = None  # all that it has taken in, while that is one tensor
    version: int = 0  # of that tensor, or of the one that waits
    waiting: tuple[Tensor, Tensor] | None = None  # a tensor and its rows, not yet read by all
    missing: set[str] = field(default_factory=set)  # who has not read it yet

    def take(self) -> None:
        """What waits was read by all that are left."""
        if self.waiting is not None:
            self.covariance.add(self.waiting[1])
        self.waiting, self.missing = None, set()


class CovarianceCollector:
    """Streams of covariance by reader; who reads the same is found out and shares one."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    def add(self, reader: str, tensor: Tensor, rows: Tensor, *, alone: bool = False) -> None:
        """Take one input of a reader in.

        Args:
            reader: Its name.
            tensor: The input itself; readers of the same tensor share a stream, unless one is `alone`.
            rows: Its rows, (observations, columns).
            alone: The rows are not those of every reader of this tensor.
        """
        stream = self._streams.get(reader)
        if stream is None:
            self._begin(reader, tensor, rows, alone=alone)
        elif len(stream.readers) == 1:
            stream.first = None
            stream.covariance.add(rows)
        elif stream.waiting is None:
            stream.first = None
            # A copy: the model may write to the tensor before the next one reads it.
            stream.waiting, stream.version = (tensor, rows.clone()), _version(tensor)
            stream.missing = stream.readers - {reader}
        elif reader in stream.missing and _is(stream.waiting[0], stream.version, tensor):
            stream.missing.remove(reader)
            if not stream.missing:
                stream.take()
        else:
            self._part(stream)
            self.add(reader, tensor, rows, alone=alone)

    def values(self, *, release: bool = False) -> dict[str, Covariance]:
        """The covariance of each reader; those that share a stream have the same. `release`: and end all streams."""
        for stream in list(self._streams.values()):
            if stream.missing:
                self._part(stream)
        streams = {id(stream): stream for stream in self._streams.values()}
        shared = {reader: id(stream) for reader, stream in self._streams.items()}
        if release:
            self._streams = {}
        known: dict[int, Covariance] = {}
        for key in list(streams):  # of wide layers each takes as much as its stream did
            stream = streams.pop(key)
            known[key] = stream.covariance.value()
            del stream
        return {reader: known[key] for reader, key in shared.items()}

    def restore_state(self, seen: Mapping[str, Covariance]) -> None:
        """Have seen this already."""
        self._streams = {
            name: _Stream(CovarianceStream.resumed(value), {name}) for name, value in seen.items()
        }

    def _begin(self, reader: str, tensor: Tensor, rows: Tensor, *, alone: bool) -> None:
        for stream in self._streams.values() if not alone else ():
            if stream.first is not None and _is(stream.first(), stream.version, tensor):
                stream.readers.add(reader)
                self._streams[reader] = stream
                return
        stream = _Stream(CovarianceStream(rows.shape[1], rows.device), {reader})
        stream.covariance.add(rows)
        if not alone:
            stream.first, stream.version = weakref.ref(tensor), _version(tensor)
        self._streams[reader] = stream

    def _part(self, stream: _Stream) -> None:
        """Those that did not read what waits go on by themselves, from what all have read."""
        apart = stream.missing
        if apart:
            before = CovarianceStream.resumed(stream.covariance.value())
            other = _Stream(before, set(apart))
            stream.readers -= apart
            self._streams.update(dict.fromkeys(apart, other))
        stream.take()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is(known: Tensor | None, version: int, tensor: Tensor) -> bool:
    return known is tensor and _version(tensor) == version
