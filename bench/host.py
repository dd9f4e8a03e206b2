"""What a call on a GPU costs the host, without a GPU: kernels are launched, and don't run.

``python -m fastclip.bench.host cuda-emulated`` wants a build with ``FASTCLIP_CUDA=emulated``, ``... triton`` a Triton
that compiles; each in a process of its own. ``--without-native``: as where no C++ was compiled either, and Python makes
the table of addresses. As on a device no value is known to the host. What the driver takes for a launch is not in it,
and torch's few operations are those of the CPU; one, of a microsecond, comes with a tally: the host would otherwise act
on counts that no kernel has filled.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastclip
from fastclip import backends, tensors
from fastclip._native import C
from fastclip.backends import cuda, tables, triton

from . import report

TENSORS = (1, 148, 1000, 10_000)  # of a list; GPT-2 has 148
SECONDS = 0.5  # for each number


class Idle(torch.optim.SGD):
    """A step of torch's fused ones that takes no time."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass

    step.__module__ = torch.optim.SGD.__module__


def use(backend: str, native: bool = True) -> None:
    """From now on this backend serves, its launches do nothing, and no value is known to the host."""
    if not native:
        tables.C = tensors.C = None
    stand_in: Any = cuda if backend == cuda.name else triton
    if stand_in is cuda:
        C.cuda_set_idle(True)
    else:
        from . import triton_driver

        triton_driver.stand_in()
        stand_in._SERVED, stand_in.unavailable = tables.CPU, lambda: ""
    tally = stand_in.tally
    stand_in.tally = lambda *known: tally(*known[:-1], known[-1].zero_())
    backends.forced = backend
    for module in [module for name, module in sys.modules.items() if name.startswith("fastclip.")]:
        if hasattr(module, "known_to_host"):
            vars(module)["known_to_host"] = lambda tensor: False


def calls(count: int) -> dict[str, Callable[[], Any]]:
    """By what they do, over float32 gradients of a cache line each."""
    parameters: list[Tensor] = []
    for _ in range(count):
        parameters.append(torch.nn.Parameter(torch.zeros(16)))
        parameters[-1].grad = torch.zeros(16)
    # what the kernels should have filled holds anything
    step = fastclip.ClippedOptimizer(Idle(parameters, fused=True), max_norm=1.0, skip_limit=None).step
    return {
        "norm": lambda: fastclip.clip_grad_norm_(parameters, float("inf")),
        "clip": lambda: fastclip.clip_grad_norm_(parameters, 1.0),
        "wrapper's step": step,
        "its optimizer's, which does nothing": Idle(parameters, fused=True).step,
    }


def least(call: Callable[[], Any], spend: float) -> float:
    """Seconds of one call, the least mean of many batches of a millisecond or more."""
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    batch = max(1, int(1e-3 / (time.perf_counter() - start)))
    best, end = float("inf"), time.perf_counter() + spend
    while (begin := time.perf_counter()) < end:
        for _ in range(batch):
            call()
        best = min(best, (time.perf_counter() - begin) / batch)
    return best


def markdown(times: dict[str, list[float]]) -> str:
    few, many = TENSORS[0], TENSORS[2]
    lines = [
        f"| | {' | '.join(f'{n:,} tensors' if n > 1 else '1 tensor' for n in TENSORS)} | a tensor, up to {many:,} |",
        "| --- |" + " ---: |" * (len(TENSORS) + 1),
    ]
    for what, own in times.items():
        each = (own[2] - own[0]) / (many - few)
        lines.append(f"| {what} | {' | '.join(map(report.seconds, own))} | {each * 1e9:.0f} ns |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastclip.bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=[backend.name for backend in (cuda, triton)])
    parser.add_argument("--without-native", action="store_true", help="Triton's, as where nothing was compiled")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="for each number")
    parser.add_argument("--markdown", type=report.place, metavar="FILE", help="write the table; - for the terminal")
    args = parser.parse_args(argv)
    if args.backend == cuda.name and not cuda.EMULATED:
        parser.error("the CUDA kernels of this build run on a GPU: bench/gpu.py times them there")
    if args.backend == triton.name and triton.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing is launched, or compiled")
    if args.backend == cuda.name and args.without_native:
        parser.error("the CUDA kernels are native code")
    use(args.backend, not args.without_native)
    times: dict[str, list[float]] = {}
    for count in TENSORS:
        for what, call in calls(count).items():
            times.setdefault(what, []).append(least(call, args.seconds))
    report.write(markdown(times), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
