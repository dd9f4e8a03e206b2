"""What is the Triton backend's own: how chunks are cut and marked, what is uploaded when, and where it can't run."""

from __future__ import annotations

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable

import gpu
import numpy as np
import pytest
import torch
from oracle import DTYPES, norm, parameters, randn

import fastclip
from fastclip.backends import tables, triton
from fastclip.backends.tables import CODES, CPU
from fastclip.types import Request

pytest.importorskip("triton", reason="needs a GPU's package triton, which has wheels for Linux on x86-64 only")

from fastclip.kernels import chunks, formats, joins, launch, table
from fastclip.kernels.blocks import CHUNK_BYTES, SHORT_BYTES, UNITS
from fastclip.kernels.table import CHUNK_BYTES as CUT
from fastclip.kernels.table import DeviceCache, Work, works_of
from triton import __version__ as triton_version
from triton import jit
from triton import language as tl

running = pytest.mark.skipif(
    bool(triton.unavailable()), reason=f"needs a GPU, or TRITON_INTERPRET=1: {triton.unavailable()}"
)
interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="needs a GPU's absence, and TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def kernels() -> None:
    gpu.use(triton)


def facts_of(*grads: torch.Tensor) -> np.ndarray:
    return np.frombuffer(tables.table_of(list(grads), CPU).facts, np.int64).reshape(-1, 3)


def word(work: Work, which: object) -> list[int]:
    return work.words[:, int(which)].tolist()


def aligned(work: Work) -> list[bool]:
    return [bool(tag & int(chunks.ALIGNED)) for tag in word(work, chunks.TAG)]


# ---- what is promised to the compiler


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_begins_at_a_multiple_of_16_is_marked(dtype: torch.dtype) -> None:
    """A load of 16 bytes elsewhere would be a fault that neither interpreter nor compiler sees."""
    memory = torch.zeros(CHUNK_BYTES + 64, dtype=dtype)
    views = [memory[offset:] for offset in range(17)]
    (work,) = works_of(facts_of(*views))
    assert aligned(work) == [view.data_ptr() % 16 == 0 for view in views]
    assert sum(aligned(work)) >= 2
    assert word(work, chunks.ADDRESS) == [view.data_ptr() for view in views]


def test_chunks_of_an_aligned_tensor_are_aligned() -> None:
    for dtype, code in CODES.items():
        assert table._ELEMENT_BYTES[code] == dtype.itemsize
        assert CUT % (16 * dtype.itemsize) == 0


@pytest.mark.parametrize("size", [3, 4, 5, SHORT_BYTES // 4 + 4, SHORT_BYTES // 4 + 5])
def test_units_are_marked_only_where_each_begins_aligned(size: int) -> None:
    grad = torch.zeros(64, size)
    for offset in (0, 1, 4):
        moved = torch.zeros(64 * size + offset)[offset:].view(64, size)
        works = works_of(facts_of(grad, moved), [64, 64])
        assert [flag for work in works for flag in aligned(work)] == [size % 4 == 0, size % 4 == 0 and offset % 4 == 0]


def test_weights_have_a_mark_of_their_own() -> None:
    grads, weights = [torch.zeros(8)] * 4, [torch.zeros(8 + offset)[offset:] for offset in (0, 1, 2, 4)]
    (work,) = works_of(facts_of(*grads), None, facts_of(*weights))
    marks = [bool(tag & int(chunks.WEIGHT_ALIGNED)) for tag in word(work, chunks.TAG)]
    assert (aligned(work), marks) == ([True] * 4, [True, False, False, True])
    assert word(work, chunks.WEIGHT) == [weight.data_ptr() for weight in weights]


def test_a_weight_that_is_served_apart_is_not_looked_at() -> None:
    """Its fact has size 0; that of nothing at all has, too, and a row to fill."""
    grads, weights = [torch.zeros(8), torch.zeros(0), torch.zeros(8)], [torch.zeros(0), torch.zeros(0), torch.zeros(8)]
    (work,) = works_of(facts_of(*grads), None, facts_of(*weights))
    assert [bool(address) for address in word(work, chunks.WEIGHT)] == [False, True, True]


@running
@interpreted
def test_a_promise_about_an_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole chunks, which alone are read and written 16 bytes at a time."""
    from triton.runtime.interpreter import TensorHandle

    promised: list[tuple[int, int]] = []
    monkeypatch.setattr(
        TensorHandle, "set_attr", lambda own, name, values: promised.append((int(own.data.item()), *values))
    )
    memory = torch.rand(4, CHUNK_BYTES // 4 + 4)
    grads, weights = [memory[0, :-4], memory[1, 1:-3]], [memory[2, :-4], memory[3, 1:-3]]
    strengths = torch.ones(2, 1, dtype=torch.float64)
    for grad in grads:
        table = triton.table_of([grad])
        gpu.read([grad])
        triton.scale_(table, 0.5)
        triton.scale_(table, torch.rand(1, dtype=torch.float64))
        triton.clamp_(table, 0.1)
        triton.zero_nonfinite_(table)
        for weight in weights:
            gpu.penalise([grad], [weight], strengths)
            rows = [torch.empty(3, 1, dtype=torch.float64) for _ in range(2)]
            triton.read_penalised_(table, [weight], strengths, Request(), *rows)
    assert {grads[0].data_ptr(), weights[0].data_ptr()} <= {address for address, _ in promised}
    assert all(address % multiple == 0 for address, multiple in promised)


# ---- chunks


def test_borders_follow_from_sizes_alone() -> None:
    one = CHUNK_BYTES // 4
    grads = [torch.zeros(size) for size in (0, 1, one, one + 1, 2 * one, 2 * one + 1)]
    (work,) = works_of(facts_of(*grads))
    assert np.bincount(work.owners).tolist() == [1, 1, 1, 2, 2, 3]
    assert word(work, chunks.COUNT) == [1, 1, 1, 2, 2, 3]
    assert word(work, chunks.FIRST_CHUNK) == [0, 1, 2, 3, 5, 7]
    assert word(work, chunks.FIRST_ROW) == list(range(6))
    assert (work.units, work.cut, work.present) == (1, True, 1 << CODES[torch.float32])
    assert not works_of(facts_of(*grads[:3]))[0].cut


def test_short_units_share_a_program_and_long_ones_do_not() -> None:
    short, long = torch.zeros(40, 5), torch.zeros(3, CHUNK_BYTES // 4 + 1, dtype=torch.bfloat16)
    longer, left_out = torch.zeros(2, CHUNK_BYTES), torch.zeros(7)
    alone, together = works_of(facts_of(short, long, longer, left_out), [40, 3, 2, 0])
    assert (together.units, together.chunks, word(together, chunks.COUNT)) == (UNITS, math.ceil(40 / UNITS), [40])
    assert (word(alone, chunks.COUNT), word(alone, chunks.FIRST_ROW)) == ([1, 4], [40, 43])
    assert alone.owners.tolist() == [0, 0, 0] + [1] * 8
    assert alone.present == 1 << CODES[torch.bfloat16] | 1 << CODES[torch.float32]
    assert word(together, chunks.FIRST_ROW) == [0]


def test_a_list_too_long_for_a_launch_is_refused() -> None:
    facts = np.array([[1 << 20, CHUNK_BYTES << 31, CODES[torch.float32]]], np.int64)
    with pytest.raises(ValueError, match="more than one launch has programs"):
        works_of(facts)


# ---- what is kept


def test_a_list_is_uploaded_once_and_again_when_an_address_changes() -> None:
    made: list[str] = []

    def make(name: str) -> Callable[[], str]:
        return lambda: made.append(name) or name

    cache = DeviceCache()
    assert cache.get(0, "a", make("a"), False) == "a"
    assert cache.get(0, "a", make("a"), True) == "a"
    assert cache.get(0, "b", make("b"), False) == "b"
    assert made == ["a", "b"]


def test_another_stream_uploads_its_own_but_a_capture_takes_what_there_is() -> None:
    """torch.cuda.graph captures on a stream of its own; the warm-up was on another one."""
    cache = DeviceCache()
    for stream in (0, 1):
        assert cache.get(stream, "a", lambda at=stream: f"of {at}", False) == f"of {stream}"
    assert cache.get(7, "a", lambda: pytest.fail("nothing may be uploaded"), True) == "of 1"
    assert cache._of_graphs == ["of 1"]
    assert cache.get(0, "a", lambda: pytest.fail("nothing may be uploaded"), False) == "of 0"
    with pytest.raises(RuntimeError, match="new to fastclip's Triton kernels"):
        cache.get(7, "b", lambda: pytest.fail("nothing may be uploaded"), True)


def test_a_list_that_is_new_inside_a_capture_raises_and_keeps_nothing() -> None:
    cache = DeviceCache()
    with pytest.raises(RuntimeError, match="run the same call once before the capture"):
        cache.get(0, "new", lambda: pytest.fail("nothing may be uploaded"), True)
    assert cache.get(0, "new", lambda: "made", False) == "made"


def test_the_oldest_list_goes_but_not_one_that_a_graph_reads() -> None:
    cache, entry = DeviceCache(), object()
    cache.get(0, 0, lambda: entry, False)
    cache.get(0, 0, lambda: None, True)
    for key in range(1, cache.CAPACITY + 1):
        cache.get(0, key, object, False)
    assert len(cache._entries) == cache.CAPACITY
    assert entry not in [made for *_, made in cache._entries]
    assert entry in cache._of_graphs


def test_a_list_that_is_used_again_stays() -> None:
    cache = DeviceCache()
    for key in (*range(cache.CAPACITY), 0, cache.CAPACITY):
        cache.get(0, key, object, False)
    assert [key for _, key, _ in cache._entries] == [*range(2, cache.CAPACITY), 0, cache.CAPACITY]


def where() -> launch.Where:
    return launch.Where(torch.device("cpu"))


def test_what_a_stream_uploads_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_cache", DeviceCache())
    facts, one, other = facts_of(torch.zeros(3)).tobytes(), where(), where()
    other.stream = 1
    for upload in (lambda at: at.works(facts)[0].words, lambda at: at.offsets([1, 2])):
        assert upload(one) is upload(one)
        assert upload(other) is not upload(one)
        other.capturing = True
        assert upload(other) is upload(one)
        other.capturing = False
    one.capturing = True
    with pytest.raises(RuntimeError, match="new to fastclip's Triton kernels"):
        one.works(facts, [3])
    with pytest.raises(RuntimeError, match="new to fastclip's Triton kernels"):
        one.offsets([2, 1])


def test_the_same_tensors_in_other_units_are_another_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_cache", DeviceCache())
    facts = facts_of(torch.zeros(2, 3), torch.zeros(3, 2)).tobytes()
    for counts in (None, [2, 1], [1, 2], [2, 3]):
        cut = where().works(facts, counts)
        assert {unit for work in cut for unit in word(work, chunks.UNIT_SIZE)} == {
            6 // count for count in counts or [1, 1]
        }
        assert [row for work in cut for row in word(work, chunks.FIRST_ROW) if row] == [counts[0] if counts else 1]


def test_a_workspace_is_kept_while_it_is_large_enough() -> None:
    kept: dict = {}
    first = where().workspace(kept, 10, torch.float64)
    assert where().workspace(kept, len(first), torch.float64) is first
    larger = where().workspace(kept, len(first) + 1, torch.float64)
    assert len(larger) > len(first)
    assert not larger.any()
    assert where().workspace(kept, 10, torch.float64) is larger


def test_no_two_streams_or_graphs_share_a_workspace() -> None:
    """They may run at the same time."""
    kept: dict = {}
    found = []
    for stream, capturing in ((0, False), (1, False), (1, True), (1, True)):
        at = where()
        at.stream, at.capturing = stream, capturing
        found.append(at.workspace(kept, 10, torch.int32))
    assert len({memory.data_ptr() for memory in found}) == 4
    assert not any(bool(memory.any()) for memory in found)
    assert len(kept) == 2


@running
@pytest.mark.parametrize("extras", [False, True])
def test_a_read_stays_inside_the_workspace_it_asked_for(extras: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    borrowed: list[torch.Tensor] = []

    def exact(at: launch.Where, kept: object, size: int, dtype: torch.dtype) -> torch.Tensor:
        memory = torch.zeros(size + 100, dtype=dtype, device=at.device)
        memory[size:] = 77
        borrowed.append(memory)
        return memory[:size]

    monkeypatch.setattr(launch.Where, "workspace", exact)
    grads, weights = (gpu.some(100_000, 5, 40_000) for _ in range(2))
    gpu.read(grads, Request(extras=extras))
    gpu.penalise(grads, weights, torch.ones(2, 3, dtype=torch.float64, device=gpu.device()), Request(extras=extras))
    assert len(borrowed) == 4
    assert all(bool((memory[-100:] == 77).all()) for memory in borrowed)


def test_a_compiled_kernel_is_kept_for_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded on the one where it ran first."""
    monkeypatch.setattr(launch, "_compiled", {})
    compiled, at = [], where()
    run = defaultdict(lambda: lambda *_, **__: None)
    kernel = defaultdict(lambda: lambda **_: compiled.append(at.device.index) or run)
    for index in (0, 1, 0, 1):
        at.device = torch.device("cuda", index)
        at.launch(kernel, 1)
    assert compiled == [0, 1]


@running
def test_new_addresses_are_read_at_once() -> None:
    """A gradient that moved, and one that grew, as they do between two backward passes."""
    fastclip.backends.forced = "triton"
    launch._cache._entries.clear()
    grads = [torch.full((size,), 1.0, device=gpu.device()) for size in (5, 7)]
    others = [torch.full((size,), 3.0, device=gpu.device()) for size in (5, 9)]
    for step, grad in enumerate((grads[0], *others)):
        assert float(fastclip.get_total_norm([grad, grads[1]])) == pytest.approx(norm([grad, grads[1]]))
        assert len(launch._cache._entries) == step + 1
    fastclip.get_total_norm(grads)
    assert len(launch._cache._entries) == 3


@running
def test_a_weight_that_moved_is_read_at_once() -> None:
    grad, strengths = torch.zeros(5, device=gpu.device()), torch.zeros(2, 1, dtype=torch.float64, device=gpu.device())
    weights = [torch.full_like(grad, value) for value in (1.0, 3.0)]
    for weight in weights:
        rows, weight_rows = gpu.poisoned(3, 1), gpu.poisoned(3, 1)
        triton.read_penalised_(triton.table_of([grad]), [weight], strengths, Request(), rows, weight_rows)
        assert weight_rows[1:, 0].tolist() == [float(weight.max()), float(weight.sum())]


@running
def test_without_the_native_core_it_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fastclip.backends.forced = "triton"
    shapes = [(30, 7), (3, 20_000), (11,), ()]
    found = []
    for native in (True, False):
        torch.manual_seed(7)
        if not native:
            monkeypatch.setattr(tables, "C", None)
            monkeypatch.setattr(fastclip.tensors, "C", None)
        params = parameters([randn(*shape).to(gpu.device()) for shape in shapes])
        for param in params:
            param.data.uniform_(-1, 1)
        total = fastclip.clip_grad_norm_(params, 1.0)
        fastclip.clip_grads_(params, fastclip.policies.Unitwise(0.01))
        opt = fastclip.ClippedOptimizer(torch.optim.SGD(params, lr=0.1), 0.5, l1=0.01, l2=0.1)
        opt.step()
        found.append([total, *(param.grad for param in params), *(param.detach() for param in params)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


TILES = """
import fastclip, triton
with triton.knobs.runtime.scope():
    triton.knobs.runtime.interpret = False
    from fastclip.kernels import blocks
assert blocks.MORE == 1
import gpu
import test_gpu_kernels as kernels
from fastclip.types import Request
gpu.use(fastclip.backends.triton)
kernels.test_totals_and_heads_are_those_of_the_contract(1.0, 0.0)
kernels.test_dtypes_share_a_launch(Request())
kernels.test_faults_in_units(Request(), 100)
kernels.test_order_changes_no_bit_of_finish_and_join(-1.0, 1.0, 0.0)
"""


@running
@interpreted
def test_tiles_are_right_in_the_size_of_a_gpus(python) -> None:
    """Interpreted they are larger elsewhere."""
    done = python(TILES, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr


# ---- bits


def test_a_number_travels_as_its_bits() -> None:
    for number in (0.5, -1.0, 1e300, 5e-324, math.inf, -math.inf):
        assert np.int64(launch.bits_of(number)).view(np.float64) == number
    launch.bits_of.cache_clear()
    assert launch.bits_of(-0.0) == launch.bits_of(0.0) == 0


@jit
def round_kernel(x, out, count, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    bits = formats.narrowed(tl.load(x + at, mask=at < count, other=0.0), DTYPE)
    tl.store(out + at, bits, mask=at < count)


@running
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_rounding_is_pytorchs(dtype: torch.dtype) -> None:
    """Ties, subnormal numbers, overflow; and NaN of any payload, which a rounding must not carry to 0."""
    high = torch.arange(0, 1 << 16, 7, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (high[:, None] | low).to(torch.uint32).view(torch.float32).flatten()
    x = torch.cat([x, torch.tensor([0x7FFFFFFF, 0xFFFFFFFF], dtype=torch.uint32).view(torch.float32)])
    x = x.to(gpu.device())
    got = torch.empty(len(x), dtype=torch.int16, device=gpu.device())
    with np.errstate(all="ignore"):
        round_kernel[(-(-len(x) // 4096),)](x, got, len(x), CODES[dtype], 4096)
    want = x.to(dtype)
    assert torch.equal(got.view(dtype).isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want.view(torch.int16)[~want.isnan()])


@jit
def join_max_kernel(values, out, count):
    tl.store(out, joins.join_max(values, count))


@running
@pytest.mark.parametrize("at", [0, 1023, 1024, 2999])
def test_the_largest_of_many_pieces_is_found(at: int) -> None:
    values, largest = gpu.poisoned(4000), gpu.poisoned(1)
    values[:3000] = torch.rand(3000, dtype=torch.float64)
    values[7], values[at] = math.nan, 5.0
    join_max_kernel[(1,)](values, largest, 3000)
    assert largest.item() == 5.0


# ---- where it can't run


def test_each_reason_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    why = triton.unavailable.__wrapped__
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability is 7.5" in why()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert why() == ""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a C compiler" in why()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in why()
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert why() == "triton is not installed: pip install triton"


def test_forced_without_a_gpu_it_says_why(python) -> None:
    program = "import torch, fastclip; fastclip.get_total_norm([torch.ones(3)])"
    done = python(program, FASTCLIP_BACKEND="triton", TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "FASTCLIP_BACKEND=triton can't run here: no GPU that torch can use was found" in done.stderr


def test_interpreted_it_serves_cpu_tensors(python) -> None:
    program = (
        "import torch, fastclip; print(float(fastclip.get_total_norm([torch.full((4,), 2.0)])));"
        "print(fastclip.backends.explain([torch.ones(3)]))"
    )
    done = python(program, FASTCLIP_BACKEND="triton", TRITON_INTERPRET="1")
    if refused := triton._interpreter_refuses(triton_version, np.__version__):
        assert f"FASTCLIP_BACKEND=triton can't run here: {refused}" in done.stderr
        return
    assert done.stdout.splitlines()[0] == "4.0", done.stderr
    assert "triton: available, forced by FASTCLIP_BACKEND; serves 1 of 1 gradients" in done.stdout


def test_an_interpreter_that_cannot_run_with_this_numpy_says_so() -> None:
    for versions in (("3.6.0", "2.3.5"), ("3.7.1", "2.5.0"), ("3.10.0+git1", "2.10.1"), ("4.0.0", "3.0.0rc1")):
        assert triton._interpreter_refuses(*versions) == ""
    for numpy_version in ("2.4.0", "2.10.1", "3.0.0"):
        why = triton._interpreter_refuses("3.6.0", numpy_version)
        assert f"triton 3.6.0 needs numpy before 2.4, and this is numpy {numpy_version}" in why


def test_past_the_dispatcher_a_launch_is_of_the_kernel_that_it_would_choose(python) -> None:
    """A GPU that gets another kernel, or other arguments, writes where it must not."""
    done = python("import launches; launches.check()", TRITON_INTERPRET="0")
    assert re.fullmatch(r"(\d+) kernels, \1 kept\n", done.stdout), done.stderr


def test_an_old_triton_is_refused(python) -> None:
    program = "import triton; triton.__version__ = '3.5.1'; import fastclip.kernels"
    done = python(program)
    assert "fastclip's kernels need triton 3.6 or newer; this is 3.5.1" in done.stderr
