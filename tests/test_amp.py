"""Loss scaling, the riders of torch's fused steps, and the road where the host can't see values without waiting."""

import copy
import math
import sys

import gpu
import pytest
import torch
from test_optim import backward, flat, identical, poison, small_model

import fastclip
import fastclip.clipping
import fastclip.guard
import fastclip.policies
import fastclip.record
import fastclip.riding
from fastclip import ClippedOptimizer
from fastclip.backends import EMULATED
from fastclip.riding import RIDERS


class Lion(torch.optim.Optimizer):
    """An optimizer that isn't torch's: it knows nothing of scalers and riders."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p.sub_(torch.sign(mean.lerp_(p.grad, 0.1)) * group["lr"] + p.grad * 1e-3)


INNERS = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adam-fused-amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, fused=True, amsgrad=True, maximize=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "loop": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False),
    "foreign": Lion,
}
FUSED = [name for name in INNERS if "fused" in name]
SCALERS = {"torch": torch.amp.GradScaler, "fastclip": fastclip.GradScaler}
every_inner = pytest.mark.parametrize("name", INNERS)
every_fused = pytest.mark.parametrize("name", FUSED)
every_scaler = pytest.mark.parametrize("kind", SCALERS)


def scaler_of(kind, scale=1024.0, **settings):
    return SCALERS[kind]("cpu", init_scale=scale, growth_interval=1000, **settings)


def tolerance(name, active=True):
    """A fused step divides by the inverse of the coefficient, one rounding apart; all else is bitwise."""
    return {"rtol": 1e-5, "atol": 1e-6} if "fused" in name and active else {"rtol": 0, "atol": 0}


def grads(model):
    return [p.grad.clone() for p in model.parameters()]


def reference_step(model, plain, step, max_norm=0.5, **rule):
    """Clip, then step: what every guarded step has to equal."""
    plain.zero_grad()
    backward(model, step)
    norm = fastclip.clip_grad_norm_(model.parameters(), max_norm, **rule)
    plain.step()
    return norm


def scaled_backward(model, opt, scaler, step, factor=1.0):
    opt.zero_grad()
    scaler.scale(backward(model, step, factor=factor, run=False)).backward()


def clean(*optimizers):
    """Nothing of a scaler is left behind."""
    return not any(name in vars(optimizer) for optimizer in optimizers for name in RIDERS)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@every_scaler
@every_inner
def test_a_scaled_run_equals_the_unscaled_one(name, kind, max_norm, unscale):
    """Steps on scaled gradients, or a norm of them, would show at once: the scale is 1024."""
    model, twin = small_model(), small_model()
    opt, plain = ClippedOptimizer(INNERS[name](model.parameters()), max_norm), INNERS[name](twin.parameters())
    scaler, close = scaler_of(kind), tolerance(name, max_norm < 1.0)
    for step in range(5):
        norm = reference_step(twin, plain, step, max_norm)
        scaled_backward(model, opt, scaler, step)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        torch.testing.assert_close(opt.last_norm, norm, **close)
        torch.testing.assert_close(grads(model), grads(twin), **close)
        torch.testing.assert_close(flat(model), flat(twin), **close)
        assert clean(opt, opt.inner)
    assert opt.clipped_steps == (5 if max_norm < 1.0 else 0)
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@every_scaler
@every_inner
def test_an_inf_loss_costs_one_step_and_half_the_scale(name, kind, unscale, attached):
    """Step 0 is bad too: whatever an optimizer makes at its first step must not hold NaN, or anything at all."""
    model, twin = small_model(), small_model()
    inner, plain = INNERS[name](model.parameters()), INNERS[name](twin.parameters())
    guard = fastclip.attach(inner, 0.5) if attached else ClippedOptimizer(inner, 0.5)
    opt = inner if attached else guard
    scaler, close = scaler_of(kind), tolerance(name)
    for step in range(5):
        bad = step in (0, 3)
        scaled_backward(model, opt, scaler, step, factor=math.inf if bad else 1.0)
        before, state, scale = flat(model), copy.deepcopy(opt.state_dict()), scaler.get_scale()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert clean(opt, inner)
        if bad:
            assert torch.equal(flat(model), before)
            assert identical(opt.state_dict(), state)
            assert scaler.get_scale() == scale / 2
        else:
            reference_step(twin, plain, step)
            torch.testing.assert_close(flat(model), flat(twin), **close)
    assert (guard.steps, guard.skipped_steps, guard.skipped_in_a_row) == (5, 2, 0)


@pytest.mark.parametrize("rule", ["propagate", "zero", "raise", "skip"])
@every_scaler
@pytest.mark.parametrize("name", ["adamw-fused", "foreach"])
def test_under_a_scaler_every_rule_skips(name, kind, rule):
    """A scaler searches for its scale by trial: an error on the way, or a zeroed gradient, would be wrong."""
    model = small_model()
    opt, scaler = ClippedOptimizer(INNERS[name](model.parameters()), 0.5, nonfinite=rule), scaler_of(kind)
    scaled_backward(model, opt, scaler, 0, factor=math.inf)
    before = flat(model)
    scaler.step(opt)
    scaler.update()
    assert torch.equal(flat(model), before)
    assert scaler.get_scale() == 512.0
    assert opt.skipped_steps == 1
    assert opt.last_stats.found_inf == 1
    opt.zero_grad()
    backward(model, 0)
    poison(model)
    if rule == "raise":  # the scaler's wish ends with its step
        with pytest.raises(fastclip.NonFiniteGradientError):
            opt.step()
    else:
        opt.step()
        assert opt.skipped_steps == (2 if rule == "skip" else 1)


@every_scaler
def test_two_optimizers_with_one_scaler(kind):
    models, twins = [small_model() for _ in range(2)], [small_model() for _ in range(2)]
    names = ["adamw-fused", "foreach"]
    opts = [ClippedOptimizer(INNERS[n](m.parameters()), 0.5) for n, m in zip(names, models, strict=True)]
    plains = [INNERS[n](m.parameters()) for n, m in zip(names, twins, strict=True)]
    scaler = scaler_of(kind)
    for step in range(4):
        for i in range(2):
            bad = step == 1 + i
            scaled_backward(models[i], opts[i], scaler, step, factor=math.inf if bad else 1.0)
            if not bad:
                reference_step(twins[i], plains[i], step)
        for opt in opts:
            scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 256.0
    for i in range(2):
        assert opts[i].skipped_steps == 1
        torch.testing.assert_close(flat(models[i]), flat(twins[i]), **tolerance(names[i]))


@every_scaler
@every_inner
def test_a_disabled_scaler(name, kind):
    model, twin = small_model(), small_model()
    opt, plain = ClippedOptimizer(INNERS[name](model.parameters()), 0.5), INNERS[name](twin.parameters())
    scaler = scaler_of(kind, enabled=False)
    for step in range(3):
        reference_step(twin, plain, step)
        scaled_backward(model, opt, scaler, step)
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    torch.testing.assert_close(flat(model), flat(twin), **tolerance(name))


def test_the_scalers_state_is_torchs():
    ours, theirs = (SCALERS[kind]("cpu", init_scale=64.0, growth_interval=2) for kind in ("fastclip", "torch"))
    seen = []
    for scaler in (ours, theirs):
        model = small_model()
        opt = ClippedOptimizer(INNERS["foreach"](model.parameters()), 0.5)
        seen.append([])
        for step in range(6):
            scaled_backward(model, opt, scaler, step, factor=math.inf if step == 3 else 1.0)
            scaler.step(opt)
            scaler.update()
            seen[-1].append(scaler.state_dict())
    assert seen[0] == seen[1]
    assert seen[0][2] != seen[0][3]
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == theirs.state_dict()
    assert ours.get_scale() == 128.0


@pytest.mark.parametrize("attached", [False, True])
@every_inner
def test_fastclips_scaler_makes_no_pass_of_its_own(name, attached, monkeypatch):
    """That read is all that it's for. An optimizer that nobody guards still gets it."""
    reads = []
    own_pass = torch.amp.GradScaler._unscale_grads_
    monkeypatch.setattr(torch.amp.GradScaler, "_unscale_grads_", lambda *a: reads.append(a) or own_pass(*a))
    model, twin = small_model(), small_model()
    inner, plain = INNERS[name](model.parameters()), INNERS[name](twin.parameters())
    scaler, others = scaler_of("fastclip"), scaler_of("torch")
    scaled_backward(model, inner, scaler, 0)
    scaler.step(inner)
    scaler.update()
    scaled_backward(twin, plain, others, 0)
    others.step(plain)
    others.update()
    assert len(reads) == 2
    assert torch.equal(flat(model), flat(twin))
    opt = inner if attached else ClippedOptimizer(inner)
    if attached:
        fastclip.attach(inner)
    for factor in (1.0, math.inf):
        scaled_backward(model, opt, scaler, 1, factor=factor)
        scaler.step(opt)
        scaler.update()
    assert len(reads) == 2
    assert scaler.get_scale() == 512.0


@every_scaler
@pytest.mark.parametrize("name", ["adamw-fused", "foreach", "foreign"])
def test_nested_wrappers_under_a_scaler(name, kind):
    """The tighter bound wins, the outer one hands on unscaled gradients, and both see a bad step or none."""
    model, twin = small_model(), small_model()
    plain = INNERS[name](twin.parameters())
    middle = ClippedOptimizer(INNERS[name](model.parameters()), 0.5)
    opt, scaler = ClippedOptimizer(middle, 20.0), scaler_of(kind)
    for step in range(4):
        bad = step == 1
        scaled_backward(model, opt, scaler, step, factor=math.inf if bad else 1.0)
        scaler.step(opt)
        scaler.update()
        if not bad:
            plain.zero_grad()
            backward(twin, step)
            fastclip.clip_grad_norm_(twin.parameters(), 20.0)
            fastclip.clip_grad_norm_(twin.parameters(), 0.5)
            plain.step()
        assert clean(opt, middle, middle.inner)
        torch.testing.assert_close(flat(model), flat(twin), **tolerance(name))
    assert opt.skipped_steps == 1
    assert opt.last_norm > 20.0
    assert middle.last_norm == pytest.approx(20.0, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_scaler
@pytest.mark.parametrize("name", ["adamw-fused", "foreach", "loop"])
def test_other_dtypes_under_a_scaler(name, kind, dtype):
    """float64 gradients can't ride: a rider is float32. (The CPU's fused SGD is wrong for bfloat16: not asked.)"""
    model, twin = small_model().to(dtype), small_model().to(dtype)
    opt, plain = ClippedOptimizer(INNERS[name](model.parameters()), 0.5), INNERS[name](twin.parameters())
    scaler = scaler_of(kind)
    rides = dtype != torch.float64 and "fused" in name
    for step in range(4):
        norm = reference_step(twin, plain, step)
        scaled_backward(model, opt, scaler, step)
        scaler.step(opt)
        scaler.update()
        close = {"rtol": 2e-2, "atol": 2e-2} if rides else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(flat(model), flat(twin), **close)
        assert opt.last_norm.dtype == norm.dtype


@every_scaler
@every_inner
def test_several_groups_under_a_scaler(name, kind):
    """Several coefficients can't ride as one: scaled in place, and the rest of the promise stands."""
    model, twin = small_model(), small_model()

    def split(m):
        return [{"params": [*m[0].parameters()]}, {"params": [*m[2].parameters()]}]

    groups = split(model)
    groups[1]["group_max_norm"] = 0.125
    opt, plain = ClippedOptimizer(INNERS[name](groups), 0.5), INNERS[name](split(twin))
    scaler = scaler_of(kind)
    for step in range(4):
        bad = step == 2
        scaled_backward(model, opt, scaler, step, factor=math.inf if bad else 1.0)
        scaler.step(opt)
        scaler.update()
        if not bad:
            plain.zero_grad()
            backward(twin, step)
            fastclip.clip_grad_norm_(twin[0].parameters(), 0.5)
            fastclip.clip_grad_norm_(twin[2].parameters(), 0.125)
            plain.step()
        assert torch.equal(flat(model), flat(twin))
    assert opt.skipped_steps == 1


@every_scaler
def test_no_gradients_under_a_scaler(kind):
    model, other = small_model(), small_model()
    opt, busy = (ClippedOptimizer(INNERS["adamw-fused"](m.parameters())) for m in (model, other))
    scaler = scaler_of(kind)
    scaled_backward(other, busy, scaler, 0)
    for each in (opt, busy):
        scaler.step(each)
    scaler.update()
    assert opt.steps == 0
    assert busy.steps == 1
    assert clean(opt, busy, opt.inner, busy.inner)


@pytest.mark.parametrize("depth", [1, 2])
@every_scaler
@every_inner
def test_unscaling_the_inner_and_stepping_the_wrapper_is_an_error(name, kind, depth):
    """Otherwise the gradients are divided twice, and training crawls on without a word."""
    model = small_model()
    inner = opt = INNERS[name](model.parameters())
    for _ in range(depth):
        opt = ClippedOptimizer(opt)
    scaler = scaler_of(kind)
    scaled_backward(model, opt, scaler, 0)
    scaler.unscale_(inner)
    before = flat(model)
    with pytest.raises(RuntimeError, match="Pass the wrapper to both"):
        scaler.step(opt)
    assert torch.equal(flat(model), before)
    assert clean(opt, inner)
    scaler.update()
    scaled_backward(model, opt, scaler, 0)
    scaler.unscale_(opt)
    scaler.step(opt)
    assert not torch.equal(flat(model), before)


class OldContract(Lion):
    """apex and TransformerEngine: the scaler comes as an argument of ``step``."""

    def step(self, closure=None, grad_scaler=None):
        assert grad_scaler is None
        return super().step(closure)


@pytest.mark.parametrize("attached", [False, True])
@every_scaler
def test_optimizers_of_the_older_contract(kind, attached):
    """They don't get the flag by which a scaler leaves the work to them: it unscales, and holds steps back itself."""
    model, twin = small_model(), small_model()
    inner, plain = OldContract(model.parameters()), OldContract(twin.parameters())
    opt = inner if attached else ClippedOptimizer(inner, 0.5)
    if attached:
        fastclip.attach(inner, 0.5)
    assert not getattr(opt, "_step_supports_amp_scaling", False)
    scaler = scaler_of(kind)
    for step in range(4):
        bad = step == 1
        scaled_backward(model, opt, scaler, step, factor=math.inf if bad else 1.0)
        scaler.step(opt)
        scaler.update()
        if not bad:
            reference_step(twin, plain, step)
        assert torch.equal(flat(model), flat(twin))
    assert scaler.get_scale() == 512.0


def test_the_wrapper_answers_for_itself_whether_it_takes_scaled_gradients():
    """The inner's answer is about the inner: a foreach AdamW says no, the wrapper around it unscales all the same."""
    for name, make in INNERS.items():
        inner = make(small_model().parameters())
        opt = ClippedOptimizer(inner)
        assert opt._step_supports_amp_scaling is True
        assert bool(getattr(inner, "_step_supports_amp_scaling", False)) == ("fused" in name)
        inner.grad_scale = torch.tensor(2.0)
        assert not hasattr(opt, "grad_scale")  # or a scaler would multiply by it a second time


@pytest.mark.parametrize("number", [8, torch.tensor(8.0), torch.tensor([8.0], dtype=torch.float64)])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("at", ["wrapper", "inner", "attached"])
@every_inner
def test_a_users_own_grad_scale(name, at, max_norm, number):
    """An official extension point of torch's fused optimizers; here it is honoured for all of them."""
    model, twin = small_model(), small_model()
    inner, plain = INNERS[name](model.parameters()), INNERS[name](twin.parameters())
    guard = fastclip.attach(inner, max_norm) if at == "attached" else ClippedOptimizer(inner, max_norm)
    opt, holder = (inner if at == "attached" else guard), (guard if at == "wrapper" else inner)
    holder.grad_scale = number
    for step in range(3):
        norm = reference_step(twin, plain, step, max_norm)
        opt.zero_grad()
        (backward(model, step, run=False) * 8).backward()
        opt.step()
        torch.testing.assert_close(flat(model), flat(twin), **tolerance(name, max_norm < 1.0))
        torch.testing.assert_close(guard.last_norm, norm, **tolerance(name))
        assert holder.grad_scale is number
    holder.found_inf = torch.tensor(1.0)
    before, state = flat(model), copy.deepcopy(opt.state_dict())
    opt.step()
    assert torch.equal(flat(model), before)
    assert identical(opt.state_dict(), state)
    assert guard.skipped_steps == 1
    del holder.found_inf
    del holder.grad_scale
    reference_step(twin, plain, 4, max_norm)
    opt.zero_grad()
    backward(model, 4)
    opt.step()
    torch.testing.assert_close(flat(model), flat(twin), **tolerance(name, max_norm < 1.0))


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("guarded", ["attached", "wrapped"])
@pytest.mark.parametrize("name", ["adamw-fused", "sgd-fused", "loop", "foreign"])
def test_riders_of_a_guarded_optimizer_in_a_wrapper(name, guarded, max_norm):
    """Divided once: neither by both guards nor by none; and its ``found_inf`` holds the step back."""
    model, twin = small_model(), small_model()
    inner, plain = INNERS[name](model.parameters()), INNERS[name](twin.parameters())
    if guarded == "attached":
        fastclip.attach(inner, 1e6)
        middle = inner
    else:
        middle = ClippedOptimizer(inner, 1e6)
    opt = ClippedOptimizer(middle, max_norm)
    middle.grad_scale = torch.tensor(8.0)
    for step in range(3):
        norm = reference_step(twin, plain, step, max_norm)
        opt.zero_grad()
        (backward(model, step, run=False) * 8).backward()
        opt.step()
        torch.testing.assert_close(opt.last_norm, norm, **tolerance(name))
        torch.testing.assert_close(flat(model), flat(twin), **tolerance(name, max_norm < 1.0))
    before, middle.found_inf = flat(model), 1.0
    opt.step()
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", [None, *SCALERS])
@every_inner
def test_scales_at_several_places_multiply(name, kind):
    """One on the wrapper, the user's or a scaler's, and one that somebody else has put on the inner optimizer."""
    model, twin = small_model(), small_model()
    opt, plain = ClippedOptimizer(INNERS[name](model.parameters()), 0.5), INNERS[name](twin.parameters())
    opt.inner.grad_scale = torch.tensor(8.0)
    scaler = scaler_of(kind or "torch", scale=4.0, enabled=kind is not None)
    for step in range(3):
        norm = reference_step(twin, plain, step)
        opt.zero_grad()
        scaler.scale(backward(model, step, run=False) * (8 if kind else 32)).backward()
        if kind is None:
            opt.grad_scale = 4.0
        scaler.step(opt)
        scaler.update()
        torch.testing.assert_close(opt.last_norm, norm, **tolerance(name))
        torch.testing.assert_close(flat(model), flat(twin), **tolerance(name))
        assert opt.inner.grad_scale == 8.0


@every_scaler
@every_inner
def test_a_users_grad_scale_multiplies_with_the_scalers(name, kind):
    model, twin = small_model(), small_model()
    opt, plain, scaler = (
        ClippedOptimizer(INNERS[name](model.parameters()), 0.5),
        INNERS[name](twin.parameters()),
        scaler_of(kind),
    )
    for step in range(3):
        norm = reference_step(twin, plain, step)
        opt.zero_grad()
        scaler.scale(backward(model, step, run=False) * 8).backward()
        opt.grad_scale = torch.tensor(8.0)  # torch takes it off with its own after the step
        scaler.step(opt)
        scaler.update()
        torch.testing.assert_close(opt.last_norm, norm, **tolerance(name))
        torch.testing.assert_close(flat(model), flat(twin), **tolerance(name))


@pytest.mark.parametrize("value", [1.0, 2.0, True, torch.tensor(1.0), torch.tensor(2.0), torch.tensor([3.0])])
@every_inner
def test_any_found_inf_above_zero_skips(name, value):
    """A scaler adds it up over devices; torch's fused steps take 2.0 for a good step, and count backwards."""
    model = small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), 0.5)
    backward(model, 0)
    opt.step()
    before, state = flat(model), copy.deepcopy(opt.state_dict())
    opt.found_inf = float(value) if value is True else value
    opt.step()
    assert torch.equal(flat(model), before)
    assert identical(opt.state_dict(), state)
    opt.found_inf = 0.0
    opt.step()
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0.0, ValueError), (-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("8", TypeError)],
)
def test_a_grad_scale_that_is_none(value, error):
    model = small_model()
    opt = ClippedOptimizer(INNERS["adamw-fused"](model.parameters()))
    backward(model, 0)
    opt.grad_scale = value
    before, found = flat(model), grads(model)
    with pytest.raises(error, match="grad_scale"):
        opt.step()
    assert torch.equal(flat(model), before)
    assert identical(grads(model), found)
    assert not opt.state


def raising(*_):
    raise ZeroDivisionError("on the way")


@pytest.mark.parametrize("where", ["inner hook", "inner post hook", "pre hook", "post hook", "closure", "argument"])
@every_scaler
@every_inner
def test_an_error_on_the_way_leaves_nothing_behind(name, kind, where):
    """A scale left on either optimizer would be applied again at the next step, in silence."""
    model, twin = small_model(), small_model()
    opt, plain = (
        ClippedOptimizer(INNERS[name](model.parameters()), 0.5, nonfinite="raise"),
        INNERS[name](twin.parameters()),
    )
    inner, scaler = opt.inner, scaler_of(kind)
    register = {
        "inner hook": inner.register_step_pre_hook,
        "inner post hook": inner.register_step_post_hook,
        "pre hook": opt.register_step_pre_hook,
        "post hook": opt.register_step_post_hook,
    }
    scaled_backward(model, opt, scaler, 0)
    handle = register[where](raising) if where in register else None
    arguments = (raising,) if where == "closure" else ()
    keywords = {"gamma": 3} if where == "argument" else {}
    with pytest.raises(TypeError if where == "argument" else ZeroDivisionError):
        scaler.step(opt, *arguments, **keywords)
    assert clean(opt, inner)
    if handle is not None:
        handle.remove()
    stepped = where in ("inner post hook", "post hook")
    if stepped:
        reference_step(twin, plain, 0)
    for step in range(1, 3):
        scaler.update()
        reference_step(twin, plain, step)
        scaled_backward(model, opt, scaler, step)
        scaler.step(opt)
        torch.testing.assert_close(flat(model), flat(twin), **tolerance(name))
    opt.zero_grad()
    backward(model, 0)
    poison(model)
    with pytest.raises(fastclip.NonFiniteGradientError):
        opt.step()


@every_scaler
@pytest.mark.parametrize("where", ["pre hook", "closure", "argument"])
def test_an_error_before_the_look_takes_the_scalers_wish_along(kind, where):
    """Nobody asks any more for a skip: the next step without a scaler obeys the optimizer's own rule again."""
    model = small_model()
    opt, scaler = ClippedOptimizer(INNERS["foreach"](model.parameters()), nonfinite="raise"), scaler_of(kind)
    scaled_backward(model, opt, scaler, 0)
    handle = opt.register_step_pre_hook(raising) if where == "pre hook" else None
    with pytest.raises((ZeroDivisionError, TypeError)):
        scaler.step(opt, *((raising,) if where == "closure" else ()), **({"x": 1} if where == "argument" else {}))
    if handle:
        handle.remove()
    poison(model)
    with pytest.raises(fastclip.NonFiniteGradientError):
        opt.step()


@every_fused
def test_a_users_riders_survive_an_error_in_the_inner_step(name):
    model = small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), 0.5)
    scale = opt.inner.grad_scale = torch.tensor(8.0)
    opt.inner.register_step_pre_hook(raising)
    backward(model, 0)
    with pytest.raises(ZeroDivisionError):
        opt.step()
    assert opt.inner.grad_scale is scale
    assert "found_inf" not in vars(opt.inner)


@every_fused
def test_what_rides(name):
    """Nothing at all while nothing is clipped: even a divisor of 1.0 costs a write of every gradient."""
    model = small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), 1e6)
    seen = []

    def look(optimizer, args, kwargs):
        found = {name: value for name, value in vars(optimizer).items() if name in RIDERS}
        seen.append((found, grads(model)))

    opt.inner.register_step_pre_hook(look)
    backward(model, 0)
    before = grads(model)
    opt.step()
    assert seen[-1][0] == {}
    assert identical(grads(model), before)  # bitwise untouched
    opt.max_norm = float(opt.last_norm) / 4
    opt.step()
    riders, found = seen[-1]
    assert identical(found, before)  # not clipped before the step, but by it
    assert riders.keys() == {"grad_scale"}
    assert (riders["grad_scale"].dtype, riders["grad_scale"].dim()) == (torch.float32, 0)
    assert float(riders["grad_scale"]) == pytest.approx(4.0, rel=1e-5)
    assert fastclip.get_total_norm(grads(model)) == pytest.approx(opt.max_norm, rel=1e-5)
    assert clean(opt, opt.inner)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@every_inner
def test_the_gradient_after_the_step_is_the_clipped_one(name, max_norm):
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), max_norm)
    backward(model, 0)
    backward(twin, 0)
    versions = [p.grad._version for p in model.parameters()]
    fastclip.clip_grad_norm_(twin.parameters(), max_norm)
    opt.step()
    torch.testing.assert_close(grads(model), grads(twin), **tolerance(name, max_norm < 1.0))
    if max_norm > 1.0:
        assert [p.grad._version for p in model.parameters()] == versions


@every_fused
def test_a_subclass_with_a_step_of_its_own_does_not_ride(name):
    """Nobody knows what it does with the gradients before torch's kernel divides them."""
    made = INNERS[name](small_model().parameters())

    class Signs(type(made)):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.add_(0.001)
            return super().step(closure)

    settings = {key: made.defaults[key] for key in ("lr", "momentum", "amsgrad", "maximize") if key in made.defaults}
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(Signs(model.parameters(), fused=True, **settings), 0.5)
    plain = Signs(twin.parameters(), fused=True, **settings)
    for step in range(3):
        reference_step(twin, plain, step)
        opt.zero_grad()
        backward(model, step)
        opt.step()
        assert torch.equal(flat(model), flat(twin))


@every_scaler
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_groups_of_which_only_some_are_fused(make, kind):
    """torch's other groups refuse riders: nothing rides."""

    def groups(m):
        return [{"params": [*m[0].parameters()], "fused": True}, {"params": [*m[2].parameters()], "foreach": False}]

    model, twin = small_model(), small_model()
    opt, plain = ClippedOptimizer(make(groups(model), lr=0.05), 0.5), make(groups(twin), lr=0.05)
    scaler = scaler_of(kind)
    for step in range(3):
        reference_step(twin, plain, step)
        scaled_backward(model, opt, scaler, step)
        scaler.step(opt)
        scaler.update()
        assert torch.equal(flat(model), flat(twin))


EXTREMES = {
    "past float32": (1e30, 1e-10, 2.0, None),
    "huge": (1e37, 1.0, 2.0, None),
    "nothing left": (1.0, 0.0, 2.0, None),
    "below float32": (1e-35, 1.0, 2.0, 1e-39),
    "largest element": (3.0, 0.5, math.inf, None),
    "sum of magnitudes": (3.0, 0.5, 1.0, None),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("name", ["sgd-fused", "adamw-fused", "loop", "foreign"])
def test_extremes(name, case):
    """A divisor that float32 can't hold doesn't ride: the bound is kept all the same."""
    size, max_norm, p, scale = EXTREMES[case]
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), max_norm, norm_type=p)
    for m in (model, twin):
        for each in m.parameters():
            each.grad = torch.full_like(each, size)
    if scale is not None:
        opt.grad_scale = scale
    before = flat(model)
    opt.step()
    true = size / (scale or 1.0) * flat(model).numel() ** (1 / p)
    assert float(opt.last_norm) == pytest.approx(true, rel=1e-5)
    bound = min(max_norm, true)
    assert float(fastclip.get_total_norm(grads(model), p)) == pytest.approx(bound, rel=1e-4, abs=1e-38)
    assert flat(model).isfinite().all()
    if max_norm == 0.0 and "sgd" in name:
        assert torch.equal(flat(model), before)


def go_far(monkeypatch, backend):
    """As on an accelerator: no value is known to the host, and this backend serves."""
    fastclip.backends.forced = backend
    for module in [m for name, m in sys.modules.items() if name.startswith("fastclip.")]:
        if hasattr(module, "known_to_host"):
            monkeypatch.setattr(module, "known_to_host", lambda tensor: False)


@pytest.fixture(params=["reference", *(backend.name for backend in EMULATED)])
def far(request, monkeypatch):
    go_far(monkeypatch, request.param)


@pytest.fixture
def far_from_here_on(monkeypatch):
    """For a test that asks for it in the middle."""
    go_far(monkeypatch, EMULATED[0].name if EMULATED else "reference")


WAITING = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "numpy", "cpu", "nonzero", "__array__")


class no_waiting:
    """What would wait for a device raises, but for the host's own copy of the count of skipped steps."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in WAITING:
            self.patch.setattr(torch.Tensor, name, self._refusing(name, getattr(torch.Tensor, name)))

    def _refusing(self, name, original):
        def refuse(tensor, *args, **kwargs):
            code = sys._getframe(1).f_code
            if code is fastclip.record.Echo.latest.__code__:
                return original(tensor, *args, **kwargs)
            raise AssertionError(f"{code.co_qualname if hasattr(code, 'co_qualname') else code.co_name} waits: {name}")

        return refuse

    def __exit__(self, *error):
        self.patch.undo()


def may_wait(name, first):
    """Fused SGD's first step: one that is skipped on the device would leave uninitialised momentum behind."""
    return pytest.MonkeyPatch.context() if first and name == "sgd-fused" else no_waiting()


def test_the_guard_against_waiting_works():
    x = torch.tensor(1.0)
    for wait in (float, bool, int, lambda t: t.item(), lambda t: t.tolist(), lambda t: [1][t.long() - 1]):
        with no_waiting(), pytest.raises(AssertionError, match="waits"):
            wait(x)
    assert float(x) == 1.0


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
@pytest.mark.parametrize("rule", ["skip", "propagate", "zero"])
@every_fused
def test_far_steps_equal_clip_then_step_and_wait_for_nothing(name, rule, max_norm, with_closure, far):
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), max_norm, nonfinite=rule)
    plain = INNERS[name](twin.parameters())
    for step in range(4):
        norm = reference_step(twin, plain, step, max_norm)
        opt.zero_grad()
        if not with_closure:
            backward(model, step)
        with may_wait(name, step == 0 and rule == "skip"):
            opt.step((lambda step=step: (opt.zero_grad(), backward(model, step))[1]) if with_closure else None)
            counts = [opt.steps, opt.clipped_steps, opt.skipped_steps, opt.skipped_in_a_row, opt.clip_rate]
            last = opt.last_norm
        close = tolerance(name, max_norm < 1.0)
        torch.testing.assert_close(last, norm, **close)
        torch.testing.assert_close(flat(model), flat(twin), **close)
        torch.testing.assert_close(grads(model), grads(twin), **close)
        assert counts == [step + 1, step + 1 if max_norm == 0.5 else 0, 0, 0, float(max_norm == 0.5)]
        assert clean(opt, opt.inner)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@every_fused
def test_far_skipped_steps_change_nothing(name, max_norm, bad, far):
    """No ``item()`` anywhere, and the run equals one that never saw the bad batches."""
    model, twin = small_model(), small_model()
    opt, other = (ClippedOptimizer(INNERS[name](m.parameters()), max_norm) for m in (model, twin))
    for step in range(7):
        opt.zero_grad()
        backward(model, step)
        if step in (2, 4, 5):
            poison(model, bad)
        before, state = flat(model), copy.deepcopy(opt.state_dict())
        with may_wait(name, step == 0):
            opt.step()
        if step in (2, 4, 5):
            assert torch.equal(flat(model), before)
            assert identical(opt.state_dict(), state)
        else:
            other.zero_grad()
            backward(twin, step)
            other.step()
            assert torch.equal(flat(model), flat(twin))
        assert opt.skipped_in_a_row == {2: 1, 4: 1, 5: 2}.get(step, 0)
    assert identical(opt.state_dict(), other.state_dict())
    assert (opt.steps, opt.skipped_steps) == (7, 3)
    assert opt.clipped_steps == (4 if max_norm < 1.0 else 0)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@every_inner
def test_a_bad_first_step_leaves_no_garbage(name, max_norm, host, request):
    """Fused SGD would take its first momentum from uninitialised memory. Some parameters come in late (there torch's
    fused SGD fails by itself)."""
    if not host:
        request.getfixturevalue("far_from_here_on")
    model, twin = small_model(), small_model()
    opt, other = (ClippedOptimizer(INNERS[name](m.parameters()), max_norm) for m in (model, twin))
    before = flat(model)
    for step in range(6):
        for each, m in ((opt, model), (other, twin)):
            each.zero_grad()
            backward(m, step)
            if step < 3 and name != "sgd-fused":
                for p in m[2].parameters():
                    p.grad = None
        if step in (0, 3):
            poison(model)
        opt.step()
        if step == 0:
            assert torch.equal(flat(model), before)
            if "adam" not in name and "adagrad" not in name:
                assert not opt.state
            assert all(s.isfinite().all() and not s.any() for p in opt.state.values() for s in p.values() if s.dim())
        if step not in (0, 3):
            other.step()
            assert torch.equal(flat(model), flat(twin))
    assert opt.skipped_steps == 2


@pytest.mark.parametrize("rule", ["propagate", "zero"])
@pytest.mark.parametrize("host", [False, True])
@every_inner
def test_the_other_rules_do_as_the_functions_do(name, host, rule, request):
    if not host:
        request.getfixturevalue("far_from_here_on")
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), 0.5, nonfinite=rule)
    plain = INNERS[name](twin.parameters())
    for step in range(3):
        for each, m in ((opt, model), (plain, twin)):
            each.zero_grad()
            backward(m, step)
            if step == 1:
                poison(m, math.inf)
        fastclip.clip_grad_norm_(twin.parameters(), 0.5, nonfinite=rule)
        plain.step()
        opt.step()
        torch.testing.assert_close(flat(model), flat(twin), equal_nan=True, **tolerance(name))
    assert opt.skipped_steps == 0
    assert bool(flat(model).isnan().any()) == (rule == "propagate")


def test_propagate_is_torchs_clipping():
    """Coefficients and all, to one rounding of float32."""
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(INNERS["loop"](model.parameters()), 0.5, nonfinite="propagate")
    plain = INNERS["loop"](twin.parameters())
    for step in range(4):
        for each, m in ((opt, model), (plain, twin)):
            each.zero_grad()
            backward(m, step)
            if step == 3:
                poison(m)
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
        opt.step()
        torch.testing.assert_close(opt.last_norm, norm, equal_nan=True)
        torch.testing.assert_close(flat(model), flat(twin), equal_nan=True)
    assert flat(model).isnan().all()


@every_inner
def test_far_raise_names_the_tensor(name, far):
    model = small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), 0.5, nonfinite="raise")
    backward(model, 0)
    poison(model)
    before = flat(model)
    with pytest.raises(fastclip.NonFiniteGradientError, match=r"\[0\].*NaN"):
        opt.step()
    assert torch.equal(flat(model), before)
    assert opt.steps == 0


@pytest.mark.parametrize("name", ["foreach", "loop", "foreign"])
def test_far_optimizers_that_do_not_ride(name, far):
    """Here nothing but the host can hold a step back; the results are the same."""
    model, twin = small_model(), small_model()
    opt, plain = ClippedOptimizer(INNERS[name](model.parameters()), 0.5), INNERS[name](twin.parameters())
    for step in range(4):
        bad = step in (0, 2)
        opt.zero_grad()
        backward(model, step)
        if bad:
            poison(model)
        opt.step()
        if not bad:
            reference_step(twin, plain, step)
        assert torch.equal(flat(model), flat(twin))
    assert (opt.steps, opt.clipped_steps, opt.skipped_steps, opt.skipped_in_a_row) == (4, 2, 2, 0)


@pytest.mark.parametrize("rule", ["raise", "skip"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@every_scaler
@every_inner
def test_far_scaling(name, kind, max_norm, unscale, rule, far):
    """Scale, step and update wait for nothing on the fused path, and a bad step costs that step alone."""
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), max_norm, nonfinite=rule)
    plain, scaler, close = INNERS[name](twin.parameters()), scaler_of(kind), tolerance(name, max_norm < 1.0)
    for step in range(5):
        bad = step in (1, 3)
        scaled_backward(model, opt, scaler, step, factor=math.inf if bad else 1.0)
        before, state = flat(model), copy.deepcopy(opt.state_dict())
        if unscale:
            scaler.unscale_(opt)
        with may_wait(name, step == 0) if "fused" in name else pytest.MonkeyPatch.context():
            scaler.step(opt)
            scaler.update()
        assert clean(opt, opt.inner)
        if bad:
            assert torch.equal(flat(model), before)
            assert identical(opt.state_dict(), state)
        else:
            norm = reference_step(twin, plain, step, max_norm)
            torch.testing.assert_close(opt.last_norm, norm, **close)
            torch.testing.assert_close(flat(model), flat(twin), **close)
    assert scaler.get_scale() == 256.0
    assert (opt.steps, opt.skipped_steps) == (5, 2)


@pytest.mark.parametrize("holder", ["wrapper", "inner"])
@pytest.mark.parametrize("found", [1.0, 2.0])
@every_fused
def test_far_found_inf_rides_as_one(name, found, holder, far):
    """torch's kernels compare with 1.0 exactly: a sum over devices would make them take the step."""
    model = small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), 0.5)
    backward(model, 0)
    opt.step()
    before, state, seen = flat(model), copy.deepcopy(opt.state_dict()), []
    opt.inner.register_step_pre_hook(lambda o, a, k: seen.append(o.found_inf.clone()))
    owner = opt if holder == "wrapper" else opt.inner
    owner.found_inf, owner.grad_scale = torch.tensor(found), torch.tensor(8.0)
    with no_waiting():
        opt.step()
    assert seen == [torch.ones(())]
    assert seen[0].dtype == torch.float32
    assert torch.equal(flat(model), before)
    assert identical(opt.state_dict(), state)
    assert opt.skipped_steps == 1
    assert owner.found_inf == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_fused
def test_far_groups_and_wide_gradients_are_scaled_in_place(name, dtype, far):
    """What can't ride is scaled by a tensor, and left alone, by a tensor too, where the step is skipped."""
    model, twin = small_model().to(dtype), small_model().to(dtype)

    def split(m):
        return [{"params": [*m[0].parameters()]}, {"params": [*m[2].parameters()]}]

    groups = split(model)
    if dtype == torch.float32:
        groups[1]["group_max_norm"] = 0.125
    opt, plain = ClippedOptimizer(INNERS[name](groups), 0.5), INNERS[name](split(twin))
    for step in range(5):
        bad = step == 2
        opt.zero_grad()
        backward(model, step)
        if bad:
            poison(model)
        found = grads(model)
        with no_waiting() if step else pytest.MonkeyPatch.context():
            opt.step()
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(grads(model)[1:], found[1:], strict=True))
            continue
        plain.zero_grad()
        backward(twin, step)
        if dtype == torch.float32:
            fastclip.clip_grad_norm_(twin[0].parameters(), 0.5)
            fastclip.clip_grad_norm_(twin[2].parameters(), 0.125)
        else:
            fastclip.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
        assert torch.equal(flat(model), flat(twin))
    assert (opt.steps, opt.clipped_steps, opt.skipped_steps) == (5, 4, 1)


@pytest.mark.parametrize("host", [False, True])
@every_inner
def test_a_streak_ends_in_an_error(name, host, request):
    if not host:
        request.getfixturevalue("far_from_here_on")
    model = small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), 0.5, skip_limit=3)
    before = flat(model)
    backward(model, 0)
    opt.step()
    before = flat(model)

    def bad_steps():
        for step in range(1, 6):
            opt.zero_grad()
            backward(model, 0)
            poison(model)
            at.append(step)
            opt.step()

    at = []
    with pytest.raises(fastclip.SkipLimitError, match=r"3 steps in a row.*param_groups\[0\]\['params'\]\[0\]"):
        bad_steps()
    assert at[-1] == 3 if host else at[-1] in (3, 4)
    assert torch.equal(flat(model), before)
    opt.zero_grad()
    backward(model, 0)
    opt.step()
    assert opt.skipped_in_a_row == 0
    assert not torch.equal(flat(model), before)


def test_counts_go_on_when_the_gradients_move_away(monkeypatch, request):
    """From a host that knows every outcome to one that doesn't: a model that is moved to an accelerator."""
    model = small_model()
    opt = ClippedOptimizer(INNERS["adamw-fused"](model.parameters()), 0.5, skip_limit=4)

    def steps(bad):
        for step, each in enumerate(bad):
            opt.zero_grad()
            backward(model, step)
            if each:
                poison(model)
            opt.step()

    steps([False, True, False, True, True])
    assert (opt.steps, opt.clipped_steps, opt.skipped_steps, opt.skipped_in_a_row) == (5, 2, 3, 2)
    request.getfixturevalue("far_from_here_on")
    steps([True])
    assert (opt.steps, opt.clipped_steps, opt.skipped_steps, opt.skipped_in_a_row) == (6, 2, 4, 3)
    with pytest.raises(fastclip.SkipLimitError):
        steps([True, True])
    monkeypatch.undo()
    opt.skip_limit = None
    steps([False, True])
    assert opt.skipped_in_a_row == 1
    assert opt.clipped_steps == 3


def test_a_count_that_arrives_late(far, monkeypatch):
    """The host learns of a streak only after the copy has arrived, and never waits for it."""

    class Event:
        asked = 0

        def query(self):
            self.asked += 1
            return self.asked > 1

    def send(echo, value):
        if echo._copy is None:
            echo._copy, echo._event = value.clone(), Event()

    monkeypatch.setattr(fastclip.record.Echo, "send", send)
    model = small_model()
    opt = ClippedOptimizer(INNERS["adamw-fused"](model.parameters()), 0.5, skip_limit=2)
    backward(model, 0)
    poison(model)
    for _ in range(3):
        with no_waiting():
            opt.step()
    with pytest.raises(fastclip.SkipLimitError):
        [opt.step() for _ in range(2)]
    assert opt.skipped_steps <= 5


@every_scaler
@every_inner
def test_a_streak_under_a_scaler_leaves_nothing_behind(name, kind):
    model = small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), 0.5, skip_limit=2)
    scaler = scaler_of(kind)
    for last in (False, True):
        scaled_backward(model, opt, scaler, 0, factor=math.inf)
        with pytest.raises(fastclip.SkipLimitError) if last else pytest.MonkeyPatch.context():
            scaler.step(opt)
        scaler.update()
    assert clean(opt, opt.inner)
    assert scaler.get_scale() == 256.0


def test_far_counts_of_skips_apart_do_not_add_up(far):
    model = small_model()
    opt = ClippedOptimizer(INNERS["adamw-fused"](model.parameters()), 0.5, skip_limit=2)
    for step in range(8):
        opt.zero_grad()
        backward(model, step)
        if step % 2:
            poison(model)
        with no_waiting():
            opt.step()
    assert (opt.skipped_steps, opt.skipped_in_a_row) == (4, 1)


@pytest.mark.parametrize("max_norm", [torch.tensor(0.5), lambda step: torch.tensor(0.5), lambda step: 0.5])
@every_fused
def test_far_bounds(name, max_norm, far):
    """A bound on the device isn't waited for either, nor kept beyond the step it was read for."""
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), max_norm, nonfinite="raise")
    plain = INNERS[name](twin.parameters())
    backward(model, 0)
    poison(model)
    with pytest.raises(fastclip.NonFiniteGradientError):
        opt.step()
    opt.nonfinite = "skip"
    for step in range(3):
        reference_step(twin, plain, step)
        opt.zero_grad()
        backward(model, step)
        with may_wait(name, step == 0):
            opt.step()
        torch.testing.assert_close(flat(model), flat(twin), **tolerance(name))
    opt.nonfinite = "raise"
    poison(model)
    with pytest.raises(fastclip.NonFiniteGradientError):
        opt.step()
    opt.max_norm = 2.0
    reference_step(twin, plain, 3, 2.0)
    opt.zero_grad()
    backward(model, 3)
    opt.step()
    torch.testing.assert_close(flat(model), flat(twin), **tolerance(name))


@pytest.mark.parametrize("case", EXTREMES)
def test_far_extremes_stay_finite(case, far):
    """Past what float32 can divide by, the gradient shrinks as far as float32 goes, and is neither NaN nor lost."""
    size, max_norm, p, scale = EXTREMES[case]
    model = small_model()
    opt = ClippedOptimizer(INNERS["sgd-fused"](model.parameters()), max_norm, norm_type=p)
    for each in model.parameters():
        each.grad = torch.full_like(each, size)
    if scale is not None:
        opt.grad_scale = scale
    opt.step()
    assert flat(model).isfinite().all()
    assert all(g.isfinite().all() for g in grads(model))
    assert (max_norm == 0.0) == (not any(g.any() for g in grads(model)))


def test_what_has_to_wait_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph can't hold it: a clear error, before anything is written."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 7.0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="wait for the device, and a CUDA graph"):
        fastclip.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    assert p.grad.tolist() == [7.0, 7.0, 7.0]
    fastclip.clip_grad_norm_([p], 1.0, nonfinite="skip")
    assert float(p.grad.norm()) < 1.1


@pytest.mark.parametrize("max_norm", [1e9, 0.5])
def test_a_write_that_returns_early_is_preferred_to_riding(far, monkeypatch, max_norm) -> None:
    """Riding writes every gradient; where the kernel finds nothing to clip, only the flag has to ride."""
    aboard = []
    enter = fastclip.riding.aboard.__enter__
    monkeypatch.setattr(
        fastclip.riding.aboard, "__enter__", lambda self: (aboard.append(set(self._riders)), enter(self))
    )
    p = torch.nn.Parameter(torch.ones(4))
    opt = ClippedOptimizer(torch.optim.AdamW([p], lr=0.1, fused=True), max_norm=max_norm)
    p.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    opt.step()
    assert aboard == [{"found_inf"} if fastclip.backends.forced in gpu.NAMES else {"found_inf", "grad_scale"}]
    want = 5.0 if max_norm > 5 else 0.5
    assert float(p.grad.norm()) == pytest.approx(want, rel=1e-5)


def test_a_number_keeps_its_bits_where_the_device_decides_about_the_step(far) -> None:
    """A coefficient that the host knows is not rounded to float32 on its way into a selection on the device."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.full((3,), 2.0, dtype=torch.float64)
    (finding,), _ = fastclip.clipping.examine(
        [(fastclip.tensors.grads_of([p]), fastclip.policies.GlobalNorm(1.0))], "skip"
    )
    verdict = finding.decide()
    verdict = fastclip.clipping.Verdict(verdict.reading, verdict.decision._replace(clip_coef=0.1))
    verdict.apply(skip=torch.tensor(False))
    assert p.grad.tolist() == [2.0 * 0.1] * 3
