"""What goes into the model: its scale, its features, and what can't be judged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.doctor.diagnosis import ERROR, INFO, WARNING, Finding
from fastclip.doctor.layers import AFFINE, CONVOLUTIONS, Call
from fastclip.doctor.moments import Moments, moments_of
from fastclip.doctor.watching import Listener
from fastclip.types import wide_dtype

# LeCun et al. 1998, "Efficient BackProp", section 4.3: inputs train best around 0 and with a spread of about 1. An
# order of magnitude off in either direction is told; pixels from 0 to 1 and one-hot codes are not.
LARGE, SMALL = 10.0, 0.1
# A mean of so many deviations: nearly all of each input is an offset that the first layer has to learn away.
OFF_CENTRE = 5.0
# The widest of the features against the narrowest: at one learning rate the loss then curves 10^4 times as much
# along the one as along the other.
UNEVEN = 100.0
SPARSE = 0.5  # share of zeros
MIN_SAMPLES = 8  # of fewer, a constant feature or a spread says nothing
NAMED = 8  # features that are listed

FED = (*AFFINE, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

SCALED = "scale each feature: sklearn.preprocessing.StandardScaler, fitted to the training part alone"


@dataclass(frozen=True)
class Given:
    """One tensor that the model got.

    Attributes:
        name: how to get at it from the model's arguments.
        moments: None where it holds no real numbers.
        dtype: its own.
        dims: how many dimensions it has.
        judged: whether a layer with weights gets it at about this size, and no normalisation comes first.
        means, stds: of each feature; empty where there are too few samples.
        sparse: whether these are numbers up to 1 most of which are 0, one-hot codes or weights of words: how large they
            are is a matter of how many features there are, and how often each comes.
        mask: whether all that isn't finite is -Inf.
    """

    name: str
    moments: Moments | None
    dtype: torch.dtype
    dims: int
    judged: bool
    means: tuple[float, ...]
    stds: tuple[float, ...]
    sparse: bool = False
    mask: bool = False


class Inputs(Listener):
    """Takes hold of what the model is called with, the first time."""

    def __init__(self) -> None:
        self._held: list[tuple[str, Tensor]] | None = None
        self._weighed = self._normalised = False

    def entered(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "" and self._held is None:
            named = {"inputs" if len(args) == 1 else f"inputs[{i}]": value for i, value in enumerate(args)}
            self._held = [found for label, value in (named | kwargs).items() for found in _named(label, value)]
        self._weighed |= isinstance(module, FED)
        self._normalised |= isinstance(module, NORMS) and not self._weighed
        return None

    def given(self, calls: list[Call]) -> list[Given]:
        """What was held, with its features along the dimension that the first layer takes them from."""
        fed = [call for call in calls if isinstance(call.layer.module, FED) and call.given is not None]
        convolved = bool(fed) and isinstance(fed[0].layer.module, CONVOLUTIONS)
        found = [_facts(name, tensor, convolved) for name, tensor in self._held or ()]
        sizes = [] if self._normalised else [call.given.rms for call in fed if call.given is not None]
        return [replace(one, judged=_reaches(one, sizes)) for one in found]


def _reaches(one: Given, sizes: list[float]) -> bool:
    m = one.moments
    return m is not None and m.finite and m.rms > 0 and any(0.5 < size / m.rms < 2.0 for size in sizes)


def _named(label: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield label, value.detach()
    elif isinstance(value, nn.utils.rnn.PackedSequence):
        yield f"{label}.data", value.data.detach()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named(f"{label}[{key!r}]", item)
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _named(f"{label}[{i}]", item)


def _facts(name: str, tensor: Tensor, convolved: bool) -> Given:
    moments = moments_of(tensor)
    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()
    if moments is not None and moments.finite and tensor.dim() >= 2:
        dim = 1 if convolved and tensor.dim() > 2 else tensor.dim() - 1
        rows = tensor.movedim(dim, -1).reshape(-1, tensor.shape[dim])
        if len(rows) >= MIN_SAMPLES:
            largest = moments.max_abs or 1.0
            spread, mean = torch.var_mean(rows.to(wide_dtype(rows.device)) / largest, dim=0, correction=0)
            means = tuple((mean * largest).tolist())
            stds = tuple((spread.sqrt() * largest).tolist())
    shares = moments is not None and moments.finite and moments.low >= 0.0 and SMALL < moments.high <= 1.0
    sparse = shares and int((tensor == 0).sum()) > SPARSE * tensor.numel()
    mask = moments is not None and moments.infs > 0 and moments.nans == 0 and not bool((tensor == math.inf).any())
    return Given(name, moments, tensor.dtype, tensor.dim(), False, means, stds, sparse, mask)


def scaled(name: str, m: Moments) -> str:
    """A line of Python that brings them to around 0 and 1; a mean that is hardly one stays."""
    if m.std == 0.0:
        return f"{name} = {name} {'-' if m.mean >= 0 else '+'} {abs(m.mean):.3g}"
    centred = name if abs(m.mean) <= 1e-3 * m.std else f"({name} {'-' if m.mean >= 0 else '+'} {abs(m.mean):.3g})"
    return f"{name} = {centred} / {m.std:.3g}"


def notes(given: list[Given]) -> Iterator[str]:
    """What can't be judged."""
    for one in given:
        if one.moments is None:
            yield f"the scale of {one.name}: {one.dtype} has none (indices, masks)"
        elif one.moments.finite and one.moments.max_abs > 0 and not one.judged:
            yield f"the scale of {one.name}: no linear, convolutional, recurrent or attention layer gets it as it is"
    if not given:
        yield "the inputs: the model was called without a tensor, or not by itself"


def findings(given: list[Given], trains: bool) -> Iterator[Finding]:
    """Of each input that holds real numbers; ``trains``: whether the loss and the gradients are finite."""
    for one in given:
        m = one.moments
        if m is None:
            continue
        if one.mask:
            continue  # if it is none, the loss tells
        if not m.finite:
            yield Finding(
                "nonfinite-input",
                INFO if trains else ERROR,
                f"{one.name} holds {m.nans} NaN and {m.infs} Inf among {m.size} numbers",
                f"find them with torch.isfinite({one.name}).all(dim=0), and fill or drop them before training: "
                + ("make NaN of Inf, then " if m.infs else "")
                + "sklearn.impute.SimpleImputer()",
                (one.name,),
                {"nans": float(m.nans), "infs": float(m.infs), "size": float(m.size)},
            )
            continue
        if not one.judged:
            continue
        numbers = {"mean": m.mean, "std": m.std, "rms": m.rms, "low": m.low, "high": m.high}
        about = f"{one.name}: mean {m.mean:.3g}, standard deviation {m.std:.3g}, from {m.low:.3g} to {m.high:.3g}"
        if not SMALL <= m.rms <= LARGE and not one.sparse:
            by_hand = scaled("inputs", m)
            if one.dims == 2 and one.stds:
                by_hand = "inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-8)"
            way = "MinMaxScaler" if m.low >= 0 and m.std > 0 and abs(m.mean) < 3 * m.std else "StandardScaler"
            yield Finding(
                "input-scale",
                WARNING,
                f"{about}; layers are initialised for numbers around 1",
                f"scale it: sklearn.preprocessing.{way}(), fitted to the training part alone, or {by_hand}",
                (one.name,),
                numbers,
            )
        elif m.std > 0 and abs(m.mean) > OFF_CENTRE * m.std:
            yield Finding(
                "input-offset",
                WARNING,
                f"{about}. The mean is {abs(m.mean) / m.std:.3g} deviations away from 0",
                f"centre it: sklearn.preprocessing.StandardScaler(), or {scaled('inputs', replace(m, std=0.0))}",
                (one.name,),
                numbers,
            )
        yield from _features(one)


def _features(one: Given) -> Iterator[Finding]:
    constant = [i for i, std in enumerate(one.stds) if std <= 1e-7 * abs(one.means[i])]
    spread = {i: std for i, std in enumerate(one.stds) if i not in set(constant)}
    if constant and len(one.stds) > 1:
        listed = ", ".join(map(str, constant[:NAMED])) + (", ..." if len(constant) > NAMED else "")
        yield Finding(
            "constant-feature",
            INFO,
            f"{len(constant)} of {len(one.stds)} features of {one.name} are the same in the whole batch: {listed}",
            "see whether they ever change; if not, leave them out: sklearn.feature_selection.VarianceThreshold()",
            (one.name,),
            {"constant": float(len(constant)), "features": float(len(one.stds))},
        )
    if len(spread) > 1:
        wide, narrow = max(spread, key=spread.__getitem__), min(spread, key=spread.__getitem__)
        ratio = spread[wide] / spread[narrow]
        if ratio > UNEVEN and not one.sparse:
            yield Finding(
                "input-spread",
                WARNING,
                f"the features of {one.name} differ in scale by a factor of {ratio:.3g}: feature {wide} has standard "
                f"deviation {spread[wide]:.3g}, feature {narrow} {spread[narrow]:.3g}",
                SCALED,
                (one.name,),
                {"ratio": ratio, "widest": spread[wide], "narrowest": spread[narrow]},
            )
