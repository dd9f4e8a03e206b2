"""The loss functions of torch that a pass calls, with what they were given."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastclip.doctor.moments import Moments, is_plain, moments_of
from fastclip.doctor.operations import MASKED
from fastclip.doctor.watching import Watch, is_transformed

CLASSES, LOG_CLASSES, BINARY, REGRESSION = "cross_entropy", "nll_loss", "binary", "regression"
PROBABILITY, DIVERGENCE, PRODUCT = "probability", "divergence", "product"
KINDS: dict[Any, str] = {
    F.cross_entropy: CLASSES,
    F.nll_loss: LOG_CLASSES,
    F.binary_cross_entropy_with_logits: BINARY,
    F.binary_cross_entropy: PROBABILITY,
    F.kl_div: DIVERGENCE,
    F.mse_loss: REGRESSION,
    F.l1_loss: REGRESSION,
    F.smooth_l1_loss: REGRESSION,
    F.huber_loss: REGRESSION,
}
DIFFERENCES = (torch.sub, torch.subtract, torch.rsub, Tensor.sub, Tensor.subtract, Tensor.__sub__, Tensor.__rsub__)
PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
# Operations that only move numbers: behind them the one that made them is looked for.
MOVES: tuple[str, ...] = (
    "View",
    "UnsafeView",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Permute",
    "T",
    "Select",
    "Slice",
    "Clone",
    "Expand",
    "Alias",
    "ToCopy",
    "Index",
)
MAKERS = {"Sigmoid": "sigmoid", "Softmax": "softmax", "LogSoftmax": "log_softmax"}
ROUNDING = 1e-2  # how far a sum of probabilities may be from 1: what 16 bits leave of it


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function, or a difference or product of two tensors outside of the model.

    Attributes:
        kind: what it is for: CLASSES, LOG_CLASSES, BINARY (of logits), PROBABILITY, DIVERGENCE, REGRESSION or
            PRODUCT (of an output and something else, in a loss of the user's own).
        name: of the function.
        value: its mean over the samples; NaN where it gave a sum or no number.
        classes: how many there are; 0 where it isn't about classes.
        given, target: of the model's output and of what it shall be.
        shapes: of both.
        made_by: what made the output: "sigmoid", "softmax", "log_softmax" or "".
        made_of: what made that which went into it.
        sums_to_one: whether the outputs of each sample are probabilities of the classes.
        logs_sum_to_one: whether they are logarithms of such.
        shares: where the targets are a share of each class, their mean sum in a sample.
        counts: whether these sums differ from sample to sample.
        step: of the graph, where it is a difference or product that a loss of the user's own takes.
        whole: whether it is a mean over everything that was given, nothing left out or weighted.
    """

    kind: str
    name: str
    value: float
    classes: int
    given: Moments | None
    target: Moments | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    made_by: str
    made_of: str
    sums_to_one: bool
    logs_sum_to_one: bool
    shares: float | None = None
    counts: bool = False
    whole: bool = True
    step: Any = None


class LossCalls(TorchFunctionMode):
    """Watches one forward pass.

    Attributes:
        calls: of loss functions, in order; of those inside the model, too.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self.calls: list[LossCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._watch.listening and not is_transformed():
            kind = KINDS.get(func)
            named = kwargs or {}
            pair = (*args, *(named[key] for key in ("input", "target", "other") if key in named))[:2]
            if kind is None and func in (*DIFFERENCES, *PRODUCTS) and not self._watch.within:
                kind, pair = PRODUCT if func in PRODUCTS else REGRESSION, _output_first(pair)
            if kind is not None and len(pair) == 2 and all(isinstance(one, Tensor) for one in pair):
                if func in DIFFERENCES and _is_mask(pair[1]):
                    return out
                mean = out if named.get("reduction", "mean") != "sum" else None
                with torch.no_grad():
                    whole = named.get("reduction", "mean") != "none" and named.get("weight") is None
                    call = _call(kind, func.__name__, *pair, mean, whole)
                    self.calls.append(replace(call, step=out.grad_fn) if func not in KINDS else call)
        return out


def _output_first(pair: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the model made, then what it is compared with; empty where a difference is about something else."""
    learned = [isinstance(one, Tensor) and one.requires_grad for one in pair]
    return () if sum(learned) != 1 else pair if learned[0] else pair[::-1]


def _is_mask(tensor: Tensor) -> bool:
    """Whether it takes some numbers out of what it is subtracted from, and leaves the others as they are."""
    if not is_plain(tensor) or tensor.numel() == 0:
        return False
    sizes = tensor.detach().abs()
    kept, taken = sizes == 0, sizes == sizes.max()
    return bool(sizes.max() >= MASKED) and bool(kept.any()) and bool((kept | taken).all())


def _call(kind: str, name: str, given: Tensor, target: Tensor, out: Any, whole: bool) -> LossCall:
    classes = 0
    sums = logs = False
    shares, counts = None, False
    if kind in (CLASSES, LOG_CLASSES, DIVERGENCE) and given.is_floating_point() and given.dim() > 0:
        dim = 0 if given.dim() == 1 else 1
        classes = given.shape[dim]
        values = given.double() if given.device.type != "mps" else given.float()
        if classes > 1 and given.numel():
            sums = bool((values >= 0).all() and ((values.sum(dim) - 1).abs() < ROUNDING).all())
            logs = bool((values <= ROUNDING).all() and (values.logsumexp(dim).abs() < ROUNDING).all())
            if kind == CLASSES and target.is_floating_point() and target.shape == given.shape:
                sums_of = target.float().sum(dim).flatten()
                sums_of = sums_of[sums_of != 0]  # a sample that is left out
                shares = float(sums_of.mean()) if len(sums_of) else None
                counts = len(sums_of) > 0 and bool(sums_of.max() - sums_of.min() > ROUNDING * sums_of.max())
    made_by, made_of = _made_by(given)
    mean = isinstance(out, Tensor) and out.is_floating_point() and out.numel() > 0
    return LossCall(
        kind=kind,
        name=name,
        value=float(out.float().mean()) if mean else math.nan,
        classes=classes,
        given=moments_of(given),
        target=moments_of(target),
        shapes=(tuple(given.shape), tuple(target.shape)),
        made_by=made_by,
        made_of=made_of,
        sums_to_one=sums,
        logs_sum_to_one=logs,
        shares=shares,
        counts=counts,
        whole=whole,
    )


def operation(node: Any) -> str:
    """What a node of autograd's graph goes back through."""
    name: str = node.name().partition("Backward")[0]
    return name


def _made_by(tensor: Tensor) -> tuple[str, str]:
    """The activation whose output this is, however it was reshaped since, and the one that made what it got."""
    last, node = _maker(tensor.grad_fn)
    return last, _maker(node.next_functions[0][0])[0] if last else ""


def _maker(node: Any) -> tuple[str, Any]:
    while node is not None:
        name = operation(node)
        if name in MAKERS:
            return MAKERS[name], node
        if name not in MOVES or not node.next_functions:
            break
        node = node.next_functions[0][0]
    return "", None
