"""Clipping in the middle of the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastclip import clipping, compiled
from fastclip.checks import norm_type_number, number

State = TypeVar("State", Tensor, tuple[Tensor, ...])


class _Boundary(Function):
    @staticmethod
    def forward(ctx: Any, max_norm: float, norm_type: float, *hidden: Tensor) -> tuple[Tensor, ...]:
        ctx.max_norm, ctx.norm_type = max_norm, norm_type
        return tuple(h.view_as(h) for h in hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # what goes along without a gradient of its own, as lengths do, has None here, or zeros of integers
        has_grad = [grad is not None and (grad.is_floating_point() or grad.is_complex()) for grad in grads]
        given = [grad for grad, has in zip(grads, has_grad, strict=True) if grad is not None and has]
        if not given:
            return None, None, *grads
        bounded = compiled.bounded if torch.compiler.is_compiling() else clipping.bounded
        clipped = iter(bounded(given, ctx.max_norm, ctx.norm_type))
        return None, None, *(next(clipped) if has else None for has in has_grad)


_through: Callable[..., tuple[Tensor, ...]] = _Boundary.apply


def clip_boundary(hidden: State, max_norm: float, *, norm_type: float = 2.0) -> State:
    """The identity, whose gradient is clipped: for the hidden state between two chunks of a long sequence.

    A gradient that explodes on its way back through time is bounded where it crosses, so that earlier chunks learn
    from something finite in size. NaN and Inf go through, to be found where all gradients are.

    Args:
        hidden: the hidden state, a tensor or a tuple of tensors such as an LSTM's (h, c), which are clipped by their
            joint norm.
        max_norm: bound of the gradient's norm, >= 0.
        norm_type: p of the p-norm.

    Returns:
        The same values; gradients flow.

    Source: Pascanu et al. 2013, arXiv:1211.5063, applied at the truncation of backpropagation through time.

    Example:
        >>> import torch, fastclip
        >>> h = torch.ones(2, requires_grad=True)
        >>> (fastclip.clip_boundary(h, 1.0) * torch.tensor([3.0, 4.0])).sum().backward()
        >>> h.grad
        tensor([0.6000, 0.8000])
    """
    bound, p = number("max_norm", max_norm), norm_type_number(norm_type)
    if isinstance(hidden, Tensor):
        (out,) = _through(bound, p, hidden)
        return out
    if not isinstance(hidden, tuple) or not all(isinstance(h, Tensor) for h in hidden):
        raise TypeError(f"hidden: expected a tensor or a tuple of tensors, got {type(hidden).__name__}")
    clipped = _through(bound, p, *hidden)
    return type(hidden)(*clipped) if hasattr(hidden, "_fields") else tuple(clipped)
