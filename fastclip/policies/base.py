"""What a policy is: from what one read of the gradients says to what they are multiplied by."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastclip.reading import Reading, flag
from fastclip.types import TOTAL_NORM, Request, known_to_host, moved, wide_dtype
from fastclip.units import check_units

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

    def check_learned(self) -> None:
        """Raises ``TypeError`` unless ``learned`` names tensors; they may be made by the first ``decide``."""
        if not isinstance(self.learned, tuple):
            raise TypeError(f"{type(self).__name__}.learned: expected a tuple of names, got {self.learned!r}")
        for name in self.learned:
            value = getattr(self, name, None)
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(self).__name__}.learned: {name!r} must be a tensor, got {value!r}")

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
        """Brings what it learned to ``device``, in its widest dtype; for a step whose gradients have moved, and for
        what was saved where there is no float64."""
        for name in self.learned:
            value: Tensor = getattr(self, name)
            dtype = wide_dtype(device) if value.is_floating_point() else value.dtype
            if value.device != device or value.dtype != dtype:
                setattr(self, name, moved(value, device, dtype))

    def __repr__(self) -> str:
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in self.learned}
        shown = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in settings.items())
        return f"{type(self).__name__}({', '.join(shown)})"


def requested(policy: Policy) -> Request:
    """What the policy wants to know in this step.

    Raises:
        TypeError, ValueError: it is no request. Nothing was read.
    """
    request = policy.request()
    if not isinstance(request, Request):
        raise TypeError(f"{policy!r}: request() must return a fastclip.types.Request, got {request!r}")
    if request.units is not None:
        check_units(request.units)
    return request


def decided(policy: Policy, reading: Reading) -> Decision:
    """What the policy makes of the reading; it is asked once, for it may learn from it. Numbers that the host knows are
    numbers in it; a device is not asked for its values.

    Raises:
        TypeError, ValueError: it is no decision for this reading. Nothing was written.
    """
    decision = policy.decide(reading)
    if not isinstance(decision, Decision):
        raise TypeError(f"{policy!r}: decide() must return a Decision, got {type(decision).__name__}")
    coef, skip = decision.clip_coef, decision.skip
    if isinstance(coef, Tensor) and coef.dim() == 0 and known_to_host(coef):
        decision = decision._replace(clip_coef=float(coef))
    if isinstance(skip, Tensor) and skip.numel() == 1:  # a rule may say it by any number
        decision = decision._replace(skip=bool(skip) if known_to_host(skip) else flag(skip))
    if wrong := _what_is_wrong(decision, reading, policy.clamps):
        raise ValueError(f"{policy!r}: decide() gave {wrong}. Nothing was clipped")
    return decision


def _what_is_wrong(decision: Decision, reading: Reading, clamps: bool) -> str:
    """Of what a rule of somebody's own may get wrong."""
    coef, skip, unit_coefs, clamp = decision
    if isinstance(coef, Tensor):
        if coef.dim() and coef.shape != reading.rows.shape[1:]:
            return f"a clip_coef of shape {tuple(coef.shape)} for {reading.rows.shape[1]} gradients"
    elif not isinstance(coef, (float, Real)):  # of which the first is asked for in a tenth of the time
        return f"clip_coef={coef!r}, no number"
    if isinstance(skip, Tensor) and skip.numel() != 1:
        return f"a skip of shape {tuple(skip.shape)}, expected one element"
    if skip is True:  # nothing will be multiplied
        return ""
    if unit_coefs is not None:
        if reading.units is None:
            return "unit_coefs, but its request() didn't ask for units"
        if unit_coefs.shape != (sum(reading.units.counts),):
            return f"unit_coefs of shape {tuple(unit_coefs.shape)} for {sum(reading.units.counts)} units"
    if clamp is not None:
        if not (clamps and reading.request.extras):
            return "a clamp, which needs clamps = True and a request() with extras=True"
        if not isinstance(clamp, (float, Real)) or not clamp >= 0:
            return f"clamp={clamp!r}, expected a number of at least 0"
    for name, factor in (("clip_coef", coef), ("unit_coefs", unit_coefs)):
        if factor is not None and not _is_finite(factor) and reading.found_inf is False:
            return f"{name}={_whose(factor, reading)}, though all gradients are finite"
    if not isinstance(coef, Tensor) and -math.inf < coef < 0:
        return f"clip_coef={coef}, which would turn the gradients around"
    return ""


def _is_finite(factor: float | Tensor) -> bool:
    """As far as the host knows."""
    if not isinstance(factor, Tensor):
        return math.isfinite(factor)
    # the sum, one operation, tells but where it overflows itself
    return not known_to_host(factor) or math.isfinite(factor.sum()) or bool(factor.isfinite().all())


def _whose(factor: float | Tensor, reading: Reading) -> str:
    """A factor that isn't finite; of several the first, and whose it is."""
    if not isinstance(factor, Tensor) or not factor.dim():
        return str(float(factor))
    first = int((~factor.isfinite()).nonzero()[0])
    value, label = float(factor[first]), reading.plan.grads.label
    if reading.units is None or len(factor) != sum(reading.units.counts):
        return f"{value} for {label(first)}"
    ends = list(itertools.accumulate(reading.units.counts))
    index = bisect.bisect(ends, first)
    unit = first - ends[index] + reading.units.counts[index]
    norm = float(reading.units.weight_norms[first])
    damaged = "" if math.isfinite(norm) else f", whose weights have the norm {norm}"
    return f"{value} for unit {unit} of {label(index)}{damaged}"


def coef_for(norm: Tensor, bound: Tensor | float, eps: float) -> Tensor:
    """``bound / (norm + eps)`` where the norm exceeds the bound, else exactly 1; elementwise."""
    return torch.where(norm <= bound, 1.0, bound / (norm + eps))


def total_norm(reading: Reading) -> Tensor:
    """The reading's total norm, 0-d, in its widest dtype."""
    return reading.totals[TOTAL_NORM]
