"""What the public functions, the wrapper and the scaler do with a GPU's kernels: the same as the reference on the CPU.

On a GPU where there is one; else emulated, as in test_gpu_kernels.py: then a graph is its calls, made anew. Streams,
captures that break off, and more elements than 32 bits count need the GPU itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import gpu
import pytest
import torch
from fastclip.bench.gpu import served_by
from oracle import INF, NAN, bits, coef, norm, parameter, parameters, randn
from ruled import POLICIES, give, step_grads, weights
from torch import Tensor

import fastclip
from fastclip import ClippedOptimizer, NonFiniteGradientError, riding
from fastclip.policies import PerTensorNorm, Policy, Unitwise, Value

pytestmark = pytest.mark.skipif(not gpu.RUNNABLE, reason=f"needs a GPU, or its emulation: {gpu.WHY_NOT}")


@pytest.fixture(params=gpu.RUNNABLE, ids=lambda backend: backend.name, autouse=True)
def kernels(request: pytest.FixtureRequest, same_start: None) -> Iterator[None]:
    gpu.use(request.param)
    with served_by(request.param.name):
        yield


@pytest.fixture
def real_gpu() -> None:
    if gpu.emulated():
        pytest.skip("needs a GPU itself")


def there(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(gpu.device()) for tensor in tensors]


def weights_there() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(own.detach().to(gpu.device())) for own in weights()]


def close(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-6, atol: float = 0.0) -> None:
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=rtol, atol=atol, equal_nan=True)


def grads_of(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [param.grad for param in params]


# ---- functions


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e20, 1e37])
def test_norms_of_every_magnitude(size: float) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)
    grads = there([randn(37, dtype=dtype, scale=size) for dtype in dtypes])
    want = norm(grads)
    params = parameters(grads)
    found = fastclip.clip_grad_norm_(params, want / 4)
    assert float(found) == pytest.approx(want, rel=1e-7)
    assert float(fastclip.get_total_norm(grads)) == pytest.approx(want * coef(want, want / 4), rel=1e-3)


@pytest.mark.parametrize("fault", [0.0, NAN, INF, -INF])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
def test_faults_do_what_was_asked_for(nonfinite: str, fault: float) -> None:
    values = step_grads(4)
    values[2][1, 2, 0] += fault
    ours, theirs = parameters(there(values)), parameters([value.clone() for value in values])
    found = fastclip.clip_grad_norm_(ours, 0.7, nonfinite=nonfinite)
    with served_by("reference"):
        want = fastclip.clip_grad_norm_(theirs, 0.7, nonfinite=nonfinite)
    close([found, *grads_of(ours)], [want, *grads_of(theirs)])


@pytest.mark.parametrize("fault", [NAN, INF])
def test_a_fault_that_raises_says_where_and_writes_nothing(fault: float) -> None:
    values = step_grads(4)
    values[2][1, 2, 0] = fault
    params = parameters(there(values))
    with pytest.raises(NonFiniteGradientError) as raised:
        fastclip.clip_grad_norm_(params, 0.7, nonfinite="raise")
    assert raised.value.index == (1, 2, 0)
    close(grads_of(params), values, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_every_rule_decides_as_on_the_cpu(name: str) -> None:
    policy, twin = POLICIES[name](), POLICIES[name]()
    ours, theirs = weights_there(), weights()
    for step in range(9):
        values = step_grads(step)
        if step == 5:
            values[1][3] = NAN
        give(ours, there(values))
        give(theirs, values)
        fastclip.clip_grads_(ours, policy, nonfinite="skip")
        with served_by("reference"):
            fastclip.clip_grads_(theirs, twin, nonfinite="skip")
        close(grads_of(ours), grads_of(theirs), rtol=1e-5)


# ---- steps

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "SGD, fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
}
SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "bound": lambda: {"max_norm": 0.7},
    "units": lambda: {"policy": Unitwise(0.05)},
    "learning": lambda: {"policy": POLICIES["chain"]()},
    "penalty": lambda: {"max_norm": 0.7, "l1": 0.01, "l2": 0.1},
    "zeroing": lambda: {"max_norm": 0.7, "nonfinite": "zero"},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("twice_from", [riding.TWICE_FROM_BYTES, 0])
def test_steps_end_where_those_of_the_cpu_end(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, settings: str, twice_from: int
) -> None:
    """Also where one has NaN and one has Inf, and where a fused step is launched twice."""
    monkeypatch.setattr(riding, "TWICE_FROM_BYTES", twice_from)
    ours, theirs = weights_there(), weights()
    opt, twin = (
        ClippedOptimizer(OPTIMIZERS[optimizer](params), skip_limit=None, **SETTINGS[settings]())
        for params in (ours, theirs)
    )
    for step in range(7):
        values = step_grads(step)
        if step in (2, 4):
            values[1][3] = NAN if step == 2 else INF
        give(ours, there(values))
        give(theirs, values)
        opt.step()
        with served_by("reference"):
            twin.step()
        close(list(ours), list(theirs), rtol=1e-4, atol=1e-6)
    for count in ("steps", "skipped_steps", "clipped_steps"):
        assert int(getattr(opt, count)) == int(getattr(twin, count)), count
    assert int(opt.skipped_steps) == (0 if settings == "zeroing" else 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scaler_halves_its_scale_and_holds_the_step_back(optimizer: str) -> None:
    ours, theirs = weights_there(), weights()
    runs = []
    for params, device in ((ours, gpu.device()), (theirs, "cpu")):
        scaler = fastclip.GradScaler(device, init_scale=64.0)
        scaler.scale(torch.ones((), device=device))
        runs.append((params, scaler, ClippedOptimizer(OPTIMIZERS[optimizer](params), 0.7)))
    for step in range(5):
        for params, scaler, opt in runs:
            values = [value * scaler.get_scale() for value in step_grads(step)]
            if step in (1, 3):
                values[0][3, 1] = INF if step == 1 else NAN
            give(params, [value.to(params[0].device) for value in values])
            with served_by("reference" if params is theirs else gpu.kernels.name):
                scaler.step(opt)
            scaler.update()
        close(list(ours), list(theirs), rtol=1e-4, atol=1e-6)
    assert [scaler.get_scale() for _, scaler, _ in runs] == [16.0, 16.0]
    assert [int(opt.skipped_steps) for *_, opt in runs] == [2, 2]


# ---- graphs


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
def test_a_graph_looks_for_faults_at_each_replay(nonfinite: str) -> None:
    ours = parameters(there(step_grads(0)))
    replay = gpu.captured(lambda: fastclip.clip_grad_norm_(ours, 0.7, nonfinite=nonfinite))
    for size, fault in ((0.01, 0.0), (1.0, 0.0), (1.0, NAN), (1.0, INF), (3.0, 0.0)):
        values = [value * size for value in step_grads(0)]
        values[1][2] += fault
        for param, value in zip(ours, values, strict=True):
            param.grad.copy_(value)
        found = replay()
        theirs = parameters(values)
        with served_by("reference"):
            want = fastclip.clip_grad_norm_(theirs, 0.7, nonfinite=nonfinite)
        close([found, *grads_of(ours)], [want, *grads_of(theirs)])


@pytest.mark.parametrize("rule", [PerTensorNorm(0.5), Unitwise(0.05), Value(0.4)], ids=repr)
def test_rules_that_learn_nothing_can_be_in_a_graph(rule: Policy) -> None:
    ours, theirs = weights_there(), weights()
    give(ours, there(step_grads(0)))
    replay = gpu.captured(lambda: fastclip.clip_grads_(ours, rule, nonfinite="skip"))
    for step in (7, 8, 1):
        values = step_grads(step)
        for param, value in zip(ours, values, strict=True):
            param.grad.copy_(value)
        found = replay()
        give(theirs, values)
        with served_by("reference"):
            want = fastclip.clip_grads_(theirs, rule, nonfinite="skip")
        close([found, *grads_of(ours)], [want, *grads_of(theirs)])


@pytest.mark.parametrize("breaks", ["an error of the user's", "a wait"])
def test_after_a_capture_that_broke_off_all_is_as_before(real_gpu: None, breaks: str) -> None:
    grads = there([randn(70_001), randn(5)])
    params = parameters(grads)
    want = fastclip.get_total_norm(grads)

    def broken() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            found = fastclip.clip_grad_norm_(params, INF)
            if breaks == "a wait":
                found.item()
            raise RuntimeError("by the user")

    fastclip.clip_grad_norm_(params, INF)
    # torch's own context stays on its stream where the capture can't be ended
    with torch.cuda.stream(torch.cuda.current_stream()), pytest.raises(RuntimeError):
        broken()
    assert torch.equal(fastclip.get_total_norm(grads), want)
    assert torch.equal(gpu.captured(lambda: fastclip.clip_grad_norm_(params, INF))(), want)


# ---- streams and threads


def test_streams_and_threads_are_out_of_each_others_way(real_gpu: None) -> None:
    """Each with a list and a stream of its own, and all with one that they only read."""
    lists = [there([randn(70_001), *(randn(31) for _ in range(40 + 300 * i))]) for i in range(4)]
    shared = there([randn(200_003), randn(1)])
    wanted = [fastclip.get_total_norm(own) for own in lists]
    want_shared = fastclip.get_total_norm(shared)
    found: list[list[Tensor]] = [[] for _ in lists]
    of_shared: list[Tensor] = []
    streams = [torch.cuda.Stream() for _ in lists]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        for _ in range(50):
            with torch.cuda.stream(streams[i]):
                found[i].append(fastclip.get_total_norm(lists[i]))
                of_shared.append(fastclip.get_total_norm(shared))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(lists))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(50):  # and from one thread
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(fastclip.get_total_norm(lists[i]))
    torch.cuda.synchronize()
    for own, want in zip(found, wanted, strict=True):
        assert len(own) == 100
        assert all(torch.equal(bits(got), bits(want)) for got in own)
    assert len(of_shared) == 200
    assert all(torch.equal(bits(got), bits(want_shared)) for got in of_shared)


# ---- sizes


def test_more_elements_than_32_bits_count(real_gpu: None) -> None:
    grad = torch.zeros(2**31 + 7, dtype=torch.bfloat16, device="cuda")
    grad[-1], grad[2**31 - 2] = 3.0, 4.0
    param = parameter(grad)
    assert float(fastclip.clip_grad_norm_([param], 2.5, eps=0.0)) == 5.0
    assert [float(grad[-1]), float(grad[2**31 - 2])] == [1.5, 2.0]
    fastclip.clip_grad_value_([param], 1.0)
    assert [float(grad[-1]), float(grad[2**31 - 2])] == [1.0, 1.0]
    grad[-2] = NAN
    assert fastclip.grad_stats([param]).nans.tolist() == [1]
    fastclip.clip_grad_norm_([param], INF, nonfinite="zero")
    assert [float(grad[-1]), float(grad[-2])] == [1.0, 0.0]
