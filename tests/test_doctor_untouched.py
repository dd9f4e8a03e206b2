"""A check changes nothing, whatever the model is, and also when it raises in the middle."""

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patients import Sequence, Transformer, mlp, series, tokens
from torch import nn

import fastclip


class Stateful(nn.Module):
    """Writes to everything that a forward pass can write to."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop, self.calls, self.history, self.seen = nn.Dropout(), 0, [], {"last": None}
        self.register_buffer("mean", torch.zeros(8))
        self.plain = torch.zeros(3)
        self.hidden = None

    def forward(self, x):
        self.calls += 1
        self.history.append(float(x.detach().mean()))
        self.seen["last"] = x
        self.mean.mul_(0.9).add_(x.detach().mean(0))
        self.plain += 1
        self.hidden = self.drop(self.norm(self.a(x)))
        x = self.hidden + random.random() + np.random.rand()  # noqa: NPY002
        return self.b(x)


def test_tensors_that_begin_at_one_address():
    """In storages of their own, as torch.from_numpy gives them: one is a part of the other."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            rows = np.random.default_rng(0).normal(size=(64, 16)).astype("float32")
            self.a, self.b = nn.Parameter(torch.from_numpy(rows[:8])), nn.Parameter(torch.from_numpy(rows))
            self.out = nn.Linear(72, 3)

        def forward(self, x):
            return self.out(torch.cat([x @ self.a.T, x @ self.b.T], 1))

    model, batch, loss_fn = Views(), (torch.randn(40, 16), torch.randint(3, (40,))), nn.CrossEntropyLoss()
    diagnosis = fastclip.check(model, batch, loss_fn, max_seconds=0)
    assert diagnosis.loss == pytest.approx(float(loss_fn(model(batch[0]), batch[1]).detach()))


def tied():
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False))
    model[2].weight = model[0].weight
    return model


def frozen():
    model = mlp(nn.ReLU, 3, width=8)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model[2].eval()
    return model


def normed():
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.Linear(8, 3),
    )


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 3))


def uncopied():
    """A module that can't be deep-copied: it holds a tensor with a graph."""
    model = mlp(nn.Tanh, 1, width=8)
    model.kept = model[0].weight * 2
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    return model


def rows(width=8):
    return torch.randn(16, width), torch.randint(3, (16,))


CASES = {
    "stateful": (Stateful, rows, nn.CrossEntropyLoss()),
    "tied": (tied, lambda: (torch.randint(11, (40,)), torch.randint(11, (40,))), nn.CrossEntropyLoss()),
    "partly frozen": (frozen, rows, nn.CrossEntropyLoss()),
    "parametrized": (normed, rows, nn.CrossEntropyLoss()),
    "old weight_norm": (old_weight_norm, rows, nn.CrossEntropyLoss()),
    "can't be copied": (uncopied, rows, nn.CrossEntropyLoss()),
    "lstm": (lambda: Sequence(nn.LSTM(4, 8, batch_first=True)), series, nn.MSELoss()),
    "transformer": (lambda: Transformer(1), tokens, nn.CrossEntropyLoss()),
    "half": (
        lambda: mlp(nn.ReLU, 1, width=8).bfloat16(),
        lambda: (rows()[0].bfloat16(), rows()[1]),
        nn.CrossEntropyLoss(),
    ),
}


def everything(model, optimizer):
    """All that must be the same afterwards, with identities."""

    def held(value):
        if isinstance(value, torch.Tensor):
            return id(value), value.data_ptr(), value._version, value.detach().clone()
        if isinstance(value, (list, dict, set)):
            return id(value), repr(value)
        return id(value)

    state = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            state[f"{name}.{key}"] = held(value)
        state[f"{name} hooks"] = repr(module._forward_hooks) + repr(module._forward_pre_hooks)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = held(tensor)
        state[f"{name} grad"] = None if tensor.grad is None else held(tensor.grad)
        state[f"{name} flag"] = tensor.requires_grad
    if optimizer is not None:
        state["optimizer"] = copy.deepcopy(optimizer.state_dict())
        state["optimizer held"] = id(optimizer.state), [id(g) for g in optimizer.param_groups]
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002
    state["rng"] = torch.get_rng_state(), legacy, random.getstate()
    state["torch"] = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
    state["torch"] += (torch.is_anomaly_enabled(), torch.get_num_threads())
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or (a.isnan().any() and torch.equal(a.nan_to_num(), b.nan_to_num()))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same(before, after):
    for key in before.keys() | after.keys():
        assert key in before, key
        assert key in after, key
        assert same(before[key], after[key]), key


def trained(model, batch, loss_fn):
    """With an optimizer that has a state, and gradients in some of the parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_fn(model(batch[0]), batch[1]).backward()
    optimizer.step()
    next(p for p in model.parameters() if p.requires_grad).grad = None
    return optimizer


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_changed(case):
    make, batch, loss_fn = CASES[case]
    model, batch = make(), batch()
    optimizer = trained(model, batch, loss_fn)
    before, inputs = everything(model, optimizer), copy.deepcopy(batch)
    diagnosis = fastclip.check(model, batch, loss_fn, optimizer)
    assert diagnosis.trial is not None
    assert len(diagnosis.trial.losses) > 1
    assert_same(before, everything(model, optimizer))
    assert same(inputs, batch)


@given(
    at=st.integers(1, 90),
    mode=st.sampled_from(["train", "eval", "mixed"]),
    kind=st.sampled_from(["forward", "backward", "interrupt"]),
)
def test_nothing_is_changed_when_it_raises(at, mode, kind):
    """In whatever pass it happens: 1 observes, then come those of the learning rates."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("on the way back")

    model, batch = Stateful(), rows()
    optimizer = trained(model, batch, nn.CrossEntropyLoss())
    model.train(mode != "eval")
    model.norm.train(mode == "train")
    passes = 0

    def step(model):
        nonlocal passes
        passes += 1
        out = model(batch[0])
        if passes == at:
            torch.set_default_dtype(torch.float64)
            if kind == "interrupt":
                raise KeyboardInterrupt
            if kind == "forward":
                raise ValueError("on the way there")
            out = Fails.apply(out)
        return nn.functional.cross_entropy(out, batch[1])

    before = everything(model, optimizer)
    said = "on the way"
    try:
        fastclip.check(model, optimizer=optimizer, step=step)
    except KeyboardInterrupt:
        assert kind == "interrupt"
    except fastclip.DoctorError as error:
        said = str(error)
    assert passes <= at or at == 1  # a failure while learning rates are tried ends only that
    assert "on the way" in said
    assert_same(before, everything(model, optimizer))


def test_a_graph_that_is_still_needed_survives():
    model, batch = mlp(nn.ReLU, 2, width=8), rows()
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    fastclip.check(model, batch, nn.CrossEntropyLoss())
    loss.backward()  # raises if a parameter counts as written to


def test_the_same_check_says_the_same_twice():
    model, batch = Stateful(), rows()
    first, again = (fastclip.check(model, batch, nn.CrossEntropyLoss()) for _ in range(2))
    assert first.to_json() == again.to_json()


def test_hooks_of_the_user_and_his_wrapped_optimizer_stay():
    model, batch = mlp(nn.ReLU, 1, width=8), rows()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[0].weight.register_post_accumulate_grad_hook(lambda _: pytest.fail("nothing is accumulated"))
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), max_norm=1.0)
    diagnosis = fastclip.check(model, batch, nn.CrossEntropyLoss(), optimizer)
    assert diagnosis.lr.optimizer == "clipped SGD"
    assert calls
    assert int(optimizer.steps) == 0
    assert not optimizer.state
    assert len(model[0]._forward_hooks) == 1


def test_no_memory_for_the_copies_leaves_all_as_it_was(monkeypatch):
    model, batch = Stateful(), rows()
    optimizer = trained(model, batch, nn.CrossEntropyLoss())
    before = everything(model, optimizer)

    def fails(tensors):
        raise MemoryError

    monkeypatch.setattr("fastclip.doctor.untouched._copies", fails)
    with pytest.raises(MemoryError):
        fastclip.check(model, batch, nn.CrossEntropyLoss(), optimizer)
    assert_same(before, everything(model, optimizer))


def test_memory_that_is_shared_stays_shared():
    """Two views of one memory are two views of one copy: what a pass writes to the one, it reads from the other."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            flat = torch.ones(12)
            self.a, self.b = nn.Parameter(flat[:8]), nn.Parameter(flat[4:])
            self.seen = []

        def forward(self, x):
            with torch.no_grad():
                self.a[4:].fill_(2.0)
            assert self.b[0] == 2.0
            return (x * self.a).sum() + self.b.sum()

    model = Views()
    fastclip.check(model, step=lambda model: model(torch.randn(8)), max_seconds=0)
    assert model.a.untyped_storage().data_ptr() == model.b.untyped_storage().data_ptr()
    assert torch.equal(model.a, torch.ones(8))
