"""How a verdict reaches torch's fused steps: through ``grad_scale`` and ``found_inf``, without a pass of its own.

``torch.optim.Adam``, ``AdamW``, ``SGD`` and ``Adagrad`` with ``fused=True`` divide each gradient by their attribute
``grad_scale`` while they read it, write the quotient back to ``.grad``, and leave parameters and state alone
where ``found_inf`` is 1.0; both are 0-d float32 tensors. It is the way in which torch's own GradScaler talks to
them. Every other optimizer asserts that the attributes are not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip.types import wide_dtype

FUSED_STEPS = ("torch.optim.adam", "torch.optim.adamw", "torch.optim.sgd", "torch.optim.adagrad")
FUSED_KERNELS = {getattr(torch.ops.aten, f"_fused_{name}_") for name in ("adam", "adamw", "sgd", "adagrad")}
RIDERS = ("grad_scale", "found_inf")
SEVERAL = "_fastclip_several"  # attribute of a class whose ``parts`` are optimizers that step as one

# Of gradients: from here on a step takes a GPU longer than it takes the host to launch it twice (bench/NOTES.md).
TWICE_FROM_BYTES = 1 << 30

FLOAT32 = torch.finfo(torch.float32)


def rides(optimizer: Optimizer) -> bool:
    """Whether this optimizer's step is one of torch's fused ones, in all its groups."""
    return all(type(part).step.__module__ in FUSED_STEPS for part in parts_of(optimizer)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that step where several do it as one."""
    parts: list[Optimizer] = (
        getattr(optimizer, "parts", []) if getattr(type(optimizer), SEVERAL, False) else [optimizer]
    )
    return parts


def first_step_is_lost(optimizer: Optimizer) -> bool:
    """Whether a step that is skipped on the device would leave uninitialised memory behind.

    Fused SGD allocates its momentum buffers, and then leaves it to the kernel to fill them.
    """
    return any(
        parameter.grad is not None and part.state.get(parameter, {}).get("momentum_buffer") is None
        for part in parts_of(optimizer)
        if type(part).step.__module__ == "torch.optim.sgd"
        for group in part.param_groups
        if group["momentum"]
        for parameter in group["params"]
    )


def divisor(clip_coef: float | Tensor, grad_scale: float | Tensor | None) -> float | Tensor | None:
    """What the gradients are to be divided by, as a rider; 1.0 for nothing at all, None if float32 can't say it."""
    scale = 1.0 if grad_scale is None else grad_scale
    if isinstance(clip_coef, Tensor) or isinstance(scale, Tensor):
        if isinstance(clip_coef, Tensor):
            clip_coef = clip_coef.to(wide_dtype(clip_coef.device))  # a rule may have said it in 16 bits
        wanted = torch.as_tensor(scale / clip_coef)
        # Past float32's range it stays finite, so that finite gradients don't vanish (the bound is missed there);
        # Inf means a coefficient of 0.
        within = torch.where(torch.isinf(wanted), wanted, wanted.clamp(FLOAT32.tiny, FLOAT32.max))
        return within.to(torch.float32)
    if not clip_coef or not FLOAT32.tiny <= scale / clip_coef <= FLOAT32.max:
        return None
    return scale / clip_coef


class aboard:
    """During the ``with`` block the optimizer has exactly these riders; afterwards those that it had before."""

    def __init__(self, optimizer: Optimizer, **riders: Tensor | None) -> None:
        self._attributes: dict[str, Any] = vars(optimizer)
        self._riders = {name: value for name, value in riders.items() if value is not None}

    def __enter__(self) -> None:
        self._before = {name: self._attributes.pop(name) for name in RIDERS if name in self._attributes}
        self._attributes.update(self._riders)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._only(self._before)

    @contextmanager
    def getting_off(self) -> Iterator[None]:
        """In this block, inside the other, those that it had before; and none at all from then on."""
        self._only(self._before)
        try:
            yield
        finally:
            self._only({})

    def _only(self, riders: dict[str, Any]) -> None:
        for name in RIDERS:
            self._attributes.pop(name, None)
        self._attributes.update(riders)


class launched_twice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """During the ``with`` block a ``grad_scale`` of 1 costs no write of the gradients, though only the device knows it.

    Each of torch's fused kernels is launched with the ``grad_scale`` and without it. One of the two finds its
    ``found_inf`` set, and returns before it reads anything.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        grad_scale, found_inf = (kwargs.get(name) for name in RIDERS)
        if func.overloadpacket not in FUSED_KERNELS or grad_scale is None:
            return func(*args, **kwargs)
        is_one = (grad_scale == 1.0).to(torch.float32)  # not NaN, which has to reach the gradients
        for rider, idle in ((None, 1.0 - is_one), (grad_scale, is_one)):
            skip = idle if found_inf is None else torch.maximum(idle, found_inf)
            func(*args, **{**kwargs, "grad_scale": rider, "found_inf": skip})
        return None
