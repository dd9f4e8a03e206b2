"""A forward and a backward pass with everything watched that the measurements need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fastclip.functional as functional
from fastclip.doctor.diagnosis import Curve
from fastclip.doctor.layers import Call, Layers
from fastclip.doctor.moments import norm_of
from fastclip.doctor.sequences import Sequences, curves_of_loops
from fastclip.doctor.subject import Subject, during
from fastclip.doctor.watching import Watch
from fastclip.stats import GradStats


@dataclass(frozen=True)
class Seen:
    """What one pass showed.

    Attributes:
        loss: its value.
        calls: of the layers, in the order in which they ran.
        curves: gradients over time.
        grads: of the parameters that got a gradient; None if the loss doesn't depend on any.
        without: names of the parameters that got none.
        weight_grads: name of a layer -> norm of the gradient of its own parameters.
    """

    loss: float
    calls: list[Call]
    curves: list[Curve]
    grads: GradStats | None
    without: tuple[str, ...]
    weight_grads: dict[str, float]


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    """Of the loss with respect to each tensor; None where it doesn't depend on it.

    Nothing is written to any ``.grad``, and hooks on parameters (an optimizer's that steps in the backward pass) don't
    fire.
    """
    if not loss.requires_grad:
        return [None] * len(tensors)
    with during("the backward pass"):
        return list(torch.autograd.grad(loss, tensors, allow_unused=True))


def observe(subject: Subject) -> Seen:
    """One pass under watch."""
    layers, sequences = Layers(subject.model), Sequences()
    with Watch(subject.model, [sequences, layers]):
        loss = subject.loss()
    parameters = list(subject.parameters.values())
    found = gradients(loss, [*parameters, *sequences.inputs])
    named = dict(zip(subject.parameters, found, strict=False))
    given = {name: grad for name, grad in named.items() if grad is not None}
    return Seen(
        loss=float(loss.detach()),
        calls=layers.calls,
        curves=sequences.curves(found[len(parameters) :]) + curves_of_loops(layers.calls),
        grads=functional.grad_stats(list(given.values()), list(given)) if given else None,
        without=tuple(name for name, grad in named.items() if grad is None),
        weight_grads={
            call.layer.name: norm_of([given[name] for name in call.layer.parameters if name in given])
            for call in layers.calls
        },
    )
