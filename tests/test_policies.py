"""Every clipping rule gives the numbers of the library it comes from, and none of the damage seen there."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from far import go_far
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import HALVES, INF, NAN, REALS, bits, norm, parameter, parameters, randn, ulps
from ruled import (
    LEARNERS,
    LEARNING,
    POLICIES,
    SHAPES,
    clipped,
    give,
    identical,
    no_nan_in,
    numbers_of,
    series,
    skips,
    step_grads,
    tensors,
    use,
    weights,
)
from torch import Tensor

import fastclip
import fastclip.backends
from fastclip import ClippedOptimizer
from fastclip.backends import EMULATED, plan
from fastclip.policies import (
    AdaGC,
    BlockRMS,
    Chain,
    Decision,
    GlobalNorm,
    Percentile,
    PerTensorNorm,
    PerTensorPercentile,
    Policy,
    SkipAboveMedian,
    SkipLarge,
    Unitwise,
    Value,
    ZScore,
)
from fastclip.reading import Reading, read
from fastclip.tensors import grads_of
from fastclip.types import MAX_ABS, NORM, SUM_ABS, Request


@pytest.fixture(params=["cpu", "reference", *(backend.name for backend in EMULATED)])
def backend(request: pytest.FixtureRequest, same_start: None) -> str:
    """Instruction sets differ in kernels, not in rules: one of them will do."""
    use(request.param)
    return request.param


# ---- the reference implementations ----

G = ([[3.0, -4.0], [0.0, 12.0]], [5.0, -6.0, 7.0])
KERAS = ([[3.0, 4.0], [0.0, 0.0]], [0.6, 0.8], [0.0, 0.0])
TIMM_G = ([[3.0, 0.0, 4.0], [0.3, 0.4, 0.0]], [3.0, 4.0], 1.0, (torch.arange(12.0).reshape(2, 3, 2) + 1).tolist())
TIMM_W = ([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]], [0.0, 0.0], 2.0, TIMM_G[3])
ROWS = [[0.018, 0.0, 0.024], [6e-6, 8e-6, 0.0]]
NONFINITE = [[INF, 1.0], [NAN, 1.0], [0.001, 0.0]]
# (source, policy, gradients, parameters or None, what the source made of the gradients)
ONE_STEP = [
    (
        "torch 2.13 clip_grad_norm_, p=1",
        lambda: GlobalNorm(2.0, norm_type=1.0),
        G,
        None,
        ([[0.16216217, -0.21621622], [0.0, 0.64864868]], [0.27027029, -0.32432434, 0.37837839]),
    ),
    (
        "torch 2.13 clip_grad_norm_, p=inf",
        lambda: GlobalNorm(0.5, norm_type=INF),
        G,
        None,
        ([[0.12499999, -0.16666666], [0.0, 0.49999997]], [0.20833331, -0.24999999, 0.29166666]),
    ),
    (
        "torch 2.13 clip_grad_norm_, p=3",
        lambda: GlobalNorm(1.0, norm_type=3.0),
        G,
        None,
        ([[0.22095349, -0.29460466], [0.0, 0.88381398]], [0.36825583, -0.44190699, 0.51555812]),
    ),
    ("torch 2.13 clip_grad_norm_, within", lambda: GlobalNorm(100.0), G, None, G),
    ("torch 2.13 clip_grad_norm_, zeros", lambda: GlobalNorm(1.0), ([0.0, 0.0], [0.0]), None, ([0.0, 0.0], [0.0])),
    ("torch 2.13 clip_grad_norm_, Inf", lambda: GlobalNorm(1.0), ([1.0, INF], [2.0]), None, ([0.0, NAN], [0.0])),
    (
        "torch 2.13 clip_grad_value_",
        lambda: Value(1.0),
        ([INF, -INF, NAN, 0.3],),
        None,
        ([1.0, -1.0, NAN, 0.3],),
    ),
    ("optax 0.2.8 clip", lambda: Value(0.5), G, None, ([[0.5, -0.5], [0.0, 0.5]], [0.5, -0.5, 0.5])),
    (
        "Keras 3.15 clipnorm",
        lambda: PerTensorNorm(1.0),
        KERAS,
        None,
        ([[0.6, 0.8], [0.0, 0.0]], [0.6, 0.8], [0.0, 0.0]),
    ),
    ("Keras 3.15 clipnorm, Inf", lambda: PerTensorNorm(1.0), ([1.0, INF], [2.0]), None, ([0.0, NAN], [1.0])),
    ("Keras 3.15 global_clipnorm, within", lambda: GlobalNorm(100.0), KERAS, None, KERAS),
    (
        "optax 0.2.8 clip_by_block_rms",
        lambda: BlockRMS(1.0),
        (*G, [0.1, -0.1]),
        None,
        ([[0.46153849, -0.61538464], [0.0, 1.846154]], [0.82572281, -0.99086738, 1.15601194], [0.1, -0.1]),
    ),
    (
        "timm adaptive_clip_grad",
        Unitwise,
        TIMM_G,
        TIMM_W,
        (ROWS, [6e-6, 8e-6], 0.02, (torch.tensor(TIMM_G[3]) / 100).tolist()),
    ),
    (
        "timm adaptive_clip_grad, not finite",
        Unitwise,
        (NONFINITE,),
        ([[1.0, 1.0]] * 3,),
        ([[NAN, 0.0], [NAN, NAN], [0.001, 0.0]],),
    ),
    (
        "timm adaptive_clip_grad, p=1",
        lambda: Unitwise(norm_type=1.0),
        TIMM_G[:1],
        TIMM_W[:1],
        ([[0.02142857, 0.0, 0.02857143], [4.28571457e-06, 5.71428563e-06, 0.0]],),
    ),
    ("optax 0.2.8 adaptive_grad_clip axis=1", lambda: Unitwise(units=(1,)), TIMM_G[:1], TIMM_W[:1], (ROWS,)),
]


@pytest.mark.parametrize(
    ("policy", "grads", "params", "want"), [row[1:] for row in ONE_STEP], ids=[r[0] for r in ONE_STEP]
)
def test_one_step_gives_the_numbers_of_its_source(backend: str, policy, grads, params, want) -> None:
    got = clipped(policy(), tensors(*grads), tensors(*params) if params else None)
    for ours, theirs in zip(got, tensors(*want), strict=True):
        # the sources round the norm, the quotient and the product to float32, the table to 8 digits
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


def test_mixed_dtypes_share_one_norm(backend: str) -> None:
    """torch 2.13 on a float32 and a bfloat16 gradient."""
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([5.0, 12.0], dtype=torch.bfloat16)]
    single, half = clipped(GlobalNorm(1.0), grads)
    torch.testing.assert_close(single, torch.tensor([0.21538742, 0.28718323]), rtol=1e-6, atol=0)
    assert int(ulps(half, torch.tensor([0.359375, 0.86328125], dtype=torch.bfloat16)).max()) <= 1


# optax 0.2.8 unitwise_norm: shape of 1, 2, 3, ... -> the norm of each unit
OPTAX_UNITS = {
    (): [1.0],
    (3,): [3.7416574954986572],
    (2, 3): [4.123105525970459, 5.385164737701416, 6.7082037925720215],
    (2, 3, 2): [7.0710678, 8.2462111, 9.4868326, 10.7703295, 12.083046, 13.4164076],
    (2, 2, 2, 2): [26.07680892944336, 28.56571388244629],
    (1, 3): [3.7416574954986572],  # squeezed to one dimension
}


@pytest.mark.parametrize("shape", OPTAX_UNITS, ids=str)
def test_units_in_are_those_of_optax(backend: str, shape: tuple[int, ...]) -> None:
    grad = (torch.arange(float(math.prod(shape))) + 1).reshape(shape)
    reading = read(plan(grads_of([parameter(grad)])), Unitwise(units="in").request())
    torch.testing.assert_close(reading.units.norms, torch.tensor(OPTAX_UNITS[shape]).double(), rtol=1e-6, atol=0)


ZCLIP = (1.0, 1.2, 0.8, 1.1, 0.9, 1.05, 5.0, 1.0, 0.2)
# (source, policy, norms, norms afterwards)
SERIES = [
    ("AutoClip, 10", lambda: Percentile(10), (4.0, 2.0, 8.0, 1.0, 16.0), (4.0, 2.0, 2.4, 1.0, 1.4)),
    ("AutoClip, 100", lambda: Percentile(100), (4.0, 2.0, 8.0, 1.0, 16.0), (4.0, 2.0, 8.0, 1.0, 16.0)),
    ("ZClip, no cap", lambda: ZScore(warmup=5), ZCLIP, (*ZCLIP[:6], 1.031934142112732, 1.0, 0.2)),
    (
        "ZClip, max_grad_norm=1",
        lambda: Chain(ZScore(warmup=5), GlobalNorm(1.0)),
        ZCLIP,
        (1.0, 1.0, 0.8, 1.0, 0.9, 1.0, 1.0, 1.0, 0.2),
    ),
    # window grows: at the fourth step the least of 5, 10, 0.5, 5 is the bound, and not the first norm
    ("bitsandbytes 0.49, grown", PerTensorPercentile, (5.0, 10.0, 0.5, 5.0), (5.0, 5.0, 0.5, 0.5)),
    ("bitsandbytes 0.49, off", lambda: PerTensorPercentile(100.0), (5.0, 10.0, 0.5, 50.0), (5.0, 10.0, 0.5, 50.0)),
]


@pytest.mark.parametrize(("policy", "norms", "want"), [row[1:] for row in SERIES], ids=[row[0] for row in SERIES])
def test_a_series_of_steps_gives_the_norms_of_its_source(backend: str, policy, norms, want) -> None:
    # AutoClip and ZClip clip by torch, which also multiplies by n / (n + 1e-6) at the bound itself
    assert series(policy(), norms) == pytest.approx(list(want), rel=2e-6)


@pytest.mark.parametrize("far", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("bound", [1.0, lambda step: 1.0, torch.tensor(1.0)], ids=["number", "callable", "tensor"])
def test_eps_counts_whatever_the_bound_is(bound, far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if far:
        go_far(monkeypatch, "reference")
    (got,) = clipped(GlobalNorm(bound, eps=1.0), tensors([3.0]))
    assert got.tolist() == [0.75]


def test_zscores_eps_counts_beside_the_deviation_and_beside_the_norm(backend: str) -> None:
    """Of 1 and 3 mean 2 and deviation 1: then z of 12 is 10 / (1 + 1), the bound 2 + 2.5 / (5 / 2.5)."""
    policy = ZScore(2.5, warmup=2, eps=1.0)
    assert series(policy, [1.0, 3.0, 12.0]) == pytest.approx([1.0, 3.0, 12.0 * 3.25 / (12.0 + 1.0)], rel=1e-6)


def test_zclip_learns_what_its_source_learns(backend: str) -> None:
    """Mean and variance of bluorion-com/ZClip after each step past the warm-up of 5, with and without its cap."""
    mean = (1.000000011920929, 1.0015000101327896, 1.0024130421233832, 1.0023406508596817, 0.9782704314232982)
    var = (0.02000000476837215, 0.019470571957075054, 0.018912600132881832, 0.018345386488288786, 0.03596617068730874)
    alone = ZScore(warmup=5)
    within = Chain(ZScore(warmup=5), GlobalNorm(1.0))
    for step, n in enumerate(ZCLIP):
        for policy in (alone, within):
            clipped(policy, tensors([n]))
        if step >= 4:
            for policy in (alone, within.policies[0]):
                assert float(policy.mean) == pytest.approx(mean[step - 4], rel=1e-6)
                assert float(policy.var) == pytest.approx(var[step - 4], rel=1e-6)


def test_the_window_wraps_as_in_bitsandbytes(backend: str) -> None:
    """130 norms 1, 2, ... through a window of 100: the last two were clipped to 35 and 36."""
    after = series(PerTensorPercentile(5.0, window=100), [float(n) for n in range(1, 131)])
    assert after[-2:] == pytest.approx([35.0, 36.0], rel=1e-6)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_percentile_of_a_full_window_is_an_index(default: torch.dtype) -> None:
    """bitsandbytes takes sorted[percentile] of 100: no rounding of a product may move it, in no default dtype."""
    torch.set_default_dtype(default)
    try:
        params = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
        for percentile in range(100):
            policy = PerTensorPercentile(percentile, window=100)
            ring = torch.stack([torch.arange(1000.0, 1100.0, dtype=torch.float64).roll(k) for k in (1, 37)])
            policy.load_state_dict(policy.state_dict() | {"ring": ring, "counts": torch.full((2,), 100)})
            give(params, [torch.tensor([1e6], dtype=torch.float64)] * 2)
            fastclip.clip_grads_(params, policy)
            for row, p in zip(ring, params, strict=True):  # the oldest, at slot 0, has left
                want = torch.cat([row[1:], row.new_tensor([1e6])]).sort().values[percentile]
                assert float(p.grad) == pytest.approx(float(want), rel=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("percentile", [0, 10, 37.3, 50, 99, 100])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16], ids=str)
def test_percentile_is_numpys(percentile: float, default: torch.dtype) -> None:
    import numpy as np

    norms = randn(60, dtype=torch.float64, scale=10).abs().tolist()
    torch.set_default_dtype(default)
    try:
        for window in (7, 1000):
            after = series(Percentile(percentile, window=window, eps=0.0), norms, torch.float64)
            for step, n in enumerate(norms):
                seen = norms[max(0, step + 1 - window) : step + 1]
                assert after[step] == pytest.approx(min(n, np.percentile(seen, percentile)), rel=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_adagc_is_the_rule_of_its_paper(backend: str) -> None:
    """The rule in plain Python, for two gradients: the joint norm clips for 3 steps, each one's own average after."""
    lam, beta, gamma = 1.05, 0.9, [INF, INF]
    policy = AdaGC(lam, lam_abs=1.0, beta=beta, warmup=3)
    for step, norms in enumerate([(3.0, 4.0), (0.3, 0.4), (5.0, 0.2), (9.0, 0.1), (0.2, 8.0), (0.5, 0.5)]):
        got = [norm(grad) for grad in clipped(policy, tensors([norms[0], 0.0], [[norms[1]]]))]
        if step < 3:
            want = [n * min(1.0, 1.0 / (math.hypot(*norms) + 1e-6)) for n in norms]
            gamma = [min(old, n) for old, n in zip(gamma, want, strict=True)]
        else:
            want = [min(n, lam * own) for n, own in zip(norms, gamma, strict=True)]
            gamma = [beta * own + (1 - beta) * n for own, n in zip(gamma, want, strict=True)]
        assert got == pytest.approx(want, rel=1e-6)
        assert policy.averages.tolist() == pytest.approx(gamma, rel=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ZScore(warmup=2),
        lambda: SkipLarge(warmup=2),
        lambda: SkipAboveMedian(window=4, warmup=1),
        lambda: Percentile(window=4),
        lambda: PerTensorPercentile(window=4),
        lambda: AdaGC(warmup=1),
    ],
)
def test_what_was_learned_in_float32_goes_on_in_float64(make) -> None:
    """As on a device without float64, from which a run goes on elsewhere."""
    policy, other = make(), make()
    for size in (1.0, 2.0, 3.0):
        clipped(policy, tensors([size]))
    saved = policy.state_dict()
    floats = {k: v.float() for k, v in saved.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    other.load_state_dict({**saved, **floats})
    for size in (1.5, 30.0):
        assert clipped(other, tensors([size]))[0].tolist() == pytest.approx(
            clipped(policy, tensors([size]))[0].tolist()
        )
    assert {getattr(other, name).dtype for name in floats} == {torch.float64}


@pytest.mark.parametrize("bad", [INF, NAN])
def test_adagc_learns_nothing_in_the_warm_up_from_a_step_with_a_fault(backend: str, bad: float) -> None:
    """The joint norm says nothing then, not of the other gradient either."""
    policy = AdaGC(lam_abs=1.0, warmup=5)
    clipped(policy, tensors([3.0], [4.0]))
    learned = policy.averages.clone()
    clipped(policy, tensors([0.3], [bad]))
    assert torch.equal(policy.averages, learned)


def test_adagc_goes_on_where_its_warm_up_has_ended(backend: str) -> None:
    """Gradients of one size are clipped to about the same before and after."""
    policy = AdaGC(lam_abs=1.0, warmup=3)
    left = [norm(clipped(policy, tensors([100.0]))[0]) for _ in range(6)]
    assert left == pytest.approx([1.0, 1.0, 1.0, 1.05, 1.05, 1.05], rel=5e-3)


def test_skip_large_is_the_rule_of_its_paper(backend: str) -> None:
    """arXiv:1804.09849, four deviations of log(norm), decay 0.9 after 3 steps."""
    policy = SkipLarge(4.0, alpha=0.9, warmup=3)
    assert skips(policy, [1.0, 1.1, 0.9, 1.0, 30.0, 1.0]) == [False, False, False, False, True, False]


def test_skip_large_learns_the_moments_of_the_logarithm(backend: str) -> None:
    policy, norms = SkipLarge(alpha=0.9, warmup=4), (1.0, 3.0, 0.5, 2.0)
    skips(policy, list(norms))
    logs = torch.tensor(norms, dtype=torch.float64).log()
    assert float(policy.mean) == pytest.approx(float(logs.mean()), rel=1e-6)
    assert float(policy.var) == pytest.approx(float(logs.var(correction=0)), rel=1e-6)


def test_skip_above_median(backend: str) -> None:
    policy = SkipAboveMedian(3.0, window=4, warmup=2)
    # medians: -, -, 1.5, 2 (of 1 2 5), 2.5 (1 2 3 5), 4 (2 3 5 100)
    assert skips(policy, [1.0, 2.0, 5.0, 3.0, 100.0, 11.0, 1.0]) == [False, False, True, False, True, False, False]
    assert skips(SkipAboveMedian(3.0, warmup=4), [1.0, 1.0, 1.0, 50.0, 50.0]) == [False, False, False, False, True]


@pytest.mark.parametrize("rule", [SkipLarge, SkipAboveMedian])
@pytest.mark.parametrize("last", [0.0, INF, NAN])
def test_zero_nan_and_inf_are_no_large_norms(backend: str, rule: type[Policy], last: float) -> None:
    """What becomes of NaN and Inf is not for the rule to say."""
    p = parameter(torch.zeros(1))
    opt = ClippedOptimizer(torch.optim.SGD([p], lr=1.0), policy=rule(warmup=2), nonfinite="propagate")
    for value in (0.01, 0.01, 0.01, last):
        p.grad = torch.tensor([value])
        opt.step()
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("policy", [SkipLarge(warmup=5), SkipAboveMedian(window=8, warmup=4)], ids=repr)
def test_a_lasting_change_of_level_is_followed(policy: Policy) -> None:
    skipped = skips(policy, [1.0, 1.1, 0.9, 1.0, 1.05, 1.0, 0.95] + [1000.0] * 200)
    assert skipped[7]
    assert not any(skipped[-20:])


# ---- what went wrong elsewhere ----


def test_a_bound_is_never_negative() -> None:
    """torch flips every sign."""
    p = parameter(torch.ones(2))
    for policy in (GlobalNorm(1.0), PerTensorNorm(1.0)):
        opt = ClippedOptimizer(torch.optim.SGD([p], lr=0.1), policy=policy)
        for bad in (-1.0, NAN):
            with pytest.raises(ValueError, match="max_norm"):
                opt.max_norm = bad
            opt.param_groups[0]["max_norm"] = bad
            with pytest.raises(ValueError, match="max_norm"):
                opt.step()
            del opt.param_groups[0]["max_norm"]
    assert torch.equal(p.grad, torch.ones(2))


def test_an_infinite_bound_leaves_an_infinite_gradient(backend: str) -> None:
    """torch makes NaN of all of it."""
    for policy in (GlobalNorm(INF), PerTensorNorm(INF), BlockRMS(INF), Value(INF), PerTensorPercentile(100.0)):
        (before,) = clipped(policy, tensors([3.0, 4.0]))  # a window has a norm to compare with then
        assert before.tolist() == [3.0, 4.0]
        p = parameter(torch.tensor([3.0, INF]))
        assert float(fastclip.clip_grads_([p], policy)) == INF
        assert torch.equal(p.grad, torch.tensor([3.0, INF]))


def test_an_empty_gradient_has_no_mean_to_bound(backend: str) -> None:
    got, empty = clipped(BlockRMS(1.0), tensors([30.0], []))
    assert (got.tolist(), empty.tolist()) == ([1.0], [])


@pytest.mark.parametrize("policy", [GlobalNorm(1.0), PerTensorNorm(1.0), Percentile(), BlockRMS(1.0)], ids=repr)
def test_norms_beyond_float16_wipe_nothing(backend: str, policy: Policy) -> None:
    """torch: 64 elements of 1e4 have a norm above 65,504, and become 0."""
    (got,) = clipped(policy, [torch.full((64,), 1e4, dtype=torch.float16)])
    assert bool((got > 0).all())
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("fault", [NAN, INF])
@pytest.mark.parametrize("name", [name for name in LEARNING if name != "schedule"])
def test_a_step_that_is_not_finite_teaches_nothing(backend: str, name: str, fault: float) -> None:
    """AutoClip's history, ZClip's and AdaGC's averages, OLMo's window never get rid of one NaN."""
    policy, spared = LEARNING[name](), LEARNING[name]()
    for step in range(8):
        got = clipped(policy, step_grads(step), weights())
        want = clipped(spared, step_grads(step), weights())
        assert identical(got, want)
        if step in (0, 1, 4, 5):  # before anything is known, in the warm-up, and after it
            bad = step_grads(step)
            for grad in bad:
                grad.view(-1)[-1] = fault
            clipped(policy, bad, weights())
            assert identical(policy.state_dict(), spared.state_dict())


@pytest.mark.parametrize("name", LEARNING)
def test_one_bad_tensor_puts_no_nan_into_a_state(backend: str, name: str) -> None:
    policy = LEARNING[name]()
    for step in range(8):
        grads = step_grads(step)
        if step % 3 == 0:
            grads[1][2] = NAN
        clipped(policy, grads, weights(), nonfinite="skip")
        assert no_nan_in(policy.state_dict())
    assert all(bool(grad.isfinite().all()) for grad in clipped(policy, step_grads(8), weights()))


def test_nan_in_a_window_skips_one_step(backend: str) -> None:
    """OLMo-core skips until it has left the window."""
    norms = [1.0, 1.1, 0.9, NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    for policy in (SkipAboveMedian(10.0, window=4, warmup=2), SkipLarge(warmup=2)):
        assert skips(policy, norms) == [math.isnan(n) for n in norms]


@pytest.mark.parametrize(
    "policy",
    [
        AdaGC(warmup=3),
        PerTensorPercentile(),
        ZScore(warmup=3),
        ZScore(warmup=0),
        Chain(ZScore(warmup=3), GlobalNorm(1e3)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("zeros", [1, 3, 10])
def test_zero_gradients_at_first_silence_nothing(backend: str, policy: Policy, zeros: int) -> None:
    """AdaGC's average, OLMo's first norm and AGGC's start of 0 make a bound of 0, for ever."""
    policy = copy.deepcopy(policy)
    after = series(policy, [0.0] * zeros + [0.5, 0.5, 0.6, 3.0])
    assert after[zeros : zeros + 2] == pytest.approx([0.5, 0.5], rel=1e-6)
    assert after[-1] > 0.4


def test_zero_gradients_of_one_tensor_silence_only_themselves(backend: str) -> None:
    """An unused expert, or a layer that is frozen at first."""
    for policy in (AdaGC(warmup=2), PerTensorPercentile(50)):
        for late in (0.0, 0.0, 0.0, 0.5, 0.5, 0.5):
            got = clipped(policy, tensors([0.3, 0.4], [late]))
        assert [norm(grad) for grad in got] == pytest.approx([0.5, 0.5], rel=1e-6)


@pytest.mark.parametrize("kept", [(0, 1), (2,)])
def test_a_rule_for_each_tensor_goes_on_with_fewer_of_them(backend: str, kept: tuple[int, ...]) -> None:
    for policy in (AdaGC(warmup=2), PerTensorPercentile(50)):
        params = [parameter(torch.ones(size)) for size in (2, 3, 4)]
        opt = ClippedOptimizer(torch.optim.SGD(params, lr=0.0), policy=policy)
        for listed in (params, params, [params[i] for i in kept]):
            opt.param_groups[0]["params"] = listed
            for p in listed:
                p.grad = torch.ones_like(p)
            opt.step()
        assert len(opt.last_stats.tensor_norms) == len(kept)


def test_moments_are_as_wide_whatever_the_default_dtype() -> None:
    before, found = torch.get_default_dtype(), []
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            policy = ZScore(warmup=5)
            series(policy, [1.0, 2.0, 3.0, 5.0, 9.0])
            found.append((float(policy.mean), float(policy.var)))
    finally:
        torch.set_default_dtype(before)
    assert found[0] == pytest.approx((4.0, 8.0), rel=1e-6)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("policy", [ZScore(warmup=0), SkipLarge(warmup=0), SkipAboveMedian(warmup=0)], ids=repr)
def test_without_a_warm_up_the_first_step_is_no_outlier(policy: Policy) -> None:
    """A mean that starts at 0 makes one of it (AGGC)."""
    assert series(copy.deepcopy(policy), [50.0, 50.0]) == pytest.approx([50.0, 50.0], rel=1e-6)
    assert skips(copy.deepcopy(policy), [50.0, 50.0, 51.0]) == [False] * 3


def test_weights_of_zero_can_start_to_learn(backend: str) -> None:
    """Composer's AGC has no floor under their norm."""
    (got,) = clipped(Unitwise(0.01, eps=1e-3), tensors([[3.0, 4.0], [0.0, 0.0]]), tensors([[0.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(got, torch.tensor([[6e-6, 8e-6], [0.0, 0.0]]), rtol=1e-6, atol=0)


def test_norms_are_never_hidden(backend: str) -> None:
    """DeepSpeed turns NaN into -1; apex's inf-norm drops it."""
    for policy in (GlobalNorm(1.0), GlobalNorm(1.0, norm_type=INF), PerTensorNorm(1.0), Unitwise(norm_type=INF)):
        for nonfinite in ("propagate", "skip"):
            params = parameters(tensors([1.0, NAN], [2.0, 3.0]))
            assert math.isnan(float(fastclip.clip_grads_(params, policy, nonfinite=nonfinite)))


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_in_place_of_parameters_are_noticed(name: str) -> None:
    with pytest.warns(UserWarning, match="gradients passed"):
        fastclip.clip_grads_(step_grads(0), POLICIES[name]())
    with pytest.warns(UserWarning, match="gradients passed"):
        fastclip.adaptive_clip_grad_(step_grads(0))


def test_spikes_are_clipped_towards_the_mean_and_do_not_move_it_far(backend: str) -> None:
    policy = ZScore(warmup=10)
    usual = [1.0 + 0.1 * math.sin(step) for step in range(30)]
    before = series(policy, usual)
    assert before == pytest.approx(usual, rel=1e-6)
    mean = float(policy.mean)
    spikes = [series(policy, [n])[0] for n in (3.0, 30.0, 3e6)]
    assert all(0.9 < n < 1.3 for n in spikes)
    assert spikes[0] > spikes[1] > spikes[2]  # the further out, the closer to the mean
    assert float(policy.mean) == pytest.approx(mean, rel=0.05)


def test_equal_norms_make_no_outlier_of_a_small_change(backend: str) -> None:
    assert series(ZScore(warmup=5), [1.0] * 20 + [1.002]) == pytest.approx([1.0] * 20 + [1.002], rel=1e-6)
    assert not any(skips(SkipLarge(warmup=5), [1.0] * 20 + [1.15, 0.1]))


# ---- chains ----


def test_a_chain_is_its_rules_one_after_the_other(backend: str) -> None:
    """Each sees what the one before it leaves, as if it had been read again."""
    wide = torch.float64
    makers = (
        (lambda: Unitwise(0.5), lambda: GlobalNorm(0.3)),
        (lambda: Unitwise(0.5), lambda: PerTensorNorm(0.1), lambda: GlobalNorm(0.1)),
        (lambda: Unitwise(0.5), lambda: Value(0.05)),
        (lambda: Unitwise(0.5), lambda: BlockRMS(0.05), lambda: Value(0.05)),
        (lambda: PerTensorNorm(0.5), lambda: GlobalNorm(0.6)),
        (lambda: GlobalNorm(0.6), lambda: PerTensorNorm(0.2), lambda: Value(0.1)),
        (lambda: GlobalNorm(2.0), lambda: AdaGC(warmup=2)),
        (lambda: AdaGC(warmup=2), lambda: Percentile(50), lambda: GlobalNorm(0.5)),
        (lambda: PerTensorPercentile(50), lambda: ZScore(0.5, warmup=2)),
    )
    for rules in makers:
        chain, each = Chain(*(rule() for rule in rules)), [rule() for rule in rules]
        for step in range(8):
            got, want = clipped(chain, step_grads(step, wide), weights(wide)), step_grads(step, wide)
            for policy in each:
                want = clipped(policy, want, weights(wide))
            for ours, theirs in zip(got, want, strict=True):
                # norms times coefficients, where the others see norms of rounded products
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)


def test_a_chain_skips_when_one_of_its_rules_does() -> None:
    norms = [1.0, 1.0, 1.0, 50.0, 1.0]
    for rules in ((SkipAboveMedian(warmup=2), GlobalNorm(2.0)), (GlobalNorm(INF), SkipAboveMedian(warmup=2))):
        assert skips(Chain(*rules), norms) == [n == 50.0 for n in norms]
    # the second rule sees the clipped norm, which is no outlier
    assert not any(skips(Chain(GlobalNorm(1.0), SkipAboveMedian(warmup=2)), norms))


def test_the_first_rule_learns_from_the_unclipped_norm() -> None:
    chain = Chain(Percentile(100), GlobalNorm(1.0))
    series(chain, [3.0, 5.0])
    assert chain.policies[0].ring[0, :2].tolist() == pytest.approx([3.0, 5.0], rel=1e-6)


@pytest.mark.parametrize(
    "rules",
    [
        (GlobalNorm(), Unitwise()),
        (Value(), GlobalNorm()),
        (Chain(GlobalNorm(), Value()), GlobalNorm()),
        (GlobalNorm(), Chain(Unitwise(), GlobalNorm())),
    ],
    ids=repr,
)
def test_a_chain_that_can_not_be_followed_is_refused_at_once(rules: tuple[Policy, ...]) -> None:
    """Not at the first step at which it matters."""
    with pytest.raises(ValueError, match="Chain"):
        Chain(*rules)


class Weighing(Policy):
    """By the weights' norms; over units if told so."""

    def __init__(self, over: str | None = None) -> None:
        self._over = over

    def request(self) -> Request:
        return Request(units=self._over, weights=True)

    def decide(self, reading: Reading) -> Decision:
        assert reading.weight_rows is not None
        return Decision(1.0 / reading.weight_rows[0])


def test_a_chain_asks_for_the_weights_that_one_of_its_rules_wants(backend: str) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    p.data = torch.tensor([0.0, 2.0])
    fastclip.clip_grads_([p], Chain(GlobalNorm(10.0), Weighing()))
    assert p.grad.tolist() == [1.5, 2.0]
    with pytest.raises(ValueError, match="a rule over units can only stand first"):
        fastclip.clip_grads_([p], Chain(GlobalNorm(10.0), Weighing("out")))
    assert p.grad.tolist() == [1.5, 2.0]


def test_a_chain_asks_for_no_bound_before_the_first_step() -> None:
    asked: list[int] = []
    chain = Chain(ZScore(), GlobalNorm(lambda step: asked.append(step) or 1.0))
    assert asked == []
    fastclip.clip_grads_([parameter(torch.ones(2))], chain)
    assert asked == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_a_rule_may_give_its_multipliers_in_any_dtype(backend: str, dtype: torch.dtype) -> None:
    class Own(Policy):
        def decide(self, reading: Reading) -> Decision:
            return Decision(torch.tensor([2, 3], dtype=dtype))

    params = [parameter(torch.tensor([1.0, 2.0])), parameter(torch.tensor([1.0]))]
    fastclip.clip_grads_(params, Own())
    assert [p.grad.tolist() for p in params] == [[2.0, 4.0], [3.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_a_rule_may_give_its_multipliers_of_units_in_any_dtype_and_order(backend: str, dtype: torch.dtype) -> None:
    class Own(Policy):
        def request(self) -> Request:
            return Request(units="out")

        def decide(self, reading: Reading) -> Decision:
            return Decision(unit_coefs=torch.tensor([[2, 0], [3, 0]], dtype=dtype)[:, 0])

    p = parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    fastclip.clip_grads_([p], Own())
    assert p.grad.tolist() == [[2.0, 4.0], [9.0, 12.0]]


def test_multipliers_for_no_gradient_at_all(backend: str) -> None:
    """As on a rank whose peers have the gradients."""
    plan(grads_of([parameter(None)])).scale_(torch.ones(0))


@pytest.mark.parametrize("made", [0.5, None, (0.5, False)])
def test_what_is_no_decision_is_refused_by_name(made: object) -> None:
    class Own(Policy):
        def decide(self, reading: Reading) -> Any:
            return made

    p = parameter(torch.ones(2))
    with pytest.raises(TypeError, match=rf"Own\(.*must return a Decision, got {type(made).__name__}"):
        fastclip.clip_grads_([p], Own())
    assert p.grad.tolist() == [1.0, 1.0]


def test_a_global_norm_may_change_its_settings() -> None:
    rule, p = GlobalNorm(1.0), parameter(torch.tensor([3.0, 4.0]))
    rule.eps, rule.norm_type = 0.0, INF
    fastclip.clip_grads_([p], rule)
    torch.testing.assert_close(p.grad, torch.tensor([0.75, 1.0]))
    assert repr(fastclip.policies.PerTensorNorm(3.0)) == "PerTensorNorm(max_norm=3, norm_type=2)"


# ---- properties ----


def once_and_twice(make: Callable[[], Policy], grads: list[Tensor], params: list[Tensor]) -> tuple[list[Tensor], ...]:
    once = clipped(make(), grads, params)
    return once, clipped(make(), once, params)


EXPONENTS = {torch.float64: 30, torch.float32: 30, torch.bfloat16: 30, torch.float16: 4}


def drawn(values: list[list[float]], dtype: torch.dtype) -> list[Tensor]:
    """Sign and power of ten of every element, within what the dtype holds."""
    top = EXPONENTS[dtype]
    return [
        torch.tensor([math.copysign(10.0 ** max(-30.0, min(abs(v) - 30.0, top)), v) for v in row], dtype=dtype)
        for row in values
    ]


ELEMENTS = st.lists(st.lists(st.floats(-60.0, 60.0), min_size=1, max_size=6), min_size=1, max_size=4)
IDEMPOTENT: dict[str, Callable[[], Policy]] = {
    "global": lambda: GlobalNorm(0.7, eps=0.0),  # an eps would clip again, by eps / 0.7, what rounding left above
    "value": lambda: Value(0.4),
    "tensor": lambda: PerTensorNorm(0.5),
    "rms": lambda: BlockRMS(0.2),
    "unitwise": lambda: Unitwise(0.5, eps=1e-3),
}


@pytest.mark.parametrize("name", IDEMPOTENT)
@settings(max_examples=30)
@given(values=ELEMENTS, dtype=st.sampled_from(REALS))
def test_clipping_twice_is_clipping_once(name: str, backend: str, values, dtype: torch.dtype) -> None:
    grads = drawn(values, dtype)
    once, twice = once_and_twice(IDEMPOTENT[name], grads, [torch.full_like(grad, 0.25) for grad in grads])
    for a, b in zip(once, twice, strict=True):
        # rounding may leave a norm above its bound by half an ulp of the dtype, and the second pass corrects it;
        # a norm in float64 is itself some ulp off
        assert int(ulps(a, b).max()) <= (8 if dtype == torch.float64 else 2)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=15)
@given(steps=st.lists(ELEMENTS, min_size=2, max_size=6), dtype=st.sampled_from(REALS))
def test_no_finite_gradient_becomes_nonfinite(name: str, backend: str, steps, dtype: torch.dtype) -> None:
    policy = POLICIES[name]()
    for values in steps:
        values = (values + [[0.0]] * 4)[:4]
        grads = drawn(values, dtype)
        got = clipped(policy, grads, [torch.full_like(grad, 0.25) for grad in grads])
        for before, after in zip(grads, got, strict=True):
            assert bool(after.isfinite().all())
            assert bool((after.abs() <= before.abs()).all())
            assert bool(((after == 0) | (after.sign() == before.sign())).all())
    assert no_nan_in(policy.state_dict())


@pytest.mark.parametrize("name", LEARNING)
def test_norms_near_the_largest_number_leave_no_nan_behind(name: str) -> None:
    """Squares of such norms overflow float64."""
    policy = LEARNING[name]()
    for size in (1e300, 1e-300, 1e300, 1e308, 1.0, 0.0, 1e160, 5.0):
        grads = [torch.full(shape, size, dtype=torch.float64) for shape in SHAPES]
        got = clipped(policy, grads, weights(torch.float64))
        assert all(bool(grad.isfinite().all()) for grad in got)
        assert no_nan_in(policy.state_dict())


@pytest.mark.parametrize("name", ["global", "tensor", "rms", "unitwise", "percentile", "tensor-percentile", "adagc"])
@pytest.mark.parametrize("shift", [-20, -1, 7, 30])
def test_norms_of_a_reading_scale_exactly(backend: str, name: str, shift: int) -> None:
    params = weights()
    policy = POLICIES[name]()
    give(params, step_grads(0))
    plain = read(plan(grads_of(params)), policy.request())
    give(params, [grad * 2.0**shift for grad in step_grads(0)])
    scaled = read(plan(grads_of(params)), policy.request())
    assert torch.equal(bits(scaled.rows[0]), bits(plain.rows[0] * 2.0**shift))
    unscaled = read(plan(grads_of(params)), policy.request(), 2.0**shift)
    assert torch.equal(bits(unscaled.rows), bits(plain.rows))
    assert torch.equal(bits(unscaled.totals), bits(plain.totals))
    if plain.units is not None:
        assert torch.equal(bits(scaled.units.norms), bits(plain.units.norms * 2.0**shift))
        assert torch.equal(bits(unscaled.units.rows), bits(plain.units.rows))
        assert torch.equal(bits(scaled.units.weight_norms), bits(plain.units.weight_norms))


@pytest.mark.parametrize("name", POLICIES)
def test_order_changes_no_bit_of_tensor_norms(backend: str, name: str) -> None:
    order = [2, 0, 3, 1]
    policy = POLICIES[name]()
    straight, mixed = weights(), [weights()[i] for i in order]
    give(straight, step_grads(1))
    give(mixed, [step_grads(1)[i] for i in order])
    rows, others = (read(plan(grads_of(params)), policy.request()).rows for params in (straight, mixed))
    assert torch.equal(bits(others), bits(rows[:, order]))


# ---- arguments ----

BAD_ARGUMENTS = [
    (GlobalNorm, {"max_norm": -1.0}),
    (GlobalNorm, {"eps": -1.0}),
    (GlobalNorm, {"norm_type": NAN}),
    (GlobalNorm, {"norm_type": "two"}),
    (Value, {"clip_value": -1.0}),
    (Value, {"clip_value": NAN}),
    (Value, {"clip_value": "1"}),
    (PerTensorNorm, {"max_norm": -1.0}),
    (PerTensorNorm, {"norm_type": NAN}),
    (PerTensorNorm, {"norm_type": "two"}),
    (BlockRMS, {"threshold": 0.0}),
    (BlockRMS, {"threshold": NAN}),
    (Unitwise, {"clip_factor": -0.1}),
    (Unitwise, {"eps": 0.0}),
    (Unitwise, {"norm_type": NAN}),
    (Unitwise, {"units": "rows"}),
    (Unitwise, {"units": ()}),
    (Unitwise, {"units": (0, 0)}),
    (Unitwise, {"units": (-1,)}),
    (Unitwise, {"units": 1}),
    (Unitwise, {"units": None}),
    (Unitwise, {"units": (True,)}),
    (Percentile, {"percentile": 101}),
    (Percentile, {"percentile": NAN}),
    (Percentile, {"percentile": "ten"}),
    (Percentile, {"percentile": None}),
    (Percentile, {"window": 0}),
    (Percentile, {"window": 2.5}),
    (Percentile, {"window": "a"}),
    (Percentile, {"window": INF}),
    (Percentile, {"window": True}),
    (Percentile, {"eps": -1.0}),
    (PerTensorPercentile, {"percentile": -1}),
    (PerTensorPercentile, {"window": -3}),
    (ZScore, {"z_threshold": 0.0}),
    (ZScore, {"alpha": 1.0}),
    (ZScore, {"alpha": -0.1}),
    (ZScore, {"warmup": -1}),
    (ZScore, {"warmup": 2.5}),
    (ZScore, {"warmup": INF}),
    (ZScore, {"floor": -1.0}),
    (ZScore, {"floor": NAN}),
    (ZScore, {"eps": -1.0}),
    (ZScore, {"eps": "small"}),
    (AdaGC, {"lam": 0.0}),
    (AdaGC, {"lam_abs": -1.0}),
    (AdaGC, {"beta": 1.0}),
    (AdaGC, {"warmup": 1.5}),
    (AdaGC, {"floor": -1.0}),
    (SkipLarge, {"k": 0.0}),
    (SkipLarge, {"alpha": 2.0}),
    (SkipLarge, {"floor": -1.0}),
    (SkipLarge, {"floor": None}),
    (SkipAboveMedian, {"factor": 0.0}),
    (SkipAboveMedian, {"window": 0}),
    (SkipAboveMedian, {"warmup": -1}),
    (SkipAboveMedian, {"warmup": "x"}),
]


@pytest.mark.parametrize(("cls", "arguments"), BAD_ARGUMENTS, ids=[f"{c.__name__}-{a}" for c, a in BAD_ARGUMENTS])
def test_a_bad_argument_is_named(cls: type[Policy], arguments: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        cls(**arguments)


@pytest.mark.parametrize("rules", [(), (GlobalNorm(),), (GlobalNorm(), 3), (GlobalNorm, GlobalNorm())], ids=str)
def test_a_chain_takes_two_policies_or_more(rules: tuple[object, ...]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"Chain|polic"):
        Chain(*rules)  # type: ignore[arg-type]


def test_norm_types_of_a_chain_and_of_groups_must_agree() -> None:
    with pytest.raises(ValueError, match="norm_type"):
        Chain(GlobalNorm(norm_type=1.0), GlobalNorm())
    p = parameter(torch.ones(2))
    groups = [{"params": [p], "policy": GlobalNorm(norm_type=1.0)}]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), policy=PerTensorNorm(1.0))
    with pytest.raises(ValueError, match="norm_type"):
        opt.step()
    with pytest.raises(ValueError, match="policy"):
        ClippedOptimizer(torch.optim.SGD([p], lr=0.1), 1.0, policy=GlobalNorm())


def test_complex_numbers_have_no_order_to_clamp_by(backend: str) -> None:
    for policy in (Value(1.0), Chain(GlobalNorm(2.0), Value(1.0))):
        params = parameters([torch.full((2,), 3.0), torch.full((2,), 3 + 4j)])
        with pytest.raises(RuntimeError, match=r"parameters\[1\].*complex"):
            fastclip.clip_grads_(params, policy)
        assert torch.equal(params[0].grad, torch.full((2,), 3.0))


@pytest.mark.parametrize("policy", [POLICIES[name]() for name in POLICIES], ids=list(POLICIES))
def test_a_policy_shows_its_settings(policy: Policy) -> None:
    assert repr(policy).startswith(f"{type(policy).__name__}(")
    clipped(policy, step_grads(0), weights())
    assert "tensor(" not in repr(policy)
    assert policy.writes == (not isinstance(policy, (SkipLarge, SkipAboveMedian)))


@pytest.mark.parametrize("rule", [SkipLarge, SkipAboveMedian, lambda: Chain(SkipLarge(), GlobalNorm(INF))])
def test_rules_that_never_write_take_what_cannot_be_written(rule) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(1).expand(3)
    fastclip.clip_grads_([p], rule())
    with pytest.raises(fastclip.UnsupportedGradientError):
        fastclip.clip_grads_([p], Chain(rule(), GlobalNorm(1.0)))


def test_what_is_left_of_units_has_no_known_magnitudes() -> None:
    """But through another read; the norm is known."""
    seen = []

    class Asking(Policy):
        def request(self):
            return Request(2.0, extras=True)

        def decide(self, reading):
            seen.append(reading.rows.clone())
            return Decision()

    p = torch.nn.Parameter(torch.full((2, 4), 1e-3))
    p.grad = torch.full((2, 4), 10.0)
    fastclip.clip_grads_([p], Chain(Unitwise(0.01), Asking()))
    (rows,) = seen
    assert float(rows[NORM]) == pytest.approx(float(p.grad.norm()))
    assert rows[MAX_ABS : SUM_ABS + 1].isnan().all()
    p.grad = torch.full((2, 4), 10.0)
    fastclip.clip_grads_([p], Chain(Unitwise(0.01), Value(5e-6)))
    assert float(p.grad.max()) == pytest.approx(5e-6)


@pytest.mark.parametrize("norm_type", ["inf", 1, INF, 3.0])
def test_norm_types_are_those_of_torch(backend: str, norm_type: float | str) -> None:
    for cls in (GlobalNorm, PerTensorNorm):
        (got,) = clipped(cls(1.0, norm_type=norm_type), tensors([3.0, -4.0]))
        assert norm(got, float(norm_type)) == pytest.approx(1.0, rel=2e-6)


def test_a_policy_of_ones_own(backend: str) -> None:
    """decide() and the names of what it learns are all that it takes."""

    class Loudest(Policy):
        learned = ("record",)

        def __init__(self) -> None:
            self.record = torch.zeros((), dtype=torch.float64)

        def decide(self, reading):
            self.record = torch.maximum(self.record, reading.totals[0])
            return Decision(0.5)

    policy = Loudest()
    assert series(policy, [2.0, 4.0, 1.0]) == pytest.approx([1.0, 2.0, 0.5])
    other = Loudest()
    other.load_state_dict(policy.state_dict())
    assert float(other.record) == pytest.approx(4.0)
    for none in (Policy(), fastclip.LossWatch()):
        with pytest.raises(TypeError, match=rf"{type(none).__name__} is no rule for gradients: it has no decide\(\)"):
            series(none, [1.0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_state_is_kept_in_float64(dtype: torch.dtype) -> None:
    for name in LEARNERS:
        policy = LEARNERS[name]()
        clipped(policy, step_grads(0, dtype), weights(dtype))
        kept = {tensor.dtype for tensor in numbers_of(policy.state_dict())}
        assert kept <= {torch.float64, torch.int64}


def test_a_policy_may_be_given_by_its_name():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([30.0, 40.0])
    fastclip.clip_grads_([p], "PerTensorNorm")
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    opt = fastclip.ClippedOptimizer(torch.optim.SGD([p], lr=0.1), policy="ZScore")
    assert isinstance(opt.policy, fastclip.policies.ZScore)
    group = {"params": [p], "policy": "SkipLarge"}
    opt = fastclip.ClippedOptimizer(torch.optim.SGD([group], lr=0.1))
    opt.step()
    opt.step()
    assert int(opt.param_groups[0]["policy"].count) == 2  # one object, which goes on learning


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("ZScoer", ValueError, "no policy 'ZScoer'; known are AdaGC, BlockRMS, GlobalNorm.*ZScore"),
        (fastclip.policies.ZScore, TypeError, r"call it: ZScore\(\)"),
        (1.0, TypeError, "expected a policy of fastclip.policies or its name, got 1.0"),
    ],
)
def test_what_is_no_policy_is_said(policy, error, message):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    with pytest.raises(error, match=message):
        fastclip.clip_grads_([p], policy)
    with pytest.raises(error, match=message):
        fastclip.ClippedOptimizer(torch.optim.SGD([p], lr=0.1), policy=policy)
    opt = fastclip.ClippedOptimizer(torch.optim.SGD([{"params": [p], "policy": policy}], lr=0.1))
    with pytest.raises(error, match=message):
        opt.step()
    assert torch.equal(p.grad, torch.ones(2))
