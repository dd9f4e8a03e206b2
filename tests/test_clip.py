"""Clipping does what torch's does where torch is right, the decided thing where it isn't, and no write without need."""

from __future__ import annotations

import math
from fractions import Fraction

import gpu
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    COMPLEX,
    DTYPES,
    HALVES,
    INF,
    NAN,
    REALS,
    WRITABLE,
    assert_norm,
    bits,
    coef,
    norm,
    norm_dtype,
    parameter,
    parameters,
    randn,
    rounded,
    ulps,
)

import fastclip
from fastclip.backends import plan
from fastclip.reading import read
from fastclip.tensors import grads_of
from fastclip.types import Request

SHAPES = ((7, 5), (1000,), (), (0,), (3, 4, 5))
TORCH_P = (2.0, 1.0, INF, -INF, 3.0, 0.5, -1.0, 7.5)


def grads_for(dtype: torch.dtype) -> list[torch.Tensor]:
    return [randn(*shape, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("p", TORCH_P)
def test_equals_torch(backend: str, dtype: torch.dtype, p: float) -> None:
    grads = [grad for grad in grads_for(dtype) if grad.numel()]  # torch's inf-norm fails on empty tensors
    ours, theirs = parameters(g.clone() for g in grads), parameters(g.clone() for g in grads)
    bound = min(0.1, norm(grads, p) / 2)
    got = fastclip.clip_grad_norm_(ours, bound, p)
    want = torch.nn.utils.clip_grad_norm_(theirs, bound, p)
    tolerance = 1e-5 if norm_dtype(dtype) == torch.float32 else 1e-11
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("max_norm", [1.0, 0.37])
def test_clips_to_the_reference_in_float64(backend: str, dtype: torch.dtype, max_norm: float) -> None:
    grads = [*grads_for(dtype), randn(66_000, dtype=dtype)]
    for p in (2.0, 1.0, INF):
        params = parameters(g.clone() for g in grads)
        total, bound = norm(grads, p), max_norm if p != INF else max_norm / 10
        assert_norm(fastclip.clip_grad_norm_(params, bound, p), total, p, norm_dtype(dtype))
        for param, grad in zip(params, grads, strict=True):
            exact = grad.to(torch.complex128 if dtype.is_complex else torch.float64) * coef(total, bound)
            assert int(ulps(param.grad, exact.to(dtype)).max() if grad.numel() else 0) <= (
                1 if dtype not in (torch.float64, torch.complex128) else 8
            )
        left = norm([param.grad for param in params], p)
        assert left <= bound * (1 + (1e-5 if dtype not in HALVES else 1e-2))


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_any_clip(backend: str, values: list[float], max_norm: float) -> None:
    grad = torch.tensor(values, dtype=torch.float32)
    p, total = parameter(grad.clone()), norm(grad)
    assert_norm(fastclip.clip_grad_norm_([p], max_norm), total)
    if total <= max_norm * (1 - 1e-12):
        assert torch.equal(bits(p.grad), bits(grad))
    elif total > max_norm * (1 + 1e-12):
        want = rounded(grad.double() * coef(total, max_norm), torch.float32).float()
        assert int(ulps(p.grad, want).max()) <= 1


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("max_norm", [5.0, 5.5, 1e30, INF, torch.tensor(5.0)])
def test_nothing_is_written_at_or_below_the_bound(route: str, dtype: torch.dtype, max_norm: float) -> None:
    values = (torch.tensor([3.0, -0.0]), torch.tensor([[4.0]]), torch.zeros(3))
    params = parameters(value.to(dtype) for value in values)
    before = [(bits(p.grad).clone(), p.grad._version, p.grad.data_ptr()) for p in params]
    assert float(fastclip.clip_grad_norm_(params, max_norm)) == 5.0
    fastclip.clip_grads_with_norm_(params, max_norm, 5.0)
    for p, (old, version, address) in zip(params, before, strict=True):
        assert torch.equal(bits(p.grad), old)
        assert (p.grad._version, p.grad.data_ptr()) == (version, address)


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("fault", [NAN, INF])
def test_an_infinite_bound_only_reads(route: str, dtype: torch.dtype, fault: float) -> None:
    p = parameter(torch.tensor([1.0, fault, -2.0]).to(dtype))
    before, version = bits(p.grad).clone(), p.grad._version
    got = fastclip.clip_grad_norm_([p], INF)
    assert math.isnan(float(got)) if math.isnan(fault) else float(got) == INF
    assert torch.equal(bits(p.grad), before)
    assert p.grad._version == version


def test_just_above_the_bound_is_clipped(backend: str) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    fastclip.clip_grad_norm_([p], math.nextafter(5.0, 0.0))
    assert int(ulps(p.grad, torch.tensor([3.0, 4.0]) * (5 / (5 + 1e-6))).max()) <= 1
    assert p.grad._version == 1


def test_the_bound_is_compared_in_float64(backend: str) -> None:
    grad = torch.full((10_000,), 0.1)
    p, total = parameter(grad.clone()), read(plan(grads_of([parameter(grad)])), Request()).totals[0].item()
    assert total == pytest.approx(norm(grad), rel=1e-12 if backend not in gpu.NAMES else 1e-7)
    fastclip.clip_grad_norm_([p], total * (1 + 1e-12))
    assert torch.equal(p.grad, grad)
    fastclip.clip_grad_norm_([p], total * (1 - 1e-12), eps=0.1)
    assert not torch.equal(p.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [1.0, 1e-3, 1e-5, 1e-6])
def test_norms_beyond_float32_still_clip_right(backend: str, dtype: torch.dtype, max_norm: float) -> None:
    grad = torch.full((100,), 3e38, dtype=dtype)
    grad[1::2] = -1e38
    p = parameter(grad.clone())
    assert float(fastclip.clip_grad_norm_([p], max_norm)) > 3.4e38
    exact = grad.double() * coef(norm(grad), max_norm)
    assert int(ulps(p.grad, rounded(exact, dtype).to(dtype)).max()) <= (1 if dtype == torch.float32 else 0)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e200), (torch.float64, 1.7e308), (torch.bfloat16, 1e30)])
def test_overflow_does_not_zero_the_gradients(backend: str, dtype: torch.dtype, value: float) -> None:
    grad = torch.tensor([value, -value / 2], dtype=dtype)
    p = parameter(grad.clone())
    fastclip.clip_grad_norm_([p], 1.0)
    tolerance = 1e-2 if dtype in HALVES else 1e-7
    torch.testing.assert_close(p.grad.double(), grad.double() / norm(grad), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("fault", [NAN, INF])
def test_propagate_is_what_torch_does(backend: str, dtype: torch.dtype, fault: float) -> None:
    grads = [torch.tensor([1.0, fault, -2.0]).to(dtype), torch.tensor([0.0, 5.0]).to(dtype)]
    ours, theirs = parameters(g.clone() for g in grads), parameters(g.clone() for g in grads)
    got = fastclip.clip_grad_norm_(ours, 1.0, nonfinite="propagate")
    want = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert got.isnan() == want.isnan()
    assert got.isinf() == want.isinf()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad.isnan(), b.grad.isnan())
        assert torch.equal(a.grad[~a.grad.isnan()], b.grad[~b.grad.isnan()])


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("fault", [NAN, INF, -INF])
@pytest.mark.parametrize("max_norm", [1.0, INF])
def test_skip_leaves_gradients_untouched(route: str, dtype: torch.dtype, fault: float, max_norm: float) -> None:
    params = parameters([randn(100, dtype=dtype), torch.tensor([1.0, fault]).to(dtype), randn(8, dtype=dtype)[::2]])
    before = [(bits(p.grad).clone(), p.grad._version) for p in params]
    got = fastclip.clip_grad_norm_(params, max_norm, nonfinite="skip")
    assert math.isnan(float(got)) if math.isnan(fault) else float(got) == INF
    for p, (old, version) in zip(params, before, strict=True):
        assert torch.equal(bits(p.grad), old)
        assert p.grad._version == version


def test_skip_clips_finite_gradients(route: str) -> None:
    p = parameter(torch.tensor([3e20, 4e20]))
    assert_norm(fastclip.clip_grad_norm_([p], 1.0, nonfinite="skip"), 5e20)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_zero_clips_by_what_is_left(route: str, dtype: torch.dtype, layout: str) -> None:
    grad = torch.tensor([3.0, 9.0, NAN, 9.0, 4.0, 9.0, -INF, 9.0]).to(dtype)[::2]
    other = torch.tensor([12.0]).to(dtype)
    p, q = parameter(grad.contiguous() if layout == "dense" else grad), parameter(other)
    assert float(fastclip.clip_grad_norm_([p, q], 6.5, nonfinite="zero")) == 13.0
    torch.testing.assert_close(p.grad, torch.tensor([1.5, 0.0, 2.0, 0.0]).to(dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(q.grad, torch.tensor([6.0]).to(dtype), rtol=1e-6, atol=0)


def test_zero_below_the_bound_writes_only_zeros(route: str) -> None:
    p, q = parameter(torch.tensor([0.3, NAN, 0.4])), parameter(torch.tensor([0.1]))
    assert_norm(fastclip.clip_grad_norm_([p, q], 1.0, nonfinite="zero"), norm(torch.tensor([0.3, 0.4, 0.1])))
    assert torch.equal(p.grad, torch.tensor([0.3, 0.0, 0.4]))
    assert torch.equal(q.grad, torch.tensor([0.1]))


@pytest.mark.parametrize("how", [{"nonfinite": "raise"}, {"error_if_nonfinite": True}])
@pytest.mark.parametrize("fault", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_raise_names_the_element_and_writes_nothing(route: str, dtype: torch.dtype, fault: float, how: dict) -> None:
    grads = [randn(5, dtype=dtype), torch.ones(2, 3, dtype=dtype)]
    grads[1][1, 2] = fault
    params = parameters(grads)
    before = [bits(p.grad).clone() for p in params]
    message = r"parameters\[2\].*(NaN|Inf) at index \(1, 2\)"
    with pytest.raises(fastclip.NonFiniteGradientError, match=message) as caught:
        fastclip.clip_grad_norm_([params[0], parameter(None), params[1]], 0.1, **how)
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert (error.tensor, error.index) == ("parameters[2]", (1, 2))
    assert math.isnan(error.value.real) if math.isnan(fault) else error.value == fault
    assert all(torch.equal(bits(p.grad), old) for p, old in zip(params, before, strict=True))


def test_raise_names_the_only_element(route: str) -> None:
    params = parameters([torch.ones(1), torch.tensor(INF)])
    with pytest.raises(
        fastclip.NonFiniteGradientError, match=r"parameters\[1\].*holds Inf at its only element"
    ) as caught:
        fastclip.clip_grad_norm_(params, 1.0, nonfinite="raise")
    assert caught.value.index == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_raise_clips_finite_gradients_even_if_squares_overflow(backend: str, dtype: torch.dtype) -> None:
    p = parameter(torch.tensor([3e30, 4e30], dtype=dtype) * (1e200 if dtype == torch.float64 else 1))
    fastclip.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8], dtype=dtype))


@pytest.mark.parametrize("how", [{"error_if_nonfinite": True, "nonfinite": rule} for rule in ("skip", "zero")])
def test_two_rules_contradict_each_other(how: dict) -> None:
    with pytest.raises(ValueError, match="nonfinite"):
        fastclip.clip_grad_norm_([parameter(torch.ones(2))], 1.0, **how)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-3, 2.0])
def test_eps_enters_the_coefficient(backend: str, eps: float) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    fastclip.clip_grad_norm_([p], 1.0, eps=eps)
    assert int(ulps(p.grad, torch.tensor([3.0, 4.0]) * (1 / (5 + eps))).max()) <= 1


def test_a_bound_of_zero_zeroes(backend: str) -> None:
    p, q = parameter(torch.tensor([3.0, -4.0])), parameter(torch.zeros(3))
    fastclip.clip_grad_norm_([p, q], 0.0)
    assert p.grad.tolist() == [0.0, -0.0]
    fastclip.clip_grad_norm_([q], 0.0)
    assert q.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_the_norm_is_float32_or_wider(backend: str, dtype: torch.dtype) -> None:
    p = parameter(randn(10, dtype=dtype))
    got = fastclip.clip_grad_norm_([p], 1.0)
    assert (got.dtype, got.dim(), got.requires_grad) == (norm_dtype(dtype), 0, False)
    assert fastclip.clip_grad_norm_([p, parameter(torch.ones(1, dtype=torch.complex128))], 1.0).dtype == torch.float64


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_a_gradient_listed_twice_is_scaled_once(route: str, dtype: torch.dtype) -> None:
    p, q = parameter(torch.tensor([3.0, 4.0]).to(dtype)), parameter(None)
    q.data = q.data.to(dtype)
    q.grad = p.grad  # tied: two parameters, one gradient
    assert float(fastclip.clip_grad_norm_([p, q, p], 2.5)) == 5.0
    torch.testing.assert_close(p.grad, torch.tensor([1.5, 2.0]).to(dtype), rtol=1e-6, atol=0)
    assert float(fastclip.get_total_norm([p.grad, q.grad])) == pytest.approx(2.5, rel=1e-6)


def test_parameters_come_in_any_iterable(route: str) -> None:
    def fresh() -> list[torch.nn.Parameter]:
        return [parameter(torch.tensor([3.0])), parameter(None), parameter(torch.tensor([4.0]))]

    forms = (list, tuple, iter, lambda ps: (p for p in ps), lambda ps: dict.fromkeys(ps).keys())
    for form in forms:
        params = fresh()
        assert float(fastclip.clip_grad_norm_(form(params), 2.5)) == 5.0
        torch.testing.assert_close(torch.cat([params[0].grad, params[2].grad]), torch.tensor([1.5, 2.0]))
        fastclip.clip_grad_value_(form(params), 1.0)
        assert params[2].grad.item() == 1.0
    single = parameter(torch.tensor([3.0, 4.0]))
    assert float(fastclip.clip_grad_norm_(single, 1.0, "inf", False, None)) == 4.0
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    before = norm([p.grad for p in model.parameters()])
    assert_norm(fastclip.clip_grad_norm_(model.parameters(), 1.0), before)


@pytest.mark.parametrize("max_norm", [1, 1.0, torch.tensor(1.0), torch.tensor([1.0], dtype=torch.float64), Fraction(1)])
def test_bounds_come_as_any_number(backend: str, max_norm: object) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    fastclip.clip_grad_norm_([p], max_norm)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    fastclip.clip_grad_value_([p], max_norm)


def test_nothing_to_clip_has_norm_zero(route: str) -> None:
    for params in ([], [parameter(None)], [parameter(None), parameter(None)]):
        got = fastclip.clip_grad_norm_(params, 1.0)
        assert torch.equal(got, torch.nn.utils.clip_grad_norm_(params, 1.0))
        fastclip.clip_grad_value_(params, 1.0)
        fastclip.clip_grads_with_norm_(params, 1.0, 2.0)
    empty = parameter(torch.zeros(0))
    assert float(fastclip.clip_grad_norm_([empty], 1.0)) == 0.0


@pytest.mark.parametrize("total_norm", [4, 4.0, torch.tensor(4.0), torch.tensor([4.0]), torch.tensor(4.0).double()])
@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_a_known_norm_clips(backend: str, dtype: torch.dtype, total_norm: object) -> None:
    p = parameter(torch.tensor([3.0, -4.0]).to(dtype))
    fastclip.clip_grads_with_norm_([p], 2.0, total_norm)
    wide = torch.tensor([3.0, -4.0], dtype=torch.float64) * (2 / (4 + 1e-6))
    assert int(ulps(p.grad, wide.to(dtype)).max()) <= 1
    version = p.grad._version
    fastclip.clip_grads_with_norm_([p], 4.0, total_norm)
    fastclip.clip_grads_with_norm_([p], INF, total_norm)
    assert p.grad._version == version


@pytest.mark.parametrize("total", [NAN, INF])
def test_a_known_norm_that_is_not_finite_does_what_torch_does(backend: str, total: float) -> None:
    ours, theirs = parameter(torch.tensor([3.0, INF, 0.0])), parameter(torch.tensor([3.0, INF, 0.0]))
    fastclip.clip_grads_with_norm_([ours], 1.0, total)
    torch.nn.utils.clip_grads_with_norm_([theirs], 1.0, torch.tensor(total))
    assert torch.equal(ours.grad.nan_to_num(9.0), theirs.grad.nan_to_num(9.0))


@pytest.mark.parametrize("total", [NAN, INF])
def test_an_infinite_bound_writes_nothing_whatever_the_norm(backend: str, total: float) -> None:
    p = parameter(torch.tensor([3.0]))
    fastclip.clip_grads_with_norm_([p], INF, total)
    assert p.grad.tolist() == [3.0]


def test_reading_then_clipping_is_clipping(backend: str) -> None:
    grads = grads_for(torch.float32)
    at_once, in_two = parameters(g.clone() for g in grads), parameters(g.clone() for g in grads)
    total = fastclip.clip_grad_norm_(at_once, 1.0)
    fastclip.clip_grads_with_norm_(in_two, 1.0, fastclip.get_total_norm([p.grad for p in in_two]))
    assert float(total) == float(fastclip.get_total_norm(grads))
    for a, b in zip(at_once, in_two, strict=True):
        assert int(ulps(a.grad, b.grad).max() if a.numel() else 0) <= 1


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_conjugate_views_are_clipped(route: str, dtype: torch.dtype) -> None:
    grad = torch.tensor([3 + 4j, 0 + 12j], dtype=dtype)
    p = parameter(grad.clone().conj())
    assert p.grad.is_conj()
    assert float(fastclip.clip_grad_norm_([p], 6.5)) == 13.0
    torch.testing.assert_close(p.grad.resolve_conj(), grad.conj().resolve_conj() / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("contiguous", [True, False])
def test_negated_views_are_clipped(route: str, contiguous: bool) -> None:
    grad = torch._neg_view(torch.tensor([3.0, -4.0])) if contiguous else torch.tensor([1 - 3j, 1 + 4j]).conj().imag
    assert grad.is_neg()
    want = grad.resolve_neg().clone()
    p = parameter(grad)
    assert float(fastclip.clip_grad_norm_([p], 2.5)) == 5.0
    torch.testing.assert_close(p.grad.resolve_neg(), want / 2, rtol=1e-6, atol=0)
    fastclip.clip_grad_value_([p], 1.0)
    torch.testing.assert_close(p.grad.resolve_neg(), (want / 2).clamp(-1, 1), rtol=1e-6, atol=0)
    p.grad[0] = NAN
    fastclip.clip_grad_norm_([p], INF, nonfinite="zero")
    assert float(p.grad[0]) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reading_writes_nothing(route: str, dtype: torch.dtype) -> None:
    grad = randn(300, dtype=dtype)
    before, version = bits(grad).clone(), grad._version
    fastclip.get_total_norm([grad], 1.0)
    fastclip.grad_stats([grad])
    assert torch.equal(bits(grad), before)
    assert grad._version == version


def test_inference_mode_clips(route: str) -> None:
    with torch.inference_mode():
        p = parameter(torch.tensor([3.0, 4.0]))
        assert p.grad.is_inference()
        assert float(fastclip.clip_grad_norm_([p], 2.5)) == 5.0
        torch.testing.assert_close(p.grad, torch.tensor([1.5, 2.0]))
        fastclip.clip_grad_value_([p], 1.0)
        assert p.grad.tolist() == [1.0, 1.0]


def test_a_bound_of_minus_zero_is_zero(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, -2.0])
    fastclip.clip_grad_value_([p], -0.0)
    assert not p.grad.any()
