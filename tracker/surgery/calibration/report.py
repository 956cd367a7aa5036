"""What `calibrate` gives back: a number of layers, and for people what they were observed with."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.utils.notebook import as_html
from tracker.utils.text import fitting, in_line


class Calibrated(int):
    """How many weights of layers were observed reading; prints as what they read, and in which loss it counts.

    Attributes:
        layers: Names of the layers that read units which may go: what they read was observed.
        samples: That passed.
        batches: That passed.
        taken: What of each batch the model takes; None where batches were calls.
        loss: In which changes are priced; None where no gradients could be taken, or several processes take part:
            errors count relative to what each layer puts out.

    Examples:
        >>> engine.calibrate(x.split(16), progress=False)
        calibrated: what 2 layers read, with 64 samples in 4 batches
          layers: 2, 4
          of each batch the model takes (Tensor(16, 4))
          changes are priced in: squared change of the output, relative to its variance
    """

    layers: tuple[str, ...]
    samples: int
    batches: int
    taken: str | None
    loss: str | None

    def __new__(
        cls,
        count: int,
        layers: Sequence[str] = (),
        samples: int = 0,
        batches: int = 0,
        taken: str | None = None,
        loss: str | None = None,
    ) -> Calibrated:
        """The number, and what it is of."""
        made = super().__new__(cls, count)
        made.layers, made.samples, made.batches = tuple(layers), samples, batches
        made.taken, made.loss = taken, loss
        return made

    def __repr__(self) -> str:
        """For people."""
        names = [in_line(name) for name in self.layers]
        more = f" and {len(names) - 8:,} more" if len(names) > 8 else ""
        priced = self.loss or "what each layer puts out, since no gradients were taken"
        lines = [
            f"calibrated: what {_of(len(names), 'layer', 'layers')} read, with "
            f"{_of(self.samples, 'sample', 'samples')} in {_of(self.batches, 'batch', 'batches')}",
            f"  layers: {', '.join(names[:8])}{more}",
            *([f"  {self.taken}"] if self.taken else []),
            f"  changes are priced in: {priced}",
        ]
        return "\n".join(map(fitting, lines))

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)

    def _repr_html_(self) -> str:
        return as_html(repr(self))


def _of(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
