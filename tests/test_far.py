"""The road where the host can't see values without waiting for the device."""

import copy
import math
import sys

import gpu
import pytest
import torch
from far import OWN, go_far, no_waiting
from fastclip.bench.model import GUARDS_LAUNCHES, SCALED_LAUNCHES, SCALERS_LAUNCHES, TWICE_LAUNCHES
from small import (
    EXTREMES,
    INNERS,
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
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
import fastclip.clipping
import fastclip.guard
import fastclip.policies
import fastclip.record
import fastclip.riding
from fastclip import ClippedOptimizer
from fastclip.backends import EMULATED
from fastclip.policies import AdaGC, Chain, GlobalNorm, Percentile, PerTensorNorm, Unitwise, Value, ZScore


@pytest.fixture(params=["reference", *(backend.name for backend in EMULATED)])
def far(request, monkeypatch):
    go_far(monkeypatch, request.param)


@pytest.fixture
def far_from_here_on(monkeypatch):
    """For a test that asks for it in the middle."""
    go_far(monkeypatch, EMULATED[0].name if EMULATED else "reference")


def may_wait(name, first):
    """Fused SGD's first step: one that is skipped on the device would leave uninitialised momentum behind."""
    return pytest.MonkeyPatch.context() if first and name == "sgd-fused" else no_waiting()


def test_the_guard_against_waiting_works():
    x = torch.tensor(1.0)
    for wait in (float, bool, int, lambda t: t.item(), lambda t: t.tolist(), lambda t: [1][t.long() - 1]):
        with no_waiting(), pytest.raises(AssertionError, match="waits"):
            wait(x)
    assert float(x) == 1.0


@pytest.mark.parametrize("how", ["rows[:, [0]]", "rows[[0]] = 1.0", "rows.new_tensor(1.0)", "torch.tensor(0).to(rows)"])
def test_numbers_are_not_brought_to_the_device_either(how):
    """As torch's own indexing with a list does, which waits for the copy and with it for all that came before."""
    own = {"rows": torch.zeros(2, 2), "torch": torch}
    with no_waiting():
        exec(compile(how, "elsewhere.py", "exec"), own)
        with pytest.raises(AssertionError, match="brings the host's numbers"):
            exec(compile(how, f"{OWN}/here.py", "exec"), own)


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
    assert (opt.steps, opt.skipped_steps, opt.nonfinite_steps) == (7, 3, 3)
    assert opt.clipped_steps == (4 if max_norm < 1.0 else 0)


@pytest.mark.parametrize("reason", ["rule", "loss"])
def test_a_step_that_is_skipped_for_another_reason_is_not_counted_as_nan(reason, far):
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.tensor([3.0])
    opt = ClippedOptimizer(torch.optim.SGD([p], lr=0.1), policy=Says(1.0) if reason == "rule" else None)
    if reason == "loss":
        opt.observe(torch.tensor(math.nan))
    opt.step()
    assert (opt.skipped_steps, opt.nonfinite_steps) == (1, 0)


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


def test_a_parameter_that_never_has_a_gradient_is_not_waited_for(far):
    """Fused SGD makes no momentum for it, ever."""
    used, unused = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    opt = ClippedOptimizer(torch.optim.SGD([used, unused], lr=0.1, momentum=0.9, fused=True))
    used.grad = torch.tensor([3.0])
    opt.step()
    with no_waiting():
        opt.step()
    assert opt.steps == 2


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
        if step < 2:
            assert opt.last_stats.infs.tolist() == [step, 0, 0, 0]
        assert opt.nonfinite_steps == (step if rule == "propagate" else min(step, 1))  # the parameters are NaN, too
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


@pytest.mark.parametrize("arrives", [0, 1, 2, 9])
def test_the_host_acts_on_what_was_two_steps_ago(far, monkeypatch, arrives):
    """However late a count arrives: it is waited for only where the host is further ahead than that."""
    waited = []

    class Sent:
        """A copy that has arrived when that many more have been sent."""

        def __init__(self, counts):
            self.counts, self.at = counts.clone(), len(sent)
            sent.append(self)

        def values(self):
            if len(sent) - 1 - self.at < arrives:
                waited.append(self.at)
            return self.counts

    sent = []
    monkeypatch.setattr(fastclip.record, "Sent", Sent)
    monkeypatch.setattr(fastclip.record.Echo, "send", far_send)
    model = small_model()
    opt = ClippedOptimizer(INNERS["adamw-fused"](model.parameters()), 0.5, skip_limit=2)
    backward(model, 0)
    poison(model)
    for _ in range(3):
        with no_waiting():
            opt.step()
    with pytest.raises(fastclip.SkipLimitError):
        opt.step()
    assert opt.skipped_steps == 4
    assert waited == ([0, 1] if arrives > 2 else [])


def far_send(echo, counts):
    """As if the counts came from an accelerator."""
    echo._is_far = True
    echo._sent.append(fastclip.record.Sent(counts))


def test_a_count_is_waited_for_on_the_stream_of_its_own_device(monkeypatch):
    """Which need not be the current one: an event of another device's stream is over at once."""
    recorded = []

    class Event:
        def __init__(self, device):
            self.device = device

        def record(self, stream=None):
            recorded.append((self.device, stream))

    class Far:
        device = torch.device("cuda:1")

        def copy_(self, values, non_blocking):
            assert non_blocking
            return self

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch, "empty_like", lambda values, **where: Far())
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"stream of {device}")
    fastclip.record.Echo().send(Far())
    assert recorded == [(Far.device, "stream of cuda:1")]


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


@pytest.mark.parametrize("clip", [fastclip.clip_grad_norm_, lambda p, at: fastclip.clip_grads_(p, GlobalNorm(at))])
def test_a_bound_on_the_device_is_not_waited_for_by_the_functions(clip, far) -> None:
    p, bound = torch.nn.Parameter(torch.zeros(2)), torch.tensor([0.5])
    p.grad = torch.tensor([3.0, 4.0])
    with no_waiting():
        norm = clip([p], bound)
    assert float(norm) == 5.0
    torch.testing.assert_close(p.grad, torch.tensor([0.3, 0.4]))
    with pytest.raises(TypeError, match="max_norm: expected a number or a tensor with one element"):
        clip([p], torch.ones(2))


SHARED = {
    "clip": lambda p: fastclip.clip_grad_norm_(p, 0.5),
    "each": lambda p: fastclip.clip_grads_(p, PerTensorNorm(0.1)),
    "units": lambda p: fastclip.clip_grads_(p, Unitwise(0.01)),
    "stats": lambda p: fastclip.grad_stats(p, weights=True),
    "penalty": lambda p: ClippedOptimizer(torch.optim.SGD(p, 0.1, fused=True), 0.5, l2=0.1).step(),
}


@pytest.mark.parametrize("call", SHARED.values(), ids=SHARED)
def test_backends_share_a_list_without_waiting(call, monkeypatch) -> None:
    """As a list with some gradients that kernels can't take as they lie; here each backend takes every other one."""

    table_of = fastclip.backends.reference.table_of

    def every_other(given, native=None):
        table = table_of(given[::2])
        table.positions = [2 * i for i in table.positions]
        table.refused = dict.fromkeys(range(1, len(given), 2), "not mine")
        return table

    results = []
    for shared in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(rows, 3)) for rows in range(1, 8)]
        for param in params:
            param.grad = torch.randn_like(param)
        with monkeypatch.context() as patches, no_waiting():
            go_far(patches, "reference")
            if shared:
                patches.setattr(fastclip.backends.reference, "table_of", every_other)
                assert len(fastclip.clipping.plan(fastclip.tensors.grads_of(params)).parts) > 2
            told = call(params)
        results.append((told, params))
    (apart, bare), (told, params) = results
    if told is not None:
        assert str(told) == str(apart)
    assert identical([(p, p.grad) for p in params], [(p, p.grad) for p in bare])


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


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Parameter:
    """A parameter with a gradient of 7, in a capture that is only pretended."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 7.0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    return p


class FarOff(torch.Tensor):
    """One whose value the host would have to wait for: not plain memory of the CPU."""

    def detach(self):
        return self


LEARNING = [ZScore(), Percentile(), AdaGC(), GlobalNorm(lambda step: 1.0), Chain(GlobalNorm(1.0), ZScore())]


@pytest.mark.parametrize(
    ("clip", "why_not"),
    [
        (lambda p: fastclip.clip_grad_norm_([p], 1.0, error_if_nonfinite=True), '"raise" has to wait'),
        (lambda p: fastclip.clip_grad_value_([p], FarOff([1.0])), "clip_value, a tensor on a device"),
        (lambda p: fastclip.clip_grads_with_norm_([p], FarOff([1.0]), 7.0), "max_norm, a tensor on a device"),
        *((lambda p, rule=rule: fastclip.clip_grads_([p], rule), "learns from step to step") for rule in LEARNING),
        (lambda p: ClippedOptimizer(torch.optim.SGD([p], 0.1, fused=True), 1.0).step(), "step of a guarded optimizer"),
        (lambda p: ClippedOptimizer(torch.optim.SGD([p], 0.1), math.inf).step(), "step of a guarded optimizer"),
    ],
)
def test_what_a_replay_can_not_do_is_not_captured(captured, clip, why_not) -> None:
    """A clear error, before anything is written."""
    with pytest.raises(RuntimeError, match=f"{why_not}.*, and a CUDA graph is being captured; .* Nothing was written"):
        clip(captured)
    assert captured.grad.tolist() == [7.0, 7.0, 7.0]
    assert captured.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "clip",
    [
        lambda p: fastclip.clip_grad_norm_([p], 1.0, nonfinite="skip"),
        lambda p: fastclip.clip_grad_norm_([p], torch.tensor(1.0)),
        lambda p: fastclip.clip_grads_([p], PerTensorNorm(1.0), nonfinite="zero"),
        lambda p: fastclip.clip_grads_([p], Value(0.6), nonfinite="skip"),
    ],
)
def test_what_needs_no_host_is_captured(captured, clip) -> None:
    clip(captured)
    assert float(captured.grad.norm()) < 1.1


def test_a_step_works_again_after_a_capture_that_refused_it(captured, monkeypatch) -> None:
    opt = ClippedOptimizer(torch.optim.SGD([captured], 0.1, fused=True), 1.0)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        opt.step()
    monkeypatch.undo()
    opt.step()
    assert (opt.steps, opt.clipped_steps) == (1, 1)


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


class FusedLaunches(TorchDispatchMode):
    """What rode with each launch of one of torch's fused kernels."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in fastclip.riding.FUSED_KERNELS:
            self.seen.append({name: kwargs.get(name) for name in fastclip.riding.RIDERS})
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched_twice(far, monkeypatch):
    """Every list is long enough, and the backend's writes return early."""
    monkeypatch.setattr(fastclip.backends.reference, "returns_early", True)
    monkeypatch.setattr(fastclip.riding, "TWICE_FROM_BYTES", 0)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@every_fused
def test_of_two_launches_the_one_that_is_meant_steps(name, max_norm, tensor_lr, launched_twice):
    """With nothing to clip no scale rides, so no gradient is written; and nothing waits. Bad steps change nothing."""
    model, twin = small_model(), small_model()
    opt, plain = ClippedOptimizer(INNERS[name](model.parameters()), max_norm), INNERS[name](twin.parameters())
    for each in (opt, plain):
        for group in each.param_groups:
            group["lr"] = torch.tensor(group["lr"]) if tensor_lr else group["lr"]
    for step in range(5):
        bad = step in (1, 3)
        opt.zero_grad()
        backward(model, step)
        if bad:
            poison(model)
        before, state = flat(model), copy.deepcopy(opt.state_dict())
        with FusedLaunches() as launches, may_wait(name, step == 0):
            opt.step()
        without, with_scale = launches.seen
        assert without["grad_scale"] is None
        if bad:
            assert (float(without["found_inf"]), float(with_scale["found_inf"])) == (1.0, 1.0)
            assert torch.equal(flat(model), before)
            assert identical(opt.state_dict(), state)
            continue
        clips = max_norm < 1.0
        assert (float(without["found_inf"]), float(with_scale["found_inf"])) == (float(clips), float(not clips))
        reference_step(twin, plain, step, max_norm)
        close = tolerance(name, clips)
        torch.testing.assert_close(flat(model), flat(twin), **close)
        torch.testing.assert_close(grads(model), grads(twin), **close)
        assert clean(opt, opt.inner)
    assert (opt.steps, opt.clipped_steps, opt.skipped_steps) == (5, 3 * clips, 2)


@every_fused
def test_a_coefficient_that_is_nan_is_not_taken_for_one(name, launched_twice):
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), 0.5, nonfinite="propagate")
    plain = INNERS[name](twin.parameters())
    for each, m in ((opt, model), (plain, twin)):
        backward(m, 0)
        poison(m)
        if each is plain:
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        each.step()
    assert torch.equal(flat(model).isnan(), flat(twin).isnan())
    assert flat(model).isnan().all()


class Launches(TorchDispatchMode):
    """Counts operations that a GPU has to be launched for, but a read and a write; of the backend's a tally is one."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.is_backend = 0, False
        for name, launches in (("read", 0), ("scale_", 0), ("tally", 1)):
            whole = getattr(fastclip.backends.reference, name)
            monkeypatch.setattr(fastclip.backends.reference, name, self._counted_as(launches, whole))

    def _counted_as(self, launches, whole):
        def call(*args):
            self.count += launches
            self.is_backend = True
            try:
                whole(*args)
            finally:
                self.is_backend = False

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        memory_or_host_alone = func.is_view or "empty" in func.name() or func.namespace == "profiler"
        self.count += not (self.is_backend or memory_or_host_alone)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counts_are_copied(monkeypatch):
    """To the host, which they are in when the device is the CPU."""
    send = fastclip.record.Echo.send
    monkeypatch.setattr(fastclip.record.Echo, "send", lambda echo, counts: send(echo, counts.clone()))


@pytest.mark.usefixtures("counts_are_copied")
@pytest.mark.parametrize("twice", [False, True])
def test_a_far_step_launches_as_much_as_the_model_says(twice, monkeypatch):
    go_far(monkeypatch, "reference")
    monkeypatch.setattr(fastclip.backends.reference, "returns_early", True)
    monkeypatch.setattr(fastclip.riding, "TWICE_FROM_BYTES", 0 if twice else 1 << 60)
    model, twin = small_model(), small_model()
    opt, plain = (
        ClippedOptimizer(INNERS["adamw-fused"](model.parameters()), 0.5),
        INNERS["adamw-fused"](twin.parameters()),
    )
    for each, m in ((opt, model), (plain, twin)):
        backward(m, 0)
        each.step()  # makes its state
    counts = []
    for each in (opt, plain):
        with Launches(monkeypatch) as launches:
            each.step()
        counts.append(launches.count)
    the_steps_own = 1 if twice else 0  # the kernel, once more
    assert counts[0] - counts[1] - the_steps_own == GUARDS_LAUNCHES + (TWICE_LAUNCHES if twice else 0)


@pytest.mark.usefixtures("counts_are_copied")
def test_a_far_step_under_a_scaler_launches_as_much_as_the_model_says(monkeypatch):
    go_far(monkeypatch, "reference")
    monkeypatch.setattr(fastclip.backends.reference, "returns_early", True)
    bare, ours, theirs = [], [], []
    for counts, scaler in (
        (bare, None),
        (ours, fastclip.GradScaler("cpu", init_scale=8.0)),
        (theirs, torch.amp.GradScaler("cpu", init_scale=8.0)),
    ):
        model = small_model()
        opt = INNERS["adamw-fused"](model.parameters())
        opt = ClippedOptimizer(opt, 0.5) if counts is ours else opt
        backward(model, 0)
        opt.step()  # makes its state
        if scaler is not None:
            scaler.scale(torch.ones(()))  # makes its own
        with Launches(monkeypatch) as launches:
            opt.step() if scaler is None else scaler.step(opt)
        counts.append(launches.count)
    assert ours[0] - bare[0] == GUARDS_LAUNCHES + SCALED_LAUNCHES
    assert theirs[0] - bare[0] - 1 == SCALERS_LAUNCHES  # one is the pass


@pytest.mark.parametrize("bad", [False, True])
def test_without_a_bound_nothing_is_launched_to_write(far, bad) -> None:
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    for p in params:
        p.grad = torch.full_like(p, 1e30)
    if bad:
        params[1].grad[0, 0] = math.inf
    before = [p.grad._version for p in params]
    with no_waiting():
        norm = fastclip.clip_grad_norm_(params, math.inf)
        opt = ClippedOptimizer(torch.optim.SGD(params, lr=0.1, fused=True), max_norm=math.inf)
        opt.step()
    assert [p.grad._version for p in params] == before
    assert float(norm) == (math.inf if bad else pytest.approx(7**0.5 * 1e30))
    assert (int(opt.clipped_steps), int(opt.skipped_steps)) == (0, bad)


def test_only_steps_of_many_bytes_are_launched_twice(far, monkeypatch):
    """Below that the host would be what takes the time; and a loss scale rides in any case."""
    monkeypatch.setattr(fastclip.backends.reference, "returns_early", True)
    model = small_model()
    opt = ClippedOptimizer(INNERS["adamw-fused"](model.parameters()), 0.5)
    size_bytes = sum(p.numel() * 4 for p in model.parameters())
    for least, grad_scale, launched in ((size_bytes + 1, None, 1), (size_bytes, None, 2), (size_bytes, 8.0, 1)):
        monkeypatch.setattr(fastclip.riding, "TWICE_FROM_BYTES", least)
        backward(model, 0)
        if grad_scale is not None:
            opt.grad_scale = torch.tensor(grad_scale)
        with FusedLaunches() as launches:
            opt.step()
        assert len(launches.seen) == launched


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


class Says(GlobalNorm):
    """Skips by any number that isn't 0."""

    total_only = True
    number = 3.0

    def decide(self, reading):
        return super().decide(reading)._replace(skip=torch.full((1,), self.number, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["skip", "propagate"])
@every_fused
def test_a_rule_skips_by_any_number(name, rule, far) -> None:
    """torch's fused steps skip where their found_inf is exactly 1."""
    model = small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()), policy=Says(0.5), nonfinite=rule)
    for number, skips in ((0.0, False), (3.0, True), (math.nan, True), (-0.5, True), (0.0, False)):
        opt.policy.number = number
        backward(model, 0)
        before = flat(model).clone()
        with may_wait(name, not opt.state):
            opt.step()
        assert torch.equal(flat(model), before) == skips
    assert (opt.steps, opt.clipped_steps, opt.skipped_steps, opt.skipped_in_a_row) == (5, 2, 3, 0)


@pytest.mark.parametrize("bad", [False, True])
def test_what_is_clamped_is_left_alone_without_waiting(far, bad) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.tensor([0.5, -7.0, math.inf if bad else 7.0, 0.0])
    before = p.grad.clone()
    with no_waiting():
        fastclip.clip_grads_([p], Value(2.0), nonfinite="skip")
    assert p.grad.tolist() == (before if bad else before.clamp(-2.0, 2.0)).tolist()


class InHalf(GlobalNorm):
    """Says its coefficient in 16 bits."""

    total_only = True

    def decide(self, reading):
        return super().decide(reading)._replace(clip_coef=torch.tensor(0.25, dtype=torch.float16))


@every_fused
def test_a_rule_says_its_coefficient_in_any_dtype(name, far) -> None:
    model, twin = small_model(), small_model()
    opt, plain = ClippedOptimizer(INNERS[name](model.parameters()), policy=InHalf()), INNERS[name](twin.parameters())
    for m in (model, twin):
        backward(m, 0)
    for p in twin.parameters():
        p.grad.mul_(0.25)
    with may_wait(name, True):
        opt.step()
    plain.step()
    torch.testing.assert_close(flat(model), flat(twin))


@pytest.mark.parametrize("rule", [GlobalNorm(1.0), PerTensorNorm(0.5), Unitwise(0.01), Value(0.5)], ids=str)
def test_what_a_device_said_is_waited_for_on_the_host(rule, monkeypatch) -> None:
    """A copy that isn't waited for is filled later: pinned memory, which torch gives it, may hold anything."""
    to = torch.Tensor.to

    def late(tensor, *args, **kwargs):
        to_host = args and isinstance(args[0], torch.device) and args[0].type == "cpu"
        return (
            torch.zeros_like(to(tensor, *args))
            if kwargs.get("non_blocking") and to_host
            else to(tensor, *args, **kwargs)
        )

    go_far(monkeypatch, "cpu")
    params = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    params[0].grad = torch.tensor([[1.0, 2.0], [math.inf, 0.0], [3.0, 5.0]])
    params[1].grad = torch.full((3, 2), 7.0)
    before = [p.grad.clone() for p in params]
    monkeypatch.setattr(torch.Tensor, "to", late)
    fastclip.clip_grads_(params, rule, nonfinite="skip")
    assert all(torch.equal(p.grad, old) for p, old in zip(params, before, strict=True))
    params[0].grad[1, 0] = 4.0
    fastclip.clip_grads_(params, rule, nonfinite="skip")
    monkeypatch.undo()
    twins = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    twins[0].grad, twins[1].grad = before[0].clone(), before[1].clone()
    twins[0].grad[1, 0] = 4.0
    fastclip.clip_grads_(twins, rule)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, twin.grad)


@every_fused
def test_a_found_inf_of_several_devices_is_one(name, monkeypatch) -> None:
    """A GradScaler adds up what it found on each; it may lie on a device though the gradients don't."""
    found_inf = torch.tensor(0.0)
    for module in [m for key, m in sys.modules.items() if key.startswith("fastclip.") and hasattr(m, "known_to_host")]:
        monkeypatch.setattr(module, "known_to_host", lambda tensor: tensor.data_ptr() != found_inf.data_ptr())
    model = small_model()
    opt = ClippedOptimizer(INNERS[name](model.parameters()))
    for found in (0.0, 2.0, 0.0):
        backward(model, 0)
        before = flat(model).clone()
        opt.found_inf = found_inf.fill_(found)
        opt.step()
        del opt.found_inf
        assert torch.equal(flat(model), before) == bool(found)
    assert (opt.steps, opt.skipped_steps) == (3, 1)
