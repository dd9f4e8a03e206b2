"""Makes every ratio: one process, the contestants alternating call by call, after a check of the same inputs.

``python -m fastclip.bench.compare [--quick] [--only SUBSTRING] [--json FILE] [--markdown FILE]``
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastclip

from . import machine, memory, report
from .oracle import WrongResult
from .rows import CLIPPING, Contestant, Inputs, Row, all_rows
from .workloads import GPT2, Workload

MOST_ROUNDS = 20  # times those asked for, where calls are short
PROGRAM = "python -m fastclip.bench.compare"
MEMORY_ROW = "extra memory of clip_grad_norm_"
MEMORY_LIMIT_BYTES = 1_000_000

Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        rounds: of each row at least; in a round every contestant is called once.
        budget_s: short calls get more rounds until about this much time is spent.
        reading_elements: float32 numbers in the tensor that gives the machine's reading speed.
        cache_bytes: last level cache; more gradients than that are cold.
    """

    rounds: int = 9
    budget_s: float = 2.0
    reading_elements: int = 100_000_000
    cache_bytes: int | None = None


def alternate(
    contestants: Sequence[Contestant], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each contestant in each round.

    The order is swapped every round (A B, B A, A B, ...): each contestant follows itself as often as the other,
    so that neither profits more from what the last call left in the caches.
    """
    seconds: list[list[float]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for index in order:
                contestant = contestants[index]
                contestant.before()
                start = clock()
                contestant.call()
                seconds[index].append(clock() - start)
                contestant.after()
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    return seconds


def checked(contestant: Contestant) -> float | None:
    """Relative error of one untimed call; raises ``WrongResult``."""
    contestant.before()
    error = contestant.check(contestant.call())
    contestant.after()
    return error


def measured(row: Row, inputs: Sequence[Inputs], settings: Settings) -> Results:
    """One row of the results. A contestant that is wrong has its reason there, and the row no times."""
    result: Results = {
        "name": row.name,
        "workloads": [made.workload.description for made in inputs],
        "floor": row.floor,
        "cache": _cache_state(max(made.workload.bytes for made in inputs), settings.cache_bytes),
    }
    for made in inputs:
        made.restore()  # the row before may have gone wrong
    try:
        contestants = row.make(*inputs)
        errors = [checked(contestant) for contestant in contestants]
        (trial,) = zip(*alternate(contestants, 1), strict=True)
        others = machine.Others()
        seconds = alternate(contestants, _rounds(sum(trial), settings))
        others_share = others.share()
    except WrongResult as wrong:
        return {**result, "verdict": "wrong", "why": str(wrong)}
    ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
    medians = [statistics.median(times) for times in seconds]
    ratio = medians[1] / medians[0]
    return {
        **result,
        "verdict": verdict(ratio, row.floor),
        "ratio": ratio,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": len(ratios),
        "others_share_of_cpu": others_share,
        "contestants": [
            _times(contestant, times, error)
            for contestant, times, error in zip(contestants, seconds, errors, strict=True)
        ],
    }


def _times(contestant: Contestant, times: list[float], error: float | None) -> Results:
    median = statistics.median(times)
    return {
        "name": contestant.name,
        "median_s": median,
        "fastest_s": min(times),
        "seconds": times,
        "moved_bytes": contestant.moved_bytes,
        "bytes_per_s": contestant.moved_bytes / median,
        "relative_error": error,
    }


def verdict(ratio: float, floor: float | None) -> str:
    """ "ok" or "below floor" where there is a floor; else "faster" or "slower"."""
    if floor is not None:
        return "ok" if ratio >= floor else "below floor"
    return "faster" if ratio >= 1.0 else "slower"


def _rounds(trial_s: float, settings: Settings) -> int:
    affordable = int(settings.budget_s / max(trial_s, 1e-9))
    return max(settings.rounds, min(affordable, MOST_ROUNDS * settings.rounds))


def _cache_state(working_set_bytes: int, cache_bytes: int | None) -> str:
    if cache_bytes is None:
        return "unknown"
    return "cold" if working_set_bytes > cache_bytes else "warm"


def reading_speed(settings: Settings) -> Results:
    """The machine's: the better of two plain reads of one tensor, by torch and by fastclip."""
    flat = torch.full((settings.reading_elements,), 0.5)
    size = flat.numel() * flat.element_size()
    readers = {"torch.sum": lambda: torch.sum(flat), "fastclip.get_total_norm": lambda: fastclip.get_total_norm(flat)}
    contestants = [Contestant(name, call, lambda _: None, size) for name, call in readers.items()]
    alternate(contestants, 1)
    medians = [statistics.median(times) for times in alternate(contestants, settings.rounds)]
    speeds = {name: size / median for name, median in zip(readers, medians, strict=True)}
    best = max(speeds, key=speeds.__getitem__)
    return {"by": best, "bytes_per_s": speeds[best], "elements": settings.reading_elements, "all": speeds}


def measured_memory(inputs: Inputs) -> Results:
    """Of one call that clips, which needs more than one that does not."""
    max_norm = CLIPPING * inputs.total_norm()
    calls = {
        "fastclip": lambda: fastclip.clip_grad_norm_(inputs.params, max_norm),
        "torch": lambda: torch.nn.utils.clip_grad_norm_(inputs.params, max_norm),
    }
    extra = {name: memory.extra_bytes(call, inputs.restore) for name, call in calls.items()}
    return {
        "name": MEMORY_ROW,
        "workload": inputs.workload.description,
        "limit_bytes": MEMORY_LIMIT_BYTES,
        "extra_bytes": extra,
        "verdict": "ok" if extra["fastclip"] < MEMORY_LIMIT_BYTES else "above limit",
    }


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(rows: Sequence[Row], settings: Settings, memory_of: Workload | None = None, seed: int = 0) -> Results:
    """Measures ``rows`` in their order, each workload built once while its rows last."""
    speeds = [reading_speed(settings)]
    results: Results = {
        "format": report.FORMAT,
        "machine": machine.facts(),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "rows": [],
        "memory": None,
    }
    built: dict[Workload, Inputs] = {}

    def inputs_of(workloads: tuple[Workload, ...]) -> list[Inputs]:
        for old in [workload for workload in built if workload not in workloads]:
            del built[old]  # before the next is built: two of them may not fit
        for workload in workloads:
            if workload not in built:
                built[workload] = Inputs(workload, seed)
        return [built[workload] for workload in workloads]

    if memory_of is not None and memory.can_measure():
        results["memory"] = measured_memory(*inputs_of((memory_of,)))
        _progress(report.memory_line(results["memory"]))
    for number, row in enumerate(rows, 1):
        result = measured(row, inputs_of(row.workloads), settings)
        results["rows"].append(result)
        _progress(f"[{number}/{len(rows)}] {row.name}: {report.outcome(result)}")
    built.clear()
    speeds.append(reading_speed(settings))  # again: other work on the machine may have slowed the first down
    results["reading_speed"] = max(speeds, key=lambda speed: speed["bytes_per_s"])
    _set_shares(results)
    return results


def _set_shares(results: Results) -> None:
    for row in results["rows"]:
        for contestant in row.get("contestants", ()):
            contestant["of_reading_speed"] = contestant["bytes_per_s"] / results["reading_speed"]["bytes_per_s"]


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few rows, in less than 20 seconds")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only rows whose name contains it")
    parser.add_argument("--rounds", type=int, help="at least so many per row (default 9, quick 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and fastclip (default 2)")
    parser.add_argument(
        "--json", type=report.place, metavar="FILE", help="write the results; fastclip.bench.report reads them"
    )
    parser.add_argument(
        "--markdown", type=report.place, metavar="FILE", help="write the README's table; - for the terminal"
    )
    return parser


def _no_such_row(wanted: str, quick: bool) -> str:
    names = [row.name for row in all_rows() if row.quick or not quick]
    if not quick:
        return f"no row's name contains {wanted!r}; they are: {'; '.join([*names, MEMORY_ROW])}"
    return (
        f"no quick row's name contains {wanted!r}; they are: {'; '.join(names)}. {PROGRAM} without --quick has all rows"
    )


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Returns 0; 1 if a contestant was wrong. A ratio below its floor is flagged and is no failure: machines differ."""
    parser = _parser(program)
    args = parser.parse_args(argv)
    if args.threads < 1 or (args.rounds is not None and args.rounds < 1):
        parser.error("--threads and --rounds must be at least 1")
    wanted = args.only.lower()
    rows = [row for row in all_rows() if wanted in row.name.lower() and (row.quick or not args.quick)]
    memory_of = GPT2 if wanted in MEMORY_ROW and not args.quick else None
    if not rows and memory_of is None:
        parser.error(_no_such_row(args.only, args.quick))
    settings = Settings(
        rounds=args.rounds or (5 if args.quick else 9),
        budget_s=0.3 if args.quick else 2.0,
        reading_elements=50_000_000 if args.quick else 100_000_000,
        cache_bytes=machine.last_level_cache_bytes(),
    )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        results = run(rows, settings, memory_of)
    finally:
        torch.set_num_threads(threads_before)
    print(report.text(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.markdown is not None:
        report.write(report.markdown(results), args.markdown)
    return int(any(result["verdict"] == "wrong" for result in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
