"""The CUDA backend: the native kernels of ``csrc/cuda``.

Serves plain ``torch.Tensor`` and ``Parameter`` objects of one CUDA device whose elements fill one block of its memory,
in any dimension order: float64, float32, bfloat16, float16, complex128, complex64; float8 read-only. Statistics up to
the coefficient take one launch, a write one more; nothing waits for the device, and all of it can be captured in a
CUDA graph.

In a build for tests (``FASTCLIP_CUDA=emulated``) the same kernels run on the CPU, as ``cuda-emulated``, where
``FASTCLIP_BACKEND`` asks for them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastclip._native import C, build_facts, why_missing
from fastclip.backends import apart, tables
from fastclip.types import Request

EMULATED = bool(getattr(C, "cuda_emulated", False))
name = "cuda-emulated" if EMULATED else "cuda"
device_type: int | None = None if EMULATED else getattr(C, "CUDA", None) or 2
returns_early = True

WORKSPACE = 1 << 13  # float64 numbers at least: the chunks of 170 MB of float32

_workspaces: dict[tuple[torch.device, int], Tensor] = {}


@functools.cache
def unavailable() -> str:
    if C is None:
        return why_missing
    if C.CUDA is None:
        return str(build_facts().get("cuda") or "the extension was built without the CUDA kernels")
    return str(C.cuda_unavailable())


def table_of(grads: list[Tensor], native: Any = None) -> Any:
    return native if native is not None and native.device_type == C.CUDA else C.GradTable(grads, C.CUDA)


def read(
    table: Any,
    request: Request,
    rows: Tensor,
    grad_scale: float | Tensor | None = None,
    totals: Tensor | None = None,
    heads: Tensor | None = None,
) -> None:
    divisor: float | Tensor = 1.0
    if grad_scale is not None:
        divisor = _scalar(grad_scale, rows.device)
    workspace, fresh = _workspace(table, [], request.extras, False, rows)
    C.cuda_read(
        table,
        [],
        request.norm_type,
        request.extras,
        divisor,
        rows,
        totals,
        heads,
        request.max_norm,
        request.eps,
        workspace,
        fresh,
    )


def read_penalised_(
    table: Any, weights: list[Tensor], strengths: Tensor, request: Request, rows: Tensor, weight_rows: Tensor
) -> None:
    def read(partners: Any) -> None:
        workspace, fresh = _workspace(table, [], request.extras, True, rows)
        C.cuda_read_penalised(
            table, partners, strengths, request.norm_type, request.extras, rows, weight_rows, workspace, fresh
        )

    apart.read_penalised_(table, weights, strengths, weight_rows, read)
    increment_version(table.grads)


def read_units(table: Any, dims: list[tuple[int, ...]], request: Request, unit_rows: Tensor) -> None:
    def read(counts: apart.Counts, out: Tensor) -> None:
        workspace, fresh = _workspace(table, counts, False, False, out)
        C.cuda_read(table, counts, request.norm_type, False, 1.0, out, None, None, 0.0, 0.0, workspace, fresh)

    apart.read_units(table, dims, request, unit_rows, read)


def join_units(unit_rows: Tensor, counts: list[int], request: Request, rows: Tensor) -> None:
    C.cuda_join(unit_rows, counts, request.norm_type, rows)


def finish(rows: Tensor, request: Request, totals: Tensor, heads: Tensor | None = None) -> None:
    fields, count = rows.shape
    C.cuda_finish(rows, fields, count, request.norm_type, request.max_norm, request.eps, totals, heads)


def scale_(table: Any, factor: float | Tensor, skip: Tensor | None = None) -> None:
    if not len(table):
        return
    if isinstance(factor, Tensor) and factor.dim() == 1:
        C.cuda_scale_each(table, [], factor, skip)
    elif isinstance(factor, Tensor) or factor != 1.0:
        C.cuda_scale(table, _scalar(factor, table.grads[0].device), skip)
    else:
        return
    increment_version(table.grads)


def scale_units_(table: Any, dims: list[tuple[int, ...]], factors: Tensor, skip: Tensor | None = None) -> None:
    def scale(counts: apart.Counts, own: Tensor) -> None:
        C.cuda_scale_each(table, counts, own, skip)
        increment_version([grad for grad, count in zip(table.grads, counts, strict=True) if count])

    apart.scale_units_(table, dims, factors, skip, scale)


def clamp_(table: Any, bound: float, skip: Tensor | None = None) -> None:
    C.cuda_clamp(table, bound, skip)
    increment_version(table.grads)


def zero_nonfinite_(table: Any) -> None:
    C.cuda_zero_nonfinite(table)
    increment_version(table.grads)


def tally(before: Tensor, factor: float | Tensor, skip: float | Tensor, found: float | Tensor, after: Tensor) -> None:
    C.cuda_tally(before, *(_scalar(value, before.device) for value in (factor, skip, found)), after)


def _scalar(value: float | Tensor, device: torch.device) -> float | Tensor:
    """As the kernels take it: a number, or one element on the device, read there."""
    return tables.one_number(value, device) if isinstance(value, Tensor) else float(value)


def _workspace(table: Any, counts: list[int], extras: bool, penalised: bool, like: Tensor) -> tuple[Tensor, bool]:
    """-> (memory for one read, whether its counters still have to be set to 0).

    One for each device and stream, of which each read leaves the counters at 0. A graph gets its own, from the
    graph's pool, and clears them itself: it may run at the same time as another that was captured on this stream.
    """
    size, stream, capturing = C.cuda_workspace(table, counts, extras, penalised)
    if capturing:
        return like.new_empty(size, dtype=torch.float64), True
    key = (like.device, stream)
    workspace = _workspaces.get(key)
    if workspace is None or workspace.numel() < size:
        workspace = _workspaces[key] = like.new_zeros(max(2 * size, WORKSPACE), dtype=torch.float64)
    return workspace, False
