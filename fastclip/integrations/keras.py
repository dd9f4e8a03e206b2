"""Keras on torch: puts fastclip where a Keras optimizer clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import torch
from torch import Tensor

from fastclip.clipping import examine
from fastclip.ladder import Ladder
from fastclip.policies import Bound, GlobalNorm, Policy, policy_of
from fastclip.reading import any_of
from fastclip.record import Adjustable, Record
from fastclip.tensors import GroupNames, grads_among, read_only
from fastclip.types import IN_A_ROW, SKIPPED, STEPS

# Everything that a Keras optimizer does with the gradients once it has clipped them.
AFTER_CLIPPING = (
    "_apply_weight_decay",
    "_backend_update_step",
    "_update_model_variables_moving_average",
    "_overwrite_model_variables_with_average_value",
)


class KerasGuard(Adjustable):
    """What :func:`clip` returns: ``last_norm``, ``clip_rate``, ``skipped_steps`` and so on.

    Attributes:
        optimizer: the Keras optimizer whose gradients are clipped.
        policy: the rule.
        max_norm, nonfinite, skip_limit: as they were given; may be set at any time.
    """

    def __init__(self, optimizer: Any, policy: Policy, nonfinite: str, skip_limit: int | None) -> None:
        self.optimizer, self.policy, self.nonfinite = optimizer, policy, nonfinite
        self._record, self._ladder = Record(), Ladder(None, None)
        self.skip_limit = skip_limit
        self._places: list[int] = []  # of this step's gradients, among the variables that the optimizer was built with
        self._skipped = False
        self._unconstrained: list[tuple[Any, Any]] = []  # variables whose constraints a skip holds back, with those

    @property
    def max_norm(self) -> Any:
        """The bound of the joint norm, where the policy has one."""
        policy: Any = self.policy
        return policy.max_norm

    @max_norm.setter
    def max_norm(self, value: Any) -> None:
        policy: Any = self.policy
        if not hasattr(policy, "max_norm"):
            raise ValueError(f"{policy!r} has no max_norm")
        policy.max_norm = value

    def install(self) -> None:
        """Puts itself into the optimizer object."""
        optimizer = self.optimizer
        apply, update = optimizer.apply, optimizer._backend_apply_gradients

        def guarded_apply(grads: Any, trainable_variables: Any = None) -> None:
            try:
                apply(grads, trainable_variables)
                if self._skipped and not optimizer.gradient_accumulation_steps:  # else it counts batches
                    optimizer._iterations.assign_sub(1)
            finally:
                self._skipped = False  # fit() ends with a method that is held back below
                for variable, constraint in self._unconstrained:
                    variable.constraint = constraint
                self._unconstrained = []

        def guarded_update(grads: Any, trainable_variables: Any) -> None:
            self._places = [optimizer._get_variable_index(variable) for variable in trainable_variables]
            check_gradients(grads, trainable_variables, self._places)
            update(grads, trainable_variables)
            if self._skipped:  # Keras applies the constraints next
                self._unconstrained = [(v, v.constraint) for v in trainable_variables if v.constraint is not None]
                for variable, _ in self._unconstrained:
                    variable.constraint = None

        def guarded_look(grads: list[Tensor]) -> list[Tensor]:
            try:
                return self.look(grads)
            except Exception:
                if optimizer.gradient_accumulation_steps:  # as at a skip: what was gathered is lost, its batches count
                    empty()
                    optimizer._iterations.assign_add(1)
                raise

        def empty() -> None:
            """Keras empties what it gathered by a product, and 0 x NaN = NaN."""
            for gathered in optimizer._accumulated_gradients:
                if gathered is not None:
                    gathered.assign(torch.zeros_like(gathered.value))

        optimizer.apply = guarded_apply
        optimizer._backend_apply_gradients = guarded_update
        optimizer._clip_gradients = guarded_look
        optimizer._backend_reset_gradient_accumulators = empty
        for name in AFTER_CLIPPING:
            setattr(optimizer, name, self._unless_skipped(getattr(optimizer, name)))

    def _unless_skipped(self, method: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            if not self._skipped:
                method(*args)

        return guarded

    @torch.no_grad()
    def look(self, grads: list[Tensor]) -> list[Tensor]:
        """Reads and clips the gradients of a step, in place where their memory is their own, and returns them."""
        listed = self.optimizer._trainable_variables  # with and without a gradient: rules learn by the place
        weights = [variable.value for variable in listed]
        slots: list[Any] = [None] * len(listed)
        for place, grad in zip(self._places, with_own_memory(grads, weights), strict=True):
            slots[place] = grad
        names = GroupNames([(0, {"params": weights, "param_names": [variable.path for variable in listed]})])
        share = grads_among(slots)._replace(names=names, parameters=weights)
        (finding,), _ = examine([(share, self.policy)], self.nonfinite)
        verdict = finding.decide()
        found_inf = finding.noted.found_inf
        skip = any_of([verdict.decision.skip, found_inf if self.nonfinite == "skip" else False])
        self._skipped = bool(skip)
        self._record.note([finding.noted], verdict.factor, self._skipped, found_inf)
        counts = self._record.counts.tolist()
        self._ladder.climb(self.optimizer, counts[STEPS], counts[SKIPPED], counts[IN_A_ROW], self._reason)
        self._record.check_streak(counts[IN_A_ROW])
        verdict.apply(skip=self._skipped)
        return [slots[place] for place in self._places]

    def _reason(self) -> tuple[str, tuple[str, ...]]:
        """Of a skip, for the event that tells of it."""
        bad = tuple(self._record.bad()) if self.nonfinite == "skip" else ()
        return ("NaN or Inf in the gradients", bad) if bad else (f"decided by {self.policy!r}", ())


def check_gradients(grads: Any, variables: Any, places: list[int]) -> None:
    """Raises for what is no tensor, and for a variable with two gradients, which would be clipped as two variables'."""
    for grad, variable in zip(grads, variables, strict=True):
        if not isinstance(grad, Tensor):
            raise TypeError(f"the gradient of {variable.path} is a {type(grad).__name__}, not a torch.Tensor")
    counts = Counter(places)
    for variable, place in zip(variables, places, strict=True):
        if counts[place] > 1:
            raise ValueError(f"{variable.path} is listed twice: add its gradients. Nothing was written")


def with_own_memory(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The gradients, with copies of those that share memory, with another one, a weight or within themselves: what is
    written to one of them would be written to the other, too."""
    counts = Counter(t.untyped_storage().data_ptr() for t in [*grads, *weights] if t.layout == torch.strided)

    def shares(grad: Tensor) -> bool:
        return grad.layout != torch.strided or counts[grad.untyped_storage().data_ptr()] > 1 or bool(read_only(grad))

    return [grad.clone() if shares(grad) else grad for grad in grads]


def clip(
    optimizer: Any,
    max_norm: Bound | None = None,
    *,
    policy: Policy | str | None = None,
    nonfinite: str = "skip",
    skip_limit: int | None = 100,
) -> KerasGuard:
    """Has a Keras optimizer clip by fastclip, and skip steps with NaN or Inf, where it would use ``global_clipnorm``.

    Args:
        optimizer: a ``keras.optimizers.Optimizer`` without ``clipnorm``, ``global_clipnorm`` and ``clipvalue``; of a
            ``LossScaleOptimizer`` the optimizer inside is meant, which gets unscaled gradients.
        max_norm, policy, nonfinite, skip_limit: as in :class:`fastclip.ClippedOptimizer`. A rule over units gets
            Keras's kernels, which have their outputs last.

    Writes: methods of this optimizer object. Keras doesn't save them: call it again after ``load_model``.

    Returns:
        A :class:`KerasGuard`. Whether a step is skipped is asked of the device, and waited for.

    Raises:
        RuntimeError: Keras runs on another backend than torch.
        TypeError: not a Keras optimizer, or a ``MultiOptimizer``: its own optimizers can be clipped.
        ValueError: the optimizer clips by itself, or has been given to this function before.

    Example:
        >>> import keras
        >>> from fastclip.integrations.keras import clip
        >>> optimizer = keras.optimizers.Adam(1e-3)
        >>> guard = clip(optimizer, max_norm=1.0)
        >>> guard.skipped_steps
        tensor(0)
    """
    if keras.backend.backend() != "torch":
        raise RuntimeError(f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=torch before it is imported")
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"optimizer: expected a keras.optimizers.Optimizer, got {type(optimizer).__name__}")
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise TypeError(
            "a MultiOptimizer hands its gradients on: clip each of its optimizers, which are in .optimizers once it "
            "is built; each goes by the norm of its own variables"
        )
    for name in ("clipnorm", "global_clipnorm", "clipvalue"):
        if getattr(optimizer, name) is not None:
            raise ValueError(f"the optimizer has {name}={getattr(optimizer, name)}: leave it out, fastclip clips")
    if "_clip_gradients" in vars(optimizer):
        raise ValueError("fastclip is in this optimizer already")
    if policy is not None and max_norm is not None:
        raise ValueError(f"policy={policy!r} brings its own bound; leave max_norm out")
    chosen = GlobalNorm(1.0 if max_norm is None else max_norm) if policy is None else policy_of(policy)
    guard = KerasGuard(optimizer, chosen, nonfinite, skip_limit)
    guard.install()
    return guard
