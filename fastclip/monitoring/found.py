"""The readings of one step, on the host, joined to what its record says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastclip.backends import reference
from fastclip.monitoring.flags import Bools, Census
from fastclip.monitoring.places import Places
from fastclip.monitoring.records import Floats
from fastclip.monitoring.shipping import PER_READING, Sighting
from fastclip.record import Seen
from fastclip.types import INFS, NANS, NORM


class Found:
    """What the readings of one step say together; an array has one element for each known tensor.

    Attributes:
        norms: of the gradients before clipping.
        bad: which hold NaN or Inf; None for none.
        zeros, subnormal: shares of zeros and of subnormal numbers; None where not counted.
        is_one_number: whether all gradients were multiplied by the same.
    """

    def __init__(self, sighting: Sighting, norms: Floats, placed: list[Places], leaves: list[Any]) -> None:
        self.sighting, self.norms = sighting, norms
        self.bad: Bools | None = None
        self._has_nan: Bools | None = None
        self.zeros: Floats | None = None
        self.subnormal: Floats = norms
        self.nans = self.infs = 0
        self.max_abs: float | None = None
        self.clip_coef = 1.0
        self._totals: list[float] = []
        self._after: list[float | None] = []
        self.clipped, self.skipped = bool(leaves[0]), bool(leaves[1])
        self.loss = None if leaves[2] is None else float(leaves[2])
        begin = 3 + len(sighting.reasons)
        self.reasons = [name for name, holds in zip(sighting.reasons, leaves[3:begin], strict=True) if holds]
        self.lrs = [float(lr) for lr in leaves[begin : begin + sighting.lrs]]
        begin += sighting.lrs
        for seen, places, unknown in zip(sighting.seen, placed, sighting.unknown, strict=True):
            self._take(seen, places, unknown, leaves[begin : begin + PER_READING])
            begin += PER_READING

    def _take(self, seen: Seen, places: Places, unknown: bool, leaves: list[Any]) -> None:
        """Joins one reading."""
        rows, totals, coef, after, largest, zeros, subnormal = leaves
        self._norm_type = seen.request.norm_type
        self.norms[places] = own = rows[NORM]
        total, _, nans, infs = totals.tolist()  # in the order of TOTALS
        if nans or infs:
            if self.bad is None:
                self.bad, self._has_nan = np.zeros((2, len(self.norms)), dtype=bool)
            self._has_nan[places] = rows[NANS] > 0  # type: ignore[index]
            self.bad[places] = rows[NANS] + rows[INFS] > 0
        self.nans, self.infs = self.nans + int(nans), self.infs + int(infs)
        if largest is not None and len(largest):
            self.max_abs = float(np.max(largest if self.max_abs is None else np.append(largest, self.max_abs)))
        if zeros is not None:
            if self.zeros is None:
                self.zeros, self.subnormal = np.full((2, len(self.norms)), math.nan)
            self.zeros[places], self.subnormal[places] = zeros, subnormal
        whole = isinstance(coef, (int, float))
        of_units = after is not None  # then the coefficient is the least of theirs
        if after is None:
            with np.errstate(invalid="ignore", over="ignore"):  # Inf times 0 is NaN, here as in the gradient
                after = total * coef if whole else self._joined(own * coef)
        self._after.append(None if unknown else float(after))
        self._totals.append(total)
        self.clip_coef = min(self.clip_coef, float(coef if whole else np.min(coef, initial=1.0)))
        self.is_one_number = whole and not of_units and not unknown and len(self._totals) == 1
        bound = seen.request.max_norm
        self.max_norm = bound if len(self._totals) == 1 and math.isfinite(bound) else None

    def _joined(self, norms: Floats) -> float:
        return float(reference.norm_of_norms(torch.from_numpy(np.asarray(norms, dtype=np.float64)), self._norm_type))

    @property
    def total_norm(self) -> float:
        return self._totals[0] if len(self._totals) == 1 else self._joined(np.array(self._totals))

    @property
    def clipped_norm(self) -> float | None:
        known = [norm for norm in self._after if norm is not None]
        if len(known) < len(self._after):
            return None
        return known[0] if len(known) == 1 else self._joined(np.array(known))

    @property
    def worst(self) -> int | None:
        """NaN first, then Inf, then the largest norm; None where this rank has no parameters."""
        if not len(self.norms):
            return None
        for which in (self._has_nan, self.bad):
            if which is not None and which.any():
                return int(which.argmax())
        return int(self.norms.argmax())

    def census(self) -> Census:
        assert self.zeros is not None
        return Census(1.0 - self.zeros, self.subnormal)

    def shares(self, sizes: Floats) -> tuple[float, float] | tuple[None, None]:
        """Of zeros and of subnormal numbers among the elements of all counted tensors; None if none was counted."""
        if self.zeros is None:
            return None, None
        known = ~np.isnan(self.zeros)
        elements = max(float(sizes[known].sum()), 1.0)
        zeros, subnormal = (float((own * sizes)[known].sum() / elements) for own in (self.zeros, self.subnormal))
        return zeros, subnormal
