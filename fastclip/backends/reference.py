"""The reference backend: the contract in plain torch, in float64.

It is the definition of every number, the oracle of the tests, and the route for every device without
kernels and every gradient that isn't plain dense memory. It never synchronises, so it also runs on meta
and fake tensors. Where a device has no float64 (MPS), float32 scaled by the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastclip import tensors
from fastclip.types import (
    ALWAYS_FIELDS,
    CLIP_COEF,
    HEAD_INF,
    HEAD_NORM,
    IN_A_ROW,
    MAX_ABS,
    NORM,
    SUM_ABS,
    TOTAL_INFS,
    TOTAL_NANS,
    TOTAL_NORM,
    ZEROS,
    Request,
    known_to_host,
    map_magnitudes,
    wide_dtype,
)

name = "reference"
device_type: int | None = None
returns_early = False

FLOAT32_MAX = torch.finfo(torch.float32).max
PIECE = 1 << 22  # elements widened at a time: 32 MiB of float64


@dataclass
class ReferenceTable:
    """``grads`` holds dense values, ``sources`` the gradients they belong to."""

    grads: list[Tensor] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    readonly: dict[int, str] = field(default_factory=dict)
    wide: bool = False

    def __len__(self) -> int:
        return len(self.grads)

    @property
    def size_bytes(self) -> int:
        return sum(grad.nbytes for grad in self.grads)


def unavailable() -> str:
    return ""


def table_of(grads: list[Tensor], native: Any = None) -> ReferenceTable:
    table = ReferenceTable()
    for position, grad in enumerate(grads):
        reason = tensors.unserved(grad)
        if reason:
            table.refused[position] = reason
            continue
        values = tensors.dense(grad.detach())  # no autograd below this line
        if reason := tensors.read_only(values):
            table.readonly[position] = reason
        table.grads.append(values)
        table.sources.append(grad)
        table.positions.append(position)
        table.wide |= grad.dtype in (torch.float64, torch.complex128)
    return table


def read(
    table: ReferenceTable,
    request: Request,
    rows: Tensor,
    grad_scale: float | Tensor | None = None,
    totals: Tensor | None = None,
    heads: Tensor | None = None,
) -> None:
    for column, (grad, source) in enumerate(zip(table.grads, table.sources, strict=True)):
        rows[:, column] = _stats_of(grad, request)
        if request.extras and source.layout != torch.strided:
            rows[ZEROS, column] += source.numel() - grad.numel()  # what it doesn't list is 0
    if grad_scale is not None:
        divisor = grad_scale.detach().reshape(()).to(rows) if isinstance(grad_scale, Tensor) else grad_scale
        map_magnitudes(rows, request, lambda magnitudes: magnitudes / divisor)
    if totals is not None:
        finish(rows, request, totals, heads)


def read_penalised_(
    table: ReferenceTable,
    weights: list[Tensor],
    strengths: Tensor,
    request: Request,
    rows: Tensor,
    weight_rows: Tensor,
) -> None:
    for column, (grad, source, weight) in enumerate(zip(table.grads, table.sources, weights, strict=True)):
        if source.layout == torch.strided:
            penalise_(grad, weight, strengths[:, column])
        weight_rows[:, column] = weight_stats(weight)
    read(table, request, rows)


def penalise_(grad: Tensor, weight: Tensor, strengths: Tensor) -> None:
    """Of one gradient; ``strengths`` are its own two."""
    if known_to_host(strengths) and not bool(strengths.any()):
        return
    with tensors.its_mode(grad):
        for piece, of_weight in zip(_pieces(grad), _pieces(tensors.dense(weight.detach())), strict=True):
            g, w = _widened(piece), _widened(of_weight)
            penalised = (g + strengths[0] * torch.sgn(w)) + strengths[1] * w
            piece.copy_(torch.where(strengths.any(), penalised, g))


def weight_stats(weight: Tensor) -> Tensor:
    """The WEIGHT_FIELDS of one weight, 1-d."""
    stats = _stats_of(tensors.dense(weight.detach()), Request(extras=True))
    return torch.stack([stats[NORM], stats[MAX_ABS], stats[SUM_ABS]])


def read_units(table: ReferenceTable, dims: list[tuple[int, ...]], request: Request, unit_rows: Tensor) -> None:
    at = 0
    for grad, reduced in zip(table.grads, dims, strict=True):
        stats = unit_stats(grad, reduced, request)
        unit_rows[:, at : at + stats.shape[1]] = stats
        at += stats.shape[1]


def count_units(grad: Tensor, dims: tuple[int, ...]) -> int:
    """How many units a tensor has that extend over ``dims``."""
    if len(dims) == grad.dim():
        return 1
    return math.prod(size for d, size in enumerate(grad.shape) if d not in dims)


def unit_stats(grad: Tensor, dims: tuple[int, ...], request: Request) -> Tensor:
    """``[ALWAYS_FIELDS, u]`` of one tensor."""
    kept = [d for d in range(grad.dim()) if d not in dims]
    size = math.prod(grad.shape[d] for d in dims)
    widened = _widened(grad.permute((*kept, *dims))).reshape(count_units(grad, dims), size)
    magnitudes, nan, inf = _magnitudes(widened)
    counted = (magnitudes != 0).to(magnitudes.dtype) if request.norm_type == 0 else magnitudes
    return torch.stack([norm_of_norms(counted, request.norm_type), nan.sum(1), inf.sum(1)])


def join_units(unit_rows: Tensor, counts: list[int], request: Request, rows: Tensor) -> None:
    for column, own in enumerate(torch.split(unit_rows, counts, dim=1)):
        rows[0, column] = norm_of_norms(own[0], request.norm_type)
        rows[1:ALWAYS_FIELDS, column] = own[1:].sum(dim=1)


def finish(rows: Tensor, request: Request, totals: Tensor, heads: Tensor | None = None) -> None:
    total_norm = norm_of_norms(rows[0], request.norm_type) if rows.shape[1] else rows.new_zeros(())
    clip_coef = torch.ones_like(total_norm)
    if request.max_norm != math.inf:
        clipped = request.max_norm / (total_norm + request.eps)
        clip_coef = torch.where(total_norm <= request.max_norm, clip_coef, clipped)
    totals[TOTAL_NORM] = total_norm
    totals[CLIP_COEF] = clip_coef
    totals[TOTAL_NANS] = rows[1].sum()
    totals[TOTAL_INFS] = rows[2].sum()
    if heads is not None:
        fill_heads(totals, heads)


def fill_heads(totals: Tensor, heads: Tensor) -> None:
    heads[HEAD_NORM] = narrowed(totals[TOTAL_NORM], torch.float32)
    heads[HEAD_INF] = totals[TOTAL_NANS] + totals[TOTAL_INFS] > 0


def narrowed(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``norms`` in the dtype that callers get; only a norm that is not finite becomes so.

    Past float32's largest number a finite norm stays there: Inf always means that a gradient holds one.
    """
    if dtype == torch.float32:
        norms = torch.where(torch.isfinite(norms), norms.clamp(max=FLOAT32_MAX), norms)
    return norms.to(dtype, copy=True)


def scale_(table: ReferenceTable, factor: float | Tensor, skip: Tensor | None = None) -> None:
    for column, (grad, source) in enumerate(zip(table.grads, table.sources, strict=True)):
        own = factor[column] if isinstance(factor, Tensor) and factor.dim() == 1 else factor
        if (not isinstance(own, Tensor) or known_to_host(own)) and own == 1.0:
            continue
        with tensors.its_mode(source):
            for piece in _pieces(grad):
                factor_here = own.to(piece.device) if isinstance(own, Tensor) else own
                _write(piece, _widened(piece) * factor_here, skip)
            tensors.write_back(source, grad)


def _write(grad: Tensor, values: Tensor, skip: Tensor | None) -> None:
    """Rounds ``values`` into ``grad``, unless ``skip`` is not 0: selected, as NaN times 0 or
    complex Inf times 1 is NaN."""
    if skip is not None:
        values = torch.where((skip != 0.0).to(grad.device), grad, values.to(grad.dtype))
    grad.copy_(values)


def scale_units_(
    table: ReferenceTable, dims: list[tuple[int, ...]], factors: Tensor, skip: Tensor | None = None
) -> None:
    at = 0
    for grad, source, reduced in zip(table.grads, table.sources, dims, strict=True):
        units = count_units(grad, reduced)
        own = factors[at : at + units]
        at += units
        if known_to_host(own) and bool((own == 1.0).all()):
            continue
        with tensors.its_mode(source):
            scale_units_of(grad, reduced, own, skip)
            tensors.write_back(source, grad)


def scale_units_of(grad: Tensor, dims: tuple[int, ...], factors: Tensor, skip: Tensor | None = None) -> None:
    shape = [1 if d in dims else grad.shape[d] for d in range(grad.dim())]
    with tensors.its_mode(grad):
        _write(grad, _widened(grad) * factors.to(grad.device).reshape(shape), skip)


def clamp_(table: ReferenceTable, bound: float, skip: Tensor | None = None) -> None:
    for grad, source in zip(table.grads, table.sources, strict=True):
        if bound > torch.finfo(grad.dtype).max:
            continue  # nothing finite exceeds it, and Inf clamped to it would round back to Inf
        with tensors.its_mode(source):
            if skip is None:
                grad.clamp_(min=-bound, max=bound)
            else:
                _write(grad, grad.clamp(min=-bound, max=bound), skip)
            tensors.write_back(source, grad)


def zero_nonfinite_(table: ReferenceTable) -> None:
    for grad, source in zip(table.grads, table.sources, strict=True):
        with tensors.its_mode(source):
            grad.masked_fill_(torch.isfinite(grad).logical_not(), 0)
            tensors.write_back(source, grad)


def tally(before: Tensor, factor: float | Tensor, skip: float | Tensor, found: float | Tensor, after: Tensor) -> None:
    def differs(value: float | Tensor, idle: float) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.full((), value != idle, device=before.device)
        return value.detach().reshape(()).to(before.device) != idle

    skipped = differs(skip, 0.0)
    clipped = differs(factor, 1.0) > skipped
    one, bad = torch.ones_like(skipped), differs(found, 0.0)
    torch.add(before, torch.stack([one, clipped, skipped, skipped, bad]), out=after)
    after[IN_A_ROW].mul_(skipped)


def norm_of_norms(norms: Tensor, p: float) -> Tensor:
    """p-norm of norms or magnitudes along the last dimension, scaled by their dominant entry; NaN wins.

    Nothing at all has the norm that leaves any join unchanged: 0, or Inf for negative p. A finite input
    never gives Inf: past the largest number of its dtype the result stays there.
    """
    if norms.shape[-1] == 0:
        return norms.new_full(norms.shape[:-1], math.inf if p < 0 else 0.0)
    if p == 0:
        return norms.sum(-1)
    if p == math.inf:
        return norms.amax(-1)
    if p == -math.inf:
        return norms.amin(-1)
    dominant = norms.amax(-1) if p > 0 else norms.amin(-1)
    ordinary = torch.isfinite(dominant) & (dominant > 0)
    unit = torch.where(ordinary, dominant, 1.0)
    norm = unit * (norms / unit.unsqueeze(-1)).pow(p).sum(-1).pow(1.0 / p)
    largest = torch.finfo(norms.dtype).max
    return torch.where(ordinary, norm.clamp(max=largest), dominant)


def _pieces(grad: Tensor) -> Iterator[Tensor]:
    """Views of ``grad`` along its first dimension, about PIECE elements each."""
    if grad.numel() == 0:
        return
    if grad.dim() == 0:
        yield grad
        return
    rows = max(1, PIECE * grad.shape[0] // grad.numel())
    yield from torch.split(grad, rows)


def _widened(piece: Tensor) -> Tensor:
    real = wide_dtype(piece.device)
    if piece.is_complex():
        return piece.to(torch.complex128 if real == torch.float64 else torch.complex64)
    return piece.to(real)


def _magnitudes(widened: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> |x|, whether it is NaN, whether it is Inf. A complex number with a NaN part is a NaN, though hypot(Inf, NaN)
    is Inf; one without an Inf part is finite, though its magnitude may be past the largest number, and stays there."""
    nan = torch.isnan(widened)
    inf = torch.isinf(widened) & ~nan
    magnitudes = torch.where(nan, math.nan, widened.abs())
    if widened.is_complex():
        largest = torch.finfo(magnitudes.dtype).max
        magnitudes = torch.where(inf, magnitudes, magnitudes.clamp(max=largest))
    return magnitudes, nan, inf


def _stats_of(tensor: Tensor, request: Request) -> Tensor:
    """The first ``request.fields`` of FIELDS, 1-d."""
    pieces = [_piece_stats(piece, request) for piece in _pieces(tensor)]
    if not pieces:
        pieces = [_piece_stats(tensor.flatten(), request)]
    parts = torch.stack(pieces)
    # counts and sum_abs add up; the norm joins as a norm of norms, max_abs as a maximum
    joined = parts.sum(dim=0)
    joined[NORM] = norm_of_norms(parts[:, NORM], request.norm_type)
    if request.extras:
        joined[MAX_ABS] = parts[:, MAX_ABS].amax()
    return joined


def _piece_stats(piece: Tensor, request: Request) -> Tensor:
    magnitudes, nan, inf = _magnitudes(_widened(piece).flatten())
    counted = (magnitudes != 0).to(magnitudes.dtype) if request.norm_type == 0 else magnitudes
    fields = [norm_of_norms(counted, request.norm_type), nan.sum(), inf.sum()]
    if request.extras:
        largest = magnitudes.amax() if magnitudes.numel() else magnitudes.new_zeros(())
        fields += [largest, magnitudes.sum(), (magnitudes == 0).sum()]
    return torch.stack([value.to(magnitudes.dtype) for value in fields])
