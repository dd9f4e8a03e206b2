"""Clipping by the joint norm: torch's rule."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastclip.checks import bound_of, norm_type_number, number
from fastclip.policies.base import Bound, Decision, Policy, coef_for, total_norm
from fastclip.reading import Reading
from fastclip.types import Request, known_to_host


class GlobalNorm(Policy):
    """Scales all gradients by ``min(1, max_norm / (total_norm + eps))``: their joint norm is at most ``max_norm``.

    Args:
        max_norm: the bound, >= 0: a number; a one-element tensor, read anew at each step (one on an accelerator is
            never waited for, so its value can't be checked); or a callable that gets the number of the step,
            from 0, and returns either.
        norm_type: p of the p-norm, as in :func:`fastclip.clip_grad_norm_`.
        eps: added to the total norm in the denominator.

    Raises:
        ValueError: a negative or NaN ``max_norm`` or ``eps``; from a callable at the step, before anything is written.

    Source: Pascanu et al. 2013, arXiv:1211.5063; torch.nn.utils.clip_grad_norm_.
    """

    total_only = True

    def __init__(self, max_norm: Bound = 1.0, *, norm_type: float = 2.0, eps: float = 1e-6) -> None:
        self.norm_type = norm_type_number(norm_type)
        self.eps = number("eps", eps)
        self._step = 0
        self._device_bound: Tensor | None = None  # this step's bound, where only a device knows it
        self.max_norm = max_norm

    @property
    def max_norm(self) -> Bound:
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: Bound) -> None:
        bound = math.inf  # what the engine is asked for, where the bound is known only later
        self._fixed = False
        if not isinstance(value, Tensor) and not callable(value):
            bound, self._fixed = number("max_norm", value), True
        elif isinstance(value, Tensor):
            bound_of("max_norm", value)
        self.writes = not self._fixed or bound != math.inf
        self._max_norm, self._bound = value, bound

    def request(self) -> Request:
        self._device_bound = None  # a step may have failed before it decided
        if self._fixed:
            return Request(self.norm_type, self._bound, self.eps)
        value = self._max_norm
        if not isinstance(value, Tensor) and callable(value):
            value = value(self._step)
        if isinstance(value, Tensor) and not known_to_host(value):
            self._device_bound = value.detach().reshape(())
            return Request(self.norm_type, self._bound, self.eps)
        return Request(self.norm_type, number("max_norm", value), self.eps)

    def decide(self, reading: Reading) -> Decision:
        self._step += 1
        if self._device_bound is None:
            return Decision(reading.clip_coef)
        norm = total_norm(reading)
        bound, self._device_bound = self._device_bound.to(norm), None
        return Decision(coef_for(norm, bound, self.eps))

    @property
    def learns(self) -> bool:
        """Whether ``max_norm`` is a callable, which asks for the number of the step."""
        return callable(self._max_norm) and not isinstance(self._max_norm, Tensor)

    def state_dict(self) -> dict[str, Any]:
        """The number of the step, where ``max_norm`` is a callable."""
        return {"policy": "GlobalNorm", "step": self._step} if self.learns else {}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ``ValueError`` if ``state_dict`` was saved by another policy; a step that isn't needed is ignored."""
        if state_dict and (state_dict.keys() != {"policy", "step"} or state_dict["policy"] != "GlobalNorm"):
            super().check_state_dict(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_state_dict(state_dict)
        self._step = int(state_dict.get("step", 0))

    def __repr__(self) -> str:
        value = self._max_norm
        shown = f"{value:g}" if isinstance(value, (int, float)) else repr(value)
        return f"GlobalNorm(max_norm={shown}, norm_type={self.norm_type:g})"
