"""A straight line through logarithms: does something grow or shrink by a factor from each to the next?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Trend(NamedTuple):
    """Of positive values in order.

    Attributes:
        factor: by which the line changes from each value to the next one.
        total: by which it changes from the first to the last.
        fit: share of the variance of the logarithms that the line explains, R^2, from 0 to 1.
        points: how many values it is drawn through.
    """

    factor: float
    total: float
    fit: float
    points: int


def trend_of(values: Sequence[float], least: int) -> Trend | None:
    """None where fewer than ``least`` values are positive and finite."""
    places = [i for i, value in enumerate(values) if 0 < value < math.inf]
    if len(places) < least:
        return None
    x, y = np.asarray(places, dtype=np.float64), np.log([values[i] for i in places])
    slope, start = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - slope * x - start) ** 2).sum())
    total = float(slope) * (len(values) - 1)
    return Trend(
        factor=math.exp(min(float(slope), 700.0)),
        total=math.exp(max(min(total, 700.0), -700.0)),
        fit=1.0 - left / spread if spread > 0 else 0.0,
        points=len(places),
    )
