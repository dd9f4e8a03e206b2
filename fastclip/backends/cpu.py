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
from fastclip.backends import reference
from fastclip.types import Request

name = "cpu"


def unavailable() -> str:
    return why_missing


def table_of(grads: list[Tensor], native: Any = None) -> Any:
    return C.GradTable(grads) if native is None else native


def read(table: Any, request: Request, rows: Tensor) -> None:
    C.cpu_read(table, request.norm_type, request.extras, rows, torch.get_num_threads())


def read_penalised_(
    table: Any, weights: list[Tensor], strengths: Tensor, request: Request, rows: Tensor, weight_rows: Tensor
) -> None:
    partners = C.partners(table, weights)
    apart = partners.refused
    for i in apart:
        reference.penalise_(table.grads[i].detach(), weights[i], strengths[:, i])
    threads = torch.get_num_threads()
    C.cpu_read_penalised(table, partners, strengths, request.norm_type, request.extras, rows, weight_rows, threads)
    for i in apart:
        weight_rows[:, i] = reference.weight_stats(weights[i])
    _bump(table, [of_sign != 0.0 or of_weight != 0.0 for of_sign, of_weight in strengths.T.tolist()])


def read_units(table: Any, dims: list[tuple[int, ...]], request: Request, unit_rows: Tensor) -> None:
    counts = _pieces(table, dims)
    if all(counts):
        C.cpu_read(C.split(table, counts), request.norm_type, False, unit_rows, torch.get_num_threads())
        return
    own = unit_rows.new_empty((len(unit_rows), sum(counts)))
    C.cpu_read(C.split(table, counts), request.norm_type, False, own, torch.get_num_threads())
    at = from_own = 0
    for grad, reduced, count in zip(table.grads, dims, counts, strict=True):
        found = own[:, from_own : from_own + count] if count else reference.unit_stats(grad.detach(), reduced, request)
        unit_rows[:, at : at + found.shape[1]] = found
        at, from_own = at + found.shape[1], from_own + count


def join_units(unit_rows: Tensor, counts: list[int], request: Request, rows: Tensor) -> None:
    C.cpu_join(unit_rows, counts, request.norm_type, rows)


def finish(rows: Tensor, request: Request, totals: Tensor) -> None:
    fields, count = rows.shape
    C.cpu_finish(rows, fields, count, request.norm_type, request.max_norm, request.eps, totals)


def scale_(table: Any, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor) and factor.dim() == 0:
        factor = float(factor)
    if isinstance(factor, Tensor):
        C.cpu_scale_each(table, factor, torch.get_num_threads())
        _bump(table, (factor != 1.0).tolist())
    elif factor != 1.0:
        C.cpu_scale(table, factor, torch.get_num_threads())
        increment_version(table.grads)


def scale_units_(table: Any, dims: list[tuple[int, ...]], factors: Tensor) -> None:
    counts = _pieces(table, dims)
    if all(counts):
        C.cpu_scale_each(C.split(table, counts), factors, torch.get_num_threads())
        starts = np.cumsum([0, *counts[:-1]])
        _bump(table, (np.add.reduceat((factors != 1.0).numpy(), starts) > 0).tolist() if counts else [])
        return
    at = 0
    for i, (grad, reduced) in enumerate(zip(table.grads, dims, strict=True)):
        count = counts[i] or reference.count_units(grad, reduced)
        own = factors[at : at + count]
        at += count
        if bool((own == 1.0).all()):
            continue
        if counts[i]:
            C.cpu_scale_each(
                C.split(table, [0] * i + [count] + [0] * (len(counts) - i - 1)), own, torch.get_num_threads()
            )
            increment_version([grad])
        else:
            reference.scale_units_of(grad.detach(), reduced, own)


def clamp_(table: Any, bound: float) -> None:
    _bump(table, C.cpu_clamp(table, bound, torch.get_num_threads()))


def zero_nonfinite_(table: Any) -> None:
    _bump(table, C.cpu_zero_nonfinite(table, torch.get_num_threads()))


def _pieces(table: Any, dims: list[tuple[int, ...]]) -> list[int]:
    """For each tensor in how many equal pieces of memory its units lie; 0 if they don't lie so."""
    masks = {over: sum(1 << d for d in over) for over in set(dims)}
    counts: list[int] = C.pieces(table, [masks[over] for over in dims])
    return counts


def _bump(table: Any, written: list[bool]) -> None:
    """Autograd can't see a write through a pointer."""
    increment_version([grad for grad, was in zip(table.grads, written, strict=True) if was])
