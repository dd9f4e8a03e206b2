"""torch's clipping functions, by the same names, over one read of the gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastclip import clipping, compiled
from fastclip.checks import bound_of, nonfinite_rule, norm_type_number, number, real
from fastclip.policies import GlobalNorm, Policy, Unitwise, policy_of
from fastclip.reading import check_not_captured
from fastclip.stats import GradStats
from fastclip.tensors import TensorOrTensors, grads_among, grads_of, grads_or_parameters
from fastclip.ties import any_marked, process_group
from fastclip.types import Request


def clip_grad_norm_(
    parameters: TensorOrTensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    group: Any = None,
    pp_mesh: Any = None,
) -> Tensor:
    """Scales all gradients in place so that their joint norm is at most ``max_norm``.

    Equivalent to ``torch.nn.utils.clip_grad_norm_``, in one read of the gradients and, only when the norm
    exceeds ``max_norm``, one write: at or below it the gradients stay bitwise untouched. The norm is right at
    every magnitude: finite gradients never overflow it, and 16-bit ones do not round it.

    Args:
        parameters: a tensor or an iterable of tensors (generators too); those without a ``.grad`` are ignored,
            a gradient listed twice counts and is scaled once. Any shapes, layouts and mix of float, complex
            and 16-bit dtypes, on any mix of devices.
        max_norm: bound of the norm, >= 0, a number or a one-element tensor; ``inf`` only reads. One on an accelerator
            is not waited for, so its value can't be checked.
        norm_type: p of the p-norm: any number, ``'inf'``, ``-inf``; 0 counts the elements that aren't 0.
        error_if_nonfinite: the same as ``nonfinite="raise"``.
        foreach: accepted for compatibility; every backend works on all tensors at once.
        eps: added to the norm in the denominator of the coefficient ``max_norm / (total_norm + eps)``.
        nonfinite: what NaN or Inf elements do. ``"propagate"``: exactly what they do in torch (NaN makes every
            gradient NaN, Inf makes the finite ones 0). ``"skip"``: gradients stay untouched, the norm is
            returned. ``"zero"``: they become 0, the rest is clipped by the norm of what is left, which is
            returned. ``"raise"``: raises before anything is written.
        group: a process group, or a mesh of one dimension, whose other ranks pass other parameters that count in the
            norm: pipeline stages, or FSDP1's ``model.process_group``. Sharded gradients (DTensor) need none: their
            norm is that of the whole tensors, and every rank of their mesh has to call this.
        pp_mesh: the same as ``group``, as torchtitan calls it.

    Writes: each ``p.grad``, only if the norm exceeds ``max_norm`` (or for ``"zero"``, if there is something to zero).

    Returns:
        The total norm before clipping, 0-d float32 (float64 if a gradient is float64 or complex128), on the
        first gradient's device; no host sync off the CPU, except with ``"raise"``. 0 if there is no gradient.

    Raises:
        NonFiniteGradientError: with ``"raise"``; a ``RuntimeError`` that names tensor, index and value.
        UnsupportedGradientError: a ``TypeError``; a gradient that can't be read or written; nothing was written.
        ValueError: a negative or NaN ``max_norm`` or ``eps``, an unknown ``nonfinite``.

    Source: Pascanu et al. 2013, arXiv:1211.5063; torch.nn.utils.

    Example:
        >>> import torch, fastclip
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> fastclip.clip_grad_norm_([p], max_norm=1.0)
        tensor(5.)
        >>> p.grad
        tensor([0.6000, 0.8000])
    """
    nonfinite = nonfinite_rule(nonfinite, error_if_nonfinite)
    if group is not None and pp_mesh is not None:
        raise TypeError("group and pp_mesh are two names for the same; pass one of them")
    group = pp_mesh if group is None else group
    if torch.compiler.is_compiling():
        if group is not None or any_marked():
            settings: Any = {"norm_type": norm_type, "eps": eps, "nonfinite": nonfinite, "group": group}
            return compiled.outside(clip_grad_norm_, parameters, max_norm, **settings)
        request = Request(norm_type_number(norm_type), number("max_norm", max_norm), number("eps", eps))
        return compiled.clip_grad_norm_(parameters, request, nonfinite)
    policy = GlobalNorm(bound_of("max_norm", max_norm), norm_type=norm_type, eps=eps)
    return clipping.clip_(grads_of(parameters), policy, nonfinite, process_group(group))


def clip_grads_(
    parameters: TensorOrTensors, policy: Policy | str, *, nonfinite: str = "propagate", group: Any = None
) -> Tensor:
    """Clips all gradients in place by a rule of :mod:`fastclip.policies`.

    Args:
        parameters: as in :func:`clip_grad_norm_`. A policy that learns about single gradients takes them by their
            place in this list, so keep its order.
        policy: the rule, or its name for one with its defaults; one that learns does so at each call. It can't skip
            a step here: a policy that would leaves the gradients untouched.
        nonfinite, group: as in :func:`clip_grad_norm_`.

    Writes: each ``p.grad`` that the policy clips.

    Returns:
        The total norm before clipping, as :func:`clip_grad_norm_`.

    Raises:
        TypeError, ValueError: ``policy`` is not a policy, or not the name of one.
        NonFiniteGradientError, UnsupportedGradientError: as :func:`clip_grad_norm_`.

    Example:
        >>> import torch, fastclip
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([30.0, 40.0])
        >>> fastclip.clip_grads_([p], fastclip.policies.PerTensorNorm(5.0))
        tensor(50.)
        >>> p.grad
        tensor([3., 4.])
    """
    if torch.compiler.is_compiling():
        return compiled.outside(clip_grads_, parameters, policy, nonfinite=nonfinite, group=group)
    return clipping.clip_(grads_of(parameters), policy_of(policy), nonfinite_rule(nonfinite), process_group(group))


def adaptive_clip_grad_(
    parameters: TensorOrTensors, clip_factor: float = 0.01, eps: float = 1e-3, norm_type: float = 2.0
) -> None:
    """Adaptive gradient clipping: each row or filter down to ``clip_factor`` times the norm of its weights.

    Equivalent to ``timm.utils.agc.adaptive_clip_grad``, in one read of gradients and weights and a write of only
    the rows that are clipped. For other units than rows: ``clip_grads_(parameters, policies.Unitwise(...))``.

    Args:
        parameters: as in :func:`clip_grad_norm_`; leave the last linear layer out.
        clip_factor, eps, norm_type: as in :class:`fastclip.policies.Unitwise`.

    Writes: the rows that are clipped, of each ``p.grad``.

    Source: Brock et al. 2021, arXiv:2102.06171.
    """
    clip_grads_(parameters, Unitwise(clip_factor, eps=eps, norm_type=norm_type))


def clip_grad_value_(parameters: TensorOrTensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clamps every gradient element into ``[-clip_value, clip_value]`` in place; NaN stays NaN.

    Equivalent to ``torch.nn.utils.clip_grad_value_``; memory where nothing exceeds the bound is not written.

    Args:
        parameters: as in :func:`clip_grad_norm_`; real dtypes only.
        clip_value: bound, >= 0, a number or a one-element tensor, for which the host waits.
        foreach: accepted for compatibility.

    Writes: each ``p.grad`` that holds an element beyond the bound.

    Raises:
        RuntimeError: a complex gradient, which has no order (as in torch); nothing was written.
        UnsupportedGradientError: a ``TypeError``; a gradient that can't be written; nothing was written.
        ValueError: a negative or NaN ``clip_value``.
    """
    if torch.compiler.is_compiling():
        compiled.clip_grad_value_(parameters, number("clip_value", clip_value))
        return
    clipping.clamp_(grads_of(parameters), _read_now("clip_value", clip_value))


def get_total_norm(
    tensors: TensorOrTensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Any = None,
) -> Tensor:
    """The p-norm of all ``tensors`` as one vector; reads every element once and writes nothing.

    Equivalent to ``torch.nn.utils.get_total_norm``, right at every magnitude and not rounded to 16 bits.

    Args:
        tensors: a tensor or an iterable of tensors, usually gradients; None entries are ignored, a tensor
            listed twice counts once.
        norm_type: p of the p-norm, as in :func:`clip_grad_norm_`.
        error_if_nonfinite: raise ``NonFiniteGradientError`` if an element is NaN or Inf.
        foreach: accepted for compatibility.
        group: as in :func:`clip_grad_norm_`.

    Returns:
        0-d float32 (float64 if a tensor is float64 or complex128), on the first tensor's device.
    """
    request = Request(norm_type_number(norm_type))
    if torch.compiler.is_compiling():
        if group is not None or any_marked():
            return compiled.outside(get_total_norm, tensors, norm_type, error_if_nonfinite, group=group)
        return compiled.get_total_norm(tensors, request, error_if_nonfinite)
    return clipping.total_norm(grads_among(tensors), request, error_if_nonfinite, process_group(group))


def clip_grads_with_norm_(
    parameters: TensorOrTensors, max_norm: float, total_norm: Tensor | float, foreach: bool | None = None
) -> None:
    """Scales all gradients in place by ``max_norm / (total_norm + 1e-6)`` where ``total_norm > max_norm``.

    Equivalent to ``torch.nn.utils.clip_grads_with_norm_``; at or below the bound nothing is written.

    Args:
        parameters: as in :func:`clip_grad_norm_`.
        max_norm: bound of the norm, >= 0; ``inf`` writes nothing.
        total_norm: the norm to clip by, a number or a one-element tensor on any device. NaN makes every
            gradient NaN and Inf makes every finite gradient 0, as in torch.
        foreach: accepted for compatibility.

    Writes: each ``p.grad``, if ``total_norm`` exceeds ``max_norm``.
    """
    request = Request(max_norm=_read_now("max_norm", max_norm))
    if not isinstance(total_norm, Tensor):
        total_norm = real("total_norm", total_norm)
    elif total_norm.numel() != 1:
        raise TypeError(f"total_norm: expected one element, got shape {tuple(total_norm.shape)}")
    if torch.compiler.is_compiling():
        compiled.clip_grads_with_norm_(parameters, request, total_norm)
        return
    clipping.scale_by_norm_(grads_of(parameters), request, total_norm)


def grad_stats(
    params_or_grads: torch.nn.Module | TensorOrTensors | Iterable[tuple[str, Tensor]],
    names: Iterable[str] | None = None,
    *,
    norm_type: float = 2.0,
    extras: bool = True,
    weights: bool = False,
    group: Any = None,
) -> GradStats:
    """Per-tensor and total norms, NaN and Inf counts of all gradients, in one read and without a sync.

    Args:
        params_or_grads: a module (its parameter names are kept), parameters, gradients, or (name, tensor)
            pairs. A list is taken for parameters when one of them has a ``.grad`` or is a leaf that requires one.
        names: one per tensor given.
        norm_type: p of the p-norm, as in :func:`clip_grad_norm_`.
        extras: also find the largest magnitude and count zeros, which takes more work per element.
        weights: also read the weights, the parameters that have these gradients: their 2-norms, largest magnitudes and
            sums of magnitudes.
        group: as in :func:`clip_grad_norm_`. Of sharded gradients all ranks are told of the whole tensors, so all have
            to call this.

    Returns:
        :class:`GradStats`; ``print()`` it, or ask it for its ``worst()`` tensors.

    Raises:
        ValueError: ``weights`` of gradients that were passed without their parameters.

    Example:
        >>> import torch, fastclip
        >>> stats = fastclip.grad_stats([torch.tensor([3.0, 4.0]), torch.tensor([float("nan"), 1.0])], ["w", "b"])
        >>> stats.worst(1)[0].name
        'b'
    """
    request = Request(norm_type_number(norm_type), extras=extras, weights=weights)
    if torch.compiler.is_compiling():
        if group is not None or any_marked():
            return compiled.outside(
                grad_stats, params_or_grads, names, norm_type=norm_type, extras=extras, weights=weights, group=group
            )
        return compiled.grad_stats(params_or_grads, names, request)
    return clipping.grad_stats(grads_or_parameters(params_or_grads, names), request, process_group(group))


def _read_now(name: str, value: float | Tensor) -> float:
    """A bound that the host has to know."""
    if isinstance(bound_of(name, value), Tensor) and not torch.compiler.is_compiling():
        check_not_captured(f"{name}, a tensor on a device, has to be read by the host", "pass a number")
    return number(name, value)
