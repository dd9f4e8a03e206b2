"""Gradients that explode or vanish, over depth and over time: the sick model is found, the healthy one is silent."""

import math

import pytest
from patients import Loop, Sequence, Transformer, classes, he, mlp, series, tokens
from torch import nn

import fastclip
from fastclip.doctor.trend import trend_of


def codes(model, batch, loss_fn):
    return fastclip.check(model, batch, loss_fn, max_seconds=0).codes


def large(weight):
    nn.init.normal_(weight, std=0.6)


# code, sick model, healthy model, batch, loss
DEPTH = {
    "sigmoid MLP": (
        "vanishing-depth",
        lambda: mlp(nn.Sigmoid, 10),
        lambda: mlp(nn.ReLU, 10, he),
        classes,
        nn.CrossEntropyLoss(),
    ),
    "transformer without norms, damped": (
        "vanishing-depth",
        lambda: Transformer(6, between=0.1, norm=False),
        lambda: Transformer(6),
        tokens,
        nn.CrossEntropyLoss(),
    ),
    "transformer without norms, amplified": (
        "exploding-depth",
        lambda: Transformer(6, between=4.0, norm=False),
        lambda: Transformer(6, norm_first=True),
        tokens,
        nn.CrossEntropyLoss(),
    ),
    "large weights": (
        "exploding-depth",
        lambda: mlp(nn.ReLU, 12, large),
        lambda: mlp(nn.ReLU, 12, he),
        classes,
        nn.CrossEntropyLoss(),
    ),
}
TIME = {
    "RNN, one step back": (
        "exploding-time",
        lambda: Sequence(nn.RNN(4, 16, batch_first=True, nonlinearity="relu"), recurrent=1.6),
        lambda: Sequence(nn.RNN(4, 16, batch_first=True), recurrent=1.0),
        lambda: series(40),
        nn.MSELoss(),
    ),
    "own loop": (
        "exploding-time",
        lambda: Loop(nn.RNNCell(4, 16, nonlinearity="relu"), 1.6),
        lambda: Loop(nn.RNNCell(4, 16), 1.0),
        lambda: series(40),
        nn.MSELoss(),
    ),
    "RNN, small recurrent weight": (
        "vanishing-time",
        lambda: Sequence(nn.RNN(4, 16, batch_first=True), recurrent=0.3),
        lambda: Sequence(nn.RNN(4, 16, batch_first=True), recurrent=1.0),
        lambda: series(20),
        nn.MSELoss(),
    ),
}


def test_a_trend_is_a_line():
    line = trend_of([2.0 * 0.1**i for i in range(9)], 4)
    assert (line.factor, line.total, line.fit, line.points) == pytest.approx((0.1, 1e-8, 1.0, 9))
    gaps = trend_of([1.0, 0.0, 1e-40, math.nan, 1e-80, 1e-100], 4)
    assert (gaps.factor, gaps.total, gaps.points) == pytest.approx((1e-20, 1e-100, 4))
    assert trend_of([1.0, 10.0, 0.0, math.inf], 4) is None
    assert trend_of([1e-300, 1.0, 1e300, 1.0, 1e-300], 4).fit == pytest.approx(0.0)


def test_layers_of_different_size_in_turns_are_no_trend():
    """Gradients of two kinds, far apart and in no order, are nobody's explosion."""

    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

        def forward(self, x):
            factors = (1e-6, 1.0, 1.0, 1e-6, 1.0, 1e-6)
            return sum(factor * layer(x) for factor, layer in zip(factors, self.layers, strict=True))

    diagnosis = fastclip.check(Uneven(), classes(), nn.CrossEntropyLoss(), max_seconds=0)
    assert not {"exploding-depth", "vanishing-depth"} & set(diagnosis.codes)


@pytest.mark.parametrize("case", DEPTH | TIME)
def test_the_sick_is_found_and_the_healthy_is_silent(case):
    code, sick, healthy, batch, loss_fn = (DEPTH | TIME)[case]
    assert code in codes(sick(), batch(), loss_fn)
    assert code not in codes(healthy(), batch(), loss_fn)
