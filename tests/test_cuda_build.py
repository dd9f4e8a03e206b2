"""What the CUDA kernels that ship were compiled to: no local memory, wide loads, registers within their bounds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastclip.bench import machine_code
from fastclip.bench.machine_code import Kernel

from fastclip._native import C

if C is None or C.CUDA is None or C.cuda_emulated:
    pytest.skip("the extension holds no CUDA kernels: nvcc is needed to build it", allow_module_level=True)

TARGETS = {"sm_80", "sm_90", "sm_100", "sm_120"}
REGISTERS = 65536  # of a multiprocessor, on every target
THREADS = 128  # of a block
# How many blocks a multiprocessor has to hold at a time, as __launch_bounds__ says.
BLOCKS = {
    "read<norms>": 5,
    "read<all>": 4,
    "read<penalised>": 4,
    "join": 4,
    "finish": 1,
    "tally": 1,
    "write<scale>": 6,
    "write<scale_each>": 6,
    "write<clamp>": 6,
    "write<zero_nonfinite>": 6,
}
# Loads of 16 bytes on their way at a time: float32, bfloat16, float16 and float64, then float8.
IN_FLIGHT = [8, 8, 8, 8, 2]
TABLE = Path(__file__).parents[1] / "bench/results/cuda_registers.md"


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    assert machine_code.cuobjdump(), "cuobjdump is needed: pip install triton, or CUDA's own on the PATH"
    return machine_code.kernels_of(C.__file__)


def test_every_kernel_is_there_for_every_target(kernels: list[Kernel]) -> None:
    assert {(kernel.name, kernel.target) for kernel in kernels} == {(n, t) for n in BLOCKS for t in TARGETS}
    assert all(kernel.size > 50 for kernel in kernels)


def test_no_kernel_uses_local_memory(kernels: list[Kernel]) -> None:
    assert not [(k.name, k.target, k.stack, k.local) for k in kernels if k.stack or k.local]
    assert not [(k.name, k.target) for k in kernels if {"LDL", "STL"} & k.instructions.keys()]


def test_all_loads_and_stores_know_their_memory(kernels: list[Kernel]) -> None:
    """An address read from the table is global; a generic load would first have to ask."""
    assert not [(k.name, k.target) for k in kernels if {"LD", "ST"} & k.instructions.keys()]
    assert all(k.instructions["LDG"] > 0 for k in kernels)


def test_each_formats_loop_has_its_wide_loads_in_flight(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if kernel.name == "read<norms>":
            longest = sorted(kernel.wide_runs, reverse=True)[: len(IN_FLIGHT)]
            assert all(run >= wanted for run, wanted in zip(longest, IN_FLIGHT, strict=True)), (kernel.target, longest)


def test_registers_leave_room_for_the_blocks(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        most = REGISTERS // (THREADS * BLOCKS[kernel.name]) // 8 * 8  # registers are given out in eights
        assert kernel.registers <= most, (kernel.name, kernel.target)


def test_the_table_of_registers_is_of_these_kernels(kernels: list[Kernel]) -> None:
    rows = re.findall(r"^\| (\w+(?:<\w+>)?) \|((?: [\d]+ \([\d,]+\) \|)+)$", TABLE.read_text(), re.MULTILINE)
    assert {name: cells.count("(") for name, cells in rows} == {name: len(TARGETS) for name in BLOCKS}
