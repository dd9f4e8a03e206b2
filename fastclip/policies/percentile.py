"""Bounds that are a percentile of the norms seen so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip.checks import number, whole
from fastclip.policies.base import Decision, Policy, coef_for, total_norm
from fastclip.policies.window import Window
from fastclip.reading import Reading
from fastclip.types import NORM


class Windowed(Policy):
    """Keeps a :class:`Window`, and its two tensors as what it learned."""

    learned = ("ring", "counts")

    def __init__(self, window: int) -> None:
        self.window = whole("window", window, least=1)
        self._window: Window | None = None

    @property
    def ring(self) -> Tensor:
        return self._window.ring if self._window is not None else torch.empty(0, self.window, dtype=torch.float64)

    @property
    def counts(self) -> Tensor:
        return self._window.counts if self._window is not None else torch.empty(0, dtype=torch.int64)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`Policy.check_state_dict`; a window of another length is refused too."""
        super().check_state_dict(state_dict)
        length = state_dict["ring"].shape[-1]
        if length != self.window:
            raise ValueError(
                f"{type(self).__name__} has a window of {self.window}, the state dict one of {length}. "
                "Nothing was changed"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_state_dict(state_dict)
        self._window = Window(state_dict["ring"].clone(), state_dict["counts"].clone())

    def fit(self, series: int, like: Tensor) -> Window:
        """The window, on the device of ``like``, of so many series; those past them are forgotten."""
        if self._window is None:
            self._window = Window.empty(series, self.window, like)
        ring, counts = self._window.ring, self._window.counts
        if len(ring) > series:
            ring, counts = ring[:series], counts[:series]
            self._window = Window(ring, counts)
        if len(ring) < series or ring.device != like.device or ring.dtype != like.dtype:
            more = Window.empty(max(series - len(ring), 0), self.window, like)
            self._window = Window(
                torch.cat([ring.to(like), more.ring]), torch.cat([counts.to(more.counts), more.counts])
            )
        return self._window


def _percentile(percentile: float) -> float:
    checked = number("percentile", percentile)
    if checked > 100.0:
        raise ValueError(f"percentile must be at most 100, got {percentile}")
    return checked


class Percentile(Windowed):
    """Clips by the joint norm; the bound is the ``percentile``-th percentile of the norms so far, this one included.

    Args:
        percentile: 0 to 100, linearly interpolated as in ``numpy.percentile``.
        window: how many norms are remembered. A norm of 0 or one that isn't finite is never one of them.
        eps: added to the norm in the denominator.

    Source: AutoClip, Seetharaman et al. 2020, arXiv:2007.14469.
    """

    total_only = True

    def __init__(self, percentile: float = 10.0, *, window: int = 10_000, eps: float = 1e-6) -> None:
        self.percentile = _percentile(percentile)
        super().__init__(window)
        self.eps = number("eps", eps)

    def decide(self, reading: Reading) -> Decision:
        norm = total_norm(reading).reshape(1)
        window = self.fit(1, norm)
        window.push(norm, torch.isfinite(norm) & (norm > 0))
        bound = window.at((window.lengths - 1).clamp(min=0).to(norm) * self.percentile / 100.0)
        return Decision(coef_for(norm, bound, self.eps)[0])


class PerTensorPercentile(Windowed):
    """The same for each gradient by itself: the bound is the norm at ``percentile`` % of its latest ones, by size.

    What bitsandbytes called ``percentile_clipping`` until 0.50, with one difference: there the first norm filled the
    whole window, so the first steps were clipped to it; here the window grows.

    Args:
        percentile: 0 to 100; 100 clips nothing.
        window: how many norms of each gradient are remembered. Zeros and what isn't finite are not among them.
    """

    per_tensor = True

    def __init__(self, percentile: float = 5.0, *, window: int = 100) -> None:
        self.percentile = _percentile(percentile)
        super().__init__(window)

    def decide(self, reading: Reading) -> Decision:
        norms, columns = reading.rows[NORM], reading.columns
        window = self.fit(reading.parameters, norms)
        valid = torch.isfinite(norms) & (norms > 0)
        if columns is not None:
            everyone = norms.new_zeros(len(window.ring))
            window.push(everyone.index_copy(0, columns, norms), everyone.index_copy(0, columns, valid.to(norms)) > 0)
        else:
            window.push(norms, valid)
        bounds = window.at((window.lengths.to(norms) * self.percentile / 100.0).floor())
        bounds = bounds if columns is None else bounds[columns]
        return Decision(torch.where((norms <= bounds) | (self.percentile == 100.0), 1.0, bounds / norms))
