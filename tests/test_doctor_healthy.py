"""Models as torch starts them, on standardised inputs, are told nothing worse than an info."""

import pytest
import torch
from patients import Loop, Sequence, Transformer, classes, he, mlp, series, tokens
from torch import nn

import fastclip


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(32, 10)),
        )


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.encoder = nn.Embedding(30, 16), nn.GRU(16, 32, batch_first=True)
        self.decoder, self.head = nn.GRU(16, 32, batch_first=True), nn.Linear(32, 30)

    def forward(self, source, target):
        _, state = self.encoder(self.embed(source))
        out, _ = self.decoder(self.embed(target), state)
        return self.head(out)


def images():
    return torch.randn(16, 3, 16, 16), torch.randint(10, (16,))


def forecasts(steps):
    return torch.randn(16, steps, 4), torch.randn(16, steps, 1)


def zero_head():
    """A last layer that starts at 0 by intent: its rows get different gradients."""
    model = mlp(nn.ReLU, 2)
    nn.init.zeros_(model[-1].weight)
    return model


HEALTHY = {
    "MLP, last layer at 0": (zero_head, classes, nn.CrossEntropyLoss()),
    "MLP, ReLU": (lambda: mlp(nn.ReLU, 3), classes, nn.CrossEntropyLoss()),
    "MLP, GELU": (lambda: mlp(nn.GELU, 3), classes, nn.CrossEntropyLoss()),
    "MLP, tanh": (lambda: mlp(nn.Tanh, 4), classes, nn.CrossEntropyLoss()),
    "deep MLP, He": (lambda: mlp(nn.ReLU, 12, he), classes, nn.CrossEntropyLoss()),
    "wide MLP": (
        lambda: mlp(nn.ReLU, 3, width=256),
        lambda: (torch.randn(64, 256), torch.randint(3, (64,))),
        nn.CrossEntropyLoss(),
    ),
    "CNN": (Convolutions, images, nn.CrossEntropyLoss()),
    "LSTM": (lambda: Sequence(nn.LSTM(4, 32, batch_first=True)), lambda: series(20), nn.MSELoss()),
    "LSTM, each step": (
        lambda: Sequence(nn.LSTM(4, 32, batch_first=True), last=False),
        lambda: forecasts(40),
        nn.MSELoss(),
    ),
    "LSTM, two layers both ways": (
        lambda: Sequence(nn.LSTM(4, 16, 2, batch_first=True, proj_size=0), last=False),
        lambda: forecasts(30),
        nn.MSELoss(),
    ),
    "GRU": (lambda: Sequence(nn.GRU(4, 32, batch_first=True)), lambda: series(20), nn.MSELoss()),
    "RNN": (lambda: Sequence(nn.RNN(4, 32, batch_first=True), last=False), lambda: forecasts(20), nn.MSELoss()),
    "own loop": (lambda: Loop(nn.GRUCell(4, 16), 1.0), lambda: series(10), nn.MSELoss()),
    "transformer": (lambda: Transformer(2), tokens, nn.CrossEntropyLoss()),
    "transformer, norm first": (lambda: Transformer(6, norm_first=True), tokens, nn.CrossEntropyLoss()),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", HEALTHY)
def test_healthy_models_are_silent(case, seed):
    torch.manual_seed(seed)
    make, batch, loss_fn = HEALTHY[case]
    diagnosis = fastclip.check(make(), batch(), loss_fn, max_seconds=0)
    assert diagnosis.healthy, diagnosis
    assert diagnosis.rows


@pytest.mark.parametrize("seed", range(2))
def test_healthy_rates_are_silent(seed):
    torch.manual_seed(seed)
    model = Translator()
    source, target = torch.randint(30, (8, 9)), torch.randint(30, (8, 10))

    def step(model):
        out = model(source, target[:, :-1])
        return nn.functional.cross_entropy(out.flatten(0, 1), target[:, 1:].flatten())

    diagnosis = fastclip.check(model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), step=step)
    assert diagnosis.healthy, diagnosis
    assert {curve.layer for curve in diagnosis.curves} == {"encoder", "decoder"}
