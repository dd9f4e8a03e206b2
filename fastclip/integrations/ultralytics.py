"""ultralytics: a trainer whose step clips by any rule, and skips a NaN instead of going back an epoch."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from fastclip.integrations.facts import facts, fresh, reports_of
from fastclip.optim import ClippedOptimizer


class ClippedTrainer:
    """Mixin for ultralytics' trainers: ``class MyTrainer(ClippedTrainer, DetectionTrainer): pass``.

    Pass the class as ``model.train(trainer=MyTrainer, ...)``. The optimizer that the trainer builds is wrapped in
    :class:`fastclip.ClippedOptimizer`, and the trainer's own ``unscale_`` and ``clip_grad_norm_`` are left out. A
    step with NaN or Inf does not happen, so that the weights stay good until the end of the epoch, where ultralytics
    would look; and where the epoch's last loss was NaN, but all weights and buffers are finite, it does not go back an
    epoch. ``results.csv`` gets ``clip/grad_norm`` (before clipping, of the latest step; NaN until there is one),
    ``clip/clip_rate`` and ``clip/skipped_steps``.

    Attributes:
        clipping: arguments of :class:`fastclip.ClippedOptimizer`; the bound of 10 is ultralytics' own.

    Raises:
        TypeError: the class stands behind a trainer, whose own would run.
    """

    clipping: ClassVar[dict[str, Any]] = {"max_norm": 10.0}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(ClippedTrainer)]
        if any("build_optimizer" in vars(base) and not issubclass(base, ClippedTrainer) for base in before):
            raise TypeError(f"{cls.__name__}: expected ClippedTrainer before a trainer of ultralytics'")

    def build_optimizer(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps what the trainer builds."""
        optimizer = super().build_optimizer(model, *args, **kwargs)  # type: ignore[misc]
        if reports_of(optimizer) is not None:
            return optimizer
        return ClippedOptimizer(optimizer, **fresh(self.clipping, model))

    def optimizer_step(self) -> None:
        """As the trainer's own, without its passes over the gradients."""
        trainer: Any = self
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        trainer.optimizer.zero_grad()
        if trainer.ema:
            trainer.ema.update(trainer.model)

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds what the wrapper knows."""
        # the file has one header, also where its first line comes before the first step
        known = {"grad_norm": math.nan, **facts(self.optimizer)}  # type: ignore[attr-defined]
        super().save_metrics({**metrics, **{f"clip/{name}": value for name, value in known.items()}})  # type: ignore[misc]

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Goes back an epoch only where something has gone bad: a NaN in the epoch's last loss alone cost one step."""
        trainer: Any = self
        loss = trainer.loss
        if loss is not None and not loss.isfinite() and self._is_unharmed():
            trainer.loss = None  # it is what ultralytics looks at, beside the fitness
        went_back: bool = super()._handle_nan_recovery(epoch)  # type: ignore[misc]
        trainer.loss = loss
        return went_back

    def _is_unharmed(self) -> bool:
        """Whether all weights and buffers are finite, and bad gradients that are still being accumulated will do no
        harm either."""
        trainer: Any = self
        if reports_of(trainer.optimizer).nonfinite == "propagate":  # type: ignore[union-attr]
            return False
        models = [trainer.model, trainer.ema.ema] if trainer.ema else [trainer.model]
        values = [value for model in models for value in model.state_dict().values()]
        return all(bool(value.isfinite().all()) for value in values if isinstance(value, Tensor))
