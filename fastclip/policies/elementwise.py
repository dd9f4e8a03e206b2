"""Clipping of every element by itself."""

from __future__ import annotations

from fastclip.checks import number
from fastclip.policies.base import Decision, Policy
from fastclip.reading import Reading
from fastclip.types import MAX_ABS, Request, known_to_host


class Value(Policy):
    """Clamps every element into ``[-clip_value, clip_value]``; NaN stays NaN. Memory within the bound isn't written.

    Args:
        clip_value: the bound, >= 0.

    Source: torch.nn.utils.clip_grad_value_; Keras ``clipvalue``.
    """

    clamps = True
    total_only = True

    def __init__(self, clip_value: float = 1.0) -> None:
        self.clip_value = number("clip_value", clip_value)

    def request(self) -> Request:
        return Request(self.norm_type, extras=True)

    def decide(self, reading: Reading) -> Decision:
        exceeds = ~(reading.rows[MAX_ABS] <= self.clip_value).all()  # so does NaN
        return Decision(clamp=self.clip_value if not known_to_host(exceeds) or bool(exceeds) else None)
