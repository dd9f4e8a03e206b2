"""Running mean and variance that start as plain ones and forget slowly after that."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.checks import fraction, whole
from fastclip.policies.base import Policy


class Learner(Policy):
    """A policy that learns the mean and variance of one number per step.

    Over the first ``warmup`` values they are plain mean and population variance, seeded by the values themselves;
    after that exponential averages with decay ``alpha``. A value that isn't valid leaves no trace.
    """

    learned = ("count", "mean", "var")

    def __init__(self, alpha: float, warmup: int) -> None:
        self.alpha = fraction("alpha", alpha)
        self.warmup = whole("warmup", warmup)
        self.count = torch.zeros((), dtype=torch.int64)
        self.mean = torch.zeros((), dtype=torch.float64)
        self.var = torch.zeros((), dtype=torch.float64)

    @property
    def is_warm(self) -> Tensor:
        """0-d bool: whether there is enough to judge by."""
        return self.count >= max(self.warmup, 1)

    def learn(self, value: Tensor, valid: Tensor, warm: Tensor) -> None:
        """Takes in a 0-d value, where ``valid``; ``warm`` says whether the warm-up is over."""
        step = torch.where(warm, 1.0 - self.alpha, (self.count + 1).to(self.mean).reciprocal())
        delta = value - self.mean
        mean = torch.addcmul(self.mean, step, delta)
        residual = value - mean
        var = torch.lerp(self.var, torch.where(warm, residual, delta) * residual, step)
        valid = valid & torch.isfinite(var)  # norms of 1e300 have squares that no float64 holds
        self.mean = torch.where(valid, mean, self.mean)
        self.var = torch.where(valid, var, self.var)
        self.count = self.count + valid
