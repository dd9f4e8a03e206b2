"""What a guarded optimizer tells of its steps, whichever framework's wrapper is around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastclip.amp import GUARD
from fastclip.optim import ClippedOptimizer, own_settings
from fastclip.record import Reports


def reports_of(optimizer: Any) -> Reports | None:
    """The :class:`fastclip.ClippedOptimizer` or the attached guard in ``optimizer``; None if there is neither.

    Args:
        optimizer: what a framework hands out: an optimizer, or its own wrapper with the real one in ``optimizer``
            (accelerate, Lightning).
    """
    while optimizer is not None:
        guard: Reports | None = vars(optimizer).get(GUARD)  # Lightning's wrapper passes for the class inside it
        if guard is not None:
            return optimizer if isinstance(optimizer, ClippedOptimizer) else guard
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def fresh(settings: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A guard's settings, for one optimizer: what learns is its own. Names are the model's, unless given."""
    return {"names": model, **own_settings(settings)}


def facts(optimizer: Any) -> dict[str, float]:
    """``grad_norm`` of the latest step, before clipping, ``clip_rate`` and ``skipped_steps``. Synchronises.

    Args:
        optimizer: a guarded one, or a framework's wrapper around it.

    Raises:
        TypeError: fastclip is not in it.

    Example:
        >>> import torch, fastclip
        >>> from fastclip.integrations.facts import facts
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=1.0)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> opt.step()
        >>> facts(opt)
        {'grad_norm': 2.0, 'clip_rate': 1.0, 'skipped_steps': 0.0}
    """
    reports = optimizer if isinstance(optimizer, Reports) else reports_of(optimizer)
    if reports is None:
        raise TypeError(f"there is no fastclip in this {type(optimizer).__name__}: wrap or attach to it first")
    known = {"clip_rate": float(reports.clip_rate), "skipped_steps": float(reports.skipped_steps)}
    return known if reports.last_norm is None else {"grad_norm": float(reports.last_norm), **known}
