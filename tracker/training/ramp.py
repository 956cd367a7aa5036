"""How the way to a budget is spread over the looks of a run: how much by when."""

from __future__ import annotations

from tracker.training.choices import Size


def step_of(ahead: int | None, power: float | None) -> float | None:
    """Share of what is left of the way to a budget that one look takes; None where nothing is spread.

    After look k of K the share (1 - k/K)^power of the way is left: equal parts at 1, large ones first at 3 (Zhu and
    Gupta, 2017, arXiv:1710.01878). Told from what is left, it makes up for looks that brought less, or were taken back.

    Args:
        ahead: Looks that follow; None where nobody knows.
        power: Of the schedule; None for none.
    """
    if ahead is None or power is None:
        return None
    return 1.0 - float((ahead / (ahead + 1)) ** power)


def paced(
    least: Size, most: Size, bounded: tuple[bool, ...], share: float | None
) -> tuple[Size, Size]:
    """What may go, and come, at one look that takes a share of the way.

    Args:
        least: What may go in all; negative where the network is below its bounds.
        most: What may come in all; negative where it is above them.
        bounded: Of which measures there is a lower bound: without one, what costs little goes at once.
        share: As of `step_of`.
    """
    if share is None:
        return least, most
    goes = [
        min(low, -share * top) if top < 0 else low * share if bound and low > 0 else low
        for low, top, bound in zip(least, most, bounded, strict=True)
    ]
    comes = [top if top == float("inf") else top * share for top in most]
    return Size(*goes), Size(*comes)
