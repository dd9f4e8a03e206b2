"""accelerate: wrap the optimizer before ``accelerator.prepare``; this logs what the wrapper knows."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from fastclip.integrations.facts import facts


def log_clipping(accelerator: Accelerator, optimizer: Any, step: int | None = None) -> dict[str, float]:
    """Sends the latest ``grad_norm`` (before clipping), ``clip_rate`` and ``skipped_steps`` to accelerate's trackers.

    Args:
        accelerator: the one that has prepared ``optimizer``.
        optimizer: what ``accelerator.prepare`` gave back.
        step: as in ``accelerator.log``.

    Returns:
        What was sent. Synchronises.

    Raises:
        TypeError: there is no fastclip in the optimizer.
    """
    known = facts(optimizer)
    accelerator.log(known, step=step)
    return known
