"""What a guard's rules know, as a part of its optimizer's state dict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from fastclip.policies import Policy, policy_of
from fastclip.tensors import GroupNames

if TYPE_CHECKING:
    from fastclip.guard import Guard

OWN_RULES = ("policy", "group_max_norm")  # keys of a param group that take it out of the joint norm
BOUNDS = ("max_norm", *OWN_RULES)  # keys of a param group that are fastclip's
STATE = "fastclip"  # the key under which it stands

# torch runs these hooks around state_dict() and load_state_dict(); one made without Optimizer.__init__ has none.
HOOKS = (
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


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
    for whose, policy in _policies(guard).items():
        if whose in known:
            policy.check_state_dict(known[whose])
    saved, here = known.get("tensors"), _tensors(guard)
    if saved is not None and saved != here:
        differing = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
        raise ValueError(
            "the policy's state was saved for other tensors: "
            + ", ".join(f"{name} has {saved.get(name)} there, {here.get(name)} here" for name in differing[:5])
            + (", ..." if len(differing) > 5 else "")
            + ". Nothing was changed"
        )


def take(guard: Guard, known: dict[str, Any]) -> None:
    """Takes back what ``known_of`` gave; what it doesn't tell stays. Raises as ``check``, before anything changes."""
    check(guard, known)
    for whose, policy in _policies(guard).items():
        if whose in known:
            policy.load_state_dict(known[whose])
    guard.load_state_dict(known.get("guard", {}))


def saved_with(known: dict[str, Any], state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict and that: the policies of its param groups stay here, what they know travels."""
    for saved in state_dict.get("optimizers", [state_dict]):
        for group in saved.get("param_groups", ()):
            group.pop("policy", None)
    return {**state_dict, STATE: known} if known else state_dict


class Bounds:
    """The bounds and policies of the param groups, which outlive the loading of a state dict without any."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._of_groups = [{key: group[key] for key in BOUNDS if key in group} for group in optimizer.param_groups]

    def put_back(self, optimizer: Optimizer) -> None:
        for group, bounds in zip(optimizer.param_groups, self._of_groups, strict=True):
            for key, value in bounds.items():
                group.setdefault(key, value)


class Hooks:
    """Has the very optimizer that a guard is attached to save and load what the guard knows."""

    def __init__(self, guard: Guard) -> None:
        self._guard, optimizer = guard, guard.optimizer
        self._handles: list[Any] = []
        if all(hasattr(optimizer, name) for name in HOOKS):
            self._handles = [
                optimizer.register_state_dict_post_hook(self._save),
                optimizer.register_load_state_dict_pre_hook(self._before_load),
                optimizer.register_load_state_dict_post_hook(self._after_load),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return saved_with(known_of(self._guard), state_dict)

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._bounds, self._known = Bounds(optimizer), state_dict.get(STATE, {})
        check(self._guard, self._known)

    def _after_load(self, optimizer: Optimizer) -> None:
        self._bounds.put_back(optimizer)
        take(self._guard, self._known)


def _policies(guard: Guard) -> dict[str, Policy]:
    """Each by the name under which its state is kept."""
    alone: dict[str, Policy] = {}
    for i, group in enumerate(guard.optimizer.param_groups):
        if "policy" in group:
            alone[f"group {i}"] = group["policy"] = policy_of(group["policy"], f"param_groups[{i}]['policy']")
    return {"all": guard.policy, **alone}


def _tensors(guard: Guard) -> dict[str, list[int]]:
    """Name -> shape of every parameter, in order."""
    names = GroupNames(list(enumerate(guard.optimizer.param_groups)))
    return {name: list(parameter.shape) for name, parameter in zip(names, names.parameters, strict=True)}
