"""Clipping of every gradient by its own norm, with a fixed bound."""

from __future__ import annotations

import torch

from fastclip.checks import norm_type_number, number, positive
from fastclip.policies.base import Decision, Policy
from fastclip.reading import Reading
from fastclip.types import NORM, on_device


class PerTensorNorm(Policy):
    """Scales each gradient by ``max_norm / max(its norm, max_norm)``.

    Args:
        max_norm: bound of each gradient's norm, >= 0.
        norm_type: p of the p-norm.

    Source: Keras ``clipnorm``.
    """

    def __init__(self, max_norm: float = 1.0, *, norm_type: float = 2.0) -> None:
        self.max_norm = max_norm
        self.norm_type = norm_type_number(norm_type)

    @property
    def max_norm(self) -> float:
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        self._max_norm = number("max_norm", value)

    def decide(self, reading: Reading) -> Decision:
        norms = reading.rows[NORM]
        return Decision(torch.where(norms <= self.max_norm, 1.0, self.max_norm / norms))

    def __repr__(self) -> str:
        return f"PerTensorNorm(max_norm={self.max_norm:g}, norm_type={self.norm_type:g})"


class BlockRMS(Policy):
    """Divides each gradient by ``max(1, rms / threshold)``, with rms = norm / sqrt(size).

    Args:
        threshold: bound of each gradient's root mean square, > 0.

    Source: optax ``clip_by_block_rms``; Shazeer and Stern 2018, arXiv:1804.04235, for updates.
    """

    def __init__(self, threshold: float = 1.0) -> None:
        self.threshold = positive("threshold", threshold)

    def decide(self, reading: Reading) -> Decision:
        norms = reading.rows[NORM]
        sizes = on_device(reading.sizes, norms.dtype, norms.device)
        rms = norms / sizes.clamp(min=1).sqrt()
        return Decision(torch.where(rms <= self.threshold, 1.0, self.threshold / rms))
