"""What the CUDA kernels that ship are made of, read off their machine code: registers, stack, loads.

``python -m fastclip.bench.machine_code [--markdown FILE]`` needs ``cuobjdump`` and ``nvdisasm``: on the PATH, or as the
package ``triton`` carries them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastclip._native import C

from . import report

# The template arguments of kernels, in the order of their enums.
ARGUMENTS = {"Look": ("norms", "all", "penalised"), "Change": ("scale", "scale_each", "clamp", "zero_nonfinite")}

FUNCTION = re.compile(r"Function\s*:?\s+(\w+)")
TARGET = re.compile(r"arch = (sm_\d+\w*)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
ENDS_RUN = ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BSYNC", "BAR")


@dataclass
class Kernel:
    """One kernel for one GPU.

    Attributes:
        stack: bytes of each thread's stack, LOCAL of its local memory; a register that was spilled is on the stack.
        instructions: how many of each kind, by the name up to the first dot.
        wide_runs: for each stretch without a branch how many loads of 16 bytes from global memory are in it, if any.
    """

    name: str
    target: str
    registers: int
    stack: int
    local: int
    instructions: dict[str, int] = field(default_factory=dict)
    wide_runs: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(self.instructions.values())


def cuobjdump() -> str | None:
    """Where it is; None if nowhere."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(own) if own is not None and own.exists() else None


def short_name(mangled: str) -> str:
    """ "read<norms>" from what the compiler made of it."""
    kernel = re.search(r"(?<=\d)([a-z][a-z_]*)_kernel", mangled)
    if kernel is None:
        return mangled
    argument = re.search(r"(Look|Change)E(\d)E", mangled)
    return kernel[1] + (f"<{ARGUMENTS[argument[1]][int(argument[2])]}>" if argument else "")


def kernels_of(module: str) -> list[Kernel]:
    """All kernels of an extension or object, in the order of their names and targets."""
    found: dict[tuple[str, str], Kernel] = {}
    target = name = ""
    for line in _printed("--dump-resource-usage", module):
        if match := TARGET.search(line):
            target = match[1]
        elif match := FUNCTION.search(line):
            name = match[1]
        elif match := USAGE.search(line):
            registers, stack, _, local = map(int, match.groups())
            found[name, target] = Kernel(short_name(name), target, registers, stack, local)
    kernel, run = None, 0
    for line in _printed("-sass", module):
        if match := INSTRUCTION.match(line):
            if kernel is None:
                continue
            operation = match[1]
            kind = operation.partition(".")[0]
            kernel.instructions[kind] = kernel.instructions.get(kind, 0) + 1
            if kind == "LDG" and ".128" in operation:
                run += 1
            elif kind in ENDS_RUN and run:
                kernel.wide_runs.append(run)
                run = 0
        elif match := TARGET.search(line):
            target = match[1]
        elif match := FUNCTION.search(line):
            kernel, run = found.get((match[1], target)), 0
    return sorted(found.values(), key=lambda each: (each.name, int(re.sub(r"\D", "", each.target) or 0)))


def _printed(question: str, module: str) -> Iterator[str]:
    program = cuobjdump()
    if program is None:
        raise FileNotFoundError("cuobjdump is neither on the PATH nor in the package triton")
    folders = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])  # it calls nvdisasm
    with subprocess.Popen(
        [program, question, module], stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": folders}
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{program} {question} {module} failed with {process.returncode}")


def table(kernels: Sequence[Kernel]) -> str:
    """Registers of each kernel, and how many instructions it has, by target."""
    targets = list(dict.fromkeys(kernel.target for kernel in sorted(kernels, key=lambda each: len(each.target))))
    lines = [f"| kernel | {' | '.join(targets)} |", "| --- |" + " ---: |" * len(targets)]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        own = {kernel.target: f"{kernel.registers} ({kernel.size:,})" for kernel in kernels if kernel.name == name}
        lines.append(f"| {name} | " + " | ".join(own.get(target, "") for target in targets) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastclip.bench.machine_code", description=__doc__.splitlines()[0])
    parser.add_argument("module", nargs="?", default=None if C is None else C.__file__, help="default: fastclip's own")
    parser.add_argument("--markdown", type=report.place, metavar="FILE", help="write the table; - for the terminal")
    args = parser.parse_args(argv)
    found = table(kernels_of(args.module))
    text = (
        "Registers a thread (and instructions) of each CUDA kernel, by target: "
        f"`python -m fastclip.bench.machine_code --markdown FILE` writes this.\n\n{found}\n"
    )
    report.write(text, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
