"""Weight penalties: how strong each gradient's is. They are added in the pass that reads the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastclip.checks import real
from fastclip.tensors import Grads
from fastclip.types import Strengths

CONVENTIONS = {"torch": 1.0, "keras": 2.0}  # d/dw of l2/2 w^2, and of l2 w^2


def strength(name: str, value: float) -> float:
    checked = real(name, value)
    if not 0.0 <= checked < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {checked}")
    return checked


class Penalty:
    """``l1 * sign(w) + l2 * w`` for each gradient; a param group's own ``l1`` and ``l2`` come first.

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

    def strengths(self, groups: Sequence[dict[str, Any]], shares: Sequence[Grads]) -> list[Strengths] | None:
        """For each of ``shares`` of the groups' gradients the factors of sign(w) and w; None if all are 0.

        Raises:
            TypeError: a group with a penalty holds a sparse gradient.
            ValueError: a group's strength is negative or not finite.
        """
        of_parameter: dict[int, tuple[float, float]] = {}
        for index, group in enumerate(groups):
            l1, l2 = (strength(f"param_groups[{index}][{k!r}]", group.get(k, getattr(self, k))) for k in ("l1", "l2"))
            sparse = next((p for p in group["params"] if p.grad is not None and p.grad.layout != torch.strided), None)
            if sparse is not None and (l1 or l2):
                raise TypeError(
                    f"param_groups[{index}] holds a sparse gradient of shape {tuple(sparse.shape)}: a penalty on every "
                    "weight would make it dense; set the group's l1 and l2 to 0. Nothing was written"
                )
            of_parameter |= {id(parameter): (l1, CONVENTIONS[self.convention] * l2) for parameter in group["params"]}
        if not any(l1 or l2 for l1, l2 in of_parameter.values()):
            return None
        parameters = [share.parameters or [] for share in shares]
        return [
            [of_parameter[id(own[i])] for i in share.columns] for share, own in zip(shares, parameters, strict=True)
        ]
