"""Arguments that users pass -> values that can be relied on; every message names the argument."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastclip.types import NONFINITE, known_to_host


def real(name: str, value: float | Tensor) -> float:
    """``value``, a number or a tensor with one element, as a float."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name}: expected a number or a tensor with one element, got shape {tuple(value.shape)}")
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def number(name: str, value: float | Tensor) -> float:
    """A bound: not negative, not NaN."""
    bound = real(name, value)
    if not bound >= 0:
        raise ValueError(f"{name} must be at least 0, got {bound}")
    return bound + 0.0  # a kernel that compares bits would take -0.0 for the largest of all


def bound_of(name: str, value: float | Tensor) -> float | Tensor:
    """The same; but a tensor that the host would have to wait for stays one, unchecked."""
    if not isinstance(value, Tensor) or value.numel() != 1 or known_to_host(value.detach()):
        return number(name, value)
    return value


def positive(name: str, value: float | Tensor) -> float:
    """A number above 0, not NaN."""
    checked = number(name, value)
    if checked == 0.0:
        raise ValueError(f"{name} must be greater than 0")
    return checked


def fraction(name: str, value: float | Tensor) -> float:
    """A number from 0 to below 1."""
    checked = number(name, value)
    if checked >= 1.0:
        raise ValueError(f"{name} must be below 1, got {checked}")
    return checked


def whole(name: str, value: Any, least: int = 0) -> int:
    """A whole number."""
    checked = real(name, value)
    if not math.isfinite(checked) or checked != int(checked) or checked < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(checked)


def norm_type_number(value: float | str) -> float:
    """``value`` as a float; ``"inf"`` is one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"norm_type: expected a number or 'inf', got {value!r}") from None
    if math.isnan(number):
        raise ValueError("norm_type must not be NaN")
    return number


def nonfinite_rule(value: str, error_if_nonfinite: bool = False) -> str:
    """``value`` if it is one of NONFINITE; "raise" where torch's own flag asks for it."""
    if value not in NONFINITE:
        raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}; got {value!r}")
    if error_if_nonfinite and value not in ("propagate", "raise"):
        raise ValueError(f"error_if_nonfinite=True contradicts nonfinite={value!r}")
    return "raise" if error_if_nonfinite else value
