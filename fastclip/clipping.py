"""Gradients -> reading -> verdict -> write: what the functions and the optimizer wrapper do after their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastclip.backends import plan
from fastclip.policies import Decision, Policy
from fastclip.stats import GradStats, Reading, any_of, check_may_wait, read, stats_of
from fastclip.tensors import Grads
from fastclip.types import MAX_ABS, Request, Strengths, known_to_host, wide_dtype
from fastclip.units import unit_dims


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy decided for its gradients; they are not clipped yet.

    Attributes:
        reading: what it saw; ``reading.plan`` is the way to the gradients.
        decision: what it made of it, for the unscaled gradients.
    """

    reading: Reading
    decision: Decision

    @property
    def is_one_number(self) -> bool:
        """Whether all gradients are multiplied by the same, and nothing else happens to them."""
        coef, _, unit_coefs, clamp = self.decision
        return unit_coefs is None and clamp is None and not (isinstance(coef, Tensor) and coef.dim() > 0)

    @property
    def clipped(self) -> bool | Tensor:
        """Whether it changes a gradient; a 0-d tensor where the host would have to wait for the answer."""
        coef, _, unit_coefs, clamp = self.decision
        reasons: list[bool | Tensor] = []
        if clamp is not None:  # which asks for the largest magnitudes
            reasons.append(~(self.reading.rows[MAX_ABS] <= clamp).all())  # NaN hides how large the others are
        for factor in (coef, unit_coefs):
            if isinstance(factor, Tensor):
                reasons.append((factor != 1.0).any())
            elif factor is not None:
                reasons.append(factor != 1.0)
        return any_of(reasons)

    @property
    def _is_idle(self) -> bool:
        """Whether the host knows, without any work on a device, that no gradient is changed."""
        coef, _, unit_coefs, clamp = self.decision
        factors = [factor for factor in (coef, unit_coefs) if isinstance(factor, Tensor)]
        looked_at = factors if clamp is None else [*factors, self.reading.rows]
        return all(known_to_host(values) for values in looked_at) and self.clipped is False

    def apply(self, grad_scale: float | Tensor | None = None, skip: bool | Tensor = False) -> None:
        """Multiplies the gradients by ``clip_coef``, divided by ``grad_scale`` if they are scaled; not if ``skip``."""
        if grad_scale is None and self._is_idle:
            return
        coef, _, unit_coefs, clamp = self.decision
        if clamp is not None and isinstance(skip, Tensor):
            skip = bool(skip)
        if skip is True:
            return
        plan, units = self.reading.plan, self.reading.units
        factor = coef if unit_coefs is None else unit_coefs
        factor = factor if grad_scale is None else factor / grad_scale
        if isinstance(skip, Tensor):  # selected, not multiplied by 0: 0 x NaN is NaN
            if not isinstance(factor, Tensor):
                factor = torch.full((), factor, dtype=wide_dtype(skip.device), device=skip.device)
            factor = torch.where(skip > 0, 1.0, factor)
        if unit_coefs is not None and units is not None:
            plan.scale_units_(units.dims, units.counts, torch.as_tensor(factor))
        elif isinstance(factor, Tensor) or factor != 1.0:
            plan.scale_(factor)
        if clamp is not None:
            plan.clamp_(clamp)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was read for one policy.

    Attributes:
        policy: the rule that asked.
        reading: what it gets to see.
        found_inf: whether a gradient is not finite, or was not before "zero"; a 0-d tensor where the host would have
            to wait for it.
    """

    policy: Policy
    reading: Reading
    found_inf: bool | Tensor

    def decide(self) -> Verdict:
        """Has the policy decide, once: it may learn from what it sees."""
        decision = self.policy.decide(self.reading)
        coef = decision.clip_coef
        if isinstance(coef, Tensor) and coef.dim() == 0 and known_to_host(coef):
            decision = decision._replace(clip_coef=float(coef))
        return Verdict(self.reading, decision)


def examine(
    shares: list[tuple[Grads, Policy]],
    nonfinite: str,
    grad_scale: float | Tensor | None = None,
    penalties: list[Strengths] | None = None,
) -> list[Finding]:
    """Reads for each policy its own gradients, under one of the rules of NONFINITE for all. No share is empty.

    With ``penalties``, one for each share, they are added in the same pass. Every check comes before the first write:
    with "raise" and penalties that takes a read more. Without penalties "zero" is the only rule that writes here.

    Raises:
        UnsupportedGradientError: a gradient can't be read, or can't be written though that might be needed.
        NonFiniteGradientError: with "raise".
    """
    for grads, policy in shares:
        if policy.clamps:
            check_real(grads)
    asked = [(plan(grads), policy.request()) for grads, policy in shares]
    for (work, _), (_, policy) in zip(asked, shares, strict=True):
        if policy.writes or grad_scale is not None or nonfinite == "zero" or penalties is not None:
            work.check_writable()
    if nonfinite == "raise":
        check_may_wait('nonfinite="raise"', 'use "skip" or "propagate"')
    if any(len({part.table.grads[0].device for part in work.parts}) > 1 for work, _ in asked if len(work.parts) > 1):
        check_may_wait("a list of gradients on several devices", "clip each device's own in its own graph")
    if penalties is None:
        readings = [read(work, request, grad_scale) for work, request in asked]
    else:
        for work, request in asked:
            if request.units is not None:
                unit_dims(work.grads, request.units)  # raises where they don't fit
            if nonfinite == "raise":
                read(work, Request()).check_finite()
        readings = [read(work, request, grad_scale, own) for (work, request), own in zip(asked, penalties, strict=True)]
    if nonfinite == "raise":
        for reading in readings:
            reading.check_finite()
    found = [reading.found_inf for reading in readings]
    if nonfinite == "zero":
        for i, (work, request) in enumerate(asked):
            if found[i] is not False:
                work.zero_nonfinite_()
                seen = readings[i]
                readings[i] = replace(
                    read(work, request, grad_scale), weight_rows=seen.weight_rows, strengths=seen.strengths
                )
    return [Finding(policy, r, f) for (_, policy), r, f in zip(shares, readings, found, strict=True)]


def clip_(grads: Grads, policy: Policy, nonfinite: str) -> Tensor:
    """Clips under one of the rules of NONFINITE; returns the total norm before clipping."""
    if not grads.tensors:
        return torch.tensor(0.0)
    (finding,) = examine([(grads, policy)], nonfinite)
    verdict = finding.decide()
    skip = any_of([verdict.decision.skip, finding.found_inf if nonfinite == "skip" else False])
    verdict.apply(skip=skip)
    return finding.reading.total_norm


def check_real(grads: Grads) -> None:
    """Raises ``RuntimeError`` for the first complex gradient."""
    for index, grad in enumerate(grads.tensors):
        if grad.is_complex():
            raise RuntimeError(
                f"the gradient of {grads.describe(index)} is complex, and complex numbers have no order to clamp "
                "by; use clip_grad_norm_. Nothing was written"
            )


def clamp_(grads: Grads, bound: float) -> None:
    """Clamps every element into [-bound, bound]."""
    check_real(grads)
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
    on_host = known_to_host(clip_coef)
    if not on_host or float(clip_coef) != 1.0:
        work.scale_(float(clip_coef) if on_host else clip_coef)


def grad_stats(grads: Grads, request: Request) -> GradStats:
    """Statistics alone; writes nothing."""
    return stats_of(read(plan(grads), request))
