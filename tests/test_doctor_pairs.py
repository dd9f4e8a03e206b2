"""For every code a sick model that has it and a healthy one that hasn't; several architectures where that applies."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from patients import Sequence, Transformer, classes, filled, he, mlp, series, tokens
from torch import nn
from torch.nn import functional as F

import fastclip

DOCTOR = Path(fastclip.doctor.__file__).parent
CE, MSE, BCE = nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()


def lstm():
    return Sequence(nn.LSTM(4, 16, batch_first=True))


def rnn():
    return Sequence(nn.RNN(4, 16, batch_first=True))


def net():
    return mlp(nn.ReLU, 2)


def ending(*modules, width=3):
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, width), *modules)


class Wrapped(nn.Module):
    """A model, with something done to what it gives."""

    def __init__(self, model, after=lambda x: x, before=lambda x: x):
        super().__init__()
        self.model, self.after, self.before = model, after, before

    def forward(self, x):
        return self.after(self.model(self.before(x)))


class Attention(nn.Module):
    """One head, with or without the division by the root of its size."""

    def __init__(self, scaled):
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(64, 64) for _ in range(4))
        self.scaled = scaled
        for layer in (self.q, self.k):
            nn.init.xavier_normal_(layer.weight)

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        if self.scaled:
            scores = scores / 8
        return self.head(scores.softmax(-1) @ self.v(x))[:, 0]


class Fused(Attention):
    def forward(self, x):
        scale = None if self.scaled else 1.0
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        return self.head(F.scaled_dot_product_attention(q, k, v, scale=scale))[:, 0, 0]


def multihead(large):
    model = Transformer(2)
    if large:
        with torch.no_grad():
            for block in model.blocks:
                block.self_attn.in_proj_weight.mul_(8)
    return model


def words(width=64):
    return torch.randn(8, 16, width), torch.randint(width, (8,))


def scaled_inputs(factor=1.0, offset=0.0, make=classes):
    x, y = make()
    return x * factor + offset, y


def with_nan(make):
    x, y = make()
    x[3, ..., 2] = math.nan
    return x, y


def uneven():
    x, y = classes()
    return x * torch.logspace(-2, 1, 32), y


def constant():
    x, y = classes()
    x[:, 5] = 2.0
    return x, y


def binary():
    x, _ = classes()
    return x, (x[:, :1] > 0).float()


def numbers(shape=(64, 1), factor=1.0):
    x = torch.randn(64, 32)
    return x, factor * torch.randn(shape)


def with_gap(make=numbers):
    x, y = make()
    y[3] = math.nan
    return x, y


def shares(total=1.0):
    x, y = classes()
    return x, total * F.one_hot(y, 3).float()


def in_list(container):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = container([nn.Linear(32, 32), nn.Linear(32, 32)]), nn.Linear(32, 3)

        def forward(self, x):
            for layer in self.hidden:
                x = layer(x).relu()
            return self.head(x)

    return Listed()


def dead(model):
    with torch.no_grad():
        model[2].bias.fill_(-100.0)
    return model


def dead_block(model):
    with torch.no_grad():
        model.blocks[0].linear1.bias.fill_(-100.0)
    return model


def unused(model):
    model.spare = nn.Linear(3, 3)
    return model


def poisoned(model):
    with torch.no_grad():
        next(model.parameters()).view(-1)[1] = math.inf
    return model


def normed():
    model = net()
    return nn.Sequential(model[0], nn.BatchNorm1d(model[0].out_features), *model[1:])


def spoilt(model, value):
    model[1].running_mean[2] = value
    return model


def masked(model):
    model.register_buffer("mask", torch.full((3, 3), -math.inf))
    model.register_buffer("scales", torch.ones(3).to(torch.float8_e8m0fnu))
    return model


def huge_head(model):
    with torch.no_grad():
        model[-1].weight.fill_(1e37)
    return model


def sized(low):
    """A head whose loss is scaled, so that its gradients are tiny."""
    return lambda out, y: F.cross_entropy(out, y) * low


# code, architecture: sick model, its batch, healthy model, its batch, loss (one for both, or two)
PAIRS = {
    ("nonfinite-input", "MLP"): (net, lambda: with_nan(classes), net, classes, CE),
    ("nonfinite-input", "RNN"): (lstm, lambda: with_nan(series), lstm, series, MSE),
    ("input-scale", "MLP"): (net, lambda: scaled_inputs(100.0), net, classes, CE),
    ("input-scale", "MLP, too small"): (net, lambda: scaled_inputs(1e-3), net, classes, CE),
    ("input-scale", "RNN"): (lstm, lambda: scaled_inputs(1e6, make=series), lstm, series, MSE),
    ("input-scale", "transformer"): (
        lambda: Attention(True),
        lambda: scaled_inputs(50.0, make=words),
        lambda: Attention(True),
        words,
        CE,
    ),
    ("input-scale", "MLP that scales by itself"): (
        net,
        lambda: scaled_inputs(100.0),
        lambda: nn.Sequential(nn.BatchNorm1d(32), net()),
        lambda: scaled_inputs(100.0),
        CE,
    ),
    ("input-scale", "MLP that divides"): (
        net,
        lambda: scaled_inputs(100.0),
        lambda: Wrapped(net(), before=lambda x: x / 100),
        lambda: scaled_inputs(100.0),
        CE,
    ),
    ("input-offset", "MLP"): (net, lambda: scaled_inputs(1.0, 8.0), net, classes, CE),
    ("input-offset", "RNN"): (rnn, lambda: scaled_inputs(0.5, 7.0, series), rnn, series, MSE),
    ("input-spread", "MLP"): (net, uneven, net, classes, CE),
    ("constant-feature", "MLP"): (net, constant, net, classes, CE),
    ("softmax-twice", "MLP"): (lambda: ending(nn.Softmax(dim=1)), classes, ending, classes, CE),
    ("softmax-twice", "MLP, log_softmax"): (lambda: ending(nn.LogSoftmax(dim=1)), classes, ending, classes, CE),
    ("softmax-twice", "transformer"): (
        lambda: Wrapped(Transformer(1), lambda x: x.softmax(-1)),
        tokens,
        lambda: Transformer(1),
        tokens,
        CE,
    ),
    ("bounded-logits", "MLP"): (lambda: ending(nn.Sigmoid()), classes, ending, classes, CE),
    ("bounded-logits", "MLP, softmax over the samples"): (
        lambda: ending(nn.Softmax(dim=0)),
        classes,
        ending,
        classes,
        CE,
    ),
    ("bounded-logits", "transformer, softmax over time"): (
        lambda: Wrapped(Transformer(1), lambda x: x.unflatten(0, (8, -1)).softmax(1).flatten(0, 1)),
        tokens,
        lambda: Transformer(1),
        tokens,
        CE,
    ),
    ("one-class", "MLP"): (
        lambda: ending(width=1),
        lambda: (torch.randn(64, 32), torch.zeros(64, dtype=torch.long)),
        lambda: ending(width=2),
        lambda: (torch.randn(64, 32), torch.randint(2, (64,))),
        CE,
    ),
    ("nll-without-log", "MLP"): (ending, classes, lambda: ending(nn.LogSoftmax(dim=1)), classes, nn.NLLLoss()),
    ("nll-without-log", "MLP, probabilities"): (
        lambda: ending(nn.Softmax(dim=1)),
        classes,
        lambda: ending(nn.LogSoftmax(dim=1)),
        classes,
        nn.NLLLoss(),
    ),
    ("sigmoid-twice", "MLP"): (lambda: ending(nn.Sigmoid(), width=1), binary, lambda: ending(width=1), binary, BCE),
    ("sigmoid-twice", "MLP, reshaped"): (
        lambda: Wrapped(ending(nn.Sigmoid(), width=1), lambda p: p.squeeze(1).unsqueeze(-1)),
        binary,
        lambda: ending(width=1),
        binary,
        BCE,
    ),
    ("loss-above-chance", "MLP"): (
        lambda: filled(net(), std=1.0),
        classes,
        net,
        classes,
        CE,
    ),
    ("loss-above-chance", "transformer"): (
        lambda: Wrapped(Transformer(1), lambda x: 20 * x),
        tokens,
        lambda: Transformer(1),
        tokens,
        CE,
    ),
    ("broadcast-loss", "MLP"): (
        lambda: ending(width=1),
        lambda: numbers((64,)),
        lambda: ending(width=1),
        numbers,
        (lambda out, y: (out - y).pow(2).mean()),
    ),
    ("broadcast-loss", "MLP, a product"): (
        lambda: ending(nn.Sigmoid(), width=1),
        lambda: (binary()[0], binary()[1][:, 0]),
        lambda: ending(nn.Sigmoid(), width=1),
        binary,
        (lambda out, y: -(y * torch.log(out) + (1 - y) * torch.log(1 - out)).mean()),
    ),
    ("target-scale", "MLP"): (
        lambda: ending(width=1),
        lambda: numbers(factor=300.0),
        lambda: ending(width=1),
        numbers,
        MSE,
    ),
    ("target-scale", "MLP, own loss"): (
        lambda: ending(width=1),
        lambda: numbers(factor=300.0),
        lambda: ending(width=1),
        numbers,
        (lambda out, y: (y - out).abs().mean()),
    ),
    ("target-scale", "RNN"): (
        lstm,
        lambda: (series()[0], 1e-4 * series()[1]),
        lstm,
        series,
        nn.SmoothL1Loss(),
    ),
    ("constant-weights", "MLP, zeros"): (lambda: filled(net(), value=0.0, biases=True), classes, net, classes, CE),
    ("constant-weights", "MLP"): (lambda: filled(net(), value=0.1, biases=True), classes, net, classes, CE),
    ("constant-weights", "RNN"): (lambda: filled(rnn(), value=0.05, biases=True), series, rnn, series, MSE),
    ("constant-weights", "transformer"): (
        lambda: filled(Attention(True), value=0.0, biases=True),
        words,
        lambda: Attention(True),
        words,
        CE,
    ),
    ("init-too-large", "MLP"): (lambda: filled(net(), std=1.0), classes, net, classes, CE),
    ("init-too-large", "RNN"): (lambda: filled(rnn(), std=3.0), series, rnn, series, MSE),
    ("init-too-large", "transformer"): (
        lambda: filled(Transformer(1), std=1.0),
        tokens,
        lambda: Transformer(1),
        tokens,
        CE,
    ),
    ("init-too-small", "MLP"): (lambda: filled(net(), std=1e-3), classes, net, classes, CE),
    ("init-too-small", "RNN"): (lambda: filled(rnn(), std=1e-3), series, rnn, series, MSE),
    ("init-too-small", "transformer"): (
        lambda: filled(Transformer(1), std=1e-3),
        tokens,
        lambda: Transformer(1),
        tokens,
        CE,
    ),
    ("dead-units", "MLP"): (lambda: dead(mlp(nn.ReLU, 2, he)), classes, lambda: mlp(nn.ReLU, 2, he), classes, CE),
    ("dead-units", "transformer"): (
        lambda: dead_block(Transformer(1)),
        tokens,
        lambda: Transformer(1),
        tokens,
        CE,
    ),
    ("saturated-units", "MLP, tanh"): (
        lambda: filled(mlp(nn.Tanh, 2), std=2.0),
        classes,
        lambda: mlp(nn.Tanh, 2),
        classes,
        CE,
    ),
    ("saturated-units", "MLP, sigmoid"): (
        lambda: filled(mlp(nn.Sigmoid, 1), std=5.0),
        classes,
        lambda: mlp(nn.Sigmoid, 1),
        classes,
        CE,
    ),
    ("loss-detached", "MLP"): (
        lambda: Wrapped(net(), lambda x: x.detach()),
        classes,
        net,
        classes,
        CE,
    ),
    ("loss-detached", "transformer"): (
        lambda: Wrapped(Transformer(1), lambda x: x.argmax(-1, keepdim=True) * torch.ones(50)),
        tokens,
        lambda: Transformer(1),
        tokens,
        CE,
    ),
    ("no-gradient", "MLP"): (lambda: unused(Wrapped(net())), classes, net, classes, CE),
    ("no-gradient", "RNN"): (lambda: unused(lstm()), series, lstm, series, MSE),
    ("no-gradient", "transformer"): (lambda: unused(Transformer(1)), tokens, lambda: Transformer(1), tokens, CE),
    ("zero-gradient", "MLP"): (lambda: dead(mlp(nn.ReLU, 2, he)), classes, lambda: mlp(nn.ReLU, 2, he), classes, CE),
    ("attention-saturated", "matrices"): (lambda: Attention(False), words, lambda: Attention(True), words, CE),
    ("attention-saturated", "fused"): (lambda: Fused(False), words, lambda: Fused(True), words, CE),
    ("attention-saturated", "MultiheadAttention"): (
        lambda: multihead(True),
        tokens,
        lambda: multihead(False),
        tokens,
        CE,
    ),
    ("underflow", "MLP, float16"): (
        lambda: net().half(),
        lambda: (classes()[0].half(), classes()[1]),
        lambda: net().bfloat16(),
        lambda: (classes()[0].bfloat16(), classes()[1]),
        sized(1e-3),
    ),
    ("underflow", "RNN, float32"): (lstm, series, lstm, series, (lambda o, y: 1e-37 * F.mse_loss(o, y), MSE)),
    ("overflow", "MLP, float16"): (
        lambda: net().half(),
        lambda: (2e4 * classes()[0].half(), classes()[1]),
        lambda: net().half(),
        lambda: (classes()[0].half(), classes()[1]),
        CE,
    ),
    ("overflow", "MLP, float32"): (lambda: huge_head(net()), classes, net, classes, CE),
    ("float16-range", "MLP"): (net, classes, net, classes, (sized(1e-7), CE)),
    ("float16-range", "MLP, large"): (lambda: filled(net(), std=30.0), classes, net, classes, CE),
    ("nonfinite-parameter", "MLP"): (lambda: poisoned(net()), classes, net, classes, CE),
    ("nonfinite-parameter", "RNN"): (lambda: poisoned(lstm()), series, lstm, series, MSE),
    ("nonfinite-parameter", "transformer"): (
        lambda: poisoned(Transformer(1)),
        tokens,
        lambda: Transformer(1),
        tokens,
        CE,
    ),
    ("nonfinite-buffer", "MLP"): (lambda: spoilt(normed(), math.nan), classes, normed, classes, CE),
    ("nonfinite-buffer", "MLP, Inf"): (
        lambda: spoilt(normed(), math.inf),
        classes,
        lambda: masked(normed()),
        classes,
        CE,
    ),
    ("nonfinite-target", "MLP"): (lambda: ending(width=1), with_gap, lambda: ending(width=1), numbers, MSE),
    ("nonfinite-target", "MLP, masked in the loss"): (
        lambda: ending(width=1),
        with_gap,
        lambda: ending(width=1),
        with_gap,
        (
            lambda out, y: (out - y).square()[y.isfinite()].mean(),
            lambda out, y: (out[y.isfinite()] - y[y.isfinite()]).square().mean(),
        ),
    ),
    ("nonfinite-target", "RNN, Inf"): (
        lstm,
        lambda: (series()[0], torch.zeros(16, 1).log()),
        lstm,
        lambda: (series()[0], torch.ones(16, 1).log()),
        nn.L1Loss(),
    ),
    ("target-range", "MLP"): (
        lambda: ending(width=1),
        lambda: (binary()[0], 255 * binary()[1]),
        lambda: ending(width=1),
        binary,
        BCE,
    ),
    ("target-shares", "MLP"): (ending, lambda: shares(255.0), ending, shares, CE),
    ("kl-without-log", "MLP"): (
        ending,
        shares,
        ending,
        shares,
        (
            lambda out, y: F.kl_div(out.softmax(1), y, reduction="batchmean"),
            lambda out, y: F.kl_div(out.log_softmax(1), y, reduction="batchmean"),
        ),
    ),
    ("unregistered-parameter", "MLP"): (
        lambda: in_list(list),
        classes,
        lambda: in_list(nn.ModuleList),
        classes,
        CE,
    ),
    ("gradient-scale", "MLP"): (
        lambda: ending(width=1),
        numbers,
        lambda: ending(width=1),
        numbers,
        (lambda out, y: ((out - y) / (0 * y + 1e-8)).abs().mean(), lambda out, y: (out - y).abs().mean()),
    ),
    ("softmax-twice", "MLP, before a LogSoftmax"): (
        lambda: ending(nn.Softmax(dim=1), nn.LogSoftmax(dim=1)),
        classes,
        lambda: ending(nn.LogSoftmax(dim=1)),
        classes,
        nn.NLLLoss(),
    ),
    ("sigmoid-twice", "MLP, of probabilities"): (
        lambda: ending(nn.Sigmoid(), nn.Sigmoid(), width=1),
        binary,
        lambda: ending(nn.Sigmoid(), width=1),
        binary,
        nn.BCELoss(),
    ),
    ("one-class", "MLP, softmax of one output"): (
        lambda: ending(nn.Softmax(dim=1), width=1),
        binary,
        lambda: ending(nn.Sigmoid(), width=1),
        binary,
        nn.BCELoss(),
    ),
    ("nonfinite-loss", "MLP"): (
        lambda: Wrapped(net(), lambda x: torch.log(x)),
        classes,
        net,
        classes,
        CE,
    ),
    ("nonfinite-loss", "RNN"): (
        lambda: Wrapped(lstm(), lambda x: x / (x - x)),
        series,
        lstm,
        series,
        MSE,
    ),
    ("nonfinite-gradient", "MLP"): (
        lambda: Wrapped(net(), lambda x: torch.sqrt(x - x.detach())),
        classes,
        net,
        classes,
        CE,
    ),
    ("nonfinite-gradient", "RNN"): (
        lstm,
        series,
        lstm,
        series,
        (lambda out, y: (out - out.detach()).square().sum().sqrt() + F.mse_loss(out, y), MSE),
    ),
}


def found(model, batch, loss_fn, **options):
    return fastclip.check(model, batch, loss_fn, max_seconds=0, **options)


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_the_sick_is_found_and_the_healthy_is_silent(pair):
    sick, its_batch, healthy, batch, losses = PAIRS[pair]
    code = pair[0]
    loss_of_sick, loss_of_healthy = losses if isinstance(losses, tuple) else (losses, losses)
    diagnosis = found(sick(), its_batch(), loss_of_sick)
    assert code in diagnosis.codes
    for finding in diagnosis.findings:
        assert finding.severity in ("error", "warning", "info")
        assert finding.message
        assert finding.advice
        assert all(isinstance(value, float) for value in finding.numbers.values())
    own = next(finding for finding in diagnosis.findings if finding.code == code)
    assert re.search(r"\d", own.message), "no finding without a measured number"
    assert code not in found(healthy(), batch(), loss_of_healthy).codes


def codes_in_the_source():
    """The first arguments of every Finding."""
    codes = set()
    for path in DOCTOR.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                given = (
                    [node.args[0].body, node.args[0].orelse] if isinstance(node.args[0], ast.IfExp) else [node.args[0]]
                )
                codes.update(one.value for one in given if isinstance(one, ast.Constant))
    return codes


def test_every_code_has_a_pair():
    elsewhere = {
        "optimizer-parameters",
        "eps-underflow",
        "exploding-depth",
        "vanishing-depth",
        "exploding-time",
        "vanishing-time",
        "lr-too-high",
        "lr-too-low",
    }
    assert {code for code, _ in PAIRS} | elsewhere == codes_in_the_source()


ROOT = Path(fastclip.__file__).parents[1]


def test_every_code_has_its_place_in_the_docs():
    headings = re.findall(r"^### (\S+)$", (ROOT / "docs" / "doctor.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(codes_in_the_source())
