"""Every write is right to the bit, reaches exactly what it should, and is seen by autograd's version counters."""

from __future__ import annotations

import gpu
import pytest
import torch
from forbidden import SKIPS, TOLD, WRITES, Given, check_tally, check_write
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    COMPLEX,
    HALVES,
    INF,
    NAN,
    REALS,
    WRITABLE,
    all_patterns,
    bits,
    parameter,
    randn,
    rounded,
    ulps,
)

import fastclip
import fastclip.backends

# few significant bits: the products with 16-bit numbers are exact in float32, and rounded once
EXACT = (0.5, 0.25, 2.0, 0.75, 0.375, 2.0**-7, 2.0**-14, 2.0**-20, 257 / 1024, 1.5 * 2.0**-9, 3.0, 0.0, 2.0**100, -0.5)
GENERIC = (0.1, 1 / 3, 0.9999, 1e-3, 1e-7, 0.7071067811865476, 1.7e-5, 1 - 2.0**-24)


def scaled(grad: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """A copy of ``grad`` after the chosen backend's own scale_."""
    copy = grad.clone()
    backend = fastclip.backends.candidates()[0]
    backend.scale_(backend.table_of([copy]), factor)
    return copy


def same_numbers(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal in value and in the sign of zero; NaN as a class."""
    got, want = got.double(), want.double()
    both = got.isnan() & want.isnan()
    return bool((both | ((got == want) & (got.signbit() == want.signbit()))).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("factor", EXACT)
def test_every_16_bit_pattern_is_rounded_to_nearest_even(backend: str, dtype: torch.dtype, factor: float) -> None:
    grad = all_patterns(dtype)
    exact = grad.double() * factor
    assert same_numbers(scaled(grad, factor), rounded(exact, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("factor", GENERIC)
def test_every_16_bit_pattern_by_any_factor(backend: str, dtype: torch.dtype, factor: float) -> None:
    grad = all_patterns(dtype)
    got = scaled(grad, factor)
    once = rounded(grad.double() * factor, dtype)
    # the product may be a float32 first: right but for ties that only float64 can tell
    short = float(torch.tensor(factor, dtype=torch.float32))
    twice = rounded(rounded(grad.double() * short, torch.float32), dtype)
    right = (got.double() == once) | (got.double() == twice) | (got.isnan() & once.isnan())
    assert bool(right.all())
    assert int((once != twice).sum()) < 50 + int(once.isnan().sum())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halfway_cases_go_to_even(backend: str, dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps
    up, down = 1 + unit, 1 + 3 * unit
    grad = torch.tensor([up, down, -up, -down, up], dtype=dtype)
    smallest = torch.tensor([1, 3, 5, 7, 2], dtype=torch.int16).view(dtype)
    # 1.5 * (1 + u) lies halfway for u the last bit: even is chosen, not "up"
    assert same_numbers(scaled(grad, 1.5), rounded(grad.double() * 1.5, dtype))
    assert bits(scaled(smallest, 0.5)).tolist() == [0, 2, 2, 4, 1]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("coef", [1e-39, 3e-41, 7e-44, 1e-46])
def test_factors_below_float32_keep_their_bits(backend: str, dtype: torch.dtype, coef: float) -> None:
    grad = torch.tensor([3e38, -1e38, 1.7e38, 2e30, 0.0] if dtype == torch.bfloat16 else [6e4, -1.0, 6e-8]).to(dtype)
    assert same_numbers(scaled(grad, coef), rounded(grad.double() * coef, dtype))


FLOATS = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 1.17e-38, 3.4e38, -3.4e38, 0.1, 16777217.0, INF, -INF, NAN])


@pytest.mark.parametrize("factor", [*EXACT, *GENERIC, 1e-38, 1e-39, 1e-44])
def test_float32_products_are_rounded_once(backend: str, factor: float) -> None:
    grad = torch.cat([FLOATS, randn(5000), randn(500, scale=1e-38), randn(500, scale=1e30)])
    got = scaled(grad, factor)
    want = rounded(grad.double() * factor, torch.float32).float()
    assert int(ulps(got, want).max()) <= 1
    assert bool((got.signbit() == want.signbit())[~want.isnan()].all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("factor", [0.1, 1 / 3, 0.5, 1e-20, 0.0])
def test_wide_products(backend: str, dtype: torch.dtype, factor: float) -> None:
    grad = randn(1000, dtype=dtype)
    got, want = scaled(grad, factor), grad.to(torch.complex128 if dtype.is_complex else dtype) * factor
    far = ulps(got, want.to(dtype))
    assert int(far.max()) <= (0 if dtype == torch.float64 else 1)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.floats(0, 1))
def test_any_float32_by_any_factor(backend: str, values: list[float], factor: float) -> None:
    grad = torch.tensor(values, dtype=torch.float32)
    want = rounded(grad.double() * factor, torch.float32).float()
    assert int(ulps(scaled(grad, factor), want).max()) <= 1


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("factor", [0.5, 0.1, 1e-7, 1e-40, 0.0, NAN, INF])
def test_capabilities_write_the_same_bits(on_each, dtype: torch.dtype, factor: float) -> None:
    grad = torch.cat([randn(1003, dtype=dtype), torch.tensor([NAN, INF, -INF, -0.0]).to(dtype)])
    if dtype in HALVES:
        grad = all_patterns(dtype)
    first, *others = on_each(lambda: scaled(grad, factor), cpu=True).values()
    for other in others:
        assert torch.equal(first.isnan(), other.isnan())  # of two NaN any may survive a product
        assert torch.equal(bits(first[~first.isnan()]), bits(other[~first.isnan()]))


def clipped_value(grad: torch.Tensor, bound: float) -> torch.Tensor:
    p = parameter(grad.clone())
    fastclip.clip_grad_value_([p], bound)
    return p.grad


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bound", [1.0, 0.5, 0.1, 0.0, 1e-6, 3.0, 60000.0, INF])
def test_every_16_bit_pattern_is_clamped(backend: str, dtype: torch.dtype, bound: float) -> None:
    grad = all_patterns(dtype)
    got = clipped_value(grad, bound)
    limit = torch.tensor(bound, dtype=dtype)
    assert torch.equal(got.isnan(), grad.isnan())
    real = ~grad.isnan()
    assert bool((got[real].abs() <= limit).all())
    inside = real & (grad.abs() <= limit)
    assert torch.equal(bits(got)[inside], bits(grad)[inside])
    assert torch.equal(got[real].double(), grad.double()[real].clamp(-float(limit), float(limit)))


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("bound", [1.0, 0.1, 0.0, 1e-30, INF])
def test_clamp_equals_torch(backend: str, dtype: torch.dtype, bound: float) -> None:
    grad = torch.cat([FLOATS.to(dtype), randn(3000, dtype=dtype, scale=2), torch.ones(1, dtype=dtype)])
    theirs = parameter(grad.clone())
    torch.nn.utils.clip_grad_value_([theirs], bound)
    assert torch.equal(clipped_value(grad, bound).nan_to_num(7.5), theirs.grad.nan_to_num(7.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_clamp_bounds_beyond_the_dtype_leave_finite_numbers_alone(backend: str, dtype: torch.dtype) -> None:
    grad = randn(100, dtype=dtype, scale=100)
    grad[0] = torch.finfo(dtype).max
    got = clipped_value(grad, 1e40)
    assert torch.equal(bits(got), bits(grad))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_bound_just_past_the_largest_number_clamps_nothing(backend: str, dtype: torch.dtype) -> None:
    """Rounded to the dtype it would be the largest number, and an Inf above it."""
    largest = torch.finfo(dtype).max
    grad = torch.tensor([INF, -INF, largest, 1.0, NAN], dtype=dtype)
    assert torch.equal(bits(clipped_value(grad, largest * (1 + 1e-9))), bits(grad))
    assert clipped_value(grad, largest).tolist()[:4] == [largest, -largest, largest, 1.0]


@pytest.mark.parametrize("factor", [1e-55, 1e-60, 1e-64, 1e-70, 3e-78])
def test_bfloat16_by_factors_that_float32_does_not_hold(backend: str, factor: float) -> None:
    grad = torch.tensor([3e38, -1e38, 7e36, 1e30, 0.0], dtype=torch.bfloat16)
    assert torch.equal(bits(scaled(grad, factor)), bits((grad.double() * factor).to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_nonfinite_16_bit_pattern_becomes_zero(backend: str, dtype: torch.dtype) -> None:
    p = parameter(all_patterns(dtype))
    before = p.grad.clone()
    fastclip.clip_grad_norm_([p], INF, nonfinite="zero")
    good = before.isfinite()
    assert torch.equal(bits(p.grad)[good], bits(before)[good])
    assert bool((p.grad[~good] == 0).all())


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 333, 65_537])
def test_nonfinite_elements_become_zero_and_others_stay(backend: str, dtype: torch.dtype, size: int) -> None:
    grad = randn(size, dtype=dtype)
    for spot, fault in ((0, NAN), (size // 2, INF), (size - 1, -INF)):
        grad[spot] = complex(1.0, fault) if dtype.is_complex else fault
    p = parameter(grad.clone())
    fastclip.clip_grad_norm_([p], INF, nonfinite="zero")
    assert torch.equal(p.grad, torch.where(grad.isfinite(), grad, 0))


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_writes_stay_inside_the_view(backend: str, dtype: torch.dtype, offset: int) -> None:
    sizes = (*range(1, 140), 300, 65_535, 65_537) if backend != "reference" else (1, 17, 300, 65_537)
    for size in sizes:
        memory = torch.full((offset + size + 40,), 8.0, dtype=dtype)
        p = parameter(memory[offset : offset + size])
        fastclip.clip_grads_with_norm_([p], 1.0, 2 - 1e-6)
        assert bool((memory[offset : offset + size] == 4).all())
        if not dtype.is_complex:
            fastclip.clip_grad_value_([p], 2.0)
            assert bool((memory[offset : offset + size] == 2).all())
        memory[offset : offset + size] = NAN
        fastclip.clip_grad_norm_([p], INF, nonfinite="zero")
        assert bool((memory[offset : offset + size] == 0).all())
        assert bool((memory[:offset] == 8).all())
        assert bool((memory[offset + size :] == 8).all())


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_one_factor_per_tensor(backend: str, dtype: torch.dtype) -> None:
    grads = [randn(size, dtype=dtype) for size in (3, 0, 70_000, 1)]
    before = [grad.clone() for grad in grads]
    chosen = gpu.module_of(backend)
    chosen.scale_(chosen.table_of(grads), torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64))
    for grad, old, factor in zip(grads, before, (0.5, 1.0, 2.0, 0.0), strict=True):
        assert torch.equal(grad, old * factor)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("how", "dtype"), WRITES, ids=str)
def test_a_device_may_forbid_to_write(backend: str, how: str, dtype: torch.dtype, skip: float | None) -> None:
    check_write(gpu.module_of(backend), how, dtype, skip, "cpu")


@pytest.mark.parametrize("given", TOLD)
def test_steps_are_counted(backend: str, given: Given) -> None:
    check_tally(gpu.module_of(backend), given, "cpu")


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_versions_tell_what_was_written(route: str, dtype: torch.dtype) -> None:
    def versions(work) -> list[int]:
        grads = [randn(50, dtype=dtype), randn(50, dtype=dtype).reshape(5, 10).t(), randn(100, dtype=dtype)[::2]]
        params = [parameter(grad) for grad in grads]
        before = [p.grad._version for p in params]
        work(params)
        return [p.grad._version - old for p, old in zip(params, before, strict=True)]

    assert all(versions(lambda ps: fastclip.clip_grad_norm_(ps, 0.5)))
    assert all(versions(lambda ps: fastclip.clip_grads_with_norm_(ps, 0.5, 3.0)))
    assert not any(versions(lambda ps: fastclip.clip_grad_norm_(ps, 1e4)))
    assert not any(versions(lambda ps: fastclip.clip_grad_norm_(ps, INF)))
    assert not any(versions(lambda ps: fastclip.clip_grad_norm_(ps, 1e4, nonfinite="zero")))
    assert not any(versions(lambda ps: fastclip.clip_grads_with_norm_(ps, 1.0, 1.0)))
    assert not any(versions(lambda ps: fastclip.get_total_norm([p.grad for p in ps])))
    assert not any(versions(fastclip.grad_stats))
    if dtype not in COMPLEX:
        assert all(versions(lambda ps: fastclip.clip_grad_value_(ps, 1e-3)))


def test_value_clipping_leaves_what_is_within_bounds(backend: str) -> None:
    small, large = parameter(torch.tensor([0.5, -1.0, NAN])), parameter(torch.tensor([0.5, 1.0, 3.0]))
    before = small.grad._version, large.grad._version
    fastclip.clip_grad_value_([small, large], 1.0)
    assert large.grad._version > before[1]
    assert large.grad.tolist() == [0.5, 1.0, 1.0]
    if backend.startswith("cpu"):  # the others don't look at what a device found
        assert small.grad._version == before[0]


@pytest.mark.parametrize("work", ["scale", "clamp", "zero"])
def test_threads_write_the_same_bits(backend: str, work: str) -> None:
    sizes, seen = (3, 65_536 * 2 + 11, 900, 65_536), []
    start = [randn(size) for size in sizes]
    start[1][70_000] = NAN if work == "zero" else 5.0
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        params = [parameter(grad.clone()) for grad in start]
        if work == "scale":
            fastclip.clip_grads_with_norm_(params, 0.3, 1.7)
        elif work == "clamp":
            fastclip.clip_grad_value_(params, 0.3)
        else:
            fastclip.clip_grad_norm_(params, INF, nonfinite="zero")
        seen.append(torch.cat([bits(p.grad) for p in params]))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_what_needs_no_factor_is_not_written(backend: str) -> None:
    small, large = parameter(torch.tensor([0.3, 0.4])), parameter(torch.tensor([30.0, 40.0]))
    rows_small, rows_large = parameter(torch.full((2, 2), 1e-9)), parameter(torch.full((2, 2), 1e3))
    versions = [p.grad._version for p in (small, large, rows_small, rows_large)]
    fastclip.clip_grads_([small, large], fastclip.policies.PerTensorNorm(1.0))
    fastclip.clip_grads_([rows_small, rows_large], fastclip.policies.Unitwise(0.01))
    written = [
        p.grad._version > before for p, before in zip((small, large, rows_small, rows_large), versions, strict=True)
    ]
    if backend.startswith(("cpu", "reference")):
        assert written == [False, True, False, True]
    assert small.grad.tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
@pytest.mark.parametrize("fault", [float("nan"), INF, -INF])
def test_a_complex_number_becomes_zero_whichever_part_is_bad(backend: str, dtype: torch.dtype, fault: float) -> None:
    good = complex(1.0, -2.0)
    p = parameter(
        torch.tensor([good, complex(fault, 3.0), good, complex(3.0, fault), complex(fault, fault)], dtype=dtype)
    )
    fastclip.clip_grad_norm_([p], INF, nonfinite="zero")
    assert p.grad.tolist() == [good, 0.0, good, 0.0, 0.0]


def test_zeroing_writes_only_where_something_is_bad(backend: str) -> None:
    good, bad = parameter(torch.ones(3)), parameter(torch.tensor([1.0, float("nan")]))
    versions = good.grad._version, bad.grad._version
    fastclip.clip_grad_norm_([good, bad], INF, nonfinite="zero")
    assert bad.grad.tolist() == [1.0, 0.0]
    assert bad.grad._version > versions[1]
    if backend.startswith("cpu"):
        assert (good.grad._version, bad.grad._version) == (versions[0], versions[1] + 1)
