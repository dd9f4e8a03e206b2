"""Makes every GPU number: one process, the contestants alternating call by call, after a check against float64.

``python -m fastclip.bench.gpu [--only SUBSTRING] [--json FILE] [--markdown FILE]``; ``--device cpu --tiny`` goes
through the same code without a GPU, in seconds.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastclip
from fastclip import riding
from fastclip.policies import AdaGC, Chain, GlobalNorm, Percentile, PerTensorNorm, Policy, Unitwise, ZScore

from . import compare, machine, report, rows
from .oracle import WrongResult
from .rows import ADAMW_FUSED, CLIPPING, NOTHING_TO_CLIP, Contestant, Inputs
from .workloads import GIBI, GIBI_BF16, GPT2, GPT2_BF16, KIBI, KIBI_MANY, LLAMA, LLAMA_BF16, Workload, filled

FORMAT = 1  # of the JSON
HEAD_START = 10_000_000  # clock cycles, some 5 ms, that the device waits while the host launches what is timed
FLUSHES = 4  # times the L2 cache's size is read between two calls on gradients that might stay in it
# A clip may take the host so long: seconds, and seconds a tensor.
HOST, TRITONS_HOST = (30e-6, 150e-9), (60e-6, 100e-9)
TRITONS_SHARE = 1 / 1.10  # of the speed of CUDA's kernels
LAUNCHES = 2  # a clip may make so many for each of its tables of tensors
READING_SHARE = 0.9  # of the card's reading speed, for a norm

Results = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One ratio: a time of the second contestant over that of the first.

    Attributes:
        clock: which of the times: "device", between two CUDA events around the call, or "wall", from the call to its
            end on the device.
        floor: the ratio must not be lower; None if nothing is claimed.
        of_reading: the first contestant's bytes a second must not be less than this share of the card's reading speed.
        host: the bound of the first contestant's host time, seconds and seconds a tensor; None for none.
    """

    name: str
    workload: Workload
    make: Callable[[Inputs], tuple[Contestant, Contestant]]
    clock: str = "device"
    floor: float | None = None
    of_reading: float | None = None
    host: tuple[float, float] | None = None


OUTCOMES = (("nothing to clip", NOTHING_TO_CLIP), ("clipping", CLIPPING))


def _clips(workload: Workload, *floors: float | None, clock: str = "device") -> list[Row]:
    return [
        Row(
            f"clip {workload.name}, {what}",
            workload,
            functools.partial(rows.clip_norm, share=share),
            clock,
            floor,
            host=HOST if clock == "wall" else None,
        )
        for (what, share), floor in zip(OUTCOMES, floors, strict=True)
    ]


@contextmanager
def served_by(backend: str | None) -> Iterator[None]:
    """By this backend alone; None lets each gradient go to the best there is for it."""
    before, fastclip.backends.forced = fastclip.backends.forced, backend
    try:
        yield
    finally:
        fastclip.backends.forced = before


def triton_against_cuda(inputs: Inputs, share: float) -> tuple[Contestant, Contestant]:
    """The same clip by Triton's kernels and by CUDA's; without a GPU by two other backends."""

    def forced(name: str) -> Contestant:
        contestant = rows.clip_norm(inputs, share)[0]

        def call() -> Any:
            with served_by(name):
                return contestant.call()

        return replace(contestant, name=name, call=call)

    first, second = ("triton", "cuda") if inputs.grads[0].is_cuda else ("reference", "cpu")
    return forced(first), forced(second)


def _tritons(workload: Workload) -> list[Row]:
    return [
        Row(
            f"clip {workload.name}, triton / cuda, {what}",
            workload,
            functools.partial(triton_against_cuda, share=share),
            floor=TRITONS_SHARE,
            host=TRITONS_HOST,
        )
        for what, share in OUTCOMES
    ]


def _steps(workload: Workload, kind: str, *floors: float | None, **settings: Any) -> list[Row]:
    return [
        Row(
            f"step {workload.name}, {kind}, {what}",
            workload,
            functools.partial(rows.step, rule=ADAMW_FUSED, share=share, **settings),
            floor=floor,
        )
        for (what, share), floor in zip(OUTCOMES, floors, strict=True)
    ]


def all_rows() -> list[Row]:
    """In the order of the table; rows of one workload stand together, so that it is built once."""
    return [
        Row("norm 1 GiB fp32 / torch.sum", GIBI, rows.norm_against_sum, of_reading=READING_SHARE),
        Row("norm 1 GiB bf16 / torch.sum", GIBI_BF16, rows.norm_against_sum, of_reading=READING_SHARE),
        *_clips(GPT2, 2.8, 1.1),
        *_tritons(GPT2),
        *_steps(GPT2, "GradScaler", None, None, scaled=True),
        *_clips(GPT2_BF16, 2.8, 1.1),
        *_tritons(GPT2_BF16),
        *_clips(LLAMA, 2.8, 1.1),
        *_tritons(LLAMA),
        # at most 1.20 and 1.35 times the time of the bare step
        *_steps(LLAMA, "AdamW fused / unclipped", 1 / 1.20, 1 / 1.35, bare=True),
        *_clips(LLAMA_BF16, 2.8, 1.1),
        *_clips(KIBI, 10.0, 10.0, clock="wall"),
        *_clips(KIBI_MANY, 10.0, 10.0, clock="wall"),
    ]


def tiny(workload: Workload) -> Workload:
    """The same list with small tensors, and not many of them."""
    shapes = tuple(tuple(min(size, 16) for size in shape) for shape in workload.shapes[:12])
    return replace(workload, shapes=shapes, description=f"{workload.description}, tiny")


# ---- clocks --------------------------------------------------------------------------------------------


class Clock:
    """Times of one call: on the device, until its end there, and until the host has it back."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if self.is_cuda else 0
        self._unrelated = torch.zeros(max(1, FLUSHES * self.l2_bytes // 4), device=device)
        self.head_start = self._slept() if self.is_cuda else math.inf

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def _slept(self) -> float:
        """Seconds of the head start, on this card."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first wakes the card up
            first.record()
            torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
            last.record()
            torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    def flush(self) -> None:
        """By reading: what was written would be written back in the time of the next call."""
        torch.amax(self._unrelated)

    def time(self, call: Callable[[], Any], kind: str) -> dict[str, float]:
        """``kind`` is what counts. For "device" the host gets a head start, so that no launch is waited for; then there
        is no "wall"."""
        self.wait()
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            spent = time.perf_counter() - start
            return {"device": spent, "wall": spent, "host": spent}
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if kind == "device":
            torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        first.record()
        call()
        last.record()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
        device = first.elapsed_time(last) / 1e3
        return {"device": device, "host": host} if kind == "device" else {"device": device, "wall": wall, "host": host}


def alternate(
    contestants: Sequence[Contestant], rounds: int, clock: Clock, flush: bool, kind: str = "device"
) -> list[list[dict[str, float]]]:
    """Times of each contestant in each round; the order is swapped every round, as in compare.py."""
    times: list[list[dict[str, float]]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for index in order:
                contestant = contestants[index]
                contestant.before()
                if flush:
                    clock.flush()
                times[index].append(clock.time(contestant.call, kind))
                contestant.after()
            order.reverse()
    finally:
        gc.enable()
    return times


def _medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {kind: statistics.median(each[kind] for each in times) for kind in times[0]}


def reading_speed(clock: Clock, device: str, elements: int) -> Results:
    """The card's: the best of what reads one tensor, in bytes a second; and what a copy moves."""
    flat = torch.full((elements,), 0.5, device=device)
    into = torch.empty_like(flat)
    size = flat.numel() * flat.element_size()
    readers: dict[str, Callable[[], Any]] = {
        "torch.sum": lambda: torch.sum(flat),
        "torch.amax": lambda: torch.amax(flat),
        "torch.linalg.vector_norm": lambda: torch.linalg.vector_norm(flat),
        "fastclip.get_total_norm": lambda: fastclip.get_total_norm(flat),
        "copy": lambda: into.copy_(flat),
    }
    contestants = [Contestant(name, call, lambda _: None, size) for name, call in readers.items()]
    alternate(contestants, 2, clock, False)
    medians = [_medians(times)["device"] for times in alternate(contestants, 9, clock, False)]
    speeds = {name: size / median for name, median in zip(readers, medians, strict=True)}
    copy = 2 * speeds.pop("copy")
    best = max(speeds, key=speeds.__getitem__)
    return {"by": best, "bytes_per_s": speeds[best], "copy_bytes_per_s": copy, "bytes": size, "all": speeds}


def short(device: str) -> None:
    """Every kernel a few times on small lists, aligned or not: what compute-sanitizer is to watch."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64):
        flat = torch.randn(70_001, device=device, dtype=torch.float64).to(dtype)
        params = []
        for first, last in ((0, 64), (64, 65), (67, 70_001), (0, 0)):
            params.append(torch.nn.Parameter(torch.ones(last - first, device=device, dtype=dtype)))
            params[-1].grad = flat[first:last]
        fastclip.clip_grad_norm_(params, 1.0)
        fastclip.get_total_norm([param.grad for param in params if param.grad is not None], norm_type=3.0)
        fastclip.grad_stats(params, extras=True, weights=not dtype.is_complex)
        for policy in (fastclip.policies.PerTensorNorm(0.1), fastclip.policies.Unitwise()):
            fastclip.clip_grads_(params, policy)
        if not dtype.is_complex:
            fastclip.clip_grad_value_(params, 0.01)
            settings: dict[str, Any] = {"l2": 0.1, "nonfinite": "zero"}
            fastclip.ClippedOptimizer(torch.optim.SGD(params, lr=0.1), 1.0, **settings).step()
        flat[5] = math.nan
        fastclip.clip_grad_norm_(params, 1.0)
    if device == "cuda":
        torch.cuda.synchronize()


# ---- facts that are no times ---------------------------------------------------------------------------


@contextmanager
def no_syncs() -> Iterator[None]:
    """An operation of torch's that waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def launches(call: Callable[[], Any]) -> dict[str, int]:
    """What one call put on the device's stream, by name."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    counted: dict[str, int] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counted[event.name[:80]] = counted.get(event.name[:80], 0) + 1
    return counted


def _clip(inputs: Inputs, share: float) -> Callable[[], Tensor]:
    max_norm = share * inputs.total_norm()
    return lambda: fastclip.clip_grad_norm_(inputs.params, max_norm)


def _rules() -> list[Policy]:
    return [PerTensorNorm(CLIPPING), Unitwise(), Percentile(), Chain(ZScore(), AdaGC(), GlobalNorm(CLIPPING))]


def _waits_for_nothing(inputs: Inputs) -> str:
    device = inputs.grads[0].device
    mixed = [torch.nn.Parameter(torch.ones(6, 4, device=device)) for _ in range(3)]
    for param in mixed:
        param.grad = torch.ones_like(param)
    mixed[1].grad = torch.ones(6, 8, device=device)[:, ::2]  # for the reference
    bound = torch.ones((), device=device)
    lists = (filled(inputs.params), mixed)
    clips = [functools.partial(fastclip.clip_grads_, params, rule) for params in lists for rule in _rules()]
    clips.append(functools.partial(fastclip.clip_grad_norm_, mixed, bound))
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(inputs.params, fused=True), CLIPPING)

    def step_launched_twice() -> None:
        before, riding.TWICE_FROM_BYTES = riding.TWICE_FROM_BYTES, 0
        try:
            optimizer.step()
        finally:
            riding.TWICE_FROM_BYTES = before

    # The strided one needs the reference beside whichever backend is asked for.
    with served_by(None):
        for call in (
            _clip(inputs, CLIPPING),
            _clip(inputs, NOTHING_TO_CLIP),
            optimizer.step,
            step_launched_twice,
            *clips,
        ):
            call()
            with no_syncs():
                call()
    return f"clip, step and {len(_rules())} rules, also where backends share a list, wait for nothing"


def _counted(inputs: Inputs) -> str:
    found = launches(_clip(inputs, CLIPPING))
    torchs = launches(lambda: torch.nn.utils.clip_grad_norm_(inputs.params, CLIPPING))
    kernels = {name: count for name, count in found.items() if "fastclip" in name}
    if not kernels or not torchs:
        raise WrongResult(
            f"the profiler saw {sum(kernels.values())} launches of fastclip's, {sum(torchs.values())} of torch's"
        )
    if sum(found.values()) > LAUNCHES:
        raise WrongResult(f"{sum(found.values())} launches: {found}")
    return f"{sum(found.values())} launches, {sum(kernels.values())} of them fastclip's; torch {sum(torchs.values())}"


def _captured(inputs: Inputs) -> str:
    call = _clip(inputs, CLIPPING)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = call()
    for factor in (1.0, 0.25, 4.0):  # below and above the bound
        inputs.restore()
        torch._foreach_mul_(inputs.grads, factor)
        graph.replay()
        want, got = factor * inputs.total_norm(), float(norm)
        if not math.isclose(got, want, rel_tol=1e-6):
            raise WrongResult(f"a replayed graph found the norm {got:.9g} instead of {want:.9g}")
        after = float(fastclip.get_total_norm(inputs.grads))
        if not math.isclose(after, min(want, CLIPPING * inputs.total_norm()), rel_tol=1e-5):
            raise WrongResult(f"a replayed graph left a norm of {after:.9g}")
    return "captured, and right on replay below and above the bound"


def _captured_by_triton(inputs: Inputs) -> str:
    with served_by("triton"):
        return _captured(inputs)


def _compiled(inputs: Inputs) -> str:
    """With torch's own graphs around it, whose memory holds nothing that is kept for the next call."""
    compiled = torch.compile(fastclip.get_total_norm, mode="reduce-overhead", fullgraph=True)
    want = inputs.total_norm()
    for _ in range(4):  # the first two warm up, the third records
        if not math.isclose(got := float(compiled([grad * 1.0 for grad in inputs.grads])), want, rel_tol=1e-6):
            raise WrongResult(f"compiled, the norm is {got:.9g} instead of {want:.9g}")
    return 'right under torch.compile(mode="reduce-overhead")'


FACTS: dict[str, Callable[[Inputs], str]] = {
    "launches of a clip, clipping": _counted,
    "host syncs": _waits_for_nothing,
    "CUDA graph": _captured,
    "CUDA graph, triton": _captured_by_triton,
    "compiled": _compiled,
}


def fact(name: str, inputs: Inputs, is_cuda: bool) -> Results:
    if not is_cuda:
        return {"name": name, "verdict": "not asked", "text": "needs a GPU"}
    inputs.restore()
    try:
        return {"name": name, "verdict": "ok", "text": FACTS[name](inputs)}
    except Exception as error:  # what a GPU does to one fact must not cost the others
        return {"name": name, "verdict": "wrong", "text": f"{type(error).__name__}: {error}"}


# ---- the run -------------------------------------------------------------------------------------------


def measured(row: Row, inputs: Inputs, clock: Clock, rounds: int, reading: float) -> Results:
    """One row of the results. A contestant that is wrong has its reason there, and the row no times."""
    result: Results = {
        "name": row.name,
        "workload": inputs.workload.description,
        "clock": row.clock,
        "floor": row.floor,
    }
    tensors = len(inputs.grads)
    inputs.restore()
    try:
        contestants = row.make(inputs)
        errors = [compare.checked(contestant) for contestant in contestants]
        flush = inputs.workload.bytes < FLUSHES * clock.l2_bytes
        alternate(contestants, 2, clock, flush, row.clock)
        times = alternate(contestants, rounds, clock, flush, row.clock)
    except WrongResult as error:
        return {**result, "verdict": "wrong", "why": str(error)}
    except Exception as error:  # Triton's compiler, a compiler's exit status: it must not cost the other rows
        return {**result, "verdict": "wrong", "why": f"{type(error).__name__}: {error}"}
    medians = [_medians(each) for each in times]
    ours, theirs = (median[row.clock] for median in medians)
    of_reading = contestants[0].moved_bytes / medians[0]["device"] / reading
    host_limit = row.host[0] + row.host[1] * tensors if row.host else math.inf
    missed = [
        *(["ratio"] if row.floor is not None and theirs / ours < row.floor else []),
        *(["reading speed"] if row.of_reading is not None and of_reading < row.of_reading else []),
        *(["host time"] if medians[0]["host"] > host_limit else []),
        *(["head start"] if row.clock == "device" and max(each["host"] for each in medians) > clock.head_start else []),
    ]
    return {
        **result,
        "verdict": f"missed: {', '.join(missed)}" if missed else "ok",
        "ratio": theirs / ours,
        "of_reading_speed": of_reading,
        "of_reading_floor": row.of_reading,
        "host_limit_s": host_limit if row.host else None,
        "rounds": rounds,
        "contestants": [
            {
                "name": contestant.name,
                "moved_bytes": contestant.moved_bytes,
                "relative_error": error,
                **{f"{kind}_s": value for kind, value in median.items()},
                **{f"{kind}_all_s": [each[kind] for each in own] for kind in own[0]},
            }
            for contestant, error, median, own in zip(contestants, errors, medians, times, strict=True)
        ],
    }


def card() -> Results:
    """Of the GPU, and of what drives it."""
    if not torch.cuda.is_available():
        return {"name": "no GPU"}
    properties = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver_and_clocks": driver,
        "cuda": torch.version.cuda,
    }


def versions() -> Results:
    triton = importlib.util.find_spec("triton")
    return {
        **machine.versions(),
        "backend": os.environ.get("FASTCLIP_BACKEND") or "chosen by itself",
        "triton": importlib.import_module("triton").__version__ if triton else None,
    }


def run(
    chosen: Sequence[Row], device: str, small: bool, rounds: int, keep: Callable[[Results], None], seed: int = 0
) -> Results:
    """``keep`` gets what is known so far after each row and fact: a run that is cut off has not been for nothing."""
    clock = Clock(device)
    reading = reading_speed(clock, device, 1 << 16 if small else 1 << 30)
    of_this = {"card": card(), "versions": versions(), "reading_speed": reading}
    results: Results = {"format": FORMAT, **of_this, "rows": [], "facts": []}
    _progress(f"{results['card']['name']}: reading {reading['bytes_per_s'] / 1e9:.0f} GB/s by {reading['by']}")
    inputs: Inputs | None = None
    for number, row in enumerate(chosen, 1):
        workload = tiny(row.workload) if small else row.workload
        if inputs is None or inputs.workload != workload:
            inputs = None  # before the next is built: two of them may not fit
            if device == "cuda":
                torch.cuda.empty_cache()
            inputs = Inputs(workload, seed, device)
        result = measured(row, inputs, clock, rounds, reading["bytes_per_s"])
        results["rows"].append(result)
        _progress(f"[{number}/{len(chosen)}] {row.name}: {_outcome(result)}")
        keep(results)
    inputs = None
    # Last, as a fact may cost what comes after it: an error of the device stays with the process.
    inputs = Inputs(tiny(GPT2) if small else GPT2, seed, device)
    for name in FACTS:
        found = fact(name, inputs, device == "cuda")
        results["facts"].append(found)
        _progress(f"{name}: {found['verdict']}: {found['text']}")
        keep(results)
    return results


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _outcome(row: Results) -> str:
    if "ratio" not in row:
        return f"WRONG, not timed: {row['why']}"
    return f"{report.multiple(row['ratio'])}, {row['of_reading_speed']:.0%} of the reading speed ({row['verdict']})"


def markdown(results: Results) -> str:
    gpu, speed, made = results["card"], results["reading_speed"], results["versions"]
    lines = [
        f"{gpu['name']}, driver {gpu.get('driver_and_clocks')}, CUDA {gpu.get('cuda')}, "
        f"torch {made['torch']}, triton {made['triton']}, fastclip {made['fastclip']} ({made['commit']}), backend "
        f"{made['backend']}. Reading speed {speed['bytes_per_s'] / 1e9:,.0f} GB/s by {speed['by']}, a copy moves "
        f"{speed['copy_bytes_per_s'] / 1e9:,.0f} GB/s.",
        "",
        "| | fastclip | other | ratio | wanted | of reading speed | host time | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in results["rows"]:
        if "ratio" not in row:
            lines.append(f"| {row['name']} | not timed: {row['why']} | | | | | | wrong |")
            continue
        ours, other = (report.seconds(each[f"{row['clock']}_s"]) for each in row["contestants"])
        wanted = f"{row['floor']:.2f}" if row["floor"] is not None else ""
        host = report.seconds(row["contestants"][0]["host_s"])
        host += f" (of {report.seconds(row['host_limit_s'])})" if row["host_limit_s"] else ""
        wall = " (wall)" if row["clock"] == "wall" else ""
        lines.append(
            f"| {row['name']}{wall} | {ours} | {other} | **{report.multiple(row['ratio'])}** | {wanted} "
            f"| {row['of_reading_speed']:.0%} | {host} | {row['verdict']} |"
        )
    lines += ["", *(f"* {fact['name']}: {fact['text']} ({fact['verdict']})" for fact in results["facts"])]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a contestant or a fact was wrong. A floor that is missed is told and is no failure."""
    parser = argparse.ArgumentParser(prog="python -m fastclip.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="lists of a few thousand elements: the code, not the numbers"
    )
    parser.add_argument("--short", action="store_true", help="every kernel on small lists, no times: for a sanitizer")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only rows whose name contains it")
    parser.add_argument("--rounds", type=int, default=15, help="of each row (default 15)")
    parser.add_argument("--json", type=report.place, metavar="FILE", help="write the results")
    parser.add_argument("--markdown", type=report.place, metavar="FILE", help="write the table; - for the terminal")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --device cpu --tiny goes through the same code")
    if args.short:
        short(args.device)
        return 0
    chosen = [row for row in all_rows() if args.only.lower() in row.name.lower()]
    if not chosen:
        parser.error(f"no row's name contains {args.only!r}; they are: {', '.join(row.name for row in all_rows())}")

    def keep(results: Results) -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        if args.markdown not in (None, Path("-")):
            report.write(markdown(results), args.markdown)

    results = run(chosen, args.device, args.tiny, args.rounds, keep)
    if args.markdown in (None, Path("-")):
        report.write(markdown(results), None)
    return int(
        any("ratio" not in row for row in results["rows"]) or any(f["verdict"] == "wrong" for f in results["facts"])
    )


if __name__ == "__main__":
    sys.exit(main())
