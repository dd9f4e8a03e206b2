"""Stats -> coefficient -> gradients: what the functions and the optimizer wrapper do after their checks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.backends import plan
from fastclip.stats import GradStats, read, stats_of
from fastclip.tensors import Grads
from fastclip.types import CLIP_COEF, TOTAL_INFS, TOTAL_NANS, Request, wide_dtype


class Outcome(NamedTuple):
    """What one clip did.

    Attributes:
        total_norm: before clipping, as the caller gets it.
        clip_coef: what the gradients were multiplied by; 1.0 if they are untouched. A tensor where the host
            would have to wait for it.
        found_inf: whether a gradient is not finite; a 0-d float32 tensor where the host would have to wait.
    """

    total_norm: Tensor
    clip_coef: float | Tensor
    found_inf: bool | Tensor


def clip_(grads: Grads, request: Request, nonfinite: str) -> Outcome:
    """Clips by the joint norm, under one of the rules of NONFINITE."""
    if not grads.tensors:
        return Outcome(torch.tensor(0.0), 1.0, False)
    work = plan(grads)
    if request.max_norm != math.inf or nonfinite == "zero":
        work.check_writable()
    reading = read(work, request)
    if nonfinite == "raise":
        reading.check_finite()
    found_inf: bool | Tensor
    if reading.on_host is not None:
        found_inf = reading.on_host[TOTAL_NANS] + reading.on_host[TOTAL_INFS] > 0
    else:
        found_inf = reading.found_inf
    if nonfinite == "zero" and found_inf is not False:
        work.zero_nonfinite_()
        reading = read(work, request)
    clip_coef: float | Tensor
    if reading.on_host is not None:
        clip_coef = 1.0 if nonfinite == "skip" and found_inf else reading.on_host[CLIP_COEF]
    else:
        clip_coef = reading.totals[CLIP_COEF]
        if nonfinite == "skip":
            clip_coef = torch.where(reading.found_inf > 0, 1.0, clip_coef)
    if isinstance(clip_coef, Tensor) or clip_coef != 1.0:
        work.scale_(clip_coef)
    return Outcome(reading.total_norm, clip_coef, found_inf)


def clamp_(grads: Grads, bound: float) -> None:
    """Clamps every element into [-bound, bound]."""
    for index, grad in enumerate(grads.tensors):
        if grad.is_complex():
            raise RuntimeError(
                f"the gradient of {grads.describe(index)} is complex, and complex numbers have no order to clamp "
                "by; use clip_grad_norm_"
            )
    work = plan(grads)
    work.check_writable()
    work.clamp_(bound)


def total_norm(grads: Grads, request: Request, error_if_nonfinite: bool) -> Tensor:
    """The joint norm alone."""
    if not grads.tensors:
        return torch.tensor(0.0)
    reading = read(plan(grads), request)
    if error_if_nonfinite:
        reading.check_finite()
    return reading.total_norm


def scale_by_norm_(grads: Grads, request: Request, total_norm: Tensor | float) -> None:
    """Clips by a norm that is already known."""
    if not grads.tensors or request.max_norm == math.inf:
        return
    work = plan(grads)
    work.check_writable()
    if isinstance(total_norm, Tensor):
        norm = total_norm.detach().reshape(()).to(wide_dtype(total_norm.device))
    else:
        norm = torch.tensor(float(total_norm), dtype=torch.float64)
    clip_coef = torch.where(norm <= request.max_norm, 1.0, request.max_norm / (norm + request.eps))
    # a norm on a device is not waited for, a meta or fake one has no value
    on_host = clip_coef.device.type == "cpu" and type(clip_coef) is Tensor
    if not on_host or float(clip_coef) != 1.0:
        work.scale_(float(clip_coef) if on_host else clip_coef)


def grad_stats(grads: Grads, request: Request) -> GradStats:
    """Statistics alone; writes nothing."""
    return stats_of(read(plan(grads), request), request)
