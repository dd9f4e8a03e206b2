"""Recurrent layers: how the gradient of the loss changes from time step to time step.

The gradient is taken with respect to what goes into the layer at each step t, which is the gradient of the loss with
respect to the hidden state of step t times the same matrix for every t. A cell that the model calls in a loop gives
the gradient with respect to what each call made.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastclip.functional as functional
from fastclip.doctor.diagnosis import Curve
from fastclip.doctor.layers import OVER_TIME, Call, runs_as
from fastclip.doctor.watching import Listener

MIN_STEPS = 8  # a trend over fewer time steps, or calls of one layer, is no trend


class Sequences(Listener):
    """Takes hold of what goes into the recurrent layers.

    Attributes:
        inputs: tensors to ask the gradient of the loss for.
    """

    def __init__(self) -> None:
        self._held: list[tuple[str, nn.RNNBase, Any]] = []

    @property
    def inputs(self) -> list[Tensor]:
        return [given.data if isinstance(given, PackedSequence) else given for _, _, given in self._held]

    def entered(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(module, nn.RNNBase) or not runs_as(module, OVER_TIME):
            return None
        given = args[0] if args else kwargs["input"]
        if isinstance(given, PackedSequence):
            given = given if given.data.requires_grad else given._replace(data=given.data.detach().requires_grad_())
        else:
            given = given if given.requires_grad else given.detach().requires_grad_()
        self._held.append((name or type(module).__name__, module, given))
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "input": given})

    def curves(self, grads: list[Tensor | None]) -> list[Curve]:
        """One for each call of a recurrent layer that got a gradient; ``grads`` belong to ``inputs``."""
        found = []
        for (name, module, given), grad in zip(self._held, grads, strict=True):
            if grad is None:
                continue
            if isinstance(given, PackedSequence):
                steps = _from_the_end(grad, given.batch_sizes)
            else:
                steps = list(grad.unbind(1 if module.batch_first and grad.dim() == 3 else 0))
            found.append(
                Curve(
                    name, type(module).__name__, tuple(functional.grad_stats(steps, extras=False).tensor_norms.tolist())
                )
            )
        return found


def _from_the_end(data: Tensor, batch_sizes: Tensor) -> list[Tensor]:
    """The rows of a packed sequence by their distance from the end of their own sequence, the farthest first."""
    steps = len(batch_sizes)
    arange = functools.partial(torch.arange, device="cpu")  # where torch keeps the sizes
    time = torch.repeat_interleave(arange(steps), batch_sizes)
    sequence = torch.cat([arange(int(size)) for size in batch_sizes])
    lengths = (batch_sizes[:, None] > arange(int(batch_sizes[0]))).sum(dim=0)
    left = (lengths[sequence] - 1 - time).to(data.device)
    return [data[left == distance] for distance in reversed(range(steps))]


def curves_of_loops(calls: list[Call]) -> list[Curve]:
    """One for each layer that the model called so often that the calls are its time steps."""
    loops: dict[str, list[Call]] = {}
    for call in calls:
        loops.setdefault(call.layer.name, []).append(call)
    return [
        Curve(name, of_layer[0].layer.kind, tuple(call.output_grad for call in of_layer))
        for name, of_layer in loops.items()
        if len(of_layer) >= MIN_STEPS
    ]
