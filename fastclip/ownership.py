"""Whose steps a rule learns from: those of one optimizer, or of one of its param groups."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from fastclip.policies import Chain, Policy

if TYPE_CHECKING:
    from fastclip.guard import Guard

_GUARDS: weakref.WeakSet[Guard] = weakref.WeakSet()  # at work
# id of what has learned -> itself, as long as it lives, and the optimizer it learned from
_TAUGHT: dict[int, tuple[Callable[[], Any], Callable[[], Optimizer | None]]] = {}


def claim(guard: Guard) -> None:
    """Raises ``ValueError`` if something that learns serves another optimizer already, or two groups of this one; warns
    if it has served another one before."""
    own = _learners(guard)
    twice = [learner for i, learner in enumerate(own) if _is_in(own[:i], learner)]
    if not twice and any(True for _ in _shared(guard, own)):
        gc.collect()  # an optimizer with a scheduler, or one attached to, is a cycle: it may be gone already
    for learner in [*twice, *_shared(guard, own)]:
        raise ValueError(
            f"{type(learner).__name__}: it learns from the steps of one optimizer, or of one param group, and it was "
            "given to two: make another one, or pass a copy.deepcopy, which knows what this one has learned"
        )
    for learner in own:
        itself, taught_by = _TAUGHT.get(id(learner), (_nobody, _nobody))
        if itself() is learner and taught_by() is not guard.optimizer:
            warnings.warn(
                f"{type(learner).__name__}: it goes on with what it has learned from another optimizer; make a new one "
                "to begin anew, or pass a copy.deepcopy if this is meant",
                RuntimeWarning,
                stacklevel=2,
            )
    _GUARDS.add(guard)


def enlist(guard: Guard) -> None:
    """A copy's, which has copies of all that learns."""
    _GUARDS.add(guard)


def begin(guard: Guard) -> None:
    """From now on what it has knows of its steps."""
    for learner in _learners(guard):
        itself = weakref.ref(learner, functools.partial(_forget, id(learner)))
        _TAUGHT[id(learner)] = itself, weakref.ref(guard.optimizer)


def release(guard: Guard) -> None:
    """What it had may serve another optimizer now."""
    _GUARDS.discard(guard)


def _nobody() -> None:
    return None


def _forget(key: int, _: object) -> None:
    _TAUGHT.pop(key, None)


def _shared(guard: Guard, own: list[Any]) -> Iterator[Any]:
    for other in list(_GUARDS):
        if other.optimizer is not guard.optimizer:  # two around one optimizer: a cell of a notebook was run again
            yield from (learner for learner in _learners(other) if _is_in(own, learner))


def _is_in(learners: list[Any], learner: Any) -> bool:
    return any(learner is other for other in learners)


def _learners(guard: Guard) -> list[Any]:
    """As they are now: a rule may have been replaced."""
    rules = [guard.policy, *(group.get("policy") for group in guard.optimizer.param_groups)]
    return [*(each for rule in rules if isinstance(rule, Policy) for each in _parts(rule)), *guard.rungs]


def _parts(rule: Policy) -> Iterator[Policy]:
    if isinstance(rule, Chain):
        for each in rule.policies:
            yield from _parts(each)
    elif rule.learns:
        yield rule
