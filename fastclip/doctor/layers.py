"""The layers of a model as they run: what goes in, what comes out, and the gradient that comes back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastclip.doctor.moments import Census, Moments, census_of, moments_of, norm_of
from fastclip.doctor.subject import tensors_in
from fastclip.doctor.watching import Listener

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AFFINE = (nn.Linear, *CONVOLUTIONS)  # output = weight applied to input, plus bias
OVER_TIME = (nn.RNN, nn.LSTM, nn.GRU)


def runs_as(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is one of them, and takes and gives what they do: a subclass with a ``forward`` of its own may not."""
    return any(type(module).forward is kind.forward for kind in kinds)


@dataclass(frozen=True)
class Layer:
    """A module with weights of its own: parameters of two or more dimensions.

    Attributes:
        name: in the model; its class where the model itself is the layer.
        module: itself.
        parameters: names in the model of its own parameters.
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]

    @property
    def kind(self) -> str:
        return parametrize.type_before_parametrizations(self.module).__name__

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name in the module -> weight as it is used: with a parametrization, what that gives."""
        own = self.module._parameters
        if parametrize.is_parametrized(self.module):
            parametrized: Any = self.module.parametrizations
            for name in parametrized:
                yield str(name), getattr(self.module, str(name)).detach()
        for name, parameter in own.items():
            if parameter is None or parameter.dim() < 2 or name.endswith("_g"):
                continue
            used = name.removesuffix("_v") if f"{name.removesuffix('_v')}_g" in own else name  # of weight_norm
            yield used, getattr(self.module, used).detach()


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Name of a module -> the layer that it is."""
    found = {}
    known = {id(parameter): name for name, parameter in model.named_parameters()}  # a shared one has one name
    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if parametrize.is_parametrized(module):
            own += module.parametrizations.parameters()
        if any(parameter.dim() >= 2 for parameter in own):
            names = tuple(known[id(parameter)] for parameter in own)
            found[name] = Layer(name or type(model).__name__, module, names)
    return found


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        layer: which.
        number: of this call among those of the layer, from 0.
        given, made: of its first input and its first output; None where they hold no numbers.
        gain: rms of what the weight makes of the input, without the bias, divided by that of the input; of a recurrent
            layer, what the recurrent weight makes of the states. NaN where that says nothing.
        node: autograd's, of its first output; None without one.
        grads: of the gradients with respect to its outputs, as the backward pass brings them.
    """

    layer: Layer
    number: int
    given: Moments | None
    made: Moments | None
    gain: float
    node: Any = None
    grads: list[Census] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.layer.name if self.number == 0 else f"{self.layer.name} (call {self.number + 1})"

    @property
    def output_grad(self) -> float:
        """Norm of the gradient with respect to all its outputs; NaN if none came back."""
        return math.hypot(*(census.norm for census in self.grads)) if self.grads else math.nan


class Layers(Listener):
    """Notes each call of a layer.

    Attributes:
        modules: of the model, by name.
        calls: in the order in which they ended.
        arrived: those whose gradient has come back so far, in the order of the backward pass.
        backward: whether the gradients that come back are those of the loss; a step may ask for others on its way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self._layers = layers_of(model)
        self._counts: dict[str, int] = {}
        self.calls: list[Call] = []
        self.arrived: list[Call] = []
        self.backward = False

    def left(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer = self._layers.get(name)
        if layer is None:
            return
        number = self._counts.get(name, 0)
        self._counts[name] = number + 1
        given, made = next(tensors_in((args, kwargs)), None), list(tensors_in(output))
        call = Call(
            layer,
            number,
            given=None if given is None else moments_of(given),
            made=moments_of(made[0]) if made else None,
            gain=math.nan,
            node=made[0].grad_fn if made else None,
        )
        if call.given is not None and call.made is not None:
            call.gain = _gain(module, call.given, made[0])
        self.calls.append(call)
        for tensor in made:
            if tensor.requires_grad and tensor.layout == torch.strided and not tensor.is_nested:
                tensor.register_hook(self._note(call))  # type: ignore[no-untyped-call]

    def _note(self, call: Call) -> Any:
        def hook(grad: Tensor) -> None:
            if self.backward:
                call.grads.append(census_of(grad.detach()))
                self.arrived.append(call)

        return hook


def _gain(module: nn.Module, given: Moments, output: Tensor) -> float:
    """Of the weight alone: the bias would make a small input look like a large gain."""
    output, before = output.detach(), given.rms
    if isinstance(module, nn.RNNBase) and runs_as(module, OVER_TIME):
        recurrent: Any = module.weight_hh_l0
        weight: Tensor = recurrent.detach()
        states = output[..., : weight.shape[1]].reshape(-1, weight.shape[1])  # of both directions, the first
        made, before = states.to(weight.dtype) @ weight.T, norm_of([states]) / math.sqrt(max(states.numel(), 1))
    elif isinstance(module, AFFINE) and runs_as(module, AFFINE):
        bias, made = module.bias, output
        if bias is not None:
            spatial = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
            made = output - bias.detach().reshape(-1, *[1] * spatial)
    else:
        return math.nan
    moments = moments_of(made)
    return moments.rms / before if moments is not None and before > 0 else math.nan
