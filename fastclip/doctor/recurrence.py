"""Exploding and vanishing over time: gradients from time step to time step of a recurrent layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastclip.doctor.depth import HOPELESS, MIN_FIT, TOLD
from fastclip.doctor.diagnosis import ERROR, INFO, WARNING, Curve, Finding
from fastclip.doctor.sequences import MIN_STEPS
from fastclip.doctor.trend import trend_of

# The gradient of a recurrent weight is a sum over time: what is smaller than this beside the largest term leaves no
# trace in it.
LOST = torch.finfo(torch.float32).eps


def findings(curves: list[Curve]) -> Iterator[Finding]:
    """Of the growth of the gradient from the last time step to the first one (Pascanu et al. 2013)."""
    for curve in curves:
        norms = list(curve.norms)
        while norms and not norms[-1] > 0:  # padding, or steps behind the one that the loss looks at
            norms.pop()
        trend = trend_of(norms, MIN_STEPS)
        if trend is None or trend.fit < MIN_FIT:
            continue
        growth, each, steps = 1.0 / trend.total, 1.0 / trend.factor, len(norms)
        numbers = {"growth": growth, "per_step": each, "steps": float(steps), "first": norms[0], "last": norms[-1]}
        path = f"from step {steps} ({norms[-1]:.2g}) back to step 1 ({norms[0]:.2g})"
        if growth > 1.0 / TOLD:
            yield Finding(
                "exploding-time",
                ERROR if growth > 1.0 / HOPELESS else WARNING,
                f"the gradient grows {growth:.2g} times over {steps} time steps of {curve.layer}, {each:.3g} times per "
                f"step: {path}",
                "start the recurrent weight orthogonal, torch.nn.init.orthogonal_(rnn.weight_hh_l0), and clip: "
                "fastclip.ClippedOptimizer(optimizer, max_norm=1.0); over long sequences fastclip.clip_boundary "
                "between chunks",
                (curve.layer,),
                numbers,
            )
        elif growth < TOLD:
            yield Finding(
                "vanishing-time",
                WARNING if growth < LOST else INFO,
                f"the gradient shrinks to {growth:.2g} of its size over {steps} time steps of {curve.layer}, to "
                f"{each:.2g} per step: {path}; it can't learn from what lies that far back",
                "use an LSTM whose forget gate starts open, "
                "torch.nn.init.ones_(lstm.bias_hh_l0[hidden:2 * hidden]), or a GRU, or attention, or let the "
                "loss see more steps than the last",
                (curve.layer,),
                numbers,
            )
