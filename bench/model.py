"""What each GPU row should take, from bytes, launches and the card's datasheet, beside what it took if that is known.

``python -m fastclip.bench.model [--card NAME] [--json FILE] [--markdown FILE]``. A prediction, not a measurement: it is
there to be wrong in a way that says something. Constants are marked with where they come from.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastclip import riding

from . import gpu, report, rows
from .workloads import Workload

RESULTS = Path(__file__).parent / "results/gpu.json"

# Bytes a second, from NVIDIA's datasheets of the SXM parts (A100 80 GB, H100, H200, B200).
CARDS = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12}
ACHIEVED = 0.9  # of it: 4.3 of 4.8 TB/s is what a copy in torch reaches on an H200

# Seen by many on Ampere and later, and to be replaced by what bench/gpu.py measures.
LAUNCH_S = 2.5e-6  # of a small kernel in a full queue, on the device
HOST_LAUNCH_S = 5e-6  # of one operation of torch's with a kernel, on the host
FIRST_S = 5e-6  # from a call to the first kernel's start, and from the last one's end to the host: wall time only

# fastclip, on the host, from bench/host.py on the CPU that timed torch's parts below (a faster one is faster for both
# sides): a read, and the write after it, which a device is always given. That is of 10,000 tensors, which are in
# no cache; of 1,000 a tensor takes 30 ns less.
OUR_READ_S, OUR_READ_S_PER_TENSOR = 48e-6, 170e-9
OUR_WRITE_S, OUR_WRITE_S_PER_TENSOR = 9e-6, 30e-9
OUR_TENSORS = 1200  # of a launch: kTableTensors in csrc/cuda/table.h
# Counted in tests/test_far.py.
GUARDS_LAUNCHES = 3  # of the wrapper: it counts the step, sends the counts to the host, and torch minds a found_inf
SCALED_LAUNCHES = 9  # under fastclip's GradScaler, besides: its own three, the found_inf that it asks for, what rides
SCALERS_LAUNCHES = 7  # of torch's own GradScaler, besides the pass that unscales
TWICE_LAUNCHES = 10  # where the step is launched twice, besides: what rides, and which of the two is meant

# torch, ATen/native/cuda/MultiTensorApply.cuh, built with CUDA 13 (before that 110, 64, 48, 36 tensors and 320 blocks).
MTA_TENSORS = {1: 770, 2: 448, 3: 336, 4: 252}  # by how many lists go side by side
MTA_BLOCKS, MTA_CHUNK = 2240, 65536  # chunk in elements
CLEANUP_TENSORS = 400  # ForeachReduceOp.cu's second kernel; assumed: its limit is about 4 KB of addresses
CAT_TENSORS = 128  # ATen/native/cuda/Shape.cu
SCALAR_LAUNCHES = 5  # clip_grad.py: norm of the norms, + eps, max_norm / it (two kernels), clamp
TORCH_HOST_S_PER_TENSOR = 2e-6  # .grad 0.2, grouping 0.3, .to 0.4, stack 0.6 us, timed on a CPU; and an allocation


@dataclass(frozen=True)
class Cost:
    """What one call asks of the card and of the host."""

    moved_bytes: float
    launches: int
    host_s: float

    def seconds(self, clock: str, bytes_per_s: float) -> float:
        device = self.moved_bytes / bytes_per_s + self.launches * LAUNCH_S
        return max(device, self.host_s) + FIRST_S if clock == "wall" else device


def mta_launches(sizes: Sequence[int], lists: int = 1) -> int:
    """How many launches torch's multi_tensor_apply takes: one is full of tensors or of blocks."""
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        chunks = math.ceil(size / MTA_CHUNK)
        for chunk in range(chunks):
            blocks += 1
            is_last = chunk == chunks - 1
            if blocks == MTA_BLOCKS or (tensors == MTA_TENSORS[lists] and is_last):
                launches += 1
                blocks, tensors = 0, 0 if is_last else 1
    return launches + (blocks > 0)


def _sizes(workload: Workload) -> list[int]:
    return [math.prod(shape) for shape in workload.shapes]


def our_read(workload: Workload) -> Cost:
    count = len(workload.shapes)
    return Cost(workload.bytes, math.ceil(count / OUR_TENSORS), OUR_READ_S + OUR_READ_S_PER_TENSOR * count)


def our_clip(workload: Workload, clips: bool) -> Cost:
    count = len(workload.shapes)
    write_s = OUR_WRITE_S + OUR_WRITE_S_PER_TENSOR * count
    # a write that finds 1 returns at once
    return _sum(our_read(workload), Cost(2 * clips * workload.bytes, math.ceil(count / OUR_TENSORS), write_s))


def torch_clip(workload: Workload) -> Cost:
    sizes = _sizes(workload)
    count = len(sizes)
    fills, norms, stacked = 2, mta_launches(sizes), math.ceil(count / CAT_TENSORS)
    launches = fills + norms + math.ceil(count / CLEANUP_TENSORS) + stacked + SCALAR_LAUNCHES + mta_launches(sizes)
    return Cost(3 * workload.bytes, launches, launches * HOST_LAUNCH_S + count * TORCH_HOST_S_PER_TENSOR)


def fused_adamw(workload: Workload, writes_grads: bool) -> Cost:
    """Reads parameter, gradient and two moments, writes all but the gradient; that too where a grad_scale rides."""
    launches = mta_launches(_sizes(workload), lists=4) + mta_launches([1] * len(workload.shapes))  # and the step counts
    return Cost((7 + writes_grads) * workload.bytes, launches, launches * HOST_LAUNCH_S)


def _sum(*costs: Cost, launches: int = 0) -> Cost:
    return Cost(
        sum(cost.moved_bytes for cost in costs),
        sum(cost.launches for cost in costs) + launches,
        sum(cost.host_s for cost in costs) + launches * HOST_LAUNCH_S,
    )


def costs(row: gpu.Row) -> tuple[Cost, Cost]:
    """Of a row's two contestants."""
    made: Any = row.make
    workload, settings = row.workload, getattr(made, "keywords", {})
    kind = getattr(made, "func", made)
    clips = settings.get("share", rows.NOTHING_TO_CLIP) < 1
    if kind is rows.norm_against_sum:
        return our_read(workload), Cost(workload.bytes, 2, 2 * HOST_LAUNCH_S)
    if kind is rows.clip_norm:
        return our_clip(workload, clips), torch_clip(workload)
    if kind is gpu.triton_against_cuda:  # by bytes and launches there is no difference
        triton = our_clip(workload, clips)
        return triton, triton
    if kind is rows.step and settings.get("scaled"):
        looks = Cost(2 * workload.bytes, mta_launches(_sizes(workload)), 0.0)  # unscale_: reads and writes
        launches = GUARDS_LAUNCHES + SCALED_LAUNCHES
        ours = _sum(our_read(workload), fused_adamw(workload, True), launches=launches)
        return ours, _sum(looks, torch_clip(workload), fused_adamw(workload, False), launches=SCALERS_LAUNCHES)
    if kind is rows.step and settings.get("bare"):
        bare = fused_adamw(workload, False)
        if workload.bytes < riding.TWICE_FROM_BYTES:
            return _sum(our_clip(workload, clips), bare, launches=GUARDS_LAUNCHES), bare
        idle = replace(bare, moved_bytes=0)
        launches = GUARDS_LAUNCHES + TWICE_LAUNCHES
        return _sum(our_read(workload), fused_adamw(workload, clips), idle, launches=launches), bare
    raise ValueError(f"no model of {row.name}")


def predictions(card: str) -> list[dict[str, Any]]:
    speed = ACHIEVED * CARDS[card]
    made = []
    for row in gpu.all_rows():
        ours, theirs = costs(row)
        ours_s, theirs_s = (cost.seconds(row.clock, speed) for cost in (ours, theirs))
        made.append(
            {
                "name": row.name,
                "clock": row.clock,
                "ours_s": ours_s,
                "other_s": theirs_s,
                "ratio": theirs_s / ours_s,
                "launches": (ours.launches, theirs.launches),
                "floor": row.floor,
            }
        )
    return made


def markdown(card: str, results: dict[str, Any] | None) -> str:
    """One line a row; measured columns stay empty without results."""
    measured = {row["name"]: row for row in (results or {}).get("rows", []) if "ratio" in row}
    of = f"measured on {results['card']['name']}" if results else "nothing is measured yet"
    lines = [
        f"Predicted for {card} ({CARDS[card] / 1e12:g} TB/s, of which {ACHIEVED:.0%} is taken to be reached); {of}.",
        "",
        "| | fastclip | other | launches | ratio, predicted | wanted | fastclip, measured | ratio, measured |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in predictions(card):
        found = measured.get(row["name"])
        wanted = f"{row['floor']:.2f}" if row["floor"] is not None else ""
        seen = ("", "")
        if found:
            seen = (report.seconds(found["contestants"][0][f"{row['clock']}_s"]), report.multiple(found["ratio"]))
        wall = " (wall)" if row["clock"] == "wall" else ""
        lines.append(
            f"| {row['name']}{wall} | {report.seconds(row['ours_s'])} | {report.seconds(row['other_s'])} "
            f"| {row['launches'][0]} / {row['launches'][1]} | {report.multiple(row['ratio'])} | {wanted} "
            f"| {seen[0]} | {seen[1]} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastclip.bench.model", description=__doc__.splitlines()[0])
    parser.add_argument("--card", choices=sorted(CARDS), default="H200")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, metavar="FILE", help="what bench/gpu.py wrote, if it is there"
    )
    parser.add_argument("--markdown", type=report.place, metavar="FILE", help="write the table; - for the terminal")
    args = parser.parse_args(argv)
    results = json.loads(args.json.read_text()) if args.json.exists() else None
    report.write(markdown(args.card, results), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
