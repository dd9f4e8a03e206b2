"""Builds ``fastclip._C`` without libtorch; everything declarative is in pyproject.toml.

Environment: ``CXX`` names the compiler, ``FASTCLIP_SANITIZE=address,undefined`` instruments the
extension, ``FASTCLIP_OPENMP=0`` builds it for one thread. ``FASTCLIP_CUDA=0`` leaves the CUDA kernels
out, ``1`` insists on them, ``emulated`` compiles them for the CPU, for tests; unset, they are built
where ``nvcc`` is found: in ``CUDA_HOME``, then on the PATH.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

X86 = platform.machine() in ("x86_64", "AMD64")
SOURCES = ["csrc/module.cpp", "csrc/grad_table.cpp", "csrc/cpu/engine.cpp", "csrc/cpu/kernels_default.cpp"]
CUDA_KERNELS = ["csrc/cuda/read.cu", "csrc/cuda/write.cu"]
CUDA_BINDINGS = "csrc/cuda/bindings.cpp"
EMULATOR = "csrc/cuda/emulated/fibers.cpp"
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
# Machine code runs on every later chip of its major version; for the majors that come, PTX.
CUDA_TARGETS = [80, 90, 100, 120]
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
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

        try:
            cuda, cuda_why = find_cuda()
        except LookupError as error:
            raise CompileError(str(error)) from None

        def compile_one(source: str) -> str:
            flags = [*FLAGS, *shared, *INSTRUCTION_SETS.get(source, [])]
            macros = [("FASTCLIP_X86", "1")] if X86 else []
            macros += [("FASTCLIP_CUDA", "1")] if cuda else []
            macros += [("FASTCLIP_CUDA_EMULATED", "1")] if cuda and cuda.emulated else []
            if source.endswith(".cu"):
                target = Path(self.build_temp, source).with_suffix(".o")
                target.parent.mkdir(parents=True, exist_ok=True)
                command = [*compiler, "-x", "c++", "-fPIC", "-Wno-unknown-pragmas", *flags]
                if not cuda.emulated:
                    command = [cuda.nvcc, "-ccbin", compiler[0], *CUDA_FLAGS, *cuda.targets]
                subprocess.run([*command, f"-I{cuda.include}", "-c", source, "-o", str(target)], check=True)
                return str(target)
            own = [*include, cuda.include] if cuda else include
            (built,) = self.compiler.compile(
                [source], output_dir=self.build_temp, macros=macros, include_dirs=own, extra_postargs=flags
            )
            return built

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            if cuda:
                try:
                    kernels = list(pool.map(compile_one, CUDA_KERNELS))
                except subprocess.CalledProcessError as error:
                    if os.environ.get("FASTCLIP_CUDA"):
                        raise CompileError(f"the CUDA kernels did not compile: {error}") from None
                    cuda, cuda_why = None, f"{error.cmd[0]} could not compile the kernels when fastclip was installed"
            objects = list(pool.map(compile_one, [*ext.sources, *(cuda.sources if cuda else [])]))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            [*objects, *kernels] if cuda else objects,
            str(target),
            extra_postargs=[*shared, *(cuda.link if cuda else [])],
            build_temp=self.build_temp,
            target_lang="c++",
        )
        self.record({"extension": True, "openmp": openmp, "compiler": " ".join(compiler), "cuda": cuda_why})

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


@dataclass
class Cuda:
    """What compiles the CUDA kernels, and for what."""

    include: str  # where their device.h lies
    emulated: bool = False
    nvcc: str = ""
    targets: "list[str]" = field(default_factory=list)
    sources: "list[str]" = field(default_factory=lambda: [CUDA_BINDINGS])  # beside the kernels
    link: "list[str]" = field(default_factory=list)


def find_cuda() -> "tuple[Cuda | None, str]":
    """-> (the toolkit, "") or (None, why the kernels are left out)."""
    wanted = os.environ.get("FASTCLIP_CUDA", "")
    if wanted == "emulated":
        return Cuda("csrc/cuda/emulated", emulated=True, sources=[CUDA_BINDINGS, EMULATOR]), ""
    if wanted == "0":
        return None, "FASTCLIP_CUDA=0 left the CUDA kernels out when fastclip was installed"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        if wanted == "1":
            raise LookupError("FASTCLIP_CUDA=1, but nvcc is neither in CUDA_HOME nor on the PATH")
        return None, "nvcc was found neither in CUDA_HOME nor on the PATH when fastclip was installed"

    def ask(*question: str) -> str:
        done = subprocess.run([nvcc, *question], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    known = {int(name) for name in re.findall(r"compute_(\d+)", ask("--list-gpu-arch"))}
    targets = [target for target in CUDA_TARGETS if target in known]
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    top = Path(re.search(r"TOP=(.*)", ask("--dryrun", "-x", "cu", os.devnull))[1].strip()).resolve()
    static = next(top.glob("**/libcudart_static.a"), None)
    if static is None:
        raise LookupError(f"{top} holds nvcc, but no libcudart_static.a; FASTCLIP_CUDA=0 builds without CUDA")
    link = [str(static), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
    return Cuda("csrc/cuda/nvidia", nvcc=nvcc, targets=codes, link=link), ""


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
depends = [
    str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".inl", ".cu") or "cuda" in path.parts
]
if sys.platform == "darwin":
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

setup(
    ext_modules=[Extension("fastclip._C", sources=sources, depends=depends, language="c++")],
    cmdclass={"build_ext": BuildExt},
)
