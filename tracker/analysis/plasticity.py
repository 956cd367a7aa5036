"""How able a layer is to learn on: dormant neurons and the effective rank of its features. Pure: reads findings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracker.analysis.findings import LayerFindings
from tracker.errors import StatisticsError
from tracker.statistics import Covariance

DORMANT = 0.1  # of the layer's mean activation: Sokar et al. take 0 to 0.1
MEAN, ROOT = "mean |activation|", "root mean square of the activation"


def dormancy(found: LayerFindings) -> tuple[Tensor, str]:
    """Each neuron's activation relative to the mean of its layer, (neurons,) float64, and what was taken for it.

    The score of Sokar et al. (2023, arXiv:2302.12902): E|h| over the layer's mean of E|h|. Where no neuron shows both
    signs, as behind a ReLU, E|h| is |E h|; else the root mean square stands for it, which is never less.
    NaN where nothing was observed; 0 in a layer that says nothing at all.
    """
    a = found.layer.activity
    one_sign = (a.minimum >= 0) | (a.maximum <= 0) | ~found.observed
    size = a.mean.abs() if bool(one_sign.all()) else (a.variance + a.mean.square()).sqrt()
    usual = size[found.observed & ~found.unreliable].mean()
    score = torch.where(size > 0, size / usual, size)
    return score, MEAN if bool(one_sign.all()) else ROOT


def effective_rank(covariance: Covariance) -> float:
    """exp(entropy of the singular values of the features, as shares of their sum): from 1 to the number of neurons.

    Of the matrix (observations, neurons) itself, not centred, by the eigenvalues of its second moment (Roy & Vetterli,
    2007); NaN where nothing was observed, or the neurons did not all see the same.
    """
    count = covariance.count
    if not len(count) or not int(count.min()) or int(count.min()) != int(count.max()):
        return float("nan")
    moment = covariance.comoment / count[0] + torch.outer(covariance.mean, covariance.mean)
    values = torch.linalg.eigvalsh(moment).clamp(min=0).sqrt()
    total = values.sum()
    if not bool(total > 0):
        return float("nan")
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def plasticity(found: LayerFindings, threshold: float = DORMANT) -> dict[str, Any]:
    """One layer in plain numbers.

    Args:
        found: Of the layer.
        threshold: Score up to which a neuron is dormant.

    Raises:
        StatisticsError: The threshold is no score.
    """
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold < float("inf"):
        raise StatisticsError(f"A neuron is dormant up to a score of 0 or more, not {threshold!r}.")
    score, measure = dormancy(found)
    seen = found.observed & ~found.unreliable
    dormant = (score <= threshold) & seen
    slots = dormant.nonzero().flatten().tolist()
    covariance = found.layer.covariance
    return {
        "neurons": len(found.layer.ids),
        "dormant_ids": [found.layer.ids[slot] for slot in slots],
        "dormant_share": len(slots) / int(seen.sum()) if bool(seen.any()) else float("nan"),
        "dormant_threshold": float(threshold),
        "dormant_measure": measure,
        "effective_rank": None if covariance is None else effective_rank(covariance),
    }
