"""Every kind of launch of the Triton kernels, with a stand-in for the driver: kernels are compiled, and not run.

A program of its own: Triton has one driver in a process, and here it is not a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastclip.bench.triton_driver import Launches, stand_in
from fastclip.kernels import launch
from fastclip.kernels.blocks import NVIDIA_OPTIONS
from torch import Tensor

from fastclip.backends import tables


def kinds() -> list[Callable[[], None]]:
    """One call for each."""
    facts = tables.table_of([torch.ones(100), torch.ones(7)], tables.CPU).facts
    long = tables.table_of([torch.ones(1 << 16)], tables.CPU).facts
    rows, extra_rows, totals = (torch.zeros(*shape, dtype=torch.float64) for shape in ((3, 2), (6, 2), (4,)))
    counts_of_steps = torch.zeros(2, 5, dtype=torch.float64)
    heads, counts = torch.zeros(2), [4, 1]
    unit_rows, strengths = (torch.zeros(*shape, dtype=torch.float64) for shape in ((3, 5), (2, 2)))
    single, double = torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)
    cpu = rows.device

    def read(divisor: Tensor | None = None, of: bytes = facts, **given: Any) -> Callable[[], None]:
        settings = {"counts": None, "p": 2.0, "extras": False, "rows": rows, **given}
        return lambda: launch.read(of, divisor=divisor, **settings)

    joined = {"totals": totals, "heads": heads, "max_norm": 1.0, "eps": 1e-6}
    penalised = {"weights": facts, "strengths": strengths, "weight_rows": rows.clone()}
    return [
        *(read(divisor, **way) for divisor in (None, single, double) for way in ({}, joined)),
        read(**{**joined, "heads": None}),
        read(of=long, rows=rows[:, :1].contiguous(), **joined),
        read(p=3.0),
        read(extras=True, rows=extra_rows),
        read(**penalised),
        read(counts=counts, rows=unit_rows),
        lambda: launch.finish(rows, 2.0, 1.0, 1e-6, totals, heads),
        lambda: launch.finish(rows, 2.0, 1.0, 1e-6, totals, None),
        lambda: launch.join(unit_rows, counts, 2.0, rows),
        *(
            lambda of=of: launch.tally(counts_of_steps[0], *of, counts_of_steps[1])
            for of in ((single, double, single), (1.0, single, 0.0), (double, 0.0, single))
        ),
        lambda: launch.scale(facts, cpu, single),
        lambda: launch.scale(facts, cpu, double),
        lambda: launch.scale(facts, cpu, double, single),
        lambda: launch.scale_each(facts, cpu, torch.ones(2, dtype=torch.float64)),
        lambda: launch.scale_each(facts, cpu, torch.ones(5, dtype=torch.float64), counts),
        lambda: launch.scale_each(facts, cpu, torch.ones(5, dtype=torch.float64), counts, single),
        lambda: launch.clamp(facts, cpu, 1.0),
        lambda: launch.clamp(facts, cpu, 1.0, single),
        lambda: launch.zero_nonfinite(facts, cpu),
    ]


def check() -> None:
    """Raises unless each launch is of the kernel, and with the arguments, that Triton's own dispatcher has for it."""
    launched: Launches = []
    stand_in(launched)
    ours = launch.Where.launch

    def both_ways(
        where: launch.Where, kernel: Any, programs: int, *arguments: Any, varying: Any = (), **constants: Any
    ) -> None:
        ours(where, kernel, programs, *arguments, varying=varying, **constants)
        kernel[(programs,)](*arguments, **constants, **NVIDIA_OPTIONS)
        (own, with_ours), (tritons, with_its) = launched[-2:]
        what = f"{kernel.__name__} with {constants}"
        assert own is tritons, f"{what}: another one than Triton's"
        assert with_ours[:4] == with_its[:4], f"{what}: another grid, or another stream"
        same = [a is b or a == b for a, b in zip(with_ours[9:], with_its[9:], strict=True)]  # after the hooks
        assert all(same), f"{what}: {with_ours[9:]}"

    launch.Where.launch = both_ways  # type: ignore[method-assign]
    for call in [*kinds(), *kinds()]:
        call()
    # each twice, by us and by Triton; lists whose units are of two lengths take two launches
    assert len(launched) == 2 * 2 * (len(kinds()) + 3), len(launched)
    print(f"{len({own for own, _ in launched})} kernels, {len(launch._compiled)} kept")
