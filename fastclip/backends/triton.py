"""The Triton backend: the kernels of ``kernels/``, compiled when they are first used.

For GPUs where no CUDA kernels were compiled at install: NVIDIA's from compute capability 8.0, and AMD's. Serves plain
``torch.Tensor`` and ``Parameter`` objects of one device whose elements fill one block of its memory, in any dimension
order: float64, float32, bfloat16, float16, complex128, complex64; float8 read-only. Statistics up to the coefficient
take one launch, a write one more; nothing waits for the device. The table of addresses is uploaded when a list is new,
and in a captured CUDA graph it can't be.

With ``TRITON_INTERPRET=1`` Triton's interpreter runs the same kernels, in larger tiles, on CPU tensors, slowly and
where ``FASTCLIP_BACKEND=triton`` asks for it: for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastclip.backends import apart, tables
from fastclip.types import Request

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
LEAST_CAPABILITY = (8, 0)  # that Triton compiles for
_SERVED = tables.CPU if INTERPRETED else tables.ROCM if torch.version.hip else tables.CUDA

name = "triton"
device_type: int | None = None if INTERPRETED else _SERVED
returns_early = True


@functools.cache
def unavailable() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if INTERPRETED:
        return _interpreter_refuses(importlib.import_module("triton").__version__, np.__version__)
    if not torch.cuda.is_available():
        return "no GPU that torch can use was found on this machine"
    if not torch.version.hip and (capability := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
        return f"this GPU's compute capability is {capability[0]}.{capability[1]}; Triton needs 8.0 or later"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler (gcc, clang, or what CC names) to make its launchers, and found none"
    return ""


def _interpreter_refuses(triton_version: str, numpy_version: str) -> str:
    """That of Triton 3.6 makes an int of an array with one dimension, which numpy 2.4 has given up."""
    of_triton, of_numpy = ([int(part) for part in each.split(".")[:2]] for each in (triton_version, numpy_version))
    if of_triton >= [3, 7] or of_numpy < [2, 4]:
        return ""
    return (
        f"the interpreter of triton {triton_version} needs numpy before 2.4, and this is numpy {numpy_version}; "
        "that of triton 3.7 works with both"
    )


@functools.cache
def _launch() -> Any:
    """Imports triton: a second that only those pay who use it."""
    return importlib.import_module("fastclip.kernels.launch")


def table_of(grads: list[Tensor], native: Any = None) -> Any:
    return tables.table_of(grads, _SERVED, native)


def read(
    table: Any,
    request: Request,
    rows: Tensor,
    grad_scale: float | Tensor | None = None,
    totals: Tensor | None = None,
    heads: Tensor | None = None,
) -> None:
    divisor = None if grad_scale is None else _on_device(grad_scale, rows.device)
    if not len(table):
        if totals is not None:
            finish(rows, request, totals, heads)
        return
    bounds = {"max_norm": request.max_norm, "eps": request.eps}
    _launch().read(table.facts, None, request.norm_type, request.extras, rows, divisor, totals, heads, **bounds)


def read_penalised_(
    table: Any, weights: list[Tensor], strengths: Tensor, request: Request, rows: Tensor, weight_rows: Tensor
) -> None:
    def read(partners: Any) -> None:
        if len(table):
            _launch().read(
                table.facts,
                None,
                request.norm_type,
                request.extras,
                rows,
                weights=partners.facts,
                strengths=strengths,
                weight_rows=weight_rows,
            )

    apart.read_penalised_(table, weights, strengths, weight_rows, read)
    increment_version(table.grads)


def read_units(table: Any, dims: list[tuple[int, ...]], request: Request, unit_rows: Tensor) -> None:
    def read(counts: apart.Counts, out: Tensor) -> None:
        _launch().read(table.facts, counts, request.norm_type, False, out)

    apart.read_units(table, dims, request, unit_rows, read)


def join_units(unit_rows: Tensor, counts: list[int], request: Request, rows: Tensor) -> None:
    _launch().join(unit_rows, counts, request.norm_type, rows)


def finish(rows: Tensor, request: Request, totals: Tensor, heads: Tensor | None = None) -> None:
    _launch().finish(rows, request.norm_type, request.max_norm, request.eps, totals, heads)


def scale_(table: Any, factor: float | Tensor, skip: Tensor | None = None) -> None:
    if not len(table) or (not isinstance(factor, Tensor) and factor == 1.0):
        return
    device = table.grads[0].device
    if isinstance(factor, Tensor) and factor.dim() == 1:
        _launch().scale_each(table.facts, device, factor, skip=skip)
    else:
        _launch().scale(table.facts, device, _on_device(factor, device), skip)
    increment_version(table.grads)


def scale_units_(table: Any, dims: list[tuple[int, ...]], factors: Tensor, skip: Tensor | None = None) -> None:
    def scale(counts: apart.Counts, own: Tensor) -> None:
        device = table.grads[0].device
        _launch().scale_each(table.facts, device, own, counts, skip)
        increment_version([grad for grad, count in zip(table.grads, counts, strict=True) if count])

    apart.scale_units_(table, dims, factors, skip, scale)


def clamp_(table: Any, bound: float, skip: Tensor | None = None) -> None:
    if len(table):
        _launch().clamp(table.facts, table.grads[0].device, bound, skip)
        increment_version(table.grads)


def zero_nonfinite_(table: Any) -> None:
    if len(table):
        _launch().zero_nonfinite(table.facts, table.grads[0].device)
        increment_version(table.grads)


def tally(before: Tensor, factor: float | Tensor, skip: float | Tensor, found: float | Tensor, after: Tensor) -> None:
    told = (factor, skip, found)
    known = [tables.one_number(value, before.device) if isinstance(value, Tensor) else float(value) for value in told]
    _launch().tally(before, *known, after)


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """One float32 or float64 there; a number of the host gets there without waiting."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float64, device=device)
    return tables.one_number(value, device)
