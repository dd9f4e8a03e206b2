"""Every norm is right, at every magnitude, on every backend, and its bits depend on the gradients alone."""

from __future__ import annotations

import math

import gpu
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import (
    COMPLEX,
    DTYPES,
    FLOAT8,
    HALVES,
    INF,
    NAN,
    NORM_TYPES,
    REALS,
    WRITABLE,
    all_patterns,
    assert_norm,
    bits,
    magnitudes,
    norm,
    norm_dtype,
    parameter,
    randn,
    ulps,
)

import fastclip
import fastclip.backends
from fastclip._native import C
from fastclip.backends import reference
from fastclip.types import FIELDS, TOTALS, Request

CHUNK = 1 << 16
BORDERS = (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1)


def rows_of(grads: list[torch.Tensor], p: float, extras: bool = True) -> torch.Tensor:
    """What the chosen backend itself says, in float64, into poisoned memory."""
    backend = fastclip.backends.candidates()[0]
    request = Request(p, extras=extras)
    rows = torch.full((request.fields, len(grads)), NAN, dtype=torch.float64)
    backend.read(backend.table_of(grads), request, rows)
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_norm_of_every_dtype(backend: str, dtype: torch.dtype) -> None:
    grads = [randn(*shape, dtype=dtype) for shape in ((7, 5), (1000,), (), (3, 4, 5), (1,))]
    for p in NORM_TYPES:
        stats = fastclip.grad_stats(grads, norm_type=p)
        assert_norm(fastclip.get_total_norm(grads, p), norm(grads, p), p, norm_dtype(dtype))
        assert_norm(stats.total_norm, norm(grads, p), p, norm_dtype(dtype))
        for own, grad in zip(stats.tensor_norms, grads, strict=True):
            assert_norm(own, norm(grad, p), p, norm_dtype(dtype))


MAGNITUDES = {
    torch.float64: (1e300, 1.7e308, 1e200, 1e154, 1e-154, 1e-162, 1e-300, 1e-310, 5e-324, 1e20, 0.1),
    torch.float32: (1e20, 1e37, 1e-19, 1e-25, 1e-30, 1e-38, 1e-40, 1.5e-45, 0.1),
    torch.bfloat16: (1e20, 1e37, 1e-19, 1e-25, 1e-30, 1.2e-38, 5e-39, 1e-39, 1e-40, 9.2e-41, 0.1),
    torch.float16: (60000.0, 6e-5, 6e-6, 6e-8, 0.1),
    torch.complex128: (1e300, 1e-300, 1e-310, 0.1),
    torch.complex64: (1e20, 1e37, 1e-25, 1e-40, 0.1),
}


@pytest.mark.parametrize(("dtype", "value"), [(d, v) for d, values in MAGNITUDES.items() for v in values], ids=str)
def test_constants_of_every_magnitude(backend: str, dtype: torch.dtype, value: float) -> None:
    for size in (1, 3, 77, 1000):
        fits = value if value < 1e306 or size == 1 else 1e305
        grad = torch.full((size,), fits * (1 + 1j) if dtype.is_complex else fits, dtype=dtype)
        assert float(magnitudes(grad)[0]) > 0
        for p in (2.0, 1.0):
            if norm(grad, p) <= torch.finfo(norm_dtype(dtype)).max:
                assert_norm(fastclip.get_total_norm(grad, p), norm(grad, p), p, norm_dtype(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_many_squares_that_lose_bits_are_summed_again(backend: str, dtype: torch.dtype) -> None:
    """Each is a subnormal float32, their sum a normal one."""
    grad = torch.full((70_000,), 1.3 * 2.0**-69, dtype=dtype)
    assert_norm(fastclip.get_total_norm(grad), norm(grad))


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_magnitudes_mix(backend: str, dtype: torch.dtype) -> None:
    exponents = torch.randint(-20, 4, (3000,), dtype=torch.float64)
    grads = [(torch.randn(3000, dtype=torch.float64) * 10**exponents).to(dtype), randn(5001, dtype=dtype, scale=1e-3)]
    for p in (2.0, 1.0, 3.0, 0.5, INF):
        assert_norm(fastclip.get_total_norm(grads, p), norm(grads, p), p, norm_dtype(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("value", [0.1, 1 / 3])
def test_long_constants_lose_nothing(backend: str, dtype: torch.dtype, value: float) -> None:
    grad = torch.full((400_000,), value, dtype=dtype)
    exact = float(grad[0].double()) * math.sqrt(grad.numel())
    assert_norm(fastclip.get_total_norm(grad), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, *COMPLEX], ids=str)
def test_finite_gradients_have_finite_norms(backend: str, dtype: torch.dtype) -> None:
    grads = [torch.full((100,), torch.finfo(dtype).max, dtype=dtype)]
    stats = fastclip.grad_stats(grads)
    assert math.isfinite(float(fastclip.get_total_norm(grads, error_if_nonfinite=True)))
    assert math.isfinite(float(stats.total_norm))
    assert math.isfinite(float(stats.tensor_norms[0]))
    assert float(stats.found_inf) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [2.0, 3.0, 1.0, 17.0, 30.5])
def test_overflow_is_rescued_wherever_the_norm_fits(backend: str, dtype: torch.dtype, p: float) -> None:
    top = torch.finfo(dtype).max
    grads = [torch.tensor([top / 8, -top / 8, top / 16]).to(dtype), torch.tensor([top / 32], dtype=dtype)]
    if dtype == torch.float64:
        grads = [torch.tensor([top / 8, -top / 8, top / 16], dtype=dtype), torch.tensor([top / 32], dtype=dtype)]
    assert_norm(fastclip.get_total_norm(grads, p), norm(grads, p), p, norm_dtype(dtype))


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float64, -522), (torch.float32, -75), (torch.bfloat16, -75)], ids=str
)
def test_squares_that_lose_bits_are_no_loss(backend: str, dtype: torch.dtype, least: int) -> None:
    """Each is a subnormal number or nearly so; the sum of all, of one chunk of a GPU's, is none."""
    for exponent in range(least, least + 20):
        grad = torch.full(((1 << 16) // dtype.itemsize,), 1.37 * 2.0**exponent, dtype=dtype)
        want = float(grad[0].double()) * math.sqrt(grad.numel())
        assert float(rows_of([grad], 2.0, extras=False)[0, 0]) == pytest.approx(
            want, rel=2e-8 if least > -99 else 1e-14, abs=0
        )


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("p", [2.0, 3.0])
def test_every_code_of_fp8(backend: str, dtype: torch.dtype, p: float) -> None:
    codes = all_patterns(dtype)
    got = fastclip.grad_stats(list(codes), norm_type=p)
    values = codes.float()
    assert bool((ulps(got.tensor_norms, values.abs()) <= 1).all())
    assert bool((got.nans == values.isnan()).all())
    assert bool((got.infs == values.isinf()).all())
    finite = codes[values.isfinite()]
    for q in (p, 1.0, INF, 0.0, -INF):
        assert_norm(fastclip.get_total_norm(finite, q), norm(finite, q), q)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("p", [2.0, 1.0])
def test_every_code_of_16_bits(backend: str, dtype: torch.dtype, p: float) -> None:
    codes = all_patterns(dtype)
    finite = codes[codes.isfinite()]
    sample = finite[torch.randperm(len(finite))[:300]]
    got = fastclip.grad_stats(list(sample), norm_type=p).tensor_norms
    assert bool((ulps(got, sample.float().abs()) <= 1).all())
    subnormal = finite[(finite.double().abs() < torch.finfo(dtype).tiny)]
    for grad in (finite, subnormal):
        assert_norm(fastclip.get_total_norm(grad, p).clamp(max=3.4e38), min(norm(grad, p), 3.4e38), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_offsets(backend: str, dtype: torch.dtype) -> None:
    memory = randn(320, dtype=dtype)
    memory[7:320:11] = 0
    sizes = list(range(301 if backend.startswith("cpu") else 21))
    if backend in gpu.NAMES:  # threads that are fibers take their time
        sizes = [size for size in range(301) if size <= 68 or size % 32 in (31, 0, 1)]
    for offset in (0, 1, 3):
        x = magnitudes(memory)[offset : offset + sizes[-1]]
        none = torch.zeros(1, dtype=torch.float64)
        want = {2.0: x.square().cumsum(0).sqrt(), 1.0: x.cumsum(0), INF: x.cummax(0).values}
        zeros = torch.cat([none, (x == 0).double().cumsum(0)])
        grads = [memory[offset : offset + size] for size in sizes]
        for p, norms in want.items():
            rows = rows_of(grads, p)
            torch.testing.assert_close(rows[0], torch.cat([none, norms])[sizes], rtol=1e-7, atol=0)
            assert torch.equal(rows[5], zeros[sizes])


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_chunk_borders(backend: str, dtype: torch.dtype) -> None:
    memory = randn(BORDERS[-1] + 3, dtype=dtype, scale=0.01)
    for size in BORDERS:
        for grad in (memory[:size].clone(), memory[3 : size + 3]):
            grad[0], grad[-1] = 5, 6  # an element at either end that is left out would show
            for p in (2.0, 3.0) if backend != "reference" else (2.0,):
                assert_norm(fastclip.get_total_norm(grad, p), norm(grad, p), p, norm_dtype(dtype))


@pytest.mark.parametrize("shape", [(1000,), (7, 50), (50, 7), (1, 900), (3, 1)])
def test_the_reference_joins_its_pieces(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(fastclip.backends, "forced", "reference")
    monkeypatch.setattr(reference, "PIECE", 64)
    grad = randn(*shape)
    grad.view(-1)[-1] = 0
    for p in NORM_TYPES:
        rows = rows_of([grad], p)[:, 0]
        torch.testing.assert_close(float(rows[0]), norm(grad, p), rtol=1e-12, atol=0)
        assert rows[1:4].tolist() == [0, 0, float(grad.abs().max())]
        assert int(rows[5]) == 1
    faulty = grad.clone()
    faulty.view(-1)[0], faulty.view(-1)[1] = INF, NAN
    assert rows_of([faulty], 2.0)[1:3, 0].tolist() == [1, 1]
    assert rows_of([faulty], 2.0)[[0, 3], 0].isnan().all()
    params = parameter(grad.clone())
    fastclip.clip_grads_with_norm_([params], 1.0, 2 - 1e-6)
    assert torch.equal(params.grad, grad / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_every_slot_is_filled(backend: str, dtype: torch.dtype, extras: bool) -> None:
    grads = [randn(size, dtype=dtype) for size in (0, 1, 17, 0, CHUNK + 1)]
    chosen = gpu.module_of(backend)
    for p in (2.0, 1.0, INF, 0.0):
        rows = rows_of(grads, p, extras)
        assert rows.shape[0] == (len(FIELDS) if extras else 3)
        assert not bool(rows.isnan().any())
        totals = torch.full((len(TOTALS),), NAN, dtype=torch.float64)
        chosen.finish(rows, Request(p, max_norm=1.0, extras=extras), totals)
        assert not bool(totals.isnan().any())


@pytest.mark.parametrize("p", [2.0, 1.0, INF, 3.0])
def test_empty_tensors_add_nothing(route: str, p: float) -> None:
    full = randn(10)
    grads = [torch.zeros(0), full, torch.zeros(3, 0, 2)]
    assert_norm(fastclip.get_total_norm(grads, p), norm(full, p), p)
    assert_norm(fastclip.get_total_norm([torch.zeros(0)], p), 0.0, p)
    assert_norm(fastclip.get_total_norm([], p), 0.0, p)


@pytest.mark.parametrize("p", [-INF, -1.0])
def test_empty_tensors_leave_the_smallest_alone(route: str, p: float) -> None:
    grads = [torch.zeros(0), torch.tensor([3.0, 4.0])]
    assert_norm(fastclip.get_total_norm(grads, p), norm(grads[1], p), p)


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_zeros_have_norm_zero(backend: str, dtype: torch.dtype) -> None:
    grads = [torch.zeros(777, dtype=dtype), -torch.zeros(3, dtype=dtype)]
    for p in NORM_TYPES:
        assert float(fastclip.get_total_norm(grads, p)) == 0.0


def test_zero_norm_counts_elements(route: str) -> None:
    grads = [torch.tensor([0.0, -0.0, 1e-45, 3.0]), torch.tensor([NAN, 0.0, -INF]), torch.zeros(5)]
    assert float(fastclip.get_total_norm(grads, 0)) == 4.0
    # torch joins per-tensor counts by counting them again
    assert float(fastclip.get_total_norm([torch.ones(3), torch.ones(4)], 0)) == 7.0


FAULTS = (NAN, INF, -INF)


@pytest.mark.parametrize("fault", [NAN, INF])
def test_what_is_not_finite_is_no_zero(backend: str, fault: float) -> None:
    grad = torch.tensor([0.0, fault, -0.0, 2.0, fault])
    assert rows_of([grad], 0.0)[0].item() == norm(grad, 0.0) == 3.0


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("p", [2.0, 1.0, INF, -INF, 3.0, -1.0, 0.5])
def test_nan_wins_over_inf(backend: str, dtype: torch.dtype, p: float) -> None:
    for first, second in ((NAN, INF), (INF, NAN), (-INF, NAN), (NAN, 1e3)):
        together = randn(50, dtype=dtype)
        together[3], together[40] = first, second
        apart = [randn(9, dtype=dtype), randn(9, dtype=dtype)]
        apart[0][2], apart[1][7] = first, second
        assert math.isnan(float(fastclip.get_total_norm(together, p)))
        assert math.isnan(float(fastclip.get_total_norm(apart, p)))
    inf = randn(50, dtype=dtype)
    inf[11] = -INF
    assert_norm(fastclip.get_total_norm(inf, p), norm(inf, p), p, norm_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 40, 3000])
def test_a_nan_among_zeros_is_found(backend: str, dtype: torch.dtype, size: int) -> None:
    values = torch.zeros(size)
    values[size // 2] = NAN  # in float8's FNUZ formats it has the code of the others' negative zero
    rows = rows_of([values.to(dtype)], 2.0, extras=False)
    assert math.isnan(float(rows[0, 0]))
    assert rows[1:3, 0].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_a_complex_number_with_a_nan_part_is_nan(backend: str, dtype: torch.dtype) -> None:
    for fault in (complex(NAN, INF), complex(INF, NAN), complex(-INF, NAN), complex(NAN, 0), complex(0, NAN)):
        stats = fastclip.grad_stats([torch.tensor([1 + 1j, fault], dtype=dtype)])
        assert (int(stats.nans), int(stats.infs)) == (1, 0)
        assert math.isnan(float(stats.total_norm))
    stats = fastclip.grad_stats([torch.tensor([complex(-INF, 3), complex(INF, INF)], dtype=dtype)])
    assert (int(stats.nans), int(stats.infs), float(stats.total_norm)) == (0, 2, INF)


@given(
    dtype=st.sampled_from(WRITABLE),
    size=st.one_of(st.integers(1, 300), st.sampled_from(BORDERS[:3])),
    offset=st.integers(0, 7),
    spots=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(FAULTS)), min_size=0, max_size=4),
    extras=st.booleans(),
)
@example(dtype=torch.bfloat16, size=CHUNK + 1, offset=1, spots=[(1.0, NAN)], extras=False)
def test_a_fault_is_found_wherever_it_is(backend: str, dtype, size: int, offset: int, spots, extras: bool) -> None:
    grad = torch.full((size + offset,), 0.5, dtype=dtype)[offset:]
    for where, fault in spots:
        grad[min(size - 1, int(where * size))] = fault
    if grad.is_complex():
        nans = int((grad.real.isnan() | grad.imag.isnan()).sum())
        infs = int((grad.isinf() & ~(grad.real.isnan() | grad.imag.isnan())).sum())
    else:
        nans, infs = int(grad.isnan().sum()), int(grad.isinf().sum())
    rows = rows_of([grad.new_ones(3), grad], 2.0, extras)
    assert rows[1:3, 0].tolist() == [0, 0]
    assert rows[1:3, 1].tolist() == [nans, infs]
    got = float(rows[0, 1])
    assert math.isnan(got) if nans else (got == INF) == (infs > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_overflow_is_not_inf(backend: str, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    rows = rows_of([torch.full((500,), top / 100, dtype=dtype)], 2.0, extras=False)
    assert math.isfinite(float(rows[0, 0]))
    assert rows[1:3, 0].tolist() == [0, 0]


def test_a_sum_may_be_more_than_float32_holds(backend: str) -> None:
    grad = torch.full((500,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    for p in (1.0, 2.0):
        rows = rows_of([grad], p, extras=True)
        assert float(rows[4, 0]) == 500 * float(grad[0])


@given(
    st.lists(
        st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=20),
        max_size=5,
    ),
    st.sampled_from((2.0, 1.0, INF, -INF, 0.0)),
)
def test_any_float32_at_all(backend: str, lists: list[list[float]], p: float) -> None:
    grads = [torch.tensor(values, dtype=torch.float32) for values in lists]
    want = norm(grads, p)
    if not any(lists) or (math.isfinite(want) and want > 3.4e38):
        return
    assert_norm(fastclip.get_total_norm(grads, p), want, p)


@given(st.lists(st.floats(), min_size=1, max_size=30), st.sampled_from((2.0, 1.0, INF, -INF, 0.0, 3.0)))
@example([5e-324, 5e-324], 2.0)
@example([1.7e308, 1.7e308], 2.0)
@example([1e-160, 1e-162, 0.0], 2.0)
def test_any_float64_at_all(backend: str, values: list[float], p: float) -> None:
    grad = torch.tensor(values, dtype=torch.float64)
    assert_norm(fastclip.get_total_norm(grad, p), norm(grad, p), p, torch.float64)


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40), st.sampled_from(HALVES))
def test_any_16_bits_at_all(backend: str, codes: list[int], dtype: torch.dtype) -> None:
    grad = all_patterns(dtype)[torch.tensor(codes)]
    want = norm(grad)
    got = fastclip.get_total_norm(grad)
    if math.isfinite(want) and want > 3.4e38:
        assert float(got) > 3.3e38
    else:
        assert_norm(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [2.0, 1.0, INF, -INF, 3.0, 0.5])
def test_powers_of_two_scale_norms_exactly(backend: str, dtype: torch.dtype, p: float) -> None:
    grads = [randn(size, dtype=dtype) for size in (5, 300, 5077)]
    before, rows = fastclip.get_total_norm(grads, p), rows_of(grads, p)
    for shift in (-40, -3, 1, 17, 40):
        scaled = [grad * 2.0**shift for grad in grads]
        assert bool((rows_of(scaled, p)[0] == rows[0] * 2.0**shift).all())
        assert float(fastclip.get_total_norm(scaled, p)) == float(before) * 2.0**shift


@pytest.mark.parametrize("p", [2.0, 1.0, INF, 0.0, 3.0, -1.0])
def test_order_changes_no_tensor_norm(backend: str, p: float) -> None:
    grads = [randn(int(size), dtype=dtype) for dtype in WRITABLE for size in torch.randint(1, 3000, (4,))]
    grads.append(randn(CHUNK + 9))
    order = torch.randperm(len(grads)).tolist()
    straight = fastclip.grad_stats(grads, norm_type=p)
    mixed = fastclip.grad_stats([grads[i] for i in order], norm_type=p)
    assert torch.equal(bits(mixed.tensor_norms), bits(straight.tensor_norms[order]))
    assert mixed.sizes == [straight.sizes[i] for i in order]


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_the_address_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    values = randn(3 * CHUNK // 2 if backend not in gpu.NAMES else 20_001, dtype=dtype)
    seen = []
    for offset in (0, 1, 3, 8, 13):
        moved = torch.cat([values[:offset], values])[offset:]
        seen.append(bits(rows_of([moved], 2.0)))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("capability", C.cpu_capabilities())
def test_threads_change_no_bit(capability: str, dtype: torch.dtype) -> None:
    assert C.cpu_use_capability(capability)
    fastclip.backends.forced = "cpu"
    grads = [randn(size, dtype=dtype) for size in (3, CHUNK * 2 + 11, 900, CHUNK)]
    for p in (2.0, 1.0, 3.0, 2.5):
        seen = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            seen.append(bits(rows_of(grads, p, extras=p == 1.0)))
        assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capabilities_agree_to_the_bit(on_each, dtype: torch.dtype) -> None:
    sizes = ((3, 1), (1027, 1e-3), (5000, 30), (CHUNK + 5, 1))
    grads = [randn(size, dtype=dtype, scale=scale) for size, scale in sizes]
    if dtype not in FLOAT8:
        grads[1][5] = torch.finfo(dtype).max
        grads[0][:] = torch.finfo(dtype).tiny * 3
    for p in NORM_TYPES:
        few = grads if p in (1, 2, 3) else grads[:3]
        for extras in (False, True):
            got = on_each(lambda p=p, few=few, extras=extras: bits(rows_of(few, p, extras)), cpu=True)
            first = next(iter(got.values()))
            assert all(torch.equal(first, other) for other in got.values()), p


@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
def test_flush_to_zero_changes_nothing_for_normal_numbers(backend: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    cases = [info.tiny, info.tiny * 3, info.max / 8, info.max, 1.0, 1e-3]
    if dtype != torch.float16:
        cases += [1e-19, 1e-25, 1e25]
    grads = [torch.tensor([value, value / 2 if value > 1 else value * 2, value], dtype=dtype) for value in cases]
    grads += [torch.tensor([value], dtype=dtype) for value in cases]
    wanted = [norm(grad) for grad in grads]
    assert torch.set_flush_denormal(True)
    rows = rows_of(grads, 2.0, extras=False)
    ones = rows_of(grads, 1.0, extras=True)
    torch.set_flush_denormal(False)
    for got, want, largest, grad in zip(rows[0].tolist(), wanted, ones[3].tolist(), grads, strict=True):
        assert abs(got - want) <= 1e-7 * want
        assert largest == float(magnitudes(grad).max())


@pytest.mark.parametrize(("count", "size"), [(1, 10), (16, 100_000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_subnormal_numbers_count_in_whichever_thread(on_each, dtype: torch.dtype, count: int, size: int) -> None:
    """torch.set_flush_denormal speaks to one thread, and which of them takes a chunk is left to chance."""
    value = torch.finfo(dtype).tiny / 64
    torch.set_num_threads(2)

    def flushed() -> tuple[list[list[float]], bool]:
        grads = [torch.full((size,), value, dtype=dtype) for _ in range(count)]
        assert torch.set_flush_denormal(True)
        rows = rows_of(grads, 2.0)
        backend = fastclip.backends.candidates()[0]
        backend.scale_(backend.table_of(grads), 0.5)
        torch.set_flush_denormal(False)
        return rows.tolist(), all(bool((grad == value / 2).all()) for grad in grads)

    for rows, halved in on_each(flushed, cpu=True).values():
        norms, nans, infs, largest, sums, zeros = rows
        assert norms == pytest.approx([value * math.sqrt(size)] * count, rel=1e-9, abs=0)
        assert sums == pytest.approx([value * size] * count, rel=1e-9, abs=0)
        assert largest == [value] * count
        assert nans == infs == zeros == [0] * count
        assert halved


@pytest.mark.parametrize("p", [2.0, 1.0, INF, 3.0])
@pytest.mark.parametrize("size", [1, 5, 300])
def test_a_finite_complex_number_is_never_infinite(backend: str, p: float, size: int) -> None:
    """Its magnitude is past the largest float64."""
    grad = torch.full((size,), complex(1.7e308, -1.6e308), dtype=torch.complex128)
    rows = rows_of([grad], p, extras=True)
    largest = torch.finfo(torch.float64).max
    assert rows[:4, 0].tolist() == [largest, 0, 0, largest]
    grad[-1] = complex(INF, 1e308)
    assert rows_of([grad], p, extras=True)[:4, 0].tolist() == [INF, 0, 1, INF]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [2.0, 1.0, INF, -INF, 3.0, 0.5, -1.0, -2.5, 10.0])
def test_norms_equal_torch(backend: str, dtype: torch.dtype, p: float) -> None:
    grads = [randn(size, dtype=dtype) for size in (1, 10, 700)]
    theirs = torch.nn.utils.get_total_norm(grads, p)
    ours = fastclip.get_total_norm(grads, p)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_single_tensors_generators_and_none(route: str) -> None:
    grad = randn(30)
    want = norm(grad)
    assert_norm(fastclip.get_total_norm(grad), want)
    assert_norm(fastclip.get_total_norm(g for g in (grad, None)), want)
    assert_norm(fastclip.get_total_norm((grad, grad)), want)
    assert_norm(fastclip.get_total_norm([None, None]), 0.0)
    assert_norm(fastclip.get_total_norm(grad, "inf"), norm(grad, INF))
    assert_norm(fastclip.get_total_norm(grad, 2, False, True), want)


@pytest.mark.parametrize("fault", FAULTS)
def test_error_if_nonfinite_raises(backend: str, fault: float) -> None:
    grads = [torch.ones(2), torch.tensor([[1.0, 2.0], [3.0, fault]])]
    with pytest.raises(RuntimeError, match=r"tensors\[1\].*(NaN|Inf).*\(1, 1\)") as caught:
        fastclip.get_total_norm(grads, error_if_nonfinite=True)
    assert isinstance(caught.value, fastclip.NonFiniteGradientError)
    with pytest.raises(RuntimeError):
        torch.nn.utils.get_total_norm(grads, error_if_nonfinite=True)
    assert not math.isfinite(float(fastclip.get_total_norm(grads)))
