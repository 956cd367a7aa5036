"""Statistics → findings: which neurons are dead, constant, redundant. Pure: reads frozen observations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tracker.compensation import explained_share
from tracker.errors import StatisticsError
from tracker.observation.records import LayerObservation, Observation

# A neuron whose standard deviation is below fp32's rounding of its largest value does not vary.
_ROUNDING = torch.finfo(torch.float32).eps

Pair = tuple[int, int, float]  # two slots of a layer, i < j, and their correlation


@dataclass(frozen=True)
class LayerFindings:
    """What the statistics of one layer say about its neurons: (neurons,) bool tensors."""

    layer: LayerObservation

    @cached_property
    def observed(self) -> Tensor:
        """Saw at least one finite value."""
        return self.layer.activity.observations > 0

    @cached_property
    def unreliable(self) -> Tensor:
        """Showed NaN or infinite values: judged neither dead nor constant."""
        return self.layer.activity.nonfinite > 0

    @cached_property
    def dead(self) -> Tensor:
        """Never fired. Not observed is not dead."""
        silent = self.layer.activity.firing_frequency == 0
        return silent & self.observed & ~self.unreliable

    @cached_property
    def constant(self) -> Tensor:
        """Did not vary, to the precision of fp32, over two or more observations; includes most dead ones."""
        a = self.layer.activity
        largest = torch.maximum(a.minimum.abs(), a.maximum.abs())
        still = a.variance.sqrt() <= _ROUNDING * largest
        return still & (a.observations > 1) & ~self.unreliable

    def status(self, slot: int) -> str:
        """One word for one neuron: what a user should know of it first."""
        if self.unreliable[slot]:
            return "non-finite"
        if not self.observed[slot]:
            return "not observed"
        if self.dead[slot]:
            return "dead"
        return "constant" if self.constant[slot] else "active"

    def pairs(self, threshold: float) -> list[Pair]:
        """Pairs of neurons with |correlation| ≥ threshold; constant neurons have none."""
        covariance = self.layer.covariance
        if covariance is None:
            raise StatisticsError(
                "Correlation was not observed. Begin the window with start_tracking(enable_correlation_analysis=True)."
            )
        still = self.constant
        found = covariance.pairs_above(threshold)
        return [(i, j, r) for i, j, r in found if not (still[i] or still[j])]

    def explained_by(self, keep: int, drop: int) -> tuple[float, float, float]:
        """The best affine map drop ≈ scale·keep + offset: (share of variance explained, scale, offset)."""
        covariance = self.layer.covariance
        if covariance is None:
            raise StatisticsError("Correlation was not observed.")
        c = covariance.comoment
        scale = float(c[keep, drop] / c[keep, keep])
        share = float(c[keep, drop].square() / (c[keep, keep] * c[drop, drop]))
        offset = float(covariance.mean[drop]) - scale * float(covariance.mean[keep])
        return min(share, 1.0), scale, offset


def analyse(observation: Observation) -> dict[str, LayerFindings]:
    """Findings of every layer, by name."""
    return {layer.name: LayerFindings(layer) for layer in observation.layers}


def neuron_statistics(findings: LayerFindings, slot: int, samples: int) -> dict[str, Any]:
    """Everything known about one neuron, as plain numbers. NaN where nothing was observed."""
    a = findings.layer.activity
    variance, zeros = float(a.variance[slot]), float(a.zero_fraction[slot])
    frequency = float(a.firing_frequency[slot])
    return {
        "layer_name": findings.layer.name,
        "local_index": slot,
        "mean": float(a.mean[slot]),
        "variance": variance,
        # The brief's word for the share of non-zero activations; zero_fraction is the field's meaning.
        "sparsity": 1 - zeros,
        "zero_fraction": zeros,
        "mean_activation": float(a.mean[slot]),
        "std_deviation": variance**0.5,
        "min_activation": float(a.minimum[slot]),
        "max_activation": float(a.maximum[slot]),
        "firing_frequency": frequency,
        "is_dead": bool(findings.dead[slot]),
        "status": findings.status(slot),
        "batches": int(a.batches[slot]),
        "observations": int(a.observations[slot]),
        "nonfinite": int(a.nonfinite[slot]),
        "total_samples": samples if a.batches[slot] else 0,
    }


def layer_statistics(findings: LayerFindings) -> dict[str, Any]:
    """One layer in plain numbers; averages are over the neurons that were observed."""
    layer, seen = findings.layer, findings.observed
    a = layer.activity
    dead = int(findings.dead.sum())
    return {
        "layer_type": layer.kind,
        "total_neurons": len(layer.ids),
        "observed_neurons": int(seen.sum()),
        "dead_neurons": dead,
        "dead_percentage": 100.0 * dead / len(layer.ids),
        "constant_neurons": int((findings.constant & ~findings.dead).sum()),
        "nonfinite_neurons": int(findings.unreliable.sum()),
        "avg_firing_frequency": _mean(a.firing_frequency[seen]),
        "avg_mean_activation": _mean(a.mean[seen]),
        "avg_std_deviation": _mean(a.variance[seen].sqrt()),
        "is_output": layer.is_output,
        "problem": layer.problem,
        "observed_at": layer.place,
        "fallback": layer.fallback,
    }


def redundancy_statistics(findings: LayerFindings, threshold: float) -> dict[str, Any]:
    """How redundant one layer is; the rate is redundant pairs over all pairs of the layer."""
    pairs = findings.pairs(threshold)
    n = len(findings.layer.ids)
    strengths = [abs(r) for _, _, r in pairs]
    return {
        "total_neurons": n,
        "redundant_pairs": len(pairs),
        "redundant_neurons": len({slot for i, j, _ in pairs for slot in (i, j)}),
        "redundancy_rate": len(pairs) / (n * (n - 1) / 2) if n > 1 else 0.0,
        "min_correlation": min(strengths, default=0.0),
        "max_correlation": max(strengths, default=0.0),
        "avg_correlation": sum(strengths) / len(strengths) if strengths else 0.0,
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else float("nan")


def explained_shares(found: LayerFindings) -> list[float]:
    """How much of each neuron's variance all the others of its layer explain; NaN for constant ones."""
    covariance = found.layer.covariance
    assert covariance is not None
    moment = covariance.comoment / covariance.count.clamp(min=1)[:, None]
    return explained_share(moment, covariance.mean).tolist()
