"""What a policy is given when it decides, and what it gives: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Size(NamedTuple):
    """Of a network, or of one unit of it.

    Attributes:
        parameters: Numbers in its parameters.
        flops: Of one forward pass of the example inputs.
        latency: Of such a pass, in milliseconds; 0 where no budget asks for it. A unit's is its share of the FLOPs.

    Examples:
        >>> from tracker import Size
        >>> Size(parameters=115, flops=200).latency
        0.0
    """

    parameters: float
    flops: float
    latency: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one group of units when the policy looks.

    Attributes:
        name: Of the group, as in `structure.groups`.
        layer: The layer that makes the units.
        size: Units.
        order: Units, those first that matter least.
        errors: Predicted relative rise of the loss once 1, 2, … units are gone, in `order`; to one behind the
            tolerance, unless a budget or a policy of the user's own may want more.
        cost: Of one unit.
        dead: Units of which the consumers read a constant.
        effect: Predicted relative rise of the loss if the consumers read nothing but the mean of all units: what the
            group is worth by now; infinite where the loss tells nothing.
        dormant: Units that say so little that the policy gives them a new start: see its `dormant`.
        pairs: (unit that stays, unit that is folded into it), each unit in one part only.
        merge_errors: Predicted relative rise of the loss once 1, 2, … pairs are folded, in the order of `pairs`.
        deeper: At most what a layer of the same width behind its own would cost; None where none can stand.
        floor: Units that must stay, as the policy protects them.
        means, variances: Of what the consumers read of each unit; of several columns (a head) the mean and the sum.
        gradient: Norm of the loss's gradient by the weights that make the units, root mean square over the look's
            passes; 0.0 where none came, and unless a policy of the user's own decides.
        gains: Predicted relative fall of the loss by the first, second, … unit that comes; none where nothing tells.
        in_loss: Whether gradients told how the loss depends on the consumers. Else errors are shares of what they
            compute.

    Examples:
        >>> from tracker import Candidate, Size
        >>> small = Candidate("0", "0", size=3, order=(2, 0, 1), errors=(0.0, 0.01), cost=Size(11, 20))
        >>> small.order[:1]  # the unit that matters least
        (2,)
    """

    name: str
    layer: str
    size: int
    order: tuple[int, ...]
    errors: tuple[float, ...]
    cost: Size
    dead: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    merge_errors: tuple[float, ...] = ()
    deeper: Size | None = None
    floor: int = 0
    means: tuple[float, ...] = ()
    variances: tuple[float, ...] = ()
    gradient: float = 0.0
    gains: tuple[float, ...] = ()
    in_loss: bool = True
    dormant: tuple[int, ...] = ()
    effect: float = float("inf")


@dataclass(frozen=True, slots=True)
class Bypass:
    """A layer, or a residual block, that could be removed.

    Attributes:
        name: Of the layer or block.
        error: Relative error of the model's outputs without it, what is left refitted; of inputs that the fit did not
            see.
        cost: What would be saved.

    Examples:
        >>> from tracker import Bypass, Size
        >>> Bypass("2", error=0.004, cost=Size(parameters=54, flops=96)).error
        0.004
    """

    name: str
    error: float
    cost: Size


@dataclass(frozen=True, slots=True)
class Requests:
    """What a policy wants done, and why, or why nothing.

    One kind of change is made at a time: the first that is not empty of remove, insert, drop, merge, recycle, expand.

    Attributes:
        why: For the decision log.
        remove: Group name → units that go.
        recycle: Group name → units that get a new start.
        expand: Group name → units to add.
        merge: Group name → (keep, drop) units.
        insert: Layers behind which one is inserted.
        drop: Layers and blocks that are removed.

    Examples:
        >>> from tracker import Requests
        >>> Requests("the gradient is large", expand={"0": 8}).groups
        ('0',)
    """

    why: str
    remove: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    recycle: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    expand: Mapping[str, int] = field(default_factory=dict)
    merge: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    insert: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """All that is to change, groups and layers by their names."""
        return (
            *self.remove,
            *self.recycle,
            *self.expand,
            *self.merge,
            *self.insert,
            *self.drop,
        )
