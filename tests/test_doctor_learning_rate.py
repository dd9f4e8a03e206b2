"""Learning rates: far too high and far too low are told, what is usual isn't."""

import math

import pytest
import torch
from patients import Sequence, Transformer, classes, mlp, series, tokens
from torch import nn

import fastclip

MODELS = {
    "MLP": (lambda: mlp(nn.ReLU, 2), classes, nn.CrossEntropyLoss()),
    "RNN": (lambda: Sequence(nn.LSTM(4, 16, batch_first=True)), lambda: series(6), nn.MSELoss()),
    "transformer": (lambda: Transformer(1), tokens, nn.CrossEntropyLoss()),
}
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, 100.0, 1e-3, 1e-9),
    "SGD": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), 1e4, 0.01, 1e-9),
    "wrapped": (lambda p, lr: fastclip.ClippedOptimizer(torch.optim.Adam(p, lr=lr), max_norm=1.0), 100.0, 1e-3, 1e-9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("case", MODELS)
def test_too_high_and_too_low_are_told(case, kind):
    (make, batch, loss_fn), (optimizer, high, usual, low) = MODELS[case], OPTIMIZERS[kind]
    for lr, code in ((high, "lr-too-high"), (usual, None), (low, "lr-too-low")):
        model = make()
        diagnosis = fastclip.check(model, batch(), loss_fn, optimizer(model.parameters(), lr))
        told = {c for c in diagnosis.codes if c.startswith("lr-")}
        assert told == ({code} if code else set()), lr
        assert diagnosis.lr.used == lr
        assert low < diagnosis.lr.suggested < high


def test_the_rate_of_a_warmup_from_0_is_the_one_that_it_warms_up_to():
    for lr, codes in ((1e-3, set()), (100.0, {"lr-too-high"})):
        model = mlp(nn.ReLU, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
        diagnosis = fastclip.check(model, classes(), nn.CrossEntropyLoss(), optimizer)
        assert {code for code in diagnosis.codes if code.startswith("lr-")} == codes
        assert diagnosis.lr.used == lr


def test_a_group_that_stands_still_is_not_the_one_to_judge_by():
    model = mlp(nn.ReLU, 2)
    first, *others = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.0}, {"params": others, "lr": 1e-3}])
    diagnosis = fastclip.check(model, classes(), nn.CrossEntropyLoss(), optimizer)
    assert diagnosis.lr.used == 1e-3
    assert not any(code.startswith("lr-") for code in diagnosis.codes)


def test_what_is_maximized_has_no_loss_to_judge_by():
    model, (x, _) = mlp(nn.ReLU, 2), classes()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, maximize=True)
    diagnosis = fastclip.check(model, step=lambda m: m(x).mean(), optimizer=optimizer)
    assert diagnosis.lr is None
    assert any("maximizes" in note for note in diagnosis.notes)


def test_steps_are_made_inside_of_an_autocast_of_the_callers():
    """Which keeps the weights that it has cast until it ends."""
    model = mlp(nn.ReLU, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        diagnosis = fastclip.check(
            model, classes(), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=100.0)
        )
    assert "lr-too-high" in diagnosis.codes
    assert len(set(diagnosis.lr.losses)) > 5


def test_the_suggested_rate_brings_the_loss_down():
    diagnosis = fastclip.check(mlp(nn.ReLU, 2), classes(), nn.CrossEntropyLoss())
    assert diagnosis.trial.lr == diagnosis.lr.suggested
    assert diagnosis.trial.losses[-1] < 0.8 * diagnosis.trial.losses[0]
    assert "as it is" not in str(diagnosis)


def test_the_rate_of_a_sick_model_is_called_that():
    sick = nn.Sequential(mlp(nn.ReLU, 2), nn.Softmax(dim=1))
    diagnosis = fastclip.check(sick, classes(), nn.CrossEntropyLoss())
    assert diagnosis.codes == ("softmax-twice",)
    assert "a good start" in " ".join(str(diagnosis).split())
    assert "That is the model as it is: check again when it is cured." in " ".join(str(diagnosis).split())


def test_the_settings_of_the_groups_are_the_users():
    """The learning rates of the groups keep their ratio, and their other settings count."""
    torch.manual_seed(0)
    model, batch = mlp(nn.ReLU, 1), classes()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    diagnosis = fastclip.check(model, batch, nn.CrossEntropyLoss(), optimizer)
    reference = mlp(nn.ReLU, 1)
    reference.load_state_dict(model.state_dict())
    own = torch.optim.SGD(reference[0].parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for expected in diagnosis.trial.losses:
        loss = nn.functional.cross_entropy(reference(batch[0]), batch[1])
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        own.zero_grad()
        loss.backward()
        own.step()


@pytest.mark.parametrize("guard", [fastclip.ClippedOptimizer, fastclip.attach])
def test_a_clipped_optimizer_is_tried_clipped(guard):
    torch.manual_seed(0)
    model, batch = mlp(nn.ReLU, 1), classes()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    policy = fastclip.policies.Chain(fastclip.policies.ZScore(warmup=2), fastclip.policies.GlobalNorm(1e-4))
    reports = guard(optimizer, policy=policy, l2=1e-3)
    diagnosis = fastclip.check(
        model, batch, nn.CrossEntropyLoss(), reports if isinstance(reports, torch.optim.Optimizer) else optimizer
    )
    assert "lr-too-high" not in diagnosis.codes
    assert diagnosis.lr.optimizer == "clipped SGD"
    assert int(policy.policies[0].count) == int(reports.steps) == 0, "the user's own rule has learned from it"
    own = optimizer if guard is fastclip.attach else reports
    for expected in diagnosis.trial.losses:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        own.zero_grad()
        loss.backward()
        own.step()


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS finds its steps by itself"),
        (lambda p: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), "none of the model's parameters"),
    ],
)
def test_what_cant_be_tried_is_said(optimizer, why):
    model = mlp(nn.ReLU, 1)
    diagnosis = fastclip.check(model, classes(), nn.CrossEntropyLoss(), optimizer(model.parameters()))
    assert diagnosis.lr is None
    assert any(why in note for note in diagnosis.notes)


def test_an_optimizer_that_cant_be_made_again_is_said():
    class Fussy(torch.optim.SGD):
        def __init__(self, params, lr, *, secret):
            super().__init__(params, lr)

    model = mlp(nn.ReLU, 1)
    optimizer = Fussy(model.parameters(), 0.1, secret=1)
    diagnosis = fastclip.check(model, classes(), nn.CrossEntropyLoss(), optimizer)
    assert diagnosis.lr is None
    assert any("making a Fussy like the one in use failed" in note for note in diagnosis.notes)


def test_no_time_is_said():
    diagnosis = fastclip.check(mlp(nn.ReLU, 1), classes(), nn.CrossEntropyLoss(), max_seconds=1e-9)
    assert diagnosis.lr is None
    assert any("seconds were over" in note for note in diagnosis.notes)


def test_a_range_test_that_had_no_time_for_all_suggests_nothing_it_hasnt_seen(monkeypatch):
    """Each pass takes a second by the clock: the range test ends while the loss still falls, the trial has its time."""
    from fastclip.doctor import learning_rate

    clock = iter(range(1000))
    monkeypatch.setattr(learning_rate.time, "monotonic", lambda: float(next(clock)))
    model = mlp(nn.ReLU, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnosis = fastclip.check(model, classes(), nn.CrossEntropyLoss(), optimizer, max_seconds=50)
    assert len(diagnosis.lr.lrs) == 30
    assert math.isnan(diagnosis.lr.suggested)
    assert "the loss still falls" in str(diagnosis)
    assert len(diagnosis.trial.losses) > 10
    assert any("50 seconds were over" in note for note in diagnosis.notes)


class Scripted(nn.Module):
    """Its losses are given: one for each time that it is called."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("losses", torch.tensor(losses))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.losses[self.at.clamp_max(len(self.losses) - 1)] + 0.0 * self.weight.sum()
        self.at += 1
        return loss


@pytest.mark.parametrize(
    ("losses", "too_high", "said"),
    [
        ([1.0, 1.5, 6.0, 2.0, 0.5], False, ""),  # a spike at the start that a momentum takes back
        ([1.0, 1.5, 6.0, 2.0, 1.25], True, "from 1 to 1.25 in 19 steps, by way of 6"),  # stuck, as dead units are
        ([1.0, 3.0, 9.0, 50.0], True, "from 1 to 50 in 19 steps;"),
        ([1.0, 3.0, math.nan], True, "from 1 to nan in 2 steps"),
        ([1.0, 3.0, 3.5], False, ""),
    ],
)
def test_a_rate_is_judged_by_where_its_steps_end(losses: list[float], too_high: bool, said: str):
    model = Scripted(losses)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnosis = fastclip.check(model, optimizer=optimizer, step=lambda model: model(torch.zeros(1)))
    assert ("lr-too-high" in diagnosis.codes) == too_high
    assert said in " ".join(str(diagnosis).split())


@pytest.mark.parametrize("lr", [None, 1e-5])
def test_a_loss_without_a_lower_bound_suggests_no_rate(lr: float | None):
    """A critic's: the larger the rate, the lower."""
    critic, (real, _) = mlp(nn.ReLU, 1), classes()
    made = torch.randn(64, 32)
    optimizer = None if lr is None else torch.optim.Adam(critic.parameters(), lr=lr)
    diagnosis = fastclip.check(
        critic, optimizer=optimizer, step=lambda critic: critic(made).mean() - critic(real + 1).mean()
    )
    assert diagnosis.lr.endless
    assert math.isnan(diagnosis.lr.suggested)
    assert diagnosis.healthy, diagnosis
    assert "falls without end" in " ".join(str(diagnosis).split())


@pytest.mark.parametrize("seed", range(5))
def test_the_noise_of_a_dropout_is_no_fall(monkeypatch, seed: int):
    """The time is over before the rates are large enough to bring the loss down."""
    from fastclip.doctor import learning_rate

    torch.manual_seed(seed)
    clock = iter(range(1000))
    monkeypatch.setattr(learning_rate.time, "monotonic", lambda: float(next(clock)))
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3))
    diagnosis = fastclip.check(model, classes(), nn.CrossEntropyLoss(), max_seconds=20)
    assert len(diagnosis.lr.lrs) == 12
    assert math.isnan(diagnosis.lr.suggested)
    assert fastclip.check(model, classes(), nn.CrossEntropyLoss(), max_seconds=1000).lr.suggested > 1e-4


def test_a_loss_that_falls_below_zero_has_not_diverged():
    model, (x, _) = mlp(nn.Tanh, 1), classes()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    diagnosis = fastclip.check(model, optimizer=optimizer, step=lambda model: model(x).tanh().mean())
    assert diagnosis.trial.losses[-1] < 0
    assert "lr-too-high" not in diagnosis.codes
    assert math.isfinite(diagnosis.lr.suggested)


def test_a_loss_that_never_moves_is_not_said_to_fall():
    x, y = torch.randn(16, 32), torch.zeros(16, dtype=torch.long)
    diagnosis = fastclip.check(nn.Linear(32, 1), (x, y), nn.CrossEntropyLoss())
    assert set(diagnosis.lr.losses) == {0.0}
    assert "the loss hardly fell" in str(diagnosis)
