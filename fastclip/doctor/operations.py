"""What happens between the layers: activations and attention, seen operation by operation.

Modules and functions, ``torch.relu`` and ``nn.ReLU``, end in the same operations, also inside of
``nn.MultiheadAttention`` and ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip.doctor.layers import CONVOLUTIONS, Layers
from fastclip.doctor.watching import Watch, is_transformed
from fastclip.types import wide_dtype

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
RELU, SIGMOID, TANH = "relu", "sigmoid", "tanh"
ACTIVATIONS = (RELU, SIGMOID, TANH)
OTHERS = {"gelu": "relu", "silu": "relu", "leaky_relu": "relu", "elu": "relu"}  # name -> what an init takes it for
PRODUCTS = ("bmm", "baddbmm")
SOFTMAXES = ("_softmax", "_safe_softmax")
# Where a sigmoid's slope is below a hundredth, of at most a quarter, and a tanh's, of at most 1, below 4 of them.
FLAT_SIGMOID, FLAT_TANH = 0.01, 0.04
MASKED = 1e4  # a score so far below the largest one is a mask, -inf or the dtype's least number
ATTENTION_ELEMENTS = 1 << 22  # scores that are looked at in one call; of more, those of the first sequences


@dataclass(frozen=True)
class Activation:
    """One call of an activation function.

    Attributes:
        kind: one of ACTIVATIONS.
        call: position of the layer's call that came before, among all calls; -1 if none did.
        samples: how many values of each unit there are.
        dead: of a ReLU the share of units that are 0 for all samples; of the others the share of elements where it is
            flat.
    """

    kind: str
    call: int
    samples: int
    dead: float


@dataclass(frozen=True)
class Attention:
    """One softmax over scores of attention.

    Attributes:
        where: name of the module it happened in.
        keys: over how many.
        std: standard deviation of the scores that count.
        entropy: mean entropy of the weights, divided by that of equal ones: 1 looks everywhere, 0 at one key.
    """

    where: str
    keys: int
    std: float
    entropy: float


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one forward pass.

    Attributes:
        activations, attentions: in the order in which they happened.
        follows: position of a layer's call -> the activation that came next, as torch.nn.init calls it.
    """

    def __init__(self, watch: Watch, layers: Layers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch, self._layers = watch, layers
        self._scores = 0  # elements of the latest product of matrices
        self.activations: list[Activation] = []
        self.attentions: list[Attention] = []
        self.follows: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._watch.listening and not is_transformed():
            with torch.no_grad():
                self._look(func._schema.name.removeprefix("aten::"), args, kwargs or {}, out)
        return out

    def _look(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        kind = name.removesuffix("_")
        if self._watch.within and isinstance(self._layers.modules[self._watch.within[-1]], RECURRENT):
            return  # its gates are its own business
        if kind in ACTIVATIONS:
            self._activation(kind, out)
        elif kind in OTHERS:
            self.follows.setdefault(len(self._layers.calls) - 1, OTHERS[kind])
        elif name in PRODUCTS:
            self._scores = out.numel()
        elif name in SOFTMAXES and args[0].dim() >= 3 and args[1] in (-1, args[0].dim() - 1):
            if args[0].numel() == self._scores:  # else it isn't over what a product of queries and keys gave
                self._attention(args[0], out)
        elif name.startswith("_scaled_dot_product"):
            self._fused(args, kwargs)

    def _activation(self, kind: str, out: Tensor) -> None:
        call = len(self._layers.calls) - 1
        self.follows.setdefault(call, kind)
        if out.dim() < 2 or out.numel() == 0:
            return
        units = 1 if out.dim() > 2 and call >= 0 and self._convolved(call) else out.dim() - 1
        samples = out.numel() // out.shape[units]
        if kind == RELU:
            over = [d for d in range(out.dim()) if d != units]
            dead = (out.amax(dim=over) == 0).float().mean()
        elif kind == SIGMOID:
            dead = (out * (1 - out) < FLAT_SIGMOID).float().mean()
        else:
            dead = (1 - out * out < FLAT_TANH).float().mean()
        self.activations.append(Activation(kind, call, samples, float(dead)))

    def _convolved(self, call: int) -> bool:
        return isinstance(self._layers.calls[call].layer.module, CONVOLUTIONS)

    def _attention(self, scores: Tensor, weights: Tensor) -> None:
        keys, wide = scores.shape[-1], wide_dtype(scores.device)
        scores = scores.reshape(-1, keys)[: max(1, ATTENTION_ELEMENTS // keys)].to(wide)
        weights = weights.reshape(-1, keys)[: len(scores)].to(wide)
        visible = scores > scores.amax(dim=-1, keepdim=True) - MASKED
        counts = visible.sum(dim=-1)
        rows = counts > 1  # under a causal mask the first query sees one key
        if not bool(rows.any()):
            return
        scores, weights, visible, counts = scores[rows], weights[rows], visible[rows], counts[rows]
        entropy = -torch.special.xlogy(weights, weights).sum(dim=-1) / counts.to(wide).log()
        mean = torch.where(visible, scores, 0.0).sum(dim=-1) / counts
        spread = torch.where(visible, scores - mean[:, None], 0.0).square().sum() / counts.sum()
        self.attentions.append(Attention(self._watch.where, keys, math.sqrt(float(spread)), float(entropy.mean())))

    def _fused(self, args: Any, kwargs: Any) -> None:
        query, key = args[0], args[1]
        rows = max(1, ATTENTION_ELEMENTS // max(1, query.shape[-3] * query.shape[-2] * key.shape[-2]))
        scale = kwargs.get("scale") or 1.0 / math.sqrt(query.shape[-1])
        query, key = query[:rows].float(), key[:rows].float()
        if query.shape[-3] != key.shape[-3]:  # several heads of queries share one of keys
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        scores = query @ key.transpose(-1, -2) * scale
        self._attention(scores, torch.softmax(scores, dim=-1))
