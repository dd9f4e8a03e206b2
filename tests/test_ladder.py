"""What follows skipped steps: a smaller learning rate, a way back, an error, each told in the event log."""

import copy
import io
import math
import pickle
import sys

import pytest
import torch
from small import WithoutRate, backward, flat, identical, poison, small_model
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
import fastclip.backends
from fastclip import ClippedOptimizer, Event, LossWatch, Rollback, SkipLimitError, SpikeBackoff
from fastclip.ladder import Ladder
from fastclip.policies import GlobalNorm, SkipLarge, Value
from fastclip.record import LAG, Echo

INNER = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adam-amsgrad-fused": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, fused=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd-momentum-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def sgd(model, **settings):
    return ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), max_norm=math.inf, **settings)


def step(opt, model, number=0, bad=False):
    opt.zero_grad()
    backward(model, number, scale=1.0)
    if bad:
        poison(model)
    return opt.step()


def steps(opt, model, pattern):
    """One step a character: ``x`` is a bad one."""
    for number, kind in enumerate(pattern):
        step(opt, model, number, kind == "x")


def kinds(opt):
    return [(event.step, event.kind) for event in opt.events]


def moved_by(opt, model):
    """The learning rate that a plain SGD step really had."""
    before = flat(model)
    step(opt, model)
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    return float((before - flat(model)).norm() / grad.norm())


# ---- SpikeBackoff


@pytest.mark.parametrize(
    ("pattern", "settings", "factor", "log"),
    [
        ("xx", {}, 1.0, []),
        ("xxx", {}, 0.5, [(3, "lr cut")]),
        ("xxoxx", {}, 1.0, []),  # a good step ends the row
        ("xxxxxx", {}, 0.25, [(3, "lr cut"), (6, "lr cut")]),
        ("xxxooo", {}, 0.5, [(3, "lr cut")]),
        ("xxxoooo", {}, 1.0, [(3, "lr cut"), (7, "lr restored")]),
        ("xxxoooxoooo", {}, 1.0, [(3, "lr cut"), (11, "lr restored")]),  # a bad step starts the count anew
        ("xxxxxxoooooooo", {}, 1.0, [(3, "lr cut"), (6, "lr cut"), (10, "lr restored"), (14, "lr restored")]),
        ("xxxxxxxxx", {"least": 0.2}, 0.25, [(3, "lr cut"), (6, "lr cut")]),
        ("xxxxxx", {"least": 0.25}, 0.25, [(3, "lr cut"), (6, "lr cut")]),
        ("x" * 12, {"patience": 1, "factor": 0.1}, 1e-3, [(1, "lr cut"), (2, "lr cut"), (3, "lr cut")]),
        ("ooooo", {}, 1.0, []),
    ],
)
def test_backoff_cuts_and_brings_back(pattern, settings, factor, log):
    model = small_model()
    opt = sgd(model, backoff=SpikeBackoff(**{"patience": 3, "recover": 4, **settings}))
    steps(opt, model, pattern)
    assert opt.lr_factor == pytest.approx(factor)
    assert [entry for entry in kinds(opt) if entry[1] != "skip"] == log
    assert opt.param_groups[0]["lr"] == 1.0
    assert moved_by(opt, model) == pytest.approx(factor, rel=1e-4)


def test_backoff_ends_at_one_exactly():
    """Rounding must not leave a learning rate that is cut by the last bit for ever."""
    for factor in (0.05, 0.3, 0.7, 0.9):
        backoff = SpikeBackoff(factor, patience=1, recover=1, least=1e-9)
        cuts = sum(backoff.bad() for _ in range(6))
        assert sum(backoff.good() for _ in range(20)) == cuts == 6
        assert backoff.lr_factor == 1.0


SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], gamma=0.3),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.9),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 8),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 2, cycle_momentum=False),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.3, total_steps=20),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_backoff_lives_beside_a_scheduler(name, tensor_lr):
    """Outside the step the lr is the scheduler's own; inside it is that, times the factor, in every group."""

    def make(**settings):
        model = small_model()
        first, *others = model.parameters()
        lr = (lambda value: torch.tensor(value, dtype=torch.float64)) if tensor_lr else float
        groups = [{"params": [first], "lr": lr(0.1)}, {"params": others, "lr": lr(0.02)}]
        inner = torch.optim.SGD(groups, lr=lr(0.1), momentum=0.5)
        opt = ClippedOptimizer(inner, max_norm=math.inf, **settings)
        return model, opt, SCHEDULERS[name](opt)

    def schedule(scheduler):
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))

    (model, opt, mine), (twin, other, theirs) = make(backoff=SpikeBackoff(patience=1, recover=3)), make()
    used = []
    inner_step = opt.inner.step
    opt.inner.step = lambda: (used.append([float(g["lr"]) for g in opt.param_groups]), inner_step())
    for number, kind in enumerate("oxxoooooox"):
        step(opt, model, number, kind == "x")
        step(other, twin, number, kind == "x")
        if kind == "o":
            own = [float(group["lr"]) for group in other.param_groups]
            factor = {0: 1.0, 3: 0.25, 4: 0.25, 5: 0.25, 6: 0.5, 7: 0.5, 8: 0.5}[number]
            assert used[-1] == pytest.approx([lr * factor for lr in own], rel=1e-9, abs=1e-15)
        schedule(mine)
        schedule(theirs)
        assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in other.param_groups]
        assert all(isinstance(g["lr"], torch.Tensor) == tensor_lr for g in opt.param_groups)
    assert len(used) == 7


def test_backoff_restores_the_lr_after_an_exception():
    model = small_model()
    opt = sgd(model, backoff=SpikeBackoff(patience=1))
    opt.param_groups[0]["lr"] = lr = torch.tensor(0.1)
    step(opt, model, bad=True)
    works = opt.inner.step

    def fails():
        assert opt.param_groups[0]["lr"] == 0.05
        raise RuntimeError("out of memory")

    opt.inner.step = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        step(opt, model)
    assert opt.param_groups[0]["lr"] is lr
    assert lr == 0.1
    opt.inner.step = works
    step(opt, model)


def test_backoff_lets_an_optimizer_without_a_rate_step():
    model = small_model()
    opt = ClippedOptimizer(WithoutRate(model.parameters()), backoff=SpikeBackoff(patience=1))
    step(opt, model, bad=True)
    before = flat(model)
    step(opt, model)
    assert not torch.equal(flat(model), before)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_backoff_continues_from_a_state_dict():
    """Also the counts towards the next cut and the next recovery, wherever it is saved."""
    pattern = "xxoxxxooxxxxoooooooooxxx"

    def make():
        model = small_model()
        return model, sgd(model, backoff=SpikeBackoff(patience=2, recover=3))

    for saved_at in range(len(pattern)):
        (model, opt), (fresh, other) = make(), make()
        steps(opt, model, pattern[:saved_at])
        fresh.load_state_dict(model.state_dict())
        other.load_state_dict(through_file(opt.state_dict()))
        for kind in pattern[saved_at:]:
            assert other.lr_factor == opt.lr_factor
            step(opt, model, 0, kind == "x")
            step(other, fresh, 0, kind == "x")
        assert torch.equal(flat(model), flat(fresh))


def test_the_bare_optimizer_loads_it_too():
    model = small_model()
    opt = sgd(model, backoff=SpikeBackoff(patience=1))
    steps(opt, model, "ox")
    torch.optim.SGD(model.parameters(), lr=0.1).load_state_dict(opt.state_dict())
    without = sgd(model)
    without.load_state_dict(opt.state_dict())
    assert without.lr_factor == 1.0


@pytest.mark.parametrize("form", ["attach", "clipped"])
def test_the_other_forms_take_the_rungs_too(form):
    model = small_model()
    rungs = {"backoff": SpikeBackoff(patience=1), "rollback": Rollback(after=2), "max_norm": 1.0}
    if form == "attach":
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = fastclip.attach(opt, **rungs)
    else:
        make = fastclip.clipped(torch.optim.SGD, **rungs)
        guard = opt = make(model.parameters(), lr=0.1)
        other = make(small_model().parameters(), lr=0.1)
    guard.observe(math.nan)
    step(opt, model)
    step(opt, model, bad=True)
    assert [kind for _, kind in kinds(guard)] == ["skip", "lr cut", "skip", "lr cut", "roll back"]
    assert guard.lr_factor == 0.25
    if form == "clipped":  # each object its own
        assert (other.lr_factor, other.events) == (1.0, [])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SpikeBackoff(1.0), ValueError, "factor"),
        (lambda: SpikeBackoff(0.0), ValueError, "factor"),
        (lambda: SpikeBackoff(math.nan), ValueError, "factor"),
        (lambda: SpikeBackoff(least=1.0), ValueError, "least"),
        (lambda: SpikeBackoff(patience=0), ValueError, "patience"),
        (lambda: SpikeBackoff(patience=1.5), ValueError, "patience"),
        (lambda: SpikeBackoff(patience=math.inf), ValueError, "patience"),
        (lambda: SpikeBackoff(recover=True), TypeError, "recover"),
        (lambda: SpikeBackoff("half"), TypeError, "factor"),
        (lambda: Rollback(0), ValueError, "every"),
        (lambda: Rollback(after=0), ValueError, "after"),
        (lambda: LossWatch(alpha=1.0), ValueError, "alpha"),
        (lambda: LossWatch(-1.0), ValueError, "k"),
        (lambda: LossWatch(math.nan), ValueError, "k"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- Rollback


@pytest.mark.parametrize(("every", "good"), [(1, 3), (3, 5), (4, 3)])
@pytest.mark.parametrize("name", INNER)
def test_rollback_is_bitwise(name, every, good):
    """Parameters, every state tensor, step counts; and the run goes on as one that had stopped at the snapshot."""
    model, twin = small_model(), small_model()
    rollback = Rollback(every, after=2)
    opt = ClippedOptimizer(INNER[name](model.parameters()), max_norm=0.5, rollback=rollback)
    other = ClippedOptimizer(INNER[name](twin.parameters()), max_norm=0.5)
    kept = good // every * every
    steps(opt, model, "o" * good + "xx")
    steps(other, twin, "o" * kept)
    assert rollback.snapshot.taken_at == kept
    for number in range(5):
        assert torch.equal(flat(model), flat(twin))
        assert identical(opt.state_dict(), other.state_dict())
        step(opt, model, number)
        step(other, twin, number)
    assert kinds(opt) == [(good + 1, "skip"), (good + 2, "skip"), (good + 2, "roll back")]
    assert f"snapshot of step {kept}" in opt.events[-1].reason
    steps(opt, model, "xx")  # and again, to the snapshot that was taken since
    assert kinds(opt)[-1] == (good + 9, "roll back")


def test_rollback_with_lbfgs():
    """Its state is Python's: numbers, None and lists of tensors, which it changes in place."""

    def make(**settings):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        inner = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2, history_size=4)
        return model, ClippedOptimizer(inner, max_norm=math.inf, **settings)

    def closure(model, opt, bad=False):
        def evaluate():
            opt.zero_grad()
            loss = ((model(inputs) - 1) ** 2).mean()
            loss.backward()
            if bad:
                poison_first(model)
            return loss

        return evaluate

    inputs = torch.randn(8, 3)
    rollback = Rollback(every=10_000, after=2)
    (model, opt), (twin, other) = make(rollback=rollback), make()
    for _ in range(3):
        other.step(closure(twin, other))
    model.load_state_dict(twin.state_dict())
    opt.load_state_dict(copy.deepcopy(other.state_dict()))
    memory = nbytes([list(model.parameters()), *(list(state.values()) for state in other.state.values())])
    for _ in range(2):  # twice, as the first way back must not use the snapshot up
        for bad in (False, False, True, True):
            opt.step(closure(model, opt, bad))
        assert opt.events[-1].kind == "roll back"
        assert torch.equal(flat(model), flat(twin))
        assert identical(opt.state_dict()["state"], other.state_dict()["state"])
    for _ in range(3):
        assert torch.equal(opt.step(closure(model, opt)), other.step(closure(twin, other)))
    assert rollback.snapshot.nbytes == memory


def test_no_snapshot_in_the_middle_of_a_step(monkeypatch):
    """LBFGS asks for the gradient at points on its way that no step ends in."""
    model = small_model()
    rollback, at = Rollback(every=3), []
    take = rollback.take
    monkeypatch.setattr(rollback, "take", lambda *args: (at.append(flat(model)), take(*args)))
    opt = ClippedOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5), rollback=rollback)

    def closure():
        opt.zero_grad()
        return backward(model, 0, scale=1.0)

    ends = [flat(model)]
    for _ in range(4):
        opt.step(closure)
        ends.append(flat(model))
    assert len(at) > 2
    assert all(any(torch.equal(there, end) for end in ends) for there in at)


def nbytes(value):
    """Of all tensors in nested lists."""
    return sum(map(nbytes, value)) if isinstance(value, list) else getattr(value, "nbytes", 0)


class LateBuffer(torch.optim.SGD):
    """Starts to average its parameters in the third step, as many optimizers do."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["count"] = state.get("count", 0) + 1
            if state["count"] > 2:
                state["average"] = state.get("average", p.detach()) * 0.5 + p.detach() * 0.5


def test_rollback_takes_away_state_that_came_later():
    """Of a parameter that had some at the snapshot already."""
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(LateBuffer(model.parameters(), lr=0.1), rollback=Rollback(every=2, after=1))
    other = ClippedOptimizer(LateBuffer(twin.parameters(), lr=0.1))
    steps(opt, model, "ooo")
    assert "average" in next(iter(opt.state.values()))
    step(opt, model, bad=True)
    steps(other, twin, "oo")
    assert identical(opt.state_dict(), other.state_dict())
    assert torch.equal(flat(model), flat(twin))


class CommonState(torch.optim.SGD):
    """Keeps something that belongs to no parameter."""

    def step(self, closure=None):
        super().step(closure)
        common = self.state["all"]
        common["count"] = common.get("count", 0) + 1


@pytest.mark.parametrize(("every", "kept"), [(9, None), (2, {"count": 2})], ids=["came later", "was there"])
def test_rollback_reaches_state_of_no_parameter(every, kept):
    model = small_model()
    opt = ClippedOptimizer(CommonState(model.parameters(), lr=0.1), rollback=Rollback(every, after=1))
    steps(opt, model, "ooox")
    assert kinds(opt)[-1] == (4, "roll back")
    assert opt.state.get("all") == kept


def poison_first(model):
    next(model.parameters()).grad.view(-1)[0] = math.nan


def test_rollback_says_its_memory():
    model = small_model()
    rollback = Rollback(1)
    opt = ClippedOptimizer(torch.optim.Adam(model.parameters()), rollback=rollback)
    assert rollback.snapshot.nbytes == 0
    step(opt, model)
    parameters = sum(p.nbytes for p in model.parameters())
    assert rollback.snapshot.nbytes == parameters  # before the first step there is no state
    step(opt, model)
    counts = sum(state["step"].nbytes for state in opt.state.values())
    assert rollback.snapshot.nbytes == 3 * parameters + counts


class CopiedElements(TorchDispatchMode):
    """How many elements are copied by anything that runs within."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.clone, torch.ops.aten._foreach_copy_):
            first = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.count += sum(tensor.numel() for tensor in first)
        return func(*args, **(kwargs or {}))


def test_steps_without_a_snapshot_copy_nothing():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.Adam(model.parameters(), fused=True), rollback=Rollback(every=4))
    copied = []
    for number in range(9):
        opt.zero_grad()
        backward(model, number)
        with CopiedElements() as mode:
            opt.step()
        copied.append(mode.count)
    weights = flat(model).numel()
    assert all(copied[i] >= weights for i in (0, 4, 8))
    assert all(copied[i] < weights for i in (1, 2, 3, 5, 6, 7))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_snapshot_of_bad_parameters(bad):
    """It would be a way back to nowhere; the next good moment will do."""
    model = small_model()
    rollback = Rollback(every=1, after=2)
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rollback=rollback)
    steps(opt, model, "oo")
    good = flat(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = bad
    for parameter in model.parameters():  # finite gradients of broken parameters
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    assert rollback.snapshot.taken_at == 1
    steps(opt, model, "xx")
    assert opt.events[-1].kind == "roll back"
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), good)  # the one before the second step


def test_without_a_snapshot_there_is_no_way_back():
    model = small_model()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    opt = sgd(model, rollback=Rollback(after=1))
    step(opt, model, bad=True)
    assert kinds(opt) == [(1, "skip")]


def test_no_snapshot_between_bad_steps():
    """Their first one has its chance; after that the loss may be what is wrong with the parameters."""
    model = small_model()
    rollback = Rollback(every=2, after=5)
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rollback=rollback)
    steps(opt, model, "ooxxxx")
    assert rollback.snapshot.taken_at == 2
    for become_known in (rollback.good, rollback.good, rollback.bad):  # together, as on a device
        become_known()
    assert not rollback.wants_snapshot(opt)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_the_rungs_and_take_their_own_snapshot(copied):
    model = small_model()
    backoff, rollback = SpikeBackoff(patience=2), Rollback(every=100, after=3)
    opt = ClippedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), backoff=backoff, rollback=rollback)
    steps(opt, model, "ooxx")
    twin, other = copied((model, opt))
    assert other.lr_factor == 0.5
    assert other.events == opt.events
    step(other, twin)
    before = flat(twin)
    steps(other, twin, "xxx")
    assert other.events[-1].kind == "roll back"
    assert not torch.equal(flat(twin), before)
    assert torch.equal(flat(twin), flat(model))  # the copy's first snapshot, not the original's
    assert rollback.snapshot.taken_at == 0


def with_a_late_group(after):
    """A model, an optimizer that has stepped it once, and a parameter that it got afterwards."""
    model, extra = small_model(), torch.nn.Parameter(torch.ones(2))
    opt = ClippedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), rollback=Rollback(every=100, after=after))
    step(opt, model)
    opt.add_param_group({"params": [extra]})
    extra.grad = torch.ones(2)
    return model, extra, opt


def test_a_group_added_after_the_snapshot_has_one_of_its_own():
    model, extra, opt = with_a_late_group(after=1)
    first = flat(model)
    backward(model, 1)
    opt.step()
    assert not torch.equal(extra, torch.ones(2))
    steps(opt, model, "x")
    assert kinds(opt)[-1] == (3, "roll back")
    assert opt.events[-1].reason.endswith("the snapshot of step 1")
    assert torch.equal(flat(model), first)  # all of them, to the same step
    assert torch.equal(extra, torch.ones(2))
    assert extra not in opt.state
    assert len(opt.state) == len(list(model.parameters()))


def test_replaced_parameters_are_in_the_next_snapshot():
    """As many as before: their number doesn't tell."""
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rollback=Rollback(every=100, after=1))
    step(opt, model)
    model[2] = torch.nn.Linear(4, 1)
    opt.param_groups[0]["params"][2:] = model[2].parameters()
    before = flat(model)
    step(opt, model)
    assert not torch.equal(flat(model), before)
    steps(opt, model, "x")
    assert torch.equal(flat(model), before)


def test_what_no_snapshot_has_stays():
    """A group that is added between bad steps, of which no snapshot is taken."""
    model, extra, opt = with_a_late_group(after=2)
    first = flat(model)
    steps(opt, model, "x")
    opt.add_param_group({"params": [last := torch.nn.Parameter(torch.ones(2))]})
    opt.state[last]["momentum"] = torch.ones(2)
    steps(opt, model, "x")
    assert kinds(opt)[-1] == (3, "roll back")
    assert torch.equal(flat(model), first)
    assert torch.equal(extra, torch.ones(2))
    assert set(opt.state) == {*model.parameters(), last}
    assert opt.state[last].keys() == {"momentum"}


# ---- the rungs together


def test_the_ladder_in_order():
    model = small_model()
    rungs = {"backoff": SpikeBackoff(patience=2), "rollback": Rollback(every=2, after=3), "skip_limit": 5}
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **rungs)
    steps(opt, model, "ooo")
    at_snapshot = small_model()
    other = ClippedOptimizer(torch.optim.SGD(at_snapshot.parameters(), lr=0.1, momentum=0.9))
    steps(other, at_snapshot, "oo")
    with pytest.raises(SkipLimitError, match="5 steps in a row"):
        steps(opt, model, "xxxxx")
    assert kinds(opt) == [
        (4, "skip"),
        (5, "skip"),
        (5, "lr cut"),
        (6, "skip"),
        (6, "roll back"),
        (7, "skip"),
        (7, "lr cut"),
        (8, "skip"),
    ]
    assert torch.equal(flat(model), flat(at_snapshot))
    assert opt.skipped_steps == opt.skipped_in_a_row == 5
    step(opt, model)  # whoever catches the error may go on
    assert opt.skipped_in_a_row == 0


def test_each_rung_alone():
    for rungs in ({}, {"backoff": SpikeBackoff(patience=1)}, {"rollback": Rollback(after=1)}):
        model = small_model()
        opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **rungs, skip_limit=None)
        steps(opt, model, "ox")
        own = {"backoff": ["lr cut"], "rollback": ["roll back"]}
        assert [kind for _, kind in kinds(opt)] == ["skip", *(k for rung in rungs for k in own[rung])]


def test_of_steps_that_become_known_together_the_bad_ones_came_first():
    """One bad and one good, and no bad one in a row at the end."""
    model = small_model()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    rollback = Rollback(after=1)
    rollback.take(opt, 0)
    ladder = Ladder(SpikeBackoff(patience=1, recover=1), rollback)
    assert ladder.climb(opt, 2, 1, 0, lambda: ("so", ()))
    assert [event.kind for event in ladder.events] == ["skip", "lr cut", "roll back", "lr restored"]
    assert ladder.lr_factor == 1.0


def test_events_say_why():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=SkipLarge(warmup=2))
    steps(opt, model, "oox")
    opt.zero_grad()
    backward(model, 0, scale=1e9)
    opt.step()
    opt.observe(math.inf)
    step(opt, model)
    nan, large, loss = opt.events
    assert nan == Event(3, "skip", "NaN or Inf in the gradients", ("param_groups[0]['params'][0]",))
    assert str(nan) == "step 3: skip: NaN or Inf in the gradients (param_groups[0]['params'][0])"
    assert (large.step, large.tensors) == (4, ())
    assert "SkipLarge" in large.reason
    assert str(loss) == "step 5: skip: the loss that was observed"
    assert str(Event(1, "skip", "so", tuple("abc"))) == "step 1: skip: so (a, b, c)"
    assert str(Event(1, "skip", "so", tuple("abcd"))) == "step 1: skip: so (a, b, c, ...)"
    opt.events.clear()
    assert len(opt.events) == 3


def test_the_log_is_bounded():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), skip_limit=None)
    backward(model, 0)
    poison(model)
    for _ in range(1010):
        opt.step()
    assert [opt.events[0].step, opt.events[-1].step, len(opt.events)] == [11, 1010, 1000]


# ---- observe


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", [float, torch.tensor, lambda v: torch.tensor([[v]], dtype=torch.bfloat16)])
@pytest.mark.parametrize("name", INNER)
def test_a_bad_loss_skips_exactly_the_next_step(name, form, loss):
    model = small_model()
    opt = ClippedOptimizer(INNER[name](model.parameters()))
    for observed, skipped in ((None, 0), (1.0, 0), (loss, 1), (1.0, 1), (None, 1)):
        if observed is not None:
            opt.observe(form(observed))
        before, state = flat(model), copy.deepcopy(opt.state_dict())
        step(opt, model)
        assert opt.skipped_steps == skipped
        if observed is loss:
            assert torch.equal(flat(model), before)
            assert identical(opt.state_dict(), state)
        else:
            assert not torch.equal(flat(model), before)
    assert [event.reason for event in opt.events] == ["the loss that was observed"]


def test_one_bad_loss_of_several_is_enough():
    """Gradients are accumulated over micro batches: each has a loss."""
    model = small_model()
    opt = sgd(model)
    for loss in (1.0, math.nan, 1.0):
        opt.observe(loss)
    step(opt, model)
    step(opt, model)
    assert opt.skipped_steps == 1


def test_a_step_that_raised_has_used_the_loss():
    model = small_model()
    opt = sgd(model, nonfinite="raise")
    opt.observe(math.nan)
    with pytest.raises(fastclip.NonFiniteGradientError):
        step(opt, model, bad=True)
    step(opt, model)
    assert opt.skipped_steps == 0


def test_observing_the_closures_loss():
    """It is called inside of the step, before the gradients are looked at."""
    model = small_model()
    opt = sgd(model)
    before = flat(model)

    def closure():
        opt.zero_grad()
        loss = backward(model, 0)
        opt.observe(loss * math.inf)
        return loss

    opt.step(closure)
    assert torch.equal(flat(model), before)
    step(opt, model)
    assert opt.skipped_steps == 1


def told_of_several_evaluations(losses, steps=1, **settings):
    """What listeners are told of steps that evaluate their closure more than once, and observe these losses in it."""
    p, losses, told = torch.nn.Parameter(torch.ones(2)), iter(losses), []
    opt = ClippedOptimizer(torch.optim.LBFGS([p], lr=0.1, max_iter=3), math.inf, **settings)
    opt._record.listeners.append(told.append)

    def closure():
        opt.zero_grad()
        loss = p.pow(4).sum()
        loss.backward()
        opt.observe(next(losses))
        return loss

    for _ in range(steps):
        opt.step(closure)
    return told


def test_a_bad_loss_in_the_middle_of_a_step_holds_nothing_back():
    """The parameters have moved already."""
    told = told_of_several_evaluations([1.0, math.nan, math.nan])
    assert [outcome.skipped for outcome in told] == [False] * 3
    assert not any(outcome.reasons.get("loss") for outcome in told)


def test_what_is_done_about_skips_is_told_once_a_step():
    backoff = SpikeBackoff(patience=1, recover=1)
    told = told_of_several_evaluations([math.nan, 1.0, 1.0, 1.0], 2, backoff=backoff)
    assert [[event.kind for event in outcome.rungs] for outcome in told] == [["lr cut"], ["lr restored"], [], []]


@pytest.mark.parametrize("k", [None, 3.0])
def test_a_spike_of_the_loss(k):
    model = small_model()
    opt = sgd(model, loss_watch=LossWatch(k, warmup=10))
    losses = [1.0 + 0.1 * (-1) ** i for i in range(20)]
    for loss in [*losses, 1.25, 1.6, *losses, 100.0, 1.0]:
        opt.observe(torch.tensor(loss))
        step(opt, model)
    assert [event.step for event in opt.events] == ([] if k is None else [22, 43])


def test_no_spikes_in_the_warm_up_and_none_from_a_bad_loss():
    watch = LossWatch(2.0, warmup=3)
    seen = [math.nan, 1.0, 50.0, math.inf, 1.0, 1.0, 1e6, 1.0, -math.inf, 1.0]
    bad = [bool(watch.is_bad(torch.tensor(value))) for value in seen]
    assert bad == [not math.isfinite(value) or value == 1e6 for value in seen]
    assert watch.count == 7
    assert watch.mean < 100.0  # what it learned from 1e6 is the largest that it would have let pass


def test_a_lasting_change_of_the_loss_is_followed():
    watch = LossWatch(3.0, warmup=5)
    for _ in range(10):
        assert not watch.is_bad(torch.tensor(1.0))
    bad = [bool(watch.is_bad(torch.tensor(3.0))) for _ in range(200)]
    assert bad[0]
    assert not any(bad[100:])


def test_the_floor_is_a_share_of_the_magnitude_of_losses_below_zero():
    watch = LossWatch(3.0, warmup=2, floor=0.1)
    assert not any(bool(watch.is_bad(torch.tensor(loss))) for loss in (-10.0, -10.0, -8.0))


def test_the_largest_loss_that_may_pass_does():
    watch = LossWatch(3.0, warmup=1, floor=0.0)
    assert not any(bool(watch.is_bad(torch.tensor(2.0))) for _ in range(4))


def test_the_watch_continues_from_a_state_dict():
    def make():
        model = small_model()
        return model, sgd(model, loss_watch=LossWatch(3.0, warmup=5))

    (model, opt), (fresh, other) = make(), make()
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0)).exp()
    for loss in losses[:20]:
        opt.observe(loss)
        step(opt, model)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(through_file(opt.state_dict()))
    before = int(opt.skipped_steps)
    for loss in [torch.tensor(30.0), *losses[20:]]:  # a spike at once: one that has yet to learn lets it pass
        for o, m in ((opt, model), (other, fresh)):
            o.observe(loss)
            step(o, m)
    assert other.skipped_steps == opt.skipped_steps - before > 0
    assert identical(other.state_dict(), opt.state_dict())


def test_a_refused_optimizer_leaves_anothers_snapshot():
    rollback = Rollback(every=1)
    model = small_model()
    opt = sgd(model, rollback=rollback)
    step(opt, model)
    assert rollback.snapshot.nbytes > 0
    with pytest.raises(ValueError, match="given to two"):
        sgd(small_model(), rollback=rollback)
    assert rollback.snapshot.taken_at == 0
    assert rollback.snapshot.nbytes > 0


def test_an_optimizer_that_is_wrapped_again_keeps_its_snapshot():
    model, rollback = small_model(), Rollback(every=1)
    opt = sgd(model, rollback=rollback)
    step(opt, model)
    ClippedOptimizer(opt.inner, rollback=rollback)
    assert rollback.snapshot.taken_at == 0


@pytest.mark.parametrize("loss", [torch.ones(2), torch.ones(0), torch.ones(1, 3)])
def test_a_loss_is_one_number(loss):
    with pytest.raises(TypeError, match=r"loss.*shape"):
        sgd(small_model()).observe(loss)


# ---- as on an accelerator


@pytest.fixture(params=["cpu", "accelerator"])
def late(request, monkeypatch):
    """No value is known to the host but from the echo, and on an accelerator so many steps late; the reference backend
    serves."""
    fastclip.backends.forced = "reference"
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "fastclip" and hasattr(module, "known_to_host"):
            monkeypatch.setattr(module, "known_to_host", lambda tensor: False)
    if request.param == "cpu":
        return 0
    send = Echo.send

    def send_from_afar(echo, counts):
        send(echo, counts)
        echo._is_far = True

    monkeypatch.setattr(Echo, "send", send_from_afar)
    return LAG


@pytest.mark.parametrize(
    "policy", [lambda: GlobalNorm(1.0), lambda: Value(1.0), SkipLarge], ids=["norm", "value", "skip"]
)
@pytest.mark.parametrize("name", INNER)
def test_the_ladder_on_a_device(late, name, policy):
    """It acts ``late`` steps late; what a step itself may not do, it doesn't do even then."""
    model = small_model()
    rungs = {"backoff": SpikeBackoff(patience=2, recover=4), "rollback": Rollback(every=2, after=4), "skip_limit": 12}
    opt = ClippedOptimizer(INNER[name](model.parameters()), policy=policy(), **rungs)
    trail = []
    for number in range(10):
        trail.append((flat(model), copy.deepcopy(opt.state_dict()["state"])))
        if number < 9:
            step(opt, model, number)
    before = flat(model)
    for number in range(4 + late):
        step(opt, model, bad=True)
        if number < 3:
            assert torch.equal(flat(model), before)
    assert [kind for _, kind in kinds(opt)][:7] == ["skip", "skip", "lr cut", "skip", "skip", "lr cut", "roll back"]
    assert opt.events[0].step == 10
    assert "device" in opt.events[0].reason  # which gradient it was, the host would have to wait for
    (at,) = [i for i, (parameters, _) in enumerate(trail) if torch.equal(parameters, flat(model))]
    waits = isinstance(opt._record._counts, list)  # for what a step may not know otherwise; then nothing is late
    assert at == (9 if late and not waits else 8)
    assert identical(opt.state_dict()["state"], trail[at][1])
    with pytest.raises(SkipLimitError):
        steps(opt, model, "x" * 12)
    assert opt.skipped_in_a_row == 12 + (0 if waits else late)


@pytest.mark.parametrize("name", INNER)
def test_the_step_that_goes_back_on_a_device_does_not_happen(late, name):
    """Also where its own gradients are good: they belong to the parameters that were just given up."""
    model = small_model()
    opt = ClippedOptimizer(INNER[name](model.parameters()), rollback=Rollback(every=2, after=3))
    told = []
    monitor = fastclip.GradMonitor(opt, sinks=told.append)
    trail = [flat(model)]
    for number in range(9):
        step(opt, model, number)
        trail.append(flat(model))
    number = 0
    while not any(event.kind == "roll back" for event in opt.events):
        step(opt, model, number, bad=number < 3)
        number += 1
        assert number < 12
    assert any(torch.equal(flat(model), there) for there in trail)
    monitor.close()
    assert told[-1].rolled_back
    assert told[-1].clipped_norm is None  # whether its own gradients were good or not


@pytest.mark.parametrize("name", ["adamw-fused", "sgd-momentum-fused", "adam"])
def test_the_lr_comes_back_on_a_device(late, name):
    model = small_model()
    opt = ClippedOptimizer(INNER[name](model.parameters()), backoff=SpikeBackoff(patience=2, recover=4))
    steps(opt, model, "oooxxooooooooooo")
    assert [kind for _, kind in kinds(opt)] == ["skip", "skip", "lr cut", "lr restored"]
    assert opt.events[2].step == 5
    assert opt.lr_factor == 1.0
    assert opt.skipped_steps == 2


@pytest.mark.parametrize("name", INNER)
def test_a_bad_loss_on_a_device(late, name):
    model = small_model()
    opt = ClippedOptimizer(INNER[name](model.parameters()))
    for number in range(8):
        opt.observe(torch.tensor(math.nan if number == 3 else 1.0))
        before, state = flat(model), copy.deepcopy(opt.state_dict())
        step(opt, model, number)
        if number == 3:
            assert torch.equal(flat(model), before)
            assert identical(opt.state_dict(), state)
        else:
            assert not torch.equal(flat(model), before)
    assert opt.skipped_steps == 1
    (event,) = opt.events
    assert event.kind == "skip"
    assert 4 <= event.step <= 4 + 2 * late


@pytest.mark.parametrize("bare", [False, True])
def test_nothing_goes_back_to_before_a_checkpoint_was_loaded(bare):
    model = small_model()
    opt = sgd(model, rollback=Rollback(1, after=1))
    step(opt, model)
    step(opt, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    opt.load_state_dict((opt.inner if bare else opt).state_dict())
    assert opt._ladder.rollback.snapshot.taken_at is None
    step(opt, model, bad=True)
    assert all(bool((parameter == 7.0).all()) for parameter in model.parameters())


def test_bad_steps_before_a_checkpoint_was_loaded_put_off_no_snapshot():
    model = small_model()
    opt = sgd(model, rollback=Rollback(1, after=2))
    step(opt, model, bad=True)
    opt.load_state_dict(opt.state_dict())
    step(opt, model)
    assert opt._ladder.rollback.snapshot.taken_at == 1


def test_a_watch_without_a_loss_is_told_once():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), loss_watch=fastclip.LossWatch(3.0))
    with pytest.warns(RuntimeWarning, match=r"loss_watch: no loss was observed.*observe\(loss\) before each step"):
        step(opt, model)
    step(opt, model)
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), loss_watch=fastclip.LossWatch(3.0))
    opt.observe(1.0)
    step(opt, model)
