"""What stands between the gradients and the step: look, record, then clip, ride or skip."""

from __future__ import annotations

import copy
import functools
import operator
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but without importing Dynamo now (2 s)
from torch.optim import Optimizer

from fastclip import amp, checkpoint, ownership, riding
from fastclip.checkpoint import OWN_RULES, has_own_rule
from fastclip.checks import number, real
from fastclip.clipping import Finding, all_finite, examine
from fastclip.ladder import Ladder, LossWatch, Rollback, SpikeBackoff, reduced_lr
from fastclip.policies import GlobalNorm, Policy, policy_of
from fastclip.reading import any_of, check_not_captured, flag
from fastclip.record import Adjustable, Outcome, Record
from fastclip.regularisation import Penalty
from fastclip.sharded import check_not_in_zero
from fastclip.step_arguments import step_arguments_of
from fastclip.tensors import Grads, Names, check_groups_disjoint, check_named, grads_among, grads_of_groups, named
from fastclip.ties import group_named, group_of_caller, process_group, ties_of
from fastclip.types import (
    IN_A_ROW,
    SKIPPED,
    STEPS,
    TOTAL_NORM,
    NonFiniteGradientError,
    known_to_host,
    on_device,
)


class Clearance(NamedTuple):
    """What a look at the gradients leads to: whether to step at all, and what rides.

    Attributes:
        may_be_one: whether the device may find a ``grad_scale`` of 1, which shall then cost nothing.
    """

    go: bool
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    may_be_one: bool = False


class Guard(Adjustable):
    """Guards the steps of one optimizer: inside a :class:`ClippedOptimizer`, or by itself after :func:`attach`.

    Attributes:
        optimizer: the guarded optimizer.
        policy: the rule for all its gradients, but those of groups with a rule of their own.
        max_norm, nonfinite, skip_limit: as they were given; may be set at any time.
        group: process group whose other ranks step other parameters, which count in the norms; or None.
        names: what parameters are called; nothing in a copy.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        policy: Policy,
        nonfinite: str,
        skip_limit: int | None,
        penalty: Penalty,
        backoff: SpikeBackoff | None = None,
        rollback: Rollback | None = None,
        watch: LossWatch | None = None,
        group: Any = None,
        names: Names = None,
    ) -> None:
        for name, given, kind in (
            ("backoff", backoff, SpikeBackoff),
            ("rollback", rollback, Rollback),
            ("loss_watch", watch, LossWatch),
        ):
            if given is not None and not isinstance(given, kind):
                raise TypeError(f"{name}: expected a fastclip.{kind.__name__}, got {given!r}")
        self.optimizer = optimizer
        self.policy = policy
        self.group = process_group(group) or group_of_caller()
        self.names = named(names)
        self.nonfinite = nonfinite
        self._takes = step_arguments_of(optimizer)
        self._record = Record()
        self.skip_limit = skip_limit
        self._report: Tensor | None = None
        self._observed: bool | Tensor = False
        self._observes = False  # whether anyone ever did
        self._loss: Tensor | None = None  # for listeners
        self._penalty, self._watch = penalty, watch or LossWatch()
        self._ladder = Ladder(backoff, rollback)
        self._lr_factor = 1.0  # of this step
        self._aboard: riding.aboard | None = None  # during it
        check_groups_disjoint(optimizer.param_groups)
        _check_bounds(optimizer.param_groups)
        check_named(self.names, [p for group in optimizer.param_groups for p in group["params"]])
        self._own_rules: list[Any] = []  # of param groups, as they were looked at last
        ownership.claim(self)
        if rollback is not None and not rollback.snapshot.fits(optimizer):
            rollback.forget()

    @property
    def rungs(self) -> list[SpikeBackoff | Rollback | LossWatch]:
        """What learns from its steps, but for the rules."""
        rungs = (self._ladder.backoff, self._ladder.rollback, self._watch if self._watch.k is not None else None)
        return [rung for rung in rungs if rung is not None]

    def __getstate__(self) -> dict[str, Any]:
        group = None if self.group is None else self.group.group_name
        return {**self.__dict__, "group": group, "names": {}}  # a copy has other parameters

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.group = group_named(state["group"])  # a group can't be copied, but called by its name
        ownership.enlist(self)

    @property
    def can_unscale(self) -> bool:
        """Whether a GradScaler may leave unscaling and skipping to the step: always, except around an optimizer that
        wants the scaler itself as an argument (the older contract of apex and TransformerEngine)."""
        return self._takes.names is None or "grad_scaler" not in self._takes.names

    def report_to(self, found_inf: Tensor | None) -> None:
        """Has the next look written into ``found_inf``, 0-d float32: a GradScaler asks, so NaN and Inf skip."""
        self._report = found_inf

    def attach(self) -> None:
        """Puts itself into ``step``, ``state_dict`` and ``load_state_dict`` of the optimizer object."""
        optimizer = self.optimizer
        attributes, inner_step = vars(optimizer), optimizer.step

        @functools.wraps(getattr(inner_step, "__func__", inner_step))
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if optimizer is not self.optimizer:  # a copy that took this function along
                return type(optimizer).step(optimizer, *args, **kwargs)
            if not self.is_attached:  # removed, but someone else holds on to this function
                return inner_step(*args, **kwargs)
            with amp.scalers_marks(optimizer):
                return self.step(optimizer, inner_step, args, kwargs)

        methods: dict[str, Callable[..., Any]] = {"step": step, **checkpoint.methods(self)}
        self._set: dict[str, Any] = {name: MethodType(method, optimizer) for name, method in methods.items()}
        self._set[amp.GUARD] = self
        if self.can_unscale:
            self._set["_step_supports_amp_scaling"] = True
        self._replaced = {name: attributes[name] for name in self._set if name in attributes}
        attributes.update(self._set)

    @property
    def is_attached(self) -> bool:
        return vars(self.optimizer).get(amp.GUARD) is self

    def attach_like_to(self, optimizer: Optimizer) -> None:
        """Attaches the same rule, knowing what it has learned by now, and the same penalties to another optimizer."""
        Guard(optimizer, copy.deepcopy(self.policy), self.nonfinite, None, self._penalty).attach()

    def remove(self) -> None:
        """Gives an attached optimizer its own methods back, but for those that someone else has replaced since."""
        if not self.is_attached:
            raise RuntimeError("this guard is not attached to its optimizer")
        attributes = vars(self.optimizer)
        for name in [name for name, value in self._set.items() if attributes.get(name) is value]:
            del attributes[name]
            if name in self._replaced:
                attributes[name] = self._replaced[name]
        ownership.release(self)

    def step(
        self, owner: Optimizer, inner_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One guarded call of ``inner_step``, the guarded optimizer's own, with what its caller passed.

        ``owner`` is the object that the user calls, and on which a GradScaler puts ``grad_scale`` and ``found_inf``.
        """
        if len(args) > 1:
            raise TypeError(f"step takes a closure and named arguments, got {len(args)} unnamed ones; nothing was done")
        closure = args[0] if args else kwargs.get("closure")
        kwargs = {name: value for name, value in kwargs.items() if name != "closure"}
        self._takes.check(closure, kwargs)
        if closure is None:
            clearance = self.look(owner)
            return self._call(inner_step, clearance, kwargs) if clearance.go else None
        with torch.enable_grad():
            loss = closure()
        clearance = self.look(owner)
        if not clearance.go:
            return loss
        if not self._takes.closure:
            self._call(inner_step, clearance, kwargs)
            return loss
        first: list[Any] = [loss]  # the evaluation that has just been judged; the optimizer will ask for it
        versions = self._versions()

        def guarded_closure() -> Any:
            if first:
                loss = first.pop()
                if versions == self._versions():
                    return loss  # else the optimizer has done something before its first evaluation (SAM)
            with torch.enable_grad():
                loss = closure()
            with nullcontext() if self._aboard is None else self._aboard.getting_off():
                self.look(owner, again=True)
            return loss

        return self._call(inner_step, clearance, {**kwargs, "closure": guarded_closure})

    def _versions(self) -> list[Any]:
        """Changes when the optimizer moves a parameter, or writes or drops a gradient."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        grads = [parameter.grad for parameter in parameters]
        return [p._version for p in parameters] + [
            None if g is None else (id(g), None if g.is_inference() else g._version) for g in grads
        ]

    def _call(self, inner_step: Callable[..., Any], clearance: Clearance, kwargs: dict[str, Any]) -> Any:
        if self._lr_factor != 1.0:
            with reduced_lr(self.optimizer.param_groups, self._lr_factor):
                return self._call_at_its_lr(inner_step, clearance, kwargs)
        return self._call_at_its_lr(inner_step, clearance, kwargs)

    def _call_at_its_lr(self, inner_step: Callable[..., Any], clearance: Clearance, kwargs: dict[str, Any]) -> Any:
        attributes, rider = vars(self.optimizer), clearance.grad_scale is not None or clearance.found_inf is not None
        if not rider and not any(name in attributes for name in riding.RIDERS):
            return inner_step(**kwargs)
        call = self._call_untraced if torch.compiler.is_compiling() else self._call_with_riders
        return call(inner_step, clearance, kwargs)

    @_disable_dynamo  # torch disables it for its fused steps too, and a graph can't break inside a `with`
    def _call_untraced(self, inner_step: Callable[..., Any], clearance: Clearance, kwargs: dict[str, Any]) -> Any:
        return self._call_with_riders(inner_step, clearance, kwargs)

    def _call_with_riders(self, inner_step: Callable[..., Any], clearance: Clearance, kwargs: dict[str, Any]) -> Any:
        self._aboard = riding.aboard(self.optimizer, grad_scale=clearance.grad_scale, found_inf=clearance.found_inf)
        try:
            with (
                self._aboard,
                riding.launched_twice() if clearance.may_be_one else nullcontext(),  # type: ignore[no-untyped-call]
            ):
                return inner_step(**kwargs)
        finally:
            self._aboard = None

    def look(self, owner: Optimizer, again: bool = False) -> Clearance:
        """What follows from the gradients as they are; see :meth:`_look`."""
        return self._look_untraced(owner, again) if torch.compiler.is_compiling() else self._look(owner, again)

    @_disable_dynamo
    def _look_untraced(self, owner: Optimizer, again: bool) -> Clearance:
        return self._look(owner, again)

    @torch.no_grad()
    def _look(self, owner: Optimizer, again: bool) -> Clearance:
        """Reads the gradients, records the step, and clips in place what can't ride.

        ``again`` means in the middle of a step: what would skip it has to raise.
        """
        check_not_captured(
            "a step of a guarded optimizer counts, holds back and learns on the host",
            "step outside of the graph, or capture fastclip.clip_grad_norm_ and the bare optimizer's step",
        )
        report, self._report = self._report, None
        observed, self._observed = self._observed, False
        loss, self._loss = self._loss, None
        groups = self.optimizer.param_groups
        shares, twice = self._shares(groups)
        ties = ties_of([grads for grads, _ in shares], self.group)
        if ties is None:
            shares = [(grads, policy) for grads, policy in shares if grads.tensors]
            if not shares:
                return Clearance(True)
        if not self._record.seen:  # a walk up the stack, at the first step only
            check_not_in_zero()
        grad_scale, given_inf = self._given(owner, report is not None)
        nonfinite = self.nonfinite
        if report is not None or given_inf is not None:
            nonfinite = "skip"  # a GradScaler searches for its scale by trial
        if too_late := again and nonfinite == "skip":
            nonfinite = "raise"
        penalties = None
        if self._penalty.is_wanted(groups):
            penalties = self._penalty.strengths(groups, [grads for grads, _ in shares])
            if penalties is None and ties is not None:  # none here, but all ranks have to speak of the same
                penalties = [[(0.0, 0.0)] * len(grads.tensors) for grads, _ in shares]
        reasons = [False if given_inf is None else given_inf]
        if not again:  # in the middle of a step it is too late for anything but an error
            reasons.append(observed)
        try:
            findings, held = examine(shares, nonfinite, grad_scale, penalties, ties, any_of(reasons))
        except NonFiniteGradientError as error:
            if not too_late:
                raise
            raise NonFiniteGradientError(
                f"{str(error).rpartition('; ')[0]}; {type(self.optimizer).__name__} evaluates its closure several "
                "times in a step and has moved the parameters already, so it can't be skipped: go back to a checkpoint",
                error.tensor,
                error.index,
                error.value,
            ) from None
        if not findings:  # nor has any other rank a gradient
            return Clearance(True)
        if self._is_rehearsal(groups, findings):
            return Clearance(True)
        if not again and self._ladder.wants_snapshot(self.optimizer) and self._parameters_are_finite():
            self._ladder.take_snapshot(self.optimizer)
        verdicts = [finding.decide() for finding in findings]
        if not self._record.seen:
            self._check_first_step(findings)
        found_inf = any_of(finding.noted.found_inf for finding in findings)
        if report is not None:
            report.copy_(torch.as_tensor(found_inf))
        reasons = [held]
        if not again:
            reasons += [verdict.decision.skip for verdict in verdicts]
        skip = any_of([*reasons, found_inf] if nonfinite == "skip" else reasons)
        # of one rule without an operation on the device
        factor = verdicts[0].factor if len(verdicts) == 1 else 1.0 + any_of(verdict.clipped for verdict in verdicts)

        rides = not again and riding.rides(self.optimizer)  # what rides belongs to the gradients of the first look
        bad = found_inf
        if isinstance(skip, Tensor):
            if not rides or riding.first_step_is_lost(self.optimizer):
                known = bool(skip)
                bad = known if skip is found_inf else bool(found_inf)  # which has been waited for, too
                skip = known
            else:  # exactly 1 for yes, as torch's fused steps want it and the read has left it
                skip = (skip if skip is found_inf else flag(skip)).to(torch.float32)
        self._record.note([finding.noted for finding in findings], factor, skip, bad)
        skips = found_inf if nonfinite == "skip" else False
        went_back, in_a_row = (False, 0) if again else self._climb(observed, held, skips)
        if self._record.listeners:
            held_back = {"nonfinite": skips}
            if given_inf is not None:
                held_back["scaler"] = given_inf
            if not again:
                held_back["loss"] = observed
                held_back["policy"] = any_of(verdict.decision.skip for verdict in verdicts)
            if ties is not None:
                held_back["rank"] = held
            lrs = [group["lr"] * self._lr_factor for group in groups if "lr" in group]
            clipped = factor != 1.0
            rungs = [] if again else self._ladder.latest
            outcome = Outcome(
                self._record.seen, verdicts, held_back, clipped, skip, went_back, rungs, loss, lrs, grad_scale
            )
            for listener in list(self._record.listeners):  # one may leave while it is told
                listener(outcome)
        self._record.check_streak(in_a_row)
        if went_back or skip is True:
            return Clearance(False)
        riding_inf = skip if isinstance(skip, Tensor) else None
        only = verdicts[0]
        # Riding costs a write of every gradient, whatever the coefficient. So where only the device knows that there is
        # nothing to clip, and no scale has to ride anyway: the step launched twice if that pays, else a pass of its own
        # that returns at once.
        coef, work = only.decision.clip_coef, only.reading.plan
        rides = rides and len(verdicts) == 1 and only.is_one_number and not twice and not work.wide
        may_be_one = isinstance(coef, Tensor) and grad_scale is None and work.returns_early
        if rides and (not may_be_one or work.size_bytes >= riding.TWICE_FROM_BYTES):
            by = riding.divisor(coef, grad_scale)
            if isinstance(by, Tensor) or by == 1.0:
                return Clearance(True, by if isinstance(by, Tensor) else None, riding_inf, may_be_one)
            if by is not None:
                return Clearance(True, on_device(by, torch.float32, only.reading.totals.device), riding_inf)
        for verdict in verdicts:
            verdict.apply(grad_scale, skip)
        return Clearance(True, None, riding_inf)

    def _check_first_step(self, findings: list[Finding]) -> None:
        """What shows only now."""
        for finding in findings:
            finding.policy.check_learned()
        if self._watch.k is not None and not self._observes:
            warnings.warn(
                "loss_watch: no loss was observed before the first step, so there is nothing to watch: call "
                "observe(loss) before each step",
                RuntimeWarning,
                stacklevel=2,
            )
        ownership.begin(self)

    def _climb(self, observed: bool | Tensor, held: bool | Tensor, nonfinite: bool | Tensor) -> tuple[bool, int]:
        """Climbs the ladder with what the host knows by now: whether it went back, and the skips in a row.

        ``observed``, ``held`` and ``nonfinite``, of the gradients, are what skips this step.
        """
        news = self._record.news()
        self._lr_factor = self._ladder.lr_factor
        self._ladder.latest = []
        if news is None:
            return False, 0

        def reason() -> tuple[str, tuple[str, ...]]:
            if nonfinite is True:
                return "NaN or Inf in the gradients", tuple(self._record.bad())
            if observed is True:
                return "the loss that was observed", ()
            if held is True:
                return "found by a GradScaler, or by another rank", ()
            if any(isinstance(each, Tensor) for each in (nonfinite, observed, held)):  # to ask would be to wait
                return "found on the device", ()
            return f"decided by {self.policy!r}", ()

        before = self._ladder.lr_factor
        went_back = self._ladder.climb(self.optimizer, news[STEPS], news[SKIPPED], news[IN_A_ROW], reason)
        self._lr_factor = min(before, self._ladder.lr_factor)  # what is given back counts from the next step on
        return went_back, news[IN_A_ROW]

    def _parameters_are_finite(self) -> bool:
        """As far as the host knows without waiting."""
        # themselves: what mark_sharded said, it said of them
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return all_finite(grads_among(parameters), self.group)

    def state_dict(self) -> dict[str, Any]:
        """What the ladder and the watch over the loss know, where there is something to know."""
        backoff = self._ladder.backoff
        known = {
            "backoff": backoff.state_dict() if backoff is not None else {},
            "loss": self._watch.state_dict() if self._watch.k is not None else {},
        }
        return {whose: state for whose, state in known.items() if state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._ladder.rollback is not None:
            self._ladder.rollback.forget()  # what was before the load is no place to go back to
        if self._ladder.backoff is not None and "backoff" in state_dict:
            self._ladder.backoff.load_state_dict(state_dict["backoff"])
        if self._watch.k is not None and "loss" in state_dict:
            self._watch.load_state_dict(state_dict["loss"])

    def observe(self, loss: Tensor | float) -> None:
        """Looks at the loss of the coming step, 0-d, unscaled: a bad one skips it. Nothing is waited for."""
        self._observes = True
        if not isinstance(loss, Tensor):
            loss = torch.tensor(real("loss", loss), dtype=torch.float64, device="cpu")
        if loss.numel() != 1:
            raise TypeError(f"loss: expected one element, got shape {tuple(loss.shape)}")
        self._observed = any_of([self._observed, self._watch.is_bad(loss)])
        if self._record.listeners:
            self._loss = loss.detach().reshape(()).clone()

    def _shares(self, groups: list[dict[str, Any]]) -> tuple[list[tuple[Grads, Policy]], bool]:
        """Each rule with its gradients; and whether a gradient is at two parameters."""
        self._adopt_bound(groups)
        entries = list(enumerate(groups))
        alone = [entry for entry in entries if has_own_rule(entry[1])]
        if alone:
            self._know([group.get("policy") for _, group in alone])
        joint = [entry for entry in entries if entry not in alone] if alone else entries
        found = [(*grads_of_groups(joint, self.names), self.policy)] if joint or not alone else []
        found += [(*grads_of_groups([entry], self.names), self._own_rule(*entry)) for entry in alone]
        twice = any(twice for _, twice, _ in found)
        if twice or alone:
            check_groups_disjoint(groups)
        return [(grads, policy) for grads, _, policy in found], twice

    def _know(self, rules: list[Any]) -> None:
        """Looks at the rules of groups again where they are not the same as before."""
        if len(rules) != len(self._own_rules) or not all(map(operator.is_, rules, self._own_rules)):
            ownership.claim(self)
            self._own_rules = rules

    def _adopt_bound(self, groups: list[dict[str, Any]]) -> None:
        """A ``max_norm`` in the param groups is the joint bound: hyperparameter tools write it into every group."""
        bounds = [group["max_norm"] for group in groups if "max_norm" in group and not has_own_rule(group)]
        if not bounds:
            return
        if "max_norm" not in next(group for group in groups if not has_own_rule(group)):
            _check_bounds(groups)  # only a group that joined later may lack it
        if any(bound is not bounds[0] and bound != bounds[0] for bound in bounds):
            raise ValueError(
                f"param_groups hold different values of max_norm, {bounds}: it is the bound of the joint norm; "
                "a group's own bound is group_max_norm. Nothing was written"
            )
        if bounds[0] is not getattr(self.policy, "max_norm", None):
            self.max_norm = bounds[0]

    def _own_rule(self, index: int, group: dict[str, Any]) -> Policy:
        if all(group.get(key) is not None for key in OWN_RULES):
            raise ValueError(f"param_groups[{index}] has both a policy and a group_max_norm; leave one")
        norm_type = getattr(self.policy, "norm_type", 2.0)
        if not isinstance(group.get("group_max_norm"), Tensor) and callable(group.get("group_max_norm")):
            raise TypeError(f"param_groups[{index}]['group_max_norm'] is a callable; use policy=GlobalNorm(callable)")
        if group.get("policy") is not None:
            group["policy"] = policy_of(group["policy"], f"param_groups[{index}]['policy']")
        policy: Policy | None = group.get("policy")
        if policy is None:
            bound = group["group_max_norm"]
            if not isinstance(bound, Tensor) or known_to_host(bound):
                bound = number(f"param_groups[{index}]['group_max_norm']", bound)
            policy = GlobalNorm(bound, norm_type=norm_type)
        if getattr(policy, "norm_type", norm_type) != norm_type:
            raise ValueError(
                f"param_groups[{index}]['policy'] is in the {policy.norm_type:g}-norm, the optimizer's in the "
                f"{norm_type:g}-norm: one total norm needs one norm_type"
            )
        return policy

    def _given(self, owner: Optimizer, asks: bool) -> tuple[float | Tensor | None, bool | Tensor | None]:
        """The scale of the gradients, and whether an Inf has been found, not 0 for yes: what a GradScaler or the user
        says, if any. A scaler that ``asks`` has found nothing."""
        holders = [vars(owner)]
        if owner is not self.optimizer:
            if all(name in holders[0] for name in riding.RIDERS):
                amp.check_not_unscaled(self.optimizer)
            holders.append(vars(self.optimizer))
        grad_scale: float | Tensor | None = None
        found: list[bool | Tensor] = []
        for holder in holders:
            if holder.get("grad_scale") is not None:
                scale = _on_host_if_known("grad_scale", holder["grad_scale"])
                if isinstance(scale, float) and not 0.0 < scale < float("inf"):
                    raise ValueError(f"grad_scale must be positive and finite, got {scale}; nothing was written")
                grad_scale = scale if grad_scale is None else grad_scale * scale
            if holder.get("found_inf") is not None and not (asks and holder is vars(owner)):
                found_inf = _on_host_if_known("found_inf", holder["found_inf"])
                found.append(found_inf if isinstance(found_inf, Tensor) else found_inf != 0.0)
        return grad_scale, any_of(found) if found else None

    def _is_rehearsal(self, groups: list[dict[str, Any]], findings: list[Finding]) -> bool:
        """Whether this is the step with zero gradients and no learning rate by which torch.distributed.checkpoint
        brings an optimizer's state into being: nobody trains with it."""
        return (
            not self.optimizer.state
            and all(_is_zero(group.get("lr")) for group in groups)
            and all(float(finding.reading.totals[TOTAL_NORM]) == 0.0 for finding in findings)
        )

    @property
    def max_norm(self) -> Any:
        """The bound of the joint norm, where the policy has one; may be set at any time."""
        for group in self.optimizer.param_groups:
            if "max_norm" in group and not has_own_rule(group):
                return group["max_norm"]
        policy: Any = self.policy
        return policy.max_norm

    @max_norm.setter
    def max_norm(self, value: Any) -> None:
        if not hasattr(self.policy, "max_norm"):
            raise ValueError(f"{self.policy!r} has no max_norm")
        self.policy.max_norm = value
        for group in self.optimizer.param_groups:
            if "max_norm" in group:
                group["max_norm"] = value

    def __repr__(self) -> str:
        return f"{self.policy!r}, nonfinite={self.nonfinite!r}"


def _check_bounds(groups: list[dict[str, Any]]) -> None:
    """Raises ``ValueError`` where only some groups have a ``max_norm``: it may have been meant for them alone."""
    joint = [i for i, group in enumerate(groups) if not has_own_rule(group)]
    without = [i for i in joint if "max_norm" not in groups[i]]
    if without and len(without) < len(joint):
        raise ValueError(
            f"param_groups{without} have no max_norm, others have one: it is the bound of the joint norm, for all "
            "groups or none; a group's own bound is group_max_norm"
        )


def _on_host_if_known(name: str, value: Any) -> float | Tensor:
    if isinstance(value, Tensor) and not known_to_host(value):
        return value.detach().reshape(())
    return real(name, value)


def _is_zero(lr: Any) -> bool:
    return (not isinstance(lr, Tensor) or known_to_host(lr)) and lr is not None and bool(lr == 0)
