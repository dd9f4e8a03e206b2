"""How large the pieces of work are; each number with its reason.

| constant | value | reason |
| --- | --- | --- |
| CHUNK_BYTES | 64 KiB | one program's share: 16 loads of 16 bytes for each of 256 threads hide the sum at its end behind the loads of its neighbours, and a second look finds it in the caches |
| TILE_BYTES | 16 KiB | of a read: 4 loads of 16 bytes a thread, and up to 64 numbers in registers; the compiler starts the next tile's loads early (all 16 are in one stretch of machine code), and nothing spills |
| WRITE_BYTES | 8 KiB | of a write: 2 loads of 16 bytes a thread; with 4, bfloat16 spilled on sm_90 |
| LOOK | 1,024 | elements of a second look at a time: 4 a thread and six accumulators of them stay in registers: 118 for all dtypes at once on sm_90, where 2,048 took 154 |
| UNITS, COLUMNS | 16 x 64 | short units (rows, filters) that one program reads side by side, and how many of their elements at a time: 4 a thread, 98 registers; with 128 columns 151 |
| SHORT_BYTES | 8 KiB | up to here a unit is short: longer ones fill a program by themselves |
| JOIN | 1,024 | partials that are joined at a time, 4 a thread |
| WARPS | 8 | 256 threads (512 where a warp has 64): two to five programs share a multiprocessor at 40 to 98 registers |
"""  # noqa: E501

import inspect
from collections.abc import Callable
from typing import Any

import triton
from triton import language as tl

CHUNK_BYTES = 1 << 16
TILE_BYTES = tl.constexpr(1 << 14)
WRITE_BYTES = tl.constexpr(1 << 13)
LOOK = tl.constexpr(1024)
UNITS = 16
COLUMNS = tl.constexpr(64)
SHORT_BYTES = 1 << 13
JOIN = tl.constexpr(1024)
WARPS = 8

# Stated at every launch, whatever a version of Triton would choose: a product that is fused into a sum has other bits.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

CHUNK = tl.constexpr(CHUNK_BYTES)


def kernel(function: Callable[..., None]) -> Any:
    """``triton.jit`` that compiles once, whatever the lengths and addresses: what isn't constexpr is not looked at."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])
