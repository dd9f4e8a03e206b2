"""Builds ``fastclip._C`` without libtorch; everything declarative is in pyproject.toml.

Environment: ``CXX`` names the compiler, ``FASTCLIP_SANITIZE=address,undefined`` instruments the
extension, ``FASTCLIP_OPENMP=0`` builds it for one thread.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine() in ("x86_64", "AMD64")
SOURCES = ["csrc/module.cpp", "csrc/cpu/engine.cpp", "csrc/cpu/kernels_default.cpp"]
# Each instruction set is one translation unit with flags of its own.
INSTRUCTION_SETS = {
    "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mf16c"],
    "csrc/cpu/kernels_avx512.cpp": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",  # GCC 12 warns about its own _mm512_undefined_ps
    ],
}
# Contraction to FMA is off because every instruction set must give the same bits.
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]


class BuildExt(build_ext):
    """One object per source, in parallel, with per-source flags; a missing compiler is recorded."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler(self.compiler)
        if compiler is None:
            ext.optional = True  # nothing to copy or package
            self.record({"extension": False, "why": "no C++ compiler was found when fastclip was installed"})
            return
        import pybind11
        from tvm_ffi import libinfo

        include = [pybind11.get_include(), libinfo.find_dlpack_include_path(), *self.compiler.include_dirs]
        sanitize = os.environ.get("FASTCLIP_SANITIZE", "")
        # -O1: at -O3 the instrumented templates take ten times as long to compile
        shared = ["-O1", "-g1", f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined"] if sanitize else ["-g0"]
        openmp = os.environ.get("FASTCLIP_OPENMP", "1") != "0" and accepts_openmp(compiler)
        shared += ["-fopenmp"] if openmp else []
        self.compiler.compiler_so_cxx = self.compiler.compiler_so = [*compiler, "-fPIC"]
        self.compiler.linker_so_cxx[0:1] = self.compiler.linker_so[0:1] = compiler

        def compile_one(source: str) -> str:
            flags = [*FLAGS, *shared, *INSTRUCTION_SETS.get(source, [])]
            macros = [("FASTCLIP_X86", "1")] if X86 else []
            (built,) = self.compiler.compile(
                [source], output_dir=self.build_temp, macros=macros, include_dirs=include, extra_postargs=flags
            )
            return built

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=shared, build_temp=self.build_temp, target_lang="c++"
        )
        self.record({"extension": True, "openmp": openmp, "compiler": " ".join(compiler)})

    def record(self, facts: dict) -> None:
        """Written beside the extension; fastclip/_native.py reads it when there is none."""
        path = Path(self.build_lib, "fastclip", "_build.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n")
        if not facts["extension"]:
            self.warn(facts["why"] + "; the package will run on its slower reference backend")

    def copy_extensions_to_source(self) -> None:
        """Editable installs run from the source folder."""
        super().copy_extensions_to_source()
        self.copy_file(Path(self.build_lib, "fastclip", "_build.json"), "fastclip/_build.json")


def find_compiler(distutils_compiler) -> "list[str] | None":
    if os.name == "nt":
        return None  # the kernels use GCC's and Clang's vector types
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)  # a named compiler that is missing or fails stops the install
    for candidate in (*distutils_compiler.compiler_cxx[:1], "c++", "g++", "clang++"):
        if shutil.which(candidate):
            return [candidate]
    return None


def accepts_openmp(compiler: list) -> bool:
    """Apple's Clang has no OpenMP of its own."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


sources = [*SOURCES, *(INSTRUCTION_SETS if X86 else [])]
depends = [str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".inl")]
if sys.platform == "darwin":
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

setup(
    ext_modules=[Extension("fastclip._C", sources=sources, depends=depends, language="c++")],
    cmdclass={"build_ext": BuildExt},
)
