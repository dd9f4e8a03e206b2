"""What the Triton kernels that ship compile to, without a GPU: wide loads, no spills, products that aren't fused.

For compute capability 8.0 and 9.0, and for an AMD GPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fastclip.bench import machine_code

from fastclip.backends import triton as backend

if backend.INTERPRETED:
    pytest.skip("compiling needs a GPU's kernels as they are, not the interpreter", allow_module_level=True)

import triton
from fastclip.kernels import read, write
from fastclip.kernels.blocks import NVIDIA_OPTIONS, OPTIONS, WARPS
from fastclip.kernels.tally import tally_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVIDIA = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64)}
REGISTERS = 65536  # of a multiprocessor
BLOCKS = 4  # of a read that a multiprocessor has to hold at a time

F64, F32, BF16, F16 = (1 << code for code in range(4))
WRITABLE = 0b111111
TYPES = {
    **dict.fromkeys(("table", "first_units"), "*i64"),
    **dict.fromkeys(("owners", "done"), "*i32"),
    **dict.fromkeys(("heads", "divisor", "skip"), "*fp32"),
    **dict.fromkeys(("p_bits", "max_norm_bits", "eps_bits", "bound_bits", "factor_bits", "skip_bits"), "i64"),
    **dict.fromkeys(("row_stride", "unit_stride", "chunks", "count"), "i32"),
}
STACK_OF_3_8 = {"zero_nonfinite"}  # 8 bytes on sm_90, which it never touches
PENALTY = dict.fromkeys(("strengths", "weight_rows", "weight_partials"))


def reads(present: int, **settings: Any) -> tuple[Any, dict[str, Any]]:
    return read.read_kernel, {"PRESENT": present, "ALL": False, "EXTRAS": False, "UNITS": 1, **PENALTY, **settings}


def writes(present: int, change: int, **settings: Any) -> tuple[Any, dict[str, Any]]:
    return write.write_kernel, {"PRESENT": present, "CHANGE": change, "UNITS": 1, "skip": None, **settings}


NORMS = {
    "norms float32": reads(F32),
    "norms bfloat16": reads(BF16),
    "norms float16 and float64": reads(F16 | F64),
}
PENALISED = {
    "penalised float32": (read.read_kernel, {**reads(F32)[1], **dict.fromkeys(PENALTY, ...)}),
}
WRITES = {
    "scale float32": writes(F32, 0),
    "scale bfloat16": writes(BF16, 0),
    "scale float32 unless": writes(F32, 0, skip=...),
    "clamp": writes(WRITABLE, 2, factors=None),
    "zero_nonfinite": writes(WRITABLE, 3, factors=None),
}
VARIANTS = {
    **NORMS,
    **PENALISED,
    "norms of ten dtypes": reads((1 << 10) - 1),
    "everything float32": reads(F32, ALL=True, EXTRAS=True),
    "units float32": reads(F32, UNITS=16),
    "finish": (read.finish_kernel, {}),
    "join": (read.join_kernel, {}),
    "tally": (tally_kernel, {}),
    "tally what is known": (tally_kernel, {"factor": None, "skip": None, "found": None}),
    **WRITES,
    "scale_each unless": writes(WRITABLE, 1, UNITS=16, skip=...),
}


def compiled(name: str, target: GPUTarget) -> Any:
    """One kernel for one GPU; Triton keeps it on disk."""
    function, constants = VARIANTS[name]
    constants = {key: value for key, value in constants.items() if value is not ...}
    types = {p.name: "constexpr" if p.name in constants else TYPES.get(p.name, "*fp64") for p in function.params}
    source = ASTSource(function, signature=types, constexprs=constants)
    return triton.compile(source, target=target, options=NVIDIA_OPTIONS if target.backend == "cuda" else OPTIONS)


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", VARIANTS)
def test_no_spills_and_wide_loads(name: str, target: str, tmp_path: Path) -> None:
    assert machine_code.cuobjdump(), "cuobjdump is needed: the package triton carries it"
    (tmp_path / "kernel.cubin").write_bytes(compiled(name, NVIDIA[target]).asm["cubin"])
    (kernel,) = machine_code.kernels_of(str(tmp_path / "kernel.cubin"))
    known = triton.__version__.startswith("3.8.") and target == "sm_90" and name in STACK_OF_3_8
    assert (kernel.stack, kernel.local) == (8 if known else 0, 0)
    assert not {"LDL", "STL"} & kernel.instructions.keys()
    assert not {"LD", "ST"} & kernel.instructions.keys()  # an address from the table is global
    assert kernel.registers <= REGISTERS // (WARPS * 32 * BLOCKS)
    if name in NORMS:
        formats = bin(VARIANTS[name][1]["PRESENT"]).count("1")
        assert sum(kernel.wide_runs) >= 32 * formats, kernel.wide_runs  # 64 KiB, without a loop
        assert sorted(kernel.wide_runs)[-formats] >= 4, kernel.wide_runs  # in flight
    if name in WRITES:
        assert sum(kernel.wide_runs) >= 2


@pytest.mark.parametrize("name", VARIANTS)
def test_no_spills_on_amd(name: str) -> None:
    code = compiled(name, AMD["gfx942"]).asm["amdgcn"]
    assert set(re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)) == {"0"}
    assert "scratch_" not in code
    if name in NORMS:
        assert code.count("load_dwordx4") >= 16  # 256 threads


@pytest.mark.parametrize("name", [*NORMS, *PENALISED, *WRITES])
def test_products_are_neither_fused_nor_flushed(name: str) -> None:
    text = compiled(name, NVIDIA["sm_90"]).asm["ptx"]
    assert "mul.f32" in text or "f64" in text or name in ("clamp", "zero_nonfinite")
    assert "fma.rn.f32" not in text
    flushed = set(re.findall(r"\b\w[\w.]*\.ftz[\w.]*", text))
    assert flushed <= {"rcp.approx.ftz.f64", "abs.ftz.f32"}  # of float64's own logarithm and exponential


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_no_minimum(name: str) -> None:
    """Of NaN and a bound it would be the bound; interpreted it is NaN."""
    assert not re.search(r"\b(min|max)\.\w*\.?f(32|64)", compiled(name, NVIDIA["sm_90"]).asm["ptx"])


@pytest.mark.parametrize("name", [*NORMS, *PENALISED])
def test_the_last_to_count_sees_what_all_have_stored(name: str) -> None:
    """A barrier, the count and a barrier, of pieces and of units; and a barrier between a penalty and its read."""
    found = re.findall(r"barrier|atomic_rmw add, \w+, \w+", compiled(name, NVIDIA["sm_90"]).asm["ttir"])
    counted = ["barrier", "atomic_rmw add, acq_rel, gpu", "barrier"]
    assert found == ["barrier"] * (name in PENALISED) + 2 * counted


@pytest.mark.parametrize("target", [*NVIDIA.values(), *AMD.values()], ids=[*NVIDIA, *AMD])
def test_a_chunk_is_summed_alike_in_each_kernel(target: GPUTarget) -> None:
    """The last sum goes over lanes of the same layout: which dtypes are beside it, or a penalty, changes no bit."""
    found = {name: sums(compiled(name, target).asm["ttgir"]) for name in (*NORMS, *PENALISED)}
    assert len(set().union(*found.values())) == 1, found
    assert all(found.values())


def sums(text: str) -> set[str]:
    """The layouts of the lanes over which a chunk's sums of squares are added."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    lanes = re.findall(r"\}\) : \(tensor<1x1024xf64, (#\w+)>\) ->", text)
    return {layouts[name] for name in lanes}


@pytest.mark.parametrize(
    "kernel", [read.read_kernel, read.finish_kernel, read.join_kernel, write.write_kernel, tally_kernel]
)
def test_another_length_or_address_compiles_nothing(kernel: Any) -> None:
    assert all(p.is_constexpr or p.do_not_specialize for p in kernel.params)
    assert {p.name for p in kernel.params if p.is_constexpr} <= {"PRESENT", "ALL", "EXTRAS", "UNITS", "CHANGE"}
    assert all(p.annotation_type == "i64" for p in kernel.params if p.name.endswith("_bits"))
