"""What a check has found: numbers first, then sentences."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fastclip.types import FastclipError

ERROR, WARNING, INFO = "error", "warning", "info"
SEVERITIES = (ERROR, WARNING, INFO)  # worst first


class DoctorError(FastclipError, RuntimeError):
    """A check can't be made, or the model failed in the middle of it. Nothing was changed."""


@dataclass(frozen=True)
class Finding:
    """One thing that was measured and is worth a look.

    Attributes:
        code: what it is, as listed in docs/doctor.md; codes don't change.
        severity: "error": training can't work like this; "warning": it will suffer; "info": good to know.
        message: what was measured, with its numbers.
        advice: one thing to do, with a line of code where that says more.
        where: names of the layers or tensors it is about.
        numbers: the measured numbers by name.
    """

    code: str
    severity: str
    message: str
    advice: str
    where: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def docs(self) -> str:
        """Where it is explained."""
        return f"docs/doctor.md#{self.code}"


@dataclass(frozen=True)
class Row:
    """One call of one layer, in the order in which the layers ran.

    Attributes:
        layer: its name in the model; ``name (call 2)`` where it ran several times.
        kind: name of its class.
        mean, std: of its output; NaN where that has no numbers.
        gain: root mean square of the output without the bias, divided by that of the input; NaN where it has none.
        weight_std: standard deviation of its weights, of all that have two or more dimensions.
        output_grad: norm of the gradient with respect to its output; NaN if there is none.
        weight_grad: norm of the gradient of all its own parameters; NaN if there is none.
        dead: share of its units that a ReLU holds at 0 for the whole batch, or that a sigmoid or tanh saturates; NaN
            where neither follows.
    """

    layer: str
    kind: str
    mean: float
    std: float
    gain: float
    weight_std: float
    output_grad: float
    weight_grad: float
    dead: float = math.nan


@dataclass(frozen=True)
class Curve:
    """How the gradient of the loss changes over the time steps of one recurrent layer.

    Attributes:
        layer: its name.
        norms: norm of the gradient at each time step, the first step first.
    """

    layer: str
    norms: tuple[float, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`fastclip.check` found; ``print()`` it.

    Attributes:
        findings: worst first; empty if nothing was found.
        rows: one for each call of a layer, in the order in which they ran.
        curves: gradients over time, of each recurrent layer.
        loss: of the first pass.
        total_norm: norm of all gradients in the first pass.
        notes: what could not be judged, and why.
    """

    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]
    loss: float
    total_norm: float
    notes: tuple[str, ...] = ()

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, each once."""
        return tuple(dict.fromkeys(finding.code for finding in self.findings))

    @property
    def healthy(self) -> bool:
        """Whether nothing worse than an "info" was found."""
        return all(finding.severity == INFO for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything as Python numbers, lists and strings."""
        found = asdict(self)
        for told, finding in zip(found["findings"], self.findings, strict=True):
            told["docs"] = finding.docs
        return found

    def to_json(self, indent: int | None = None) -> str:
        """``to_dict()`` as JSON; NaN and Inf, which JSON has no spelling for, are strings."""
        return json.dumps(_spelled(self.to_dict()), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        from fastclip.doctor import text

        return text.told(self)


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    return value
