"""Several rules in a row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastclip.policies.base import Decision, Policy
from fastclip.stats import Reading, any_of
from fastclip.types import Request


class Chain(Policy):
    """Each rule sees what those before it leave: ``Chain(ZScore(), GlobalNorm(1.0))`` is an adaptive rule with a cap.

    A step is skipped if one of them says so. :class:`Value` may only stand last, :class:`Unitwise` only first: of
    what a clamp leaves, norms are known only after another read.

    Args:
        policies: two or more, of one ``norm_type``.
    """

    def __init__(self, *policies: Policy) -> None:
        if len(policies) < 2:
            raise ValueError(f"Chain needs at least two policies, got {len(policies)}")
        kinds = {policy.norm_type for policy in policies}
        if len(kinds) > 1:
            raise ValueError(f"the policies of a Chain have different norm_types: {sorted(kinds)}")
        self.policies = policies
        self.norm_type = policies[0].norm_type

    @property
    def per_tensor(self) -> bool:  # type: ignore[override]
        return any(policy.per_tensor for policy in self.policies)

    def request(self) -> Request:
        first, *others = [policy.request() for policy in self.policies]
        if any(request.units is not None for request in others):
            raise ValueError("Unitwise can only stand first in a Chain")
        self._requests = [first, *others]
        return Request(self.norm_type, first.max_norm, first.eps, any(r.extras for r in self._requests), first.units)

    def decide(self, reading: Reading) -> Decision:
        total = Decision()
        for policy, request in zip(self.policies, self._requests, strict=True):
            if total.clamp is not None:
                raise ValueError("a Chain can't go on after Value: the norms of what it leaves are not known")
            seen = reading.after(total.clip_coef, total.unit_coefs, request)
            own = policy.decide(seen)
            unit_coefs = own.unit_coefs if own.unit_coefs is not None else total.unit_coefs
            total = Decision(
                _product(total.clip_coef, own.clip_coef), any_of([total.skip, own.skip]), unit_coefs, own.clamp
            )
        return total

    def state_dict(self) -> dict[str, Any]:
        states = {str(i): policy.state_dict() for i, policy in enumerate(self.policies)}
        return {i: state for i, state in states.items() if state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`Policy.load_state_dict`, for each of them."""
        expected = {str(i) for i, policy in enumerate(self.policies) if policy.state_dict()}
        if state_dict.keys() != expected:
            raise ValueError(
                f"Chain learns in its places {sorted(expected)}, the state dict holds {sorted(state_dict)}"
            )
        for i in expected:
            self.policies[int(i)].load_state_dict(state_dict[i])

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.policies))})"


def _product(first: float | Tensor, second: float | Tensor) -> float | Tensor:
    return second if isinstance(first, float) and first == 1.0 else first * second
