"""The latest values of one or many series, in order of time and of size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Window:
    """For each of ``n`` series the latest ``length`` values. Filled from empty: it never invents a value.

    Attributes:
        ring: ``[n, length]``, in order of arrival, Inf where nothing has arrived yet.
        counts: ``[n]`` int64, how many have arrived.
    """

    def __init__(self, ring: Tensor, counts: Tensor) -> None:
        self.ring, self.counts = ring, counts
        self._sorted = ring.sort(dim=1).values

    @staticmethod
    def empty(series: int, length: int, like: Tensor) -> Window:
        return Window(
            like.new_full((series, length), math.inf), torch.zeros(series, dtype=torch.int64, device=like.device)
        )

    def push(self, values: Tensor, valid: Tensor) -> None:
        """Takes in one value of each series, ``[n]``, where ``valid``; the oldest goes."""
        slots = (self.counts % self.ring.shape[1]).unsqueeze(1)
        old = self.ring.gather(1, slots)
        new = torch.where(valid, values, math.inf).unsqueeze(1)
        # Without a sort, and without an index that the host would have to know: first the old value is taken out of
        # the ascending order (everything from it on moves down), then the new one put in (it pushes the larger up).
        ordered, edge = self._sorted, self._sorted.new_full((len(self.ring), 1), math.inf)
        without = torch.where(ordered < old, ordered, torch.cat([ordered[:, 1:], edge], dim=1))
        above = torch.cat([-edge, without[:, :-1]], dim=1).maximum(new)
        kept = valid.unsqueeze(1)
        self._sorted = torch.where(kept, above.minimum(without), ordered)
        self.ring = self.ring.scatter(1, slots, torch.where(kept, new, old))
        self.counts = self.counts + valid

    @property
    def lengths(self) -> Tensor:
        """``[n]`` int64: how many values there are."""
        return self.counts.clamp(max=self.ring.shape[1])

    def at(self, ranks: Tensor) -> Tensor:
        """``[n]``: the value of each series at a rank from 0, interpolated between ranks. Inf where there is none."""
        last = (self.lengths - 1).clamp(min=0)
        low = ranks.floor().long().minimum(last)
        values = self._sorted.gather(1, torch.stack([low, (low + 1).minimum(last)], dim=1))
        lower, upper = values[:, 0], values[:, 1]
        between = lower + (upper - lower) * (ranks - low)
        return torch.where(lower == upper, lower, between)  # Inf - Inf is no number
