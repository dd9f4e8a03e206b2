"""What setup.py decides about CUDA: with which nvcc, for which GPUs, and what it says where it can't."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands for every compiler: writes what it was called with, and an empty file where it is told to compile.
COMPILER = """#!/bin/sh
echo "$0 $*" >>"$LOG"
while [ $# -gt 1 ]; do [ "$1" = -o ] && : >"$2"; shift; done
exit 0
"""
NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) printf '%s\\n' $ARCHITECTURES; exit 0 ;;
  *--dryrun*) echo "#\\$ LIBRARIES= \\"-L{libraries}\\""; exit 0 ;;
esac
if [ -n "$BROKEN" ]; then echo "nvcc warning: old" >&2; echo "host.h(3): error: unsupported GNU version" >&2; exit 1; fi
. {compiler}
"""


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], dict, str]]:
    """Runs setup.py with compilers that do nothing -> (the process, _build.json, the compilers' calls)."""
    tree, tools, log = tmp_path / "tree", tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("fastclip", "kernels", "bench"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"))

    def script(path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    compiler = script(tools / "c++", COMPILER)

    def run(
        nvcc: bool = True, runtime: bool = True, before: str = "", **environment: str
    ) -> tuple[subprocess.CompletedProcess[str], dict, str]:
        if nvcc:
            libraries = tmp_path / "libraries"
            libraries.mkdir()
            if runtime:
                (libraries / "libcudart_static.a").touch()
            script(tmp_path / "toolkit/bin/nvcc", NVCC.format(libraries=libraries, compiler=compiler))
        for name in ("sh", "ar", "printf"):  # no nvcc, wherever this machine has one
            if found := shutil.which(name):
                (tools / name).symlink_to(found)
        program = f"import runpy, sys\nsys.argv[0] = 'setup.py'\n{before}\nrunpy.run_path('setup.py')"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, "build_ext", "--build-lib", "out", "--build-temp", "temp"],
            capture_output=True,
            text=True,
            cwd=tree,
            env={k: v for k, v in os.environ.items() if not k.startswith(("FASTCLIP_", "CUDA", "LD_"))}
            | {"PATH": str(tools), "CXX": str(compiler), "CUDA_HOME": str(tmp_path / "toolkit"), "LOG": str(log)}
            | {"ARCHITECTURES": "compute_75 compute_80 compute_90 compute_100 compute_103 compute_120"}
            | environment,
        )
        facts = tree / "out/fastclip/_build.json"
        return done, json.loads(facts.read_text()) if facts.exists() else {}, log.read_text() if log.exists() else ""

    return run


def test_the_kernels_are_built_where_nvcc_is(build) -> None:
    done, facts, calls = build()
    assert done.returncode == 0, done.stderr
    assert facts["cuda"] == ""
    assert "-gencode=arch=compute_80,code=[compute_80,sm_80,sm_90,sm_100,sm_120]" in calls
    assert "libcudart_static.a" in calls


def test_an_older_nvcc_builds_for_the_gpus_that_it_knows(build) -> None:
    done, _, calls = build(ARCHITECTURES="compute_70 compute_80 compute_89 compute_90 compute_90a")
    assert done.returncode == 0, done.stderr
    assert "code=[compute_80,sm_80,sm_90]" in calls


REFUSALS = {
    "no nvcc": ({"nvcc": False}, "nvcc was found neither in CUDA_HOME nor on the PATH"),
    "it fails": ({"BROKEN": "1"}, "failed: host.h(3): error: unsupported GNU version"),
    "no runtime": ({"runtime": False}, "came without libcudart_static.a"),
    "too old": ({"ARCHITECTURES": "compute_70"}, "compiles for none of sm_80"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_without_the_kernels_the_reason_is_kept(build, case: str) -> None:
    settings, reason = REFUSALS[case]
    done, facts, calls = build(**settings)
    assert done.returncode == 0, done.stderr
    assert facts["extension"]
    assert facts["cuda"].startswith("when fastclip was installed, ")
    assert reason in facts["cuda"]
    assert "libcudart_static.a" not in calls.splitlines()[-1]


@pytest.mark.parametrize("case", REFUSALS)
def test_who_insists_on_them_is_told(build, case: str) -> None:
    settings, reason = REFUSALS[case]
    done, facts, _ = build(FASTCLIP_CUDA="1", **settings)
    assert done.returncode != 0
    assert not facts
    assert "FASTCLIP_CUDA=1, but" in done.stderr
    assert reason in done.stderr


def test_they_can_be_left_out(build) -> None:
    done, facts, calls = build(FASTCLIP_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "FASTCLIP_CUDA=0" in facts["cuda"]
    assert "nvcc" not in calls


def test_an_unknown_wish_is_refused(build) -> None:
    done, _, _ = build(FASTCLIP_CUDA="yes")
    assert done.returncode != 0
    assert "FASTCLIP_CUDA=yes, but what is known is 0, 1 and emulated" in done.stderr


def test_emulated_needs_no_nvcc(build) -> None:
    done, facts, calls = build(nvcc=False, FASTCLIP_CUDA="emulated")
    assert done.returncode == 0, done.stderr
    assert facts["cuda"] == ""
    assert "csrc/cuda/emulated/fibers.cpp" in calls
    assert "-DFASTCLIP_CUDA_EMULATED=1" in calls


WITHOUT_TVM_FFI = "sys.modules['tvm_ffi'] = None"


def test_dlpack_comes_from_torch_where_there_is_no_other(build, tmp_path: Path) -> None:
    torchs = Path(importlib.util.find_spec("torch").origin).parent / "include/ATen/dlpack.h"
    done, _, calls = build(nvcc=False, before=WITHOUT_TVM_FFI)
    assert done.returncode == 0, done.stderr
    assert "-Itemp/include " in calls
    assert (tmp_path / "tree/temp/include/dlpack/dlpack.h").read_text() == torchs.read_text()
    assert "DLPackExchangeAPI" in torchs.read_text()


def test_without_any_dlpack_it_says_what_to_install(build) -> None:
    done, _, _ = build(nvcc=False, before=WITHOUT_TVM_FFI + "\nsys.modules['torch'] = None")
    assert done.returncode != 0
    assert "pip install apache-tvm-ffi" in done.stderr
