"""The CPU backend: the native kernels of ``csrc/cpu``.

Serves plain ``torch.Tensor`` and ``Parameter`` objects whose elements fill one block of CPU memory, in
any dimension order: float64, float32, bfloat16, float16, complex128, complex64; float8 read-only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastclip._native import C, why_missing
from fastclip.types import Request

name = "cpu"


def unavailable() -> str:
    return why_missing


def table_of(grads: list[Tensor], native: Any = None) -> Any:
    return C.GradTable(grads) if native is None else native


def read(table: Any, request: Request, rows: Tensor) -> None:
    C.cpu_read(table, request.norm_type, request.extras, rows, torch.get_num_threads())


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


def clamp_(table: Any, bound: float) -> None:
    _bump(table, C.cpu_clamp(table, bound, torch.get_num_threads()))


def zero_nonfinite_(table: Any) -> None:
    _bump(table, C.cpu_zero_nonfinite(table, torch.get_num_threads()))


def _bump(table: Any, written: list[bool]) -> None:
    """Autograd can't see a write through a pointer."""
    increment_version([grad for grad, was in zip(table.grads, written, strict=True) if was])
