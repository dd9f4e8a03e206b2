"""The loss: what is given to it, and whether its first value is one that a fresh model should have."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastclip.doctor.diagnosis import ERROR, INFO, WARNING, Finding
from fastclip.doctor.inputs import LARGE, SMALL, scaled
from fastclip.doctor.loss_calls import (
    BINARY,
    CLASSES,
    DIVERGENCE,
    LOG_CLASSES,
    PROBABILITY,
    PRODUCT,
    REGRESSION,
    ROUNDING,
    LossCall,
)

# A fresh model knows nothing: its cross-entropy is log(C), that of guessing. Twice that, and at least 1 above, is a
# model that is sure of itself and wrong.
ABOVE_CHANCE, ABOVE_CHANCE_BY = 2.0, 1.0


def findings(calls: list[LossCall]) -> Iterator[Finding]:
    """Of each loss function that was called."""
    told = set()
    for call in calls:
        for finding in _of(call):
            if (finding.code, finding.where) not in told:  # once for all steps of a loop
                told.add((finding.code, finding.where))
                yield finding


def _of(call: LossCall) -> Iterator[Finding]:
    if call.kind == CLASSES:
        yield from _classes(call)
    elif call.kind == LOG_CLASSES:
        yield from _log_classes(call)
    elif call.kind in (BINARY, PROBABILITY):
        yield from _binary(call)
    elif call.kind == DIVERGENCE:
        yield from _divergence(call)
    elif call.kind in (REGRESSION, PRODUCT):
        yield from _pairs(call)
    if call.kind == REGRESSION:
        yield from _scale(call)


def _classes(call: LossCall) -> Iterator[Finding]:
    if call.classes == 1:
        yield _one_class(call)
    at_best = math.log(1 + (call.classes - 1) / math.e) if call.classes else math.nan
    if call.sums_to_one:
        yield Finding(
            "softmax-twice",
            ERROR,
            f"{call.name} gets probabilities: for each sample the {call.classes} outputs sum to 1. It takes a softmax "
            f"itself, so the loss can never fall below {at_best:.3g}, and the gradients are small",
            "take the Softmax out of the model and give the loss the outputs before it (logits)",
            (call.name,),
            {"classes": float(call.classes), "value": call.value, "least": at_best},
        )
    elif call.classes > 1 and call.made_by in ("sigmoid", "softmax"):
        yield _bounded(call, at_best)
    elif call.made_of == "softmax" and call.logs_sum_to_one:
        yield _softmax_inside(call)
    elif call.logs_sum_to_one:
        yield Finding(
            "softmax-twice",
            INFO,
            f"{call.name} gets logarithms of the probabilities of {call.classes} classes, and takes their log_softmax "
            "once more, which changes nothing",
            "leave out one of both: no LogSoftmax in the model, or torch.nn.NLLLoss as the loss",
            (call.name,),
            {"classes": float(call.classes), "value": call.value},
        )
    if call.shares is not None and (call.counts or abs(call.shares - 1.0) > ROUNDING):
        if call.counts:
            return  # how often each class comes, as a likelihood has it
        yield Finding(
            "target-shares",
            ERROR,
            f"{call.name} gets a share of each class as its targets, and in each sample they sum to {call.shares:.3g}; "
            "they are probabilities, whose sum is 1",
            "targets = targets / targets.sum(1, keepdim=True), or the numbers of the classes, torch.int64",
            (call.name,),
            {"sum": call.shares, "classes": float(call.classes)},
        )
        return
    chance = math.log(call.classes) if call.classes > 1 else math.nan
    if math.isfinite(call.value) and call.value > max(ABOVE_CHANCE * chance, chance + ABOVE_CHANCE_BY):
        spread = math.nan if call.given is None else call.given.std
        yield Finding(
            "loss-above-chance",
            WARNING,
            f"{call.name} starts at {call.value:.4g}; guessing among {call.classes} classes gives {chance:.4g}. The "
            f"outputs have standard deviation {spread:.3g}: the model is sure of itself, and wrong",
            "start the last layer small, torch.nn.init.normal_(head.weight, std=0.01), and look at the labels if it "
            "has been trained already",
            (call.name,),
            {"value": call.value, "chance": chance, "outputs_std": spread},
        )


def _bounded(call: LossCall, at_best: float) -> Finding:
    what = "a sigmoid" if call.made_by == "sigmoid" else "a softmax over another dimension than the classes'"
    several = ". Where a sample may be of several classes: BCEWithLogitsLoss" if call.made_by == "sigmoid" else ""
    return Finding(
        "bounded-logits",
        ERROR,
        f"{call.name} gets what {what} gave, numbers from 0 to 1, and takes a softmax over {call.classes} classes of "
        f"it: with differences of 1 at most the loss can never fall below {at_best:.3g}, and the gradients are small",
        f"take the {call.made_by.capitalize()} out of the model and give the loss what goes into it (logits){several}",
        (call.name,),
        {"classes": float(call.classes), "value": call.value, "least": at_best},
    )


def _softmax_inside(call: LossCall) -> Finding:
    return Finding(
        "softmax-twice",
        ERROR,
        f"{call.name} gets the {call.made_by} of what a softmax over {call.classes} classes gave: that sees "
        "differences of 1 at most, and the gradients are small",
        "take the Softmax out of the model and leave the LogSoftmax, or torch.nn.CrossEntropyLoss without both",
        (call.name,),
        {"classes": float(call.classes), "value": call.value},
    )


def _one_class(call: LossCall) -> Finding:
    return Finding(
        "one-class",
        ERROR,
        f"{call.name} gets one output for each sample, so one class, whose probability is 1 whatever it is: the "
        f"loss is {call.value:.3g}, and no gradient comes from it",
        "for two classes use torch.nn.BCEWithLogitsLoss with targets of 0.0 and 1.0 in the outputs' shape, or make "
        "two outputs",
        (call.name,),
        {"classes": 1.0, "value": call.value},
    )


def _divergence(call: LossCall) -> Iterator[Finding]:
    if call.given is not None and call.given.finite and call.given.high > ROUNDING:
        yield Finding(
            "kl-without-log",
            ERROR,
            f"{call.name} gets {'probabilities' if call.sums_to_one else 'numbers'} from {call.given.low:.3g} to "
            f"{call.given.high:.3g}, where it needs logarithms of probabilities, none above 0. Its value, "
            f"{call.value:.3g}, means nothing",
            "give it torch.nn.functional.log_softmax(outputs, dim=1), and reduction='batchmean'",
            (call.name,),
            {"low": call.given.low, "high": call.given.high, "value": call.value},
        )


def _log_classes(call: LossCall) -> Iterator[Finding]:
    if call.made_of == "softmax" and call.logs_sum_to_one:
        yield _softmax_inside(call)
    if call.given is not None and call.given.finite and call.classes > 1 and not call.logs_sum_to_one:
        what = "probabilities" if call.sums_to_one else "numbers that are no logarithms of probabilities"
        yield Finding(
            "nll-without-log",
            ERROR,
            f"{call.name} gets {what}: from {call.given.low:.3g} to {call.given.high:.3g}, where it needs log_softmax. "
            f"Its value, {call.value:.3g}, means nothing, and has no lower bound",
            "use torch.nn.CrossEntropyLoss on the outputs before any softmax",
            (call.name,),
            {"low": call.given.low, "high": call.given.high, "value": call.value},
        )


def _binary(call: LossCall) -> Iterator[Finding]:
    m = call.target
    if m is not None and m.finite and call.whole and (m.low < -ROUNDING or m.high > 1.0 + ROUNDING):
        yield Finding(
            "target-range",
            ERROR,
            f"the targets of {call.name} go from {m.low:.3g} to {m.high:.3g}; they are probabilities, from 0 to 1. "
            "Outside of that the loss has no lower bound",
            f"divide them by {m.high:.3g}" if m.low >= 0.0 else "make 0.0 and 1.0 of the two classes",
            (call.name,),
            {"low": m.low, "high": m.high, "value": call.value},
        )
    if call.kind == PROBABILITY:
        if call.made_by == call.made_of == "sigmoid" and call.given is not None:
            yield _sigmoids(call, "the sigmoid of what a sigmoid gave")
        if call.made_by == "softmax" and call.given is not None and call.given.low == call.given.high == 1.0:
            yield _one_class(call)
        return
    if call.given is not None and call.made_by == "sigmoid":
        yield _sigmoids(call, "what a sigmoid gave, and takes a sigmoid itself")


def _sigmoids(call: LossCall, what: str) -> Finding:
    assert call.given is not None
    return Finding(
        "sigmoid-twice",
        ERROR,
        f"{call.name} gets {what}, from {call.given.low:.3g} to {call.given.high:.3g}: its probabilities stay between "
        "0.5 and 0.73",
        "leave one sigmoid: no Sigmoid in the model, and torch.nn.BCEWithLogitsLoss on the outputs before it (logits)",
        (call.name,),
        {"low": call.given.low, "high": call.given.high, "value": call.value},
    )


def _pairs(call: LossCall) -> Iterator[Finding]:
    ours, theirs = call.shapes
    meant = call.step is not None and len(ours) == len(theirs)  # own losses, each against each: (N, 1) and (1, N)
    if _broadcast_by_mistake(ours, theirs) and not meant:
        pairs = math.prod(_broadcast(ours, theirs))
        yield Finding(
            "broadcast-loss",
            ERROR,
            f"{call.name} takes shape {ours} with shape {theirs}: broadcast, these are {pairs} pairs instead of "
            f"{math.prod(ours)}, each output against each target, and the model learns the mean",
            f"give both the same shape: outputs.squeeze(-1) or targets.reshape({ours})",
            (call.name,),
            {"pairs": float(pairs), "outputs": float(math.prod(ours))},
        )


def _scale(call: LossCall) -> Iterator[Finding]:
    m = call.target
    if m is None or not m.finite or m.max_abs == 0.0:
        return
    if not SMALL <= m.rms <= LARGE:
        yield Finding(
            "target-scale",
            WARNING,
            f"the targets of {call.name} have mean {m.mean:.3g} and standard deviation {m.std:.3g}, from "
            f"{m.low:.3g} to "
            f"{m.high:.3g}; a fresh model's outputs are around 1",
            f"scale them, {scaled('targets', m)}, and the forecasts back, or "
            "sklearn.compose.TransformedTargetRegressor",
            (call.name,),
            {"mean": m.mean, "std": m.std, "rms": m.rms, "low": m.low, "high": m.high},
        )


def _broadcast(ours: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...]:
    width = max(len(ours), len(theirs))
    padded = [(1,) * (width - len(shape)) + shape for shape in (ours, theirs)]
    return tuple(max(a, b) for a, b in zip(*padded, strict=True))


def _broadcast_by_mistake(ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Both hold the same numbers in the same order, but for dimensions of 1, and together they give more."""
    squeezed = [tuple(size for size in shape if size != 1) for shape in (ours, theirs)]
    return squeezed[0] == squeezed[1] and math.prod(_broadcast(ours, theirs)) > math.prod(ours)
