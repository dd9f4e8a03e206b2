"""The first NaN or Inf of a pass: the operation that made it, forward or backward, and in which module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip.doctor.diagnosis import ERROR, Finding
from fastclip.doctor.layers import Layers
from fastclip.doctor.passes import steps_back
from fastclip.doctor.subject import Subject, tensors_in
from fastclip.doctor.watching import Watch

# These put an Inf where someone asked for it (masks), or show memory that nobody has written yet.
BY_INTENT: tuple[str, ...] = (
    *("masked_fill", "fill", "full", "full_like", "new_full", "where", "scalar_tensor", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize"),
)
THE_LOSS = "the loss"
CURES = {
    "log": "keep what it gets above 0, torch.log(x.clamp_min(1e-8)), or use log_softmax and logsigmoid",
    "sqrt": "its slope at 0 is infinite: torch.sqrt(x + 1e-8)",
    "rsqrt": "torch.rsqrt(x + 1e-8)",
    "div": "keep the divisor away from 0: x / (y + 1e-8)",
    "reciprocal": "keep it away from 0: 1 / (y + 1e-8)",
    "exp": "keep what it gets below 80, torch.exp(x.clamp_max(80)), or use softmax, logsumexp or softplus",
    "pow": "keep the base above 0: x.clamp_min(1e-8) ** p",
    "acos": "keep what it gets inside of -1 to 1: x.clamp(-1 + 1e-6, 1 - 1e-6)",
    "linalg_vector_norm": "its slope at 0 is NaN: (x.square().sum() + 1e-12).sqrt()",
    "norm": "its slope at 0 is NaN: (x.square().sum() + 1e-12).sqrt()",
    "_softmax": "a row whose scores are all -inf has no softmax: leave one key visible in each row of the mask",
    "_safe_softmax": "a row whose scores are all -inf has no softmax: leave one key visible in each row of the mask",
}
CURES["asin"] = CURES["acos"]


def _cure(operation: str, otherwise: str) -> str:
    """``operation`` as the forward or the backward pass calls it: linalg_vector_norm or LinalgVectorNormBackward0."""
    plain = operation.partition("Backward")[0].replace("_", "").lower()
    return next((cure for name, cure in CURES.items() if name.replace("_", "") == plain), otherwise)


@dataclass(frozen=True)
class Origin:
    """Where numbers stop to be finite.

    Attributes:
        operation: its name in torch.
        where: name of the module, or of the layer whose gradient had come back last.
        what: "NaN" or "Inf".
        low, high: range of the finite numbers that it got; NaN if there are none.
    """

    operation: str
    where: str
    what: str
    low: float
    high: float


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at what each operation of a forward pass makes.

    Attributes:
        first: the first one that made NaN or Inf of finite numbers, but for masks.
        first_nan: the first one that made NaN of anything without NaN.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch
        self.first: Origin | None = None
        self.first_nan: Origin | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._watch.listening or self.first_nan is not None:
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        given = [t.detach() for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.numel()]
        nan_before = any(bool(t.isnan().any()) for t in given)
        finite_before = not nan_before and all(bool(t.isfinite().all()) for t in given)
        fed = [t[torch.isfinite(t)] for t in given]
        low = min((float(t.min()) for t in fed if t.numel()), default=float("nan"))
        high = max((float(t.max()) for t in fed if t.numel()), default=float("nan"))
        out = func(*args, **(kwargs or {}))
        if name in BY_INTENT or nan_before:
            return out
        made = [t for t in tensors_in(out) if t.is_floating_point()]
        nan = any(bool(t.isnan().any()) for t in made)
        if nan or (finite_before and any(bool(t.isinf().any()) for t in made)):
            origin = Origin(name, self._watch.where, "NaN" if nan else "Inf", low, high)
            self.first = self.first or (origin if finite_before else None)
            self.first_nan = self.first_nan or (origin if nan else None)
        return out


class Nodes:
    """Looks at what each step of a backward pass makes.

    Attributes:
        first: the first one that made NaN or Inf of finite gradients.
    """

    def __init__(self, loss: Tensor, layers: Layers) -> None:
        self._layers = layers
        self.first: Origin | None = None
        for node in steps_back(loss):
            node.register_hook(self._hook(node.name()))

    def _hook(self, name: str) -> Any:
        def hook(made: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
            if self.first is None and not _finite(made) and _finite(given):
                where = self._layers.arrived[-1].layer.name if self._layers.arrived else THE_LOSS
                nan = any(t is not None and bool(t.isnan().any()) for t in made)
                fed = [t for t in given if t is not None and t.numel()]
                low, high = min(float(t.min()) for t in fed), max(float(t.max()) for t in fed)
                self.first = Origin(name, where, "NaN" if nan else "Inf", low, high)

        return hook


def _finite(tensors: tuple[Tensor | None, ...]) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


def traced(subject: Subject) -> tuple[Operations, Nodes | None]:
    """Runs one more pass and looks at each operation, forward and, if the loss is finite, backward."""
    layers = Layers(subject.model)
    watch = Watch(subject.model, [layers])
    operations = Operations(watch)
    with watch, operations:
        loss = subject.loss()
    if not loss.requires_grad or not bool(loss.isfinite()):
        return operations, None
    nodes = Nodes(loss, layers)
    layers.backward = True
    torch.autograd.grad(loss, list(subject.parameters.values()), allow_unused=True)
    return operations, nodes


def forward_findings(loss: float, operations: Operations | None) -> Iterator[Finding]:
    """Of a loss that isn't finite."""
    told = operations and (operations.first or operations.first_nan)
    if not told:
        cause = "inputs or parameters aren't finite themselves" if operations is None else "no operation shows where"
        yield Finding(
            "nonfinite-loss",
            ERROR,
            f"the loss is {loss}: {cause}",
            "begin with the first of them: torch.isfinite(tensor).all() tells"
            if operations is None
            else "look at code of your own that isn't made of torch's operations",
            (),
            {"loss": loss},
        )
        return
    yield Finding(
        "nonfinite-loss",
        ERROR,
        f"the loss is {loss}: the first {told.what} is made by {told.operation} in {told.where}, of "
        f"numbers from {told.low:.3g} to {told.high:.3g}",
        _cure(told.operation, "look at what goes in there; smaller inputs, weights or a wider dtype may help"),
        (told.where,),
        {"loss": loss, "low": told.low, "high": told.high},
    )


def backward_findings(bad: tuple[str, ...], nans: int, infs: int, nodes: Nodes | None) -> Iterator[Finding]:
    """Of gradients that aren't finite where the loss is; ``bad`` are the names of their parameters."""
    numbers = {"nans": float(nans), "infs": float(infs), "parameters": float(len(bad))}
    count = f"{len(bad)} parameters have NaN or Inf in their gradient though the loss is finite, {bad[0]} first"
    if nodes is None or nodes.first is None:
        yield Finding(
            "nonfinite-gradient",
            ERROR,
            count,
            "use torch.autograd.detect_anomaly() to find the operation",
            bad,
            numbers,
        )
        return
    first = nodes.first
    yield Finding(
        "nonfinite-gradient",
        ERROR,
        f"{count}. The first {first.what} on the way back is made by {first.operation}, when the gradient has come "
        f"back as far as {first.where if first.where == THE_LOSS else f'layer {first.where}'}",
        _cure(
            first.operation,
            "look at what this operation gets in the forward pass: at 0, or far out, its slope is infinite",
        ),
        (first.where,),
        {**numbers, "low": first.low, "high": first.high},
    )
