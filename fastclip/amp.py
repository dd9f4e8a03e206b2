"""Loss scaling: torch's GradScaler without its own pass over the gradients, and a look at the one that calls."""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from fastclip.riding import RIDERS

GUARD = "_fastclip"  # the attribute under which an optimizer keeps its Guard


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` whose check for NaN and Inf is the one read that the guarded optimizer makes anyway.

    Before each step torch's GradScaler reads, and writes back, every gradient to look for NaN and Inf. This one
    leaves that to the optimizer: a :class:`fastclip.ClippedOptimizer` (or one that :func:`fastclip.attach` guards)
    divides its norms by the scale, finds NaN and Inf on the way, and unscales while it clips or, with torch's
    fused optimizers, while it steps. A step with NaN or Inf is skipped whatever the optimizer's ``nonfinite``
    says, and ``update()`` lowers the scale, as ever. With other optimizers it is torch's own.

    Arguments, methods and ``state_dict`` are those of ``torch.amp.GradScaler``. ``scaler.unscale_(optimizer)`` before
    the step isn't needed for clipping, and costs what it costs in torch.

    Example:
        >>> import torch, fastclip
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), fused=True), max_norm=1.0)
        >>> scaler = fastclip.GradScaler("cpu", init_scale=1024.0)
        >>> scaler.scale(model(torch.ones(2, 3)).sum()).backward()
        >>> scaler.step(opt)
        >>> scaler.update()
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As ``torch.amp.GradScaler.step``."""
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            if (guard := vars(optimizer).get(GUARD)) is not None:
                guard.report_to(None)  # an error may have come before the read

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[Any, Tensor]:
        guard = vars(optimizer).get(GUARD)
        if guard is None:
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("step")
        # Filled in by the read of the step that follows at once; update() looks at it after that.
        found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        guard.report_to(found_inf)
        per_device = {scale.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = per_device
        return per_device


class scalers_marks:
    """Takes ``grad_scale`` and ``found_inf`` off ``owner`` when the ``with`` block ends in an error.

    A GradScaler puts both there, and takes them off only after a step that ended well; the next step would be
    scaled twice. A ``grad_scale`` without ``found_inf`` is the user's own, and stays.
    """

    def __init__(self, owner: Optimizer) -> None:
        self._attributes = vars(owner)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and all(name in self._attributes for name in RIDERS):
            for name in RIDERS:
                del self._attributes[name]


def check_not_unscaled(inner: Optimizer) -> None:
    """Raises ``RuntimeError`` if the GradScaler that is calling has already unscaled ``inner``, which a wrapper holds.

    A scaler keeps its books by the identity of the optimizer it is given, and passes nothing of them on. So it is
    looked for among the callers: a gradient divided twice by 65,536 trains on in silence.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not torch.amp.GradScaler.step.__code__:
        frame = frame.f_back
    if frame is None:
        return
    states = frame.f_locals["self"]._per_optimizer_states
    level: Any = inner
    while isinstance(level, Optimizer):
        if id(level) in states and states[id(level)]["stage"] is OptState.UNSCALED:
            raise RuntimeError(
                "scaler.unscale_() was called with the optimizer inside the wrapper, and scaler.step() with the "
                "wrapper: the gradients would be divided by the scale twice. Pass the wrapper to both; no step was made"
            )
        level = vars(level).get("_inner")
