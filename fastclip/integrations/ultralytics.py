"""ultralytics: a trainer whose step clips by any rule, and skips a NaN instead of going back an epoch."""

from __future__ import annotations

from typing import Any, ClassVar

from fastclip.integrations.facts import facts, fresh, reports_of
from fastclip.optim import ClippedOptimizer


class ClippedTrainer:
    """Mixin for ultralytics' trainers: ``class MyTrainer(ClippedTrainer, DetectionTrainer): pass``.

    Pass the class as ``model.train(trainer=MyTrainer, ...)``. The optimizer that the trainer builds is wrapped in
    :class:`fastclip.ClippedOptimizer`, and the trainer's own ``unscale_`` and ``clip_grad_norm_`` are left out. A
    step with NaN or Inf does not happen, so that the weights stay good until the end of the epoch, where ultralytics
    would look. ``results.csv`` gets ``clip/grad_norm`` (before clipping, of the latest step), ``clip/clip_rate`` and
    ``clip/skipped_steps``.

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
        known = {f"clip/{name}": value for name, value in facts(self.optimizer).items()}  # type: ignore[attr-defined]
        super().save_metrics({**metrics, **known})  # type: ignore[misc]
