"""The optimizer wrapper's plain path: what clip-then-step does, in one object."""

import copy
import math
import pickle

import pytest
import torch

import fastclip
from fastclip import ClippedOptimizer

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adam-loop": lambda p: torch.optim.Adam(p, lr=0.05, foreach=False),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
}


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def backward(model, step, scale=100.0, factor=1.0, run=True):
    """The loss of one batch; ``run`` its backward too."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(8, 5, generator=generator).to(next(model.parameters()).dtype)
    loss = (model(batch) ** 2).mean() * scale * factor
    if run:
        loss.backward()
    return loss


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def poison(model, value=math.nan):
    next(model.parameters()).grad.view(-1)[3] = value


def identical(a, b):
    """Whether two state dicts, or whatever is in them, are bitwise the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_equals_clip_then_step(name, with_closure):
    reference, wrapped = small_model(), small_model()
    plain, inner = OPTIMIZERS[name](reference.parameters()), OPTIMIZERS[name](wrapped.parameters())
    opt = ClippedOptimizer(inner, max_norm=0.5)
    # a fused step divides by the coefficient's inverse where clipping multiplies: one rounding apart
    close = {"rtol": 1e-5, "atol": 1e-6} if "fused" in name else {"rtol": 0, "atol": 0}
    for step in range(10):
        plain.zero_grad()
        expected = backward(reference, step)
        norm = fastclip.clip_grad_norm_(reference.parameters(), 0.5)
        plain.step()
        if with_closure:

            def closure(step=step):
                assert torch.is_grad_enabled()
                opt.zero_grad()
                return backward(wrapped, step)

            torch.testing.assert_close(opt.step(closure=closure), expected, **close)
        else:
            opt.zero_grad()
            backward(wrapped, step)
            opt.step()
        torch.testing.assert_close(opt.last_norm, norm, **close)
        torch.testing.assert_close(flat(wrapped), flat(reference), **close)
    assert (opt.steps, opt.clipped_steps, opt.skipped_steps) == (10, 10, 0)


def test_lbfgs_clips_every_evaluation():
    reference, wrapped = small_model(), small_model()
    plain = torch.optim.LBFGS(reference.parameters(), lr=0.1, max_iter=5)
    opt = ClippedOptimizer(torch.optim.LBFGS(wrapped.parameters(), lr=0.1, max_iter=5), max_norm=0.5)

    def clipped():
        plain.zero_grad()
        loss = backward(reference, 0)
        fastclip.clip_grad_norm_(reference.parameters(), 0.5)
        return loss

    def bare():
        opt.zero_grad()
        return backward(wrapped, 0)

    for _ in range(3):
        assert torch.equal(opt.step(bare), plain.step(clipped))
        assert torch.equal(flat(wrapped), flat(reference))
    assert opt.clipped_steps == opt.steps > 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_does_not_happen(name, bad):
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(OPTIMIZERS[name](model.parameters()), max_norm=1.0)
    other = ClippedOptimizer(OPTIMIZERS[name](twin.parameters()), max_norm=1.0)
    for step in range(6):
        opt.zero_grad()
        backward(model, step)
        if step == 3:
            poison(model, bad)
            before, state = flat(model), copy.deepcopy(opt.state_dict())
            opt.step()
            assert torch.equal(flat(model), before)
            assert str(opt.state_dict()) == str(state)
            continue
        opt.step()
        other.zero_grad()
        backward(twin, step)
        other.step()
    assert opt.skipped_steps == 1
    assert torch.equal(flat(model), flat(twin))


def test_a_bad_first_step_leaves_no_state():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), max_norm=1.0)
    backward(model, 0)
    poison(model)
    opt.step()
    assert not opt.state


def test_raise_names_the_tensor_and_writes_nothing():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=1.0, nonfinite="raise")
    backward(model, 0)
    poison(model)
    before, grads = flat(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(
        fastclip.NonFiniteGradientError, match=r"param_groups\[0\]\['params'\]\[0\].*NaN at index \(0, 3\)"
    ):
        opt.step()
    assert torch.equal(flat(model), before)
    assert all(torch.equal(p.grad, g) or g.isnan().any() for p, g in zip(model.parameters(), grads, strict=True))


def test_zero_keeps_the_rest():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=1.0, nonfinite="zero")
    backward(model, 0)
    poison(model)
    opt.step()
    assert next(model.parameters()).grad.view(-1)[3] == 0
    assert flat(model).isfinite().all()
    assert opt.last_norm.isfinite()


def test_lbfgs_never_searches_on_a_bad_gradient():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5), max_norm=1.0)
    before = flat(model)

    def bad_at_once():
        opt.zero_grad()
        loss = backward(model, 0)
        poison(model)
        return loss

    opt.step(bad_at_once)
    assert opt.skipped_steps == 1
    assert torch.equal(flat(model), before)

    calls = []

    def bad_later():
        opt.zero_grad()
        loss = backward(model, 0)
        calls.append(loss)
        if len(calls) > 1:
            poison(model)
        return loss

    with pytest.raises(fastclip.NonFiniteGradientError):
        opt.step(bad_later)


def test_it_owns_nothing():
    model = small_model()
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    opt = ClippedOptimizer(inner)
    assert isinstance(opt, torch.optim.Optimizer)
    backward(model, 0)
    opt.step()
    inner.load_state_dict(inner.state_dict())  # rebinds the inner's lists
    assert opt.param_groups is inner.param_groups
    assert opt.state is inner.state
    assert opt.defaults is inner.defaults
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.05)
    groups = inner.param_groups
    opt.param_groups = groups[:1]
    assert inner.param_groups == groups[:1]
    extra = torch.nn.Parameter(torch.zeros(2))
    opt.add_param_group({"params": [extra]})
    extra.grad = torch.full((2,), 1e6)
    opt.step()
    assert opt.last_norm > 1e6


def test_state_dict_is_the_optimizers_own():
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1))
    plain = torch.optim.Adam(twin.parameters(), lr=0.3)
    backward(model, 0)
    opt.step()
    plain.load_state_dict(opt.state_dict())
    assert plain.param_groups[0]["lr"] == 0.1
    opt.load_state_dict(state_dict=plain.state_dict())
    assert str(opt.state_dict()) == str(plain.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_still_clip(copied):
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), max_norm=1e-3)
    torch.optim.lr_scheduler.StepLR(opt, 1)  # replaces opt.step on the instance
    model, opt = copied((model, opt))
    before = flat(model)
    backward(model, 0)
    opt.step()
    assert (flat(model) - before).norm() == pytest.approx(1e-3, rel=1e-3)
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_hooks_run_once_and_see_unclipped_gradients():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=1e-3)
    seen = []
    opt.register_step_pre_hook(
        lambda o, a, k: seen.append(fastclip.get_total_norm([p.grad for p in model.parameters()]))
    )
    opt.register_step_post_hook(lambda o, a, k: seen.append("post"))
    backward(model, 0)
    opt.step()
    assert len(seen) == 2
    assert seen[0] == opt.last_norm > 1e-3
    assert seen[1] == "post"


def test_grad_scaler_equals_the_unscaled_run():
    reference, wrapped = small_model(), small_model()
    plain = torch.optim.AdamW(reference.parameters(), lr=0.05)
    opt = ClippedOptimizer(torch.optim.AdamW(wrapped.parameters(), lr=0.05), max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(5):
        plain.zero_grad()
        opt.zero_grad()
        backward(reference, step)
        fastclip.clip_grad_norm_(reference.parameters(), 0.5)
        plain.step()
        generator = torch.Generator().manual_seed(step)
        loss = (wrapped(torch.randn(8, 5, generator=generator)) ** 2).mean() * 100.0
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        torch.testing.assert_close(flat(wrapped), flat(reference), rtol=0, atol=0)


def test_no_gradients_at_all():
    opt = ClippedOptimizer(torch.optim.Adam(small_model().parameters()))
    assert opt.step() is None
    assert opt.step(lambda: None) is None
    assert opt.last_norm is None
    assert opt.steps == 0


def test_max_norm_may_change():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), max_norm=1.0)
    opt.max_norm = 1e-4
    before = flat(model)
    backward(model, 0)
    opt.step()
    assert (flat(model) - before).norm() == pytest.approx(1e-4, rel=1e-2)
    with pytest.raises(ValueError, match="max_norm"):
        opt.max_norm = -1.0
    assert "max_norm=0.0001" in repr(opt)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": torch.nn.Linear(1, 1)}, TypeError, "optimizer.*Linear"),
        ({"max_norm": -1.0}, ValueError, "max_norm"),
        ({"max_norm": math.nan}, ValueError, "max_norm"),
        ({"max_norm": "big"}, TypeError, "max_norm"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite.*propagate, skip, zero, raise"),
        ({"norm_type": math.nan}, ValueError, "norm_type"),
    ],
)
def test_bad_arguments(arguments, error, message):
    inner = torch.optim.SGD(small_model().parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        ClippedOptimizer(**{"optimizer": inner, **arguments})
