"""How large the pieces of work are; each number with its reason.

| constant | value | reason |
| --- | --- | --- |
| CHUNK_BYTES | 64 KiB | one program's share: 32 loads of 16 bytes for each of 128 threads, and a second look finds it in the caches |
| TILE_BYTES | 8 KiB | of a read: 4 loads of 16 bytes a thread; the compiler starts the next tiles' loads early (all 32 are in one stretch of machine code, 8 to 18 on their way at a time), and nothing spills |
| WRITE_BYTES | 4 KiB | of a write: 2 loads of 16 bytes a thread; with 4, bfloat16 spilled on sm_90 |
| LOOK | 512 | elements of a second look at a time: 4 a thread and six accumulators of them stay in registers |
| UNITS, COLUMNS | 16 x 32 | short units (rows, filters) that one program reads side by side, and how many of their elements at a time: 4 a thread, 90 registers |
| SHORT_BYTES | 8 KiB | up to here a unit is short: longer ones fill a program by themselves |
| JOIN_PLAIN | 1,024 | norms that are joined at a time where their plain squares do: 8 loads a thread on their way |
| JOIN | 256 | the same where they don't, 2 a thread of each sum |
| WARPS | 4 | 128 threads (256 where a warp has 64). While a program looks up its chunk, waits for its first loads and joins its sums, others have to keep the memory busy: of these at least four share a multiprocessor, at 128 registers; of programs twice as wide it were two. Told so (maxnreg), NVIDIA's compiler spills nothing; left alone, some versions spill a few registers to make room for one program more |
"""  # noqa: E501

import inspect
from collections.abc import Callable
from typing import Any

import triton
from triton import language as tl

CHUNK_BYTES = 1 << 16
SHORT_BYTES = 1 << 13
UNITS = 16
WARPS = 4

# Interpreted, an operation costs as much for four numbers as for a thousand: there tiles are larger.
MORE = 4 if triton.knobs.runtime.interpret else 1
TILE_BYTES = tl.constexpr(MORE << 13)
WRITE_BYTES = tl.constexpr(MORE << 12)
LOOK = tl.constexpr(MORE << 9)
COLUMNS = tl.constexpr(MORE << 5)
JOIN = tl.constexpr(MORE << 8)
JOIN_PLAIN = tl.constexpr(1 << 10)

# Stated at every launch, whatever a version of Triton would choose: a product that is fused into a sum has other bits.
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}
NVIDIA_OPTIONS = {**OPTIONS, "maxnreg": 65536 // (4 * WARPS * 32)}  # see WARPS

CHUNK = tl.constexpr(CHUNK_BYTES)


def kernel(function: Callable[..., None]) -> Any:
    """``triton.jit`` that compiles once, whatever the lengths and addresses: what isn't constexpr is not looked at."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])
