"""Models for the doctor: an MLP, a recurrent network and a transformer, with batches that fit them."""

import torch
from torch import nn


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
        if gain is None:
            return
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


def classes(samples=64):
    return torch.randn(samples, 32), torch.randint(3, (samples,))


def tokens():
    x = torch.randint(50, (8, 12))
    return x, x.flatten()


def series(steps=12):
    return torch.randn(16, steps, 4), torch.randn(16, 1)


def he(weight):
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def filled(model, std=None, value=None, biases=False):
    """The same model, its weights (or its biases, too) drawn anew with a standard deviation, or all set to a value."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or biases:
                parameter.fill_(value) if std is None else parameter.normal_(std=std)
    return model
