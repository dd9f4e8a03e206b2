"""What the extension that ships is made of: instructions, floating-point modes, and whose OpenMP it uses."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import torch

from fastclip._native import C

WIDE = re.compile(r"%[yz]mm\d")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")


@pytest.fixture(scope="module")
def wide_functions() -> tuple[set[str], set[str]]:
    """Names of all functions of the extension, and of those that use 32- or 64-byte registers."""
    objdump = shutil.which("objdump")
    assert objdump, "objdump (binutils) is needed to look into the extension"
    assert C is not None, "there is no native extension to look into"
    command = [objdump, "-d", "-C", "--no-show-raw-insn", C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions, wide, current = set(), set(), ""
    for line in listing.splitlines():
        if found := FUNCTION.match(line):
            current = found[1]
            functions.add(current)
        elif WIDE.search(line):
            wide.add(current)
    return functions, wide


def test_the_default_variant_runs_on_every_machine(wide_functions: tuple[set[str], set[str]]) -> None:
    functions, wide = wide_functions
    assert any("cpu::baseline::" in name for name in functions), "the extension was stripped of its local symbols"
    strays = {name for name in wide if "cpu::avx2::" not in name and "cpu::avx512::" not in name}
    assert not strays


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_the_wide_variants_are_wide(wide_functions: tuple[set[str], set[str]], name: str) -> None:
    assert any(f"cpu::{name}::" in function for function in wide_functions[1])


def test_default_comes_last_and_always() -> None:
    assert C.cpu_capabilities()[-1] == "default"
    assert set(C.cpu_capabilities()) <= {"avx512", "avx2", "default"}


SUBNORMALS = """
import ctypes, sys
import fastclip, torch, struct
def single(x): return ctypes.c_float(ctypes.c_float(x).value * 1.0).value
assert 1e-310 * one != 0.0
t = torch.tensor([1e-40], dtype=torch.float32) * 1.0
assert float(t) != 0.0
assert float(torch.tensor([1e-310], dtype=torch.float64) * 1.0) != 0.0
fastclip.clip_grad_norm_([torch.nn.Parameter(torch.zeros(3))], 1.0)
fastclip.get_total_norm([torch.ones(200_000)])
assert float(torch.tensor([1e-40]) * 1.0) != 0.0
assert 1e-310 * one != 0.0
print("alive")
"""


def test_importing_leaves_subnormals_alive(python) -> None:
    done = python("import sys\none = float(len(sys.argv))\n" + SUBNORMALS)
    assert done.stdout.strip() == "alive", done.stderr


OPENMP = """
import torch, fastclip
from fastclip._native import C
torch.set_num_threads(2)
fastclip.get_total_norm([torch.ones(300_000)])
(torch.ones(300_000) * 2).sum()
paths = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if len(line.split(None, 5)) == 6}
print(*sorted(p for p in paths if "gomp" in p.rsplit("/", 1)[-1] or "iomp" in p.rsplit("/", 1)[-1]), sep="\\n")
"""


@pytest.mark.parametrize("first", ["torch", "fastclip"])
def test_one_openmp_serves_torch_and_fastclip(python, first: str) -> None:
    assert sys.platform == "linux"
    done = python(f"import {first}\n" + OPENMP)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert len(loaded) == 1, loaded
    assert loaded[0].startswith(torch.__path__[0]), loaded


def test_parallel_regions_bind_to_torchs_openmp(python, tmp_path) -> None:
    done = python(OPENMP, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "bindings"))
    assert done.returncode == 0, done.stderr
    targets = set()
    for log in tmp_path.iterdir():
        with log.open() as lines:
            for line in lines:
                if "`GOMP_parallel'" in line and f"binding file {C.__file__} " in line:
                    targets.add(re.search(r" to (\S+) \[", line)[1])
    assert len(targets) == 1, targets
    assert targets.pop().startswith(torch.__path__[0])
