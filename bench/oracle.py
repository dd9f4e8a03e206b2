"""The float64 oracle that every result has to agree with before its time is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 18  # elements widened at a time: 2 MiB of float64, which stay in cache and need no new pages


class WrongResult(Exception):
    """A contestant disagrees with the oracle, or did not do what its row says; it has no time."""


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.detach().reshape(-1).split(PIECE)


def norm(tensor: Tensor, p: float) -> float:
    """p-norm of one tensor; p > 0. Exact products and float64 sums, for magnitudes far from float64's ends."""
    widened = (piece.double().abs_() for piece in pieces(tensor))
    if p == math.inf:
        return max(piece.max().item() for piece in widened)
    return math.fsum(piece.pow_(p).sum().item() for piece in widened) ** (1.0 / p)


def norm_of_norms(norms: Sequence[float], p: float) -> float:
    return max(norms) if p == math.inf else math.fsum(n**p for n in norms) ** (1.0 / p)


def relative_error(got: Tensor | float, want: float) -> float:
    return abs(float(got) - want) / abs(want)


def check_norm(what: str, got: Tensor | float, want: float) -> float:
    """Relative error of ``got``; raises if it is more than one float32 ulp away."""
    ulp = float(np.spacing(np.float32(want)))
    if not abs(float(got) - want) <= ulp:
        raise WrongResult(f"{what} is {float(got):.9g}, and {want:.9g} in float64: {relative_error(got, want):.1e} off")
    return relative_error(got, want)


def check_equal(what: str, got: object, want: object) -> None:
    if got != want:
        raise WrongResult(f"{what} is {got}, and should be {want}")


def check_untouched(grads: list[Tensor], pristine: list[Tensor]) -> None:
    """Raises if a bit of ``grads`` has changed."""
    for index, (grad, before) in enumerate(zip(grads, pristine, strict=True)):
        bits = torch.int16 if grad.dtype.itemsize == 2 else torch.int32
        if not torch.equal(grad.view(bits), before.view(bits)):
            raise WrongResult(f"gradient {index} was written although there was nothing to do")


def check_scaled(grads: list[Tensor], pristine: list[Tensor], factor: float, roundings: int = 2) -> None:
    """Raises if ``grads`` are not ``factor * pristine``: so many roundings of the dtype are allowed."""
    finfo = torch.finfo(grads[0].dtype)
    for index, got, before in _pairs(grads, pristine):
        want = before.double().mul_(factor)
        allowed = want.abs().mul_(finfo.eps * roundings / 2).add_(finfo.smallest_normal * finfo.eps)
        if not bool((want.sub_(got).abs_() <= allowed).all()):
            raise WrongResult(f"gradient {index} was not scaled by {factor:.9g}")


def check_stepped(
    params: list[Tensor], start: list[Tensor], stepped: Callable[[Tensor], Tensor], longest: float
) -> None:
    """Raises if ``params`` are not ``stepped(start)``, within four roundings and 1e-4 of the longest step."""
    eps = torch.finfo(params[0].dtype).eps
    for index, got, before in _pairs(params, start):
        want = stepped(before.double())
        allowed = want.abs().mul_(2 * eps).add_(1e-4 * longest)
        if not bool((want.sub_(got).abs_() <= allowed).all()):
            raise WrongResult(f"parameter {index} is not where one step leads")


def check_clamped(grads: list[Tensor], pristine: list[Tensor], bound: float) -> None:
    """Raises if ``grads`` are not ``pristine`` clamped; ``bound`` must be a number of their dtype."""
    for index, got, before in _pairs(grads, pristine):
        if not torch.equal(got, before.clamp(-bound, bound)):
            raise WrongResult(f"gradient {index} was not clamped to {bound}")


def _pairs(grads: list[Tensor], pristine: list[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    for index, (grad, before) in enumerate(zip(grads, pristine, strict=True)):
        for got, start in zip(pieces(grad), pieces(before), strict=True):
            yield index, got, start
