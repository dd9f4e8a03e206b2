"""transformers: a ``Trainer`` whose optimizer clips, and which logs the norm before clipping and the skips."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import Trainer

from fastclip.integrations.facts import facts, fresh, reports_of
from fastclip.optim import ClippedOptimizer

# What the training loop calls before it steps; without them there is nothing to take over.
TAKEN_OVER = ("_clip_grad_norm", "_get_grad_norm")


class ClippedTrainer:
    """Mixin for ``transformers.Trainer`` and its subclasses: ``class MyTrainer(ClippedTrainer, Trainer): pass``.

    The optimizer that the trainer makes, or is given, is wrapped in :class:`fastclip.ClippedOptimizer`, unless it is
    already. The trainer's own clipping and its own pass for the norm are left out; the log gets ``grad_norm`` before
    clipping, ``clip_rate`` and ``skipped_steps`` from the wrapper's one read.

    Attributes:
        clipping: arguments of :class:`fastclip.ClippedOptimizer`; without a bound or a policy ``args.max_grad_norm`` is
            the bound, and 0 or less there means none.

    Raises:
        TypeError: the class isn't mixed with a ``Trainer``, or with one that steps in another way.
    """

    clipping: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        is_first = Trainer in mro and mro.index(ClippedTrainer) < mro.index(Trainer)  # else the trainer's own would run
        if not is_first or any(not hasattr(Trainer, name) for name in TAKEN_OVER):
            raise TypeError(f"{cls.__name__}: expected ClippedTrainer before a Trainer with {' and '.join(TAKEN_OVER)}")

    def create_optimizer(self, model: Any = None) -> Any:
        """Wraps what the trainer makes."""
        trainer: Any = self
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if reports_of(optimizer) is None:
            settings = fresh(self.clipping, trainer.model if model is None else model)
            if not settings.keys() & {"max_norm", "policy"}:
                bound = trainer.args.max_grad_norm
                settings["max_norm"] = bound if bound > 0 else math.inf
            trainer.optimizer = ClippedOptimizer(optimizer, **settings)
        return trainer.optimizer

    def _clip_grad_norm(self, model: Any) -> None:
        """The step clips."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """The step finds it."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the wrapper knows to the lines about training steps."""
        trainer: Any = self
        # before training there is no wrapper, and a user may log a loss of his own
        if "loss" in logs and (trainer.is_in_train or reports_of(trainer.optimizer) is not None):
            logs = {**logs, **facts(trainer.optimizer)}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
