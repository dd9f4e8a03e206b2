"""Every clipping rule by a name, and gradients to clip by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from oracle import bits, norm, parameter, parameters
from torch import Tensor

import fastclip
import fastclip.backends
from fastclip import ClippedOptimizer
from fastclip.policies import (
    AdaGC,
    BlockRMS,
    Chain,
    GlobalNorm,
    Percentile,
    PerTensorNorm,
    PerTensorPercentile,
    Policy,
    SkipAboveMedian,
    SkipLarge,
    Unitwise,
    Value,
    ZScore,
)


def shrinking(step: int) -> float:
    return 2.0 / (1 + step)


STATELESS: dict[str, Callable[[], Policy]] = {
    "global": lambda: GlobalNorm(0.7),
    "global-1": lambda: GlobalNorm(0.7, norm_type=1.0),
    "value": lambda: Value(0.4),
    "tensor": lambda: PerTensorNorm(0.5),
    "rms": lambda: BlockRMS(0.2),
    "unitwise": lambda: Unitwise(0.05),
    "unitwise-value": lambda: Chain(Unitwise(0.05), Value(0.02)),
    "unitwise-global": lambda: Chain(Unitwise(0.5), GlobalNorm(0.3), PerTensorNorm(0.1)),
}
LEARNING: dict[str, Callable[[], Policy]] = {
    "schedule": lambda: GlobalNorm(shrinking),
    "percentile": lambda: Percentile(30, window=5),
    "tensor-percentile": lambda: PerTensorPercentile(30, window=5),
    "zscore": lambda: ZScore(1.0, warmup=3),
    "adagc": lambda: AdaGC(warmup=3),
    "skip-large": lambda: SkipLarge(2.0, warmup=3),
    "skip-median": lambda: SkipAboveMedian(2.0, window=6, warmup=2),
    "chain": lambda: Chain(ZScore(1.0, warmup=3), AdaGC(warmup=3), GlobalNorm(0.7)),
    "chain-value": lambda: Chain(Percentile(30, window=5), Value(0.3)),
    "nested": lambda: Chain(Chain(Unitwise(0.5), ZScore(1.0, warmup=3)), PerTensorPercentile(50, window=5)),
}
SAME_WINDOW: dict[str, Callable[[], Policy]] = {
    "percentile-6": lambda: Percentile(window=6),
    "tensor-percentile-6": lambda: PerTensorPercentile(window=6),
}
LEARNERS = {name: make for name, make in (LEARNING | SAME_WINDOW).items() if name != "schedule"}
POLICIES = STATELESS | LEARNING
SHAPES = ((4, 3), (5,), (2, 3, 2), ())
SIZES = (1.0, 1.2, 0.8, 1.1, 5.0, 0.9, 1.0, 30.0, 0.1, 1.0, 2.0, 1.0)


def step_grads(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The gradients of a step, the same in every run."""
    generator = torch.Generator().manual_seed(step)
    size = SIZES[step % len(SIZES)]
    return [(torch.randn(shape, generator=generator) * size).to(dtype) for shape in SHAPES]


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(99)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give(params: list[torch.nn.Parameter], grads: list[Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()


def clipped(policy: Policy, grads: list[Tensor], params: list[Tensor] | None = None, **kwargs: str) -> list[Tensor]:
    """What a policy makes of these gradients, at these parameters."""
    params = [torch.nn.Parameter(p.clone()) for p in params] if params else parameters(grads)
    give(params, grads)
    fastclip.clip_grads_(params, policy, **kwargs)
    return [p.grad for p in params]


def series(policy: Policy, norms: list[float], dtype: torch.dtype = torch.float32) -> list[float]:
    """One gradient of two elements per norm -> the norms after clipping."""
    p = parameter(torch.zeros(2, dtype=dtype))
    after = []
    for n in norms:
        p.grad = torch.tensor([0.6 * n, 0.8 * n], dtype=dtype)
        fastclip.clip_grads_([p], policy)
        after.append(norm(p.grad))
    return after


def skips(policy: Policy, norms: list[float]) -> list[bool]:
    """Which of the steps with these norms does not happen."""
    p = parameter(torch.zeros(1))
    opt = ClippedOptimizer(torch.optim.SGD([p], lr=1.0), policy=policy, skip_limit=None)
    skipped = []
    for n in norms:
        before = p.detach().clone()
        p.grad = torch.tensor([n])
        opt.step()
        skipped.append(torch.equal(p.detach(), before))
    assert int(opt.skipped_steps) == sum(skipped)
    return skipped


def identical(a: object, b: object) -> bool:
    """Whether two state dicts are bitwise the same."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


def numbers_of(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from numbers_of(value)


def no_nan_in(state: object) -> bool:
    return not any(bool(tensor.isnan().any()) for tensor in numbers_of(state))


def tensors(*values: object, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.tensor(value, dtype=dtype) for value in values]


def use(backend: str) -> None:
    """Put back by the fixture ``same_start``."""
    fastclip.backends.forced = backend
