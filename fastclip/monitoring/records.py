"""One record a step, and how it is spelled in a file; docs/monitor.md is the same in words."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.ladder import Event

FORMAT, VERSION = "fastclip.monitor", 1
HEADER, TENSORS, STEP, FOLD, LOST = "header", "tensors", "step", "fold", "lost"  # the kinds of lines
MOST_NAMES = 20  # of an event in a file; their number is told, too

FLOAT32 = np.finfo(np.float32)
Floats = NDArray[np.float64]
Packed = NDArray[np.float32]


@dataclass(slots=True)
class StepRecord:
    """What a monitor tells of one step.

    Attributes:
        step: number of the step, from 1.
        time: seconds since 1970, when the gradients were looked at.
        total_norm: norm of all gradients before clipping.
        clipped_norm: norm that the optimizer stepped with; None for a step that was skipped, or replaced by a roll
            back, and after a clamp of elements, whose norm nobody knows.
        max_norm: bound of the norm in this step; None if there is none, or a policy keeps it to itself.
        clip_coef: the smallest multiplier that a gradient got; 1 if none was clipped.
        clipped, skipped: whether the step was. A skipped one did not happen, and doesn't count as clipped.
        reason: why it was skipped: "nonfinite", "loss", "policy", "scaler", or "rank" (a loss or a scaler, on this or
            another rank), joined by "+"; "" if it wasn't.
        rolled_back: whether the optimizer went back to a snapshot instead.
        nans, infs: how many elements of the gradients are; with ``nonfinite="zero"`` were, and the norms are those of
            what is left.
        worst: name of the gradient to look at first: one with NaN, else with Inf, else the one of largest norm.
        max_abs, zeros, subnormals: largest magnitude, share of zeros and of subnormal numbers; None where not counted.
        loss: what ``observe`` was told; None if nothing.
        lr: learning rate of each param group.
        fold: name of the fold; None without folds.
        events: what was flagged.
        names: the tensors that the run tells of.
        tensor_norms: norms before clipping, of the tensors in ``columns``.
        columns: which of ``names`` had a gradient; None for all.
    """

    step: int
    time: float
    total_norm: float
    clipped_norm: float | None
    max_norm: float | None
    clip_coef: float
    clipped: bool
    skipped: bool
    reason: str
    rolled_back: bool
    nans: int
    infs: int
    worst: str | None
    max_abs: float | None
    zeros: float | None
    subnormals: float | None
    loss: float | None
    lr: list[float]
    fold: str | None
    events: list[Event] = field(default_factory=list)
    names: Sequence[str] = ()
    tensor_norms: Packed = field(default_factory=lambda: np.empty(0, np.float32))
    columns: list[int] | None = None

    def norms(self) -> dict[str, float]:
        """Name -> norm of each tensor that had a gradient."""
        columns = range(len(self.names)) if self.columns is None else self.columns
        return {self.names[i]: norm for i, norm in zip(columns, self.tensor_norms.tolist(), strict=True)}


# the columns of a table
SCALARS = (
    "step",
    "time",
    "total_norm",
    "clipped_norm",
    "max_norm",
    "clip_coef",
    "clipped",
    "skipped",
    "reason",
    "rolled_back",
    "nans",
    "infs",
    "worst",
    "max_abs",
    "zeros",
    "subnormals",
    "loss",
    "lr",
    "fold",
)


def spelled(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN and Inf are the strings "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return [spelled(each) for each in value] if isinstance(value, list) else value


def number(value: Any) -> float:
    """The number that ``spelled`` gave; raises ``ValueError`` or ``TypeError`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r} is not a number")
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def packed(norms: Floats) -> Packed:
    """Rounded to float32, where 0 goes on to mean 0 and Inf to mean Inf."""
    largest, least = float(FLOAT32.max), float(FLOAT32.smallest_subnormal)
    with np.errstate(over="ignore", under="ignore"):
        narrow = norms.astype(np.float32)
    if not np.isfinite(narrow).all():
        narrow[(norms > largest) & (norms < np.inf)] = largest
    if (narrow == 0).any():
        narrow[(norms > 0) & (norms < least)] = least
    return narrow


def encoded(norms: Packed) -> str:
    """base64 of little-endian float32."""
    return base64.b64encode(norms.astype("<f4", copy=False).tobytes()).decode("ascii")


def decoded(text: str) -> Packed:
    """What ``encoded`` got; raises ``ValueError`` for anything else."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def line(kind: str, **content: Any) -> bytes:
    """One line of a file."""
    return _encode({"kind": kind, **content}).encode() + b"\n"


def step_line(record: StepRecord) -> bytes:
    """The line of one step."""
    r = record
    content: dict[str, Any] = {"kind": STEP, "step": r.step, "time": r.time, "total_norm": r.total_norm}
    for name, value in (
        ("clipped_norm", r.clipped_norm),
        ("max_norm", r.max_norm),
        ("max_abs", r.max_abs),
        ("zeros", r.zeros),
        ("subnormals", r.subnormals),
        ("loss", r.loss),
        ("worst", r.worst),
        ("fold", r.fold),
        ("columns", r.columns),
    ):
        if value is not None:
            content[name] = value
    if r.clip_coef != 1.0:
        content["clip_coef"] = r.clip_coef
    for name, told in (
        ("clipped", r.clipped),
        ("skipped", r.skipped),
        ("reason", r.reason),
        ("rolled_back", r.rolled_back),
        ("nans", r.nans),
        ("infs", r.infs),
        ("lr", r.lr),
    ):
        if told:
            content[name] = told
    floats = (r.total_norm, r.clipped_norm, r.clip_coef, r.max_abs, r.loss, *r.lr)
    if not all(value is None or math.isfinite(value) for value in floats):
        content = {name: spelled(value) for name, value in content.items()}
    if r.events:
        content["events"] = [
            {"kind": event.kind, "reason": event.reason, "tensors": list(event.tensors[:MOST_NAMES])}
            | ({"count": len(event.tensors)} if len(event.tensors) > MOST_NAMES else {})
            for event in r.events
        ]
    content["tensor_norms"] = encoded(r.tensor_norms)
    return _encode(content).encode() + b"\n"
