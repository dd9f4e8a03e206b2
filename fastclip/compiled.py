"""The functions as ``torch.library`` operators, for code under ``torch.compile``.

A call into the extension would break the graph; an operator with a fake kernel does not. Never used in
eager code, where the dispatcher alone would cost more than a short list of gradients.

What Dynamo traces here is only the way from parameters to gradients; the operators run the eager code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but without importing Dynamo now (2 s)

from fastclip import clipping
from fastclip.policies import GlobalNorm
from fastclip.stats import GradStats
from fastclip.tensors import Grads, TensorOrTensors
from fastclip.types import Request

T = TypeVar("T")

# Not in the graphs of mode="reduce-overhead": what a backend keeps for the next call would lie in their memory.
OUTSIDE = (torch.Tag.cudagraph_unsafe,)


@_disable_dynamo
def outside(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The same call outside of the graph, which breaks here: no operator knows a rule, or which rank holds what."""
    return call(*args, **kwargs)


def clip_grad_norm_(parameters: TensorOrTensors, request: Request, nonfinite: str) -> Tensor:
    grads, positions = _gather(parameters, True)
    if not grads:
        return torch.zeros((), dtype=torch.float32)
    norm: Tensor = _clip_grad_norm_(grads, positions, request.norm_type, request.max_norm, request.eps, nonfinite)
    return norm


def clip_grad_value_(parameters: TensorOrTensors, bound: float) -> None:
    grads, positions = _gather(parameters, True)
    if grads:
        _clip_grad_value_(grads, positions, bound)


def get_total_norm(tensors: TensorOrTensors, request: Request, error_if_nonfinite: bool) -> Tensor:
    grads, positions = _gather(tensors, False)
    if not grads:
        return torch.zeros((), dtype=torch.float32)
    norm: Tensor = _get_total_norm(grads, positions, request.norm_type, error_if_nonfinite)
    return norm


def clip_grads_with_norm_(parameters: TensorOrTensors, request: Request, total_norm: Tensor | float) -> None:
    grads, positions = _gather(parameters, True)
    if grads:
        norm = total_norm
        if not isinstance(norm, Tensor):
            norm = torch.tensor(float(norm), dtype=torch.float64, device="cpu")
        _clip_grads_with_norm_(grads, positions, request.max_norm, request.eps, norm)


def grad_stats(source: Any, names: Iterable[str] | None, request: Request) -> GradStats:
    if isinstance(source, torch.nn.Module):
        source = source.named_parameters()
    listed: list[Any] = [source] if isinstance(source, Tensor) else list(source)
    if listed and names is None and isinstance(listed[0], tuple):
        names = [name for name, _ in listed]
        listed = [tensor for _, tensor in listed]
    take_grad = any(t is not None and t.is_leaf and (t.requires_grad or t.grad is not None) for t in listed)
    grads, positions = _gather(listed, take_grad)
    given = None if names is None else list(names)
    noun = "parameters" if take_grad else "grads"
    if request.weights and not take_grad:
        raise ValueError("the weights of gradients are not known: pass parameters, not gradients")
    weights = [listed[i].detach() for i in positions] if request.weights else []
    total_norm, tensor_norms, found_inf, nans, infs, max_abs, zeros, *of_weights = _grad_stats(
        grads, positions, request.norm_type, request.extras, weights
    )
    return GradStats(
        total_norm,
        tensor_norms,
        found_inf,
        nans,
        infs,
        max_abs if request.extras else None,
        zeros if request.extras else None,
        [grad.numel() for grad in grads],
        [f"{noun}[{i}]" if given is None else given[i] for i in positions],
        request.norm_type,
        *(of_weights if request.weights else ()),
    )


def _gather(tensors: TensorOrTensors, take_grad: bool) -> tuple[list[Tensor], list[int]]:
    """``tensors.grads_of`` in terms that Dynamo traces: every gradient once, and where it stood."""
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    grads: list[Tensor] = []
    positions: list[int] = []
    seen: set[Tensor] = set()
    for i, tensor in enumerate(listed):
        grad = tensor.grad if take_grad else tensor
        if grad is not None and grad not in seen:
            seen.add(grad)
            grads.append(grad.detach() if grad.requires_grad else grad)
            positions.append(i)
    return grads, positions


def _norm_like(grads: list[Tensor]) -> Tensor:
    wide = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    return torch.empty((), dtype=torch.float64 if wide else torch.float32, device=grads[0].device)


@torch.library.custom_op("fastclip::clip_grad_norm_", mutates_args={"grads"}, tags=OUTSIDE)
def _clip_grad_norm_(
    grads: list[Tensor], positions: list[int], norm_type: float, max_norm: float, eps: float, nonfinite: str
) -> Tensor:
    return clipping.clip_(Grads(grads, positions), GlobalNorm(max_norm, norm_type=norm_type, eps=eps), nonfinite)


@_clip_grad_norm_.register_fake
def _(
    grads: list[Tensor], positions: list[int], norm_type: float, max_norm: float, eps: float, nonfinite: str
) -> Tensor:
    return _norm_like(grads)


@torch.library.custom_op("fastclip::clip_grad_value_", mutates_args={"grads"}, tags=OUTSIDE)
def _clip_grad_value_(grads: list[Tensor], positions: list[int], bound: float) -> None:
    clipping.clamp_(Grads(grads, positions), bound)


@_clip_grad_value_.register_fake
def _(grads: list[Tensor], positions: list[int], bound: float) -> None:
    pass


@torch.library.custom_op("fastclip::get_total_norm", mutates_args=(), tags=OUTSIDE)
def _get_total_norm(grads: list[Tensor], positions: list[int], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return clipping.total_norm(Grads(grads, positions, noun="tensors"), Request(norm_type), error_if_nonfinite)


@_get_total_norm.register_fake
def _(grads: list[Tensor], positions: list[int], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return _norm_like(grads)


@torch.library.custom_op("fastclip::clip_grads_with_norm_", mutates_args={"grads"}, tags=OUTSIDE)
def _clip_grads_with_norm_(
    grads: list[Tensor], positions: list[int], max_norm: float, eps: float, total_norm: Tensor
) -> None:
    clipping.scale_by_norm_(Grads(grads, positions), Request(max_norm=max_norm, eps=eps), total_norm)


@_clip_grads_with_norm_.register_fake
def _(grads: list[Tensor], positions: list[int], max_norm: float, eps: float, total_norm: Tensor) -> None:
    pass


@torch.library.custom_op("fastclip::bounded", mutates_args=(), tags=OUTSIDE)
def bounded(grads: list[Tensor], max_norm: float, norm_type: float) -> list[Tensor]:
    return clipping.bounded(grads, max_norm, norm_type)


@bounded.register_fake
def _(grads: list[Tensor], max_norm: float, norm_type: float) -> list[Tensor]:
    return [torch.empty_like(grad) for grad in grads]


@torch.library.custom_op("fastclip::grad_stats", mutates_args=(), tags=OUTSIDE)
def _grad_stats(
    grads: list[Tensor], positions: list[int], norm_type: float, extras: bool, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    request = Request(norm_type, extras=extras, weights=bool(weights))
    given = Grads(grads, None, parameters=weights) if weights else Grads(grads, positions)
    stats = clipping.grad_stats(given, request)
    max_abs, zeros = stats.tensor_max_abs, stats.zeros
    weight_norms, weight_max_abs, weight_sum_abs = stats.weight_norms, stats.weight_max_abs, stats.weight_sum_abs
    return (
        stats.total_norm,
        stats.tensor_norms,
        stats.found_inf,
        stats.nans,
        stats.infs,
        torch.zeros_like(stats.tensor_norms) if max_abs is None else max_abs,
        torch.zeros_like(stats.nans) if zeros is None else zeros,
        torch.zeros_like(stats.tensor_norms) if weight_norms is None else weight_norms,
        torch.zeros_like(stats.tensor_norms) if weight_max_abs is None else weight_max_abs,
        torch.zeros_like(stats.tensor_norms) if weight_sum_abs is None else weight_sum_abs,
    )


@_grad_stats.register_fake
def _(
    grads: list[Tensor], positions: list[int], norm_type: float, extras: bool, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = _norm_like(grads) if grads else torch.empty(())
    norms = total.new_empty(len(grads))
    counts = torch.empty(len(grads), dtype=torch.int64, device=total.device)
    return (
        total,
        norms,
        torch.empty((), dtype=torch.float32, device=total.device),
        counts,
        torch.empty_like(counts),
        torch.empty_like(norms),
        torch.empty_like(counts),
        torch.empty_like(norms),
        torch.empty_like(norms),
        torch.empty_like(norms),
    )
