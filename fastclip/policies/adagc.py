"""A bound for each gradient that follows its own norm."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.checks import fraction, number, positive, whole
from fastclip.policies.base import Decision, Policy, coef_for
from fastclip.reading import Reading
from fastclip.types import NORM, TOTAL_NORM


class AdaGC(Policy):
    """Clips each gradient to ``lam`` times a running average of its own clipped norm.

    For the first ``warmup`` steps all are clipped by the joint norm to ``lam_abs``, and each average is the least norm
    that this has left of its gradient.

    Args:
        lam: a gradient may exceed its average by this factor.
        lam_abs: bound of the joint norm during the warm-up.
        beta: decay of the averages.
        warmup: number of steps.
        floor: no average falls below it. A gradient of exactly 0 teaches nothing: it would silence its parameter.

    Source: AdaGC, Wang et al. 2025, arXiv:2502.11034.
    """

    learned = ("step", "averages")
    per_tensor = True

    def __init__(
        self, lam: float = 1.05, *, lam_abs: float = 1.0, beta: float = 0.98, warmup: int = 100, floor: float = 1e-8
    ) -> None:
        self.lam, self.lam_abs = positive("lam", lam), number("lam_abs", lam_abs)
        self.beta, self.warmup = fraction("beta", beta), whole("warmup", warmup)
        self.floor = number("floor", floor)
        self.step = torch.zeros((), dtype=torch.int64)
        self.averages: Tensor = torch.empty(0, dtype=torch.float64)  # Inf: nothing learned yet

    def decide(self, reading: Reading) -> Decision:
        norms, columns, total = reading.rows[NORM], reading.columns, reading.totals[TOTAL_NORM]
        self.to(norms.device)
        missing = reading.parameters - len(self.averages)
        if missing > 0:
            self.averages = torch.cat([self.averages, self.averages.new_full((missing,), torch.inf)])
        self.averages = self.averages[: reading.parameters]  # there may be fewer than there were
        own = self.averages if columns is None else self.averages[columns]
        warm = self.step >= self.warmup
        coefs = torch.where(warm, coef_for(norms, self.lam * own, 0.0), coef_for(total, self.lam_abs, 1e-6))
        after = torch.where(torch.isinf(own), norms, self.beta * own + (1.0 - self.beta) * coefs * norms)
        learnt = torch.where(warm, after, torch.minimum(own, coefs * norms)).clamp(min=self.floor)
        # in the warm-up another gradient's NaN or Inf is in every coefficient
        valid = torch.isfinite(norms) & (norms > 0) & (warm | torch.isfinite(total))
        learnt = torch.where(valid, learnt, own)
        self.averages = learnt if columns is None else self.averages.index_copy(0, columns, learnt)
        self.step = self.step + torch.isfinite(total)
        return Decision(coefs)
