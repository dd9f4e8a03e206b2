"""The table of addresses in Python is the native core's: the same tensors, refusals, pieces and partners."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import DTYPES
from torch import Tensor

from fastclip._native import C
from fastclip.backends import tables
from fastclip.backends.tables import CPU, CUDA

FACTS = ("grads", "positions", "refused", "readonly", "wide", "facts")


class Subclass(Tensor):
    pass


def tensors() -> list[Tensor]:
    """Every kind of tensor that either table has an opinion about."""
    base = torch.randn(4, 6, 5)
    lying = [
        base,
        base.permute(2, 0, 1),
        base.transpose(0, 1),
        base[:, ::2],
        base[1:, :, :],
        base[:, 1:],
        base[0, 0, 0],
        base.new_empty(0, 3),
        base[:0],
        base[:1].expand(3, 6, 5),
        base[:, :1].expand(4, 1, 5),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(7, 1, 3).as_strided((7, 1, 3), (3, 100, 1)),
        torch.randn(30).as_strided((3, 3), (2, 1)),
        torch.randn(5).flip(0),
    ]
    kinds = [torch.zeros(3, dtype=torch.float64).to(dtype) for dtype in DTYPES]
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    others = [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.bool),
        torch.nn.Parameter(torch.ones(3)),
        torch.ones(3).as_subclass(Subclass),
        torch.eye(3).to_sparse(),
        freed,
        torch.ones(3, device="meta"),
        torch.ones(3, dtype=torch.complex64).conj(),
    ]
    return [*lying, *kinds, *others]


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    if C is None:
        return
    monkeypatch.setattr(tables, "C", None)


def seen(table) -> dict[str, object]:
    facts = {name: getattr(table, name) for name in FACTS}
    # the native core words some reasons otherwise: it can't tell why a tensor shows no memory
    return {**facts, "grads": [id(grad) for grad in table.grads], "refused": list(table.refused), "length": len(table)}


@pytest.mark.parametrize("device_type", [CPU, CUDA])
def test_it_is_the_native_one(in_python: None, device_type: int) -> None:
    grads = tensors()
    assert seen(tables.table_of(grads, device_type)) == seen(C.GradTable(grads, device_type))
    served = [grad for i, grad in enumerate(grads) if i not in C.GradTable(grads, CPU).refused]
    assert seen(tables.table_of(served, device_type)) == seen(C.GradTable(served, device_type))
    assert seen(tables.table_of([], device_type)) == seen(C.GradTable([], device_type))


@pytest.mark.parametrize("odd", range(len(tensors())))
def test_one_of_another_kind_is_seen_among_plain_ones(in_python: None, odd: int) -> None:
    grads = [torch.randn(3), tensors()[odd], torch.randn(2, 2)]
    for device_type in (CPU, CUDA):
        own, native = (seen(of(grads, device_type)) for of in (tables.table_of, C.GradTable))
        assert own == native  # said without the tensors: to print freed memory is to read it


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize])
def test_one_that_functorch_wraps_is_seen_among_plain_ones(in_python: None, transform) -> None:
    first, last = torch.randn(3), torch.randn(2, 2)

    def alike(wrapped: Tensor) -> Tensor:
        own, native = (of([first, wrapped, last], CPU) for of in (tables.table_of, C.GradTable))
        assert seen(own) == seen(native)
        assert list(own.refused) == [1]
        return wrapped.sum()

    transform(alike)(torch.ones(3, 4))


def test_units_lie_in_the_same_pieces(in_python: None) -> None:
    grads = [grad for grad in C.GradTable(tensors(), CPU).grads if not grad.is_conj()]
    for masks in itertools.product(range(8), repeat=1):
        mask = [masks[0] & ((1 << grad.dim()) - 1) for grad in grads]
        assert tables.pieces(tables.table_of(grads, CPU), mask) == C.pieces(C.GradTable(grads, CPU), mask)


def test_weights_find_the_same_partners(in_python: None) -> None:
    grads = list(C.GradTable(tensors(), CPU).grads)
    for weights in (
        [grad.detach().clone() for grad in grads],
        [grad.detach().clone(memory_format=torch.contiguous_format) for grad in grads],
        [torch.zeros_like(grad, dtype=torch.float64 if grad.dtype == torch.float32 else None) for grad in grads],
        [torch.nn.Parameter(grad.detach().clone()) if grad.is_floating_point() else grad for grad in grads],
        [grad.detach().to("meta") for grad in grads],
    ):
        own, native = (
            tables.partners(tables.table_of(grads, CPU), weights),
            C.partners(C.GradTable(grads, CPU), weights),
        )
        assert (list(own.refused), own.facts, own.size_bytes) == (list(native.refused), native.facts, native.size_bytes)


@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_what_is_kept_as_its_negative_finds_no_partner(in_python: None, which: list[int]) -> None:
    pair = [torch.randn(3), torch.randn(3)]
    for i in which:
        pair[i] = torch._neg_view(pair[i])
    own = tables.partners(tables.table_of(pair[:1], CPU), pair[1:])
    native = C.partners(C.GradTable(pair[:1], CPU), pair[1:])
    assert list(own.refused) == list(native.refused) == [0]
    assert own.facts == native.facts


def test_equal_facts_mean_the_same_places() -> None:
    grad = torch.randn(8)
    facts = tables.table_of([grad, grad[2:]], CPU).facts
    assert facts == tables.table_of([grad, grad[2:]], CPU).facts
    assert facts != tables.table_of([grad, grad[1:-1]], CPU).facts
    assert facts != tables.table_of([grad.view(torch.int32).view(torch.float32), grad[2:7]], CPU).facts
