"""What is told of one tensor of activations: mean, spread, range; right at every magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import fastclip.functional as functional
from fastclip.types import wide_dtype


def is_plain(tensor: Tensor) -> bool:
    """Whether torch knows comparisons of its elements, and what of them is finite."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    return dense and tensor.is_floating_point() and tensor.itemsize > 1


@dataclass(frozen=True)
class Moments:
    """Facts about one tensor.

    Attributes:
        size: how many elements it has.
        mean, std, rms: over all of them, rms being the root of the mean square.
        low, high: the smallest and the largest.
        nans, infs: how many elements are.
        dtype: its own.
    """

    size: int
    mean: float
    std: float
    rms: float
    low: float
    high: float
    nans: int
    infs: int
    dtype: torch.dtype

    @property
    def finite(self) -> bool:
        return self.nans + self.infs == 0

    @property
    def max_abs(self) -> float:
        return max(-self.low, self.high)


def moments_of(tensor: Tensor) -> Moments | None:
    """None for a tensor without real numbers or without elements."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.layout != torch.strided:
        return None
    values = tensor.detach()
    size = values.numel()
    stats = functional.grad_stats([values], extras=True).to_dict()
    largest = float(stats["max_abs"])
    if stats["found_inf"]:
        nan = math.nan
        return Moments(size, nan, nan, nan, nan, nan, stats["nans"], stats["infs"], values.dtype)
    if largest == 0.0:
        return Moments(size, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, values.dtype)
    # divided by the largest, so that squares neither overflow nor underflow; in two steps, as 1 / largest may overflow
    scaled = values.to(wide_dtype(values.device)) / largest
    spread, mean = torch.var_mean(scaled, correction=0)
    low, high = torch.aminmax(values)
    return Moments(
        size=size,
        mean=float(mean) * largest,
        std=math.sqrt(max(float(spread), 0.0)) * largest,
        rms=float(stats["total_norm"]) / math.sqrt(size),
        low=float(low),
        high=float(high),
        nans=0,
        infs=0,
        dtype=values.dtype,
    )


@dataclass(frozen=True)
class Census:
    """What the range of numbers does to one gradient.

    Attributes:
        norm: of it.
        max_abs: its largest magnitude.
        nonzero: how many elements aren't 0.
        subnormal: how many of them have lost bits, because they are smaller than the least normal number of the dtype.
        lost: how many of them float16 would round to 0.
        dtype: its own.
    """

    norm: float
    max_abs: float
    nonzero: int
    subnormal: int
    lost: int
    dtype: torch.dtype


FLOAT16_ZERO = 2.0**-25  # half of its least subnormal number: what is smaller becomes 0


def census_of(grad: Tensor) -> Census:
    """Of a gradient with real numbers."""
    stats = functional.grad_stats([grad], extras=True).to_dict()
    sizes = grad.abs()
    tiny = torch.finfo(grad.dtype).tiny
    counts = torch.stack([(sizes < bound).sum() for bound in (tiny, FLOAT16_ZERO)]).tolist()
    zeros = int(stats["zeros"])
    return Census(
        norm=float(stats["total_norm"]),
        max_abs=float(stats["max_abs"]),
        nonzero=grad.numel() - zeros,
        subnormal=counts[0] - zeros,
        lost=counts[1] - zeros,
        dtype=grad.dtype,
    )


def norm_of(tensors: list[Tensor]) -> float:
    """Joint 2-norm; NaN for none."""
    return float(functional.get_total_norm(tensors)) if tensors else math.nan
