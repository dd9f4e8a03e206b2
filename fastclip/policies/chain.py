"""Several rules in a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip.policies.base import Decision, Policy, decided, requested
from fastclip.reading import Reading, Units, any_of
from fastclip.types import Request, on_device


class Chain(Policy):
    """Each rule sees what those before it leave: ``Chain(ZScore(), GlobalNorm(1.0))`` is an adaptive rule with a cap.

    A step is skipped if one of them says so. :class:`Value` may only stand last, :class:`Unitwise` only first: of
    what a clamp leaves, norms are known only after another read.

    Args:
        policies: two or more, of one ``norm_type``.
    """

    def __init__(self, *policies: Policy) -> None:
        for policy in policies:
            if not isinstance(policy, Policy):
                raise TypeError(f"Chain: expected policies, got {policy!r}")
        if len(policies) < 2:
            raise ValueError(f"Chain needs at least two policies, got {len(policies)}")
        if any(policy.clamps for policy in policies[:-1]):
            raise ValueError("Chain: Value can only stand last; the norms of what a clamp leaves are not known")
        if any(getattr(policy, "units", None) is not None for policy in policies[1:]):
            raise ValueError("Chain: Unitwise can only stand first")
        kinds = {policy.norm_type for policy in policies}
        if len(kinds) > 1:
            raise ValueError(f"Chain: the policies have different norm_types, {sorted(kinds)}")
        self.policies = policies
        self.units = getattr(policies[0], "units", None)
        self.norm_type = policies[0].norm_type
        self.clamps = policies[-1].clamps
        self.total_only = all(policy.total_only for policy in policies)
        self.per_tensor = any(policy.per_tensor for policy in policies)

    @property
    def learns(self) -> bool:
        return any(policy.learns for policy in self.policies)

    def request(self) -> Request:
        first, *others = self._requests = [requested(policy) for policy in self.policies]
        if any(request.units is not None for request in others):
            raise ValueError("Chain: a rule over units can only stand first. Nothing was written")
        self.writes = any(policy.writes for policy in self.policies)  # a bound may have been set since
        extras, weights = (any(getattr(request, of) for request in self._requests) for of in ("extras", "weights"))
        return Request(self.norm_type, first.max_norm, first.eps, extras, first.units, weights)

    def decide(self, reading: Reading) -> Decision:
        coef: float | Tensor = 1.0
        unit_coefs: Tensor | None = None
        skip: bool | Tensor = False
        clamp: float | None = None
        for policy, request in zip(self.policies, self._requests, strict=True):
            own = decided(policy, reading.after(coef, unit_coefs, request))
            if own.unit_coefs is not None:
                unit_coefs = own.unit_coefs
            elif unit_coefs is not None and reading.units is not None:
                unit_coefs = unit_coefs * _of_units(own.clip_coef, reading.units)
            else:
                coef = own.clip_coef if isinstance(coef, float) and coef == 1.0 else coef * own.clip_coef
            skip, clamp = any_of([skip, own.skip]), own.clamp
        return Decision(coef, skip, unit_coefs, clamp)

    def check_learned(self) -> None:
        """As :meth:`Policy.check_learned`, for each of them."""
        for policy in self.policies:
            policy.check_learned()

    def state_dict(self) -> dict[str, Any]:
        states = {str(i): policy.state_dict() for i, policy in enumerate(self.policies)}
        return {i: state for i, state in states.items() if state}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`Policy.check_state_dict`, for each of them."""
        learners = {str(i): policy for i, policy in enumerate(self.policies) if policy.state_dict()}
        if state_dict.keys() != learners.keys():
            here = ", ".join(f"{type(policy).__name__} at {i}" for i, policy in learners.items())
            raise ValueError(
                f"Chain: of its policies {here or 'none'} learns; the state dict holds what was learned at "
                f"{', '.join(map(str, state_dict)) or 'none'}: it was saved by another policy. Nothing was changed"
            )
        for i, policy in learners.items():
            policy.check_state_dict(state_dict[i])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_state_dict(state_dict)
        for i, state in state_dict.items():
            self.policies[int(i)].load_state_dict(state)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.policies))})"


def _of_units(clip_coef: float | Tensor, units: Units) -> float | Tensor:
    """One for each unit where there is one for each gradient."""
    if not isinstance(clip_coef, Tensor) or clip_coef.dim() == 0:
        return clip_coef
    counts = on_device(units.counts, torch.int64, clip_coef.device)
    return clip_coef.repeat_interleave(counts, output_size=sum(units.counts))
