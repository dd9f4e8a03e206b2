"""Adaptive gradient clipping: each unit's norm against that of its weights."""

from __future__ import annotations

import torch

from fastclip.checks import norm_type_number, number, positive
from fastclip.policies.base import Decision, Policy
from fastclip.reading import Reading
from fastclip.types import Request
from fastclip.units import check_units


class Unitwise(Policy):
    """Scales each unit (row, filter) down to ``clip_factor`` times the norm of its weights, where it exceeds that.

    With n the norm of a unit's gradient and w that of its weights: if n >= clip_factor * max(w, eps), the unit is
    multiplied by clip_factor * max(w, eps) / max(n, 1e-6). Units that aren't clipped are not written.

    Args:
        clip_factor: largest ratio of the two norms, >= 0.
        eps: weights count as if their norm were at least this, > 0, so that a unit of zeros can start to learn.
        units: ``"out"``: one unit per index of the first dimension, torch's layout of Linear and Conv weights; as
            timm. ``"in"``: summed over dimension 0 of 2 and 3 dimensions and over 0, 1, 2 of four; as optax, for
            weights stored input first. ``"tensor"``: the whole tensor. A tuple: the dimensions to sum over. A tensor
            with at most one dimension is one unit.
        norm_type: p of the p-norm.

    The last linear layer is normally left out: give its param group ``"policy": GlobalNorm(inf)``.

    Source: AGC, Brock et al. 2021, arXiv:2102.06171.
    """

    total_only = True

    def __init__(
        self,
        clip_factor: float = 0.01,
        *,
        eps: float = 1e-3,
        units: str | tuple[int, ...] = "out",
        norm_type: float = 2.0,
    ) -> None:
        self.clip_factor, self.eps = number("clip_factor", clip_factor), positive("eps", eps)
        self.units, self.norm_type = check_units(units), norm_type_number(norm_type)

    def request(self) -> Request:
        return Request(self.norm_type, units=self.units)

    def decide(self, reading: Reading) -> Decision:
        assert reading.units is not None
        norms = reading.units.norms
        bounds = self.clip_factor * reading.units.weight_norms.clamp(min=self.eps)
        return Decision(unit_coefs=torch.where(norms < bounds, 1.0, bounds / norms.clamp(min=1e-6)))
