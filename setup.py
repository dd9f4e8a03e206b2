"""Builds ``fastclip._C`` without libtorch; everything declarative is in pyproject.toml.

Environment: ``CXX`` names the compiler, ``FASTCLIP_SANITIZE=address,undefined`` instruments the
extension, ``FASTCLIP_OPENMP=0`` builds it for one thread. ``FASTCLIP_CUDA=0`` leaves the CUDA
kernels out, ``1`` insists on them, ``emulated`` compiles them for the CPU, for tests; unset, they
are built where ``nvcc`` is found: in ``CUDA_HOME``, then on the PATH.
"""

import importlib.util
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
MODULE = "csrc/module.cpp"  # the one source that asks whether there are CUDA kernels
SOURCES = [MODULE, "csrc/grad_table.cpp", "csrc/cpu/engine.cpp", "csrc/cpu/kernels_default.cpp"]
CUDA_KERNELS = ["csrc/cuda/read.cu", "csrc/cuda/write.cu", "csrc/cuda/tally.cu"]
CUDA_BINDINGS = "csrc/cuda/bindings.cpp"
EMULATOR = "csrc/cuda/emulated/fibers.cpp"
# Each instruction set is one translation unit with flags of its own.
INSTRUCTION_SETS = {
    "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/kernels_avx512.cpp": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",  # GCC 12 warns about its own _mm512_undefined_ps
    ],
}
# Contraction to FMA is off because every instruction set must give the same bits: only exact products are fused, by
# name.
# Machine code runs on every later chip of its major version. All of it is made from the PTX of the first, which is also
# what the majors to come compile at run time: the kernels use nothing newer, and one pass of the front end serves all.
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

        include = [pybind11.get_include(), find_dlpack(self.build_temp), *self.compiler.include_dirs]
        sanitize = os.environ.get("FASTCLIP_SANITIZE", "")
        # -O1: at -O3 the instrumented templates take ten times as long to compile
        shared = ["-O1", "-g1", f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined"] if sanitize else ["-g0"]
        openmp = os.environ.get("FASTCLIP_OPENMP", "1") != "0" and accepts_openmp(compiler)
        shared += ["-fopenmp"] if openmp else []
        self.compiler.compiler_so_cxx = self.compiler.compiler_so = [*compiler, "-fPIC"]
        self.compiler.linker_so_cxx[0:1] = self.compiler.linker_so[0:1] = compiler

        cuda, cuda_why = None, ""
        wanted = os.environ.get("FASTCLIP_CUDA", "")
        try:
            cuda = find_cuda(wanted)
        except NoCuda as why:
            if wanted not in ("", "0"):
                raise CompileError(f"FASTCLIP_CUDA={wanted}, but {why}") from None
            cuda_why = f"when fastclip was installed, {why}"

        def compile_one(source: str) -> str:
            macros = [("FASTCLIP_X86", "1")] if X86 else []
            macros += [("FASTCLIP_CUDA", "1")] if cuda else []
            macros += [("FASTCLIP_CUDA_EMULATED", "1")] if cuda and cuda.emulated else []
            (built,) = self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=[*include, cuda.include] if cuda else include,
                extra_postargs=[*FLAGS, *shared, *INSTRUCTION_SETS.get(source, [])],
            )
            return built

        def compile_kernels(source: str) -> str:
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [*compiler, "-x", "c++", "-fPIC", "-Wno-unknown-pragmas", *FLAGS, *shared]
            if not cuda.emulated:
                host = next(word for word in compiler if not word.endswith("ccache"))
                command = [cuda.nvcc, "-ccbin", host, *CUDA_FLAGS, *cuda.targets]
            run([*command, f"-I{cuda.include}", "-c", source, "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the longest first, and last what depends on their success
            kernels = [pool.submit(compile_kernels, source) for source in CUDA_KERNELS] if cuda else []
            others = [pool.submit(compile_one, source) for source in ext.sources if source != MODULE]
            try:
                objects = [kernel.result() for kernel in kernels]
            except NoCuda as why:
                if wanted:
                    raise CompileError(f"FASTCLIP_CUDA={wanted}, but {why}") from None
                cuda, cuda_why = None, f"when fastclip was installed, {why}"
                objects = []
                self.warn(f"{cuda_why}; the package will run without the CUDA kernels")
            others += [pool.submit(compile_one, source) for source in (MODULE, *(cuda.sources if cuda else []))]
            objects += [other.result() for other in others]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
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


class NoCuda(Exception):
    """Why the CUDA kernels are left out, as the end of a sentence."""


@dataclass
class Cuda:
    """What compiles the CUDA kernels, and for what."""

    include: str  # where their device.h lies
    emulated: bool = False
    nvcc: str = ""
    targets: "list[str]" = field(default_factory=list)
    sources: "list[str]" = field(default_factory=lambda: [CUDA_BINDINGS])  # beside the kernels
    link: "list[str]" = field(default_factory=list)


def find_cuda(wanted: str) -> Cuda:
    """``wanted``: what FASTCLIP_CUDA says. Raises ``NoCuda``."""
    if wanted == "emulated":
        return Cuda("csrc/cuda/emulated", emulated=True, sources=[CUDA_BINDINGS, EMULATOR])
    if wanted == "0":
        raise NoCuda("FASTCLIP_CUDA=0 left the CUDA kernels out")
    if wanted not in ("", "1"):
        raise NoCuda("what is known is 0, 1 and emulated")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        raise NoCuda("nvcc was found neither in CUDA_HOME nor on the PATH")
    known = {int(name) for name in re.findall(r"compute_(\d+)\b", run([nvcc, "--list-gpu-arch"]))}
    targets = [target for target in CUDA_TARGETS if target in known]
    if not targets:
        raise NoCuda(f"{nvcc} compiles for none of sm_{', sm_'.join(map(str, CUDA_TARGETS))}")
    codes = ",".join(f"sm_{target}" for target in targets)
    flags = [
        f"-gencode=arch=compute_{targets[0]},code=[compute_{targets[0]},{codes}]",
        f"-DFASTCLIP_LEAST_CAPABILITY={targets[0]}",
    ]
    facts = run([nvcc, "--dryrun", "-x", "cu", os.devnull])
    top = re.search(r"TOP=(.*)", facts)
    folders = [*re.findall(r'"-L([^"]+)"', facts), *([f"{top[1].strip()}/lib64"] if top else []), "/usr/lib"]
    folders += [str(path) for path in Path("/usr/lib").glob("*-linux-gnu")]  # where Debian has it
    runtime = next((path for path in (Path(folder, "libcudart_static.a") for folder in folders) if path.exists()), None)
    if runtime is None:
        raise NoCuda(f"{nvcc} came without libcudart_static.a")
    link = [str(runtime), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
    return Cuda("csrc/cuda/nvidia", nvcc=nvcc, targets=flags, link=link)


def run(command: "list[str]") -> str:
    """What it prints. Raises ``NoCuda`` with the first error of a compiler that fails; pip -v shows all of it."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode == 0:
        return done.stdout
    print(shlex.join(command), done.stdout, sep="\n", file=sys.stderr)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    error = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it said nothing")
    raise NoCuda(f"{command[0]} failed: {error}")


def find_dlpack(build_temp: str) -> str:
    """The folder to include <dlpack/dlpack.h> from: of apache-tvm-ffi, or with torch's copy of it."""
    if importlib.util.find_spec("tvm_ffi"):
        from tvm_ffi import libinfo

        return libinfo.find_dlpack_include_path()
    torch = importlib.util.find_spec("torch")  # without pip's build isolation
    copy = Path(torch.origin).parent / "include/ATen/dlpack.h" if torch else None
    if copy is None or not copy.exists():
        raise CompileError("dlpack.h was found neither in apache-tvm-ffi nor in torch: pip install apache-tvm-ffi")
    folder = Path(build_temp, "include")
    (folder / "dlpack").mkdir(parents=True, exist_ok=True)
    shutil.copy(copy, folder / "dlpack")
    return str(folder)


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
    str(path)
    for path in Path("csrc").rglob("*")
    if path.is_file() and (path.suffix in (".h", ".inl", ".cu") or "cuda" in path.parts)
]
if sys.platform == "darwin":
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

setup(
    ext_modules=[Extension("fastclip._C", sources=sources, depends=depends, language="c++")],
    cmdclass={"build_ext": BuildExt},
)
