"""What every kernel of a GPU must do: the same bits in any order and at any address, memory filled, faults told apart.

On a GPU where there is one; else emulated: CUDA's through fibers (``make emulator``), Triton's in its interpreter
(``make interpreter``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import gpu
import pytest
import torch
from forbidden import SKIPS, TOLD, WRITES, Given, check_tally, check_write
from gpu import (
    CHUNK_BYTES,
    POISON,
    SHORT_BYTES,
    all_filled,
    chunk,
    close,
    in_any_order,
    of_reference,
    penalise,
    poisoned,
    read,
    read_units,
    some,
)
from oracle import COMPLEX, DTYPES, FLOAT8, HALVES, INF, NAN, WRITABLE, bits, coef, norm, randn, rounded
from torch import Tensor

from fastclip.backends import BACKENDS, reference
from fastclip.types import ALWAYS_FIELDS, TOTALS, WEIGHT_FIELDS, Request

pytestmark = pytest.mark.skipif(not gpu.RUNNABLE, reason=f"needs a GPU, or its emulation: {gpu.WHY_NOT}")


@pytest.fixture(params=gpu.RUNNABLE, ids=lambda backend: backend.name, autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    gpu.use(request.param)


SIZES = (3, 70_001, 20_000, 0, 16_384, 16_385, 1, 8_191)  # with float32 that is 14 chunks
REQUESTS = (Request(), Request(extras=True), Request(3.0), Request(1.0, extras=True, max_norm=0.5), Request(-INF))


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
def test_order_changes_no_bit_of_a_read(request_: Request, dtype: torch.dtype) -> None:
    grads = some(*SIZES, dtype=dtype)
    found = in_any_order(lambda: list(read(grads, request_)))
    for got, want in zip(found, of_reference(grads, request_), strict=True):
        close(got, want, 2e-7)


UNITS = [  # (elements of a unit, how many): around vectors, warps, chunks; then units in pieces
    *((size, 40) for size in (1, 2, 3, 4, 5, 31, 127, 129)),
    *((SHORT_BYTES // 4, count) for count in (7, 8, 9, 17)),
    *((SHORT_BYTES // 4 - 1, 9), (SHORT_BYTES // 4 + 1, 5)),
    *((CHUNK_BYTES // 4 + more, 2) for more in (-1, 0, 1)),
    (CHUNK_BYTES // 4 * 3, 2),
]


@pytest.mark.parametrize("request_", [Request(), Request(3.0), Request(1.0)], ids=str)
def test_order_changes_no_bit_of_units(request_: Request) -> None:
    grads = [randn(count, size).to(gpu.device()) for size, count in UNITS]
    rows = torch.cat([of_reference(list(grad), request_)[0] for grad in grads], dim=1)
    (found,) = in_any_order(lambda: [read_units(grads, request_)], (0, 1, 2))
    close(found, rows)


@pytest.mark.parametrize("more", [-1, 0, 1, 8])
def test_a_chunk_of_the_smallest_units(more: int) -> None:
    """As many units as a chunk takes, and around it."""
    size = 64
    grad = randn(CHUNK_BYTES // 4 // size + more, size).to(gpu.device())
    found = read_units([grad])
    close(found[0], grad.double().norm(dim=1))
    assert not found[1:].any()


@pytest.mark.parametrize("request_", [Request(), Request(3.0, extras=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_changes_no_bit_of_a_penalty(request_: Request, dtype: torch.dtype) -> None:
    grads, weights = some(*SIZES, dtype=dtype), some(*SIZES, dtype=dtype)
    strengths = torch.rand(2, len(SIZES), dtype=torch.float64).to(gpu.device())
    strengths[:, 2] = 0.0
    rows, weight_rows, *own = in_any_order(lambda: penalise(grads, weights, strengths, request_))
    assert torch.equal(rows, read(own, request_)[0])
    close(weight_rows, of_reference(weights, Request(extras=True))[0][[0, 3, 4]])


@pytest.mark.parametrize("bad", [0.0, 0.01, 0.5])
@pytest.mark.parametrize(
    ("p", "scale"),
    [(2.0, 1.0), (2.0, 1e200), (2.0, 1e-157), (2.0, 1e-200), (1.0, 1.0), (3.0, 1.0), (INF, 1.0), (-1.0, 1.0)],
)
def test_order_changes_no_bit_of_finish_and_join(p: float, scale: float, bad: float) -> None:
    counts = [0, 1, 2, 300, 0, 1000, 31, 32, 33, *[1] * 20]
    unit_rows = gpu.some_rows(sum(counts), p, bad)
    unit_rows[0] *= scale

    def work() -> list[Tensor]:
        rows, totals, heads = poisoned(ALWAYS_FIELDS, len(counts)), poisoned(4), poisoned(2, dtype=torch.float32)
        gpu.kernels.join_units(unit_rows, counts, Request(p), rows)
        gpu.kernels.finish(unit_rows, Request(p, max_norm=0.5), totals, heads)
        all_filled(rows, totals, heads)
        return [rows, totals, heads]

    wanted = [poisoned(ALWAYS_FIELDS, len(counts)), poisoned(4), poisoned(2, dtype=torch.float32)]
    reference.join_units(unit_rows, counts, Request(p), wanted[0])
    reference.finish(unit_rows, Request(p, max_norm=0.5), *wanted[1:])
    for got, want in zip(in_any_order(work), wanted, strict=True):
        close(got, want, 1e-6 if got.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_order_changes_no_bit_of_a_write(dtype: torch.dtype) -> None:
    grads, units = (
        some(*SIZES, dtype=dtype),
        [randn(count, size, dtype=dtype).to(gpu.device()) for size, count in UNITS],
    )
    factors = torch.rand(len(SIZES), dtype=torch.float64).to(gpu.device())
    counts = [count for _, count in UNITS]
    of_units = torch.rand(sum(counts), dtype=torch.float64).to(gpu.device())

    def work() -> list[Tensor]:
        copies = [[grad.clone() for grad in grads] for _ in range(4)]
        gpu.kernels.scale_(gpu.kernels.table_of(copies[0]), 0.3)
        gpu.kernels.scale_(gpu.kernels.table_of(copies[1]), factors)
        gpu.kernels.clamp_(gpu.kernels.table_of(copies[2]), 0.5) if dtype not in COMPLEX else None
        copies[3][1][::7] = NAN
        gpu.kernels.zero_nonfinite_(gpu.kernels.table_of(copies[3]))
        own = [grad.clone() for grad in units]
        gpu.kernels.scale_units_(gpu.kernels.table_of(own), [(1,)] * len(own), of_units)
        return [*itertools.chain(*copies), *own]

    seeds = (0, 1, 2) if dtype in (torch.float32, torch.bfloat16) else (0,)
    written = iter(in_any_order(work, seeds))
    wide = torch.complex128 if dtype in COMPLEX else torch.float64
    far = {"rtol": max(2e-7, torch.finfo(dtype).eps / 2) if wide != dtype else 0, "atol": torch.finfo(dtype).tiny}
    for grad in grads:
        torch.testing.assert_close(next(written).to(wide), grad.to(wide) * 0.3, **far)
    for grad, factor in zip(grads, factors, strict=True):
        torch.testing.assert_close(next(written).to(wide), grad.to(wide) * factor, **far)
    for grad in grads:
        got = next(written)
        assert torch.equal(got, grad.clamp(-0.5, 0.5) if dtype not in COMPLEX else grad)
    for i, grad in enumerate(grads):
        got, want = next(written), grad.clone()
        if i == 1:
            want[::7] = 0
        assert torch.equal(got, want)
    for grad, each in zip(units, torch.split(of_units, counts), strict=True):
        torch.testing.assert_close(next(written).to(wide), grad.to(wide) * each[:, None], **far)


FILLER = 0xAA


def at_every_address(x: Tensor, after: int = 0) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The same numbers, whose first byte lies 0, 1, ..., 15 bytes after a multiple of 16: whole elements on a GPU.

    Their memory ends ``after`` bytes after them: without any, AddressSanitizer sees who looks further.
    -> (them, the memory they lie in, where their first byte does).
    """
    raw = x.contiguous().view(torch.uint8)
    for offset in range(0, 16, 1 if gpu.emulated() else min(16, x.element_size())):
        memory = torch.full((offset + len(raw) + after,), FILLER, dtype=torch.uint8, device=gpu.device())
        assert memory.data_ptr() % 16 == 0
        memory[offset : offset + len(raw)] = raw
        if gpu.emulated():  # PyTorch's own views begin at multiples of an element
            yield torch.frombuffer(memory.numpy(), dtype=x.dtype, count=len(x), offset=offset), memory, offset
        else:
            yield memory[offset : offset + len(raw)].view(x.dtype), memory, offset


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("request_", [Request(), Request(1.0, extras=True)], ids=str)
def test_the_same_numbers_anywhere_in_memory_give_the_same_bits(dtype: torch.dtype, request_: Request) -> None:
    for size in (1, 2, 3, 7, 17, 33, 4097, chunk(dtype) + 5):
        x = randn(size, dtype=dtype).to(gpu.device())
        rows = read([grad for grad, *_ in at_every_address(x)], request_)[0]
        assert bool((rows == rows[:, :1]).all())
        close(rows[:, :1], of_reference([x], request_)[0])


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_writes_reach_the_same_numbers_anywhere_in_memory(dtype: torch.dtype) -> None:
    for size in (1, 2, 3, 7, 17, 33, 1025):
        x, w = randn(size, dtype=dtype).to(gpu.device()), randn(size, dtype=dtype).to(gpu.device())
        wanted: list[Tensor] = []
        nan = torch.tensor([NAN], dtype=dtype, device=gpu.device()).view(torch.uint8)
        weights = [weight for weight, *_ in at_every_address(w)]
        for (grad, memory, begin), weight in zip(at_every_address(x, 48), reversed(weights), strict=True):
            table, own = (
                gpu.kernels.table_of([grad]),
                memory[begin : begin + size * dtype.itemsize],
            )  # PyTorch looks at bytes
            gpu.kernels.scale_(table, 0.7)
            found = [own.clone()]
            if dtype not in COMPLEX:
                strengths = torch.tensor([[0.1], [0.2]], dtype=torch.float64, device=gpu.device())
                rows, weight_rows = poisoned(ALWAYS_FIELDS, 1), poisoned(len(WEIGHT_FIELDS), 1)
                gpu.kernels.read_penalised_(table, [weight], strengths, Request(), rows, weight_rows)
                found += [own.clone(), rows, weight_rows]
                gpu.kernels.clamp_(table, 0.5)
                found.append(own.clone())
            own[size // 2 * dtype.itemsize :][: dtype.itemsize] = nan
            gpu.kernels.zero_nonfinite_(table)
            found.append(own.clone())
            wanted = wanted or found
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            own.fill_(FILLER)
            assert bool((memory == FILLER).all())  # nothing around it was touched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_neighbours_change_no_bit(dtype: torch.dtype) -> None:
    grads, weights = some(*SIZES[:6], dtype=dtype), some(*SIZES[:6], dtype=dtype)
    strengths = torch.rand(2, 6, dtype=torch.float64).to(gpu.device())
    rows, (own_rows, weight_rows, *own) = read(grads)[0], penalise(grads, weights, strengths)
    for order in ([5, 4, 3, 2, 1, 0], [1], [3, 1], [2, 0, 4]):
        assert torch.equal(read([grads[i] for i in order])[0], rows[:, order])
        some_strengths = strengths[:, order].contiguous()
        alone = penalise([grads[i] for i in order], [weights[i] for i in order], some_strengths)
        assert torch.equal(alone[0], own_rows[:, order])
        assert torch.equal(alone[1], weight_rows[:, order])
        assert all(torch.equal(a, own[i]) for a, i in zip(alone[2:], order, strict=True))


@pytest.mark.parametrize("request_", [Request(), Request(1.0, extras=True)], ids=str)
def test_dtypes_share_a_launch(request_: Request) -> None:
    """Of each the same bits as alone, read and written."""
    grads = [randn(size, dtype=dtype).to(gpu.device()) for size in (chunk(torch.float64) + 3, 5) for dtype in DTYPES]
    rows, totals, _ = read(grads, request_)
    for i, grad in enumerate(grads):
        assert torch.equal(bits(rows[:, i]), bits(read([grad], request_)[0][:, 0]))
    assert totals[0].item() == pytest.approx(norm(grads, request_.norm_type), rel=1e-6)

    own = [grad.clone() for grad in grads if grad.dtype in WRITABLE]
    apart = [grad.clone() for grad in own]
    factors = torch.rand(len(own), dtype=torch.float64, device=gpu.device())
    gpu.kernels.scale_(gpu.kernels.table_of(own), factors)
    for grad, factor in zip(apart, factors, strict=True):
        gpu.kernels.scale_(gpu.kernels.table_of([grad]), factor.reshape(1))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(own, apart, strict=True))


# ---- memory that must be filled, and memory that is only borrowed


def test_nothing_at_all() -> None:
    """An empty list, and one of empty tensors."""
    for grads in ([], [torch.zeros(0, 3, device=gpu.device())] * 2):
        for request in (Request(max_norm=0.5), Request(1.0, extras=True, max_norm=0.0), Request(-1.0)):
            rows, totals, heads = read(grads, request)
            empty = INF if request.norm_type < 0 else 0.0
            assert rows[0].tolist() == [empty] * len(grads)
            assert not rows[1:].any()
            assert totals[2:].tolist() == [0.0, 0.0]
            assert totals[0].item() == heads[0].item() == (empty if grads else 0.0)
        table = gpu.kernels.table_of(grads)
        gpu.kernels.scale_(table, 0.5)
        gpu.kernels.clamp_(table, 0.5)
        gpu.kernels.zero_nonfinite_(table)
        gpu.kernels.scale_(table, torch.ones(len(grads), dtype=torch.float64, device=gpu.device()))
        penalise(grads, grads, torch.ones(2, len(grads), dtype=torch.float64, device=gpu.device()))
        unit_rows = poisoned(ALWAYS_FIELDS, 0)
        gpu.kernels.read_units(table, [], Request(), unit_rows) if not grads else None
        gpu.kernels.join_units(unit_rows, [0] * len(grads), Request(), rows := poisoned(ALWAYS_FIELDS, len(grads)))
        assert not rows.any()


# ---- NaN, Inf, overflow and underflow


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("request_", [Request(), Request(3.0, extras=True)], ids=str)
def test_faults_are_told_apart_wherever_they_are(dtype: torch.dtype, request_: Request) -> None:
    one, info = chunk(dtype), torch.finfo(dtype)
    # of the last one the square is a subnormal number in the type in which it is summed
    faults = [
        NAN,
        INF,
        -INF,
        info.max,
        info.tiny,
        info.smallest_normal * info.eps,
        1e-22 if info.max < 1e50 else 1e-161,
    ]
    faults = faults if dtype not in FLOAT8 else [NAN, info.max, info.tiny]
    grads = []
    for spot, fault, rest in itertools.product((0, 1, one // 2, one - 1, one, one + 2), faults, (0.0, 0.5)):
        values = torch.full((one + 3,), rest, dtype=torch.float64)
        values[spot] = fault
        grads.append((values * 1j if dtype in COMPLEX and spot % 2 else values).to(dtype).to(gpu.device()))
    grads += [
        torch.zeros(one + 3, dtype=dtype, device=gpu.device()),
        (-torch.zeros(one + 3)).to(dtype).to(gpu.device()),
    ]
    rows, wanted = read(grads, request_)[0], of_reference(grads, request_)[0]
    close(rows, wanted)
    assert rows[0, -2:].tolist() == [0.0, 0.0]
    if dtype not in COMPLEX:
        assert rows[1].tolist() == [float(grad.float().isnan().sum()) for grad in grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_is_not_taken_for_zero(dtype: torch.dtype) -> None:
    """Wherever it is in the 16 bytes that a thread reads at a time; but the sign is no number."""
    codes = torch.zeros(128, 16, dtype=torch.uint8)
    codes[torch.arange(128), torch.arange(128) // 8] = 1 << (torch.arange(128) % 8).to(torch.uint8)
    grads = list(codes.view(dtype).to(gpu.device()))
    rows = read(grads)[0]
    close(rows, of_reference(grads, Request())[0])
    wide = dtype.to_real() if dtype in COMPLEX else dtype
    signs = [number for number in range(128) if (number + 1) % (8 * wide.itemsize) == 0]
    zeros = (rows[0] == 0).nonzero().flatten().tolist()
    assert zeros == ([] if "fnuz" in str(dtype) else signs)


@pytest.mark.parametrize("request_", [Request(), Request(3.0)], ids=str)
@pytest.mark.parametrize("size", [3, 100, SHORT_BYTES // 4 + 1, CHUNK_BYTES // 4 + 1])
def test_faults_in_units(request_: Request, size: int) -> None:
    grad = torch.full((12, size), 0.5)
    for unit, fault in ((1, NAN), (2, INF), (4, 3e38), (5, 1e-40), (6, 0.0)):
        grad[unit] = 0.0 if unit > 4 else 0.5
        grad[unit, unit % size] = fault
    grad[7, 0], grad[7, -1] = INF, NAN
    grad[8] = -0.0
    found = read_units([grad.to(gpu.device())], request_)
    close(found, of_reference(list(grad.to(gpu.device())), request_)[0])
    assert found[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert found[2].tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("fault", [NAN, INF, 3e38, 1e-40])
def test_a_row_changes_no_bit_of_its_neighbours(fault: float) -> None:
    """Though one program reads them side by side, and some a second time."""
    grad = randn(12, 100)
    before = read_units([grad.to(gpu.device())])
    grad[5] = fault
    found = read_units([grad.to(gpu.device())])
    others = [row for row in range(12) if row != 5]
    assert torch.equal(found[:, others], before[:, others])
    close(found[:, 5:6], of_reference([grad[5].to(gpu.device())], Request())[0])


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0])
@pytest.mark.parametrize("value", [1e200, 1e-200, 5e-324, 1.7e308])
def test_norms_of_pieces_join_without_overflow(value: float, p: float) -> None:
    one = chunk(torch.float64)
    grad = torch.zeros(3 * one, dtype=torch.float64)
    grad[[0, one, 2 * one]] = value
    rows, totals, heads = read([grad.to(gpu.device())] * 2, Request(p, max_norm=1.0))
    assert rows[0].tolist() == [pytest.approx(min(norm(grad, p), 1.7976931348623157e308), rel=1e-12)] * 2
    assert totals[0].item() == pytest.approx(norm([grad] * 2, p), rel=1e-12)
    assert totals[2:].tolist() == [0.0, 0.0]
    assert heads[1].item() == 0.0
    assert heads[0].item() == (torch.finfo(torch.float32).max if value > 1 else 0.0)


@pytest.mark.parametrize("spots", [(0, 1), (0, -1)])
@pytest.mark.parametrize("fault", [0.0, INF])
def test_sums_of_finite_numbers_are_finite(spots: tuple[int, int], fault: float) -> None:
    """Of one piece, and of two; an Inf is told from what is past the largest number."""
    grad = torch.zeros(2 * chunk(torch.float64), dtype=torch.float64)
    grad[list(spots)], grad[2] = 1.7e308, fault
    rows, totals, _ = read([grad.to(gpu.device())], Request(1.0))
    assert rows[0].item() == totals[0].item() == (fault or torch.finfo(torch.float64).max)
    totals = read([half.to(gpu.device()) for half in grad.chunk(2)], Request(1.0))[1]
    assert totals[0].item() == (fault or torch.finfo(torch.float64).max)


# ---- what only the device knows


SCALES = [
    *(4.0, torch.tensor(4.0), torch.tensor([4.0]), torch.tensor(4.0, dtype=torch.float64)),
    *(torch.tensor(3), torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor(1e-3, dtype=torch.float64)),
]


@pytest.mark.parametrize("grad_scale", SCALES, ids=str)
@pytest.mark.parametrize("request_", [*REQUESTS, Request(0.0, extras=True)], ids=str)
def test_a_read_divides_by_the_scale(request_: Request, grad_scale: float | Tensor) -> None:
    """Norms and magnitudes; counts have no scale."""
    grads = some(5, 40_000, 9)
    grads[0][1] = 0.0
    grads[2][3] = INF
    own = grad_scale.to(gpu.device()) if isinstance(grad_scale, Tensor) else grad_scale
    for got, want in zip(read(grads, request_, own), of_reference(grads, request_, own), strict=True):
        close(got, want, 2e-7)
    plain = read(grads, request_)[0]
    assert torch.equal(read(grads, request_, own)[0][1:3], plain[1:3])


@pytest.mark.parametrize("max_norm", [0.0, 1e-6, 1.0, 1e9, INF])
@pytest.mark.parametrize("fault", [0.0, NAN, INF, 3e38])
def test_totals_and_heads_are_those_of_the_contract(max_norm: float, fault: float) -> None:
    grads = some(5, 40_000, 9)
    grads[1][30_000] = grads[2][3] = fault
    rows, totals, heads = read(grads, Request(max_norm=max_norm))
    want = norm([grad.cpu() for grad in grads])
    close(totals[0], torch.tensor(want, dtype=torch.float64, device=gpu.device()))
    total = float(totals[0])
    assert float(totals[1]) == pytest.approx(coef(total, max_norm), rel=0, abs=0, nan_ok=True)
    assert totals[2:].tolist() == rows[1:3].sum(1).tolist()
    assert heads[1].item() == float(fault in (INF,) or math.isnan(fault))
    assert heads[0].item() == pytest.approx(min(want, 3.4028234663852886e38) if want != INF else INF, nan_ok=True)
    again, again_heads = poisoned(len(TOTALS)), poisoned(2, dtype=torch.float32)
    gpu.kernels.finish(rows, Request(max_norm=max_norm), again, again_heads)
    assert torch.equal(again.nan_to_num(7.5), totals.nan_to_num(7.5))
    assert torch.equal(again_heads.nan_to_num(7.5), heads.nan_to_num(7.5))
    gpu.kernels.finish(rows, Request(max_norm=max_norm), again.fill_(POISON))
    assert torch.equal(again.nan_to_num(7.5), totals.nan_to_num(7.5))


def signalling(dtype: torch.dtype) -> Tensor:
    """Numbers of which any arithmetic changes the bits: signalling NaNs and, if flushed, subnormal numbers."""
    if dtype in COMPLEX:
        dtype = dtype.to_real()
    codes = {
        torch.float64: (torch.int64, [0x7FF0000000000001, 1, -(2**63)]),
        torch.float32: (torch.int32, [0x7F800001, 1, -(2**31)]),
        torch.bfloat16: (torch.int16, [0x7F81, 1, -(2**15)]),
        torch.float16: (torch.int16, [0x7C01, 1, -(2**15)]),
    }
    of, values = codes[dtype]
    return torch.tensor(values * 8, dtype=of).view(dtype)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("how", "dtype"), WRITES, ids=str)
def test_a_device_may_forbid_to_write(how: str, dtype: torch.dtype, skip: float | None) -> None:
    check_write(gpu.kernels, how, dtype, skip, gpu.device())


@pytest.mark.parametrize("given", TOLD)
def test_steps_are_counted(given: Given) -> None:
    check_tally(gpu.kernels, given, gpu.device())


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_a_factor_of_one_writes_nothing(dtype: torch.dtype) -> None:
    special = signalling(dtype)
    if dtype in COMPLEX:
        special = torch.view_as_complex(torch.stack([special, special], -1))
    grads = [special[:5].clone().to(gpu.device()), special.to(gpu.device()), special.repeat(3, 1).to(gpu.device())]
    before = [bits(grad).clone() for grad in grads]
    table = gpu.kernels.table_of(grads)
    ones = torch.ones(3, dtype=torch.float64, device=gpu.device())
    for factor in (1.0, torch.tensor(1.0, device=gpu.device()), ones[0], ones):
        gpu.kernels.scale_(table, factor)
    gpu.kernels.scale_units_(table, [(0,), (0,), (1,)], torch.ones(5, dtype=torch.float64, device=gpu.device()))
    assert all(torch.equal(bits(grad), old) for grad, old in zip(grads, before, strict=True))
    ones[0] = 0.0
    gpu.kernels.scale_(table, ones)
    assert all(torch.equal(bits(grad), old) for grad, old in zip(grads[1:], before[1:], strict=True))
    assert not torch.equal(bits(grads[0]), before[0])
    gpu.kernels.scale_units_(table, [(0,), (0,), (1,)], torch.tensor([1.0, 1, 1, 2, 1]).double().to(gpu.device()))
    rows = bits(grads[2]).reshape(3, -1)
    assert torch.equal(rows[[0, 2]].flatten(), before[2].reshape(3, -1)[[0, 2]].flatten())
    assert not torch.equal(rows[1], before[2].reshape(3, -1)[1])


READ_ONLY = """
import importlib, mmap, torch
kernels = importlib.import_module('{module}')
from fastclip.types import Request
import warnings
warnings.simplefilter("ignore")
size = 4 * 70_000
with open("{path}", "wb") as file:
    file.write(torch.full((size // 4,), 0.5).numpy().tobytes())
with open("{path}", "rb") as file:
    memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
for first, last in ((0, 70_000), (3, 69_999)):
    grad = torch.frombuffer(memory, dtype=torch.float32)[first:last]
    table = kernels.table_of([grad])
    rows = torch.zeros(3, 1, dtype=torch.float64)
    kernels.read(table, Request(), rows)
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    kernels.read_penalised_(table, [grad.clone()], zeros, Request(), rows, rows.clone())
    kernels.scale_(table, torch.tensor(1.0))
    kernels.scale_(table, torch.ones(1, dtype=torch.float64))
    kernels.clamp_(table, 0.5)
    kernels.zero_nonfinite_(table)
print("nothing was written", flush=True)
kernels.scale_(table, 0.5)
"""


def test_what_does_not_change_is_not_written(python, tmp_path) -> None:
    if not gpu.emulated():
        pytest.skip("memory that may not be written needs the emulation, which needs a GPU's absence")
    program = READ_ONLY.format(path=tmp_path / "numbers", module=gpu.kernels.__name__)
    done = python(program, FASTCLIP_BACKEND=gpu.kernels.name)
    assert done.stdout.strip() == "nothing was written", done.stderr
    assert done.returncode != 0  # and then something was


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_changes_leave_their_neighbours_alone(dtype: torch.dtype) -> None:
    """Within a vector an encoded number keeps its bits; NaN of 16 bits may change its payload, that of others not."""
    grad = randn(203, dtype=dtype).to(gpu.device())
    grad[::17], grad[5] = INF, NAN
    if dtype in COMPLEX:
        grad[17] = complex(1.0, INF)
    special = bits(grad).clone()
    gpu.kernels.zero_nonfinite_(gpu.kernels.table_of([grad]))
    per = len(special) // 203
    kept = torch.ones(203, dtype=torch.bool, device=gpu.device())
    kept[::17] = kept[5] = False
    assert torch.equal(bits(grad).reshape(203, per)[kept], special.reshape(203, per)[kept])
    assert not grad[~kept].any()
    if dtype not in COMPLEX:
        bound = float(grad.double().abs().median())
        before = bits(grad).clone()
        gpu.kernels.clamp_(gpu.kernels.table_of([grad]), bound)
        inside = before == bits(grad)
        assert 90 < int(inside.sum()) < 203
        assert float(grad.double().abs().max()) == bound


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("factor", [1e-38, 1e-39, 3e-41, 7e-44])
@pytest.mark.parametrize("form", ["number", "scalar", "each"])
def test_factors_below_float32_are_exact(dtype: torch.dtype, factor: float, form: str) -> None:
    grad = (torch.tensor([3e38, -1e38, 1.7e38, 2e30, 0.0, 1.0] * 9) if dtype != torch.float16 else randn(54)).to(dtype)
    own = torch.tensor(factor, dtype=torch.float64, device=gpu.device())
    got = grad.clone().to(gpu.device())
    gpu.kernels.scale_(gpu.kernels.table_of([got]), {"number": factor, "scalar": own, "each": own.reshape(1)}[form])
    want = rounded(grad.double() * factor, dtype)
    assert torch.equal(got.cpu().double(), want)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_factors_of_short_units_are_exact_side_by_side(dtype: torch.dtype) -> None:
    grad = (randn(4, 9).sign() * 3e38 if dtype != torch.float16 else randn(4, 9)).to(dtype)
    factors, got = torch.tensor([3e-41, 0.3, 1.0, 7e-44], dtype=torch.float64), grad.clone().to(gpu.device())
    gpu.kernels.scale_units_(gpu.kernels.table_of([got]), [(1,)], factors.to(gpu.device()))
    want = rounded(grad[[0, 3]].double() * factors[[0, 3], None], dtype)
    assert torch.equal(got[[0, 3]].cpu().double(), want)
    close(got[[1, 2]].double(), grad[[1, 2]].double() * factors[[1, 2], None], torch.finfo(dtype).eps)


# ---- what is refused


PUBLIC = """
import torch, fastclip
p = torch.nn.Parameter(torch.zeros(2, 3, device="{device}"))
p.grad = torch.full((2, 3), 2.0, device="{device}")
assert [backend.name for backend in fastclip.backends.candidates()][:1] == ["{first}"]
print(float(fastclip.clip_grad_norm_([p], 1.0, eps=0.0)), p.grad.norm().item())
print(fastclip.backends.explain([p]))
"""


def test_the_environment_forces_it(python) -> None:
    done = python(PUBLIC.format(device=gpu.device(), first=gpu.kernels.name), FASTCLIP_BACKEND=gpu.kernels.name)
    assert done.returncode == 0, done.stderr
    numbers, *lines = done.stdout.splitlines()
    assert [float(x) for x in numbers.split()] == pytest.approx([math.sqrt(24), 1.0])
    assert f"{gpu.kernels.name}: available, forced by FASTCLIP_BACKEND; serves 1 of 1 gradients" in lines
    assert not done.stderr


def test_the_emulation_is_never_chosen_by_itself(python) -> None:
    done = python(PUBLIC.format(device=gpu.device(), first="cpu" if gpu.emulated() else gpu.RUNNABLE[0].name))
    assert done.returncode == 0, done.stderr
    names = [line.split(":")[0] for line in done.stdout.splitlines()[1:] if ": available" in line]
    assert names == [backend.name for backend in BACKENDS if not backend.unavailable()]
    assert (gpu.kernels.name in names[2:]) == gpu.emulated()


def test_a_strided_gradient_is_not_its_work(python) -> None:
    program = PUBLIC.format(device=gpu.device(), first=gpu.kernels.name).replace(
        "torch.full((2, 3)", "torch.full((2, 6)"
    )
    program = program.replace(
        '(2, 6), 2.0, device="' + gpu.device() + '")', f'(2, 6), 2.0, device="{gpu.device()}")[:, ::2]'
    )
    done = python(program, FASTCLIP_BACKEND=gpu.kernels.name)
    assert done.returncode != 0
    assert f"{gpu.kernels.name}: not one dense block of memory" in done.stderr
