"""The host's time of calls whose kernels don't run."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest
import torch

import fastclip
from fastclip._native import C
from fastclip.backends import cuda

Python = Callable[..., "subprocess.CompletedProcess[str]"]

PROGRAM = """
import sys
from fastclip.bench import host
host.TENSORS = (1, 2, 4, 8)
code = host.main([{backend!r}, "--seconds", "0.001", *{more!r}])
print("native:", host.tables.C is not None, file=sys.stderr)
sys.exit(code)
"""


def timed(python: Python, backend: str, *more: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    return python(PROGRAM.format(backend=backend, more=more), TRITON_INTERPRET=interpret)


def check_table(printed: str) -> None:
    head, _, *rows = printed.splitlines()
    assert head.split("|")[2:6] == [" 1 tensor ", " 2 tensors ", " 4 tensors ", " 8 tensors "]
    assert [row.split("|")[1].strip() for row in rows] == [
        "norm",
        "clip",
        "wrapper's step",
        "its optimizer's, which does nothing",
    ]
    for row in rows:
        assert all(re.fullmatch(r" [\d.]+ (us|ms) ", cell) for cell in row.split("|")[2:6])


def test_triton_launches_are_timed_without_a_gpu(python: Python) -> None:
    done = timed(python, "triton")
    assert done.returncode == 0, done.stderr
    check_table(done.stdout)
    assert f"native: {C is not None}" in done.stderr
    assert "nothing is launched" in timed(python, "triton", interpret="1").stderr


def test_it_is_timed_without_native_code_too(python: Python) -> None:
    done = timed(python, "triton", "--without-native")
    assert done.returncode == 0, done.stderr
    check_table(done.stdout)
    assert "native: False" in done.stderr
    assert timed(python, cuda.name, "--without-native").returncode == 2


def test_cuda_launches_are_timed_where_they_are_emulated(python: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    done = timed(python, cuda.name)
    if not cuda.EMULATED:
        assert done.returncode == 2
        assert "bench/gpu.py times them there" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    check_table(done.stdout)
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    monkeypatch.setattr(fastclip.backends, "forced", cuda.name)
    C.cuda_set_idle(True)
    fastclip.clip_grad_value_(p, 1.0)
    assert p.grad.tolist() == [3.0, 4.0]
    C.cuda_set_idle(False)
    fastclip.clip_grad_value_(p, 1.0)
    assert p.grad.tolist() == [1.0, 1.0]
