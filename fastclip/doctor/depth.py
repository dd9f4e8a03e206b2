"""Exploding and vanishing over depth: gradients from layer to layer, in the order in which the layers ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fastclip.doctor.diagnosis import ERROR, WARNING, Finding
from fastclip.doctor.layers import Call
from fastclip.doctor.sequences import MIN_STEPS
from fastclip.doctor.trend import trend_of
from fastclip.monitoring.flags import FlagRules

MIN_LAYERS = 4  # with three, one odd layer is the trend
# From when on it is told: the monitor's own measure of a gradient that vanishes beside its neighbours.
TOLD = FlagRules.fraction
# From when on layers that far apart can't both learn at one learning rate: steps of the one are lost in the rounding of
# float32 (6e-8 of a weight) where those of the other are a tenth of it.
HOPELESS = 1e-6
MIN_FIT = 0.5  # at least half of what is seen from layer to layer is growth, not difference between kinds of layers


def findings(calls: list[Call], weight_grads: dict[str, float]) -> Iterator[Finding]:
    """Of the growth of the gradient from the last layer to the first.

    Args:
        calls: of the layers, in the order in which they ran.
        weight_grads: name of a layer -> norm of the gradient of its own parameters.
    """
    counts = Counter(call.layer.name for call in calls)
    chain = [call for call in calls if counts[call.layer.name] < MIN_STEPS]
    deltas = trend_of([call.output_grad for call in chain], MIN_LAYERS)
    if deltas is None or deltas.fit < MIN_FIT:
        return
    growth = 1.0 / deltas.total  # towards the input: the way the gradient goes
    each = 1.0 / deltas.factor
    first, last = chain[0], chain[-1]
    numbers = {
        "growth": growth,
        "per_layer": each,
        "layers": float(len(chain)),
        "first": first.output_grad,
        "last": last.output_grad,
        "fit": deltas.fit,
    }
    where = (first.layer.name, last.layer.name)
    path = f"norm {last.output_grad:.2g} at layer {last.label}, {first.output_grad:.2g} at layer {first.label}"
    if growth > 1.0 / TOLD:
        yield Finding(
            "exploding-depth",
            ERROR if growth > 1.0 / HOPELESS else WARNING,
            f"the gradient grows {growth:.2g} times over {len(chain)} layers, {each:.3g} times per layer: {path}",
            "start with weights that keep the gradient's size, e.g. "
            "torch.nn.init.kaiming_normal_(layer.weight, nonlinearity='relu') (xavier_normal_ for tanh), put a "
            "LayerNorm between the layers, and clip: fastclip.ClippedOptimizer(optimizer, max_norm=1.0)",
            where,
            numbers,
        )
    learned = trend_of([weight_grads.get(call.layer.name, 0.0) for call in chain], MIN_LAYERS)
    if growth < TOLD and learned is not None and learned.total > 1.0 / TOLD:
        yield Finding(
            "vanishing-depth",
            ERROR if growth < HOPELESS else WARNING,
            f"the gradient shrinks to {growth:.2g} of its size over {len(chain)} layers, to {each:.2g} per layer: "
            f"{path}; the first layers hardly learn",
            "use an activation that doesn't shrink it (torch.nn.ReLU or GELU for Sigmoid) with "
            "torch.nn.init.kaiming_normal_(layer.weight, nonlinearity='relu'), or skip connections with a LayerNorm; "
            "clipping can't help here",
            where,
            {**numbers, "weight_growth": 1.0 / learned.total},
        )
