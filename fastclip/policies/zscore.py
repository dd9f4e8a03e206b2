"""A bound some deviations above the running mean of the norms."""

from __future__ import annotations

import torch

from fastclip.checks import number, positive
from fastclip.policies.base import Decision, total_norm
from fastclip.policies.moments import Learner
from fastclip.reading import Reading


class ZScore(Learner):
    """Clips a norm that lies more than ``z_threshold`` deviations above the running mean of the norms.

    With z = (norm - mean) / deviation above the threshold, the bound is mean + z_threshold * deviation / (z /
    z_threshold): the further out, the closer to the mean. Mean and deviation learn the clipped norm.

    Args:
        z_threshold: deviations from which on a norm is clipped.
        alpha: decay of mean and variance.
        warmup: norms that are only learned from, before anything is clipped by this rule; at least the first is. A
            norm of 0 or one that isn't finite is not among them, then or later.
        floor: the deviation is never taken for less than this share of the mean, so that a stretch of equal norms
            doesn't make an outlier of every change.
        eps: added to the deviation, and to the norm in the denominator.

    For a cap beside it, also during the warm-up, as ZClip has one: ``Chain(ZScore(), GlobalNorm(1.0))``.

    Source: ZClip, Kumar et al. 2025, arXiv:2504.02507.
    """

    total_only = True

    def __init__(
        self,
        z_threshold: float = 2.5,
        *,
        alpha: float = 0.97,
        warmup: int = 25,
        floor: float = 1e-3,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(alpha, warmup)
        self.z_threshold = positive("z_threshold", z_threshold)
        self.floor, self.eps = number("floor", floor), number("eps", eps)

    def decide(self, reading: Reading) -> Decision:
        self.to(reading.totals.device)
        norm, warm = total_norm(reading), self.is_warm
        deviation = torch.maximum(self.var.sqrt(), self.floor * self.mean)
        z = (norm - self.mean) / (deviation + self.eps)
        outlier = warm & (z > self.z_threshold)
        bound = torch.where(outlier, self.mean + self.z_threshold**2 * deviation / z, torch.inf)
        self.learn(torch.minimum(norm, bound), torch.isfinite(norm) & (norm > 0), warm)
        return Decision(torch.where(outlier, bound / (norm + self.eps), 1.0))
