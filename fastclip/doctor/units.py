"""Units that say nothing: a ReLU that is always 0, a sigmoid or tanh where it is flat, no gradient at all."""

from __future__ import annotations

from collections.abc import Iterator

from fastclip.doctor.diagnosis import ERROR, INFO, WARNING, Finding
from fastclip.doctor.layers import Call
from fastclip.doctor.operations import RELU, Activation

# With fewer samples a unit that is 0 half of the time is 0 for all of them too often.
MIN_SAMPLES = 32
# A ReLU layer that torch starts has up to half its units at 0 for a whole batch where it is deep; from nine of ten on
# hardly anything gets through.
HALF_DEAD, DEAD = 0.5, 0.9
SATURATED = (
    0.5  # Glorot and Bengio 2010, section 3: a layer that sits in the flat part of its activation stops to learn
)
LISTED = 5


def findings(activations: list[Activation], calls: list[Call]) -> Iterator[Finding]:
    """Of the layers in front of the activations, the worst one first."""
    worst: dict[bool, dict[str, Activation]] = {True: {}, False: {}}
    for one in sorted(activations, key=lambda one: one.dead, reverse=True):
        enough = one.samples >= MIN_SAMPLES or one.kind != RELU
        if one.call >= 0 and enough and one.dead >= (HALF_DEAD if one.kind == RELU else SATURATED):
            worst[one.kind == RELU].setdefault(calls[one.call].layer.name, one)
    if worst[True]:
        where = tuple(worst[True])
        one = worst[True][where[0]]
        yield Finding(
            "dead-units",
            ERROR if one.dead == 1.0 else WARNING if one.dead >= DEAD else INFO,
            f"{one.dead:.0%} of the ReLU units behind layer {where[0]} are 0 for all {one.samples} "
            f"samples{_and_more(where)}: "
            "they pass no gradient and can't come back by themselves",
            "use torch.nn.LeakyReLU(0.01) or GELU, start the bias at 0 (torch.nn.init.zeros_(layer.bias)), and lower "
            "the learning rate if they died in training",
            where,
            {"dead": one.dead, "samples": float(one.samples), "layers": float(len(where))},
        )
    if worst[False]:
        where = tuple(worst[False])
        one = worst[False][where[0]]
        yield Finding(
            "saturated-units",
            WARNING,
            f"{one.dead:.0%} of what the {one.kind} behind layer {where[0]} gives lies where it is "
            f"flat{_and_more(where)}: "
            "nearly no gradient gets through there",
            "make what goes into it smaller: scale the inputs, torch.nn.init.xavier_normal_(layer.weight), or a "
            "torch.nn.LayerNorm before it",
            where,
            {"saturated": one.dead, "layers": float(len(where))},
        )


def _and_more(where: tuple[str, ...]) -> str:
    more = len(where) - 1
    return f", and many behind {more} more layer{'s' if more > 1 else ''}" if more else ""


def notes(activations: list[Activation]) -> Iterator[str]:
    """What can't be judged."""
    few = min((one.samples for one in activations if one.kind == RELU), default=MIN_SAMPLES)
    if few < MIN_SAMPLES:
        yield f"dead units: that takes {MIN_SAMPLES} samples, this batch has {few}"


def without_gradient(
    without: tuple[str, ...], zero: tuple[str, ...], total: int, held_back: bool, only_biases: bool
) -> Iterator[Finding]:
    """Of parameters that the loss doesn't depend on, or whose gradient is 0 everywhere.

    Args:
        without: names of those that got no gradient.
        zero: names of those whose gradient is all 0.
        total: how many parameters are trained.
        held_back: a factor or a layer that starts at 0 by intent holds back the gradient of what comes before it, in
            the first step.
        only_biases: of one dimension or none each are those whose gradient is 0. What is added to all outputs is gone
            where the loss takes their differences.
    """
    if len(without) == total:
        yield Finding(
            "loss-detached",
            ERROR,
            f"the loss doesn't depend on any of the {total} parameters that are to be trained",
            "look for .detach(), .item(), .numpy(), torch.no_grad() or argmax between the model and the loss",
            without[:LISTED],
            {"without": float(len(without)), "parameters": float(total)},
        )
        return
    if without:
        yield Finding(
            "no-gradient",
            WARNING,
            f"{len(without)} of {total} parameters get no gradient, the loss doesn't depend on them: {listed(without)}",
            "use them in forward(), or freeze them with requires_grad_(False); look for .detach() on the way",
            without[:LISTED],
            {"without": float(len(without)), "parameters": float(total)},
        )
    if zero:
        nothing = len(zero) + len(without) == total
        advice = "look for dead units or a multiplication by 0 behind them"
        if nothing:
            advice = (
                "the loss is flat here: look for a softmax over one output, a comparison, rounding, a clamp, or a "
                "multiplication by 0"
            )
        elif held_back:
            advice = "fine where a layer or a factor behind them starts at 0: they get one from the second step on"
        elif only_biases:
            advice = "fine where a loss takes differences of outputs, and a bias cancels; else look for dead units"
        yield Finding(
            "zero-gradient",
            ERROR if nothing else INFO if held_back or only_biases else WARNING,
            f"{len(zero)} of {total} parameters get a gradient that is 0 everywhere: {listed(zero)}",
            advice,
            zero[:LISTED],
            {"zero": float(len(zero)), "parameters": float(total)},
        )


def listed(names: tuple[str, ...]) -> str:
    """Some of them."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
