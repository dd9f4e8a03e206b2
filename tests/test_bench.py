"""The measurements measure what they say: turns, checks before times, rows that clip, rows that lose."""

import functools
import importlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastclip
import fastclip.__main__
from fastclip._native import C


def bench(name: str) -> ModuleType:
    """A module of the installed fastclip.bench, or of the source tree's bench/."""
    package = "fastclip.bench" if importlib.util.find_spec("fastclip.bench") else "bench"
    return importlib.import_module(f"{package}.{name}")


compare, memory, oracle, peers, report, rows, workloads = map(
    bench, ("compare", "memory", "oracle", "peers", "report", "rows", "workloads")
)

SHAPES = ((40, 30), (30,), (), (1,))
TINY = workloads.Workload("tiny fp32", SHAPES, torch.float32, "4 tensors")
FAST = compare.Settings(rounds=3, budget_s=0.0, reading_elements=1 << 12, cache_bytes=1 << 20)


def run(*table: object) -> dict:
    return compare.run(table, FAST)


def row(make: object, workload: object = TINY, floor: float | None = None, name: str = "a row") -> object:
    return rows.Row(name, (workload,), make, floor)


class Clock:
    """Stands still, except when a contestant takes time."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def contestant(self, name: str, takes: float) -> object:
        def spend(what: str, seconds: float) -> None:
            self.log.append(f"{what}{name}")
            self.now += seconds

        return rows.Contestant(
            name,
            lambda: spend("", takes),
            lambda _: 0.0,
            1000,
            before=lambda: spend("before ", 100.0),
            after=lambda: spend("after ", 100.0),
        )


def test_contestants_take_turns_and_swap_the_order_every_round():
    clock = Clock()
    pair = [clock.contestant("A", 1.0), clock.contestant("B", 2.0)]
    seconds = compare.alternate(pair, 4, clock)
    assert [entry for entry in clock.log if " " not in entry] == list("ABBAABBA")
    assert clock.log[:6] == ["before A", "A", "after A", "before B", "B", "after B"]
    assert seconds == [[1.0] * 4, [2.0] * 4]  # what is before and after is not timed


def test_ratio_is_that_of_the_medians(monkeypatch):
    monkeypatch.setattr(
        compare, "alternate", lambda pair, rounds, clock=None: [[1.0, 2.0, 9.0][:rounds], [4.0, 4.0, 9.0][:rounds]]
    )
    fake = rows.Contestant("fake", lambda: None, lambda _: 0.0, 6000)
    result = compare.measured(row(lambda _: (fake, fake), floor=3.0), [rows.Inputs(TINY)], FAST)
    assert (result["ratio"], result["ratio_min"], result["ratio_max"]) == (2.0, 1.0, 4.0)
    assert result["verdict"] == "below floor"
    ours = result["contestants"][0]
    assert (ours["median_s"], ours["fastest_s"], ours["bytes_per_s"]) == (2.0, 1.0, 3000.0)
    compare._set_shares({"rows": [result], "reading_speed": {"bytes_per_s": 6000.0}})
    assert ours["of_reading_speed"] == 0.5


@pytest.mark.parametrize(
    ("ratio", "floor", "verdict"),
    [(3.2, 3.2, "ok"), (3.1, 3.2, "below floor"), (0.9, 0.8, "ok"), (1.0, None, "faster"), (0.9, None, "slower")],
)
def test_verdict(ratio, floor, verdict):
    assert compare.verdict(ratio, floor) == verdict


def test_a_wrong_contestant_is_never_timed():
    calls = []

    def refuse(_: object) -> float:
        raise oracle.WrongResult("2 is not 3")

    liar = rows.Contestant("liar", lambda: calls.append("liar"), refuse, 1)
    honest = rows.Contestant("honest", lambda: calls.append("honest"), lambda _: 0.0, 1)
    results = run(row(lambda _: (liar, honest)))
    assert calls == ["liar"]
    (result,) = results["rows"]
    assert result["verdict"] == "wrong"
    assert "ratio" not in result
    assert "2 is not 3" in report.text(results)
    assert "2 is not 3" in report.markdown(results)


def wrong_norm(parameters: list, max_norm: float) -> torch.Tensor:
    return fastclip_clip(parameters, max_norm) * (1 + 2**-22)


def does_not_write(parameters: list, max_norm: float) -> torch.Tensor:
    return fastclip_clip(parameters, math.inf)


def writes_one_too_much(parameters: list, max_norm: float) -> torch.Tensor:
    norm = fastclip_clip(parameters, max_norm)
    parameters[0].grad.view(-1)[-1] *= 1.001
    return norm


fastclip_clip = fastclip.clip_grad_norm_


@pytest.mark.parametrize(
    ("share", "broken"),
    [
        (0.5, wrong_norm),
        (0.5, does_not_write),
        (0.5, writes_one_too_much),
        (2.0, wrong_norm),
        (2.0, writes_one_too_much),
    ],
)
def test_a_broken_clip_has_no_time(monkeypatch, share, broken):
    make = functools.partial(rows.clip_norm, share=share)
    assert run(row(make))["rows"][0]["verdict"] in ("faster", "slower")
    monkeypatch.setattr(fastclip, "clip_grad_norm_", broken)
    assert run(row(make))["rows"][0]["verdict"] == "wrong"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_call_of_a_clipping_row_clips(monkeypatch, dtype):
    shares = {"fastclip": [], "torch": []}

    def spy(name: str, clip: object) -> object:
        def watched(parameters: list, max_norm: float) -> torch.Tensor:
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
            shares[name].append(max_norm / norm)
            return clip(parameters, max_norm)

        return watched

    monkeypatch.setattr(fastclip, "clip_grad_norm_", spy("fastclip", fastclip.clip_grad_norm_))
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy("torch", nn.utils.clip_grad_norm_))
    workload = workloads.in_dtype(TINY, dtype)
    (result,) = run(row(functools.partial(rows.clip_norm, share=rows.CLIPPING), workload))["rows"]
    assert result["verdict"] != "wrong"
    for called in shares.values():
        assert len(called) == 1 + 1 + FAST.rounds  # check, trial, timed
        assert called == pytest.approx([rows.CLIPPING] * len(called))


@pytest.mark.parametrize("make", [rows.clip_norm, rows.clip_value])
def test_a_contestant_that_stops_writing_is_caught(make):
    inputs = rows.Inputs(TINY)
    ours, theirs = make(inputs, rows.CLIPPING if make is rows.clip_norm else rows.CLAMPING)
    assert compare.checked(ours) is not None
    assert compare.checked(theirs) is not None
    idle = rows.Contestant("idle", lambda: None, ours.check, 1, ours.before, ours.after)
    with pytest.raises(oracle.WrongResult, match="did not write"):
        compare.alternate([ours, idle], 1)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(rows.clip_norm, share=rows.NOTHING_TO_CLIP),
        functools.partial(rows.clip_value, bound=rows.NOTHING_TO_CLAMP),
        functools.partial(rows.clip_value, bound=rows.CLAMPING),
        functools.partial(rows.statistics, extras=False),
        functools.partial(rows.statistics, extras=False, best_of_torch=True),
        functools.partial(rows.statistics, extras=True),
        *(functools.partial(rows.norm, p=p) for p in (1.0, 2.0, 3.0, math.inf)),
    ],
)
def test_rows_agree_with_the_oracle(make):
    (result,) = run(row(make))["rows"]
    assert result["verdict"] in ("faster", "slower"), result
    assert all(0 <= contestant["relative_error"] < 1e-5 for contestant in result["contestants"])


def test_sparse_rows_and_plain_sum():
    embedding = workloads.Workload("embedding", ((400, 16),), torch.float32, "dense")
    zero_rows = workloads.Workload("embedding", ((400, 16),), torch.float32, "99% zero rows", "rows")
    pair = rows.Row("rows", (zero_rows, embedding), rows.rows_against_dense, 0.01)
    results = run(pair, row(rows.norm_against_sum, embedding))
    assert [result["verdict"] for result in results["rows"]] in (["ok", "faster"], ["ok", "slower"])


@pytest.mark.skipif(C is None, reason="needs the extension")
def test_forced_capabilities_are_put_back():
    before, last = C.cpu_capability(), C.cpu_capabilities()[-1]
    for name in C.cpu_capabilities():
        make = functools.partial(rows.capability, name=name, best=last)
        assert run(row(make))["rows"][0]["verdict"] != "wrong"
        assert C.cpu_capability() == before
    make = functools.partial(rows.capability, name="no such kernels", best=last)
    assert "no such kernels" in run(row(make))["rows"][0]["why"]
    assert C.cpu_capability() == before


# ---- optimizer steps -----------------------------------------------------------------------------------

STEPS = {
    "AdamW fused": {"rule": rows.ADAMW_FUSED},
    "AdamW + l2": {"rule": rows.ADAMW_FUSED, "l2": rows.L2},
    "GradScaler": {"rule": rows.ADAMW_FUSED, "scaled": True},
    "AdamW foreach": {"rule": rows.ADAMW_FOREACH},
    "SGD fused": {"rule": rows.SGD_FUSED},
}
SHARES = {"nothing to clip": rows.NOTHING_TO_CLIP, "clipping": rows.CLIPPING}


def step_row(**settings: object) -> object:
    return row(functools.partial(rows.step, **settings))


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_steps_agree_with_the_oracle(settings, share):
    (result,) = run(step_row(share=share, **settings))["rows"]
    assert result["verdict"] in ("faster", "slower"), result
    assert all(0 <= contestant["relative_error"] < 1e-5 for contestant in result["contestants"])


def test_a_bare_step_has_no_norm():
    (result,) = run(step_row(rule=rows.ADAMW_FUSED, bare=True))["rows"]
    assert result["verdict"] in ("faster", "slower"), result
    assert result["contestants"][1]["relative_error"] is None


class Idle(fastclip.ClippedOptimizer):
    def step(self) -> None:
        pass


class OnlyLooks(fastclip.ClippedOptimizer):
    def step(self) -> None:
        self._fastclip.look(self)


class StepsTwice(fastclip.ClippedOptimizer):
    def step(self) -> None:
        super().step()
        super().step()


class DoesNotClip(fastclip.ClippedOptimizer):
    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float, **settings: Any) -> None:
        super().__init__(optimizer, math.inf, **settings)


class ClipsTooMuch(fastclip.ClippedOptimizer):
    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float, **settings: Any) -> None:
        super().__init__(optimizer, 1e-5 * max_norm, **settings)


class AddsNoPenalty(fastclip.ClippedOptimizer):
    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float, **settings: Any) -> None:
        super().__init__(optimizer, max_norm)


class KeepsUnclipped(fastclip.ClippedOptimizer):
    """The step is right; what is left in ``.grad`` is not."""

    def step(self) -> None:
        super().step()
        self.param_groups[0]["params"][0].grad.view(-1)[-1] *= 1.001


class WrongNorm(fastclip.ClippedOptimizer):
    @property
    def last_norm(self) -> torch.Tensor:
        return super().last_norm * (1 + 2**-22)


ALWAYS_WRONG = (Idle, OnlyLooks, StepsTwice, KeepsUnclipped, WrongNorm)


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    ("share", "broken"),
    [
        *((share, broken) for share in SHARES.values() for broken in ALWAYS_WRONG),
        (rows.NOTHING_TO_CLIP, ClipsTooMuch),
        (rows.CLIPPING, ClipsTooMuch),
        (rows.CLIPPING, DoesNotClip),
    ],
)
def test_a_broken_wrapper_has_no_time(monkeypatch, settings, share, broken):
    monkeypatch.setattr(fastclip, "ClippedOptimizer", broken)
    assert run(step_row(share=share, **settings))["rows"][0]["verdict"] == "wrong"


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_a_wrapper_without_its_penalty_has_no_time(monkeypatch, share):
    monkeypatch.setattr(fastclip, "ClippedOptimizer", AddsNoPenalty)
    assert run(step_row(share=share, **STEPS["AdamW + l2"]))["rows"][0]["verdict"] == "wrong"


def test_a_scaler_that_unscales_by_too_much_has_no_time(monkeypatch):
    class Doubled(fastclip.GradScaler):
        def __init__(self, device: str, init_scale: float, **settings: object) -> None:
            super().__init__(device, 2 * init_scale, **settings)

    monkeypatch.setattr(fastclip, "GradScaler", Doubled)
    assert run(step_row(**STEPS["GradScaler"]))["rows"][0]["verdict"] == "wrong"


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_torch_is_held_to_the_same(monkeypatch, settings):
    norm_alone = lambda params, max_norm: nn.utils.get_total_norm([p.grad for p in params])  # noqa: E731
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", norm_alone)
    assert run(step_row(share=rows.CLIPPING, **settings))["rows"][0]["verdict"] == "wrong"


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_a_timed_call_that_does_not_step_is_caught(settings, share):
    for contestant in rows.step(rows.Inputs(TINY), share=share, **settings):
        assert compare.checked(contestant) is not None
        idle = rows.Contestant("idle", lambda: None, contestant.check, 1, contestant.before, contestant.after)
        with pytest.raises(oracle.WrongResult, match="did not step"):
            compare.alternate([idle], 1)


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_a_timed_call_that_does_not_clip_is_caught(monkeypatch, settings):
    _, theirs = rows.step(rows.Inputs(TINY), share=rows.CLIPPING, **settings)
    assert compare.checked(theirs) is not None
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)
    with pytest.raises(oracle.WrongResult, match="did not write"):
        compare.alternate([theirs], 1)


def test_a_timed_call_that_steps_to_nan_is_caught():
    inputs = rows.Inputs(TINY)
    ours, theirs = rows.step(inputs, rows.ADAMW_FUSED)
    for contestant in (ours, theirs):
        assert compare.checked(contestant) is not None
    inputs.grads[-1].fill_(math.nan)
    with pytest.raises(oracle.WrongResult, match="did not step"):  # the wrapper skips
        compare.alternate([ours], 1)
    with pytest.raises(oracle.WrongResult, match="finite parameters"):
        compare.alternate([theirs], 1)


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_every_step_of_a_clipping_row_clips(monkeypatch, settings):
    steppers = []

    class Watched(fastclip.ClippedOptimizer):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            steppers.append(self)

    monkeypatch.setattr(fastclip, "ClippedOptimizer", Watched)
    assert run(step_row(share=rows.CLIPPING, **settings))["rows"][0]["verdict"] != "wrong"
    (stepper,) = steppers
    calls = 1 + 1 + FAST.rounds  # check, trial, timed
    assert (stepper.steps, stepper.clipped_steps, stepper.skipped_steps) == (calls, calls, 0)


@pytest.mark.parametrize(
    ("settings", "ours", "theirs"),
    [
        ({"rule": rows.ADAMW_FUSED}, 32, 40),
        ({"rule": rows.ADAMW_FUSED, "share": rows.CLIPPING}, 36, 40),
        ({"rule": rows.ADAMW_FUSED, "l2": rows.L2}, 40, 52),
        ({"rule": rows.ADAMW_FUSED, "l2": rows.L2, "share": rows.CLIPPING}, 44, 52),
        ({"rule": rows.ADAMW_FUSED, "scaled": True}, 36, 48),
        ({"rule": rows.ADAMW_FUSED, "scaled": True, "share": rows.CLIPPING}, 36, 48),
        ({"rule": rows.ADAMW_FOREACH}, 84, 92),
        ({"rule": rows.ADAMW_FOREACH, "share": rows.CLIPPING}, 92, 92),
        ({"rule": rows.SGD_FUSED}, 24, 32),
        ({"rule": rows.SGD_FUSED, "share": rows.CLIPPING}, 28, 32),
        ({"rule": rows.ADAMW_FUSED, "bare": True}, 32, 28),
    ],
)
def test_bytes_of_a_step(settings, ours, theirs):
    inputs = rows.Inputs(TINY)
    moved = [contestant.moved_bytes for contestant in rows.step(inputs, **settings)]
    assert moved == [ours * TINY.size, theirs * TINY.size]


def test_host_time(monkeypatch):
    assert run(row(rows.host_time))["rows"][0]["verdict"] in ("faster", "slower")
    for broken in (*ALWAYS_WRONG, ClipsTooMuch):
        monkeypatch.setattr(fastclip, "ClippedOptimizer", broken)
        assert run(row(rows.host_time))["rows"][0]["verdict"] == "wrong", broken


def test_short_calls_get_more_rounds():
    settings = compare.Settings(rounds=4, budget_s=1.0)
    assert compare._rounds(10.0, settings) == 4
    assert compare._rounds(0.1, settings) == 10
    assert compare._rounds(1e-6, settings) == 4 * compare.MOST_ROUNDS


# ---- the oracle ----------------------------------------------------------------------------------------


def test_oracle_norms(monkeypatch):
    monkeypatch.setattr(oracle, "PIECE", 3)
    tensor = torch.tensor([3.0, -4.0, 0.0, 12.0])
    assert [oracle.norm(tensor, p) for p in (1.0, 2.0, math.inf)] == [19.0, 13.0, 12.0]
    assert oracle.norm(tensor, 3.0) == pytest.approx((27 + 64 + 1728) ** (1 / 3), rel=1e-15)
    assert oracle.norm_of_norms([3.0, 4.0], 2.0) == 5.0


def test_one_ulp_is_right_and_two_are_not():
    want = 1.0 + 2**-30
    oracle.check_norm("norm", 1.0 + 2**-23, want)
    for wrong in (1.0 + 2**-22, math.nan, math.inf):
        with pytest.raises(oracle.WrongResult):
            oracle.check_norm("norm", wrong, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_wrong_element_is_found(dtype):
    before = [torch.linspace(-1.0, 1.0, 101).to(dtype)]
    untouched = [before[0].clone()]
    scaled = [(before[0].double() * 0.3).to(dtype)]
    clamped = [before[0].clamp(-0.5, 0.5)]
    checks = [
        (untouched, oracle.check_untouched),
        (scaled, functools.partial(oracle.check_scaled, factor=0.3)),
        (clamped, functools.partial(oracle.check_clamped, bound=0.5)),
    ]
    for right, check in checks:
        check(right, before)
        right[0][7] *= 1.05
        with pytest.raises(oracle.WrongResult):
            check(right, before)


def test_one_wrong_parameter_is_found():
    start = [torch.linspace(-1.0, 1.0, 101)]
    stepped = [start[0] - 1e-3]
    oracle.check_stepped(stepped, start, lambda before: before - 1e-3, 1e-3)
    for wrong in (start[0][7], math.nan):
        with pytest.raises(oracle.WrongResult, match="parameter 0"):
            oracle.check_stepped([stepped[0].index_fill(0, torch.tensor([7]), wrong)], start, lambda b: b - 1e-3, 1e-3)


# ---- the workloads -------------------------------------------------------------------------------------


def test_workloads_are_the_models_they_name():
    by_name = {workload.name: workload for workload in workloads.WORKLOADS}
    assert len(by_name) == len(workloads.WORKLOADS)
    assert (len(workloads.GPT2.shapes), workloads.GPT2.size) == (148, 124_439_808)
    assert (len(workloads.RESNET50.shapes), workloads.RESNET50.size) == (161, 25_557_032)
    assert (len(workloads.SMALL.shapes), workloads.SMALL.size) == (2000, 128_000)
    lstm = [*nn.LSTM(8, 512, num_layers=2).parameters(), *nn.Linear(512, 1).parameters()]
    assert workloads.LSTM.shapes == tuple(tuple(p.shape) for p in lstm)
    assert by_name["GPT-2 bf16"].dtype == torch.bfloat16
    assert by_name["GPT-2 fp16"].bytes == workloads.GPT2.bytes // 2


def test_fills():
    def grad(fill: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        (parameter,) = workloads.parameters(workloads.Workload("w", ((1000, 20),), dtype, "", fill), seed=3)
        assert parameter.grad.dtype == dtype
        return parameter.grad

    assert torch.equal(grad("normal"), grad("normal"))
    assert 0.9 < grad("normal").std() / workloads.STD < 1.1
    assert bool((grad("constant", torch.bfloat16) == torch.tensor(0.1, dtype=torch.bfloat16)).all())
    assert int(grad("rows").count_nonzero(dim=1).bool().sum()) == 10
    with pytest.raises(ValueError, match="unknown fill 'noise'"):
        grad("noise")


def test_the_table(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package: False)
    table = compare.all_rows()
    names = [entry.name for entry in table]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 48  # the width of their column
    floors = {entry.name: entry.floor for entry in table if entry.floor is not None}
    assert sorted(floors.values()) == [0.95, 1.05, 1.15, 1.3, 1.4, 1.6, 3.2, 3.3, 6.5, 12.0, 15.0, 22.0]
    order = [entry.workloads for entry in table]
    assert len({*order}) == sum(a != b for a, b in zip(order, [None, *order[:-1]], strict=True)), "built twice"
    assert any(entry.quick for entry in table)


# ---- policies ------------------------------------------------------------------------------------------


def plain_agc(params, clip_factor, eps):
    for param in params:
        param.grad.copy_(peers.agc_oracle(param.grad, param, clip_factor, eps))


def try_out(contestants):
    for contestant in contestants:
        contestant.before()
        contestant.check(contestant.call())


@pytest.mark.parametrize("factor", [rows.AGC_NOTHING, rows.AGC_ALL])
def test_agc_rows(monkeypatch, factor):
    """With a peer that is the rule itself: what another package does can't decide whether ours is right."""
    monkeypatch.setattr(peers, "timm_agc", lambda: plain_agc)
    try_out(rows.unitwise(rows.Inputs(TINY), factor=factor))
    inputs = rows.Inputs(TINY)
    ours, _ = rows.unitwise(inputs, factor=factor)
    ours.call()
    inputs.grads[1].mul_(1.001)
    with pytest.raises(rows.WrongResult, match="relative to float64"):
        ours.check(None)


@pytest.mark.parametrize(("rule", "peer"), [("ZScore", "zclip"), ("Percentile", "autoclip")])
def test_adaptive_rows(monkeypatch, rule, peer):
    monkeypatch.setattr(peers, "zclip_step", lambda params: lambda: 0.0)
    monkeypatch.setattr(peers, "autoclip_step", lambda params, window: lambda: None)
    inputs = rows.Inputs(TINY)
    contestants = rows.adaptive(inputs, policy=rows.RULES[rule], peer=peer)
    assert [contestant.name for contestant in contestants] == ["fastclip", peer]
    try_out(contestants)
    inputs.grads[0].mul_(2.0)
    with pytest.raises(rows.WrongResult):
        contestants[0].check(contestants[0].call())


@pytest.mark.parametrize("rule", rows.RULES)
def test_host_time_rows_of_rules(rule):
    try_out(rows.host_time_of(rows.Inputs(TINY), policy=rows.RULES[rule]))


def test_rows_against_other_packages_stand_where_those_are_installed(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package: True)
    everywhere = {entry.name for entry in compare.all_rows()}
    monkeypatch.setattr(peers, "installed", lambda package: False)
    theirs = everywhere - {entry.name for entry in compare.all_rows()}
    assert {name.rpartition(" / ")[2].partition(",")[0] for name in theirs} == {"timm", "zclip", "autoclip"}


# ---- extra memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(not memory.can_measure(), reason="needs glibc")
@pytest.mark.parametrize("size", [100_000, 2_000_000])
def test_extra_memory_sees_what_is_allocated_and_freed(size):
    def call() -> None:
        torch.empty(size, dtype=torch.uint8).fill_(1)

    pages = 8 * 4096
    assert size - pages < memory.extra_bytes(call) < size + 50 * pages
    assert memory.extra_bytes(lambda: [bytes(1000) for _ in range(1000)]) > 1_000_000


@pytest.mark.skipif(not memory.can_measure(), reason="needs glibc")
def test_extra_memory_counts_python_objects_that_touch_no_new_page(monkeypatch):
    monkeypatch.setattr(memory, "_pages_touched", lambda *_: 0)
    assert memory.extra_bytes(lambda: bytearray(100_000)) >= 100_000


@pytest.mark.skipif(not memory.can_measure(), reason="needs glibc")
def test_memory_row():
    result = compare.measured_memory(rows.Inputs(TINY))
    assert set(result["extra_bytes"]) == {"fastclip", "torch"}
    assert result["verdict"] == "ok"
    assert "KB" in report.memory_line(result)


# ---- the command and its report ------------------------------------------------------------------------


def fake_row(name: str, ours: float, other: float, floor: float | None) -> dict:
    def contestant(who: str, median: float) -> dict:
        return {"name": who, "median_s": median, "bytes_per_s": 1e9, "of_reading_speed": 0.5, "relative_error": 1e-3}

    ratio = other / ours
    return {
        "name": name,
        "floor": floor,
        "cache": "cold",
        "verdict": compare.verdict(ratio, floor),
        "ratio": ratio,
        "ratio_min": ratio / 2,
        "ratio_max": ratio * 2,
        "contestants": [contestant("fastclip", ours), contestant("torch", other)],
    }


@pytest.fixture
def results() -> dict:
    made = run()
    made["rows"] = [
        fake_row("far ahead", 0.0001, 0.01, 22.0),
        fake_row("below its floor", 0.01, 0.02, 3.0),
        fake_row("loses", 0.5, 0.1, None),
        {"name": "wrong one", "floor": 2.0, "cache": "cold", "verdict": "wrong", "why": "norm is 2"},
    ]
    return made


def test_losing_rows_stay_in_the_table(results):
    text, table = report.text(results), report.markdown(results)
    for name in ("far ahead", "below its floor", "loses", "wrong one"):
        assert name in text
        assert name in table
    assert "3 BELOW" in text
    assert "3 BELOW" in table
    assert "slower" in text
    assert "slower" in table
    assert "0.20" in table
    assert "22 ok" in text
    table_lines = text.splitlines()[len(report.setting_lines(results)) :]
    assert max(map(len, table_lines)) <= 120


def test_ratios_from_a_busy_machine_are_marked(results):
    assert "~" not in report.text(results) + report.markdown(results)
    results["rows"][0]["others_share_of_cpu"] = 0.4
    results["rows"][1]["others_share_of_cpu"] = 0.01
    assert "100.0~" in report.text(results)
    assert "**100.0~**" in report.markdown(results)
    assert "2.00~" not in report.text(results)
    assert "40% at most" in report.text(results)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3.361, "3.36 s"), (0.5, "500 ms"), (0.0123456, "12.3 ms"), (0.001, "1.00 ms"), (0.00009876, "98.8 us")],
)
def test_seconds(value, shown):
    assert report.seconds(value) == shown


def test_report_command(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source, picture, table = tmp_path / "results.json", tmp_path / "ratios.png", tmp_path / "table.md"
    source.write_text(json.dumps(results))
    assert report.main([str(source), "--markdown", "-", "--png", str(picture)]) == 0
    assert capsys.readouterr().out == report.markdown(results)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert report.main([str(source), "--markdown", str(table)]) == 0
    assert table.read_text() == report.markdown(results)
    assert report.main([str(source)]) == 0
    assert "far ahead" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "was not written by"), ("no JSON", "was not written by"), (None, "No such file")]
)
def test_report_refuses_another_file(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "other.json").write_text(content)
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "other.json")])
    assert message in capsys.readouterr().err


def test_compare_command(monkeypatch, tmp_path, capsys):
    make = functools.partial(rows.clip_norm, share=rows.NOTHING_TO_CLIP)
    table = [
        rows.Row("tiny, no floor", (TINY,), make, quick=True),
        rows.Row("tiny, floor out of reach", (TINY,), make, floor=1e9, quick=True),
        rows.Row("tiny, slow", (TINY,), make),
        rows.Row("another", (TINY,), make, quick=True),
    ]
    monkeypatch.setattr(compare, "all_rows", lambda: table)
    monkeypatch.setattr(compare, "reading_speed", lambda _: compare_speed)
    threads = torch.get_num_threads()
    file, markdown = tmp_path / "results.json", tmp_path / "table.md"
    arguments = ["--quick", "--only", "TINY", "--rounds", "2", "--threads", "1"]
    assert compare.main([*arguments, "--json", str(file), "--markdown", str(markdown)]) == 0
    assert torch.get_num_threads() == threads
    results = json.loads(file.read_text())
    assert [entry["name"] for entry in results["rows"]] == ["tiny, no floor", "tiny, floor out of reach"]
    assert results["rows"][1]["verdict"] == "below floor"
    assert results["threads"] == 1
    assert all(entry["rounds"] >= 2 and entry["cache"] in ("warm", "unknown") for entry in results["rows"])
    assert markdown.read_text() == report.markdown(results)
    printed = capsys.readouterr()
    assert report.text(results) in printed.out
    assert "[2/2] tiny, floor out of reach" in printed.err


compare_speed = {"by": "nobody", "bytes_per_s": 1e9, "elements": 1, "all": {}}


def test_compare_fails_when_a_result_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(compare, "all_rows", lambda: [row(functools.partial(rows.clip_norm, share=0.5))])
    monkeypatch.setattr(compare, "reading_speed", lambda _: compare_speed)
    monkeypatch.setattr(fastclip, "clip_grad_norm_", wrong_norm)
    assert compare.main(["--quick", "--only", "a row"][1:]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--only", "no such row"], ["--threads", "0"], ["--rounds", "0"]])
def test_compare_refuses_senseless_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert capsys.readouterr().err


def test_an_unknown_row_is_told_which_ones_there_are(monkeypatch, capsys):
    """Only those that can run: the short command has no others, and says where they are."""
    names = {"norm, slow": False, "norm, quick": True, "clip, quick": True}
    table = [rows.Row(name, (TINY,), rows.clip_norm, quick=quick) for name, quick in names.items()]
    monkeypatch.setattr(compare, "all_rows", lambda: table)

    def told(main, *arguments):
        with pytest.raises(SystemExit) as error:
            main([*arguments])
        assert error.value.code == 2
        return capsys.readouterr().err.splitlines()

    *usage, message = told(fastclip.__main__.main, "bench", "--only", "norm, slow")
    assert usage[0].startswith("usage: fastclip bench [-h]")
    assert message == (
        "fastclip bench: error: no quick row's name contains 'norm, slow'; they are: norm, quick; clip, quick. "
        f"{compare.PROGRAM} without --quick has all rows"
    )
    *usage, message = told(compare.main, "--only", "none")
    assert usage[0].startswith(f"usage: {compare.PROGRAM} [-h]")
    assert message.endswith(f"they are: {'; '.join([*names, compare.MEMORY_ROW])}")


def test_reading_speed_is_the_best_of_two_readers_before_and_after(monkeypatch):
    speed = compare.reading_speed(FAST)
    assert speed["bytes_per_s"] == max(speed["all"].values()) == speed["all"][speed["by"]]
    assert speed["elements"] == FAST.reading_elements
    speeds = iter([{**speed, "bytes_per_s": 1.0}, {**speed, "bytes_per_s": 2.0}])
    monkeypatch.setattr(compare, "reading_speed", lambda _: next(speeds))
    assert run()["reading_speed"]["bytes_per_s"] == 2.0


def test_machine_facts():
    machine = bench("machine")
    facts = machine.facts()
    assert facts["cores"] >= 1
    assert facts["cpu"]
    assert machine.versions()["torch"] == torch.__version__
    assert machine.last_level_cache_bytes() is None or machine.last_level_cache_bytes() > 1 << 16
    assert machine._chosen("always [madvise] never") == "madvise"
    assert machine._chosen("") == "unknown"


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_the_work_of_other_processes_is_seen(monkeypatch):
    machine = bench("machine")
    assert machine.Others().share() is None  # no time has passed
    readings = iter([(100.0, 50.0, 7.0), (110.0, 58.0, 9.0)])  # all CPUs, working, this process
    monkeypatch.setattr(machine.Others, "_ticks", lambda _: next(readings))
    assert machine.Others().share() == pytest.approx(0.6)
    monkeypatch.undo()
    total, busy, own = machine.Others()._ticks()
    assert total > busy > own > 0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_a_child_is_not_another_process():
    machine = bench("machine")
    before = machine.Others()._ticks()[2]
    program = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert machine.Others()._ticks()[2] - before > 0.4  # the difference of two sums of hundredths, each cut off


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
def test_peak_memory_is_that_of_the_program_alone():
    held = bytearray(400 << 20)
    held[:: 1 << 12] = b"1" * len(held[:: 1 << 12])
    program = "from fastclip.bench import machine; a = b'1' * (64 << 20); print(machine.peak_memory_bytes())"
    peak = int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    without = int(
        subprocess.run(
            [sys.executable, "-c", program.replace("64", "0")], check=True, capture_output=True, text=True
        ).stdout
    )
    assert (64 << 20) * 0.9 < peak - without < (64 << 20) * 1.5
    del held


def test_kernel_suite_covers_what_it_names():
    suite = bench("test_kernels")
    assert set(suite.WORKLOADS) <= set(workloads.WORKLOADS)
    for op in suite.OPS.values():
        assert compare.checked(op(rows.Inputs(TINY))) is not None
    assert Path(suite.__file__).parent.name == "bench"


@pytest.mark.parametrize("name", ["compare", "gpu", "soak", "frameworks"])
def test_a_place_for_the_results_is_looked_at_before_the_work(name, tmp_path, capsys):
    for place, told in ((tmp_path / "none" / "r.json", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit) as error:
            bench(name).main(["--json", str(place)])
        assert error.value.code == 2
        assert told in capsys.readouterr().err
