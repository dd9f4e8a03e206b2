"""The first NaN or Inf of a pass: the operation that made it, forward or backward, and in which module."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip.functional as functional
from fastclip.doctor.cures import CURES, Fed, cure_of, knows
from fastclip.doctor.diagnosis import ERROR, Finding
from fastclip.doctor.layers import Layers
from fastclip.doctor.moments import is_plain
from fastclip.doctor.passes import steps_back
from fastclip.doctor.subject import Subject, tensors_in
from fastclip.doctor.watching import Watch

# These put an Inf where someone asked for it (masks), or show memory that nobody has written yet.
BY_INTENT: tuple[str, ...] = (
    *("scatter", "index_fill", "index_put", "constant_pad_nd", "masked_scatter"),
    *("masked_fill", "fill", "full", "full_like", "new_full", "where", "scalar_tensor", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize"),
)
THE_LOSS = "the loss"


@dataclass(frozen=True)
class Origin:
    """Where numbers stop to be finite.

    Attributes:
        operation: its name in torch.
        where: name of the module, or of the layer whose gradient had come back last.
        fed: what it got; of a step back nothing is known of what the step forward had got.
        divisors: of a division their range, of finite ones.
    """

    operation: str
    where: str
    fed: Fed
    divisors: tuple[float, float] | None = None

    @property
    def made(self) -> str:
        """What it made, and of what."""
        fed = self.fed
        of = "nothing" if math.isnan(fed.low) else f"numbers from {fed.low:.3g} to {fed.high:.3g}"
        by = "" if self.divisors is None else " and divisors from {:.3g} to {:.3g}".format(*self.divisors)
        return (
            f"{fed.what} is made by {self.operation} in {self.where}, of {of}{' and Inf' if fed.infinite else ''}{by}"
        )


@dataclass(frozen=True)
class Brought:
    """A tensor with NaN or Inf that no operation of the pass has made: it came in from outside.

    Attributes:
        name: what it is.
        operation, where: which gets it first.
        size: of it.
        nans, infs: how many of its elements are.
    """

    name: str
    operation: str
    where: str
    size: int
    nans: int
    infs: int


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at what each operation of a forward pass makes.

    Args:
        names: of tensors that may be brought in, by the address of their memory.

    Attributes:
        first: the first one that made NaN or Inf of finite numbers, but for masks.
        first_nan: the first one that made NaN of anything without NaN.
        brought_nan, brought_inf: the first tensors from outside that had some, where it went on from there. An Inf may
            be a mask.
    """

    def __init__(self, watch: Watch, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch, self._names = watch, names
        self._own: set[int] = set()  # memory that came with this pass
        self.first: Origin | None = None
        self.first_nan: Origin | None = None
        self.brought_nan: Brought | None = None
        self.brought_inf: Brought | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._watch.listening or self.first_nan is not None or self.brought_nan is not None:
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        given = [t.detach() for t in tensors_in((args, kwargs)) if is_plain(t) and t.numel()]
        bad = [t for t in given if not bool(t.isfinite().all())]
        nan_before = any(bool(t.isnan().any()) for t in bad)
        fed = [t[torch.isfinite(t)] for t in given]
        low = min((float(t.min()) for t in fed if t.numel()), default=math.nan)
        high = max((float(t.max()) for t in fed if t.numel()), default=math.nan)
        out = func(*args, **(kwargs or {}))
        made = [t for t in tensors_in(out) if is_plain(t)]
        self._own |= {_memory(t) for t in made} - {_memory(t) for t in given}
        nan, inf = any(bool(t.isnan().any()) for t in made), any(bool(t.isinf().any()) for t in made)
        if not nan and (not inf or name in BY_INTENT):
            return out
        for tensor in bad:
            if _memory(tensor) not in self._own:
                self._bring(tensor, name, nan)
        if not nan_before and name not in BY_INTENT and (nan or not bad):
            half = any(t.dtype == torch.float16 for t in given)
            fed_with = Fed("NaN" if nan else "Inf", low, high, bool(bad), half)
            origin = Origin(name, self._watch.where, fed_with, _divisors(args) if name == "div" else None)
            self.first = self.first or (None if bad else origin)
            self.first_nan = self.first_nan or (origin if nan else None)
        return out

    def _bring(self, tensor: Tensor, operation: str, went_on: bool) -> None:
        nans, infs = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        name = self._names.get(_memory(tensor), f"a tensor of shape {tuple(tensor.shape)} from outside of the model")
        brought = Brought(name, operation, self._watch.where, tensor.numel(), nans, infs)
        if nans:
            self.brought_nan = self.brought_nan or (brought if went_on else None)
        else:
            self.brought_inf = self.brought_inf or brought


def _divisors(args: Any) -> tuple[float, float] | None:
    """Range of the finite ones among what a division divides by."""
    divisor = torch.as_tensor(args[1])
    if not divisor.is_floating_point() and not divisor.is_complex():  # a count
        divisor = divisor.to(torch.float32)
    if not is_plain(divisor) or not len(finite := divisor[divisor.isfinite()]):
        return None
    return float(finite.min()), float(finite.max())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


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
                half = any(t is not None and t.dtype == torch.float16 for t in made)
                self.first = Origin(name, where, Fed("NaN" if nan else "Inf", math.nan, math.nan, half=half))

        return hook


def _finite(tensors: tuple[Tensor | None, ...]) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


@dataclass(frozen=True)
class Trace:
    """What one more pass has shown, looked at operation by operation.

    Attributes:
        operations: of the way forward.
        nodes: of the way back; None where the loss wasn't finite.
        finite: whether the loss and all gradients were.
    """

    operations: Operations
    nodes: Nodes | None
    finite: bool


def traced(subject: Subject) -> Trace:
    """Runs one more pass and looks at each operation, forward and, if the loss is finite, backward."""
    layers = Layers(subject.model)
    watch = Watch(subject.model, [layers])
    around = {_memory(tensor): name for name, tensor in subject.around() if is_plain(tensor)}
    operations = Operations(watch, around)
    with watch, operations:
        loss = subject.loss()
    if not loss.requires_grad or not bool(loss.isfinite()):
        return Trace(operations, None, bool(loss.isfinite()))
    nodes = Nodes(loss, layers)
    layers.backward = True
    grads = torch.autograd.grad(loss, list(subject.parameters.values()), allow_unused=True)
    bad = functional.grad_stats([grad for grad in grads if grad is not None], extras=False).found_inf
    return Trace(operations, nodes, not bool(bad))


def target_finding(loss: float, subject: Subject) -> Finding:
    """Of targets that aren't finite, where without them everything would be."""
    targets = [t for t in tensors_in(subject.batch[1]) if is_plain(t)]
    size = sum(t.numel() for t in targets)
    nans, infs = (sum(int(has(t).sum()) for t in targets) for has in (torch.isnan, torch.isinf))
    what = "the gradients aren't finite, though the loss is" if math.isfinite(loss) else f"the loss is {loss}"
    return Finding(
        "nonfinite-target",
        ERROR,
        f"the targets hold {nans} NaN and {infs} Inf among {size} numbers, so {what}; with 0 for them all is finite",
        "leave those samples out before the loss is computed, loss_fn(outputs[known], targets[known]) with known = "
        "torch.isfinite(targets), or fill them; masked in the loss they may still spoil the gradients",
        ("the targets",),
        {"nans": float(nans), "infs": float(infs), "size": float(size), "loss": loss},
    )


def forward_findings(loss: float, operations: Operations | None) -> Iterator[Finding]:
    """Of a loss that isn't finite; ``operations`` None where something that the model was given isn't, either."""
    numbers = {"loss": loss}
    if operations is None:
        yield Finding(
            "nonfinite-loss",
            ERROR,
            f"the loss is {loss}: inputs or parameters aren't finite themselves",
            "begin with the first of them: torch.isfinite(tensor).all() tells",
            (),
            numbers,
        )
        return
    told = operations.first or operations.first_nan
    inf = operations.brought_inf
    # an Inf from outside may be a mask, and another operation to blame: one that knows a cure of its own
    blamed = inf is not None and (
        told is None
        or (told.operation, told.where) == (inf.operation, inf.where)
        or (told.fed.infinite and told.operation not in CURES)
    )
    brought = operations.brought_nan or (inf if blamed else None)
    if brought is not None:
        yield _of_what_was_brought("nonfinite-loss", f"the loss is {loss}", brought, numbers)
    elif told is not None:
        yield Finding(
            "nonfinite-loss",
            ERROR,
            f"the loss is {loss}: the first {told.made}",
            cure_of(
                told.operation,
                told.fed,
                "look at what goes in there; smaller inputs, weights or a wider dtype may help",
            ),
            (told.where,),
            {**numbers, "low": told.fed.low, "high": told.fed.high},
        )
    else:
        yield Finding(
            "nonfinite-loss",
            ERROR,
            f"the loss is {loss}: no operation shows where",
            "look at code of your own that isn't made of torch's operations",
            (),
            numbers,
        )


def backward_findings(
    bad: tuple[str, ...], nans: int, infs: int, operations: Operations | None, nodes: Nodes | None
) -> Iterator[Finding]:
    """Of gradients that aren't finite where the loss is; ``bad`` are the names of their parameters."""
    numbers = {"nans": float(nans), "infs": float(infs), "parameters": float(len(bad))}
    have = "1 parameter has" if len(bad) == 1 else f"{len(bad)} parameters have"
    count = f"{have} NaN or Inf in {'its' if len(bad) == 1 else 'their'} gradient though the loss is finite, "
    count += f"{bad[0]}{'' if len(bad) == 1 else ' first'}"
    forward = None if operations is None else operations.first or operations.first_nan
    last = None if nodes is None else nodes.first
    if forward is not None and forward.fed.what == "Inf" and last is not None and knows(last.operation):
        forward = None  # a mask, more likely than not, where a step back is known for slopes of its own
    if operations is not None and operations.brought_nan is not None:
        yield _of_what_was_brought("nonfinite-gradient", count, operations.brought_nan, numbers)
    elif forward is not None:
        yield Finding(
            "nonfinite-gradient",
            ERROR,
            f"{count}. On the way forward {forward.made}. Masked later, it is gone from the loss, but not from the "
            "gradients: 0 times NaN or Inf is NaN",
            f"{cure_of(forward.operation, forward.fed, 'look at what goes in there')}. And mask what goes into it, "
            "not what comes out",
            (forward.where,),
            {**numbers, "low": forward.fed.low, "high": forward.fed.high},
        )
    elif nodes is not None and nodes.first is not None:
        first = nodes.first
        yield Finding(
            "nonfinite-gradient",
            ERROR,
            f"{count}. The first {first.fed.what} on the way back is made by {first.operation}, when the gradient has "
            f"come back as far as {first.where if first.where == THE_LOSS else f'layer {first.where}'}",
            cure_of(
                first.operation,
                first.fed,
                "look at what this operation gets in the forward pass: at 0, or far out, its slope is infinite",
            ),
            (first.where,),
            numbers,
        )
    else:
        yield Finding(
            "nonfinite-gradient",
            ERROR,
            count,
            "use torch.autograd.detect_anomaly() to find the operation",
            bad,
            numbers,
        )


def _of_what_was_brought(code: str, what: str, brought: Brought, numbers: dict[str, float]) -> Finding:
    counts = {"given_nans": float(brought.nans), "given_infs": float(brought.infs), "given_size": float(brought.size)}
    where = f"{brought.operation} in {brought.where} gets {brought.name}, of which {_share(brought)}"
    return Finding(
        code,
        ERROR,
        f"{what}: {where}",
        "look at how it is made (a logarithm of 0, 1 / a count of 0, a gap in the data): torch.isfinite(tensor).all() "
        "tells. Choose before the loss is computed, not with a mask on it",
        (brought.name,),
        {**numbers, **counts},
    )


def _share(brought: Brought) -> str:
    counts = {"NaN": brought.nans, "Inf": brought.infs}
    kinds = [f"{count} {'is' if count == 1 else 'are'} {kind}" for kind, count in counts.items() if count]
    return f"{' and '.join(kinds)}, among {brought.size}"
