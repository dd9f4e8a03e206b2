"""What a policy is: from what one read of the gradients says to what they are multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastclip.reading import Reading
from fastclip.types import TOTAL_NORM, Request, moved, wide_dtype

Bound: TypeAlias = float | Tensor | Callable[[int], float | Tensor]


class Decision(NamedTuple):
    """What a policy makes of a reading.

    Attributes:
        clip_coef: multiplier of the gradients: a number, a 0-d tensor on their device, or ``[n]``, one for each
            gradient. 1 leaves them alone.
        skip: whether the step shall not happen, for a reason of the policy's own; non-finite gradients are
            the caller's business. A bool, or a 0-d tensor that is not 0 for yes.
        unit_coefs: ``[u]``, a multiplier for each unit of ``reading.units``; comes instead of ``clip_coef``.
        clamp: bound of every element's magnitude; comes after ``clip_coef``.
    """

    clip_coef: float | Tensor = 1.0
    skip: bool | Tensor = False
    unit_coefs: Tensor | None = None
    clamp: float | None = None


class Policy:
    """A clipping rule: ``decide`` gets what one read of the gradients gave, never a gradient.

    A rule of your own is a subclass with ``decide``; one that learns lists the tensors it learns in ``learned`` and
    so gets ``state_dict``. Work in tensors on ``reading.totals.device`` and never look at a value: then nothing waits
    for a GPU. One object serves one optimizer, or one param group.

    Attributes:
        norm_type: p of the norms it reads.
        learned: names of the attributes, all tensors, that a resumed run needs.
        per_tensor: whether they are about single gradients, so that they fit only the same parameters.
        writes: whether it may ever ask for more than statistics.
        clamps: whether it may clamp elements, which complex ones have no order for.
        total_only: whether it looks at totals, units and largest magnitudes alone, and not at the norms of single
            gradients. Of sharded gradients then only totals have to be joined. A subclass with a ``decide`` of its own
            says it anew.
    """

    norm_type: float = 2.0
    learned: tuple[str, ...] = ()
    per_tensor: bool = False
    writes: bool = True
    clamps: bool = False
    total_only: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "decide" in vars(cls) and "total_only" not in vars(cls):
            cls.total_only = False

    @property
    def learns(self) -> bool:
        """Whether a step leaves anything behind in it."""
        return bool(self.learned)

    def request(self) -> Request:
        """What the read of this step shall yield; called once a step, before it."""
        return Request(self.norm_type)

    def decide(self, reading: Reading) -> Decision:
        """What follows from the reading that ``request`` asked for; its norms are those of the unscaled gradients."""
        raise NotImplementedError(f"{type(self).__name__} has no decide()")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty for a rule that learns nothing."""
        if not self.learned:
            return {}
        return {"policy": type(self).__name__, **{name: getattr(self, name).clone() for name in self.learned}}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ``ValueError`` if ``state_dict`` was saved by another policy."""
        name, keys = type(self).__name__, {"policy", *self.learned} if self.learned else set()
        if state_dict.keys() != keys or state_dict.get("policy", name) != name:
            held = ", ".join(f"{k}={v}" if k == "policy" else str(k) for k, v in state_dict.items())
            raise ValueError(
                f"{name} knows {', '.join(self.learned) or 'nothing'}; the state dict holds {held or 'nothing'}: "
                "it was saved by another policy. Nothing was changed"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave. Raises as :meth:`check_state_dict`."""
        self.check_state_dict(state_dict)
        for name in self.learned:
            setattr(self, name, state_dict[name].clone())

    def to(self, device: torch.device) -> None:
        """Brings what it learned to ``device``, in its widest dtype; for a step whose gradients have moved."""
        for name in self.learned:
            value: Tensor = getattr(self, name)
            if value.device != device:
                dtype = wide_dtype(device) if value.is_floating_point() else value.dtype
                setattr(self, name, moved(value, device, dtype))

    def __repr__(self) -> str:
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in self.learned}
        shown = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in settings.items())
        return f"{type(self).__name__}({', '.join(shown)})"


def coef_for(norm: Tensor, bound: Tensor | float, eps: float) -> Tensor:
    """``bound / (norm + eps)`` where the norm exceeds the bound, else exactly 1; elementwise."""
    return torch.where(norm <= bound, 1.0, bound / (norm + eps))


def total_norm(reading: Reading) -> Tensor:
    """The reading's total norm, 0-d, in its widest dtype."""
    return reading.totals[TOTAL_NORM]
