"""Loss scaling, and the riders of torch's fused steps."""

import copy
import math

import pytest
import torch
from small import (
    EXTREMES,
    INNERS,
    SCALERS,
    Lion,
    backward,
    clean,
    every_fused,
    every_inner,
    every_scaler,
    flat,
    grads,
    identical,
    poison,
    reference_step,
    scaled_backward,
    scaler_of,
    small_model,
    tolerance,
)

import fastclip
import fastclip.clipping
import fastclip.guard
import fastclip.policies
import fastclip.record
import fastclip.riding
from fastclip import ClippedOptimizer
from fastclip.riding import RIDERS


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
    answers = set()
    for make in INNERS.values():
        inner = make(small_model().parameters())
        opt = ClippedOptimizer(inner)
        assert opt._step_supports_amp_scaling is True
        answers.add(bool(getattr(inner, "_step_supports_amp_scaling", False)))
        inner.grad_scale = torch.tensor(2.0)
        assert not hasattr(opt, "grad_scale")  # or a scaler would multiply by it a second time
    assert answers == {True, False}


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


@every_inner
def test_what_is_left_beside_a_nan_is_unscaled_too(name):
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([6.0, 8.0, math.nan])
    opt = ClippedOptimizer(INNERS[name]([p]), 100.0, nonfinite="zero")
    opt.grad_scale = torch.tensor(2.0)
    opt.step()
    assert opt.last_norm == 5.0


@every_scaler
@every_inner
def test_a_users_found_inf_on_the_inner_counts_beside_the_scalers(name, kind):
    model = small_model()
    opt, scaler = ClippedOptimizer(INNERS[name](model.parameters())), scaler_of(kind)
    opt.inner.found_inf = torch.tensor(1.0)
    scaled_backward(model, opt, scaler, 0)
    before = flat(model)
    scaler.step(opt)
    assert torch.equal(flat(model), before)
    assert opt.skipped_steps == 1


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


@pytest.mark.parametrize(
    "value", [1.0, 2.0, True, -1.0, math.nan, torch.tensor(1.0), torch.tensor(2.0), torch.tensor([3.0])], ids=str
)
@every_inner
def test_any_found_inf_but_zero_skips(name, value):
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
