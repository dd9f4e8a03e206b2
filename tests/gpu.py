"""What tests of a GPU's kernels share: the kernels in question, on a GPU or on the CPU, and how to call them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle import INF, NAN, bits, randn
from torch import Tensor

from fastclip._native import C
from fastclip.backends import EMULATED, ON_GPU, cpu, cuda, reference, triton
from fastclip.types import ALWAYS_FIELDS, INFS, NANS, NORM, WEIGHT_FIELDS, Request

RUNNABLE = [backend for backend in ON_GPU if not backend.unavailable()]
WHY_NOT = "; ".join(f"{backend.name}: {backend.unavailable()}" for backend in ON_GPU)

NAMES = {backend.name for backend in ON_GPU}  # of those that add a few products in float32
POISON = 77.0
CHUNK_BYTES = 1 << 16  # csrc/cuda/table.h and kernels/blocks.py
SHORT_BYTES = CHUNK_BYTES // 8  # of a unit that shares a chunk with others

kernels: Any = None  # the backend whose kernels are tested now


def use(backend: Any) -> None:
    global kernels
    kernels = backend


def module_of(backend: str) -> Any:
    """Of a backend's name, or the name of one of the CPU's instruction sets."""
    return {each.name: each for each in (*ON_GPU, reference)}.get(backend, cpu)


def emulated() -> bool:
    return kernels in EMULATED


def device() -> str:
    return "cpu" if emulated() else "cuda"


def in_any_order(work: Callable[[], list[Tensor]], seeds: tuple[int, ...] = (0, 1, 2, 3)) -> list[Tensor]:
    """What ``work`` gives, which must be the same bits in whichever order threads and blocks come."""
    results = []
    for seed in seeds:
        with order(seed):
            results.append(work())
    for other in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other, strict=True))
    return results[0]


def captured(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What replays a CUDA graph of ``work``, and gives what that gave; emulated, ``work`` itself."""
    if emulated():
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()

    def replay() -> Tensor:
        graph.replay()
        return made

    return replay


@contextmanager
def order(seed: int) -> Iterator[None]:
    """Emulated, threads and blocks come in another order for each seed; 0 is the one in which they are numbered."""
    if not emulated():
        yield
    elif kernels is cuda:
        C.cuda_set_order(seed)
        try:
            yield
        finally:
            C.cuda_set_order(0)
    else:
        with shuffled_programs(seed):
            yield


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Triton's interpreter runs a launch's programs one by one, as numbered; here each gets another's number."""
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    set_dim, set_index, numbers = builder.set_grid_dim, builder.set_grid_idx, [0]

    def shuffle(count: int, *others: int) -> None:
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) if seed else range(count)
        numbers[:] = [int(number) for number in shuffled]
        set_dim(count, *others)

    builder.set_grid_dim, builder.set_grid_idx = shuffle, lambda x, y, z: set_index(numbers[x], y, z)
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_dim, set_index


def poisoned(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full(shape, POISON, dtype=dtype, device=device())


def all_filled(*memory: Tensor) -> None:
    for filled in memory:
        assert not bool((filled == POISON).any())


def counters_are_zero() -> bool:
    if kernels is cuda:
        return all(workspace.view(torch.int32)[:2].tolist() == [0, 0] for workspace in cuda._workspaces.values())
    return not any(bool(counters.any()) for counters in triton._launch()._done.values())


def read(
    grads: list[Tensor], request: Request | None = None, grad_scale: float | Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> rows, totals, heads of one read."""
    request = request or Request()
    rows, totals, heads = poisoned(request.fields, len(grads)), poisoned(4), poisoned(2, dtype=torch.float32)
    kernels.read(kernels.table_of(grads), request, rows, grad_scale, totals, heads)
    all_filled(rows, totals, heads)
    assert counters_are_zero()
    return rows, totals, heads


def read_units(grads: list[Tensor], request: Request | None = None) -> Tensor:
    """Of the rows of matrices."""
    request = request or Request()
    unit_rows = poisoned(ALWAYS_FIELDS, sum(len(grad) for grad in grads))
    kernels.read_units(kernels.table_of(grads), [(1,)] * len(grads), request, unit_rows)
    all_filled(unit_rows)
    assert counters_are_zero()
    return unit_rows


def penalise(
    grads: list[Tensor], weights: list[Tensor], strengths: Tensor, request: Request | None = None
) -> list[Tensor]:
    """-> rows, weight_rows and what became of the gradients, which are copied first."""
    request = request or Request()
    own = [grad.clone() for grad in grads]
    rows, weight_rows = poisoned(request.fields, len(grads)), poisoned(len(WEIGHT_FIELDS), len(grads))
    kernels.read_penalised_(kernels.table_of(own), weights, strengths, request, rows, weight_rows)
    all_filled(rows, weight_rows)
    assert counters_are_zero()
    return [rows, weight_rows, *own]


def of_reference(grads: list[Tensor], request: Request, grad_scale: float | Tensor | None = None) -> list[Tensor]:
    rows, totals = torch.empty(request.fields, len(grads), dtype=torch.float64, device=device()), poisoned(4)
    heads = poisoned(2, dtype=torch.float32)
    reference.read(reference.table_of(grads), request, rows, grad_scale, totals, heads)
    return [rows, totals, heads]


def close(got: Tensor, want: Tensor, far: float = 1e-7) -> None:
    torch.testing.assert_close(got, want, rtol=far, atol=0, equal_nan=True)


def some(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(size, dtype=dtype).to(device()) for size in sizes]


def some_rows(count: int, p: float = 2.0, bad: float = 0.0) -> Tensor:
    """As a read gives them, ``bad`` of them of something that isn't finite, which shows in the norm."""
    rows = torch.rand(ALWAYS_FIELDS, count, dtype=torch.float64)
    rows[1:] = torch.randint(1, 3, (2, count)) * (torch.rand(2, count) < bad)
    if p > 0:
        rows[NORM].masked_fill_(rows[INFS] > 0, INF)
    rows[NORM].masked_fill_(rows[NANS] > 0, NAN)
    return rows.to(device())


def chunk(dtype: torch.dtype) -> int:
    return CHUNK_BYTES // dtype.itemsize
