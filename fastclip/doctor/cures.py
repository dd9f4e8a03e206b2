"""What helps where an operation makes NaN or Inf."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Fed(NamedTuple):
    """What an operation got, as far as that is known.

    Attributes:
        what: "NaN" or "Inf", which it made.
        low, high: range of the finite numbers among it; NaN where there are none, or where nobody knows.
        infinite: whether Inf was among it.
        half: whether it was float16, which has neither 1e-8 nor exp(80).
    """

    what: str
    low: float
    high: float
    infinite: bool = False
    half: bool = False

    @property
    def overflows(self) -> bool:
        """Whether it made Inf of numbers that were large already."""
        return self.what == "Inf" and max(-self.low, self.high) > 1.0


TOO_LARGE = "the result is more than the dtype can hold: scale what goes in, or compute this in float32"
SLOPE = "its slope at 0 is NaN: (x.square().sum() + 1e-12).sqrt()"
BOUNDED = "keep what it gets inside of -1 to 1: x.clamp(-1 + 1e-6, 1 - 1e-6)"
NO_KEY = "a row whose scores are all -inf has no softmax: leave one key visible in each row of the mask"
NO_TARGET = "no target counts, each is ignore_index or weighs 0: leave out such a batch"
EMPTY = "leave out a batch of which nothing is selected: a mean of no number is NaN"
ONE = "one number has no deviation: take two samples at least"


def _root(fed: Fed, plain: str, plus: str) -> str:
    if fed.low < 0:
        return (
            "numbers below 0 have no root: look at how they are made. Where only rounding took them there, as in a "
            f"variance that is a difference of means, {plain}"
        )
    return plus


def _log(fed: Fed) -> str:
    if fed.low < 0:
        return (
            "numbers below 0 have no logarithm, and clamped to above 0 they get no gradient: make them positive, "
            "torch.nn.functional.softplus(x) + 1e-6, or have the model give the logarithm itself"
        )
    return "keep what it gets above 0, torch.log(x.clamp_min(1e-8)), or use log_softmax, logsigmoid or logsumexp"


def _power(fed: Fed) -> str:
    if fed.overflows:
        return f"{TOO_LARGE}; if the power is negative, keep the base away from 0"
    return "keep the base above 0: x.clamp_min(1e-8) ** p"


def _product(fed: Fed) -> str:
    if fed.what == "NaN":
        return "0 times Inf is NaN: choose with torch.where or masked_fill instead of multiplying by a mask"
    return TOO_LARGE


CURES: dict[str, str | Callable[[Fed], str]] = {
    "log": _log,
    "sqrt": lambda fed: _root(fed, "torch.sqrt(x.clamp_min(1e-8))", "its slope at 0 is infinite: torch.sqrt(x + 1e-8)"),
    "rsqrt": lambda fed: _root(fed, "torch.rsqrt(x.clamp_min(1e-8))", "torch.rsqrt(x + 1e-8)"),
    "div": "keep the divisor away from 0: x / (y + eps), with an eps that is not small beside what y usually is",
    "reciprocal": "keep it away from 0: 1 / (y + eps), with an eps that is not small beside what y usually is",
    "exp": "keep what it gets below 80, torch.exp(x.clamp_max(80)), or use softmax, logsumexp or softplus",
    "pow": _power,
    "mul": _product,
    "acos": BOUNDED,
    "asin": BOUNDED,
    "linalg_vector_norm": SLOPE,
    "norm": SLOPE,
    "_softmax": NO_KEY,
    "_safe_softmax": NO_KEY,
    "_log_softmax": NO_KEY,
    "_ctc_loss": "an input that is shorter than its target, with blanks between repeats, has no alignment: check the "
    "lengths, or torch.nn.CTCLoss(zero_infinity=True)",
    "nll_loss_forward": NO_TARGET,
    "nll_loss2d_forward": NO_TARGET,
    "mean": EMPTY,
    "std": ONE,
    "var": ONE,
    "std_mean": ONE,
    "var_mean": ONE,
}


SUMS = (
    "linalg_vector_norm",
    "norm",
    "mean",
    "sum",
    "std",
    "var",
    "std_mean",
    "var_mean",
    "mm",
    "addmm",
    "bmm",
    "add",
    "sub",
)


def knows(operation: str) -> bool:
    """Whether there is a cure for it alone."""
    plain = operation.partition("Backward")[0].replace("_", "").lower()
    return plain in {name.replace("_", "") for name in CURES}


def cure_of(operation: str, fed: Fed, otherwise: str) -> str:
    """``operation`` as the forward or the backward pass calls it: linalg_vector_norm or LinalgVectorNormBackward0."""
    plain = operation.partition("Backward")[0].replace("_", "").lower()
    names = {name.replace("_", ""): name for name in (*CURES, *SUMS)}
    name = names.get(plain, "")
    if name in SUMS and fed.overflows:
        return TOO_LARGE
    found = CURES.get(name, otherwise)
    if found == EMPTY and not math.isnan(fed.low):
        return otherwise  # what it got isn't nothing
    said = found if isinstance(found, str) else found(fed)
    return said.replace("1e-8", "1e-4").replace("80", "10") if fed.half else said
