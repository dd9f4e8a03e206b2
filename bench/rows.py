"""Every row of the table as data: a name, a workload, the two contestants, the floor of their ratio."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import fastclip
from fastclip._native import C
from fastclip.riding import TWICE_FROM_BYTES

from . import oracle, peers
from .oracle import WrongResult
from .workloads import (
    EMBEDDING,
    EMBEDDING_BF16,
    FLAT,
    FLAT_BF16,
    FLAT_CONSTANT,
    GPT2,
    GPT2_BF16,
    GPT2_FP16,
    LSTM,
    RESNET50,
    ROWS,
    ROWS_BF16,
    SCALARS,
    SMALL,
    Workload,
    parameters,
)

EPS = 1e-6  # of clip_grad_norm_, in torch and here
NOTHING_TO_CLIP, CLIPPING = 2.0, 0.5  # max_norm, in units of the gradients' norm
NOTHING_TO_CLAMP, CLAMPING = 1.0, 0.03125  # clip_value: 50 and 1.6 deviations of a normal gradient
PROBE = 1024  # elements looked at after every timed call that has to write
LR = 1e-5  # of every step: hundreds of ulps of a parameter, and hundreds of steps still don't take it anywhere
L2 = 0.25  # of the rows with a penalty: the check of the first step would not miss it
SCALE = 1024.0  # of the GradScalers; what they do at another one is the same work


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contestant:
    """One side of a row.

    Attributes:
        call: what is timed.
        check: given what ``call`` returned, before anything is timed: its relative error, None where there
            is none to speak of. Raises ``WrongResult``.
        moved_bytes: the least that ``call`` has to move between memory and cores; table in docs/performance.md.
        before: untimed, before every call.
        after: untimed, after every call; raises ``WrongResult`` if the call did not do its work.
    """

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], float | None]
    moved_bytes: int
    before: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Row:
    """One ratio: time of the second contestant over time of the first.

    Attributes:
        make: from the workloads' inputs to the contestants.
        floor: the ratio must not be lower; None if nothing is claimed.
        quick: part of the short run.
    """

    name: str
    workloads: tuple[Workload, ...]
    make: Callable[..., tuple[Contestant, Contestant]]
    floor: float | None = None
    quick: bool = False


class Inputs:
    """The gradients of one workload, their untouched copy, and what the oracle says of them."""

    def __init__(self, workload: Workload, seed: int = 0, device: str = "cpu") -> None:
        self.workload, self.device = workload, device
        self.params = parameters(workload, seed, device)
        self.grads: list[Tensor] = [p.grad for p in self.params if p.grad is not None]
        self.pristine = [grad.clone() for grad in self.grads]
        self._norms: dict[float, list[float]] = {}

    def restore(self) -> None:
        torch._foreach_copy_(self.grads, self.pristine)

    def norms(self, p: float = 2.0) -> list[float]:
        if p not in self._norms:
            self._norms[p] = [oracle.norm(grad, p) for grad in self.pristine]
        return self._norms[p]

    def total_norm(self, p: float = 2.0) -> float:
        return oracle.norm_of_norms(self.norms(p), p)

    @functools.cached_property
    def largest_at(self) -> list[int]:
        return [int(grad.view(-1).abs().argmax()) for grad in self.pristine]

    def probe(self, is_right: Callable[[Tensor, Tensor], bool], beyond: float = 0.0) -> None:
        """Raises unless the first, middle and last gradient with an element beyond were written as they should.

        Looks at that element and some after it, so that it costs nothing between two timed calls.
        """
        beyond_it = [index for index, largest in enumerate(self.norms(math.inf)) if largest > beyond]
        for index in {beyond_it[0], beyond_it[len(beyond_it) // 2], beyond_it[-1]}:
            start = self.largest_at[index]
            got, before = (
                tensors[index].view(-1)[start : start + PROBE].float() for tensors in (self.grads, self.pristine)
            )
            if not is_right(got, before):
                raise WrongResult(f"a call did not write gradient {index} as it had to")

    def bytes(self, reads: int = 1, writes: int = 0, masks: int = 0) -> int:
        """Of so many passes over the gradients, and over one bool per element."""
        return (reads + writes) * self.workload.bytes + masks * self.workload.size


# ---- clipping by norm ----------------------------------------------------------------------------------


def clip_norm(inputs: Inputs, share: float) -> tuple[Contestant, Contestant]:
    """``clip_grad_norm_`` with ``max_norm = share * total_norm``."""
    clips = share < 1
    total_norm = inputs.total_norm()
    max_norm = share * total_norm

    def check_ours(norm: Tensor) -> float:
        error = oracle.check_norm("total_norm", norm, total_norm)
        if clips:
            oracle.check_scaled(inputs.grads, inputs.pristine, max_norm / (total_norm + EPS))
        else:
            oracle.check_untouched(inputs.grads, inputs.pristine)
        return error

    def shrunk() -> None:
        # loose, for torch's norm of 16-bit gradients; the atol is for numbers near 0, which round alike
        inputs.probe(lambda got, before: torch.allclose(got, share * before, rtol=0.1, atol=1e-6))

    before, after = (inputs.restore, shrunk) if clips else (_nothing, _nothing)
    return (
        Contestant(
            "fastclip",
            lambda: fastclip.clip_grad_norm_(inputs.params, max_norm),
            check_ours,
            inputs.bytes(reads=2, writes=1) if clips else inputs.bytes(reads=1),
            before,
            after,
        ),
        Contestant(
            "torch",
            lambda: torch.nn.utils.clip_grad_norm_(inputs.params, max_norm),
            lambda norm: oracle.relative_error(norm, total_norm),
            inputs.bytes(reads=2, writes=1),
            before,
            after,
        ),
    )


# ---- clipping by value ---------------------------------------------------------------------------------


def clip_value(inputs: Inputs, bound: float) -> tuple[Contestant, Contestant]:
    clamps = max(inputs.norms(math.inf)) > bound

    def check(_: None) -> float:
        oracle.check_clamped(inputs.grads, inputs.pristine, bound)
        if not clamps:
            oracle.check_untouched(inputs.grads, inputs.pristine)
        return 0.0

    def clamped() -> None:
        inputs.probe(lambda got, before: torch.equal(got, before.clamp(-bound, bound)), beyond=bound)

    before, after = (inputs.restore, clamped) if clamps else (_nothing, _nothing)

    def contestant(name: str, call: Callable[[], None], writes: int) -> Contestant:
        return Contestant(name, call, check, inputs.bytes(reads=1, writes=writes), before, after)

    return (
        contestant("fastclip", lambda: fastclip.clip_grad_value_(inputs.params, bound), writes=int(clamps)),
        contestant("torch", lambda: torch.nn.utils.clip_grad_value_(inputs.params, bound), writes=1),
    )


# ---- statistics ----------------------------------------------------------------------------------------


def _check_stats(inputs: Inputs, stats: fastclip.GradStats) -> float:
    error = oracle.check_norm("total_norm", stats.total_norm, inputs.total_norm())
    for index, (got, want) in enumerate(zip(stats.tensor_norms.tolist(), inputs.norms(), strict=True)):
        oracle.check_norm(f"tensor_norms[{index}]", got, want)
    oracle.check_equal("the number of NaN and Inf", int(stats.nans.sum() + stats.infs.sum()), 0)
    if stats.tensor_max_abs is not None and stats.zeros is not None:
        oracle.check_equal("tensor_max_abs", stats.tensor_max_abs.tolist(), inputs.norms(math.inf))
        zeros = [grad.numel() - int(torch.count_nonzero(grad)) for grad in inputs.grads]
        oracle.check_equal("zeros", stats.zeros.tolist(), zeros)
    return error


def statistics(inputs: Inputs, extras: bool, best_of_torch: bool = False) -> tuple[Contestant, Contestant]:
    """Norm of each tensor, total norm, NaN and Inf check; with extras also max|g| and zeros of each tensor."""
    total_norm, max_norm = inputs.total_norm(), NOTHING_TO_CLIP * inputs.total_norm()

    def torch_clip() -> tuple[Tensor, list[Tensor]]:
        """What a training loop has at hand: clip, then look at each gradient."""
        norm = torch.nn.utils.clip_grad_norm_(inputs.params, max_norm)
        facts = [grad.isfinite().all() for grad in inputs.grads]
        if extras:
            facts += [torch.linalg.vector_norm(grad, math.inf) for grad in inputs.grads]
            facts += [torch.count_nonzero(grad) for grad in inputs.grads]
        return norm, facts

    def torch_norms() -> tuple[Tensor, list[Tensor]]:
        """The fewest passes torch can do it in: nothing is written, a norm that is finite vouches for its tensor."""
        norms = torch.stack(torch._foreach_norm(inputs.grads))
        return torch.linalg.vector_norm(norms), [norms.isfinite()]

    theirs = torch_norms if best_of_torch else torch_clip
    passes = {"reads": 1} if best_of_torch else {"reads": 5 if extras else 3, "writes": 1, "masks": 2}
    return (
        Contestant(
            "fastclip",
            lambda: fastclip.grad_stats(inputs.params, extras=extras),
            lambda stats: _check_stats(inputs, stats),
            inputs.bytes(reads=1),
        ),
        Contestant("torch", theirs, lambda found: oracle.relative_error(found[0], total_norm), inputs.bytes(**passes)),
    )


# ---- norms alone ---------------------------------------------------------------------------------------


def _our_norm(inputs: Inputs, p: float = 2.0, name: str = "fastclip") -> Contestant:
    return Contestant(
        name,
        lambda: fastclip.get_total_norm(inputs.grads, norm_type=p),
        lambda norm: oracle.check_norm("total_norm", norm, inputs.total_norm(p)),
        inputs.bytes(reads=1),
    )


def norm(inputs: Inputs, p: float) -> tuple[Contestant, Contestant]:
    theirs = Contestant(
        "torch",
        lambda: torch.nn.utils.get_total_norm(inputs.grads, norm_type=p),
        lambda norm: oracle.relative_error(norm, inputs.total_norm(p)),
        inputs.bytes(reads=1),
    )
    return _our_norm(inputs, p), theirs


def norm_against_sum(inputs: Inputs) -> tuple[Contestant, Contestant]:
    """Against the plainest read that torch has; what it adds up says nothing of its accuracy as a norm."""
    (flat,) = inputs.grads
    return _our_norm(inputs), Contestant("torch", lambda: torch.sum(flat), lambda _: None, inputs.bytes(reads=1))


def rows_against_dense(rows: Inputs, dense: Inputs) -> tuple[Contestant, Contestant]:
    """Both fastclip: an embedding's gradient, mostly zero, must not cost more than a dense one."""
    return clip_norm(rows, NOTHING_TO_CLIP)[0], clip_norm(dense, NOTHING_TO_CLIP)[0]


def use_capability(name: str) -> None:
    if C is None or not C.cpu_use_capability(name):
        raise WrongResult(f"this machine can't use the {name} kernels")


def capability(inputs: Inputs, name: str, best: str) -> tuple[Contestant, Contestant]:
    """Both fastclip: one instruction set against the one that is chosen by itself."""
    started_with = "" if C is None else C.cpu_capability()

    def forced(kernels: str) -> Contestant:
        ours = _our_norm(inputs, name=kernels)
        return Contestant(
            ours.name,
            ours.call,
            ours.check,
            ours.moved_bytes,
            before=lambda: use_capability(kernels),
            after=lambda: use_capability(started_with),
        )

    return forced(name), forced(best)


# ---- optimizer steps -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """An optimizer, and what its first step has to do.

    Attributes:
        make: from parameters to the optimizer.
        moment: the key of the state that is a multiple of the clipped gradient after the first step, and of what.
        stepped: from parameter and clipped gradient, in float64, to the parameter after the first step.
        reads, writes: passes of one step over arrays of the gradients' size; table in docs/performance.md.
        rides: whether it multiplies the gradients itself, while it reads them.
    """

    make: Callable[[list[nn.Parameter]], Optimizer]
    moment: tuple[str, float]
    stepped: Callable[[Tensor, Tensor], Tensor]
    reads: int
    writes: int
    rides: bool


def _adamw_stepped(param: Tensor, grad: Tensor) -> Tensor:
    """Both moments, unbiased, are then those of the gradient itself; weight decay and eps are torch's defaults."""
    return param * (1 - LR * 1e-2) - LR * grad / (grad.abs() + 1e-8)


def _sgd_stepped(param: Tensor, grad: Tensor) -> Tensor:
    return param - LR * grad


ADAMW = functools.partial(AdamW, lr=LR)
ADAMW_FUSED = Rule(functools.partial(ADAMW, fused=True), ("exp_avg", 0.1), _adamw_stepped, 4, 3, rides=True)
ADAMW_FOREACH = Rule(functools.partial(ADAMW, foreach=True), ("exp_avg", 0.1), _adamw_stepped, 12, 8, rides=False)
SGD_FUSED = Rule(
    functools.partial(SGD, lr=LR, momentum=0.9, fused=True), ("momentum_buffer", 1.0), _sgd_stepped, 3, 2, rides=True
)


class Model:
    """One contestant's parameters and optimizer. The gradients are the inputs' own, for both contestants.

    The parameters start as a copy of the gradients, whose deviation is that of GPT-2's weights, too.
    """

    def __init__(self, inputs: Inputs, rule: Rule) -> None:
        self.inputs, self.rule = inputs, rule
        self.params = [nn.Parameter(start.clone()) for start in inputs.pristine]
        for param, grad in zip(self.params, inputs.grads, strict=True):
            param.grad = grad
        self.optimizer = rule.make(self.params)

    def check_first_step(self, factor: float) -> None:
        """Raises unless one step was made, with the gradients times ``factor``."""
        key, share = self.rule.moment
        moments = [self.optimizer.state[param].get(key) for param in self.params]
        if any(moment is None for moment in moments):
            raise WrongResult("the optimizer made no step")
        oracle.check_scaled(moments, self.inputs.pristine, share * factor, roundings=8)
        oracle.check_stepped(
            self.params, self.inputs.pristine, lambda start: self.rule.stepped(start, start * factor), LR
        )

    def _some(self) -> list[Tensor]:
        """Of the first, middle and last parameter where their gradients are largest, and some elements after that."""
        return [
            self.params[index].detach().view(-1)[self.inputs.largest_at[index] :][:PROBE]
            for index in (0, len(self.params) // 2, -1)
        ]

    def look(self) -> None:
        self._before = [some.clone() for some in self._some()]

    def check_moved(self) -> None:
        """Raises unless the parameters have moved since ``look``, and not to NaN or Inf."""
        for now, before in zip(self._some(), self._before, strict=True):
            if now[0] == before[0] or not bool(now.isfinite().all()):
                raise WrongResult("a call did not step, or not to finite parameters")


def _stepper(
    name: str,
    model: Model,
    call: Callable[[], Any],
    checked_norm: Callable[[Any], tuple[float, float | None]],
    max_norm: float,
    passes: dict[str, int],
    scale: float = 1.0,
    l2: float = 0.0,
) -> Contestant:
    """A contestant that adds a penalty, clips and steps.

    ``checked_norm``: from what ``call`` returned to the norm that it clipped by, and that norm's relative error.
    """
    inputs = model.inputs
    growth = 1.0 + l2  # the parameters start as a copy of the gradients
    drift = l2 * LR * 1000  # as far as they go in a thousand steps

    def factor(norm: float) -> float:
        return min(1.0, max_norm / (norm + EPS)) * growth / scale

    nominal = factor(growth * inputs.total_norm() / scale)

    def check(returned: Any) -> float | None:
        norm, error = checked_norm(returned)
        if factor(norm) == 1.0:
            oracle.check_untouched(inputs.grads, inputs.pristine)
        else:
            oracle.check_scaled(inputs.grads, inputs.pristine, factor(norm), roundings=8)
        model.check_first_step(factor(norm))
        return error

    def before() -> None:
        if nominal != 1.0 or math.isinf(max_norm):  # the other contestant may have clipped them
            inputs.restore()
        model.look()

    def after() -> None:
        model.check_moved()
        if nominal != 1.0:
            atol = (1e-6 + drift) * nominal
            inputs.probe(lambda got, start: torch.allclose(got, nominal * start, rtol=0.1, atol=atol))

    return Contestant(name, call, check, inputs.bytes(**passes), before, after)


def step(
    inputs: Inputs,
    rule: Rule,
    share: float = NOTHING_TO_CLIP,
    scaled: bool = False,
    bare: bool = False,
    l2: float = 0.0,
) -> tuple[Contestant, Contestant]:
    """The wrapper's step against clipping and stepping, with ``max_norm = share * total_norm``.

    ``scaled``: the gradients are taken for scaled ones, with a GradScaler on both sides.
    ``bare``: against the same optimizer without any clipping, so what the guard costs.
    ``l2``: a penalty of this strength, against torch's fastest way to add it.
    """
    scale = SCALE if scaled else 1.0
    total_norm = (1.0 + l2) * inputs.total_norm() / scale
    max_norm = share * total_norm
    our_model, their_model = Model(inputs, rule), Model(inputs, rule)
    ours, theirs = fastclip.ClippedOptimizer(our_model.optimizer, max_norm, l2=l2), their_model.optimizer
    our_scaler, their_scaler = (
        scaler(inputs.device, init_scale=scale, growth_interval=1 << 30, enabled=scaled)
        for scaler in (fastclip.GradScaler, torch.amp.GradScaler)
    )
    their_weights = [param.detach() for param in their_model.params]
    for scaler in (our_scaler, their_scaler):
        scaler.scale(torch.zeros((), device=inputs.device))  # the first loss; only then it has a scale

    def our_scaled_step() -> None:
        our_scaler.step(ours)
        our_scaler.update()

    def their_step() -> Tensor:
        if l2:
            torch._foreach_add_(inputs.grads, their_weights, alpha=l2)
        norm = torch.nn.utils.clip_grad_norm_(their_model.params, max_norm)
        theirs.step()
        return norm

    def their_scaled_step() -> Tensor:
        their_scaler.unscale_(theirs)
        norm = torch.nn.utils.clip_grad_norm_(their_model.params, max_norm)
        their_scaler.step(theirs)
        their_scaler.update()
        return norm

    def our_norm(_: Any) -> tuple[float, float | None]:
        if ours.last_norm is None:
            raise WrongResult("the wrapper has seen no gradients")
        return total_norm, oracle.check_norm("last_norm", ours.last_norm, total_norm)

    def their_norm(returned: Any) -> tuple[float, float | None]:
        return (total_norm, None) if bare else (float(returned), oracle.relative_error(returned, total_norm))

    writes = scaled or share < 1
    # A GPU's coefficient isn't known when the step is launched.
    rides = rule.rides and (inputs.device == "cpu" or scaled or inputs.bytes() >= TWICE_FROM_BYTES)
    penalised = l2 != 0
    our_passes = {
        "reads": rule.reads + 1 + penalised + (writes and not rides),
        "writes": rule.writes + penalised + writes,
    }
    extra = 0 if bare else 1 + scaled  # clipping writes as much as it reads a second time, and so does unscaling
    their_passes = {
        "reads": rule.reads + extra + (not bare) + 2 * penalised,
        "writes": rule.writes + extra + penalised,
    }
    their_call = their_scaled_step if scaled else theirs.step if bare else their_step
    return (
        _stepper(
            "fastclip", our_model, our_scaled_step if scaled else ours.step, our_norm, max_norm, our_passes, scale, l2
        ),
        _stepper(
            *("torch", their_model, their_call, their_norm, math.inf if bare else max_norm, their_passes, scale, l2)
        ),
    )


class Still(Optimizer):
    """Counts its steps and does nothing else: what is timed around it is not its own time."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": LR})
        self.stepped = 0

    def step(self, closure: None = None) -> None:
        self.stepped += 1

    step.hooked = True  # type: ignore[attr-defined]  # torch puts its profiling around every other step


def host_time(inputs: Inputs) -> tuple[Contestant, Contestant]:
    """What the wrapper does besides reading gradients and stepping: gradients of one element, nothing to clip."""
    total_norm, max_norm = inputs.total_norm(), NOTHING_TO_CLIP * inputs.total_norm()
    our_still, their_still = Still(inputs.params), Still(inputs.params)
    ours = fastclip.ClippedOptimizer(our_still, max_norm)

    def torch_step() -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(inputs.params, max_norm)
        their_still.step()
        return norm

    def check_ours(_: Any) -> float:
        oracle.check_untouched(inputs.grads, inputs.pristine)
        return oracle.check_norm("last_norm", math.nan if ours.last_norm is None else ours.last_norm, total_norm)

    def contestant(
        name: str, call: Callable[[], Any], check: Callable[[Any], float], still: Still, **passes: int
    ) -> Any:
        def before() -> None:
            still.stepped = 0

        def after() -> None:
            if still.stepped != 1:
                raise WrongResult(f"a call made {still.stepped} steps")

        return Contestant(name, call, check, inputs.bytes(**passes), before, after)

    return (
        contestant("fastclip", ours.step, check_ours, our_still, reads=1),
        contestant(
            "torch", torch_step, lambda norm: oracle.relative_error(norm, total_norm), their_still, reads=2, writes=1
        ),
    )


# ---- policies ------------------------------------------------------------------------------------------

AGC_EPS = 1e-3  # timm's default
AGC_NOTHING, AGC_ALL = 100.0, 0.01  # clip_factor; weights are as large as gradients, so it clips no unit, or all
WINDOW = 10_000


def unitwise(inputs: Inputs, factor: float) -> tuple[Contestant, Contestant]:
    """Adaptive gradient clipping against timm's, no unit clipped or all."""
    generator = torch.Generator().manual_seed(1)
    for param in inputs.params:
        param.data.copy_(torch.randn(param.shape, generator=generator).mul_(0.02))
    theirs = peers.timm_agc()

    def check(_: Any) -> float:
        worst = 0.0
        for got, grad, param in zip(inputs.grads, inputs.pristine, inputs.params, strict=True):
            want = peers.agc_oracle(grad, param, factor, AGC_EPS)
            worst = max(worst, float((got.double() - want).norm() / want.norm().clamp(min=1e-30)))
        if worst > 1e-5:
            raise WrongResult(f"a unit is off by {worst:.1e}, relative to float64")
        return worst

    clips = factor == AGC_ALL

    def contestant(name: str, call: Callable[[], Any], reads: int, writes: int) -> Contestant:
        moved = inputs.bytes(reads=reads, writes=writes)
        return Contestant(name, call, check, moved, inputs.restore if clips else _nothing)

    return (
        contestant(
            "fastclip",
            lambda: fastclip.adaptive_clip_grad_(inputs.params, factor, AGC_EPS),
            reads=2 + clips,
            writes=int(clips),
        ),
        contestant("timm", lambda: theirs(inputs.params, factor, AGC_EPS), reads=6, writes=3),
    )


def adaptive(inputs: Inputs, policy: Callable[[], Any], peer: str) -> tuple[Contestant, Contestant]:
    """A rule of the joint norm against the package of its authors; equal norms, so nothing is clipped."""
    total_norm, ours = inputs.total_norm(), policy()
    theirs = peers.zclip_step(inputs.params) if peer == "zclip" else peers.autoclip_step(inputs.params, WINDOW)

    def check_ours(norm: Tensor) -> float:
        oracle.check_untouched(inputs.grads, inputs.pristine)
        return oracle.check_norm("total_norm", norm, total_norm)

    return (
        Contestant("fastclip", lambda: fastclip.clip_grads_(inputs.params, ours), check_ours, inputs.bytes(reads=1)),
        Contestant(peer, theirs, lambda _: None, inputs.bytes(reads=1)),
    )


def host_time_of(inputs: Inputs, policy: Callable[[], Any]) -> tuple[Contestant, Contestant]:
    """The host time of a rule against that of GlobalNorm: gradients of one element, nothing to clip."""
    total_norm = inputs.total_norm()

    def contestant(name: str, rule: Any) -> Contestant:
        return Contestant(
            name,
            lambda: fastclip.clip_grads_(inputs.params, rule),
            lambda norm: oracle.check_norm("total_norm", norm, total_norm),
            inputs.bytes(reads=1),
        )

    plain = fastclip.policies.GlobalNorm(NOTHING_TO_CLIP * total_norm)
    return contestant("fastclip", policy()), contestant("GlobalNorm", plain)


RULES: dict[str, Callable[[], Any]] = {
    "ZScore": fastclip.policies.ZScore,
    "Percentile": functools.partial(fastclip.policies.Percentile, window=WINDOW),
    "PerTensorPercentile": fastclip.policies.PerTensorPercentile,
    "AdaGC": fastclip.policies.AdaGC,
}


def _adaptive_rows() -> list[Row]:
    """Against other packages, like the next: only where they are installed."""
    return [
        Row(f"{rule} GPT-2 fp32 / {peer}", (GPT2,), functools.partial(adaptive, policy=RULES[rule], peer=peer), 3.0)
        for rule, peer in (("ZScore", "zclip"), ("Percentile", "autoclip"))
        if peers.installed(peer)
    ]


def _unitwise_rows(workload: Workload, floor: float) -> list[Row]:
    return [
        Row(f"AGC {workload.name} / timm, {what}", (workload,), functools.partial(unitwise, factor=factor), floor)
        for what, factor in (("nothing to clip", AGC_NOTHING), ("clipping", AGC_ALL))
        if peers.installed("timm")
    ]


# ---- the table -----------------------------------------------------------------------------------------


def _clip_rows(
    workload: Workload, nothing: float | None = None, clipping: float | None = None, quick: bool = False
) -> list[Row]:
    make = functools.partial
    return [
        Row(
            f"clip {workload.name}, nothing to clip",
            (workload,),
            make(clip_norm, share=NOTHING_TO_CLIP),
            nothing,
            quick,
        ),
        Row(f"clip {workload.name}, clipping", (workload,), make(clip_norm, share=CLIPPING), clipping, quick),
    ]


def _step_rows(
    kind: str,
    rule: Rule,
    nothing: float | None = None,
    clipping: float | None = None,
    scaled: bool = False,
    l2: float = 0.0,
) -> list[Row]:
    return [
        Row(
            f"step GPT-2 fp32, {kind}, {what}",
            (GPT2,),
            functools.partial(step, rule=rule, share=share, scaled=scaled, l2=l2),
            floor,
        )
        for what, share, floor in (("nothing to clip", NOTHING_TO_CLIP, nothing), ("clipping", CLIPPING, clipping))
    ]


def _capability_rows(workload: Workload) -> list[Row]:
    best, *others = C.cpu_capabilities() if C is not None else [""]
    return [
        Row(
            f"norm {workload.name}, {other} / {best}", (workload,), functools.partial(capability, name=other, best=best)
        )
        for other in others
    ]


def all_rows() -> list[Row]:
    """In the order of the table; rows of one workload stand together, so that it is built once."""
    make = functools.partial
    return [
        *_clip_rows(GPT2, 3.2, 1.4),
        Row("stats GPT-2 fp32 / clip + isfinite", (GPT2,), make(statistics, extras=False), 15.0),
        Row("stats GPT-2 fp32 / foreach_norm", (GPT2,), make(statistics, extras=False, best_of_torch=True)),
        Row("stats with extras / clip, isfinite, ...", (GPT2,), make(statistics, extras=True)),
        Row("clip_value GPT-2 fp32, nothing to clamp", (GPT2,), make(clip_value, bound=NOTHING_TO_CLAMP)),
        Row("clip_value GPT-2 fp32, clamping", (GPT2,), make(clip_value, bound=CLAMPING)),
        *(Row(f"norm_type={p:g} GPT-2 fp32", (GPT2,), make(norm, p=p)) for p in (math.inf, 1.0, 3.0)),
        *_step_rows("AdamW fused", ADAMW_FUSED, 1.3, 1.15),
        *_step_rows("AdamW + l2", ADAMW_FUSED, l2=L2),
        *_step_rows("GradScaler", ADAMW_FUSED, 1.6, scaled=True),
        *_step_rows("AdamW foreach", ADAMW_FOREACH),
        *_step_rows("SGD fused", SGD_FUSED),
        Row("step GPT-2 fp32, AdamW fused / unclipped", (GPT2,), make(step, rule=ADAMW_FUSED, bare=True)),
        *_adaptive_rows(),
        Row("host time of the wrapper, 150 tensors", (SCALARS,), host_time, quick=True),
        *(Row(f"host time of {n} / GlobalNorm", (SCALARS,), make(host_time_of, policy=r)) for n, r in RULES.items()),
        *_clip_rows(GPT2_BF16, 6.5, 3.3),
        *_clip_rows(GPT2_FP16),
        *_clip_rows(SMALL, 22.0, 12.0, quick=True),
        *_unitwise_rows(SMALL, 20.0),
        *_clip_rows(RESNET50, quick=True),
        *_unitwise_rows(RESNET50, 8.0),
        *_clip_rows(LSTM, quick=True),
        Row("norm 100M fp32 / torch.sum", (FLAT,), norm_against_sum, 1.05, quick=True),
        *_capability_rows(FLAT),
        *_capability_rows(FLAT_BF16),
        Row("norm 100M x 0.1 fp32", (FLAT_CONSTANT,), make(norm, p=2.0)),
        Row("embedding fp32, 99% zero rows / dense", (ROWS, EMBEDDING), rows_against_dense, 0.95),
        Row("embedding bf16, 99% zero rows / dense", (ROWS_BF16, EMBEDDING_BF16), rows_against_dense),
    ]
