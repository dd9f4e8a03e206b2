"""Weight penalties, added to the gradients before they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.checks import real

CONVENTIONS = {"torch": 1.0, "keras": 2.0}  # d/dw of l2/2 w^2, and of l2 w^2


def strength(name: str, value: float) -> float:
    checked = real(name, value)
    if not 0.0 <= checked < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {checked}")
    return checked


class Penalty:
    """Adds ``l1 * sign(w) + l2 * w`` to each gradient; a param group's own ``l1`` and ``l2`` come first.

    Args:
        l1, l2: strengths, >= 0.
        convention: ``"torch"`` adds l2 * w, as ``weight_decay`` of ``torch.optim.SGD``; ``"keras"`` adds 2 * l2 * w,
            the derivative of Keras' ``L2(l2)``.
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0, convention: str = "torch") -> None:
        if convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}")
        self.l1, self.l2, self.convention = strength("l1", l1), strength("l2", l2), convention

    def is_wanted(self, groups: Sequence[dict[str, Any]]) -> bool:
        return bool(self.l1 or self.l2) or any("l1" in group or "l2" in group for group in groups)

    def add_(self, groups: Sequence[dict[str, Any]], grad_scale: float | Tensor | None) -> None:
        """Writes the gradients of all groups that have a penalty; scaled ones get it scaled.

        Raises:
            TypeError: a group with a penalty holds a sparse gradient; nothing was written.
            ValueError: a group's strength is negative or not finite; nothing was written.
        """
        strengths = []
        for index, group in enumerate(groups):
            l1, l2 = (strength(f"param_groups[{index}][{k!r}]", group.get(k, getattr(self, k))) for k in ("l1", "l2"))
            strengths.append((l1, CONVENTIONS[self.convention] * l2))
            sparse = next((p for p in group["params"] if p.grad is not None and p.grad.layout != torch.strided), None)
            if sparse is not None and (l1 or l2):
                raise TypeError(
                    f"param_groups[{index}] holds a sparse gradient of shape {tuple(sparse.shape)}: a penalty on every "
                    "weight would make it dense; set the group's l1 and l2 to 0. Nothing was written"
                )
        for group, (of_sign, of_weight) in zip(groups, strengths, strict=True):
            # each gradient once, however often its parameter is listed
            pairs = {id(p.grad): (p.grad, p.detach()) for p in group["params"] if p.grad is not None}
            grads, weights = [grad for grad, _ in pairs.values()], [weight for _, weight in pairs.values()]
            if of_sign and grads:
                _add_(grads, list(torch._foreach_sign(weights)), of_sign, grad_scale)
            if of_weight and grads:
                _add_(grads, weights, of_weight, grad_scale)


def _add_(grads: list[Tensor], terms: list[Tensor], factor: float, grad_scale: float | Tensor | None) -> None:
    if isinstance(grad_scale, Tensor):
        torch._foreach_add_(grads, torch._foreach_mul(terms, [grad_scale * factor] * len(terms)))
    else:
        torch._foreach_add_(grads, terms, alpha=factor * (1.0 if grad_scale is None else grad_scale))
