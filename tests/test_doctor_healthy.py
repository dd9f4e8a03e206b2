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


class Residual(nn.Module):
    """A block that begins as nothing: the last normalisation's factors are 0, or its own one is (ReZero)."""

    def __init__(self, with_norm: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.norm = nn.LayerNorm(32) if with_norm else nn.Identity()
        self.alpha = nn.Parameter(torch.ones(()) if with_norm else torch.zeros(()))
        if with_norm:
            nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.alpha * self.norm(self.inner(x))


class LowRank(nn.Module):
    """What is trained beside a frozen layer, whose second matrix starts at 0."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.a = layer.requires_grad_(False), nn.Linear(32, 4, bias=False)
        self.b = nn.Linear(4, 3, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.b(self.a(x))


HELD_BACK = {
    "zero norm": lambda: nn.Sequential(Residual(True), Residual(True), nn.Linear(32, 3)),
    "ReZero": lambda: nn.Sequential(Residual(False), nn.Linear(32, 3)),
    "low rank": lambda: LowRank(nn.Linear(32, 3)),
}

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


class ActorCritic(nn.Module):
    """A policy that starts near uniform, as is usual in reinforcement learning, and after it a value."""

    def __init__(self, small: str) -> None:
        super().__init__()
        self.body, self.middle = nn.Linear(32, 64), nn.Linear(64, 64)
        self.policy, self.value = nn.Linear(64, 3), nn.Linear(64, 1)
        with torch.no_grad():
            self.get_submodule(small).weight.mul_(0.01)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.middle(torch.tanh(self.body(x))))
        return self.policy(h), self.value(h)


@pytest.mark.parametrize(("small", "told"), [("policy", False), ("value", False), ("middle", True)])
def test_a_small_head_is_not_told_wherever_it_is_called(small, told):
    torch.manual_seed(0)
    (x, y), returns = classes(), torch.randn(64, 1)

    def step(model):
        logits, value = model(x)
        return nn.functional.cross_entropy(logits, y) + nn.functional.mse_loss(value, returns)

    diagnosis = fastclip.check(ActorCritic(small), step=step, max_seconds=0)
    assert ("init-too-small" in diagnosis.codes) == told, diagnosis


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm, lambda width: nn.GroupNorm(4, width)])
def test_what_is_normalised_next_may_be_small(norm):
    torch.manual_seed(0)
    small = nn.Linear(32, 32)
    nn.init.normal_(small.weight, std=1e-3)
    normed = nn.Sequential(small, norm(32), nn.ReLU(), nn.Linear(32, 3))
    assert fastclip.check(normed, classes(), nn.CrossEntropyLoss(), max_seconds=0).healthy
    bare = nn.Sequential(small, nn.ReLU(), nn.Linear(32, 3))
    assert "init-too-small" in fastclip.check(bare, classes(), nn.CrossEntropyLoss(), max_seconds=0).codes


@pytest.mark.parametrize("max_seconds", [30, 0])
@pytest.mark.parametrize("case", HELD_BACK)
def test_what_starts_at_0_holds_back_for_one_step_only(case, max_seconds):
    torch.manual_seed(0)
    diagnosis = fastclip.check(HELD_BACK[case](), classes(), nn.CrossEntropyLoss(), max_seconds=max_seconds)
    (finding,) = [finding for finding in diagnosis.findings if finding.code == "zero-gradient"]
    assert finding.severity == "info", diagnosis
    assert "from the second step on" in finding.advice


def test_beside_what_starts_at_0_dead_units_are_told():
    """And only they: the block gets its gradient in the second step."""
    torch.manual_seed(0)
    dead = nn.Linear(32, 16)
    nn.init.constant_(dead.bias, -1e3)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.dead, self.head, self.other = Residual(True), dead, nn.Linear(32, 3), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.block(x)) + self.other(torch.relu(self.dead(x)))

    model = Both()
    diagnosis = fastclip.check(model, classes(), nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01))
    (finding,) = [finding for finding in diagnosis.findings if finding.code == "zero-gradient"]
    assert finding.severity == "warning"
    assert set(finding.where) == {"dead.weight", "dead.bias", "other.weight"}
