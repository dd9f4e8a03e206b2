"""Steps whose norm is far above the usual do not happen."""

from __future__ import annotations

import torch

from fastclip.checks import number, positive, whole
from fastclip.policies.base import Decision, total_norm
from fastclip.policies.moments import Learner
from fastclip.policies.percentile import Windowed
from fastclip.reading import Reading


class SkipLarge(Learner):
    """Skips a step when log(norm) exceeds its running mean by more than ``k`` deviations. Clips nothing.

    Args:
        k: deviations of log(norm).
        alpha: decay of mean and variance.
        warmup: norms that are only learned from; at least the first is.
        floor: the deviation of log(norm) is never taken for less: 0.05 lets norms differ by 5 k percent.

    What it learns from a skipped step is the largest norm it would have let pass: a lasting change of level is
    followed, not skipped for ever. A norm of 0 or one that isn't finite teaches nothing.

    Source: Chen et al. 2018 (RNMT+), arXiv:1804.09849.
    """

    total_only, writes = True, False

    def __init__(self, k: float = 4.0, *, alpha: float = 0.97, warmup: int = 25, floor: float = 0.05) -> None:
        super().__init__(alpha, warmup)
        self.k, self.floor = positive("k", k), number("floor", floor)

    def decide(self, reading: Reading) -> Decision:
        self.to(reading.totals.device)
        norm, warm = total_norm(reading), self.is_warm
        valid = torch.isfinite(norm) & (norm > 0)
        log_norm = torch.where(valid, norm, 1.0).log()
        largest = torch.where(warm, self.mean + self.k * self.var.sqrt().clamp(min=self.floor), torch.inf)
        self.learn(torch.minimum(log_norm, largest), valid, warm)
        return Decision(skip=valid & (log_norm > largest))


class SkipAboveMedian(Windowed):
    """Skips a step when its norm exceeds ``factor`` times the median of the latest norms. Clips nothing.

    Args:
        factor: of the median.
        window: how many norms are remembered; a norm of 0 or one that isn't finite is never one of them.
        warmup: nothing is skipped before so many have been seen.

    Norms of skipped steps are remembered too, so a lasting change of level is followed within half a window.

    Source: the rule of OLMo-core's skip-step optimizers, which keep NaN in their window.
    """

    total_only, writes = True, False

    def __init__(self, factor: float = 10.0, *, window: int = 128, warmup: int = 16) -> None:
        self.factor = positive("factor", factor)
        super().__init__(window)
        self.warmup = whole("warmup", warmup)

    def decide(self, reading: Reading) -> Decision:
        norm = total_norm(reading).reshape(1)
        window = self.fit(1, norm)
        median = window.at((window.lengths - 1).clamp(min=0).to(norm) * 0.5)
        large = (window.counts >= self.warmup) & torch.isfinite(norm) & (norm > self.factor * median)
        window.push(norm, torch.isfinite(norm) & (norm > 0))
        return Decision(skip=large[0])
