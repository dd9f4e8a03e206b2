"""What is CUDA's own: launches, chunks and units, the workspace, and memory that is refused.

On a GPU where there is one; else through the emulation (``make emulator``), where every thread is a fiber.
"""

from __future__ import annotations

import pytest
import torch
from gpu import (
    CHUNK_BYTES,
    POISON,
    SHORT_BYTES,
    all_filled,
    chunk,
    close,
    device,
    in_any_order,
    of_reference,
    penalise,
    poisoned,
    read,
    some,
    some_rows,
    use,
)
from oracle import INF, NAN, bits
from torch import Tensor

from fastclip._native import C
from fastclip.backends import cuda, reference
from fastclip.types import ALWAYS_FIELDS, Request

WHY_NOT = cuda.unavailable()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"needs a GPU, or a build with FASTCLIP_CUDA=emulated: {WHY_NOT}")


@pytest.fixture(autouse=True)
def kernels() -> None:
    use(cuda)


# As csrc/cuda/table.h has them; test_chunks_are_cut_where_these_tests_think holds it.
PARAMETER_BYTES = getattr(C, "cuda_parameter_bytes", 32764) - 160
TENSORS_OF_A_LAUNCH, PAIRS_OF_A_LAUNCH = PARAMETER_BYTES // 27 // 8 * 8, PARAMETER_BYTES // 35 // 8 * 8
JOINS_OF_A_LAUNCH = PARAMETER_BYTES // 8
PIECES_OF_WARP = 1024

SIZES = (3, 70_001, 20_000, 0, 16_384, 16_385, 1, 8_191)  # with float32 that is 14 chunks


def test_chunks_are_cut_where_these_tests_think() -> None:
    """A slot of three float64 numbers for each chunk, behind the counters."""

    def chunks(size: int, units: int = 1) -> int:
        table = cuda.table_of([torch.empty(size, device=device())])
        return (C.cuda_workspace(table, [units], False, False)[0] - 2) // 3

    one = CHUNK_BYTES // 4
    assert [chunks(size) for size in (0, 1, one, one + 1, 2 * one, 2 * one + 1)] == [1, 1, 1, 2, 2, 3]
    most = SHORT_BYTES // 4
    assert chunks(most * 64, 64) == 64 // 8 + 1
    assert chunks((most + 1) * 64, 64) == 64


# ---- the order of threads and blocks


@pytest.mark.parametrize("extras", [False, True])
def test_order_changes_no_bit_of_several_launches(extras: bool) -> None:
    """More tensors than one or two launches take, and the totals of all in the last."""
    sizes = torch.randint(0, 9, ((1 if extras else 2) * TENSORS_OF_A_LAUNCH + 3,)).tolist()
    sizes[7], sizes[TENSORS_OF_A_LAUNCH], sizes[-1] = 40_000, 40_000, 40_000
    grads, request = some(*sizes), Request(extras=extras, max_norm=0.5)
    found = in_any_order(lambda: list(read(grads, request)), (0, 5))
    for got, want in zip(found, of_reference(grads, request), strict=True):
        close(got, want, 2e-7)


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_many_pieces_are_joined_by_the_whole_block(p: float) -> None:
    """Between tensors of few pieces, each of which is one warp's."""
    one, dtype = chunk(torch.float64), torch.float64
    grads = [
        torch.zeros(pieces * one + 1, dtype=dtype, device=device())
        for pieces in (2, PIECES_OF_WARP, PIECES_OF_WARP, 1, 255, 3)
    ]
    for i, grad in enumerate(grads):
        grad[:: one // 2] = torch.arange(1.0, len(grad[:: one // 2]) + 1, dtype=dtype, device=device()) + i
        grad[-1] = 5.0
    request = Request(p, extras=p != 2.0)
    found = in_any_order(lambda: list(read(grads, request)), (0, 3))
    for got, want in zip(found, of_reference(grads, request), strict=True):
        close(got, want, 2e-7)


def test_order_changes_no_bit_of_penalties_in_several_launches() -> None:
    sizes = torch.randint(0, 9, (PAIRS_OF_A_LAUNCH + 3,)).tolist()
    sizes[7], sizes[PAIRS_OF_A_LAUNCH], sizes[-1] = 20_000, 20_000, 20_000
    grads, weights = some(*sizes), some(*sizes)
    strengths = torch.rand(2, len(sizes), dtype=torch.float64).to(device())
    rows, weight_rows, *own = in_any_order(lambda: penalise(grads, weights, strengths), (0, 5))
    for got, grad, weight, of_sign, of_weight in zip(own, grads, weights, *strengths.float(), strict=True):
        torch.testing.assert_close(got, grad + of_sign * weight.sign() + of_weight * weight)
    assert torch.equal(rows, read(own)[0])
    close(weight_rows, of_reference(weights, Request(extras=True))[0][[0, 3, 4]])


def test_weights_that_lie_otherwise_in_several_launches() -> None:
    """Each launch leaves out its own: others in the first one than in the second."""
    count = PAIRS_OF_A_LAUNCH + 3
    grads = [torch.ones(2, 3, device=device()) for _ in range(count)]
    weights = [torch.full((2, 3), i + 0.5, device=device()) for i in range(count)]
    for i in (0, PAIRS_OF_A_LAUNCH + 1):
        weights[i] = weights[i].t().contiguous().t()
    strengths = torch.ones(2, count, dtype=torch.float64, device=device())
    rows, weight_rows, *own = penalise(grads, weights, strengths)
    for i, grad in enumerate(own):
        assert grad.tolist() == [[i + 2.5] * 3] * 2
    close(rows[0], torch.arange(2.5, count + 2, dtype=torch.float64, device=device()) * 6**0.5)
    close(weight_rows[1], torch.arange(0.5, count, dtype=torch.float64, device=device()))


def test_joins_in_several_launches() -> None:
    counts = [i % 3 for i in range(JOINS_OF_A_LAUNCH + 30)]
    unit_rows = some_rows(sum(counts), bad=0.01)
    rows, want = poisoned(ALWAYS_FIELDS, len(counts)), poisoned(ALWAYS_FIELDS, len(counts))
    cuda.join_units(unit_rows, counts, Request(), rows)
    reference.join_units(unit_rows, counts, Request(), want)
    close(rows, want, 1e-12)


def test_writes_in_several_launches() -> None:
    grads = some(*([2] * (TENSORS_OF_A_LAUNCH + 5)))
    factors = torch.arange(1.0, len(grads) + 1, dtype=torch.float64).to(device())
    before = torch.stack(grads)
    cuda.scale_(cuda.table_of(grads), factors)
    assert torch.equal(torch.stack(grads), before * factors.float()[:, None])
    cuda.scale_(cuda.table_of(grads), 0.5)
    assert torch.equal(torch.stack(grads), before * factors.float()[:, None] * 0.5)


def test_bytes_past_32_bits() -> None:
    """What nobody has written is 0, and stays as it is."""
    grad = torch.zeros(2**29 + 7, dtype=torch.float64, device=device())
    grad[3], grad[-1] = 3.0, 4.0
    cuda.scale_(cuda.table_of([grad]), 0.5)
    assert [float(grad[3]), float(grad[-1])] == [1.5, 2.0]


# ---- addresses


def test_a_fresh_workspace_may_hold_anything() -> None:
    """As one from a graph's pool does."""
    grads = some(*SIZES)
    rows, totals, heads = read(grads, Request(max_norm=0.5))
    table = cuda.table_of(grads)
    for garbage in (255, 1):
        workspace = torch.full((8192,), garbage, dtype=torch.uint8, device=device()).view(torch.float64)
        found = poisoned(ALWAYS_FIELDS, len(grads)), poisoned(4), poisoned(2, dtype=torch.float32)
        C.cuda_read(table, [], 2.0, False, 1.0, *found, 0.5, 1e-6, workspace, True)
        assert all(torch.equal(a, b) for a, b in zip(found, (rows, totals, heads), strict=True))
        assert workspace.view(torch.int32)[:2].tolist() == [0, 0]
        again = poisoned(ALWAYS_FIELDS, len(grads))  # by now it isn't fresh any more
        C.cuda_read(table, [], 2.0, False, 1.0, again, None, None, INF, 0.0, workspace, False)
        assert torch.equal(again, rows)
        strengths, weight_rows = (
            torch.zeros(2, len(grads), dtype=torch.float64, device=device()),
            poisoned(3, len(grads)),
        )
        workspace = torch.full((8192,), garbage, dtype=torch.uint8, device=device()).view(torch.float64)
        partners = C.partners(table, grads)
        C.cuda_read_penalised(table, partners, strengths, 2.0, False, again, weight_rows, workspace, True)
        assert torch.equal(again, rows)
        assert workspace.view(torch.int32)[:2].tolist() == [0, 0]
        all_filled(weight_rows)


@pytest.mark.parametrize("extras", [False, True])
def test_a_read_stays_inside_the_workspace_it_asked_for(extras: bool) -> None:
    grads, weights = some(*SIZES, 100_000), some(*SIZES, 100_000)
    table = cuda.table_of(grads)
    units = [1, 1, 20_000, 1, 8, 5, 1, 8191, 4]
    strengths = torch.ones(2, len(grads), dtype=torch.float64, device=device())
    for of, penalised in (([], False), (units, False), ([], True)):
        size, _, _ = C.cuda_workspace(table, of, extras, penalised)
        memory = poisoned(size + 100)
        memory[: size + 0] = 0.0
        rows = poisoned(6 if extras else 3, sum(of) or len(grads))
        if penalised:
            weight_rows = poisoned(3, len(grads))
            partners = C.partners(table, weights)
            C.cuda_read_penalised(table, partners, strengths, 2.0, extras, rows, weight_rows, memory[:size], False)
            all_filled(weight_rows)
        else:
            C.cuda_read(table, of, 2.0, extras, 1.0, rows, None, None, 0.0, 0.0, memory[:size], False)
        all_filled(rows)
        assert bool((memory[size:] == POISON).all())
        with pytest.raises(ValueError, match="too small"):
            C.cuda_read(table, of, 2.0, extras, 1.0, rows, None, None, 0.0, 0.0, memory[: size // 3], False)


def test_wrong_memory_is_refused_before_anything_is_launched() -> None:
    grads = some(5, 40_000, 9)
    grads[1][3] = NAN
    before, table = [bits(grad).clone() for grad in grads], cuda.table_of(grads)
    workspace = torch.zeros(1000, dtype=torch.float64, device=device())
    rows, totals, heads = poisoned(3, 3), poisoned(4), poisoned(2, dtype=torch.float32)
    good = [table, [], 2.0, False, 1.0, rows, totals, heads, 0.5, 1e-6, workspace, False]
    meta = torch.empty(3, 3, dtype=torch.float64, device="meta")
    bad = [
        *((5, wrong) for wrong in (rows.float(), rows[:2], rows.repeat(2, 1), rows[:, :2], meta, rows.to_sparse())),
        *((6, wrong) for wrong in (totals.float(), totals[:3], poisoned(5), poisoned(8)[::2], meta)),
        *((7, wrong) for wrong in (heads.double(), heads[:1], poisoned(3, dtype=torch.float32), meta)),
        *((4, wrong) for wrong in (totals[:2], heads[0].half(), meta[0, 0], "4", torch.tensor(4, device=device()))),
        *((1, wrong) for wrong in ([1, 1], [1, 3, 1], [-1, 1, 1], [1, 1, 1, 1])),
        *((10, wrong) for wrong in (workspace[:2], workspace.float(), workspace[::2], meta, None)),
    ]
    if not cuda.EMULATED:
        bad += [(at, good[at].cpu()) for at in (5, 6, 7, 10)]
    for at, wrong in bad:
        if isinstance(wrong, Tensor) and wrong.dtype == torch.float64 and wrong.device.type == device():
            wrong = wrong.clone() if wrong.layout != torch.strided or wrong.is_contiguous() else wrong
        arguments = [*good]
        arguments[at] = wrong
        with pytest.raises((TypeError, ValueError, AttributeError)):
            C.cuda_read(*arguments)
    three = torch.full((3,), 2.0, dtype=torch.float64, device=device())
    for factors in (three[:2], three.float(), three.repeat(2)[::2], torch.empty(3, dtype=torch.float64, device="meta")):
        with pytest.raises((TypeError, ValueError)):
            C.cuda_scale_each(table, [], factors, None)
    for factor in (three, three.half()[0], torch.empty((), device="meta")):
        with pytest.raises((TypeError, ValueError)):
            C.cuda_scale(table, factor, None)
        for told in ((factor, 0.0, 0.0), (1.0, factor, 0.0), (1.0, 0.0, factor)):
            with pytest.raises((TypeError, ValueError)):
                C.cuda_tally(poisoned(5), *told, poisoned(5))
    with pytest.raises(ValueError, match="units"):
        C.cuda_scale_each(table, [5, 3, 3], three, None)
    for skip in (three[0], three.bool()[0], three.float(), torch.empty((), device="meta"), 1.0):
        for write in (
            lambda skip=skip: C.cuda_scale(table, 0.5, skip),
            lambda skip=skip: C.cuda_scale_each(table, [], three, skip),
            lambda skip=skip: C.cuda_clamp(table, 0.5, skip),
        ):
            with pytest.raises((TypeError, ValueError)):
                write()
    for counts in (poisoned(4), poisoned(5).float(), poisoned(10)[::2], None):
        for given in ((counts, poisoned(5)), (poisoned(5), counts)):
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                C.cuda_tally(given[0], 1.0, 0.0, 0.0, given[1])
    strengths, weight_rows = poisoned(2, 3), poisoned(3, 3)
    partners = C.partners(table, [grad.clone() for grad in grads])
    for wrong in (
        (partners, strengths[:1], rows, weight_rows, workspace),
        (partners, strengths.float(), rows, weight_rows, workspace),
        (partners, strengths, rows[:2], weight_rows, workspace),
        (partners, strengths, rows, weight_rows[:2], workspace),
        (partners, strengths, rows, weight_rows, workspace[:2]),
        (cuda.table_of(grads[:2]), strengths, rows, weight_rows, workspace),
    ):
        weights, given, *memory = wrong
        with pytest.raises((TypeError, ValueError)):
            C.cuda_read_penalised(table, weights, given, 2.0, False, *memory, False)
    with pytest.raises(ValueError, match="numbers"):
        C.cuda_join(poisoned(3, 5), [2, 1], 2.0, poisoned(3, 2))
    with pytest.raises(ValueError, match="numbers"):
        C.cuda_join(poisoned(3, 3), [2, 1], 2.0, poisoned(3, 3))
    for of_rows, fields, of_totals, of_heads in (
        (rows, 3, totals[:3], heads),
        (rows, 3, totals, heads.double()),
        (rows, 6, totals, heads),
        (rows[:2], 2, totals, heads),
    ):
        with pytest.raises(ValueError, match=r"field|numbers"):
            C.cuda_finish(of_rows, fields, 3, 2.0, 1.0, 0.0, of_totals, of_heads)
    assert bool((torch.cat([rows.flatten(), totals, heads, weight_rows.flatten()]) == POISON).all())
    assert not workspace.any()
    assert all(torch.equal(bits(grad), old) for grad, old in zip(grads, before, strict=True))
    C.cuda_read(*good)
    all_filled(rows, totals, heads)


# ---- by the environment
