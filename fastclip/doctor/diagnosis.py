"""What a check has found: numbers first, then sentences."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastclip.types import FastclipError

ERROR, WARNING, INFO = "error", "warning", "info"
SEVERITIES = (ERROR, WARNING, INFO)  # worst first

# times the first loss, and at least so much: likelihoods fall below 0, too, by a few times what they begin with
ENDLESS = 30.0


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
        layer: its name in the model.
        call: which of the layer's calls, from 1.
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
    call: int
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
        kind: name of its class.
        norms: norm of the gradient at each time step, the first step first.
    """

    layer: str
    kind: str
    norms: tuple[float, ...]


@dataclass(frozen=True)
class Range:
    """Losses along a learning rate that grows from step to step.

    Attributes:
        optimizer: name of its class, after "clipped" if fastclip is in it.
        lrs, losses: of each step; the loss is the one before the step.
        used: learning rate in use, of the first group; NaN without an optimizer.
        suggested: a tenth of the one at the lowest loss; NaN where the loss hardly fell, or without end.
        diverges: from which one on the loss was four times the first; NaN if it never was.
    """

    optimizer: str
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    used: float
    suggested: float
    diverges: float

    @property
    def endless(self) -> bool:
        """Whether the loss falls so far below 0 that it has no lower bound, as that of a critic or a reward."""
        lowest = min((loss for loss in self.losses if math.isfinite(loss)), default=math.nan)
        return lowest < 0.0 and self.losses[0] - lowest > ENDLESS * max(abs(self.losses[0]), 1.0)


@dataclass(frozen=True)
class Trial:
    """A few steps at one learning rate.

    Attributes:
        lr: which.
        losses, norms: before each step, the norm of all gradients.
        zero: names of the parameters whose gradient was 0 everywhere before the last.
    """

    lr: float
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    zero: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bound:
    """What to clip by.

    Attributes:
        max_norm: bound of the norm of all gradients.
        policy: as Python.
        why: the reason.
        norms: that were seen.
        median, largest: of them.
    """

    max_norm: float
    policy: str
    why: str
    norms: tuple[float, ...]
    median: float
    largest: float

    @property
    def argument(self) -> str:
        """What to give to :class:`fastclip.ClippedOptimizer`."""
        plain = self.policy.startswith("GlobalNorm") and math.isfinite(self.max_norm)
        return f"max_norm={self.max_norm:g}" if plain else f"policy={self.policy}"


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`fastclip.check` found; ``print()`` it.

    Attributes:
        findings: worst first; empty if nothing was found.
        rows: one for each call of a layer, in the order in which they ran.
        curves: gradients over time, of each recurrent layer.
        loss: of the first pass.
        total_norm: norm of all gradients in the first pass.
        bound: what to clip by.
        lr: losses along a growing learning rate; None where that wasn't tried.
        trial: a few steps at the learning rate in use, without an optimizer at the suggested one; None where there are
            none.
        notes: what could not be judged, and why.
    """

    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]
    loss: float
    total_norm: float
    bound: Bound
    lr: Range | None = None
    trial: Trial | None = None
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

    def save_picture(self, path: str | Path) -> None:
        """Draws the gradients by depth and time, the activations by layer, and the range test; needs matplotlib."""
        from fastclip.doctor.picture import save

        save(self, Path(path))

    def __str__(self) -> str:
        from fastclip.doctor.text import told

        return told(self)


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    return value
