"""Lightning: a callback that puts fastclip into the trainer's optimizers, and logs what it finds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fastclip import checkpoint
from fastclip.checkpoint import saved_with
from fastclip.guard import Guard
from fastclip.integrations.facts import facts, fresh, reports_of
from fastclip.optim import attach


class Clip(Callback):  # type: ignore[misc]
    """``Trainer(callbacks=[Clip(max_norm=1.0)])`` instead of ``Trainer(gradient_clip_val=1.0)``.

    It attaches to each optimizer of the trainer while it trains; one that ``configure_optimizers`` has wrapped in
    :class:`fastclip.ClippedOptimizer` is left as it is. After each batch ``grad_norm`` (before clipping), ``clip_rate``
    and ``skipped_steps`` are logged, with ``/0``, ``/1``, ... behind the name where there are several optimizers. It
    works with fused optimizers under ``precision="16-mixed"``, which ``gradient_clip_val`` refuses. What a policy has
    learned is in the checkpoint.

    Args:
        settings: those of :func:`fastclip.attach`; each optimizer gets copies of the objects that learn.

    Raises:
        ValueError: at the start of training, if the trainer has a ``gradient_clip_val`` too, or the checkpoint holds
            what another rule has learned.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.guards: list[Guard] = []
        self._loaded: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = []  # a validation loads a checkpoint too, and nothing takes it there

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.gradient_clip_val:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) would clip before fastclip looks: leave it out"
            )
        free = [optimizer for optimizer in trainer.optimizers if reports_of(optimizer) is None]
        if self.settings and len(free) < len(trainer.optimizers):
            warnings.warn(
                f"Clip: {len(trainer.optimizers) - len(free)} of the optimizers are wrapped by fastclip already, and "
                "stay as they are; these settings are not theirs",
                RuntimeWarning,
                stacklevel=2,
            )
        self.guards = [attach(optimizer, **fresh(self.settings, pl_module)) for optimizer in free]
        self._with_loaded(checkpoint.check)  # before the optimizers' states are loaded, whose error knows less

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the optimizers' own states hold it too, but not those of every strategy
        self._with_loaded(checkpoint.take)
        self._loaded = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        several = len(trainer.optimizers) > 1
        for index, optimizer in enumerate(trainer.optimizers):
            pl_module.log_dict({f"{k}/{index}" if several else k: v for k, v in facts(optimizer).items()})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for guard in self.guards:
            if guard.is_attached:
                guard.remove()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # after training the guards are gone from the optimizers; what is saved then is to be as it was during it
        gone = {id(guard.optimizer): guard for guard in self.guards if not guard.is_attached}
        checkpoint["optimizer_states"] = [
            saved_with(gone[id(optimizer)], state) if state and id(optimizer) in gone else state
            for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"guards": [checkpoint.known_of(guard) for guard in self.guards]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["guards"]

    def _with_loaded(self, do: Callable[[Guard, dict[str, Any]], None]) -> None:
        for guard, known in zip(self.guards, self._loaded, strict=False):
            try:
                do(guard, known)
            except ValueError as error:
                raise ValueError(
                    f"{error}. A checkpoint of Lightning's holds it twice: checkpoint['callbacks'].pop("
                    f"{self.state_key!r}), and .pop({checkpoint.STATE!r}, None) of each in "
                    "checkpoint['optimizer_states']"
                ) from None
