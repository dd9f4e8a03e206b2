"""Gradients that explode or vanish, over depth and over time: the sick model is found, the healthy one is silent."""

import pytest
import torch
from torch import nn

import fastclip


def mlp(activation, depth, weight=None, width=32):
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
        if weight is not None:
            weight(layers[-2].weight)
    return nn.Sequential(*layers, nn.Linear(width, 3))


class Sequence(nn.Module):
    def __init__(self, layer, last=True, recurrent=None):
        super().__init__()
        self.rnn, self.head, self.last = layer, nn.Linear(layer.hidden_size, 1), last
        if recurrent is not None:
            with torch.no_grad():
                layer.weight_hh_l0.copy_(recurrent * nn.init.orthogonal_(torch.empty_like(layer.weight_hh_l0)))

    def forward(self, x):
        out, _ = self.rnn(x)
        return self.head(out[:, -1] if self.last else out)


class Loop(nn.Module):
    """A recurrent network that calls its cell itself."""

    def __init__(self, cell, gain):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, 1)
        with torch.no_grad():
            cell.weight_hh.copy_(gain * nn.init.orthogonal_(torch.empty_like(cell.weight_hh)))

    def forward(self, x):
        h = None
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class Transformer(nn.Module):
    def __init__(self, layers, norm_first=False, between=1.0, norm=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
            for _ in range(layers)
        )
        self.between = between
        for block in self.blocks if not norm else ():
            block.norm1, block.norm2 = nn.Identity(), nn.Identity()

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.between * block(x)
        return self.head(x).flatten(0, 1)


def codes(model, batch, loss_fn):
    return fastclip.check(model, batch, loss_fn).codes


def classes():
    return torch.randn(64, 32), torch.randint(3, (64,))


def tokens():
    x = torch.randint(50, (8, 12))
    return x, x.flatten()


def series(steps):
    return torch.randn(16, steps, 4), torch.randn(16, 1)


def he(weight):
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


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


@pytest.mark.parametrize("case", DEPTH | TIME)
def test_the_sick_is_found_and_the_healthy_is_silent(case):
    code, sick, healthy, batch, loss_fn = (DEPTH | TIME)[case]
    assert code in codes(sick(), batch(), loss_fn)
    assert code not in codes(healthy(), batch(), loss_fn)
