"""What an optimizer's ``step`` takes, so that a wrong call fails before anything is done."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch.optim import Optimizer


class StepArguments(NamedTuple):
    """The parameters of a class's ``step``.

    Attributes:
        owner: name of the class.
        closure: whether one of them is ``closure``, or may be.
        closure_required: whether it can't do without.
        names: all of them; None for any.
        required: those without a default, but for ``closure``.
    """

    owner: str
    closure: bool
    closure_required: bool
    names: frozenset[str] | None
    required: tuple[str, ...]

    def check(self, closure: Any, kwargs: dict[str, Any]) -> None:
        """Raises ``TypeError`` for a call that would fail."""
        if closure is None and self.closure_required:
            raise TypeError(f"{self.owner}.step needs a closure that evaluates the model and returns the loss")
        if closure is not None and not callable(closure):
            raise TypeError(f"closure: expected a callable, got {type(closure).__name__}")
        if kwargs and self.names is not None and not self.names >= kwargs.keys():
            unknown = ", ".join(sorted(kwargs.keys() - self.names))
            raise TypeError(f"{self.owner}.step takes no argument {unknown}; nothing was done")
        if self.required and not kwargs.keys() >= set(self.required):
            missing = ", ".join(argument for argument in self.required if argument not in kwargs)
            raise TypeError(f"{self.owner}.step needs the argument {missing}: pass it by name; nothing was done")


def step_arguments_of(optimizer: Optimizer) -> StepArguments:
    """Those of its class: an object's own ``step`` may be a scheduler's or a framework's."""
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in named if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return StepArguments(
        owner=type(optimizer).__name__,
        closure=takes_any or any(p.name == "closure" for p in named),
        closure_required="closure" in required,
        names=None if takes_any else frozenset(p.name for p in named),
        required=tuple(name for name in required if name != "closure"),
    )
