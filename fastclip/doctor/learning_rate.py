"""Learning rates, tried on the batch: a range test after Smith 2017, and a few steps at the one in use."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

import fastclip.functional as functional
from fastclip.amp import GUARD
from fastclip.doctor.diagnosis import ERROR, WARNING, Finding, Range, Trial
from fastclip.doctor.passes import gradients, zeros_of
from fastclip.doctor.subject import Subject, during, inner
from fastclip.doctor.untouched import Untouched
from fastclip.guard import Guard

LOWEST, HIGHEST, POINTS = 1e-7, 10.0, 49  # six points for each factor of ten: 1.47 from one to the next
RANGE_SHARE = 0.6  # of the time, for 49 of 69 steps
STEPS = 20  # at the learning rate in use
# A loss four times the one it began with will not come back: where range tests usually end.
DIVERGED = 4.0
# Smith 2017, section 3.3, takes the rate just below the one where the loss turns; a fresh optimizer on one batch bears
# more than a whole training, so: a tenth of the rate of the lowest loss.
MARGIN = 10.0
FAR_BELOW = 1e-3  # of the suggested rate: a thousand steps for what one could do
HARDLY = 0.01  # and 20 steps of it bring so little of what the range test has reached
LEAST = 1e-3  # share of the loss that a range test has to bring it down by, or it shows nothing
# Nor does it where that is less than twice what the loss rises by, as dropout lets it, in the first steps, up to 1e-5.
QUIET, NOISE = 12, 2.0


def diverged(losses: tuple[float, ...] | list[float]) -> bool:
    """Whether the last loss isn't finite, or far above the first; also right for losses below 0."""
    first, last = losses[0], losses[-1]
    return not math.isfinite(last) or last - first > (DIVERGED - 1.0) * max(abs(first), first - min(losses))


def led_astray(losses: tuple[float, ...]) -> bool:
    """Whether the loss went far above the first and didn't come back below it."""
    return any(diverged(losses[:n]) for n in range(2, len(losses) + 1)) and not losses[-1] < losses[0]


class Trainer:
    """Trains the model from where it stands, with an optimizer like the user's, and can start again.

    Args:
        subject: its model has to be :class:`Untouched`.
        seconds: how long all may take; the range test leaves some of it for what comes after it.

    Attributes:
        kind: name of the optimizer's class, after "clipped" if fastclip is in it.
        used: the learning rate in use; NaN without an optimizer.
        late: whether a step was left out because of the deadline.
        zero: names of the parameters whose gradient was 0 everywhere before the last step.
    """

    def __init__(self, subject: Subject, untouched: Untouched, seconds: float) -> None:
        self._subject, self._untouched = subject, untouched
        self._begin, self._seconds = time.monotonic(), seconds
        self._names, self._parameters = list(subject.parameters), list(subject.parameters.values())
        optimizer = inner(subject.optimizer)
        self._class: Any = torch.optim.AdamW if optimizer is None else type(optimizer)
        self._groups = _groups(optimizer, self._parameters)
        self._guard: Guard | None = None if subject.optimizer is None else vars(subject.optimizer).get(GUARD)
        self.kind: str = f"{'' if self._guard is None else 'clipped '}{self._class.__name__}"
        self.used = math.nan if optimizer is None else next(filter(None, (group["lr"] for group in self._groups)), 0.0)
        self.late = False
        self.zero: tuple[str, ...] = ()

    def run(
        self, lrs: list[float], progress: Any, share: float = 1.0, past_divergence: bool = False
    ) -> tuple[list[float], list[float]]:
        """One step for each learning rate, of the first group; the others keep their distance.

        Stops where a number isn't finite and unless ``past_divergence`` at divergence; starts no step after ``share``
        of the seconds.

        Returns:
            The loss and the norm of all gradients before each step.
        """
        self._untouched.rewind()
        self._subject.prepare()
        with during(f"making a {self.kind} like the one in use"):
            optimizer = self._class(
                [{k: copy.deepcopy(v) if k == "policy" else v for k, v in g.items()} for g in self._groups]
            )
            if self._guard is not None:
                self._guard.attach_like_to(optimizer)
        base = [float(group["lr"]) for group in optimizer.param_groups]
        first = next(filter(None, base), 0.0)  # a group may stand still
        losses: list[float] = []
        norms: list[float] = []
        for lr in lrs:
            if time.monotonic() - self._begin > share * self._seconds:
                self.late = True
                break
            loss = self._subject.loss()
            grads = gradients(loss, self._parameters)
            losses.append(float(loss.detach()))
            named = [(name, grad) for name, grad in zip(self._names, grads, strict=True) if grad is not None]
            stats = functional.grad_stats(named, extras=False)
            norms.append(float(stats.total_norm))
            self.zero = zeros_of(stats)
            progress.update()
            if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
                break
            if diverged(losses) and not past_divergence:
                break
            for parameter, grad in zip(self._parameters, grads, strict=True):
                parameter.grad = grad
            for group, own in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * own / first if first > 0 else lr
            with during(f"a step of {self.kind}"):
                optimizer.step()
        return losses, norms


def _groups(optimizer: torch.optim.Optimizer | None, parameters: list[Any]) -> list[dict[str, Any]]:
    """The settings of the user's groups, each with those of the parameters that are in it."""
    if optimizer is None:
        return [{"params": parameters, "lr": 1.0}]
    checked = {id(parameter) for parameter in parameters}
    groups = []
    for group in optimizer.param_groups:
        own = [parameter for parameter in group["params"] if id(parameter) in checked]
        if own:
            settings = {k: v for k, v in group.items() if k not in ("params", "param_names", "lr")}
            lr = float(group["lr"]) or float(group.get("initial_lr", 0.0))  # of a schedule that warms up from 0
            groups.append({**settings, "params": own, "lr": lr})
    return groups


def can_try(subject: Subject) -> str:
    """Why learning rates can't be tried; "" if they can."""
    optimizer = inner(subject.optimizer)
    if optimizer is None:
        half = any(parameter.dtype == torch.float16 for parameter in subject.parameters.values())
        return "in float16 the eps of AdamW, which would be tried, is 0" if half else ""
    if isinstance(optimizer, torch.optim.LBFGS):
        return "LBFGS finds its steps by itself"
    if any(group.get("maximize") for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} maximizes what comes back, and what is told of learning rates is of losses"
    if any(group.get("lr") is None for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} has no lr in its groups"
    if not _groups(optimizer, list(subject.parameters.values())):
        return "the optimizer has none of the model's parameters"
    return ""


def range_of(trainer: Trainer, progress: Any) -> Range | None:
    """None where there was no time for it."""
    ratio = (HIGHEST / LOWEST) ** (1.0 / (POINTS - 1))
    lrs = [LOWEST * ratio**i for i in range(POINTS)]
    losses, _ = trainer.run(lrs, progress, RANGE_SHARE)
    if len(losses) < 2:
        return None
    finite = [loss for loss in losses if math.isfinite(loss)]
    lowest = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    falling = trainer.late and lowest == len(losses) - 1  # nobody knows how far
    noise = max((b - a for a, b in pairwise(losses[: lowest + 1][:QUIET])), default=0.0)
    least = max(LEAST * max(abs(losses[0]), abs(losses[lowest])), NOISE * noise)
    fell = not falling and bool(finite) and losses[0] - losses[lowest] > least
    tried = Range(
        optimizer=trainer.kind,
        lrs=tuple(lrs[: len(losses)]),
        losses=tuple(losses),
        used=trainer.used,
        # the loss of a step is what the rates before it have reached
        suggested=lrs[max(lowest - 1, 0)] / MARGIN if fell else math.nan,
        diverges=lrs[max(len(losses) - 2, 0)] if diverged(losses) else math.nan,
    )
    return replace(tried, suggested=math.nan) if tried.endless else tried


def trial_of(trainer: Trainer, lr: float, progress: Any) -> Trial | None:
    """None where there was no time for it."""
    losses, norms = trainer.run([lr] * STEPS, progress, past_divergence=True)
    return Trial(lr, tuple(losses), tuple(norms), trainer.zero) if len(losses) > 1 else None


def findings(tried: Range, trial: Trial | None) -> Iterator[Finding]:
    """Of the learning rate in use."""
    if trial is None or math.isnan(tried.used):
        return
    first, last, highest = trial.losses[0], trial.losses[-1], max(trial.losses)
    count = len(trial.losses) - 1  # the last loss is what so many steps have reached
    suggestion = "" if math.isnan(tried.suggested) else f"{tried.suggested:.1g}"
    numbers = {
        "lr": tried.used,
        "first": first,
        "last": last,
        "highest": highest,
        "steps": float(count),
        "suggested": tried.suggested,
        "diverges": tried.diverges,
    }
    steps = f"with {tried.optimizer} at lr {tried.used:g} the loss on this batch goes from {first:.4g} to {last:.4g}"
    steps += f" in {count} step{'s' if count > 1 else ''}"
    if led_astray(trial.losses):
        if diverged((first, highest)) and highest > last:
            steps += f", by way of {highest:.4g}"
        beyond = "" if math.isnan(tried.diverges) else f"; growing from {LOWEST:g}, it diverges at {tried.diverges:.2g}"
        yield Finding(
            "lr-too-high",
            ERROR,
            f"{steps}{beyond}",
            f"start with lr={suggestion}, and a warmup: torch.optim.lr_scheduler.LinearLR(optimizer)"
            if suggestion
            else "cure what else was found first: no learning rate brought this loss down",
            (),
            numbers,
        )
    elif tried.used < FAR_BELOW * tried.suggested:
        reached = min(loss for loss in tried.losses if math.isfinite(loss))
        if first - last < HARDLY * (first - reached):
            yield Finding(
                "lr-too-low",
                WARNING,
                f"{steps}; with larger rates it has reached {reached:.4g}",
                f"try lr={suggestion}",
                (),
                {**numbers, "reached": reached},
            )
