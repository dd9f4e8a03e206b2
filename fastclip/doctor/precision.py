"""The range of the numbers: what is too small or too large for the dtype, or would be in float16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastclip.doctor.diagnosis import ERROR, INFO, WARNING, Finding
from fastclip.doctor.layers import Call
from fastclip.doctor.moments import FLOAT16_ZERO
from fastclip.doctor.subject import Subject, inner
from fastclip.monitoring.flags import FlagRules

SUBNORMAL = FlagRules.subnormal  # share of a gradient's elements that have lost bits, the monitor's own measure
# Micikevicius et al. 2018, section 3.2: in float16 activation gradients below 2^-24 become 0. From this share on it is
# worth a word.
LOST = 0.05
# Within four binary places of the largest number: a sum of 16 such numbers overflows, or one step at a usual rate does.
NEAR = 1.0 / 16.0
# Of these the root of the averages is 0 in the first step, too.
DIVIDING = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop)
WIDE = (torch.float32, torch.float64)


def findings(calls: list[Call]) -> Iterator[Finding]:
    """Of the gradients and outputs of the layers."""
    yield from _underflow(calls)
    yield from _overflow(calls)
    yield from _float16(calls)


def without_eps(subject: Subject) -> Finding | None:
    """Of float16 parameters whose optimizer divides by a root and an eps that float16 rounds to 0. Fused steps have
    float32."""
    optimizer = inner(subject.optimizer)
    if not isinstance(optimizer, DIVIDING):
        return None
    names = {id(parameter): name for name, parameter in subject.parameters.items()}
    half: list[str] = []
    eps = 1.0
    for group in optimizer.param_groups:
        own = [names[id(p)] for p in group["params"] if id(p) in names and p.dtype == torch.float16]
        if own and not group.get("fused") and group["eps"] < FLOAT16_ZERO:
            half, eps = half + own, float(group["eps"])
    if not half:
        return None
    return Finding(
        "eps-underflow",
        ERROR,
        f"{len(half)} parameter{'s are' if len(half) > 1 else ' is'} float16, where an eps of {eps:g} is 0: the first "
        "step divides 0 by 0",
        "keep the parameters in float32, and run the model under torch.autocast with fastclip.GradScaler(); or train "
        "in torch.bfloat16",
        tuple(half[:5]),
        {"eps": eps, "parameters": float(len(half))},
    )


def _underflow(calls: list[Call]) -> Iterator[Finding]:
    thin = [
        (census.subnormal / census.nonzero, call, census) for call in calls for census in call.grads if census.nonzero
    ]
    share, call, census = max(thin, key=lambda one: one[0], default=(0.0, None, None))
    if call is None or census is None or share < SUBNORMAL:
        return
    tiny = torch.finfo(census.dtype).tiny
    yield Finding(
        "underflow",
        WARNING,
        f"{share:.0%} of the gradient that reaches layer {call.layer.name} is below {tiny:.2g}, where "
        f"{_name(census.dtype)} "
        "loses bits; smaller ones are already 0",
        "scale the loss: fastclip.GradScaler(), or train in torch.bfloat16"
        if census.dtype == torch.float16
        else "find out what makes the gradient so small: smaller ones than these don't exist in this dtype",
        (call.layer.name,),
        {"share": share, "tiny": tiny, "max_abs": census.max_abs},
    )


def _overflow(calls: list[Call]) -> Iterator[Finding]:
    sizes = [(call.made.max_abs, call.made.dtype, call, "output") for call in calls if call.made and call.made.finite]
    sizes += [(census.max_abs, census.dtype, call, "gradient") for call in calls for census in call.grads]
    near = [
        (size / torch.finfo(dtype).max, size, dtype, call, what)
        for size, dtype, call, what in sizes
        if size <= torch.finfo(dtype).max  # what is Inf already is told elsewhere
    ]
    share, size, dtype, call, what = max(near, key=lambda one: one[0], default=(0.0, 0.0, torch.float32, None, ""))
    if call is None or share < NEAR:
        return
    yield Finding(
        "overflow",
        WARNING,
        f"the {what} of layer {call.layer.name} goes up to {size:.3g}; the largest number of {_name(dtype)} is "
        f"{torch.finfo(dtype).max:.3g}",
        "use torch.bfloat16, which has the range of float32, or keep this layer in float32"
        if dtype == torch.float16
        else "make the weights or inputs smaller, or put a torch.nn.LayerNorm before this layer",
        (call.layer.name,),
        {"max_abs": size, "largest": torch.finfo(dtype).max},
    )


def _float16(calls: list[Call]) -> Iterator[Finding]:
    wide = [census for call in calls for census in call.grads if census.dtype in WIDE]
    nonzero, lost = sum(census.nonzero for census in wide), sum(census.lost for census in wide)
    highest = max((call.made.max_abs for call in calls if call.made and call.made.finite), default=0.0)
    limit = torch.finfo(torch.float16).max
    if not wide or not nonzero or (lost / nonzero < LOST and highest <= limit):
        return
    said = f"{lost / nonzero:.0%} of the gradients between the layers would be 0 without a loss scale"
    if highest > limit:
        said = f"the largest output, {highest:.3g}, would be Inf" + (f", and {said}" if lost / nonzero >= LOST else "")
    yield Finding(
        "float16-range",
        INFO,
        f"in float16 {said}",
        "with torch.autocast take torch.bfloat16"
        + ("" if highest > limit else ", or float16 with fastclip.GradScaler()"),
        (),
        {"lost": lost / nonzero, "highest": highest},
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
