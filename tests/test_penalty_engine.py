"""One pass adds the penalty, reads what was written and sums up the weights: right, and the same bits everywhere."""

from __future__ import annotations

import itertools
import math

import gpu
import pytest
import torch
from oracle import COMPLEX, INF, NAN, REALS, WRITABLE, bits, magnitudes, norm, randn
from test_units import ORDERS, laid_out, module, pairs
from torch import Tensor

import fastclip
from fastclip import ClippedOptimizer
from fastclip.backends import cpu, plan, reference
from fastclip.reading import read
from fastclip.tensors import grads_of
from fastclip.types import WEIGHT_FIELDS, Request

SIZES = (0, 1, 3, 15, 16, 17, 63, 64, 65, 127, 129, 1000)
STRENGTHS = ((0.0, 0.3), (0.2, 0.0), (0.2, 0.3), (0.0, 0.0), (1e-4, 1e-5), (700.0, 40.0))


def penalised(backend, grads: list[Tensor], weights: list[Tensor], strengths, request: Request | None = None):
    """Rows of gradients and weights; memory that must be filled holds 77 before."""
    request = request or Request()
    table = backend.table_of(grads)
    assert not table.refused
    own = torch.tensor(strengths, dtype=torch.float64).reshape(-1, 2).T.contiguous()
    rows = torch.full((request.fields, len(grads)), 77.0, dtype=torch.float64)
    weight_rows = torch.full((len(WEIGHT_FIELDS), len(grads)), 77.0, dtype=torch.float64)
    backend.read_penalised_(table, weights, own, request, rows, weight_rows)
    return rows, weight_rows


def rows_of(backend, grads: list[Tensor], request: Request) -> Tensor:
    rows = torch.full((request.fields, len(grads)), 77.0, dtype=torch.float64)
    backend.read(backend.table_of(grads), request, rows)
    return rows


def widest(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def check_penalised(got: Tensor, grad: Tensor, weight: Tensor, of_sign: float, of_weight: float) -> None:
    """Strengths and three operations rounded to float32 (float64), the result once to the gradient's dtype."""
    g, w = widest(grad), widest(weight)
    want = g + of_sign * torch.sgn(w) + of_weight * w
    wide = got.dtype in (torch.float64, torch.complex128)
    size = g.abs() + of_sign + of_weight * w.abs()
    finfo = torch.finfo(got.dtype)
    allowed = 3 * torch.finfo(torch.float64 if wide else torch.float32).eps * size + finfo.eps / 2 * want.abs()
    error = (widest(got) - want).abs()
    assert bool((error <= allowed + finfo.smallest_normal * finfo.eps).all()), (got.dtype, of_sign, of_weight)


def check_weights(weight_rows: Tensor, weights: list[Tensor]) -> None:
    want = [[norm(w), float(m.max()) if len(m := magnitudes(w)) else 0.0, math.fsum(m.tolist())] for w in weights]
    want = torch.tensor(want, dtype=torch.float64).reshape(-1, 3).T
    # bfloat16 and float16 that the kernel only reads are summed in float32, at most 8 at a time
    torch.testing.assert_close(weight_rows, want, rtol=1e-6, atol=0, equal_nan=True)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def some_weights(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every third is 0, where the derivative of the l1 penalty is taken to be 0; some of those -0."""
    weight = randn(*size, dtype=dtype)
    weight.view(-1)[::3] = 0.0
    weight.view(-1)[::9] = -0.0
    return weight


# ---- the backends' entry


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize(("of_sign", "of_weight"), STRENGTHS)
def test_the_formula_for_every_size(backend: str, dtype: torch.dtype, of_sign: float, of_weight: float) -> None:
    most = 2 * (1 << 18) // dtype.itemsize + 77  # two chunks and some
    sizes = (*SIZES, most) if of_sign == 0.2 else SIZES
    grads = [randn(size, dtype=dtype) for size in sizes]
    weights = [some_weights((size,), dtype) for size in sizes]
    before, pristine = [g.clone() for g in grads], [w.clone() for w in weights]
    for request in (Request(), Request(1.0, extras=True)):
        for g, b in zip(grads, before, strict=True):
            g.copy_(b)
        chosen = module(backend)
        rows, weight_rows = penalised(chosen, grads, weights, [(of_sign, of_weight)] * len(sizes), request)
        for got, grad, weight in zip(grads, before, weights, strict=True):
            check_penalised(got, grad, weight, of_sign, of_weight)
        assert torch.equal(rows, rows_of(chosen, grads, request))
        check_weights(weight_rows, weights)
        assert all(same(w, p) for w, p in zip(weights, pristine, strict=True))


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_every_pair_of_memory_orders(route: str, dtype: torch.dtype) -> None:
    """Only those that lie alike are a kernel's work; the others go element by element all the same."""
    shapes = ((5,), (3, 5), (2, 3, 4), (2, 3, 2, 2), (1, 4), ())
    made = [
        (laid_out(randn(*shape, dtype=dtype), one), laid_out(some_weights(shape, dtype), other))
        for shape, one, other in itertools.product(shapes, ORDERS, ORDERS)
    ]
    before = [grad.clone() for grad, _ in made]
    params = pairs([grad for grad, _ in made], [weight for _, weight in made])
    reading = read(plan(grads_of(params)), Request(), strengths=[(0.2, 0.3)] * len(params))
    for (got, weight), grad in zip(made, before, strict=True):
        check_penalised(got, grad, weight, 0.2, 0.3)
    torch.testing.assert_close(reading.rows, read(plan(grads_of(params)), Request()).rows, rtol=0, atol=0)
    check_weights(reading.weight_rows, [weight for _, weight in made])


@pytest.mark.parametrize("of_grad", REALS, ids=str)
@pytest.mark.parametrize("of_weight", REALS, ids=str)
def test_gradients_of_another_dtype_than_their_weights(backend: str, of_grad, of_weight) -> None:
    grad, weight = randn(40, dtype=of_grad), some_weights((40,), of_weight)
    before, chosen = grad.clone(), module(backend)
    rows, weight_rows = penalised(chosen, [grad], [weight], [(0.2, 0.3)])
    check_penalised(grad, before, weight, 0.2, 0.3)
    assert torch.equal(rows, rows_of(chosen, [grad], Request()))
    check_weights(weight_rows, [weight])


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_the_same_bits_for_every_instruction_set_and_number_of_threads(on_each, dtype: torch.dtype) -> None:
    sizes = (7, 64, 100, 5000, 300_001)
    grads, weights = [randn(size, dtype=dtype) for size in sizes], [some_weights((size,), dtype) for size in sizes]

    def run() -> list[Tensor]:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = [grad.clone() for grad in grads]
            found += [torch.cat([r.flatten() for r in penalised(cpu, own, weights, [(0.2, 0.3)] * 5)]), *own]
        return found

    (first, *others) = on_each(run, cpu=True).values()
    for k, found in enumerate(first):
        assert all(same(found, other[k]) for other in others)
        assert same(found, first[k % (len(sizes) + 1)])


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_other_tensors_do_not_change_a_tensors_bits(dtype: torch.dtype) -> None:
    sizes = (65, 70_000, 3, 1000)
    grads, weights = [randn(size, dtype=dtype) for size in sizes], [some_weights((size,), dtype) for size in sizes]
    strengths = [(0.2, 0.3), (0.0, 0.1), (0.0, 0.0), (0.5, 0.0)]
    want = [g.clone() for g in grads]
    rows, weight_rows = penalised(cpu, want, weights, strengths)
    for order in itertools.permutations(range(4)):
        own = [grads[i].clone() for i in order]
        got = penalised(cpu, own, [weights[i] for i in order], [strengths[i] for i in order])
        assert torch.equal(got[0], rows[:, order])
        assert torch.equal(got[1], weight_rows[:, order])
        assert all(same(o, want[i]) for o, i in zip(own, order, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e20, 1e-30, 1e37])
@pytest.mark.parametrize("count", [5, 70_000])
def test_sums_of_weights_at_every_magnitude(backend: str, dtype: torch.dtype, size: float, count: int) -> None:
    weights = [randn(count, dtype=dtype, scale=size), torch.full((count,), size, dtype=dtype)]
    _, weight_rows = penalised(module(backend), [torch.zeros_like(w) for w in weights], weights, [(0.1, 0.2)] * 2)
    check_weights(weight_rows, weights)


@pytest.mark.parametrize("size", [1e200, 1e-200, 1e-310, 1.7e308])
def test_sums_of_float64_weights_whose_squares_do_not_fit(backend: str, size: float) -> None:
    weights = [torch.full((70_000,), size, dtype=torch.float64).index_fill_(0, torch.tensor([3]), 0.0)]
    _, weight_rows = penalised(module(backend), [torch.zeros_like(weights[0])], weights, [(0.0, 0.5)])
    if size < 1e308:
        check_weights(weight_rows, weights)
    assert float(weight_rows[0, 0]) == pytest.approx(min(size * math.sqrt(69_999), 1.7976931348623157e308), rel=1e-12)


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("at", [0, 20, 69_999])
@pytest.mark.parametrize("strengths", [(0.2, 0.3), (0.0, 0.3), (0.2, 0.0), (0.0, 0.0)])
def test_weights_that_are_not_finite(backend: str, dtype: torch.dtype, at: int, strengths) -> None:
    """They show in their own sums, and in the gradient where they are added to it."""
    bad = (NAN, INF, -INF)
    weights = [randn(70_000, dtype=dtype) for _ in bad]
    for weight, value in zip(weights, bad, strict=True):
        weight[at] = value
    grads = [randn(70_000, dtype=dtype) for _ in bad]
    before = [grad.clone() for grad in grads]
    rows, weight_rows = penalised(module(backend), grads, weights, [strengths] * 3)
    assert bool(weight_rows[:, 0].isnan().all())
    assert weight_rows[:, 1:].flatten().tolist() == [INF] * 6
    if not any(strengths):
        assert all(same(grad, b) for grad, b in zip(grads, before, strict=True))
        return
    for got, grad, weight in zip(grads, before, weights, strict=True):
        want = grad.double() + strengths[0] * torch.sgn(weight.double()) + strengths[1] * weight.double()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
    assert rows[1:].sum() == 3


def test_signed_zeros_of_weights_have_no_sign(backend: str) -> None:
    for dtype in REALS:
        grad, weight = torch.zeros(40, dtype=dtype), torch.tensor([0.0, -0.0] * 20, dtype=dtype)
        rows, _ = penalised(module(backend), [grad], [weight], [(5.0, 0.0)])
        assert not grad.any()
        assert not rows.any()


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_the_share_of_the_sign_is_added_first(backend: str, dtype: torch.dtype) -> None:
    """Where it cancels the gradient, that of the weight is left whole."""
    large, small = 2.0**15, torch.finfo(dtype).tiny
    weight = torch.tensor([1.0, -1.0], dtype=dtype).repeat(40)
    grad = -large * weight
    penalised(module(backend), [grad], [weight], [(large, small)])
    assert torch.equal(grad, small * weight)


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_strengths_of_zero_write_nothing(backend: str, dtype: torch.dtype) -> None:
    """Neither memory nor, where the host can know it, the version counter, and what is written bumps it."""
    grads = [randn(100, dtype=dtype) for _ in range(3)]
    grads.append(randn(6, 4, dtype=dtype).t())
    grads[1][7] = -0.0
    before, versions = [grad.clone() for grad in grads], [grad._version for grad in grads]
    weights = [some_weights(tuple(grad.shape), dtype) for grad in grads]
    rows, weight_rows = penalised(module(backend), grads, weights, [(0.0, 0.0), (0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
    assert same(grads[0], before[0])
    assert same(grads[1], before[1])
    bumped = [grad._version > version for grad, version in zip(grads, versions, strict=True)]
    assert bumped == [backend in gpu.NAMES] * 2 + [True] * 2
    assert torch.equal(rows, rows_of(module(backend), grads, Request()))
    check_weights(weight_rows, weights)


def test_zeros_that_only_a_device_knows_change_nothing(monkeypatch) -> None:
    monkeypatch.setattr(reference, "known_to_host", lambda tensor: False)
    grad, weight = torch.tensor([1.0, -0.0, NAN]), torch.tensor([INF, NAN, 1.0])
    before = grad.clone()
    penalised(reference, [grad], [weight], [(0.0, 0.0)])
    assert torch.equal(grad[:2].view(torch.int32), before[:2].view(torch.int32))
    assert grad[2].isnan()


def test_no_gradients_at_all(backend: str) -> None:
    rows, weight_rows = penalised(module(backend), [], [], [])
    assert rows.shape == (3, 0)
    assert weight_rows.shape == (3, 0)


def test_subclasses_of_parameters(route: str) -> None:
    class Marked(torch.nn.Parameter):
        pass

    p = Marked(torch.tensor([1.0, -2.0]))
    p.grad = torch.tensor([0.5, 0.5])
    reading = read(plan(grads_of([p])), Request(), strengths=[(0.1, 1.0)])
    torch.testing.assert_close(p.grad, torch.tensor([1.6, -1.6]))
    assert reading.weight_rows[:, 0].tolist() == [pytest.approx(math.sqrt(5)), 2.0, 3.0]


def test_a_sparse_gradient_is_only_read(monkeypatch) -> None:
    monkeypatch.setattr(reference, "known_to_host", lambda tensor: False)
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    reading = read(plan(grads_of(embedding.parameters())), Request(), strengths=[(0.0, 0.0)])
    assert float(reading.rows[0, 0]) == pytest.approx(math.sqrt(2 * 4 + 2))
    check_weights(reading.weight_rows, [embedding.weight])


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_numbers_are_pulled_towards_zero(backend: str, dtype: torch.dtype) -> None:
    grad, weight = torch.zeros(2, dtype=dtype), torch.tensor([3 + 4j, 0], dtype=dtype)
    penalised(module(backend), [grad], [weight], [(1.0, 0.5)])
    torch.testing.assert_close(grad, torch.tensor([0.6 + 0.8j + 1.5 + 2j, 0], dtype=dtype))


# ---- the read


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0), torch.tensor([1024.0], dtype=torch.float64)])
def test_scaled_gradients_get_a_scaled_penalty(route: str, scale) -> None:
    grads, weights = [randn(50), randn(9, dtype=torch.float64)], [some_weights((50,), torch.float32), randn(9).double()]
    before = [grad.clone() for grad in grads]
    params, strengths = pairs(grads, weights), [(0.1, 0.2), (0.3, 0.0)]
    reading = read(plan(grads_of(params)), Request(), scale, strengths)
    for got, grad, weight, (l1, l2) in zip(grads, before, weights, strengths, strict=True):
        check_penalised(got, grad, weight, 1024 * l1, 1024 * l2)
    torch.testing.assert_close(reading.rows, read(plan(grads_of(params)), Request(), scale).rows, rtol=0, atol=0)
    check_weights(reading.weight_rows, weights)


def test_several_backends_share_one_list() -> None:
    """What the first refuses goes to the next, and every column comes back to its place."""
    grads = [randn(6), randn(12)[::2], randn(5, dtype=torch.complex64), randn(7)]
    weights = [some_weights(tuple(grad.shape), grad.dtype) for grad in grads]
    before, params = [grad.clone() for grad in grads], pairs(grads, weights)
    work, strengths = plan(grads_of(params)), [(0.1 * i, 0.2 * i) for i in range(4)]
    assert len(work.parts) == 2
    reading = read(work, Request(extras=True), strengths=strengths)
    for got, grad, weight, own in zip(grads, before, weights, strengths, strict=True):
        check_penalised(got, grad, weight, *own)
    torch.testing.assert_close(reading.rows, read(work, Request(extras=True)).rows, rtol=0, atol=0)
    check_weights(reading.weight_rows, weights)


def test_units_are_those_of_the_penalised_gradients(route: str) -> None:
    grads, weights = [randn(4, 3), randn(5)], [randn(4, 3), randn(5)]
    params = pairs(grads, weights)
    with_penalty = read(plan(grads_of(params)), Request(units="out"), strengths=[(0.1, 0.2)] * 2)
    after = read(plan(grads_of(params)), Request(units="out"))
    assert torch.equal(with_penalty.units.rows, after.units.rows)
    # CUDA's kernels add up to 4 products in float32, and which ones depends on where a unit begins
    torch.testing.assert_close(with_penalty.rows, after.rows, rtol=1e-12 if route not in gpu.NAMES else 1e-7, atol=0)


# ---- what users see of it


def test_statistics_of_weights(route: str) -> None:
    grads = [randn(50), randn(4, 3).t(), randn(6, dtype=torch.float64)]
    weights = [randn(50, scale=1e25), randn(3, 4), randn(6, dtype=torch.float64)]
    weights[2][1] = NAN
    params = pairs(grads, weights)
    params.insert(1, torch.nn.Parameter(torch.ones(3)))  # has no gradient
    stats = fastclip.grad_stats(params, ["a", "none", "b", "c"], weights=True)
    rows = torch.stack([stats.weight_norms, stats.weight_max_abs, stats.weight_sum_abs])
    check_weights(rows, weights)
    host = stats.to_dict()["tensors"]
    assert list(host) == ["a", "b", "c"]
    assert host["b"]["weight_norm"] == float(stats.weight_norms[1])
    assert host["a"]["weight_max_abs"] == float(weights[0].abs().max())
    assert host["b"]["weight_sum_abs"] == float(stats.weight_sum_abs[1])
    assert f"weight norm {float(stats.weight_norms[1]):.6g}" in str(stats)


def test_statistics_without_weights() -> None:
    params = pairs([randn(3)])
    stats = fastclip.grad_stats(params)
    assert stats.weight_norms is stats.weight_max_abs is stats.weight_sum_abs is None
    assert "weight_norm" not in stats.to_dict()["tensors"]["parameters[0]"]
    assert "weight" not in str(stats)
    with pytest.raises(ValueError, match="pass parameters"):
        fastclip.grad_stats([p.grad for p in params], weights=True)


@pytest.mark.parametrize(("convention", "half"), [("torch", 0.5), ("keras", 1.0)])
@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate", "raise"])
def test_the_value_of_the_penalty(route: str, convention: str, half: float, nonfinite: str) -> None:
    a, b, c = pairs([randn(5), randn(3, 4), randn(2)], [randn(5), randn(3, 4), randn(2)])
    groups = [{"params": [a]}, {"params": [b], "l1": 0.5, "group_max_norm": 1.0}, {"params": [c], "l1": 0.0, "l2": 0.0}]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), l1=0.1, l2=0.2, convention=convention, nonfinite=nonfinite)
    assert opt.penalty is None
    want = sum(
        l1 * p.detach().double().abs().sum() + half * 0.2 * p.detach().double().square().sum()
        for p, l1 in ((a, 0.1), (b, 0.5))
    )
    if nonfinite in ("skip", "zero"):
        c.grad[0] = NAN
    opt.step()
    assert opt.penalty.dtype == torch.float32
    assert float(opt.penalty) == pytest.approx(float(want), rel=1e-6)
    assert opt.last_stats.weight_norms is not None
    a.grad = b.grad = None
    opt.step()
    assert float(opt.penalty) == 0.0  # of the parameters with a gradient


def test_no_penalty_no_value() -> None:
    (p,) = pairs([randn(5)])
    opt = ClippedOptimizer(torch.optim.SGD([{"params": [p], "l1": 0.0}], lr=0.1))
    opt.step()
    assert opt.penalty is None
    assert opt.last_stats.weight_norms is None


def test_raise_says_that_the_penalty_was_written() -> None:
    """A gradient that only the penalty makes NaN: nobody can know before."""
    (p,) = pairs([torch.ones(2)], [torch.tensor([1.0, NAN])])
    opt = ClippedOptimizer(torch.optim.SGD([p], lr=0.1), l2=0.5, nonfinite="raise")
    with pytest.raises(fastclip.NonFiniteGradientError, match="the weight penalty is in it already"):
        opt.step()


def test_units_that_do_not_fit_are_found_before_anything_is_written() -> None:
    p, q = pairs([torch.ones(2), torch.ones(2, 3)])
    policy = fastclip.policies.Unitwise(units=(2,))
    opt = ClippedOptimizer(torch.optim.SGD([{"params": [p]}, {"params": [q], "policy": policy}], lr=0.1), l2=0.5)
    with pytest.raises(ValueError, match="units"):
        opt.step()
    assert torch.equal(p.grad, torch.ones(2))
    assert torch.equal(q.grad, torch.ones(2, 3))


def test_a_gradient_that_cannot_be_written_is_found_before_anything_is_written(route: str) -> None:
    """Also where the policy itself never writes."""
    p, q = pairs([torch.ones(2), torch.ones(1).expand(3)])
    opt = ClippedOptimizer(torch.optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1), max_norm=INF, l2=0.5)
    with pytest.raises(fastclip.UnsupportedGradientError, match="clone"):
        opt.step()
    assert torch.equal(p.grad, torch.ones(2))
