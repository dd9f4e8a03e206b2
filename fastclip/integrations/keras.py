"""Keras on torch: puts fastclip where a Keras optimizer clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch
from torch import Tensor

from fastclip.checks import nonfinite_rule, whole
from fastclip.clipping import examine
from fastclip.ladder import Ladder
from fastclip.policies import Bound, GlobalNorm, Policy, policy_of
from fastclip.reading import any_of
from fastclip.record import Record, Reports
from fastclip.tensors import GroupNames, grads_among
from fastclip.types import IN_A_ROW, SKIPPED, STEPS

# Everything that a Keras optimizer does with the gradients once it has clipped them.
AFTER_CLIPPING = (
    "_apply_weight_decay",
    "_backend_update_step",
    "_update_model_variables_moving_average",
    "_overwrite_model_variables_with_average_value",
)


class KerasGuard(Reports):
    """What :func:`clip` returns: ``last_norm``, ``clip_rate``, ``skipped_steps`` and so on.

    Attributes:
        optimizer: the Keras optimizer whose gradients are clipped.
        policy: the rule.
        nonfinite: what NaN and Inf do.
    """

    def __init__(self, optimizer: Any, policy: Policy, nonfinite: str, skip_limit: int | None) -> None:
        self.optimizer, self.policy, self.nonfinite = optimizer, policy, nonfinite
        self._record, self._ladder = Record(), Ladder(None, None)
        self._record.skip_limit = skip_limit
        self._variables: list[Any] = []
        self._skipped = False

    def install(self) -> None:
        """Puts itself into the optimizer object."""
        optimizer = self.optimizer
        apply, update = optimizer.apply, optimizer._backend_apply_gradients

        def guarded_apply(grads: Any, trainable_variables: Any = None) -> None:
            self._skipped = False
            apply(grads, trainable_variables)
            skipped, self._skipped = self._skipped, False  # fit() ends with a method that is held back below
            if skipped and not optimizer.gradient_accumulation_steps:
                optimizer._iterations.assign_sub(1)
            elif skipped:  # the count is one of batches, and Keras empties what it gathered by a product: 0 x NaN = NaN
                with torch.no_grad():
                    for gathered in optimizer._accumulated_gradients:
                        if gathered is not None:
                            gathered.value.zero_()

        def guarded_update(grads: Any, trainable_variables: Any) -> None:
            self._variables = trainable_variables
            update(grads, trainable_variables)

        optimizer.apply = guarded_apply
        optimizer._backend_apply_gradients = guarded_update
        optimizer._clip_gradients = self.look
        for name in AFTER_CLIPPING:
            setattr(optimizer, name, self._unless_skipped(getattr(optimizer, name)))

    def _unless_skipped(self, method: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            if not self._skipped:
                method(*args)

        return guarded

    @torch.no_grad()
    def look(self, grads: list[Tensor]) -> list[Tensor]:
        """Reads and clips the gradients of a step in place, and returns them."""
        variables = [variable.value for variable in self._variables]
        names = GroupNames([(0, {"params": variables, "param_names": [v.path for v in self._variables]})])
        share = grads_among(grads)._replace(names=names, parameters=variables)
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
        return grads

    def _reason(self) -> tuple[str, tuple[str, ...]]:
        """Of a skip, for the event that tells of it."""
        bad = tuple(self._record.bad()) if self.nonfinite == "skip" else ()
        return ("NaN or Inf in the gradients", bad) if bad else (f"decided by {self.policy!r}", ())


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
        TypeError: not a Keras optimizer.
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
    for name in ("clipnorm", "global_clipnorm", "clipvalue"):
        if getattr(optimizer, name) is not None:
            raise ValueError(f"the optimizer has {name}={getattr(optimizer, name)}: leave it out, fastclip clips")
    if "_clip_gradients" in vars(optimizer):
        raise ValueError("fastclip is in this optimizer already")
    if policy is not None and max_norm is not None:
        raise ValueError(f"policy={policy!r} brings its own bound; leave max_norm out")
    chosen = GlobalNorm(1.0 if max_norm is None else max_norm) if policy is None else policy_of(policy)
    limit = None if skip_limit is None else whole("skip_limit", skip_limit, least=1)
    guard = KerasGuard(optimizer, chosen, nonfinite_rule(nonfinite), limit)
    guard.install()
    return guard
