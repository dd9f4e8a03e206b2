"""``fastclip.check``: passes, then measurements, then findings."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fastclip.functional as functional
from fastclip.checks import number
from fastclip.doctor import (
    attention,
    bounds,
    depth,
    initialisation,
    inputs,
    learning_rate,
    losses,
    origin,
    precision,
    recurrence,
    units,
)
from fastclip.doctor.diagnosis import (
    ERROR,
    INFO,
    SEVERITIES,
    WARNING,
    Diagnosis,
    DoctorError,
    Finding,
    Range,
    Row,
    Trial,
)
from fastclip.doctor.layers import Call
from fastclip.doctor.passes import Seen, observe
from fastclip.doctor.progress import progress_bar
from fastclip.doctor.subject import Subject, subject_of
from fastclip.doctor.untouched import Untouched

RUNNING = ("running_mean", "running_var")


def check(
    model: nn.Module,
    batch: Any = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: Callable[[nn.Module], Tensor] | None = None,
    max_seconds: float = 60.0,
) -> Diagnosis:
    """Looks for what keeps a model from training: a few passes over one batch, then a table and plain sentences.

    It changes nothing: parameters, buffers, gradients, optimizer state, training modes, hooks and random generators are
    afterwards what they were, also when the model raises. A model that is in evaluation mode as a whole is looked at in
    training mode; one of which only parts are is taken as it is.

    Args:
        model: as it is trained, or is about to be.
        batch: ``(inputs, targets)``, as in training; the loss is ``loss_fn(model(inputs), targets)``.
        loss_fn: a function or module of outputs and targets.
        optimizer: the one it is trained with: its learning rate is judged, with a new optimizer of its class and
            settings, clipped as it is. Without one, AdamW is what a learning rate is suggested for.
        step: instead of ``batch`` and ``loss_fn``, for several inputs, own losses, masks: ``loss = step(model)`` runs
            the model that it is given, and returns the loss. It is called some 70 times; what else it changes is its
            own business.
        max_seconds: learning rates are tried for so long at most; 0 for not at all.

    Returns:
        :class:`Diagnosis`; ``print()`` it.

    Raises:
        TypeError: not exactly one of the two forms.
        ValueError: a negative ``max_seconds``.
        DoctorError: the model failed, isn't ready to run, or is sharded. Nothing was changed.

    Example:
        >>> import torch, fastclip
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Sigmoid()) for _ in range(12)]
        >>> model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 2))
        >>> x, y = torch.randn(64, 16), torch.randint(2, (64,))
        >>> fastclip.check(model, (x, y), torch.nn.CrossEntropyLoss()).findings[0].code
        'vanishing-depth'

    Source: Pascanu et al. 2013, arXiv:1211.5063; Glorot and Bengio 2010; He et al. 2015, arXiv:1502.01852; Smith 2017,
    arXiv:1506.01186. docs/doctor.md has each code with its threshold.
    """
    seconds = number("max_seconds", max_seconds)
    subject = subject_of(model, batch, loss_fn, optimizer, step)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        Untouched([subject.model, *subject.others]) as untouched,
        _uncompiled(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Using a target size")  # "broadcast-loss" tells of it
        bad = _bad_parameters(subject)
        buffers = _bad_buffers(subject)
        subject.prepare()
        seen = observe(subject)
        if not seen.calls and not seen.given and not seen.hidden:
            raise DoctorError("the step never called the model: it has to run the one it is given, loss = step(model)")
        found: list[Finding] = []
        notes = [*inputs.notes(seen.given), *units.notes(seen.activations)]
        if not seen.calls:
            notes.append(
                "layers: none was seen that is one of torch.nn's or has weights of its own; depth, initialisation and "
                "units of what is built otherwise can't be told"
            )
        if seen.hidden:
            notes.append("layers inside of torch.func's vmap or grad: their tensors have no values of their own")
        tried, trial, steady = None, None, None
        if bad:
            found.append(_nonfinite_parameters(bad))
        if buffers:
            found.append(_nonfinite_buffers(buffers))
        if bad or not math.isfinite(seen.loss) or seen.bad:
            untouched.rewind()
            subject.prepare()
            found += _of_what_is_not_finite(subject, seen, bad)
            notes.append("learning rates: the loss or the gradients aren't finite")
        elif halved := precision.without_eps(subject):
            found.append(halved)
            notes.append("learning rates: the optimizer's eps is 0")
        elif seen.grads is not None:
            tried, trial, steady, why_not = _tried(subject, untouched, seconds)
            notes += [f"learning rates: {why_not}"] * bool(why_not)
            if tried is not None:
                found += learning_rate.findings(tried, trial)
    found = [*_of_the_pass(subject, seen, steady), *found]
    codes = {finding.code for finding in found}
    total_norm = math.nan if seen.grads is None else float(seen.grads.total_norm)
    if math.isfinite(seen.loss) and bounds.HUGE < total_norm < math.inf and not bounds.explodes(codes):
        found.append(_out_of_scale(seen.loss, total_norm))
    norms: tuple[float, ...] = ()
    at = ""
    if trial is None and math.isfinite(seen.loss):
        norms = (total_norm,)
    if steady is not None and tried is not None:
        norms, at = steady.norms, f" with {tried.optimizer} at lr {steady.lr:.2g}"
    return Diagnosis(
        findings=tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))),
        rows=tuple(_row(place, call, seen) for place, call in enumerate(seen.calls)),
        curves=tuple(seen.curves),
        loss=seen.loss,
        total_norm=total_norm,
        bound=bounds.bound_of(norms, seen.grads, codes, at),
        lr=tried,
        trial=trial,
        notes=tuple(notes),
    )


def _of_the_optimizer(subject: Subject) -> Iterator[Finding]:
    missing, total = subject.strangers, len(subject.parameters)
    if not missing or subject.has_copies:
        return
    what = f"{len(missing)} of {total} parameters that are to be trained aren't among the optimizer's"
    if len(missing) == total:
        yield Finding(
            "optimizer-parameters",
            ERROR,
            f"{what}: it trains something else, perhaps an older copy of the model",
            "make it of this model's, torch.optim.AdamW(model.parameters()), after whatever replaces them: another "
            "model, a new head, a conversion",
            (),
            {"missing": float(total), "parameters": float(total)},
        )
    else:
        yield Finding(
            "optimizer-parameters",
            INFO,
            f"{what}: {units.listed(missing)}",
            "fine if another optimizer has them; else add them, optimizer.add_param_group({'params': ...}), or freeze "
            "them with requires_grad_(False)",
            missing[: units.LISTED],
            {"missing": float(len(missing)), "parameters": float(total)},
        )


def _starts_as_nothing(subject: Subject, zero: tuple[str, ...]) -> bool:
    """Whether a factor is 0, as a normalisation's or a ReZero's may be, and gets a gradient."""
    factors = (p for n, p in subject.parameters.items() if n not in zero and p.dim() < 2 and not n.endswith("bias"))
    return any(p.numel() > 0 and not bool(p.detach().any()) for p in factors)


def _unregistered(names: tuple[str, ...]) -> Finding:
    return Finding(
        "unregistered-parameter",
        WARNING,
        f"{len(names)} parameter{'s are' if len(names) > 1 else ' is'} used from a plain list or dict, which "
        f"model.parameters() doesn't look into: {units.listed(names)}",
        "keep layers in torch.nn.ModuleList or ModuleDict, and parameters in ParameterList or ParameterDict",
        names[: units.LISTED],
        {"parameters": float(len(names))},
    )


def _out_of_scale(loss: float, norm: float) -> Finding:
    return Finding(
        "gradient-scale",
        WARNING,
        f"the norm of all gradients is {norm:.3g}, at a loss of {loss:.4g}; with numbers around 1 it is around 1",
        "bring the loss to around 1: scale the targets, take a mean instead of a sum, keep divisors away from 0. A "
        "bound alone would hide it",
        (),
        {"norm": norm, "loss": loss},
    )


def _uncompiled() -> AbstractContextManager[object]:
    """Compiled code runs as it was written: hooks on modules don't fire in what was compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _of_the_pass(subject: Subject, seen: Seen, steady: Trial | None) -> Iterator[Finding]:
    """``steady``: the steps that were tried, and went well."""
    yield from inputs.findings(seen.given, math.isfinite(seen.loss) and not seen.bad)
    yield from losses.findings(seen.losses)
    trained = len(seen.without) + (0 if seen.grads is None else len(seen.grads.names))
    zero = seen.zero if math.isfinite(seen.loss) else ()  # else they say nothing
    held_back = any(weight.std == 0.0 for weight in seen.weights) or _starts_as_nothing(subject, zero)
    if steady is not None:
        still = tuple(name for name in zero if name in steady.zero)
        held_back, zero = not still, still or zero
    dims = {name: parameter.dim() for name, parameter in subject.parameters.items()}
    only_biases = all(dims[name] < 2 for name in zero)
    yield from units.without_gradient(seen.without, zero, trained, held_back, only_biases)
    yield from _of_the_optimizer(subject)
    if seen.unregistered:
        yield _unregistered(seen.unregistered)
    yield from initialisation.findings(seen.calls, seen.weights, seen.follows, seen.may_be_small)
    yield from depth.findings(seen.calls, seen.weight_grads)
    yield from recurrence.findings(seen.curves)
    yield from units.findings(seen.activations, seen.calls)
    yield from attention.findings(seen.attentions)
    yield from precision.findings(seen.calls)


def _bad_parameters(subject: Subject) -> tuple[str, ...]:
    named = [(name, p.detach()) for name, p in subject.model.named_parameters() if p.is_floating_point()]
    stats = functional.grad_stats(named, extras=False)
    found = (stats.nans + stats.infs).tolist()
    return tuple(name for name, count in zip(stats.names, found, strict=True) if count)


def _bad_buffers(subject: Subject) -> tuple[str, ...]:
    """Those with NaN, and running means and variances with Inf; other buffers, masks, hold Inf by intent. What lies in
    8 bits are scales and weights of their own kinds."""
    buffers = [(name, b.detach()) for name, b in subject.model.named_buffers() if b.numel()]
    named = [(name, b) for name, b in buffers if b.is_floating_point() and b.itemsize > 1]
    stats = functional.grad_stats(named, extras=False)
    each = zip(stats.names, stats.nans.tolist(), stats.infs.tolist(), strict=True)
    return tuple(name for name, nans, infs in each if nans or (infs and name.endswith(RUNNING)))


def _count(names: tuple[str, ...], noun: str) -> str:
    which = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    return f"{len(names)} {noun}{'s hold' if len(names) > 1 else ' holds'} NaN or Inf: {which}"


def _nonfinite_buffers(bad: tuple[str, ...]) -> Finding:
    return Finding(
        "nonfinite-buffer",
        WARNING,
        f"{_count(bad, 'buffer')}. A bad batch has got into what the model keeps, and where that is used, as running "
        "means and variances are in evaluation, everything becomes NaN",
        "module.reset_running_stats() for each normalisation among them, then some good batches in training mode; or "
        "go back to a checkpoint from before. No guard of the optimizer sees this: look at the inputs",
        bad,
        {"buffers": float(len(bad))},
    )


def _nonfinite_parameters(bad: tuple[str, ...]) -> Finding:
    return Finding(
        "nonfinite-parameter",
        ERROR,
        _count(bad, "parameter"),
        "go back to a checkpoint from before, or start anew: no step brings a NaN back. "
        "fastclip.ClippedOptimizer(optimizer, max_norm=1.0) skips the steps that would write one",
        bad,
        {"parameters": float(len(bad))},
    )


def _of_what_is_not_finite(subject: Subject, seen: Seen, bad: tuple[str, ...]) -> Iterator[Finding]:
    operations = nodes = None
    if not bad:
        filled = subject.with_filled_targets()
        trace = origin.traced(filled or subject)
        if filled is not None and trace.finite:
            yield origin.target_finding(seen.loss, subject)
            return
        operations, nodes = trace.operations, trace.nodes
    if not math.isfinite(seen.loss):
        yield from origin.forward_findings(seen.loss, operations)
    elif seen.bad and seen.grads is not None:
        counts = int(seen.grads.nans.sum()), int(seen.grads.infs.sum())
        yield from origin.backward_findings(seen.bad, *counts, operations, nodes)


def _tried(
    subject: Subject, untouched: Untouched, seconds: float
) -> tuple[Range | None, Trial | None, Trial | None, str]:
    """A range test, a trial of the learning rate in use, one that didn't diverge, and why some of it is missing."""
    if seconds == 0.0:
        return None, None, None, "max_seconds is 0"
    if why_not := learning_rate.can_try(subject):
        return None, None, None, why_not
    trainer = learning_rate.Trainer(subject, untouched, seconds)
    with progress_bar(learning_rate.POINTS + learning_rate.STEPS) as progress:
        try:
            tried = learning_rate.range_of(trainer, progress)
            lr = trainer.used if math.isfinite(trainer.used) else math.nan if tried is None else tried.suggested
            trial = None if math.isnan(lr) else learning_rate.trial_of(trainer, lr, progress)
            steady = trial
            if trial is not None and learning_rate.led_astray(trial.losses):
                again = math.nan if tried is None else min(tried.suggested, lr / learning_rate.MARGIN)
                steady = None if math.isnan(again) else learning_rate.trial_of(trainer, again, progress)
            if steady is not None and learning_rate.led_astray(steady.losses):
                steady = None
        except DoctorError as error:
            return None, None, None, str(error).splitlines()[0]
    late = f"{seconds:g} seconds were over before all were tried; a smaller batch, or a larger max_seconds, helps"
    return tried, trial, steady, late if trainer.late else ""


def _row(place: int, call: Call, seen: Seen) -> Row:
    made = call.made
    stds = [weight.std for weight in seen.weights if weight.layer == call.layer.name]
    dead = [one.dead for one in seen.activations if one.call == place]
    return Row(
        layer=call.layer.name,
        call=call.number + 1,
        kind=call.layer.kind,
        mean=math.nan if made is None else made.mean,
        std=math.nan if made is None else made.std,
        gain=call.gain,
        weight_std=max(stds, default=math.nan),
        output_grad=call.output_grad,
        weight_grad=seen.weight_grads.get(call.layer.name, math.nan),
        dead=max(dead, default=math.nan),
    )
