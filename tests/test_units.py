"""Rows, filters and columns are read and scaled right in every memory order, and only what is clipped is written."""

from __future__ import annotations

import math

import gpu
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import COMPLEX, INF, NAN, WRITABLE, bits, magnitudes, norm_of_magnitudes, randn, ulps
from torch import Tensor

import fastclip
import fastclip.backends
from fastclip.backends import plan, reference
from fastclip.policies import Chain, GlobalNorm, Unitwise, Value
from fastclip.reading import read
from fastclip.tensors import Grads, grads_among, grads_of
from fastclip.types import ALWAYS_FIELDS, Request
from fastclip.units import unit_dims

SHAPES = ((), (1,), (5,), (1, 4), (4, 1), (3, 5), (2, 3, 4), (2, 1, 3), (1, 1, 7), (2, 3, 2, 2), (3, 1, 1, 2), (1, 1))
FIVE = (2, 3, 2, 1, 2)
EMPTY = ((0,), (0, 3), (3, 0), (2, 0, 3), (0, 0))
UNITS = ("out", "in", "tensor", (0,), (1,), (0, 1))
P = (2.0, 1.0, INF, 0.0, 3.0, -INF, 0.5)
ORDERS = ("contiguous", "transposed", "channels_last", "strided", "backwards")


def laid_out(tensor: Tensor, order: str) -> Tensor:
    """The same values in another order of memory."""
    if order == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if order == "backwards" and tensor.dim() >= 2:
        dims = tuple(range(tensor.dim()))[::-1]
        return tensor.permute(dims).contiguous().permute(dims)
    if order == "channels_last" and tensor.dim() in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats[tensor.dim()])
    if order == "strided" and tensor.dim():
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor.contiguous()


def dims_of(shape: tuple[int, ...], units: str | tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of one unit, by the words of the documentation."""
    rank = len(shape)
    if units == "tensor" or rank <= 1:
        return tuple(range(rank))
    if units == "out":
        return tuple(range(1, rank))
    if units == "in":
        long = [size for size in shape if size > 1]
        return tuple(range(rank)) if len(long) <= 1 else (0,) if rank <= 3 else (0, 1, 2)
    return units


def unit_ids(shape: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    """For each element the number of its unit."""
    kept = [1 if d in dims else size for d, size in enumerate(shape)]
    return torch.arange(math.prod(kept)).reshape(kept).expand(shape)


def oracle(tensor: Tensor, dims: tuple[int, ...], p: float) -> Tensor:
    """``[3, u]``: norm, NaN and Inf of each unit, one at a time."""
    ids, values = unit_ids(tuple(tensor.shape), dims).flatten(), magnitudes(tensor)
    count = math.prod(size for d, size in enumerate(tensor.shape) if d not in dims)
    own = [values[ids == unit] for unit in range(count)]
    rows = [[norm_of_magnitudes(x, p), float(x.isnan().sum()), float(x.isinf().sum())] for x in own]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).T


def module(backend: str):
    return gpu.module_of(backend)


def shapes_for(units: str | tuple[int, ...]) -> list[tuple[int, ...]]:
    ranks = max(units) if isinstance(units, tuple) else 0
    shapes = [*SHAPES, *EMPTY, *([] if units == "in" else [FIVE])]
    return [shape for shape in shapes if len(shape) <= 1 or len(shape) > ranks]


def pairs(grads: list[Tensor], weights: list[Tensor] | None = None) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(w) for w in (weights or [torch.ones_like(grad) for grad in grads])]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    return params


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


# ---- the engine ----


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("units", UNITS, ids=str)
def test_every_unit_of_every_shape_is_read(on_each, dtype: torch.dtype, units) -> None:
    """Each backend alone, so the native core has to hand over what isn't one piece of memory."""
    for order in ORDERS[:3]:
        grads = [laid_out(randn(*shape, dtype=dtype), order) for shape in shapes_for(units)]
        for grad in grads:
            if grad.dim() == 2 and grad.numel():
                grad[0, -1], grad[-1, 0] = NAN, -INF
        dims = unit_dims(Grads(grads, None), units)
        assert dims == [dims_of(tuple(grad.shape), units) for grad in grads]
        for p in P if (dtype, order) == (torch.float32, "transposed") else P[:1]:
            want = torch.cat([oracle(grad, over, p) for grad, over in zip(grads, dims, strict=True)], dim=1)

            def rows(grads=grads, dims=dims, p=p, count=want.shape[1]) -> Tensor:
                backend = module(fastclip.backends.forced)
                table = backend.table_of(grads)
                assert not table.refused
                rows = torch.full((ALWAYS_FIELDS, count), 77.0, dtype=torch.float64)
                backend.read_units(table, dims, Request(p, units=units), rows)
                return rows

            for got in on_each(rows).values():
                torch.testing.assert_close(got, want, rtol=1e-7, atol=0, equal_nan=True)  # kernels sum float32 pairs


@pytest.mark.parametrize("p", P)
def test_units_join_to_the_norm_of_their_tensor(backend: str, p: float) -> None:
    for units in UNITS[:3]:
        grads = [randn(*shape) for shape in shapes_for(units)]
        grads[5][0, 0], grads[6][1, 1, 1] = NAN, -INF
        dims = unit_dims(Grads(grads, None), units)
        counts = [reference.count_units(grad, over) for grad, over in zip(grads, dims, strict=True)]
        unit_rows = torch.cat([oracle(grad, over, p) for grad, over in zip(grads, dims, strict=True)], dim=1)
        rows = torch.full((ALWAYS_FIELDS, len(grads)), 77.0, dtype=torch.float64)
        module(backend).join_units(unit_rows, counts, Request(p, units=units), rows)
        want = torch.cat([oracle(grad, tuple(range(grad.dim())), p) for grad in grads], dim=1)
        torch.testing.assert_close(rows, want, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("units", UNITS, ids=str)
def test_only_clipped_units_are_written(backend: str, dtype: torch.dtype, units) -> None:
    for order in ORDERS[:3] if backend != "reference" else ORDERS:
        grads = [laid_out(randn(*shape, dtype=dtype), order) for shape in shapes_for(units)]
        for grad in grads[6:8]:
            grad[0] = NAN if not dtype.is_complex else complex(NAN, INF)
        before = [grad.clone() for grad in grads]
        versions = [grad._version for grad in grads]
        dims = unit_dims(Grads(grads, None), units)
        counts = [reference.count_units(grad, over) for grad, over in zip(grads, dims, strict=True)]
        factors = torch.rand(sum(counts), dtype=torch.float64)
        factors[torch.rand(sum(counts)) < 0.6] = 1.0
        factors[: counts[0] + counts[1]] = 1.0
        own = torch.split(factors, counts)
        module(backend).scale_units_(module(backend).table_of(grads), dims, factors)
        for grad, old, over, factor, version in zip(grads, before, dims, own, versions, strict=True):
            each = factor[unit_ids(tuple(grad.shape), over)]
            still = each == 1.0
            # NaN aside, whose payload a conversion may change
            kept = still & ~old.isnan()
            assert same(grad[kept], old[kept])
            assert torch.equal(grad.isnan(), old.isnan())
            wide = torch.complex128 if dtype.is_complex else torch.float64
            want = (old.to(wide) * each).to(dtype)
            moved = ~still & ~old.isnan()
            assert int(ulps(grad[moved], want[moved]).max() if bool(moved.any()) else 0) <= 1
            written = bool((factor != 1.0).any()) and grad.numel() > 0
            if backend.startswith("cpu") and grad.numel():  # the others can't know on a device, so they bump all
                assert (grad._version > version) == written
            elif written:
                assert grad._version > version


@pytest.mark.parametrize("units", UNITS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("forced", [None, "reference"])
def test_clipping_equals_the_formula(forced: str | None, units, order: str) -> None:
    """The whole way, where strided views go to the reference, against one unit after the other."""
    fastclip.backends.forced = forced  # put back by the fixture ``same_start``
    shapes = [shape for shape in shapes_for(units) if math.prod(shape)]
    for dtype in (torch.float32, torch.bfloat16):
        grads = [laid_out(randn(*shape, dtype=dtype), order) for shape in shapes]
        ws = [laid_out(randn(*shape, dtype=dtype, scale=3.0), ORDERS[i % 3]) for i, shape in enumerate(shapes)]
        before, params = [grad.clone() for grad in grads], pairs(grads, ws)
        fastclip.clip_grads_(params, Unitwise(0.4, eps=0.1, units=units))
        clips = 0
        for grad, old, w in zip(grads, before, ws, strict=True):
            dims = dims_of(tuple(grad.shape), units)
            ids = unit_ids(tuple(grad.shape), dims)
            n, bound = oracle(old, dims, 2.0)[0], 0.4 * oracle(w, dims, 2.0)[0].clamp(min=0.1)
            factor = torch.where(n < bound, 1.0, bound / n.clamp(min=1e-6))[ids]
            clips += int((factor != 1).sum())
            assert same(grad[factor == 1], old[factor == 1])
            want = (old.double() * factor).to(dtype)
            assert int(ulps(grad, want).max()) <= 1
        assert clips


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    data=st.data(),
    dtype=st.sampled_from(WRITABLE),
)
def test_any_layout_at_all(backend: str, shape, order, data, dtype: torch.dtype) -> None:
    """Any permutation of memory, any dimensions as units: reading and scaling agree with the oracle."""
    rank = len(shape)
    memory = list(range(rank))
    order.shuffle(memory)
    inverse = [memory.index(d) for d in range(rank)]
    grad = randn(*shape, dtype=dtype).permute(memory).contiguous().permute(inverse)
    assert list(grad.shape) == shape
    dims = tuple(data.draw(st.lists(st.integers(0, rank - 1), unique=True)))
    if rank == 1:
        dims = (0,)
    chosen = module(backend)
    want = oracle(grad, dims, 2.0)
    rows = torch.full((ALWAYS_FIELDS, want.shape[1]), 77.0, dtype=torch.float64)
    chosen.read_units(chosen.table_of([grad]), [dims], Request(units=dims), rows)
    torch.testing.assert_close(rows, want, rtol=1e-7, atol=0)
    old = grad.clone()
    factors = torch.tensor(data.draw(st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=len(want[0]))))[: len(want[0])]
    chosen.scale_units_(chosen.table_of([grad]), [dims], factors.double())
    each = factors[unit_ids(tuple(shape), dims)]
    assert same(grad, old * each.to(old.real.dtype))


# ---- mixed lists ----


class Tagged(torch.Tensor):
    """A subclass that adds nothing: the native core leaves it to the reference."""


@pytest.mark.parametrize("units", ["out", "in", "tensor"])
@pytest.mark.parametrize("split", ["grads", "weights", "both", "neither"])
def test_some_on_the_reference_route(split: str, units: str) -> None:
    """Subclasses and views between tensors of the native core; gradients and weights may part differently."""
    shapes = ((3, 5), (4,), (2, 3, 2), (6, 2), (), (3, 5))
    grads, weights = [randn(*shape) for shape in shapes], [randn(*shape) for shape in shapes]
    want = [grad.clone() for grad in grads]
    fastclip.clip_grads_(pairs(want, [w.clone() for w in weights]), Unitwise(0.5, units=units))
    if split in ("grads", "both"):
        grads[0] = grads[0].as_subclass(Tagged)
        grads[3] = laid_out(grads[3], "strided")
    if split in ("weights", "both"):
        weights[1] = laid_out(weights[1], "strided")
        weights[3] = laid_out(weights[3], "strided")
        weights[5] = weights[5].t().contiguous().t()
    params = pairs(grads, weights)
    fastclip.clip_grads_(params, Unitwise(0.5, units=units))
    for p, value in zip(params, want, strict=True):
        # the reference and the kernels may differ by the last bit of a norm
        assert int(ulps(p.grad.as_subclass(Tensor), value).max()) <= 1
    assert fastclip.backends.forced is None


def test_versions_of_a_mixed_list() -> None:
    grads = [torch.full((2, 3), 9.0), torch.full((2, 3), 1e-6), laid_out(torch.full((2, 3), 9.0), "strided")]
    params = pairs([*grads, torch.full((3, 2), 1e-6).t(), torch.full((3, 2), 9.0).t()])
    versions = [p.grad._version for p in params]
    fastclip.clip_grads_(params, Unitwise(0.01))
    moved = [p.grad._version > version for p, version in zip(params, versions, strict=True)]
    assert moved == [True, False, True, False, True]


@pytest.mark.parametrize("small", [(1,), (0, 2), (0, 1, 2), ()])
def test_only_what_is_clipped_gets_a_new_version(small: tuple[int, ...]) -> None:
    """All in the native core's own order of memory; one clipped row in three is a write."""
    grads = [torch.full((3, 2), 1e-6) for _ in range(3)]
    for i, grad in enumerate(grads):
        if i not in small:
            grad[-1] = 9.0
    versions = [grad._version for grad in grads]
    fastclip.clip_grads_(pairs(grads), Unitwise(0.01))
    written = [grad._version > version for grad, version in zip(grads, versions, strict=True)]
    assert written == [i not in small for i in range(3)]
    assert all(bool((grad < 1).all()) for grad in grads)


def test_the_clipped_gradient_is_noticed_by_autograd(backend: str) -> None:
    """A write through a pointer is a write."""
    x = torch.ones(2, 2, requires_grad=True)
    grad = torch.full((2, 2), 5.0)
    kept = (x * grad).sum()
    (p,) = pairs([grad])
    fastclip.clip_grads_([p], Unitwise(0.01))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_missing_gradients_take_no_weights(route: str) -> None:
    """The weights of a gradient are those of its own parameter, whoever is missing before it."""
    shapes = ((2, 3), (3,), (2, 2), (4, 2))
    grads, weights = [randn(*shape) for shape in shapes], [randn(*s, scale=10.0**i) for i, s in enumerate(shapes)]
    params = pairs([grad.clone() for grad in grads], weights)
    params[0].grad = params[2].grad = None
    fastclip.clip_grads_([params[0], params[1], params[1], params[2], params[3]], Unitwise(1e-4))
    for i in (1, 3):
        (alone,) = pairs([grads[i].clone()], [weights[i]])
        fastclip.clip_grads_([alone], Unitwise(1e-4))
        assert same(params[i].grad, alone.grad)
        assert not torch.equal(alone.grad, grads[i])


def test_empty_gradients_shift_nothing(route: str) -> None:
    for units in ("out", "in", "tensor"):
        grad, bias = randn(4, 3), randn(3)
        want = pairs([grad.clone(), bias.clone()])
        fastclip.clip_grads_(want, Unitwise(units=units))
        for empty in EMPTY:
            params = pairs([torch.zeros(empty), grad.clone(), torch.zeros(empty), bias.clone()])
            fastclip.clip_grads_(params, Unitwise(units=units))
            assert same(params[1].grad, want[0].grad)
            assert same(params[3].grad, want[1].grad)
            assert float(fastclip.clip_grads_(pairs([torch.zeros(empty)]), Unitwise(units=units))) == 0.0


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_rows(backend: str, dtype: torch.dtype) -> None:
    (p,) = pairs([torch.tensor([[3 + 4j, 0], [3e-6, 0]], dtype=dtype)], [torch.full((2, 2), 1 + 1j, dtype=dtype)])
    fastclip.clip_grads_([p], Unitwise(0.5))
    want = torch.tensor([[0.6 + 0.8j, 0], [3e-6, 0]], dtype=dtype)  # 0.5 * |(1+1j, 1+1j)| = 1
    torch.testing.assert_close(p.grad, want, rtol=1e-6, atol=0)
    assert same(p.grad[1], want[1])


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
def test_damage_stays_in_its_row(route: str, nonfinite: str) -> None:
    (p,) = pairs([torch.tensor([[INF, 1.0], [NAN, 1.0], [1e-3, 0.0], [3.0, 4.0]])])
    before = p.grad.clone()
    fastclip.clip_grads_([p], Unitwise(0.01), nonfinite=nonfinite)
    assert same(p.grad[2], before[2])
    want = {
        "propagate": [[NAN, 0.0], [NAN, NAN]],
        "skip": [[INF, 1.0], [NAN, 1.0]],
        "zero": [[0.0, 0.01 * math.sqrt(2)]] * 2,
    }[nonfinite]
    torch.testing.assert_close(p.grad[:2], torch.tensor(want), rtol=1e-6, atol=0, equal_nan=True)
    last = 1.0 if nonfinite == "skip" else 0.01 * math.sqrt(2) / 5
    torch.testing.assert_close(p.grad[3], before[3] * last, rtol=1e-6, atol=0)


def test_an_extreme_row_does_not_touch_the_next(backend: str) -> None:
    for dtype, big in ((torch.float64, 1e300), (torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float16, 6e4)):
        (p,) = pairs([torch.tensor([[big, big], [1e-7, 0.0], [0.0, 0.0]], dtype=dtype)])
        before = p.grad.clone()
        fastclip.clip_grads_([p], Unitwise(0.01))
        assert same(p.grad[1:], before[1:])
        assert p.grad[0].double().norm() == pytest.approx(0.01 * math.sqrt(2), rel=1e-2)


# ---- what can't be served ----


@pytest.mark.parametrize(
    ("units", "shape", "words"),
    [("in", FIVE, "units='in'.*5"), ((1, 2), (3, 4), r"units=\(1, 2\)"), ((5,), (3, 4), r"units=\(5,\)")],
)
def test_units_that_do_not_fit_name_the_tensor(route: str, units, shape: tuple[int, ...], words: str) -> None:
    params = pairs([torch.full((2,), 9.0), torch.ones(shape)])
    with pytest.raises(ValueError, match=words) as caught:
        fastclip.clip_grads_(params, Unitwise(units=units))
    assert "parameters[1]" in str(caught.value)
    assert torch.equal(params[0].grad, torch.full((2,), 9.0))


def test_gradients_are_not_parameters() -> None:
    """They have no weights to compare with."""
    with pytest.raises(ValueError, match="pass parameters"):
        read(plan(grads_among([torch.ones(2, 2)])), Unitwise().request())


def test_sparse_gradients_are_refused_or_right(route: str) -> None:
    """Rows of the values are not the rows of the weight."""
    table = torch.nn.Embedding(6, 2, sparse=True)
    other = torch.nn.Embedding(6, 2)
    other.weight.data.copy_(table.weight.data)
    (other(torch.tensor([1, 4, 4])) * 30).sum().backward()
    want = other.weight.grad.clone()
    (table(torch.tensor([1, 4, 4])) * 30).sum().backward()
    (neighbour,) = pairs([torch.full((3, 2), 5.0)])
    (alone,) = pairs([torch.full((3, 2), 5.0)])
    fastclip.clip_grads_([other.weight], Unitwise(0.01))
    fastclip.clip_grads_([alone], Unitwise(0.01))
    try:
        fastclip.clip_grads_([table.weight, neighbour], Unitwise(0.01))
    except (TypeError, ValueError) as error:
        assert "parameters[0]" in str(error)  # noqa: PT017
        assert torch.equal(table.weight.grad.to_dense(), want)
        assert torch.equal(neighbour.grad, torch.full((3, 2), 5.0))
    else:
        torch.testing.assert_close(table.weight.grad.to_dense(), other.weight.grad, rtol=1e-6, atol=0)
        assert same(neighbour.grad, alone.grad)


def test_what_can_not_be_written_is_left_alone(route: str) -> None:
    first = torch.full((2, 2), 9.0)
    params = pairs([first, torch.full((1, 2), 9.0).expand(2, 2)], [torch.ones(2, 2), torch.ones(2, 2)])
    with pytest.raises(TypeError, match=r"parameters\[1\].*written"):
        fastclip.clip_grads_(params, Unitwise(0.01))
    assert torch.equal(first, torch.full((2, 2), 9.0))


def test_the_core_checks_its_arguments() -> None:
    from fastclip._native import C

    table = C.GradTable([torch.ones(2, 3), torch.ones(4)], C.CPU)
    for counts in ([2], [4, 1], [-1, 1]):
        with pytest.raises(ValueError, match=r"count|pieces"):
            C.split(table, counts)
    with pytest.raises(ValueError, match="mask"):
        C.pieces(table, [1])
    assert C.pieces(table, [2, 1]) == [2, 1]
    assert C.pieces(table, [1, 0]) == [0, 4]
    with pytest.raises(ValueError, match="9 float64 numbers"):
        C.cpu_join(torch.zeros(3, 2, dtype=torch.float64), [2, 1], 2.0, torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    grads = [randn(300, 700), randn(2, 70_000), randn(9)]
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        params = pairs([grad.clone() for grad in grads])
        reading = read(plan(grads_of(params)), Unitwise().request())
        fastclip.clip_grads_(params, Unitwise(0.01))
        found.append((reading.units.rows, reading.rows, *(p.grad for p in params)))
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_one_read_serves_units_and_total(route: str) -> None:
    """Rows and totals come from the units, and are those of a read without them."""
    for extras in (False, True):
        params = pairs([randn(7, 5), randn(3), randn(2, 3, 4), randn()])
        with_units = read(plan(grads_of(params)), Request(extras=extras, units="out"))
        without = read(plan(grads_of(params)), Request(extras=extras))
        torch.testing.assert_close(with_units.rows, without.rows, rtol=1e-7, atol=0)
        torch.testing.assert_close(with_units.totals, without.totals, rtol=1e-7, atol=0)
        assert with_units.units.counts == [7, 1, 2, 1]
        assert sum(with_units.units.counts) == len(with_units.units.weight_norms)
    policy = Chain(Unitwise(0.05), GlobalNorm(0.2), Value(0.01))
    assert policy.request() == Request(2.0, INF, 1e-6, True, "out")
