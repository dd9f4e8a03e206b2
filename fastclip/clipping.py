"""Gradients -> reading -> verdict -> write: what the functions and the optimizer wrapper do after their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip import distributed
from fastclip.backends import Plan, plan
from fastclip.policies import Decision, Policy
from fastclip.policies.base import decided, requested
from fastclip.reading import Reading, any_of, check_not_captured, read
from fastclip.stats import GradStats, stats_of
from fastclip.tensors import Grads, grads_among
from fastclip.ties import Ties, ties_of
from fastclip.types import (
    CLIP_COEF,
    MAX_ABS,
    TOTAL_NORM,
    Request,
    Strengths,
    UnsupportedGradientError,
    is_capturing,
    known_to_host,
    wide_dtype,
)
from fastclip.units import unit_dims


class Verdict(NamedTuple):
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
                differs = factor != 1.0
                reasons.append(differs.any() if differs.dim() else differs)
            elif factor is not None:
                reasons.append(factor != 1.0)
        return any_of(reasons)

    @property
    def factor(self) -> float | Tensor:
        """1 unless it changes a gradient: a number, or 0-d where the host would have to wait for it."""
        return self.decision.clip_coef if self.is_one_number else 1.0 + self.clipped

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
        if skip is True:
            return
        coef, _, unit_coefs, clamp = self.decision
        plan, units = self.reading.plan, self.reading.units
        unless = skip if isinstance(skip, Tensor) else None
        factor = coef if unit_coefs is None else unit_coefs
        factor = factor if grad_scale is None else factor / grad_scale
        if unit_coefs is not None and units is not None:
            plan.scale_units_(units.dims, units.counts, torch.as_tensor(factor), unless)
        elif isinstance(factor, Tensor) or factor != 1.0:
            plan.scale_(factor, unless)
        if clamp is not None:
            plan.clamp_(clamp, unless)


class Finding(NamedTuple):
    """What was read for one policy.

    Attributes:
        policy: the rule that asked.
        reading: what it gets to see; under "zero" what is left.
        noted: what is told of the step; under "zero" norms of what is left, and how much was NaN and Inf.
    """

    policy: Policy
    reading: Reading
    noted: Reading

    def decide(self) -> Verdict:
        """Has the policy decide, once: it may learn from what it sees."""
        return Verdict(self.reading, decided(self.policy, self.reading))


class Findings(NamedTuple):
    """What was read for all policies.

    Attributes:
        each: one for each share of which a rank has a gradient.
        skips: whether this rank, or another one, had a reason of its own to skip the step; a 0-d tensor where the host
            would have to wait for it.
    """

    each: list[Finding]
    skips: bool | Tensor


def examine(
    shares: list[tuple[Grads, Policy]],
    nonfinite: str,
    grad_scale: float | Tensor | None = None,
    penalties: list[Strengths] | None = None,
    ties: Ties | None = None,
    skips: bool | Tensor = False,
) -> Findings:
    """Reads for each policy its own gradients, under one of the rules of NONFINITE for all.

    With ``penalties``, one for each share, they are added in the same pass. Every check comes before the first write:
    with "raise" and penalties that takes a read more. Without penalties "zero" is the only rule that writes here.

    With ``ties`` what is read is joined with what other ranks read, and all of them have to call this; without them no
    share is empty. ``skips`` is a reason of the caller's own to skip the step.

    Raises:
        UnsupportedGradientError: a gradient can't be read, or can't be written though that might be needed.
        NonFiniteGradientError: with "raise".
        RankError: other ranks can't go on.
    """
    asked = [requested(policy) for _, policy in shares]
    whole = [ties is not None and not policy.total_only for _, policy in shares]
    may_write = grad_scale is not None or nonfinite == "zero" or penalties is not None
    plans: list[Plan] = []

    def joined(
        requests: list[Request], grad_scale: float | Tensor | None, penalties: list[Strengths] | None
    ) -> distributed.Joined:
        def own() -> list[Reading]:
            if not plans:
                plans.extend(_checked_plans(shares, asked, nonfinite, may_write, ties))
            strengths: Sequence[Strengths | None] = [None] * len(shares) if penalties is None else penalties
            return [read(w, r, grad_scale, s) for w, r, s in zip(plans, requests, strengths, strict=True)]

        return distributed.join(ties, requests, whole, own, penalties is not None, skips)

    if penalties is not None and nonfinite == "raise":
        for reading in joined([Request()] * len(shares), None, None).readings:
            reading.check_finite()
    readings, skips, nobody = joined(asked, grad_scale, penalties)
    if nonfinite == "raise":
        for reading in readings:
            reading.check_finite()
    noted = readings
    if nonfinite == "zero" and (bad := [reading for reading in readings if reading.found_inf is not False]):
        for reading in bad:
            reading.plan.zero_nonfinite_()
        first, readings = readings, joined(asked, grad_scale, None).readings
        noted = [new.with_what_was_there(before) for new, before in zip(readings, first, strict=True)]
    found = [Finding(policy, *own) for (_, policy), *own in zip(shares, readings, noted, strict=True)]
    return Findings([own for own, nobodys in zip(found, nobody, strict=True) if not nobodys], skips)


def _checked_plans(
    shares: list[tuple[Grads, Policy]], requests: list[Request], nonfinite: str, may_write: bool, ties: Ties | None
) -> list[Plan]:
    """Whatever may raise before the first read."""
    plans = []
    for request, (grads, policy) in zip(requests, shares, strict=True):
        if policy.clamps:
            check_real(grads)
        if is_capturing() and policy.state_dict():
            check_not_captured(
                f"{policy!r} learns from step to step, and a replay would begin anew each time", "clip outside of it"
            )
        work = plan(grads)
        plans.append(work)
        if policy.writes or may_write:
            work.check_writable()
        if request.units is not None:
            unit_dims(grads, request.units)  # raises where they don't fit
        if ties is not None and ties.cut and (request.units is not None or not policy.total_only):
            raise UnsupportedGradientError(
                f"{policy!r} looks at single tensors, of which FullyShardedDataParallel holds pieces; shard with "
                "fully_shard(), or take a rule that looks at the total norm. Nothing was written"
            )
        if len(work.parts) > 1 and len({part.table.grads[0].device for part in work.parts}) > 1:
            check_not_captured(
                "a list of gradients on several devices has to wait for them", "clip each device's own in its own graph"
            )
    if nonfinite == "raise":
        check_not_captured('nonfinite="raise" has to wait for the device', 'use "skip" or "propagate"')
    return plans


def all_finite(tensors: Grads, group: Any = None) -> bool:
    """Whether the host knows of no NaN and no Inf in them, on any rank."""
    ties, request = ties_of([tensors], group), Request()
    (reading,), *_ = distributed.join(ties, [request], [False], lambda: [read(plan(tensors), request)])
    return reading.found_inf is not True


def clip_(grads: Grads, policy: Policy, nonfinite: str, group: Any = None) -> Tensor:
    """Clips under one of the rules of NONFINITE; returns the total norm before clipping."""
    ties = ties_of([grads], group)
    if ties is None and not grads.tensors:
        return torch.zeros((), dtype=torch.float32)
    findings = examine([(grads, policy)], nonfinite, ties=ties)
    if not findings.each:  # nor does any other rank have one
        return torch.zeros((), dtype=torch.float32)
    (finding,) = findings.each
    verdict = finding.decide()
    bad = finding.reading.found_inf if nonfinite == "skip" else False
    skip = any_of([verdict.decision.skip, bad, findings.skips])
    verdict.apply(skip=skip)
    return _agreed(finding.noted.total_norm, findings.skips)


def _agreed(norm: Tensor, skips: bool | Tensor) -> Tensor:
    """NaN where another rank failed, or had another list, and the host would have to wait to raise."""
    return torch.where(skips.to(norm.device), math.nan, norm) if isinstance(skips, Tensor) else norm


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


def total_norm(grads: Grads, request: Request, error_if_nonfinite: bool, group: Any = None) -> Tensor:
    """The joint norm alone."""
    ties = ties_of([grads], group)
    if ties is None and not grads.tensors:
        return torch.zeros((), dtype=torch.float32)
    (reading,), skips, _ = distributed.join(ties, [request], [False], lambda: [read(plan(grads), request)])
    if error_if_nonfinite:
        reading.check_finite()
    return _agreed(reading.total_norm, skips)


def scale_by_norm_(grads: Grads, request: Request, total_norm: Tensor | float) -> None:
    """Clips by a norm that is already known."""
    if not grads.tensors or request.max_norm == math.inf:
        return
    work = plan(grads)
    work.check_writable()
    if isinstance(total_norm, Tensor):
        norm = total_norm.detach().reshape(()).to(wide_dtype(total_norm.device))
    else:
        norm = torch.tensor(float(total_norm), dtype=torch.float64, device="cpu")
    clip_coef = torch.where(norm <= request.max_norm, 1.0, request.max_norm / (norm + request.eps))
    # a norm on a device is not waited for, a meta or fake one has no value
    on_host = known_to_host(clip_coef)
    if not on_host or float(clip_coef) != 1.0:
        work.scale_(float(clip_coef) if on_host else clip_coef)


def bounded(grads: list[Tensor], max_norm: float, norm_type: float) -> list[Tensor]:
    """New tensors: the gradients, clipped by their joint norm unless that isn't finite."""
    each = [grad.view_as(grad) for grad in grads]  # the states of a sum are given one gradient, which counts for each
    among, request = grads_among(each), Request(norm_type, max_norm)
    ties = ties_of([among]) if among.may_be_sharded else None
    (reading,), *_ = distributed.join(ties, [request], [False], lambda: [read(plan(among), request)])
    norm, coef = reading.totals[TOTAL_NORM], reading.totals[CLIP_COEF]
    keep = (norm <= max_norm) | ~torch.isfinite(norm)
    wide = [torch.promote_types(grad.dtype, coef.dtype) for grad in grads]  # rounded once
    return [torch.where(keep, g, (g.to(dtype) * coef).to(g.dtype)) for g, dtype in zip(grads, wide, strict=True)]


def grad_stats(grads: Grads, request: Request, group: Any = None) -> GradStats:
    """Statistics alone; writes nothing."""
    ties = ties_of([grads], group)
    whole = ties is not None and not ties.cut
    (reading,), *_ = distributed.join(ties, [request], [whole], lambda: [read(plan(grads), request)])
    return stats_of(reading)
