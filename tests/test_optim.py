"""The optimizer wrapper's plain path: what clip-then-step does, in one object."""

import copy
import math
import pickle
import re

import gpu
import oracle
import pytest
import torch
from small import backward, flat, identical, poison, small_model

import fastclip
from fastclip import ClippedOptimizer
from fastclip.policies import Chain, Decision, GlobalNorm, Policy, Unitwise, Value
from fastclip.types import NANS, Request

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adam-loop": lambda p: torch.optim.Adam(p, lr=0.05, foreach=False),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
}


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


@pytest.mark.parametrize("policy", [None, Value(0.5), Unitwise(), Chain(GlobalNorm(1.0), Value(0.5))], ids=repr)
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_what_became_zero_is_told(policy, l2):
    model, twin = small_model(), small_model()
    opt, other = (
        ClippedOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), policy=policy, nonfinite=rule, l2=l2, names=m)
        for m, rule in ((model, "zero"), (twin, "skip"))
    )
    for m, each in ((model, opt), (twin, other)):
        backward(m, 0)
        poison(m)
        m[2].weight.grad[0, 1] = math.inf
        if each is other:  # the norms are those of what is left
            for p in m.parameters():
                p.grad = torch.where(p.grad.isfinite(), p.grad, -l2 * p.detach())
        each.step()
    stats = opt.last_stats
    torch.testing.assert_close(stats.tensor_norms, other.last_stats.tensor_norms)
    torch.testing.assert_close(opt.last_norm, other.last_norm)
    assert stats.nans.tolist() == [1, 0, 0, 0]
    assert stats.infs.tolist() == [0, 0, 1, 0]
    assert [worst.name for worst in stats.worst(2)] == ["0.weight", "2.weight"]
    assert stats.to_dict()["found_inf"] is True
    assert math.isfinite(stats.to_dict().get("max_abs", 0.0))
    assert "1 NaN, 1 Inf" in str(stats)
    torch.testing.assert_close(flat(model), flat(twin))


def test_an_optimizer_may_have_parts_of_its_own():
    class Parted(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.parts = ["encoder", "decoder"]

    model = small_model()
    opt = ClippedOptimizer(Parted(model.parameters()), 1.0)
    backward(model, 0)
    opt.step()
    assert opt.clipped_steps == 1


def test_nothing_lands_on_torchs_default_device():
    """What is of the host stays there; ``meta`` is the device that loses what it gets."""
    model, twin = small_model(), small_model()
    settings = {"l2": 0.1, "backoff": fastclip.SpikeBackoff(), "loss_watch": fastclip.LossWatch(3.0)}
    opt = ClippedOptimizer(torch.optim.AdamW(model.parameters(), fused=True), 0.1, **settings)
    settings = {"l2": 0.1, "backoff": fastclip.SpikeBackoff(), "loss_watch": fastclip.LossWatch(3.0)}
    bare = ClippedOptimizer(torch.optim.AdamW(twin.parameters(), fused=True), 0.1, **settings)
    seen = []
    for each, m, place in ((opt, model, torch.device("meta")), (bare, twin, torch.device("cpu"))):
        monitor = fastclip.GradMonitor(each, sinks=seen.append, census_every=1)
        for number in range(3):
            backward(m, number)
            with place:
                each.observe(1.0)
                each.step()
                assert (each.last_norm.device.type, each.penalty.device.type) == ("cpu", "cpu")
                assert int(each.steps) == number + 1
                total = fastclip.get_total_norm([p.grad for p in m.parameters()])
                fastclip.clip_grads_with_norm_(m.parameters(), 0.01, 2.0)
                fastclip.clip_grads_(m.parameters(), fastclip.policies.BlockRMS(0.1))
                assert total.device.type == "cpu"
        with place:
            monitor.load_state_dict(monitor.state_dict())
            monitor.close()
    assert torch.equal(flat(model), flat(twin))
    assert [record.subnormals for record in seen[:3]] == [record.subnormals for record in seen[3:]]


def test_a_max_norm_in_some_groups_only():
    """It would be the bound of all."""
    model = small_model()
    parts = [list(model[0].parameters()), list(model[2].parameters())]
    some = [{"params": parts[0]}, {"params": parts[1], "max_norm": 0.1}]
    with pytest.raises(ValueError, match=r"param_groups\[0\] have no max_norm.*group_max_norm"):
        ClippedOptimizer(torch.optim.SGD(some, lr=0.1))
    opt = ClippedOptimizer(torch.optim.SGD([{**some[0], "group_max_norm": 1.0}, some[1]], lr=0.1))
    assert opt.max_norm == 0.1
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})  # is under the joint bound as well
    backward(model, 0)
    opt.step()
    opt = ClippedOptimizer(torch.optim.SGD(parts[0], lr=0.1), max_norm=5.0)
    opt.add_param_group({"params": parts[1], "max_norm": 0.1})
    with pytest.raises(ValueError, match=r"param_groups\[0\] have no max_norm"):
        opt.step()
    some[1]["policy"] = GlobalNorm(1.0)
    opt = ClippedOptimizer(torch.optim.SGD(some, lr=0.1), max_norm=5.0)
    opt.step()
    assert opt.max_norm == 5.0  # a tool that writes into every group means the joint bound


def test_a_policy_sees_what_is_left_of_what_became_zero():
    class Looks(fastclip.policies.GlobalNorm):
        def decide(self, reading):
            seen.append((bool(reading.found_inf), reading.rows[NANS].tolist(), reading.totals.tolist()[2:]))
            return super().decide(reading)

    seen, model = [], small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=Looks(1.0), nonfinite="zero")
    backward(model, 0)
    poison(model)
    opt.step()
    assert seen == [(False, [0.0] * len(list(model.parameters())), [0.0, 0.0])]
    assert bool(opt.last_stats.found_inf)


@pytest.mark.parametrize("rule", ["skip", "zero", "propagate", "raise"])
def test_steps_with_nan_are_counted_under_each_rule(rule):
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 1.0, nonfinite=rule)
    for step in range(5):
        opt.zero_grad()
        backward(model, step)
        if step in (1, 3):
            poison(model, math.inf)
        if rule == "raise" and step in (1, 3):
            with pytest.raises(fastclip.NonFiniteGradientError):
                opt.step()
        else:
            opt.step()
        if rule == "propagate" and step in (1, 3):
            model.load_state_dict(small_model().state_dict())
    asked, bad, skipped = {"skip": (5, 2, 2), "zero": (5, 2, 0), "propagate": (5, 2, 0), "raise": (3, 0, 0)}[rule]
    assert (opt.steps, opt.nonfinite_steps, opt.skipped_steps) == (asked, bad, skipped)


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


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("max_norm", [1e-3, 5.0, 1e6])
def test_steps_against_float64(max_norm, norm_type, route):
    """Several dtypes, layouts and holes at once: the recorded norm, each gradient and each parameter."""
    make = oracle.randn
    found = [
        *(make(3, 4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        None,
        make(),
        make(0, 3),
        make(6, 4).t(),
        make(8, 4)[::2],
        make(5, dtype=torch.complex64),
        make(2, 2, dtype=torch.complex128),
    ]
    params = [oracle.parameter(grad) for grad in found]
    exact = [None if grad is None else grad.detach().clone() for grad in found]
    norm = oracle.norm([grad for grad in exact if grad is not None], norm_type)
    coef = oracle.coef(norm, max_norm)
    opt = ClippedOptimizer(torch.optim.SGD(params, lr=1.0), max_norm, norm_type=norm_type)
    opt.step()
    # CUDA's kernels add up to 4 products of narrow gradients in float32
    loose = route in gpu.NAMES and norm_type == 2.0
    near = 1e-7 if loose else 0.0
    if loose:
        oracle.assert_norm(opt.last_norm.float(), norm)
    else:
        oracle.assert_norm(opt.last_norm, norm, norm_type, torch.float64)
    wide = {torch.complex64: torch.complex128}
    for param, grad in zip(params, exact, strict=True):
        if grad is None:
            assert not param.any()
            continue
        clipped = (grad.to(wide.get(grad.dtype, torch.complex128 if grad.is_complex() else torch.float64)) * coef).to(
            grad.dtype
        )
        if coef == 1.0:
            assert torch.equal(param.grad, grad)
        # the product is rounded once; the coefficient itself follows a norm that may be 1e-13 off
        torch.testing.assert_close(param.grad, clipped, rtol=max(near, 2 * torch.finfo(grad.dtype).eps), atol=0)
        assert torch.equal(param.detach(), -param.grad)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parameters_against_a_step_on_the_exact_gradients(name, dtype):
    """The same optimizer on gradients that were clipped in float64, and rounded once."""
    torch.manual_seed(3)
    params, twins = ([torch.nn.Parameter(torch.ones(4, 3, dtype=dtype)) for _ in range(3)] for _ in range(2))
    opt, plain = ClippedOptimizer(OPTIMIZERS[name](params), 0.5), OPTIMIZERS[name](twins)
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(4, 3).to(dtype)
            q.grad = p.grad.clone()
        norm = oracle.norm([q.grad for q in twins])
        for q in twins:
            q.grad = (q.grad.double() * oracle.coef(norm, 0.5)).to(dtype)
        opt.step()
        plain.step()
        oracle.assert_norm(opt.last_norm, norm, dtype=oracle.norm_dtype(dtype))
        # a fused step divides by the inverse of the coefficient: some units in the last place
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(params, twins, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_may_do_everything(name):
    """zero_grad, backward, and more than one of them; positional or named; an error in it leaves all as it was."""
    model, twin = small_model(), small_model()
    opt, plain = ClippedOptimizer(OPTIMIZERS[name](model.parameters()), 0.5), OPTIMIZERS[name](twin.parameters())
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        backward(model, 0)
        return backward(model, 1)

    for named in (False, True):
        with torch.set_grad_enabled(named):
            loss = opt.step(closure=closure) if named else opt.step(closure)
        plain.zero_grad()
        backward(twin, 0)
        expected = backward(twin, 1)
        fastclip.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
        close = {"rtol": 1e-5, "atol": 1e-6} if "fused" in name else {"rtol": 0, "atol": 0}  # as above
        torch.testing.assert_close(loss, expected, **close)
        torch.testing.assert_close(flat(model), flat(twin), **close)
    assert calls == [True, True]
    before, state = flat(model), copy.deepcopy(opt.state_dict())
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert torch.equal(flat(model), before)
    assert identical(opt.state_dict(), state)
    with pytest.raises(TypeError, match="closure"):
        opt.step(3)
    with pytest.raises(TypeError, match="gamma"):
        opt.step(gamma=1)
    assert opt.steps == 2
    assert opt.step(lambda: (opt.zero_grad(), poison_after(model), "loss")[-1]) == "loss"
    assert opt.skipped_steps == 1
    assert torch.equal(flat(model), before)


def poison_after(model):
    backward(model, 0)
    poison(model)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_never_sees_an_unclipped_gradient(search):
    model = small_model()
    opt = ClippedOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.1, line_search_fn=search), max_norm=0.5)
    norms, gather = [], opt.inner._gather_flat_grad
    opt.inner._gather_flat_grad = lambda: norms.append(float(gather().norm())) or gather()

    def closure():
        opt.zero_grad()
        return backward(model, 0)

    for _ in range(2):
        opt.step(closure)
    assert len(norms) == opt.steps > 4
    assert all(norm <= 0.5 * (1 + 1e-5) for norm in norms)
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step()


@pytest.mark.parametrize(
    "bounds", [(0.5, 5.0), (5.0, 0.5), (math.inf, 0.5), (0.5, math.inf)], ids=lambda bounds: f"{bounds[0]}-{bounds[1]}"
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nested_wrappers(name, bounds):
    """One after the other, from the outside; each keeps its own books."""
    model, twin = small_model(), small_model()
    middle = ClippedOptimizer(OPTIMIZERS[name](model.parameters()), bounds[1])
    opt, plain = ClippedOptimizer(middle, bounds[0]), OPTIMIZERS[name](twin.parameters())
    for step in range(4):
        for each, m in ((opt, model), (plain, twin)):
            each.zero_grad()
            backward(m, step)
        norms = [fastclip.clip_grad_norm_(twin.parameters(), bound) for bound in bounds]
        plain.step()
        opt.step()
        close = {"rtol": 1e-5, "atol": 1e-6} if "fused" in name else {"rtol": 0, "atol": 0}  # it divides
        torch.testing.assert_close(flat(model), flat(twin), **close)
        torch.testing.assert_close([opt.last_norm, middle.last_norm], norms, **close)
    opt.zero_grad()
    backward(model, 0)
    poison(model)
    opt.step()
    assert (opt.skipped_steps, middle.skipped_steps, middle.steps) == (1, 0, 4)


VARIANTS = {
    "sparse": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.Tensor.to_sparse),
    "sparse adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1), torch.Tensor.to_sparse),
    "sparse adam": (lambda p: torch.optim.SparseAdam(p, lr=0.1), torch.Tensor.to_sparse),
    "tensor lr": (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True), torch.Tensor.clone),
    "amsgrad, maximize": (lambda p: torch.optim.Adam(p, amsgrad=True, maximize=True, fused=True), torch.Tensor.clone),
    "maximize, foreach": (lambda p: torch.optim.RAdam(p, maximize=True, foreach=True), torch.Tensor.clone),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's Adagrad
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_clip_then_step(variant, max_norm):
    make, layout = VARIANTS[variant]
    params, twins = ([torch.nn.Parameter(torch.ones(5, 2)) for _ in range(2)] for _ in range(2))
    opt, plain = ClippedOptimizer(make(params), max_norm), make(twins)
    for step in range(5):
        torch.manual_seed(step)
        for p, q in zip(params, twins, strict=True):
            grad = torch.randn(5, 2) * (torch.rand(5, 1) > 0.5)
            p.grad, q.grad = layout(grad), layout(grad)
        norm = fastclip.clip_grad_norm_(twins, max_norm)
        plain.step()
        opt.step()
        fused = max_norm < 1.0 and opt.inner.defaults.get("fused")
        torch.testing.assert_close(params, twins, **({"rtol": 1e-5, "atol": 1e-6} if fused else {"rtol": 0, "atol": 0}))
        assert torch.equal(opt.last_norm, norm)
    before = [p.detach().clone() for p in params]
    params[0].grad = layout(torch.full((5, 2), math.nan))
    opt.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_one_gradient_at_two_parameters(fused):
    """It counts once, and is scaled once: a fused step alone would divide it twice."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    params[0].grad = params[1].grad = torch.full((3,), 4.0)
    opt = ClippedOptimizer(torch.optim.SGD(params, lr=1.0, fused=fused), 1.0)
    opt.step()
    assert opt.last_norm == pytest.approx(math.sqrt(48))
    torch.testing.assert_close(params[0].grad.norm(), torch.tensor(1.0), rtol=1e-5, atol=0)
    assert torch.equal(params[0], -params[0].grad)
    assert torch.equal(params[1], params[0])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_one_parameter_twice():
    """In one group torch only warns, and steps twice; between two groups nobody means it."""
    params, twins = ([torch.nn.Parameter(torch.zeros(3))] * 2 for _ in range(2))
    opt, plain = ClippedOptimizer(torch.optim.SGD(params, lr=1.0), 1.0), torch.optim.SGD(twins, lr=1.0)
    params[0].grad, twins[0].grad = torch.full((3,), 4.0), torch.full((3,), 4.0)
    fastclip.clip_grad_norm_(twins, 1.0)
    plain.step()
    opt.step()
    assert torch.equal(params[0], twins[0])
    assert opt.last_norm == pytest.approx(math.sqrt(48))
    opt.param_groups.append({**opt.param_groups[0], "group_max_norm": 1.0})
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\] is also in param_groups\[0\]"):
        opt.step()


@pytest.mark.parametrize("through", ["wrapper", "policy", "group", "attached"])
@pytest.mark.parametrize("kind", ["number", "tensor", "tensor of one", "callable", "callable of tensors"])
@pytest.mark.parametrize("name", ["adamw-fused", "sgd-momentum"])
def test_forms_of_the_bound(name, kind, through):
    """A tensor is read anew at each step, a callable gets the number of the step."""
    schedule, asked = [0.5, 0.25, 1e6, 0.5], []
    tensor = torch.tensor(0.0) if kind == "tensor" else torch.zeros(1)

    def of_step(step):
        asked.append(step)
        return torch.tensor(schedule[step]) if kind == "callable of tensors" else schedule[step]

    bound = {"number": 0.0, "tensor": tensor, "tensor of one": tensor}.get(kind, of_step)
    model, twin = small_model(), small_model()
    inner, plain = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    if through == "group":
        inner.param_groups[0]["max_norm"] = bound
    given = {"policy": {"policy": GlobalNorm(bound)}, "group": {}}.get(through, {"max_norm": bound})
    guard = (fastclip.attach if through == "attached" else ClippedOptimizer)(inner, **given)
    opt = inner if through == "attached" else guard
    assert guard.max_norm is bound
    for step in range(4):
        if kind == "number":
            guard.max_norm = schedule[step]
        elif "callable" not in kind:
            tensor.fill_(schedule[step])
        for each, m in ((opt, model), (plain, twin)):
            each.zero_grad()
            backward(m, step)
        fastclip.clip_grad_norm_(twin.parameters(), schedule[step])
        plain.step()
        opt.step()
        close = {"rtol": 1e-5, "atol": 1e-6} if "fused" in name else {"rtol": 0, "atol": 0}  # it divides
        torch.testing.assert_close(flat(model), flat(twin), **close)
    assert asked == (list(range(4)) if "callable" in kind else [])
    assert guard.clipped_steps == 3
    assert guard.clip_rate == 0.75


@pytest.mark.parametrize("bound", [lambda step: -1.0, lambda step: math.nan, torch.tensor(1.0), lambda step: "x"])
def test_a_bound_that_turns_bad(bound):
    """Known only at the step: still before anything is written."""
    model = small_model()
    opt = ClippedOptimizer(OPTIMIZERS["adam-loop"](model.parameters()), bound)
    if isinstance(bound, torch.Tensor):
        bound.fill_(-1.0)
    backward(model, 0)
    before, found = flat(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises((ValueError, TypeError), match="max_norm"):
        opt.step()
    assert torch.equal(flat(model), before)
    assert identical([p.grad for p in model.parameters()], found)
    assert not opt.state


def test_a_bound_in_every_group_is_the_joint_one():
    """Hyperparameter searches write it there; it comes before the wrapper's own, and can't differ."""
    model = small_model()
    groups = [{"params": [p]} for p in model.parameters()]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=1.0), 100.0)
    for bound in (0.25, 0.125):
        for group in opt.param_groups:
            group["max_norm"] = bound
        opt.zero_grad()
        backward(model, 0)
        opt.step()
        assert fastclip.get_total_norm([p.grad for p in model.parameters()]) == pytest.approx(bound, rel=1e-5)
        assert opt.max_norm == bound
    opt.max_norm = 0.5
    assert {group["max_norm"] for group in opt.param_groups} == {0.5}
    opt.param_groups[1]["max_norm"] = 0.75
    before = flat(model)
    with pytest.raises(ValueError, match=r"different values of max_norm.*group_max_norm"):
        opt.step()
    assert torch.equal(flat(model), before)


def test_equal_bounds_of_groups_are_one_bound():
    """Not the same object any more, once they come from a file."""
    groups = [{"params": [p], "max_norm": float("0.1")} for p in small_model().parameters()]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=0.1))
    opt.step()
    assert opt.max_norm == 0.1


def test_a_new_bound_goes_into_no_group_that_has_none():
    """From there it would get into state dicts."""
    opt = ClippedOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.1))
    opt.max_norm = 2.0
    assert "max_norm" not in opt.param_groups[0]


class Halve(Policy):
    """A policy without a bound: half of everything, and every third step is left out."""

    def __init__(self, extras=False):
        self.extras, self.count, self.norms = extras, 0, []

    def request(self):
        return Request(extras=self.extras)

    def decide(self, reading):
        self.count += 1
        self.norms.append(float(reading.total_norm))
        return Decision(0.5, self.count % 3 == 0)

    def state_dict(self):
        return {"count": self.count}

    def check_state_dict(self, state_dict):
        assert state_dict.keys() == {"count"}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_policy_of_ones_own(name):
    model, twin, policy = small_model(), small_model(), Halve()
    opt, plain = (
        ClippedOptimizer(OPTIMIZERS[name](model.parameters()), policy=policy),
        OPTIMIZERS[name](twin.parameters()),
    )
    for step in range(6):
        opt.zero_grad()
        backward(model, step)
        opt.step()
        if step % 3 != 2:
            plain.zero_grad()
            backward(twin, step)
            for p in twin.parameters():
                p.grad *= 0.5
            plain.step()
        assert torch.equal(flat(model), flat(twin))  # a half divides without rounding
    assert (opt.steps, opt.clipped_steps, opt.skipped_steps) == (6, 4, 2)
    assert policy.norms[-1] == opt.last_norm
    with pytest.raises(ValueError, match="no max_norm"):
        opt.max_norm = 1.0
    for extra in ({"max_norm": 1.0}, {"norm_type": 1.0}):
        with pytest.raises(ValueError, match="brings its own"):
            ClippedOptimizer(OPTIMIZERS[name](model.parameters()), policy=Halve(), **extra)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_with_rules_of_their_own(name, bad):
    """They leave the joint norm, and a bad gradient anywhere still holds the whole step back."""

    def parts(model):
        return [{"params": [*model[0].parameters()]}, {"params": [model[2].weight]}, {"params": [model[2].bias]}]

    model, twin = small_model(), small_model()
    groups = parts(model)
    groups[1]["group_max_norm"] = 0.125
    groups[2]["policy"] = Halve(extras=True)
    opt, plain = ClippedOptimizer(OPTIMIZERS[name](groups), 0.5), OPTIMIZERS[name](parts(twin))
    for step in range(2):
        for each, m in ((opt, model), (plain, twin)):
            each.zero_grad()
            backward(m, step)
        norm = fastclip.get_total_norm([p.grad for p in twin.parameters()])
        fastclip.clip_grad_norm_(twin[0].parameters(), 0.5)
        fastclip.clip_grad_norm_([twin[2].weight], 0.125)
        twin[2].bias.grad *= 0.5
        plain.step()
        opt.step()
        assert torch.equal(flat(model), flat(twin))  # several coefficients don't ride: all in place
    torch.testing.assert_close(opt.last_norm, norm)  # of all of them
    stats = opt.last_stats
    assert stats.names == [f"param_groups[{g}]['params'][{i}]" for g, i in ((0, 0), (0, 1), (1, 0), (2, 0))]
    assert stats.sizes == [20, 4, 4, 1]
    assert opt.clipped_steps == 2
    if bad:
        before, state = flat(model), copy.deepcopy(opt.state_dict())
        backward(model, 2)
        model[2].bias.grad.fill_(math.inf)
        opt.step()
        assert torch.equal(flat(model), before)
        assert identical(opt.state_dict()["state"], state["state"])
        assert opt.skipped_steps == 1


@pytest.mark.parametrize(("norm_type", "joint"), [(1.0, 7.0), (math.inf, 4.0)])
def test_the_norm_over_groups_is_of_their_norm_type(norm_type, joint):
    a, b = oracle.parameters([torch.tensor([3.0]), torch.tensor([4.0])])
    groups = [{"params": [a]}, {"params": [b], "group_max_norm": 9.0}]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), norm_type=norm_type)
    opt.step()
    assert opt.last_norm == joint


def test_sizes_are_those_of_the_parameters_with_a_gradient():
    with_grad = oracle.parameter(torch.tensor([3.0, 4.0]))
    opt = ClippedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(7)), with_grad], lr=0.1))
    opt.step()
    assert opt.last_stats.sizes == [2]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"group_max_norm": 1.0, "policy": GlobalNorm(1.0)}, "both a policy and a group_max_norm"),
        ({"group_max_norm": -1.0}, r"param_groups\[0\]\['group_max_norm'\] must be at least 0"),
        ({"group_max_norm": "1.0"}, r"param_groups\[0\]\['group_max_norm'\]: expected a number"),
        ({"policy": GlobalNorm(1.0, norm_type=1.0)}, "1-norm.*2-norm"),
        ({"group_max_norm": lambda step: 1.0}, "callable.*policy=GlobalNorm"),
    ],
)
def test_bad_rules_of_groups(extra, message):
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD([{"params": model.parameters(), **extra}], lr=1.0))
    backward(model, 0)
    before = flat(model)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.step()
    assert torch.equal(flat(model), before)
    assert opt.steps == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_reported(name):
    """Tensors, of which the caller gets copies: neither later steps nor his own writes change the others."""
    model = small_model()
    named = [(n, p) for n, p in model.named_parameters()]
    opt = ClippedOptimizer(OPTIMIZERS[name](named), 0.5)
    assert (opt.last_norm, opt.last_stats) == (None, None)
    assert (opt.steps, opt.clip_rate) == (0, 0.0)
    outcomes = [(0.5, None), (1e6, None), (0.5, math.nan), (0.5, math.inf), (0.5, None)]
    in_a_row = []
    for step, (bound, bad) in enumerate(outcomes):
        opt.max_norm = bound
        opt.zero_grad()
        backward(model, step)
        if bad is not None:
            poison(model, bad)
        found = fastclip.grad_stats([p.grad for _, p in named], [n for n, _ in named], extras=False)
        opt.step()
        assert opt.last_stats.names == found.names
        assert identical(opt.last_stats.tensor_norms.nan_to_num(-1), found.tensor_norms.nan_to_num(-1))
        assert torch.equal(opt.last_norm, found.total_norm) or bad == bad != math.inf or math.isnan(opt.last_norm)
        assert (opt.last_stats.nans.sum(), opt.last_stats.infs.sum()) == (found.nans.sum(), found.infs.sum())
        in_a_row.append(int(opt.skipped_in_a_row))
    assert in_a_row == [0, 0, 1, 2, 0]
    counts = (opt.steps, opt.clipped_steps, opt.skipped_steps, opt.skipped_in_a_row)
    assert counts == (5, 2, 2, 0)
    assert opt.clip_rate == pytest.approx(0.4)
    assert [c.dtype for c in (*counts, opt.clip_rate)] == [torch.int64] * 4 + [torch.float32]
    for mine in (*counts, opt.last_norm, opt.last_stats.total_norm):
        mine.fill_(77)
    assert (opt.steps, opt.clipped_steps, opt.skipped_steps, opt.skipped_in_a_row) == (5, 2, 2, 0)
    assert opt.last_norm != 77
    assert opt.last_stats.total_norm == opt.last_norm


@pytest.mark.parametrize("limit", [1, 3, None])
def test_the_limit_of_skipped_steps(limit):
    model = small_model()
    opt = ClippedOptimizer(OPTIMIZERS["sgd-momentum"](model.parameters()), 0.5, skip_limit=limit)
    before = flat(model)
    raised = []
    for step in range(6):
        opt.zero_grad()
        backward(model, step)
        poison(model)
        try:
            opt.step()
        except fastclip.SkipLimitError as error:
            raised.append((step, str(error)))
    assert [step for step, _ in raised] == ([] if limit is None else list(range(limit - 1, 6)))
    assert opt.skipped_in_a_row == opt.skipped_steps == 6
    assert torch.equal(flat(model), before)
    opt.zero_grad()
    backward(model, 0)
    opt.step()
    assert opt.skipped_in_a_row == 0


@pytest.mark.parametrize(("names", "told"), [("abc", "a, b, c"), ("abcd", "a, b, c, ...")])
def test_the_limit_names_the_first_gradients(names, told):
    params = [torch.nn.Parameter(torch.ones(1)) for _ in names]
    for p in params:
        p.grad = torch.tensor([math.nan])
    inner = torch.optim.SGD(params, lr=0.1)
    opt = ClippedOptimizer(inner, skip_limit=1, names=list(zip(names, params, strict=True)))
    with pytest.raises(fastclip.SkipLimitError, match=f"; in the latest one {re.escape(told)} held NaN or Inf"):
        opt.step()


@pytest.mark.parametrize(("limit", "error"), [(0, ValueError), (-1, ValueError), (1.5, ValueError), (True, TypeError)])
def test_limits_that_are_none(limit, error):
    with pytest.raises(error, match="skip_limit"):
        ClippedOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.1), skip_limit=limit)


@pytest.mark.parametrize("form", ["wrapper", "attached"])
def test_rules_may_change_between_steps(form):
    model = small_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = fastclip.attach(inner) if form == "attached" else ClippedOptimizer(inner)
    opt = inner if form == "attached" else guard
    assert (guard.nonfinite, guard.skip_limit) == ("skip", 100)
    backward(model, 0)
    poison(model)
    opt.step()
    guard.nonfinite = "raise"
    with pytest.raises(fastclip.NonFiniteGradientError):
        opt.step()
    guard.nonfinite, guard.skip_limit = "skip", 2
    with pytest.raises(fastclip.SkipLimitError):
        opt.step()
    guard.skip_limit = None
    opt.step()
    assert guard.skipped_steps == 3
    for name, value in [("nonfinite", "ignore"), ("skip_limit", 0), ("max_norm", -1.0)]:
        with pytest.raises(ValueError, match=name):
            setattr(guard, name, value)
    assert (guard.nonfinite, guard.skip_limit, guard.max_norm) == ("skip", None, 1.0)


class Sharpness(torch.optim.SGD):
    """As SAM does: climbs along the gradient first, and steps from where it was with the gradient from up there."""

    @torch.no_grad()
    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        climbs = [p.grad.clone() for p in params]
        for p, climb in zip(params, climbs, strict=True):
            p.add_(climb, alpha=0.1)
        with torch.enable_grad():
            loss = closure()
        for p, climb in zip(params, climbs, strict=True):
            p.sub_(climb, alpha=0.1)
        super().step()
        return loss


def test_an_optimizer_that_moves_before_it_asks_gets_a_new_evaluation():
    """The one that was judged before the step is of other parameters."""
    model, twin = small_model(), small_model()
    plain, opt = Sharpness(twin.parameters(), lr=0.1), ClippedOptimizer(Sharpness(model.parameters(), lr=0.1), 0.5)

    def closure(of, clip):
        of.zero_grad()
        loss = backward(of, 0)
        if clip:
            fastclip.clip_grad_norm_(of.parameters(), 0.5)
        return loss

    for _ in range(3):
        closure(twin, True)
        expected = plain.step(lambda: closure(twin, True))
        assert torch.equal(opt.step(lambda: closure(model, False)), expected)
        assert torch.equal(flat(model), flat(twin))
    assert opt.clipped_steps == 6


class Rewrites(torch.optim.Optimizer):
    """Does something to its gradient before it asks its closure, as SAM might; without autograd, as torch's own do."""

    def __init__(self, params, rewrite):
        super().__init__(params, {})
        self.rewrite = rewrite

    @torch.no_grad()
    def step(self, closure):
        (p,) = self.param_groups[0]["params"]
        self.rewrite(p)
        closure()
        p.sub_(p.grad)


@pytest.mark.parametrize(
    "rewrite",
    [lambda p: p.grad.zero_(), lambda p: setattr(p, "grad", torch.zeros(1)), lambda p: setattr(p, "grad", None)],
    ids=["writes", "replaces", "drops"],
)
def test_an_optimizer_that_rewrites_gradients_gets_a_new_evaluation(rewrite):
    p = torch.nn.Parameter(torch.ones(1))

    def closure():
        opt.zero_grad()
        loss = (3.0 * p).sum()
        loss.backward()
        return loss

    opt = ClippedOptimizer(Rewrites([p], rewrite), max_norm=10.0)
    opt.step(closure)
    assert p.item() == 1.0 - 3.0


@pytest.mark.parametrize("form", [ClippedOptimizer, fastclip.attach, fastclip.GradMonitor])
def test_names_of_another_model_are_told(form):
    model, other = small_model(), small_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    if form is fastclip.GradMonitor:
        inner = ClippedOptimizer(inner)
    with pytest.warns(RuntimeWarning, match="names: none of the optimizer's 4 parameters is among them"):
        form(inner, names=other)
    ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), names=model[0].named_parameters())  # of some
