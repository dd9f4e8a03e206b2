"""Any layout, any list, any mistake: a right answer, or an error that names what is wrong and a clean slate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracle import (
    FLOAT8,
    INF,
    NAN,
    WRITABLE,
    assert_norm,
    bits,
    coef,
    norm,
    norm_dtype,
    parameter,
    parameters,
    randn,
    ulps,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import fastclip
import fastclip.backends
from fastclip._native import C
from fastclip.backends import cpu

LAYOUTS = {
    "contiguous": lambda d: randn(4, 6, dtype=d),
    "offset 1": lambda d: randn(25, dtype=d)[1:],
    "offset 3": lambda d: randn(103, dtype=d)[3:],
    "transposed": lambda d: randn(40, 6, dtype=d).t(),
    "permuted": lambda d: randn(3, 4, 5, 6, dtype=d).permute(2, 0, 3, 1),
    "channels_last": lambda d: randn(2, 3, 4, 5, dtype=d).contiguous(memory_format=torch.channels_last),
    "size-1 dims": lambda d: randn(5, 1, 7, dtype=d).transpose(0, 2).as_strided((7, 1, 5), (1, 999, 7)),
    "every second": lambda d: randn(400, dtype=d)[::2],
    "columns": lambda d: randn(30, 40, dtype=d)[:, 3:17],
    "diagonal": lambda d: randn(30, 30, dtype=d).diagonal(),
    "0-d": lambda d: randn(dtype=d),
    "0-d view": lambda d: randn(9, dtype=d)[4],
    "empty": lambda d: torch.zeros(0, 3, dtype=d),
    "empty strided": lambda d: randn(5, 6, dtype=d)[:, 3:3],
    "empty expanded": lambda d: randn(1, 1, dtype=d).expand(0, 3),
    "large strided": lambda d: randn(200, 201, dtype=d)[:, 1:],
}
SHARED = {
    "expanded": lambda d: torch.tensor([2.0]).to(d).expand(9),
    "expanded rows": lambda d: randn(5, 1, dtype=d).expand(5, 3),
    "overlapping": lambda d: randn(10, dtype=d).as_strided((4, 4), (1, 2)),
    "unfolded": lambda d: randn(10, dtype=d).unfold(0, 4, 1),
}


def test_a_route_begins_with_its_own_backend(route: str) -> None:
    """Also for tensors of the CPU, which its own backend would take first."""
    assert fastclip.backends.candidates(cpu.device_type)[0].name == ("cpu" if route.startswith("cpu-") else route)


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_written(route: str, dtype: torch.dtype, layout: str) -> None:
    grad = LAYOUTS[layout](dtype)
    before, p = grad.clone(), parameter(grad)
    for q in (2.0, INF, 0.0):
        assert_norm(fastclip.get_total_norm(grad, q), norm(before, q), q, norm_dtype(dtype))
    fastclip.clip_grad_norm_([p], 0.25)
    wide = before.to(torch.complex128 if dtype.is_complex else torch.float64)
    want = (wide * coef(norm(before), 0.25)).to(dtype)
    assert p.grad.data_ptr() == grad.data_ptr()
    assert p.grad.stride() == grad.stride()
    limit = 8 if dtype in (torch.float64, torch.complex128) else 1
    assert not grad.numel() or int(ulps(p.grad.contiguous(), want.contiguous()).max()) <= limit
    if not dtype.is_complex:
        scaled = p.grad.clone()
        fastclip.clip_grad_value_([p], 0.01)
        bound = float(torch.tensor(0.01, dtype=dtype))
        assert torch.equal(p.grad, scaled.clamp(-bound, bound))


def test_interleaved_rows_share_no_memory(route: str) -> None:
    grad = torch.arange(20.0).as_strided((3, 2), (2, 3))  # offsets 0 3, 2 5, 4 7
    want = grad / 2
    fastclip.clip_grad_norm_([parameter(grad)], norm(grad) / 2)
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["every second", "columns", "diagonal", "transposed", "offset 3"])
def test_writes_spare_the_gaps(route: str, layout: str) -> None:
    grad = LAYOUTS[layout](torch.float32)
    memory = grad.untyped_storage()
    every = torch.empty(0).set_(memory, 0, (memory.nbytes() // 4,), (1,))
    inside = torch.zeros(every.shape, dtype=torch.bool)
    inside.as_strided(grad.shape, grad.stride(), grad.storage_offset()).fill_(True)
    before = every.clone()
    fastclip.clip_grad_norm_([parameter(grad)], 1e-3)
    assert torch.equal(every[~inside], before[~inside])
    assert not bool((every[inside] == before[inside]).any())


@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_shared_memory_is_read_but_never_written(route: str, layout: str, dtype: torch.dtype) -> None:
    grad = SHARED[layout](dtype)
    assert_norm(fastclip.get_total_norm(grad), norm(grad.clone()), 2, norm_dtype(dtype))
    first = parameter(torch.tensor([3.0, 4.0]).to(dtype))
    params = [first, parameter(None), parameter(grad)]
    before = [bits(p.grad).clone() for p in (first, params[2])]
    for work in (
        lambda: fastclip.clip_grad_norm_(params, 0.1),
        lambda: fastclip.clip_grad_norm_(params, 0.1, nonfinite="zero"),
        lambda: fastclip.clip_grads_with_norm_(params, 0.1, 3.0),
        lambda: fastclip.clip_grad_value_(params if not dtype.is_complex else [params[2]], 0.1),
    ):
        with pytest.raises((TypeError, RuntimeError), match=r"parameters\[[02]\]"):
            work()
        assert torch.equal(bits(first.grad), before[0])
        assert torch.equal(bits(params[2].grad), before[1])
    assert first.grad._version == 0


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_fp8_is_read_but_never_written(route: str, dtype: torch.dtype) -> None:
    first, fp8 = parameter(torch.tensor([3.0, 4.0])), parameter(None)
    fp8.data = torch.zeros(2, dtype=dtype)
    fp8.grad = torch.tensor([12.0, 0.0]).to(dtype)
    assert float(fastclip.get_total_norm([first.grad, fp8.grad])) == 13.0
    for work in (fastclip.clip_grad_norm_, fastclip.clip_grad_value_):
        with pytest.raises(fastclip.UnsupportedGradientError, match=r"parameters\[1\] \(torch.float8.*8-bit"):
            work([first, fp8], 0.1)
    assert first.grad.tolist() == [3.0, 4.0]
    assert first.grad._version == 0


@pytest.mark.parametrize("kind", ["dense", "strided", "uncoalesced", "bfloat16"])
def test_inference_tensors_are_clipped_outside_inference_mode_too(route: str, kind: str) -> None:
    def params() -> list[torch.nn.Parameter]:
        second = parameter(torch.zeros(2, 2))
        with torch.inference_mode():
            grad = torch.tensor([[30.0, 40.0], [0.3, 0.4]])
            if kind == "strided":
                grad = torch.stack([grad, grad], dim=2)[:, :, 0]
            elif kind == "uncoalesced":
                grad = torch.sparse_coo_tensor([[0, 0, 1], [0, 1, 1]], [30.0, 40.0, 0.5], (2, 2))
            elif kind == "bfloat16":
                second.data, grad = second.data.bfloat16(), grad.bfloat16()
            second.grad = grad
        assert second.grad.is_inference()
        return [parameter(torch.tensor([12.0, 5.0])), second]

    def with_nan(work: Callable[[list[torch.nn.Parameter]], object]) -> Callable[[list[torch.nn.Parameter]], object]:
        def run(own: list[torch.nn.Parameter]) -> object:
            with torch.inference_mode():
                values = own[1].grad._values() if kind == "uncoalesced" else own[1].grad
                values[0] = NAN
            return work(own)

        return run

    def penalised(own: list[torch.nn.Parameter]) -> None:
        strength = 0.0 if kind == "uncoalesced" else 0.5  # which would make it dense
        groups = [{"params": own[:1]}, {"params": own[1:], "l2": strength}]
        fastclip.ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), 1.0, l1=0.5 if strength else 0.0).step()

    units = [] if kind == "uncoalesced" else [lambda own: fastclip.adaptive_clip_grad_(own, 0.5)]
    for work in (
        *units,
        lambda own: fastclip.clip_grad_norm_(own, 1.0),
        lambda own: fastclip.clip_grads_with_norm_(own, 1.0, 2.0),
        lambda own: fastclip.clip_grads_(own, fastclip.policies.PerTensorNorm(1.0)),
        lambda own: fastclip.clip_grad_value_(own, 1.0),
        with_nan(lambda own: fastclip.clip_grad_norm_(own, 1.0, nonfinite="zero")),
        penalised,
    ):
        inside, outside = params(), params()
        with torch.inference_mode(), torch.no_grad():
            work(inside)
        work(outside)
        for left, right in zip(inside, outside, strict=True):
            assert torch.equal(left.grad.to_dense(), right.grad.to_dense())
        assert not torch.equal(outside[1].grad.to_dense(), params()[1].grad.to_dense())
        assert outside[1].grad.is_inference()
        assert not outside[0].grad.is_inference()


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC) tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_coo], ids=str)
def test_a_bad_element_of_a_sparse_inference_gradient_is_named(route: str, layout: torch.layout) -> None:
    with torch.inference_mode():
        grad = torch.tensor([[0.0, NAN], [1.0, 0.0]]).to_sparse(layout=layout)
    p = torch.nn.Parameter(torch.zeros_like(grad))
    p.grad = grad
    with pytest.raises(fastclip.NonFiniteGradientError, match=r"parameters\[0\].*NaN at index \(0, 1\)"):
        fastclip.clip_grad_norm_([p], 1.0, nonfinite="raise")


def test_a_parameter_list_is_a_list_of_parameters(route: str) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    assert float(fastclip.clip_grad_norm_(torch.nn.ParameterList([p]), 1.0)) == 5.0
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    with pytest.raises(TypeError, match="got a Linear module; pass module"):
        fastclip.clip_grad_norm_(torch.nn.Linear(1, 1), 1.0)


def test_an_inference_gradient_under_a_closure_is_stepped_with(route: str) -> None:
    p = parameter(torch.tensor([30.0, 40.0]))
    opt = fastclip.ClippedOptimizer(torch.optim.SGD([p], lr=1.0), max_norm=5.0)

    def closure() -> float:
        with torch.inference_mode():
            p.grad = torch.tensor([30.0, 40.0])
        return 1.0

    before = p.detach().clone()
    opt.step(closure)
    torch.testing.assert_close(before - p.detach(), torch.tensor([3.0, 4.0]))


def test_zero_tensors_raise_before_anything_is_written(route: str) -> None:
    first, second = parameter(torch.tensor([3.0, 4.0])), parameter(torch.zeros(2))
    second.grad = torch._efficientzerotensor(2)
    assert float(fastclip.get_total_norm([first.grad, second.grad])) == 5.0
    with pytest.raises((RuntimeError, TypeError), match=r"parameters\[1\]"):
        fastclip.clip_grad_norm_([first, second], 0.1)
    assert first.grad.tolist() == [3.0, 4.0]


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


def mixed() -> list[torch.Tensor]:
    """Dense, strided, sparse, subclass, 0-d, empty, of many dtypes."""
    return [
        torch.tensor([1.0, 2.0]).as_subclass(Plain),
        torch.tensor([3.0, 4.0]),
        torch.tensor([6.0, NAN, 8.0, NAN])[::2],
        torch.tensor([5.0, 12.0], dtype=torch.bfloat16),
        torch.sparse_coo_tensor([[0, 2]], [8.0, 15.0], (5,), check_invariants=True).coalesce(),
        torch.tensor(7.0, dtype=torch.float64),
        torch.zeros(0),
        torch.tensor([3 + 4j, 12j], dtype=torch.complex64),
        torch.tensor([20.0, 21.0], dtype=torch.float16).expand(1, 2),
    ]


NORMS = [math.sqrt(5), 5.0, 10.0, 13.0, 17.0, 7.0, 0.0, 13.0, 29.0]


def test_a_mixed_list_keeps_its_order(route: str) -> None:
    names = ["sub", "dense", "strided", "bf16", "sparse", "f64", "empty", "complex", "f16"]
    for order in (list(range(9)), list(reversed(range(9))), [2, 0, 4, 1, 3, 8, 7, 6, 5]):
        grads = [mixed()[i] for i in order]
        stats = fastclip.grad_stats(grads, [names[i] for i in order])
        torch.testing.assert_close(stats.tensor_norms.double(), torch.tensor([NORMS[i] for i in order]).double())
        assert stats.names == [names[i] for i in order]
        assert stats.tensor_norms.dtype == torch.float64
        assert_norm(stats.total_norm, math.sqrt(sum(n * n for n in NORMS)), 2, torch.float64)
        assert [w.name for w in stats.worst(2)] == ["f16", "sparse"]


@pytest.mark.parametrize("rule", ["propagate", "skip", "raise"])
def test_a_mixed_list_is_clipped_as_one(route: str, rule: str) -> None:
    for order in (list(range(9)), list(reversed(range(9)))):
        grads = [mixed()[i] for i in order]
        params = parameters(g.to_dense() if g.layout != torch.strided else g for g in grads)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        total = math.sqrt(sum(n * n for n in NORMS))
        assert float(fastclip.clip_grad_norm_(params, total / 2, nonfinite=rule)) == pytest.approx(total, rel=1e-12)
        for p, old in zip(params, grads, strict=True):
            assert p.grad is old
        clean = [mixed()[i] for i in order]
        for p, old in zip(params, clean, strict=True):
            wide = torch.complex128 if old.is_complex() else torch.float64
            got, want = p.grad.to_dense().to(wide), old.to_dense().to(wide) / 2
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_a_fault_in_a_mixed_list_is_named(route: str) -> None:
    for spot, index in ((2, (1,)), (4, (2,)), (0, (0,)), (5, ())):
        grads = mixed()
        (grads[spot]._values() if grads[spot].is_sparse else grads[spot])[-1 if spot in (2, 4) else ...] = NAN
        params = [parameter(None), *parameters(g.to_dense() if g.is_sparse else g for g in mixed())]
        for p, grad in zip(params[1:], grads, strict=True):
            p.grad = grad
        with pytest.raises(fastclip.NonFiniteGradientError) as caught:
            fastclip.clip_grad_norm_(params, 0.1, nonfinite="raise")
        assert (caught.value.tensor, caught.value.index) == (f"parameters[{spot + 1}]", index)
        assert params[2].grad.tolist() == [3.0, 4.0]


def test_plain_subclasses_are_not_written_below_the_bound(route: str) -> None:
    p, q = parameter(torch.tensor([3.0])), parameter(torch.tensor([4.0]))
    p.grad = torch.tensor([3.0]).as_subclass(Plain)
    versions = p.grad._version, q.grad._version
    assert float(fastclip.clip_grad_norm_([p, q], 5.0)) == 5.0
    assert (p.grad._version, q.grad._version) == versions
    assert float(fastclip.clip_grad_norm_([p, q], 2.5)) == 5.0
    torch.testing.assert_close(torch.cat([p.grad, q.grad]).as_subclass(torch.Tensor), torch.tensor([1.5, 2.0]))


def sparse(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.tensor([3.0, 1.0, 3.0]).to(dtype)
    coo = torch.sparse_coo_tensor([[0, 2, 2], [1, 0, 0]], values, (4, 3), check_invariants=True)  # 3 and 1 + 3
    if kind == "hybrid":
        values = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).to(dtype)
        return torch.sparse_coo_tensor([[0, 2]], values, (4, 2), check_invariants=True).coalesce()
    return coo if kind == "uncoalesced" else coo.coalesce()


@pytest.mark.parametrize("kind", ["coalesced", "uncoalesced", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sparse_gradients_are_served_through_their_values(route: str, kind: str, dtype: torch.dtype) -> None:
    grad = sparse(kind, dtype)
    p = torch.nn.Parameter(torch.zeros(grad.shape, dtype=dtype))
    p.grad = grad
    dense, version = grad.to_dense().clone(), p.grad._version
    assert float(fastclip.clip_grad_norm_([p], 5.0)) == 5.0
    assert p.grad._version == version
    assert torch.equal(p.grad.to_dense(), dense)
    assert float(fastclip.clip_grad_norm_([p], 2.5)) == 5.0
    assert p.grad.is_sparse
    assert p.grad._version > version
    torch.testing.assert_close(p.grad.to_dense(), dense / 2, rtol=1e-6, atol=0)
    fastclip.clip_grad_value_([p], 1.0)
    torch.testing.assert_close(p.grad.to_dense(), (dense / 2).clamp(-1, 1), rtol=1e-6, atol=0)
    assert float(fastclip.get_total_norm([grad], INF)) == 1.0


@pytest.mark.parametrize("kind", ["coalesced", "uncoalesced", "hybrid"])
def test_sparse_gradients_are_written_as_often_as_needed(route: str, kind: str) -> None:
    """Zeroed and then clipped, clipped and then clamped: what isn't coalesced becomes so on the way."""
    p, q = (torch.nn.Parameter(torch.zeros(sparse(kind).shape)) for _ in range(2))
    p.grad, q.grad = sparse(kind), torch.full_like(q, INF)
    dense = p.grad.to_dense()
    assert float(fastclip.clip_grad_norm_([p, q], 2.5, nonfinite="zero")) == 5.0
    torch.testing.assert_close(p.grad.to_dense(), dense / 2, rtol=1e-6, atol=0)
    p.grad = sparse(kind)
    rule = fastclip.policies.Chain(fastclip.policies.GlobalNorm(2.5), fastclip.policies.Value(1.75))
    assert float(fastclip.clip_grads_([p], rule)) == 5.0
    torch.testing.assert_close(p.grad.to_dense(), (dense / 2).clamp(max=1.75), rtol=1e-6, atol=0)


def test_sparse_faults_are_zeroed(route: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3))
    p.grad = sparse("coalesced")
    p.grad._values()[1] = NAN
    assert float(fastclip.clip_grad_norm_([p], INF, nonfinite="zero")) == 3.0
    assert p.grad.to_dense().sum() == 3.0


def test_an_embedding_with_sparse_gradients_trains(route: str) -> None:
    table = torch.nn.Embedding(50, 4, sparse=True)
    table(torch.tensor([1, 7, 7, 3])).pow(2).sum().backward()
    dense = table.weight.grad.to_dense()
    assert_norm(fastclip.clip_grad_norm_(table.parameters(), 0.1), norm(dense))
    torch.testing.assert_close(norm(table.weight.grad.to_dense()), 0.1, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support:UserWarning")
def test_compressed_sparse_is_read(route: str) -> None:
    grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    for compressed in (grad.to_sparse_csr(), grad.to_sparse_csc()):
        assert float(fastclip.get_total_norm([compressed])) == 5.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_raise(route: str, dtype: torch.dtype) -> None:
    first, second = parameter(torch.tensor([3.0, 4.0])), parameter(torch.zeros(2, dtype=dtype))
    for work in (
        lambda: fastclip.clip_grad_norm_([first, second], 0.1),
        lambda: fastclip.clip_grad_value_([first, second], 0.1),
        lambda: fastclip.clip_grads_with_norm_([first, second], 0.1, 3.0),
        lambda: fastclip.grad_stats([first, second]),
    ):
        with pytest.raises(fastclip.UnsupportedGradientError, match=rf"parameters\[1\] \({dtype}"):
            work()
    with pytest.raises(TypeError, match=r"tensors\[1\]"):
        fastclip.get_total_norm([first.grad, second.grad])
    assert first.grad.tolist() == [3.0, 4.0]


def test_what_no_backend_serves_is_named_behind_what_one_refuses() -> None:
    """The second is refused by all, the first only by those that come before the reference."""
    with pytest.raises(
        fastclip.UnsupportedGradientError, match=r"tensors\[1\] \(torch.int32.*; reference: torch.int32"
    ):
        fastclip.get_total_norm([torch.ones(8)[::2], torch.ones(3, dtype=torch.int32)])


def test_layouts_without_numbers_raise(route: str) -> None:
    strange = [torch.ones(3).to_mkldnn(), torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)]
    for grad in strange:
        with pytest.raises(fastclip.UnsupportedGradientError, match=r"tensors\[1\]"):
            fastclip.get_total_norm([torch.ones(1), grad])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_value_clipping_of_complex_raises_as_in_torch(route: str, dtype: torch.dtype) -> None:
    params = parameters([torch.tensor([3.0]), torch.tensor([3 + 4j], dtype=dtype)])
    with pytest.raises(RuntimeError, match=r"parameters\[1\].*complex"):
        fastclip.clip_grad_value_(params, 1.0)
    with pytest.raises(RuntimeError):
        torch.nn.utils.clip_grad_value_(params[1:], 1.0)
    assert params[0].grad.tolist() == [3.0]


def test_meta_tensors_give_meta_results(route: str) -> None:
    p = parameter(torch.ones(3, device="meta"))
    for got in (
        fastclip.clip_grad_norm_([p], 1.0),
        fastclip.clip_grad_norm_([p], 1.0, INF, nonfinite="skip"),
        fastclip.clip_grad_norm_([p], 1.0, 1.0, nonfinite="zero"),
        fastclip.get_total_norm([p.grad], 3.0),
        fastclip.grad_stats([p]).total_norm,
        fastclip.grad_stats([p]).found_inf,
    ):
        assert (got.device.type, got.shape, got.dtype) == ("meta", (), torch.float32)
    assert fastclip.grad_stats([p]).nans.device.type == "meta"
    assert fastclip.clip_grad_value_([p], 1.0) is None
    for total in (3.0, torch.tensor(3.0), torch.tensor(3.0, device="meta")):
        assert fastclip.clip_grads_with_norm_([p], 1.0, total) is None
    double = parameter(torch.ones(3, device="meta", dtype=torch.float64))
    assert fastclip.get_total_norm([double.grad]).dtype == torch.float64


def test_fake_tensors_give_fake_results(route: str) -> None:
    with FakeTensorMode():
        p = parameter(torch.ones(3, dtype=torch.bfloat16))
        total = fastclip.clip_grad_norm_([p], 1.0)
        stats = fastclip.grad_stats([p])
        assert fastclip.clip_grad_value_([p], 1.0) is None
        fastclip.clip_grads_with_norm_([p], 1.0, total)
        fastclip.clip_grads_with_norm_([p], 1.0, 4.0)
    assert {type(t).__name__ for t in (total, stats.total_norm, stats.tensor_norms, stats.nans)} == {"FakeTensor"}
    assert (total.shape, total.dtype) == ((), torch.float32)


def test_gradients_passed_as_parameters_warn(route: str) -> None:
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
    for work in (
        lambda: fastclip.clip_grad_norm_(grads, 1.0),
        lambda: fastclip.clip_grad_value_(grads, 1.0),
        lambda: fastclip.clip_grads_with_norm_(grads, 1.0, 5.0),
    ):
        with pytest.warns(UserWarning, match="gradients passed where parameters are meant"):
            work()
    assert grads[0].tolist() == [3.0, 4.0]


def test_the_warning_points_at_the_caller() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastclip.clip_grad_norm_([torch.ones(2)], 1.0)
        fastclip.clip_grad_norm_((p for p in ()), 1.0)
    assert [w.filename for w in caught] == [__file__, __file__]


def test_an_empty_generator_warns_as_in_torch() -> None:
    for clip in (fastclip.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        with pytest.warns(UserWarning, match="empty generator"):
            clip((p for p in ()), 1.0)


BAD_NUMBERS = [
    ("max_norm", -1.0, ValueError),
    ("max_norm", NAN, ValueError),
    ("max_norm", -INF, ValueError),
    ("max_norm", "1.0", TypeError),
    ("max_norm", None, TypeError),
    ("max_norm", [1.0], TypeError),
    ("max_norm", torch.ones(2), TypeError),
    ("max_norm", torch.tensor(-1.0), ValueError),
    ("norm_type", "two", TypeError),
    ("norm_type", None, TypeError),
    ("norm_type", NAN, ValueError),
    ("eps", -1e-6, ValueError),
    ("eps", NAN, ValueError),
    ("eps", "x", TypeError),
    ("nonfinite", "ignore", ValueError),
    ("nonfinite", None, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_NUMBERS)
def test_bad_numbers_are_named(name: str, value: object, error: type[Exception]) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    with pytest.raises(error, match=name):
        fastclip.clip_grad_norm_([p], **{"max_norm": 1.0, name: value})
    assert p.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("value", [-1.0, NAN, "1", None, torch.ones(2)])
def test_bad_bounds_are_named(value: object) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    with pytest.raises((ValueError, TypeError), match="clip_value"):
        fastclip.clip_grad_value_([p], value)
    with pytest.raises((ValueError, TypeError), match="max_norm"):
        fastclip.clip_grads_with_norm_([p], value, 5.0)
    assert p.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("value", ["five", "5.0", None, torch.ones(2), [5.0], 1j])
def test_bad_total_norms_are_named(value: object) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    with pytest.raises((ValueError, TypeError), match="total_norm"):
        fastclip.clip_grads_with_norm_([p], 1.0, value)
    assert p.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("bad", [3.0, "abc", None, object(), [1.0], [torch.ones(1), "b"], np.ones(2)])
def test_bad_lists_are_named(bad: object) -> None:
    for work, name in (
        (lambda: fastclip.clip_grad_norm_(bad, 1.0), "parameters"),
        (lambda: fastclip.clip_grad_value_(bad, 1.0), "parameters"),
        (lambda: fastclip.clip_grads_with_norm_(bad, 1.0, 1.0), "parameters"),
        (lambda: fastclip.get_total_norm(bad), "tensors"),
    ):
        with pytest.raises(TypeError, match=name):
            work()


def test_a_module_is_not_its_parameters() -> None:
    for work in (lambda m: fastclip.clip_grad_norm_(m, 1.0), fastclip.get_total_norm):
        with pytest.raises(TypeError, match=r"module\.parameters\(\)"):
            work(torch.nn.Linear(1, 1))


def test_none_is_not_a_parameter() -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    with pytest.raises(TypeError, match="item 1 is a NoneType"):
        fastclip.clip_grad_norm_([p, None], 1.0)
    assert p.grad.tolist() == [3.0, 4.0]


SIZES = "import torch, fastclip\nprint(float(fastclip.get_total_norm([torch.tensor([3.0, 4.0])])))"


def test_a_backend_is_forced_by_name(python) -> None:
    for name in ("reference", "cpu"):
        done = python(SIZES, FASTCLIP_BACKEND=name)
        assert done.stdout.strip() == "5.0", done.stderr


def test_an_unknown_backend_raises(python) -> None:
    done = python(SIZES, FASTCLIP_BACKEND="abacus")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "BackendUnavailableError" in last
    assert all(word in last for word in ("FASTCLIP_BACKEND=abacus", "cpu", "reference"))


def test_an_unknown_capability_raises(python) -> None:
    done = python(SIZES, FASTCLIP_CPU_CAPABILITY="mmx")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "BackendUnavailableError" in last
    assert all(word in last for word in ("FASTCLIP_CPU_CAPABILITY=mmx", *C.cpu_capabilities()))


def test_a_capability_is_forced_by_name(python) -> None:
    program = SIZES + "\nfrom fastclip._native import C\nprint(C.cpu_capability())"
    done = python(program, FASTCLIP_CPU_CAPABILITY="default")
    assert done.stdout.split() == ["5.0", "default"], done.stderr


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    monkeypatch.setattr(fastclip.backends, "forced", "cpu")
    monkeypatch.setattr(fastclip.backends.cpu, "unavailable", lambda: "no compiler was found")
    with pytest.raises(fastclip.BackendUnavailableError, match=r"FASTCLIP_BACKEND=cpu.*no compiler was found"):
        fastclip.clip_grad_norm_([p], 1.0)
    monkeypatch.setattr(fastclip.backends, "forced", None)
    fastclip.clip_grad_norm_([p], 2.5)  # unforced, the next one serves
    torch.testing.assert_close(p.grad, torch.tensor([1.5, 2.0]))


def test_a_forced_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastclip.backends, "forced", "cpu")
    params = parameters([torch.tensor([3.0, 4.0]), torch.ones(8)[::2]])
    with pytest.raises(fastclip.UnsupportedGradientError, match=r"parameters\[1\].*cpu: not one dense block"):
        fastclip.clip_grad_norm_(params, 1.0)
    assert params[0].grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("after", [0, 1])
def test_what_cant_be_written_is_named_beside_what_another_backend_serves(after: int) -> None:
    grads = [torch.ones(6)[::2], torch.ones(3).to(torch.float8_e4m3fn), *[torch.ones(3)] * after]
    params = [torch.nn.Parameter(torch.zeros(3, dtype=grad.dtype), requires_grad=False) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone() if grad is not grads[0] else grad
    with pytest.raises(fastclip.UnsupportedGradientError, match=r"parameters\[1\] \(torch.float8.*8-bit"):
        fastclip.clip_grad_norm_(params, 0.1)


def test_the_norm_of_nothing_is_a_float32_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fastclip.clip_grad_norm_([], 1.0).dtype == fastclip.get_total_norm([]).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_backends_explain_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [torch.ones(3), torch.ones(8)[::2], torch.ones(8)[::2]]
    text = fastclip.backends.explain(grads)
    assert "cpu: available; serves 1 of 3 gradients; 2 not: not one dense block" in text
    assert "reference: available; serves 3 of 3" in text
    assert "cpu: available" in fastclip.backends.explain()
    monkeypatch.setattr(fastclip.backends, "forced", "abacus")
    first, *others = fastclip.backends.explain().splitlines()
    assert first.startswith("FASTCLIP_BACKEND=abacus: no such backend; known are ")
    assert "cpu: available, but FASTCLIP_BACKEND=abacus" in others


def test_numpy_numbers_are_numbers() -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    fastclip.clip_grad_norm_([p], np.float32(2.5), np.float64(2))
    torch.testing.assert_close(p.grad, torch.tensor([1.5, 2.0]))
    fastclip.clip_grads_with_norm_([p], 1.0, np.float64(2.0))
    torch.testing.assert_close(p.grad, torch.tensor([0.75, 1.0]))


def test_a_pure_read_may_read_what_it_could_not_write(route: str) -> None:
    grads = [torch.ones(1).expand(4), torch.full((4,), 2.0).to(torch.float8_e4m3fn)]
    assert float(fastclip.clip_grad_norm_(parameters(grads), INF)) == pytest.approx(math.sqrt(20))


def test_a_name_stands_for_one_tensor() -> None:
    with pytest.raises(ValueError, match=r"names: 'a' stands for more than one tensor"):
        fastclip.grad_stats([torch.ones(1), torch.ones(2)], ["a", "a"])
