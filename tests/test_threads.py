"""Python threads, forked children, autograd and very large tensors all see a consistent engine."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import HALVES, WRITABLE, bits, norm, parameter, parameters, randn

import fastclip
from fastclip._native import C


@pytest.mark.skipif(C is None, reason="needs the extension: the reference would take 17 GB")
def test_more_elements_than_32_bits_count() -> None:
    """Memory that nobody has written is 0 and takes none; it stays so, as nothing that needs no change is written."""
    torch.set_num_threads(2)
    grad = torch.empty(2**31 + 7, dtype=torch.bfloat16)
    grad[-1], grad[2**31 - 2] = 3.0, 4.0
    param = torch.nn.Parameter(grad)
    param.grad = grad.detach()
    assert float(fastclip.clip_grad_norm_([param], math.inf)) == 5.0
    fastclip.clip_grad_value_([param], 1.0)
    assert [float(grad[-1]), float(grad[2**31 - 2])] == [1.0, 1.0]
    grad[-2] = math.nan
    assert fastclip.grad_stats([param]).nans.tolist() == [1]
    assert float(fastclip.clip_grad_norm_([param], math.inf, nonfinite="zero")) == pytest.approx(2**0.5)
    assert [float(grad[-1]), float(grad[-2])] == [1.0, 0.0]


@pytest.fixture
def threaded(route: str) -> str:
    if route == "triton":
        pytest.skip("Triton's interpreter has one program number for all threads: with them it needs a GPU")
    return route


def clip_some(seed: int) -> torch.Tensor:
    """A few clips on gradients of its own; returns their bits."""
    generator = torch.Generator().manual_seed(seed)
    params = parameters(torch.randn(size, generator=generator) for size in (3, 70_000, 140_001))
    norms = [fastclip.clip_grad_norm_(params, 10.0 / (1 + step)) for step in range(4)]
    fastclip.clip_grad_value_(params, 0.01)
    stats = fastclip.grad_stats(params)
    return torch.cat([*(bits(p.grad) for p in params), bits(torch.stack(norms)), bits(stats.tensor_norms)])


def test_python_threads_do_not_disturb_each_other(threaded: str) -> None:
    torch.set_num_threads(2)
    alone = [clip_some(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(2):
            together = list(pool.map(clip_some, range(6)))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_one_list_is_read_by_many_threads(threaded: str) -> None:
    torch.set_num_threads(2)
    grads = [randn(size) for size in (70_000, 5, 3000)]
    want = float(fastclip.get_total_norm(grads))
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: float(fastclip.get_total_norm(grads)), range(40))) == {want}


def test_gradients_may_vanish_while_they_are_read(route: str) -> None:
    params = parameters(randn(20_000) for _ in range(4))
    whole = norm([p.grad for p in params])

    def drop_and_restore(rounds: int) -> None:
        kept = [p.grad for p in params]
        for _ in range(rounds):
            for p in params:
                p.grad = None
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(drop_and_restore, 300)
        seen = [float(fastclip.clip_grad_norm_(params, float("inf"))) for _ in range(30)]
        writer.result()
    assert max(seen) <= whole * (1 + 1e-6)


def test_bits_do_not_depend_on_the_calling_thread(route: str) -> None:
    torch.set_num_threads(2)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(clip_some, 3).result(), clip_some(3))


def in_child(work, seconds: float = 30.0) -> int:
    """Exit status of ``work`` in a forked child; -1 if it hangs."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


# Python warns of any fork in a process with threads, which OpenMP's are
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Prepared:
    """Work for a child: no operation of torch's that would start threads there, which hangs by itself."""

    def __init__(self) -> None:
        torch.set_num_threads(2)
        self.want = self.results(self.fresh())  # from here on OpenMP's threads exist; a fork doesn't copy them
        self.params = self.fresh()

    def fresh(self) -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(7)
        return parameters(torch.randn(size, generator=generator) for size in (3, 70_000, 200_000))

    def results(self, params: list[torch.nn.Parameter]) -> list[float]:
        norms = [fastclip.clip_grad_norm_(params, bound).item() for bound in (30.0, 10.0)]
        norms.append(fastclip.get_total_norm([p.grad for p in params], 1.0).item())
        fastclip.clip_grad_value_(params, 0.01)
        norms += fastclip.grad_stats(params).tensor_norms.tolist()
        fastclip.clip_grad_norm_(params, 1.0, nonfinite="zero")
        return norms + [p.grad[index].item() for p in params for index in (0, -1)]

    def done(self) -> bool:
        return self.results(self.params) == self.want


@FORKS
@pytest.mark.parametrize("capability", C.cpu_capabilities())
def test_a_forked_child_does_not_hang(capability: str) -> None:
    assert C.cpu_use_capability(capability)
    work = Prepared()
    assert in_child(work.done) == 0
    assert work.done()


@FORKS
def test_a_grandchild_does_not_hang() -> None:
    work = Prepared()
    assert in_child(lambda: in_child(work.done, 20) == 0) == 0


@FORKS
def test_a_child_of_a_busy_parent_does_not_hang() -> None:
    work = Prepared()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(lambda: [clip_some(seed) for seed in range(10)])
        assert [in_child(work.done) for _ in range(3)] == [0, 0, 0]
        busy.result()


@FORKS
def test_multiprocessing_fork_works() -> None:
    work = Prepared()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(work.done()))
    child.start()
    child.join(30)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive
    assert receiver.poll()
    assert receiver.recv()


@FORKS
def test_the_parent_keeps_its_threads_after_a_fork() -> None:
    work = Prepared()
    assert in_child(lambda: True) == 0
    assert work.done()


def graph_with_saved_gradient(dtype: torch.dtype) -> tuple[torch.nn.Parameter, torch.Tensor]:
    """A parameter whose gradient a second backward needs."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]).to(dtype))
    (grad,) = torch.autograd.grad((p**3).sum().real, p, create_graph=True)
    penalty = (grad * grad).sum().real  # saves grad for its backward
    p.grad = grad
    return p, penalty


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
@pytest.mark.parametrize("work", ["norm", "value", "known", "zero"])
def test_double_backward_after_clipping_raises(route: str, dtype: torch.dtype, work: str) -> None:
    if dtype.is_complex and work == "value":
        work = "norm"  # complex numbers have no order
    p, penalty = graph_with_saved_gradient(dtype)
    if work == "norm":
        fastclip.clip_grad_norm_([p], 0.1)
    elif work == "value":
        fastclip.clip_grad_value_([p], 0.1)
    elif work == "known":
        fastclip.clip_grads_with_norm_([p], 0.1, 3.0)
    else:
        p.grad.data[0] = float("nan")
        fastclip.clip_grad_norm_([p], 0.1, nonfinite="zero")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_double_backward_without_a_write_works(route: str, dtype: torch.dtype) -> None:
    p, penalty = graph_with_saved_gradient(dtype)
    fastclip.clip_grad_norm_([p], 1e4)
    fastclip.grad_stats([p])
    p.grad = None
    penalty.backward()
    assert p.grad is not None


def test_clipping_leaves_no_trace_in_the_graph(route: str) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    assert not fastclip.clip_grad_norm_([p], 1.0).requires_grad
    leaf = torch.tensor([3.0, 4.0], requires_grad=True)
    assert not fastclip.get_total_norm([leaf * 1.0]).requires_grad
    assert not fastclip.grad_stats([(leaf * 1.0)]).tensor_norms.requires_grad
    assert p.grad.grad_fn is None
