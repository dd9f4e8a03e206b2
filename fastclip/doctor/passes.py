"""A forward and a backward pass with everything watched that the measurements need."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastclip.functional as functional
from fastclip.doctor.diagnosis import Curve, DoctorError
from fastclip.doctor.initialisation import Weight, weights_of
from fastclip.doctor.inputs import Given, Inputs
from fastclip.doctor.layers import Call, Layers
from fastclip.doctor.loss_calls import MOVES, LossCall, LossCalls, operation
from fastclip.doctor.moments import norm_of
from fastclip.doctor.operations import Activation, Attention, Operations
from fastclip.doctor.sequences import Sequences, curves_of_loops
from fastclip.doctor.subject import Subject, during
from fastclip.doctor.watching import Watch
from fastclip.stats import GradStats

BENT = ("Exp", "LogSigmoid", "LogSigmoidForward", "Sigmoid", "Softplus", "Sub")
NORMS = ("NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeGroupNorm", "FusedRmsNorm")
RMS_NORM = {"Pow", "Mul"}  # where it is written out: its square, and what that makes times itself


@dataclass(frozen=True)
class Seen:
    """What one pass showed.

    Attributes:
        loss: its value.
        given: the tensors that the model got.
        calls: of the layers, in the order in which they ran.
        activations, attentions: in the order in which they happened.
        follows: position of a call -> the activation that came next.
        may_be_small: positions of the calls behind which there is no other layer on the way to the loss, or where a
            normalisation comes next.
        losses: the loss functions that were called.
        curves: gradients over time.
        weights: of the layers that ran.
        grads: of the parameters that got a gradient, and of these; None if the loss doesn't depend on any.
        without: names of the parameters that got none.
        weight_grads: name of a layer -> norm of the gradient of its own parameters.
        hidden: whether some layers ran where they couldn't be watched.
        unregistered: names of the parameters that the loss depends on and the model keeps where it doesn't list them.
    """

    loss: float
    given: list[Given]
    calls: list[Call]
    activations: list[Activation]
    attentions: list[Attention]
    follows: dict[int, str]
    may_be_small: set[int]
    losses: list[LossCall]
    curves: list[Curve]
    weights: list[Weight]
    grads: GradStats | None
    without: tuple[str, ...]
    weight_grads: dict[str, float]
    hidden: bool
    unregistered: tuple[str, ...] = ()

    @property
    def zero(self) -> tuple[str, ...]:
        """Names of the parameters whose gradient is 0 everywhere."""
        return () if self.grads is None else zeros_of(self.grads)

    @property
    def bad(self) -> tuple[str, ...]:
        """Names of the parameters whose gradient holds NaN or Inf."""
        if self.grads is None:
            return ()
        found = (self.grads.nans + self.grads.infs).tolist()
        return tuple(name for name, count in zip(self.grads.names, found, strict=True) if count)


def zeros_of(grads: GradStats) -> tuple[str, ...]:
    """Names of those that are 0 everywhere."""
    norms = zip(grads.names, grads.tensor_norms.tolist(), grads.sizes, strict=True)
    return tuple(name for name, norm, size in norms if norm == 0.0 and size > 0)


def steps_back(loss: Tensor, until: Collection[Any] = ()) -> Iterator[Any]:
    """Each node of the graph that the backward pass goes through, and none behind those in ``until``."""
    waiting: list[Any] = [loss.grad_fn]
    known = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in known:
            known.add(node)
            yield node
            if node in until:
                continue
            waiting += [following for following, _ in node.next_functions]


def _heads(loss: Tensor, calls: list[Call]) -> set[int]:
    made = {call.node for call in calls}
    first = made.intersection(steps_back(loss, made))
    return {place for place, call in enumerate(calls) if call.node in first}


def _normalised(calls: list[Call], takers: dict[Any, list[Any]]) -> set[int]:
    def is_normalised(node: Any) -> bool:
        behind = takers.get(node, [])
        if {operation(taker) for taker in behind} == RMS_NORM:
            return True
        return bool(behind) and all(
            operation(taker) in NORMS or (operation(taker) in MOVES and is_normalised(taker)) for taker in behind
        )

    return {place for place, call in enumerate(calls) if is_normalised(call.node)}


def _is_bent(call: LossCall, takers: dict[Any, list[Any]]) -> bool:
    """Whether a difference isn't measured but only a part of something: a ratio of probabilities, a margin."""
    behind = takers.get(call.step, [])
    return bool(behind) and all(operation(node) in BENT for node in behind)


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Of the loss with respect to each tensor; None where it doesn't depend on it.

    Nothing is written to any ``.grad``, and hooks on parameters (an optimizer's that steps in the backward pass) don't
    fire.
    """
    if not loss.requires_grad:
        return [None] * len(tensors)
    with during("the backward pass"):
        return list(torch.autograd.grad(loss, tensors, allow_unused=True))


def observe(subject: Subject) -> Seen:
    """One pass under watch; it leaves the gradients in the parameters."""
    inputs, sequences, layers = Inputs(), Sequences(), Layers(subject.model)
    watch = Watch(subject.model, [inputs, sequences, layers])
    operations, losses = Operations(watch, layers), LossCalls(watch)
    with watch, losses, operations:
        loss = subject.loss()
    if any(node.name() == "CheckpointFunctionBackward" for node in steps_back(loss)):
        raise DoctorError(
            "a checkpoint with use_reentrant=True starts a backward pass of its own, which can't be watched: use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    takers: dict[Any, list[Any]] = {}
    for node in steps_back(loss):
        for following, _ in node.next_functions:
            takers.setdefault(following, []).append(node)
    kept = subject.unregistered
    leaves = [node.variable for node in steps_back(loss) if node.name() == "torch::autograd::AccumulateGrad"]
    unregistered = tuple(sorted(kept[id(leaf)] for leaf in leaves if id(leaf) in kept))
    parameters = list(subject.parameters.values())
    layers.backward = True
    found = gradients(loss, [*parameters, *sequences.inputs])
    grads = {name: grad for name, grad in zip(subject.parameters, found, strict=False) if grad is not None}
    for name, grad in grads.items():
        subject.parameters[name].grad = grad
    own = [(name, subject.parameters[name]) for name in grads]
    return Seen(
        loss=float(loss.detach()),
        given=inputs.given(layers.calls),
        calls=layers.calls,
        activations=operations.activations,
        attentions=operations.attentions,
        follows=operations.follows,
        may_be_small=_heads(loss, layers.calls) | _normalised(layers.calls, takers),
        losses=[call for call in losses.calls if not _is_bent(call, takers)],
        curves=sequences.curves(found[len(parameters) :]) + curves_of_loops(layers.calls),
        weights=weights_of(layers.calls, grads),
        grads=functional.grad_stats(own, weights=True) if grads else None,
        without=tuple(name for name in subject.parameters if name not in grads),
        weight_grads={
            layer.name: norm_of([grads[name] for name in layer.parameters if name in grads])
            for layer in {call.layer.name: call.layer for call in layers.calls}.values()
        },
        hidden=watch.hidden,
        unregistered=unregistered,
    )
