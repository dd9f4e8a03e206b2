"""Single operations over time, with pytest-benchmark: ``pytest bench/ --benchmark-only --benchmark-autosave``.

Times of different days or machines are no ratios; those come from compare.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import rows
from .rows import CLAMPING, CLIPPING, NOTHING_TO_CLAMP, NOTHING_TO_CLIP, Contestant, Inputs
from .workloads import (
    EMBEDDING_BF16,
    GPT2,
    GPT2_BF16,
    GPT2_FP16,
    LSTM,
    RESNET50,
    ROWS_BF16,
    SMALL,
    Workload,
)

WORKLOADS: tuple[Workload, ...] = (GPT2, GPT2_BF16, GPT2_FP16, RESNET50, LSTM, SMALL, EMBEDDING_BF16, ROWS_BF16)

OPS: dict[str, Callable[[Inputs], Contestant]] = {
    "clip_grad_norm_, nothing to clip": lambda inputs: rows.clip_norm(inputs, NOTHING_TO_CLIP)[0],
    "clip_grad_norm_, clipping": lambda inputs: rows.clip_norm(inputs, CLIPPING)[0],
    "clip_grad_value_, nothing to clamp": lambda inputs: rows.clip_value(inputs, NOTHING_TO_CLAMP)[0],
    "clip_grad_value_, clamping": lambda inputs: rows.clip_value(inputs, CLAMPING)[0],
    "grad_stats": lambda inputs: rows.statistics(inputs, extras=False)[0],
    "grad_stats with extras": lambda inputs: rows.statistics(inputs, extras=True)[0],
    "get_total_norm": lambda inputs: rows.norm(inputs, 2.0)[0],
}


@pytest.fixture(scope="module", params=WORKLOADS, ids=lambda workload: workload.name)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    """One workload at a time: pytest runs all operations on it before it builds the next."""
    return Inputs(request.param)


@pytest.mark.parametrize("op", OPS)
def test_op(benchmark, inputs: Inputs, op: str) -> None:
    inputs.restore()
    contestant = OPS[op](inputs)
    contestant.before()
    contestant.check(contestant.call())
    benchmark.extra_info["moved_bytes"] = contestant.moved_bytes
    benchmark.pedantic(
        contestant.call, setup=contestant.before, teardown=contestant.after, rounds=9, iterations=1, warmup_rounds=1
    )
