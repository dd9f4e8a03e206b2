"""The CPU backend: the native kernels of ``csrc/cpu``.

Serves plain ``torch.Tensor`` and ``Parameter`` objects whose elements fill one block of CPU memory, in
any dimension order: float64, float32, bfloat16, float16, complex128, complex64; float8 read-only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastclip._native import C, why_missing
from fastclip.backends import apart, reference
from fastclip.types import Request

name = "cpu"
device_type: int | None = getattr(C, "CPU", 1)
returns_early = False  # the host knows every factor


def unavailable() -> str:
    return why_missing


def table_of(grads: list[Tensor], native: Any = None) -> Any:
    return native if native is not None and native.device_type == C.CPU else C.GradTable(grads, C.CPU)


def read(
    table: Any,
    request: Request,
    rows: Tensor,
    grad_scale: float | Tensor | None = None,
    totals: Tensor | None = None,
    heads: Tensor | None = None,
) -> None:
    divisor = 1.0 if grad_scale is None else float(grad_scale)
    C.cpu_read(table, request.norm_type, request.extras, divisor, rows, torch.get_num_threads())
    if totals is not None:
        finish(rows, request, totals, heads)


def read_penalised_(
    table: Any, weights: list[Tensor], strengths: Tensor, request: Request, rows: Tensor, weight_rows: Tensor
) -> None:
    def read(partners: Any) -> None:
        threads = torch.get_num_threads()
        C.cpu_read_penalised(table, partners, strengths, request.norm_type, request.extras, rows, weight_rows, threads)

    apart.read_penalised_(table, weights, strengths, weight_rows, read)
    _bump(table, [of_sign != 0.0 or of_weight != 0.0 for of_sign, of_weight in strengths.T.tolist()])


def read_units(table: Any, dims: list[tuple[int, ...]], request: Request, unit_rows: Tensor) -> None:
    def read(counts: apart.Counts, out: Tensor) -> None:
        C.cpu_read(C.split(table, counts), request.norm_type, False, 1.0, out, torch.get_num_threads())

    apart.read_units(table, dims, request, unit_rows, read)


def join_units(unit_rows: Tensor, counts: list[int], request: Request, rows: Tensor) -> None:
    C.cpu_join(unit_rows, counts, request.norm_type, rows)


def finish(rows: Tensor, request: Request, totals: Tensor, heads: Tensor | None = None) -> None:
    fields, count = rows.shape
    C.cpu_finish(rows, fields, count, request.norm_type, request.max_norm, request.eps, totals)
    if heads is not None:
        reference.fill_heads(totals, heads)


def scale_(table: Any, factor: float | Tensor, skip: Tensor | None = None) -> None:
    if skip is not None and bool(skip):
        return
    if isinstance(factor, Tensor) and factor.dim() == 0:
        factor = float(factor)
    if isinstance(factor, Tensor):
        C.cpu_scale_each(table, factor, torch.get_num_threads())
        _bump(table, (factor != 1.0).tolist())
    elif factor != 1.0:
        C.cpu_scale(table, factor, torch.get_num_threads())
        increment_version(table.grads)


def scale_units_(table: Any, dims: list[tuple[int, ...]], factors: Tensor, skip: Tensor | None = None) -> None:
    if skip is not None and bool(skip):
        return

    def scale(counts: apart.Counts, own: Tensor) -> None:
        C.cpu_scale_each(C.split(table, counts), own, torch.get_num_threads())
        clipped = np.add.accumulate(np.concatenate([[0], (own != 1.0).numpy()]))[np.cumsum([0, *counts])]
        _bump(table, (np.diff(clipped) > 0).tolist())

    apart.scale_units_(table, dims, factors, None, scale)


def clamp_(table: Any, bound: float, skip: Tensor | None = None) -> None:
    if skip is not None and bool(skip):
        return
    _bump(table, C.cpu_clamp(table, bound, torch.get_num_threads()))


def zero_nonfinite_(table: Any) -> None:
    _bump(table, C.cpu_zero_nonfinite(table, torch.get_num_threads()))


tally = reference.tally  # the host mostly knows, and counts by itself


def _bump(table: Any, written: list[bool]) -> None:
    """Autograd can't see a write through a pointer."""
    increment_version([grad for grad, was in zip(table.grads, written, strict=True) if was])
