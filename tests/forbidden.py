"""What a device may decide about a step, on any backend: that nothing is written, and what the step counts as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from oracle import COMPLEX, INF, NAN, WRITABLE, bits
from torch import Tensor

Given: TypeAlias = Callable[[float, str], Any]

SHAPES = ((3, 7), (300, 300), (50, 300), (1,))
# Of a matrix over its rows no unit is one piece of memory; of one over its columns, or both, each is.
DIMS = [(1,), (0, 1), (0,), (0,)]
UNITS = 3 + 1 + 300 + 1

_KINDS: dict[str, Callable[[Any, Any, Callable[..., Tensor], Tensor | None], None]] = {
    "scale": lambda chosen, table, halves, skip: chosen.scale_(table, 0.5, skip),
    "scale by a tensor": lambda chosen, table, halves, skip: chosen.scale_(table, halves(), skip),
    "scale each": lambda chosen, table, halves, skip: chosen.scale_(table, halves(len(SHAPES)), skip),
    "scale units": lambda chosen, table, halves, skip: chosen.scale_units_(table, DIMS, halves(UNITS), skip),
    "clamp": lambda chosen, table, halves, skip: chosen.clamp_(table, 0.5, skip),
}
WRITES = [(how, dtype) for how in _KINDS for dtype in WRITABLE if how != "clamp" or dtype not in COMPLEX]
SKIPS = (None, 0.0, 1.0, NAN)

TOLD: list[Given] = [
    lambda value, device: value,
    lambda value, device: torch.tensor(value, device=device),
    lambda value, device: torch.tensor([value], dtype=torch.float64, device=device),
]


def check_write(chosen: Any, how: str, dtype: torch.dtype, skip: float | None, device: str) -> None:
    """Whatever the factor, and also what would become NaN by any."""
    grads = [torch.full(shape, 2.0, dtype=dtype, device=device) for shape in SHAPES]
    grads[0][1, 2], grads[3][0] = NAN, INF
    before = [bits(grad).clone() for grad in grads]
    flag = None if skip is None else torch.tensor(skip, device=device)
    _KINDS[how](chosen, chosen.table_of(grads), lambda *n: torch.full(n, 0.5, dtype=torch.float64, device=device), flag)
    if skip:
        assert all(torch.equal(bits(grad), old) for grad, old in zip(grads, before, strict=True))
        return
    written = 0.5 if how == "clamp" else 1.0
    assert all(bool((grad == written).all()) for grad in grads[1:3])
    assert grads[0][0, 0] == written
    assert bool(grads[0].isnan()[1, 2])


def check_tally(chosen: Any, given: Given, device: str) -> None:
    """Clipped where the factor isn't 1, but not where the step is skipped; NaN is neither 1 nor 0."""
    counts = torch.zeros(5, dtype=torch.float64, device=device)
    for factor, skip, found, want in (
        (1.0, 0.0, 0.0, [1, 0, 0, 0, 0]),
        (0.5, 0.0, 1.0, [2, 1, 0, 0, 1]),
        (0.5, 1.0, 1.0, [3, 1, 1, 1, 2]),
        (NAN, 1.0, 0.0, [4, 1, 2, 2, 2]),
        (1.0, NAN, NAN, [5, 1, 3, 3, 3]),
        (NAN, 0.0, 0.0, [6, 2, 3, 0, 3]),
        (1.0, 1.0, 1.0, [7, 2, 4, 1, 4]),
        (1.0, 0.0, 0.0, [8, 2, 4, 0, 4]),
    ):
        after = torch.full_like(counts, NAN)
        chosen.tally(counts, *(given(value, device) for value in (factor, skip, found)), after)
        assert after.tolist() == want, (factor, skip, found)
        counts = after
