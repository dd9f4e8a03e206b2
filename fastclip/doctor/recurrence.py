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
        path = f"norm {norms[-1]:.2g} at step {steps}, {norms[0]:.2g} at step 1"
        if growth > 1.0 / TOLD:
            yield Finding(
                "exploding-time",
                ERROR if growth > 1.0 / HOPELESS else WARNING,
                f"the gradient grows {growth:.2g} times over {steps} time steps of layer {curve.layer}, {each:.3g} "
                "times per "
                f"step: {path}",
                f"start its recurrent weight orthogonal, {_orthogonal(curve)}, and clip: "
                "fastclip.ClippedOptimizer(optimizer, max_norm=1.0); over long sequences also fastclip.clip_boundary "
                "between chunks",
                (curve.layer,),
                numbers,
            )
        elif growth < TOLD:
            yield Finding(
                "vanishing-time",
                WARNING if growth < LOST else INFO,
                f"the gradient shrinks to {growth:.2g} of its size over {steps} time steps of layer {curve.layer}, to "
                f"{each:.2g} per step: {path}; it can't learn from what lies that far back",
                _longer(curve),
                (curve.layer,),
                numbers,
            )


def _orthogonal(curve: Curve) -> str:
    if curve.kind in ("RNN", "LSTM", "GRU"):
        return f"torch.nn.init.orthogonal_(model.get_submodule({curve.layer!r}).weight_hh_l0)"
    if curve.kind in ("RNNCell", "LSTMCell", "GRUCell"):
        return f"torch.nn.init.orthogonal_(model.get_submodule({curve.layer!r}).weight_hh)"
    return "torch.nn.init.orthogonal_"


def _longer(curve: Curve) -> str:
    """What makes a memory longer, of this kind of layer."""
    others = "let the loss see more steps than the last, or use attention"
    if curve.kind.startswith("LSTM"):
        bias = "bias_hh" if curve.kind == "LSTMCell" else "bias_hh_l0"
        return (
            f"open its forget gates: lstm = model.get_submodule({curve.layer!r}); "
            f"torch.nn.init.ones_(lstm.{bias}.data[lstm.hidden_size : 2 * lstm.hidden_size]); or {others}"
        )
    if curve.kind.startswith("GRU"):
        return others
    return f"use torch.nn.LSTM or GRU, or start the recurrent weight orthogonal, {_orthogonal(curve)}; or {others}"
