"""What a guard's rules know, as a part of its optimizer's state dict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from fastclip.policies import Policy, policy_of
from fastclip.tensors import GroupNames

if TYPE_CHECKING:
    from fastclip.guard import Guard

OWN_RULES = ("policy", "group_max_norm")  # keys of a param group that take it out of the joint norm, unless None
BOUNDS = ("max_norm", *OWN_RULES)  # keys of a param group that are fastclip's
STATE = "fastclip"  # the key under which it stands


def has_own_rule(group: dict[str, Any]) -> bool:
    """Whether a param group is clipped by a norm of its own."""
    return group.get("policy") is not None or group.get("group_max_norm") is not None


def methods(guard: Guard) -> dict[str, Callable[..., Any]]:
    """``state_dict`` and ``load_state_dict`` for the very optimizer that a guard is attached to."""
    save, load = guard.optimizer.state_dict, guard.optimizer.load_state_dict

    @functools.wraps(getattr(save, "__func__", save))
    def state_dict(optimizer: Optimizer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if optimizer is not guard.optimizer:  # a copy that took this function along
            return type(optimizer).state_dict(optimizer, *args, **kwargs)
        state: dict[str, Any] = save(*args, **kwargs)
        return saved_with(guard, state) if guard.is_attached else state

    @functools.wraps(getattr(load, "__func__", load))
    def load_state_dict(optimizer: Optimizer, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if optimizer is not guard.optimizer:
            return type(optimizer).load_state_dict(optimizer, state_dict, *args, **kwargs)
        if not guard.is_attached:  # removed, but someone else holds on to this function
            return load(state_dict, *args, **kwargs)
        return load_with(guard, lambda state: load(state, *args, **kwargs), state_dict)

    return {"state_dict": state_dict, "load_state_dict": load_state_dict}


def saved_with(guard: Guard, state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict and what the guard knows: a group's policy stays here, what it knows travels."""
    known = known_of(guard)
    if STATE in state_dict:  # of fastclip in fastclip
        known["inner"] = state_dict[STATE]
    state_dict = _without_policies(state_dict)
    return {**state_dict, STATE: known} if known else state_dict


def _without_policies(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Their keys stay: a distributed checkpoint has to hold each that the groups here have. Optimizers around others
    keep the state dicts of these in theirs."""
    kept = dict(state_dict)
    for key, value in state_dict.items():
        if key == "param_groups":
            kept[key] = [{**group, "policy": None} if "policy" in group else group for group in value]
        elif key == "optimizers":
            kept[key] = [_without_policies(each) for each in value]
        elif isinstance(value, dict) and "param_groups" in value:
            kept[key] = _without_policies(value)
    return kept


def load_with(guard: Guard, load: Callable[[dict[str, Any]], Any], state_dict: dict[str, Any]) -> Any:
    """Has ``load`` take what is the optimizer's, and the guard the rest.

    Raises:
        ValueError: it was saved by other policies, or for other tensors. Nothing was changed.
    """
    known = state_dict.get(STATE, {})
    check(guard, known)
    of_groups = [{key: group[key] for key in BOUNDS if key in group} for group in guard.optimizer.param_groups]
    rest = {key: value for key, value in state_dict.items() if key != STATE}
    result = load({**rest, STATE: known["inner"]} if "inner" in known else rest)
    for group, here in zip(guard.optimizer.param_groups, of_groups, strict=True):
        _put_back(group, here)
    take(guard, known)
    return result


def _put_back(group: dict[str, Any], here: dict[str, Any]) -> None:
    """What was loaded goes before a bound here; a policy is never loaded, and goes before a bound that was."""
    group.pop("policy", None)
    if here.get("policy") is not None:
        group.pop("group_max_norm", None)
    for key, value in here.items():
        if group.get(key) is None:
            group[key] = value


def known_of(guard: Guard) -> dict[str, Any]:
    """What a resumed run needs; empty where nothing has been learned."""
    policies = _policies(guard)
    known = {"guard": guard.state_dict(), **{whose: policy.state_dict() for whose, policy in policies.items()}}
    known = {whose: state for whose, state in known.items() if state}
    if any(policy.per_tensor for policy in policies.values()):
        known["tensors"] = _tensors(guard)
    return known


def check(guard: Guard, known: dict[str, Any]) -> None:
    """Raises ``ValueError`` if ``known`` was saved by other policies, or for other tensors."""
    instead = f"state_dict.pop({STATE!r}) leaves out what was learned"
    for whose, policy in _policies(guard).items():
        if whose in known:
            try:
                policy.check_state_dict(known[whose])
            except ValueError as error:
                raise ValueError(f"{error}; {instead}") from None
    lost = [whose for whose in known if whose.startswith("group ") and whose not in _policies(guard)]
    if lost:
        raise ValueError(
            f"it holds what the policy of param {lost[0]} has learned ({known[lost[0]].get('policy', 'Chain')}), and "
            f"there is none here. Nothing was changed; {instead}"
        )
    saved, here = known.get("tensors"), _tensors(guard)
    if saved is not None and saved != here:
        differing = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
        groups = list(enumerate(guard.optimizer.param_groups))
        called = dict(zip(here, GroupNames(groups, guard.names), strict=True))
        raise ValueError(
            "the policy's state was saved for other tensors: "
            + ", ".join(
                f"{called.get(name, name)} has {saved.get(name)} there, {here.get(name)} here" for name in differing[:5]
            )
            + (", ..." if len(differing) > 5 else "")
            + f". Nothing was changed; {instead}"
        )


def take(guard: Guard, known: dict[str, Any]) -> None:
    """Takes back what ``known_of`` gave; what it doesn't tell stays. Raises as ``check``, before anything changes."""
    check(guard, known)
    for whose, policy in _policies(guard).items():
        if whose in known:
            policy.load_state_dict(known[whose])
    guard.load_state_dict(known.get("guard", {}))


def _policies(guard: Guard) -> dict[str, Policy]:
    """Each by the name under which its state is kept."""
    alone: dict[str, Policy] = {}
    for i, group in enumerate(guard.optimizer.param_groups):
        if group.get("policy") is not None:
            alone[f"group {i}"] = group["policy"] = policy_of(group["policy"], f"param_groups[{i}]['policy']")
    return {"all": guard.policy, **alone}


def _tensors(guard: Guard) -> dict[str, list[int]]:
    """Name -> shape of every parameter, in order."""
    names = GroupNames(list(enumerate(guard.optimizer.param_groups)))
    return {name: list(parameter.shape) for name, parameter in zip(names, names.parameters, strict=True)}
