"""How weights start: does a layer keep the size of what goes through it, and do its units differ?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastclip.doctor.diagnosis import ERROR, WARNING, Finding
from fastclip.doctor.layers import AFFINE, Call
from fastclip.doctor.moments import moments_of

# Glorot and Bengio 2010 and He et al. 2015: a layer should keep the size of what it gets, which takes a gain from 1 (no
# activation behind it) over sqrt(2) (ReLU) to 5/3 (tanh). torch's own start of a Linear or Conv gives sqrt(1/3).
# Told is three times the largest of these, and a tenth of the smallest: small weights hurt less, and a small last
# layer helps.
LARGE, SMALL = 5.0, 0.06


@dataclass(frozen=True)
class Weight:
    """One weight of a layer.

    Attributes:
        layer, name: of the layer in the model, and of the weight in the layer.
        kind: class of the layer.
        units: how many rows it has.
        std: of its elements; 0 if all are the same.
        alike: whether all its rows are the same, and the gradients of all rows, too: they will stay the same.
    """

    layer: str
    name: str
    kind: str
    units: int
    std: float
    alike: bool


def weights_of(calls: list[Call], grads: dict[str, Tensor]) -> list[Weight]:
    """Of each layer that ran; ``grads`` by the name of the parameter in the model."""
    found = []
    for layer in dict.fromkeys(call.layer for call in calls):
        for name, weight in layer.weights():
            moments = moments_of(weight)
            if moments is None:
                continue
            own = (grads[parameter] for parameter in layer.parameters if parameter in grads)
            grad = next((one for one in own if one.shape == weight.shape), None)
            found.append(
                Weight(layer.name, name, layer.kind, len(weight), moments.std, _alike(weight) and _alike(grad))
            )
    return found


def _alike(rows: Tensor | None) -> bool:
    """Whether all rows are the same, up to what rounding leaves of sums in another order."""
    if rows is None or len(rows) < 2:
        return False
    rows = rows.detach().to_dense().flatten(1)
    largest = rows.abs().amax()
    return bool(((rows - rows[0]).abs() <= 1e-4 * largest).all())


def findings(
    calls: list[Call], weights: list[Weight], follows: dict[int, str], may_be_small: set[int]
) -> Iterator[Finding]:
    """Of single layers; what several in a row do to the gradient is :mod:`fastclip.doctor.depth`'s business.

    Args:
        follows: position of a call -> the activation that comes after it.
        may_be_small: positions of the calls behind which no other layer comes, or next a normalisation.
    """
    copies = [weight for weight in weights if weight.alike]
    if copies:
        first = copies[0]
        more = _more(len(copies) - 1, "weight")
        yield Finding(
            "constant-weights",
            ERROR,
            f"{first.name} of layer {first.layer} starts with {first.units} rows that are all the same, and so are the "
            f"gradients of these rows: its units will stay copies of one unit{more}",
            f"start it at random: {suggested(first.layer, first.name, first.kind, '')}",
            tuple(dict.fromkeys(weight.layer for weight in copies)),
            {"units": float(first.units), "std": first.std, "weights": float(len(copies))},
        )
    alike = {weight.layer for weight in weights if weight.std == 0.0}
    stds = {weight.layer: weight.std for weight in weights}
    embedded = {
        id(p) for call in calls if isinstance(call.layer.module, nn.Embedding) for p in call.layer.module.parameters()
    }
    outside: dict[bool, list[tuple[int, Call]]] = {True: [], False: []}
    for place, call in enumerate(calls):
        large, small = call.gain > LARGE, call.gain < SMALL and place not in may_be_small
        tied = any(id(p) in embedded for p in call.layer.module.parameters(recurse=False))  # sized for looking up
        if call.number == 0 and call.layer.name not in alike and (large or small) and not tied:
            outside[large].append((place, call))
    for large, found in outside.items():
        if not found:
            continue
        place, call = (max if large else min)(found, key=lambda one: one[1].gain)
        what = "what goes in" if isinstance(call.layer.module, AFFINE) else "its own last state"
        more = _more(len(found) - 1, "layer")
        yield Finding(
            "init-too-large" if large else "init-too-small",
            WARNING,
            f"layer {call.layer.name} multiplies {what} by {call.gain:.3g} (root mean square); its weights have "
            f"standard deviation {stds.get(call.layer.name, math.nan):.3g}{more}",
            suggested(call.layer.name, _main(call), call.layer.kind, follows.get(place, "")),
            tuple(one.layer.name for _, one in found),
            {
                "gain": call.gain,
                "weight_std": stds.get(call.layer.name, math.nan),
                "layers": float(len(found)),
            },
        )


def _more(count: int, noun: str) -> str:
    return f"; {count} more {noun}{' is' if count == 1 else 's are'} like it" if count else ""


def _main(call: Call) -> str:
    return "weight_hh_l0" if isinstance(call.layer.module, nn.RNNBase) else next(call.layer.weights())[0]


def suggested(layer: str, name: str, kind: str, follows: str) -> str:
    """A line that starts a weight as fits what comes after it."""
    weight = f"model.get_submodule({layer!r}).{name}"
    if kind in ("RNN", "LSTM", "GRU"):
        return f"torch.nn.init.orthogonal_({weight})"
    if kind.startswith("Embedding"):
        return f"torch.nn.init.normal_({weight}, std=0.02)"
    if follows == "relu":
        return f"torch.nn.init.kaiming_normal_({weight}, nonlinearity='relu')"
    if follows == "tanh":
        return f"torch.nn.init.xavier_normal_({weight}, gain=5 / 3)"
    return f"torch.nn.init.xavier_normal_({weight})"
