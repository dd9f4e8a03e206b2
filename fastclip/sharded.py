"""A look at who steps: DeepSpeed's ZeRO never shows an optimizer all gradients at once."""

from __future__ import annotations

import sys
from types import FrameType

# They step each rank's own part of the parameters, stages 1 to 3 group by group as well.
ZERO = ("deepspeed.runtime.zero", "deepspeed.runtime.bf16_optimizer")


def check_not_in_zero() -> None:
    """Raises ``RuntimeError`` if ZeRO is among the callers: a norm over what it shows is not that of the gradients."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(ZERO):
            raise RuntimeError(
                "DeepSpeed's ZeRO steps its optimizer group by group, and on each rank with a part of the gradients: "
                "no norm found here is that of all. Give it the bare optimizer, and set gradient_clipping in its own "
                "configuration. No step was made"
            )
        frame = frame.f_back
