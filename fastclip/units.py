"""Units: the rows, filters or columns of which a tensor consists for rules that look closer than at whole tensors."""

from __future__ import annotations

import torch

from fastclip.tensors import Grads
from fastclip.types import UnsupportedGradientError

SPELLED = ("out", "in", "tensor")


def check_units(units: str | tuple[int, ...]) -> str | tuple[int, ...]:
    """``units`` if it can be one: a name of SPELLED or dimensions to sum over."""
    if isinstance(units, str):
        if units not in SPELLED:
            raise ValueError(f"units must be one of {', '.join(SPELLED)}, or a tuple of dimensions; got {units!r}")
        return units
    if not isinstance(units, (tuple, list)):
        raise TypeError(f"units: expected one of {', '.join(SPELLED)}, or a tuple of dimensions; got {units!r}")
    dims = tuple(units)
    if not dims or not all(type(d) is int and d >= 0 for d in dims) or len(set(dims)) < len(dims):
        raise ValueError(f"units: expected different dimensions, each at least 0, got {units!r}")
    return dims


def unit_dims(grads: Grads, units: str | tuple[int, ...]) -> list[tuple[int, ...]]:
    """For each gradient the dimensions over which one unit extends.

    Raises:
        ValueError: ``units`` does not fit a gradient's number of dimensions; names it.
        UnsupportedGradientError: a sparse gradient.
    """
    for index, grad in enumerate(grads.tensors):
        if grad.layout is not torch.strided:
            raise UnsupportedGradientError(
                f"units of {grads.describe(index)} are not known: it lists only some of its elements; leave it out. "
                "Nothing was written"
            )
    of_rank: dict[int, tuple[int, ...]] = {}
    found = []
    for index, grad in enumerate(grads.tensors):
        rank = grad.dim()
        if units == "in" or rank not in of_rank:  # the others depend on nothing but the rank
            of_rank[rank] = _dims(grads, index, grads.whole(index).shape, units)
        found.append(of_rank[rank])
    return found


def _dims(grads: Grads, index: int, shape: tuple[int, ...], units: str | tuple[int, ...]) -> tuple[int, ...]:
    rank = len(shape)
    everything = tuple(range(rank))
    if units == "tensor" or rank <= 1:
        return everything
    if units == "out":
        return everything[1:]
    if units == "in":
        if sum(size > 1 for size in shape) <= 1:
            return everything
        if rank > 4:
            raise ValueError(f"units='in' is defined for up to 4 dimensions; {grads.describe(index)} has {rank}")
        return everything[:1] if rank <= 3 else everything[:3]
    assert isinstance(units, tuple)
    if max(units) >= rank:
        raise ValueError(f"units={units} names dimensions that {grads.describe(index)} doesn't have")
    return units
