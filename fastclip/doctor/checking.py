"""``fastclip.check``: passes, then measurements, then findings."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.doctor import depth, recurrence
from fastclip.doctor.diagnosis import SEVERITIES, Diagnosis, Finding, Row
from fastclip.doctor.layers import Call
from fastclip.doctor.passes import Seen, observe
from fastclip.doctor.subject import subject_of
from fastclip.doctor.untouched import Untouched


def check(
    model: nn.Module,
    batch: Any = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: Callable[[nn.Module], Tensor] | None = None,
) -> Diagnosis:
    """Looks for what keeps a model from training: a few passes over one batch, then a table and plain sentences.

    It changes nothing: parameters, buffers, gradients, optimizer state, training modes, hooks and random generators are
    afterwards what they were, also when the model raises.

    Args:
        model: as it is trained.
        batch: ``(inputs, targets)``; the loss is ``loss_fn(model(inputs), targets)``.
        loss_fn: a function or module of outputs and targets.
        optimizer: the one it is trained with.
        step: instead of ``batch`` and ``loss_fn``, for everything else: ``loss = step(model)``, one forward pass.

    Returns:
        :class:`Diagnosis`; ``print()`` it.

    Raises:
        TypeError: not exactly one of the two forms.
        DoctorError: the model failed, or isn't ready to run. Nothing was changed.

    Example:
        >>> import torch, fastclip
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Sigmoid()) for _ in range(12)]
        >>> model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 2))
        >>> x, y = torch.randn(64, 16), torch.randint(2, (64,))
        >>> fastclip.check(model, (x, y), torch.nn.CrossEntropyLoss()).findings[0].code
        'vanishing-depth'

    Source: Pascanu et al. 2013, arXiv:1211.5063; Glorot and Bengio 2010.
    """
    subject = subject_of(model, batch, loss_fn, optimizer, step)
    with Untouched([subject.model, *subject.others]), _uncompiled():
        if not subject.model.training:
            subject.model.train()
        seen = observe(subject)
    found = sorted(_findings(seen), key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(
        findings=tuple(found),
        rows=tuple(_row(call, seen) for call in seen.calls),
        curves=tuple(seen.curves),
        loss=seen.loss,
        total_norm=math.nan if seen.grads is None else float(seen.grads.total_norm),
    )


def _uncompiled() -> AbstractContextManager[object]:
    """Compiled code runs as it was written: hooks on modules don't fire in what was compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _findings(seen: Seen) -> Iterator[Finding]:
    yield from depth.findings(seen.calls, seen.weight_grads)
    yield from recurrence.findings(seen.curves)


def _row(call: Call, seen: Seen) -> Row:
    made = call.made
    return Row(
        layer=call.label,
        kind=call.layer.kind,
        mean=math.nan if made is None else made.mean,
        std=math.nan if made is None else made.std,
        gain=call.gain,
        weight_std=math.nan,
        output_grad=call.output_grad,
        weight_grad=seen.weight_grads.get(call.layer.name, math.nan),
    )
