"""The wrapper, the class form and attach in place of a plain optimizer: schedulers, state, copies, hooks."""

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref

import pytest
import torch
from small import MAKERS, backward, every_maker, flat, identical, poison, small_model, train
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastclip
from fastclip import ClippedOptimizer
from fastclip.policies import GlobalNorm

copies = pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])


SCHEDULERS = {
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum="momentum" in o.defaults),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.001, anneal_epochs=3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


def scheduled(model, opt, inner, make, early):
    """Rates, momenta and warnings of six steps; ``early`` steps the scheduler before the optimizer."""
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = make(opt)
        for step in range(6):
            if not (early and step == 0):
                train(model, opt, [step])
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            group = inner.param_groups[0]
            seen.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
    return seen, [(w.category, str(w.message)) for w in caught]


def test_every_scheduler_of_torch_is_listed():
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and "LRScheduler" not in name
    }
    assert found == SCHEDULERS.keys()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("form", ["wrapper", "class", "attached", "nested"])
@pytest.mark.parametrize("name", ["adamw", "momentum", "tensor-lr"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_drive_the_inner_rate_and_warn_as_ever(scheduler, name, form, early):
    """With an infinite bound the runs are the same to the bit, the "step() before step()" warning included."""
    model, twin = small_model(), small_model()
    plain, inner = MAKERS[name](twin.parameters()), MAKERS[name](model.parameters())
    if form == "attached":
        opt = inner
        fastclip.attach(inner, float("inf"))
    elif form == "class":
        made = fastclip.clipped(type(inner), max_norm=float("inf"))
        opt = made(model.parameters(), **{k: inner.defaults[k] for k in ("lr", "momentum") if k in inner.defaults})
        opt.param_groups[0]["foreach"] = inner.defaults["foreach"]
        inner = opt.inner
    else:
        opt = ClippedOptimizer(inner, float("inf"))
        opt = ClippedOptimizer(opt, float("inf")) if form == "nested" else opt
    expected = scheduled(twin, plain, plain, SCHEDULERS[scheduler], early)
    assert scheduled(model, opt, inner, SCHEDULERS[scheduler], early) == expected
    assert len({rate for rate, *_ in expected[0]}) > 1
    if early and scheduler not in ("ReduceLROnPlateau", "CosineAnnealingWarmRestarts"):  # theirs doesn't look
        assert any("optimizer.step()" in message for _, message in expected[1])
    assert torch.equal(flat(model), flat(twin))


def test_what_is_called_by_name():
    """Frameworks pass these by keyword."""
    model = small_model()
    opt = ClippedOptimizer(MAKERS["adamw"](model.parameters()))
    for method in ("load_state_dict", "state_dict", "add_param_group"):
        theirs = [n for n in inspect.signature(getattr(torch.optim.Optimizer, method)).parameters if n != "self"]
        assert list(inspect.signature(getattr(opt, method)).parameters) == theirs
    opt.load_state_dict(state_dict=opt.state_dict())
    opt.add_param_group(param_group={"params": [torch.nn.Parameter(torch.ones(1))]})
    opt.zero_grad(set_to_none=False)
    assert opt.step(closure=None) is None


@pytest.mark.parametrize("form", ["wrapper", "class", "nested"])
@every_maker
@copies
def test_copies_go_on_by_themselves(copied, name, form):
    """torch leaves hooks and a scheduler's patched ``step`` out of copies; what clips is not an addition."""
    model, twin = small_model(), small_model()
    made, reference = MAKERS[name](model.parameters()), MAKERS[name](twin.parameters())
    if form == "class":
        keys = [k for k in ("lr", "momentum", "fused", "foreach") if k in made.defaults]
        opt = fastclip.clipped(type(made), max_norm=0.5)(model.parameters(), **{k: made.defaults[k] for k in keys})
    else:
        opt = ClippedOptimizer(made, 0.5)
        opt = ClippedOptimizer(opt, 1e6) if form == "nested" else opt
    scheduler = lr_scheduler.ExponentialLR(opt, 1.0)
    opt.register_step_pre_hook(lambda *_: None)  # can't be pickled
    opt.register_step_post_hook(lambda *_: None)
    train(model, opt, range(3))
    scheduler.step()
    model_2, opt_2 = copied((model, opt))
    assert type(opt_2) is type(opt)
    assert isinstance(opt_2, ClippedOptimizer)
    assert opt_2.steps == 3
    assert opt_2.last_norm == opt.last_norm
    assert opt_2.param_groups[0]["params"][0] is model_2[0].weight
    scheduler_2 = lr_scheduler.ExponentialLR(opt_2, 1.0)
    train(model_2, opt_2, range(3, 6))
    scheduler_2.step()
    assert (opt.steps, opt_2.steps) == (3, 6)
    train(model, opt, range(3, 6))  # the original, and new ones, go on as well
    train(twin, reference, range(6), clip=0.5)
    close = {"rtol": 1e-5, "atol": 1e-6} if "fused" in name else {"rtol": 0, "atol": 0}  # it divides by the inverse
    torch.testing.assert_close(flat(model), flat(twin), **close)
    assert torch.equal(flat(model_2), flat(model))
    calls = []
    for optimizer in (opt_2, ClippedOptimizer(MAKERS[name](small_model().parameters()))):
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.step()
    MAKERS[name](small_model().parameters()).step()
    assert calls == ["pre", "pre"]


@copies
def test_copies_of_attached_optimizers_are_plain(copied):
    """torch drops what isn't defaults, state and groups; that is said, and no copy shares the guard."""
    model = small_model()
    inner = MAKERS["momentum"](model.parameters())
    guard = fastclip.attach(inner, 1e-3)
    train(model, inner, [0])
    model_2, inner_2 = copied((model, inner))
    before = flat(model_2)
    train(model_2, inner_2, [1])
    assert (flat(model_2) - before).norm() > 0.01
    assert guard.steps == 1
    again = fastclip.attach(inner_2, 1e-3)
    train(model_2, inner_2, [2])
    assert (again.steps, guard.steps) == (1, 1)
    assert "attach again" in fastclip.attach.__doc__.replace("\n    ", " ")


def test_whole_objects_save_and_load():
    model = small_model()
    opt = ClippedOptimizer(MAKERS["momentum"](model.parameters()), 1e-3)
    train(model, opt, range(2))
    file = io.BytesIO()
    torch.save((model, opt), file)
    file.seek(0)
    model, opt = torch.load(file, weights_only=False)
    train(model, opt, [2])
    assert (opt.steps, opt.clipped_steps) == (3, 3)
    assert opt.last_stats.names[0] == "param_groups[0]['params'][0]"


def adagrad_takes_new_parameters():
    """That of torch 2.10 and 2.11 makes its state when it is built, and finds none for a parameter that comes later."""
    first, later = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = torch.optim.Adagrad([first])
    opt.add_param_group({"params": [later]})
    later.grad = torch.ones(2)
    try:
        opt.step()
    except KeyError:
        return False
    return True


@pytest.mark.parametrize("through", ["wrapper", "inner"])
@every_maker
def test_new_parameters_join_the_norm(name, through):
    model = small_model()
    opt = ClippedOptimizer(MAKERS[name](model.parameters()), 1.0)
    train(model, opt, [0])
    extra = torch.nn.Parameter(torch.zeros(2))
    (opt if through == "wrapper" else opt.inner).add_param_group({"params": [extra]})
    extra.grad = torch.full((2,), 3e6)
    if name == "adagrad" and not adagrad_takes_new_parameters():
        with pytest.raises(KeyError, match="sum"):
            opt.step()
        return
    opt.step()
    assert opt.last_norm > 4e6
    assert fastclip.get_total_norm([extra.grad]) == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ValueError, match="more than one"):
        opt.add_param_group({"params": [extra]})
    replaced = torch.nn.Parameter(torch.zeros(4))
    replaced.grad = torch.full((4,), 4e7)
    opt.param_groups[1]["params"] = [replaced]
    opt.step()
    assert opt.last_norm == pytest.approx(8e7)
    assert replaced.any()
    opt.param_groups[1]["params"][0] = extra
    opt.step()
    assert opt.last_norm < 10.0


@pytest.mark.parametrize("depth", [1, 2])
def test_setting_the_views_reaches_the_inner(depth):
    model = small_model()
    inner = opt = MAKERS["momentum"](model.parameters())
    for _ in range(depth):
        opt = ClippedOptimizer(opt, 1e6)
    group = {**inner.param_groups[0], "params": [model[0].weight], "lr": 0.5}
    state, defaults = {}, {**inner.defaults, "lr": 3.0}
    opt.param_groups, opt.state, opt.defaults = [group], state, defaults
    assert inner.param_groups[0] is group
    assert inner.state is state
    assert inner.defaults is defaults
    before = flat(model)
    opt.state = torch.optim.SGD(model.parameters()).state
    train(model, opt, [0])
    moved = flat(model) != before
    assert moved.any()
    assert not moved[model[0].weight.numel() :].any()
    assert opt.last_norm == fastclip.get_total_norm([model[0].weight.grad])
    assert opt.state
    assert inner.state is opt.state


FORMS = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "wrapper": lambda p: ClippedOptimizer(torch.optim.SGD(p, lr=0.1), 1e-3),
    "class": lambda p: fastclip.clipped(torch.optim.SGD, max_norm=1e-3)(p, lr=0.1),
    "nested": lambda p: ClippedOptimizer(ClippedOptimizer(torch.optim.SGD(p, lr=0.1), 1e-3), 1.0),
}


def calls_of_hooks(opt, *arguments, **keywords):
    """What the hooks of one step get to see, less the identity of the optimizer."""
    calls = []

    def hook(name):
        def call(optimizer, args, kwargs):
            assert optimizer is args[0]
            calls.append((name, optimizer is opt, args[1:], kwargs, torch.is_grad_enabled()))

        return call

    handles = [
        register_optimizer_step_pre_hook(hook("all pre")),
        register_optimizer_step_post_hook(hook("all post")),
        opt.register_step_pre_hook(hook("own pre")),
        opt.register_step_post_hook(hook("own post")),
    ]
    opt.step(*arguments, **keywords)
    for handle in handles:
        handle.remove()
    opt.step(*arguments, **keywords)
    return calls


@pytest.mark.parametrize("form", ["wrapper", "class", "nested"])
def test_hooks_run_once_each(form):
    """Global ones too, which fire in the inner optimizer; arguments and grad mode are those of a plain step."""

    def closure():
        return None

    for arguments, keywords in [((), {}), ((closure,), {})]:
        expected, got = (
            {call[0]: call[2:] for call in calls}
            for calls in (
                calls_of_hooks(FORMS[kind](small_model().parameters()), *arguments, **keywords)
                for kind in ("plain", form)
            )
        )
        assert {name: got[name] for name in ("own pre", "own post")} == {
            name: expected[name] for name in ("own pre", "own post")
        }
        assert len(got) == 4
    model = small_model()
    calls = calls_of_hooks(FORMS[form](model.parameters()))
    assert [name for name, *_ in calls] == ["own pre", "all pre", "all post", "own post"]
    assert [is_wrapper for _, is_wrapper, *_ in calls] == [True, False, False, True]
    assert all(grad_mode for *_, grad_mode in calls)


@pytest.mark.parametrize("form", ["wrapper", "class", "nested"])
def test_hooks_see_gradients_before_and_after(form):
    model, seen = small_model(), []
    opt = FORMS[form](model.parameters())
    norm = lambda *_: seen.append(float(fastclip.get_total_norm([p.grad for p in model.parameters()])))  # noqa: E731
    opt.register_step_pre_hook(norm)
    opt.register_step_post_hook(norm)
    backward(model, 0)
    opt.step()
    assert seen == [pytest.approx(float(opt.last_norm)), pytest.approx(1e-3, rel=1e-2)]


def test_hooks_may_rewrite_the_arguments():
    """As with a plain optimizer, also what comes from a closure that a hook put in; rubbish is refused alike."""
    for form in FORMS:
        model = small_model()
        opt = FORMS[form](model.parameters())
        handle = opt.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "loss"), {}))
        assert opt.step() == "loss"
        handle.remove()
        handle = opt.register_step_pre_hook(lambda o, args, kwargs: ((o,), {"closure": lambda: "named"}))
        assert opt.step() == "named"
        handle.remove()
        for rubbish in (3, (1, 2, 3), "ab"):
            handle = opt.register_step_pre_hook(lambda *_, rubbish=rubbish: rubbish)
            with pytest.raises(RuntimeError, match="must return None or"):
                opt.step()
            handle.remove()


def test_hooks_on_the_inner_still_run():
    model, calls = small_model(), []
    inner = MAKERS["adamw"](model.parameters())
    inner.register_step_pre_hook(lambda o, a, k: calls.append(o is inner))
    inner.register_step_post_hook(lambda o, a, k: calls.append(o is inner))
    train(model, ClippedOptimizer(inner), [0])
    assert calls == [True, True]


@pytest.mark.parametrize("through", ["wrapper", "inner", "model", "nobody"])
@every_maker
def test_any_way_to_zero_gradients(name, through):
    """To None by default; and who calls it, if anyone, makes no difference (several trainers call the model's)."""
    model, twin = small_model(), small_model()
    opt, plain = ClippedOptimizer(MAKERS[name](model.parameters()), 0.5), MAKERS[name](twin.parameters())
    zero = {"wrapper": opt.zero_grad, "inner": opt.inner.zero_grad, "model": model.zero_grad, "nobody": lambda: None}
    for step in range(3):
        zero[through]()
        if through != "nobody":
            assert all(p.grad is None for p in model.parameters())
            plain.zero_grad()
        backward(model, step)
        backward(twin, step)
        fastclip.clip_grad_norm_(twin.parameters(), 0.5)
        opt.step()
        plain.step()
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-6)
    opt.zero_grad(set_to_none=False)
    fastclip.ClipGroup([plain]).zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for m in (model, twin) for p in m.parameters())


@pytest.mark.parametrize("wrap", [ClippedOptimizer, lambda bare: fastclip.ClipGroup([bare])], ids=["one", "group"])
def test_a_zero_grad_without_arguments(wrap):
    """apex's optimizers have one: nothing is passed that the caller didn't."""

    class Bare(torch.optim.SGD):
        def zero_grad(self):
            super().zero_grad()

    model = small_model()
    opt = wrap(Bare(model.parameters(), lr=0.1))
    backward(model, 0)
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("form", ["wrapper", "attached", "nested"])
@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bad", [False, True])
@every_maker
def test_gradients_are_not_kept_alive(name, bad, backend, max_norm, form):
    """Between zero_grad and the next backward their memory is the activations'."""
    fastclip.backends.forced = backend
    model = small_model()
    opt = MAKERS[name](model.parameters())
    guard = fastclip.attach(opt, max_norm) if form == "attached" else ClippedOptimizer(opt, max_norm)
    guard = ClippedOptimizer(guard, max_norm) if form == "nested" else guard
    opt = opt if form == "attached" else guard
    backward(model, 0)
    if bad:
        poison(model)
    gc.disable()  # not even in a cycle
    try:
        alive = [weakref.ref(p.grad) for p in model.parameters()]
        opt.step()
        opt.zero_grad()
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
    assert guard.last_norm != 0
    assert len(guard.last_stats.names) == 4


@pytest.mark.parametrize("form", ["wrapper", "attached", "nested"])
@every_maker
def test_steps_without_gradients(name, form):
    model = small_model()
    inner = MAKERS[name](model.parameters())
    guard = fastclip.attach(inner) if form == "attached" else ClippedOptimizer(inner)
    guard = ClippedOptimizer(guard) if form == "nested" else guard
    opt = inner if form == "attached" else guard
    before = flat(model)
    assert opt.step() is None
    assert opt.step(lambda: None) is None
    assert float(opt.step(lambda: torch.tensor(2.0))) == 2.0
    assert (guard.last_norm, guard.last_stats) == (None, None)
    assert (guard.steps, guard.clip_rate, guard.skipped_in_a_row) == (0, 0, 0)
    backward(model, 0)
    opt.step()
    norm = guard.last_norm
    opt.zero_grad()
    opt.step()
    assert (guard.steps, guard.last_norm) == (1, norm)
    assert not torch.equal(flat(model), before)
    assert opt.step(lambda: (backward(model, 0), None)[1]) is None
    assert guard.steps == 2


class Odd(torch.optim.SGD):
    """With attributes of its own, one of which is called as frameworks call what they wrap."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.optimizer, self.mode = "not to be seen", "start"

    def train(self):
        self.mode = "train"

    @property
    def broken(self):
        raise ValueError("inside")


@pytest.mark.parametrize("depth", [1, 2])
def test_attributes_of_the_inner(depth):
    inner = opt = Odd(small_model().parameters())
    for _ in range(depth):
        opt = ClippedOptimizer(opt)
    opt.train()
    assert opt.mode == inner.mode == "train"
    inner.mode = "later"
    assert opt.mode == "later"
    assert not hasattr(opt, "optimizer")
    with pytest.raises(AttributeError, match=r"ClippedOptimizer.*consolidate"):
        opt.consolidate()
    with pytest.raises(ValueError, match="inside"):
        opt.broken  # noqa: B018
    assert isinstance(opt, torch.optim.Optimizer)
    assert "max_norm=1" in repr(opt)
    assert "Odd" in repr(opt)
    assert opt.inner is (inner if depth == 1 else opt.inner)
    with pytest.raises(AttributeError):
        opt.inner = inner
    with pytest.raises(AttributeError, match="_inner"):
        ClippedOptimizer.__new__(ClippedOptimizer)._inner  # noqa: B018


def test_only_optimizers_are_wrapped():
    class AcceleratedOptimizer(torch.optim.SGD):
        pass

    ClippedOptimizer(AcceleratedOptimizer(small_model().parameters()))  # somebody's own, by that name
    AcceleratedOptimizer.__module__ = "accelerate.optimizer"
    for wrap in (ClippedOptimizer, fastclip.attach):
        with pytest.raises(TypeError, match=r"accelerator\.prepare\(fastclip\.ClippedOptimizer"):
            wrap(AcceleratedOptimizer(small_model().parameters()))
        with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got list"):
            wrap([])


CLASSES = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.05}),
    "AdamW-fused": (torch.optim.AdamW, {"lr": 0.05, "fused": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_form_equals_the_wrapper(name):
    optimizer_class, arguments = CLASSES[name]
    made = fastclip.clipped(optimizer_class, max_norm=0.5)
    assert isinstance(made, type)
    assert issubclass(made, ClippedOptimizer)
    assert made is fastclip.clipped(optimizer_class, max_norm=0.5)
    assert optimizer_class.__name__ in made.__name__
    model, twin = small_model(), small_model()
    opt = made(model.parameters(), **arguments)
    wrapped = ClippedOptimizer(optimizer_class(twin.parameters(), **arguments), 0.5)
    train(model, opt, range(4))
    train(twin, wrapped, range(4))
    assert torch.equal(flat(model), flat(twin))
    assert opt.clipped_steps == 4
    assert type(opt.inner) is optimizer_class
    positional = made(model.parameters(), 0.125)
    assert positional.param_groups[0]["lr"] == 0.125
    with pytest.raises(TypeError):
        made(model.parameters(), no_such=1)


def test_settings_of_the_class_form():
    """Those of the call go before those of the class; policies aren't shared between objects."""
    policy = GlobalNorm(0.5)
    made = fastclip.clipped(torch.optim.SGD, policy=policy, skip_limit=7, nonfinite="zero")
    a, b = made(small_model().parameters(), lr=0.1), made(small_model().parameters(), lr=0.1, skip_limit=None)
    assert a.policy is not b.policy is not policy
    assert (a.max_norm, a._record.skip_limit, b._record.skip_limit) == (0.5, 7, None)
    assert (a._fastclip.nonfinite, b._fastclip.nonfinite) == ("zero", "zero")
    own = fastclip.clipped(torch.optim.SGD, max_norm=1.0, norm_type=1.0)(small_model().parameters(), max_norm=3.0)
    assert (own.max_norm, own.policy.norm_type) == (3.0, 1.0)
    for wrong, message in [((torch.nn.Linear,), "subclass"), ((3,), "subclass")]:
        with pytest.raises(TypeError, match=message):
            fastclip.clipped(*wrong)
    with pytest.raises(TypeError, match="unknown setting max_nrom"):
        fastclip.clipped(torch.optim.SGD, max_nrom=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        fastclip.clipped(torch.optim.SGD, max_norm=-1.0)(small_model().parameters())


def test_the_class_itself_pickles(python):
    """skorch and GridSearchCV send it to other processes."""
    made = fastclip.clipped(torch.optim.AdamW, max_norm=0.5, nonfinite="raise")
    assert pickle.loads(pickle.dumps(made)) is made
    assert copy.deepcopy(made) is made
    program = (
        "import pickle, torch, fastclip\n"
        f"made = pickle.loads({pickle.dumps(made)!r})\n"
        "opt = made(torch.nn.Linear(2, 1).parameters(), lr=0.1)\n"
        "assert (opt.max_norm, opt.inner.__class__) == (0.5, torch.optim.AdamW)\n"
        "assert made is fastclip.clipped(torch.optim.AdamW, nonfinite='raise', max_norm=0.5)\n"
    )
    done = python(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("with_closure", [False, True])
@every_maker
def test_attach_equals_the_wrapper(name, with_closure):
    """On the very same object: its type, its identity and its signature stay."""
    model, twin = small_model(), small_model()
    inner, wrapped = MAKERS[name](model.parameters()), ClippedOptimizer(MAKERS[name](twin.parameters()), 0.5)
    signature = inspect.signature(inner.step)
    guard, losses = fastclip.attach(inner, 0.5), []
    assert inspect.signature(inner.step) == signature
    assert guard.optimizer is inner
    for step in range(5):
        for opt, m in ((inner, model), (wrapped, twin)):
            opt.zero_grad()
            if with_closure:

                def closure(opt=opt, m=m, step=step):
                    assert torch.is_grad_enabled()
                    opt.zero_grad()
                    loss = backward(m, step)
                    if step == 2:
                        poison(m)
                    return loss

                losses.append(opt.step(closure))
                continue
            backward(m, step)
            if step == 2:
                poison(m)
            opt.step()
        assert torch.equal(flat(model), flat(twin))
        assert guard.last_norm.equal(wrapped.last_norm) or step == 2
    assert len(losses) == (10 if with_closure else 0)
    assert losses[::2] == losses[1::2]
    assert (guard.steps, guard.clipped_steps, guard.skipped_steps) == (5, 4, 1)
    guard.max_norm = 1e-3
    wrapped.max_norm = 1e-3
    train(model, inner, [5])
    train(twin, wrapped, [5])
    assert torch.equal(flat(model), flat(twin))
    assert "max_norm=0.001" in repr(guard)


@pytest.mark.parametrize("scheduled", ["before", "after", "never"])
def test_attach_comes_off(scheduled):
    model, twin = small_model(), small_model()
    inner, plain = MAKERS["momentum"](model.parameters()), MAKERS["momentum"](twin.parameters())
    before = dict(vars(inner))
    if scheduled == "before":
        lr_scheduler.StepLR(inner, 10)
        before = dict(vars(inner))
    guard = fastclip.attach(inner, 1e-3)
    with pytest.raises(ValueError, match="already"):
        fastclip.attach(inner)
    if scheduled == "after":
        lr_scheduler.StepLR(inner, 10)
    guard.remove()
    if scheduled != "after":  # what a scheduler has put around it since stays
        assert vars(inner) == before
    train(model, inner, range(3))
    train(twin, plain, range(3))
    assert torch.equal(flat(model), flat(twin))
    assert guard.steps == 0
    with pytest.raises(RuntimeError, match="not attached"):
        guard.remove()
    again = fastclip.attach(inner, 1e-3)
    train(model, inner, range(3))
    assert (guard.steps, again.steps, again.clipped_steps) == (0, 3, 3)


def test_hooks_of_an_attached_optimizer():
    model, calls = small_model(), []
    inner = MAKERS["adamw"](model.parameters())
    fastclip.attach(inner)
    inner.register_step_pre_hook(lambda o, a, k: calls.append((o is inner, a[0] is inner, torch.is_grad_enabled())))
    inner.register_step_post_hook(lambda o, a, k: calls.append((o is inner, a[0] is inner, torch.is_grad_enabled())))
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("all"))
    backward(model, 0)
    inner.step()
    handle.remove()
    assert calls == ["all", (True, True, True), (True, True, True)]


def test_a_wrapper_around_an_attached_optimizer():
    model, twin = small_model(), small_model()
    inner, plain = MAKERS["adamw-fused"](model.parameters()), MAKERS["adamw-fused"](twin.parameters())
    guard = fastclip.attach(inner, 0.5)
    opt = ClippedOptimizer(inner, 2.0)
    scaler = fastclip.GradScaler("cpu", init_scale=256.0)
    for step in range(3):
        opt.zero_grad()
        scaler.scale(backward(model, step, run=False)).backward()
        scaler.step(opt)
        scaler.update()
        train(twin, plain, [step], clip=0.5)
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-6)  # two divisors, one after the other
    assert opt.last_norm > 2.0
    assert guard.last_norm == pytest.approx(2.0, rel=1e-5)


def test_both_forms_take_the_same_settings():
    wrapper, attached = (inspect.signature(form).parameters for form in (ClippedOptimizer, fastclip.attach))
    assert list(wrapper) == list(attached)
    assert [p.default for p in wrapper.values()] == [p.default for p in attached.values()]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("backoff", 0.5, "backoff: expected a fastclip.SpikeBackoff, got 0.5"),
        ("rollback", True, "rollback: expected a fastclip.Rollback, got True"),
        ("loss_watch", 3, "loss_watch: expected a fastclip.LossWatch, got 3"),
        ("skip_limit", "a", "skip_limit: expected a number, got str"),
    ],
)
def test_settings_of_the_wrong_type_are_named(setting, value, message):
    for form in (ClippedOptimizer, fastclip.attach):
        with pytest.raises(TypeError, match=message):
            form(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), **{setting: value})
    with pytest.raises(TypeError, match="loss: expected a number, got str"):
        ClippedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)).observe("x")


# what is stepped, and what reports
GUARDS = {
    "wrapper": lambda inner, **own: (ClippedOptimizer(inner, **own),) * 2,
    "attached": lambda inner, **own: (inner, fastclip.attach(inner, **own)),
}


@pytest.mark.parametrize("form", GUARDS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scales", [(0.01, 100.0), (100.0, 0.01), (100.0, 300.0)])
def test_a_closure_that_is_evaluated_again_is_clipped_by_its_own_norm(form, fused, scales):
    """A hook that writes a parameter makes the first evaluation void: what counts is the second one's gradient."""
    p = torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([p], lr=1.0, fused=fused)
    opt, reports = GUARDS[form](inner, max_norm=1.0)

    def touch(*_):
        with torch.no_grad():
            p.mul_(1.0)

    inner.register_step_pre_hook(touch)
    for grad_scale in (None, 8.0):
        if grad_scale is not None:
            opt.grad_scale = torch.tensor(grad_scale)
        coming = iter(scales)
        before = p.detach().clone()

        def closure(grad_scale=grad_scale, coming=coming):
            opt.zero_grad()
            loss = (p * torch.tensor([3.0, 4.0]) * next(coming)).sum()
            (loss * (grad_scale or 1.0)).backward()
            return loss

        opt.step(closure)
        assert float(reports.last_norm) == pytest.approx(5.0 * scales[1], rel=1e-6)
        assert float((before - p.detach()).norm()) == pytest.approx(min(5.0 * scales[1], 1.0), rel=1e-5)
        assert "found_inf" not in vars(inner)


@pytest.mark.parametrize("form", GUARDS)
def test_events_and_errors_call_parameters_by_the_names_that_were_given(form):
    model = small_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt, reports = GUARDS[form](inner, names=model, skip_limit=2)
    names = [name for name, _ in model.named_parameters()]
    backward(model, 0)
    assert "param_names" not in inner.param_groups[0]
    assert (opt.step(), list(reports.last_stats.names)) == (None, names)
    model.get_parameter(names[1]).grad.fill_(float("nan"))
    opt.step()
    assert reports.events[-1].tensors == (names[1],)
    with pytest.raises(fastclip.SkipLimitError, match=names[1]):
        opt.step()
    some = torch.optim.SGD([model.get_parameter(names[1])], lr=0.1)
    stats = GUARDS[form](some, names=[("mine", model.get_parameter(names[1]))])[1]
    some.step() if form == "attached" else stats.step()
    assert stats.last_stats.names == ["mine"]


@copies
def test_a_copy_has_other_parameters_and_none_of_the_names(copied):
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), names=model)
    backward(model, 0)
    opt.step()
    twin, other = copied((opt, model))
    backward(other, 0)
    twin.step()
    assert twin.last_stats.names[0] == "param_groups[0]['params'][0]"


def test_names_are_those_of_the_step():
    """Whatever became of the groups since."""
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    opts = [
        ClippedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1)),
        ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), names=model),
    ]
    for opt in opts:
        backward(model, 0)
        opt.step()
        params = opt.param_groups[0]["params"]
        params[0], params[2] = params[2], params[0]
        assert opt.last_stats.names == names
        del params[0]
        assert opt.last_stats.names == names


@pytest.mark.parametrize("names", [["weight"], 3, [("weight", 1.0)], {"weight": torch.zeros(1)}])
def test_names_are_a_module_or_pairs(names):
    with pytest.raises(TypeError, match="names: expected a module"):
        ClippedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), names=names)


class Weighing(fastclip.policies.Policy):
    """A rule that asks for the weights, and clips nothing."""

    def request(self):
        return fastclip.types.Request(weights=True)

    def decide(self, reading):
        return fastclip.policies.Decision(1.0)


def test_stats_have_weights_only_if_all_rules_have_asked_for_them():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], "policy": Weighing()}]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=1.0))
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    opt.step()
    assert opt.last_stats.weight_norms is None
    assert "grads[0]" not in str(opt.last_stats)


def clip_group(policy, **settings):
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    parts = [torch.optim.SGD([p], lr=0.0, momentum=0.9) for p in parameters[:2]]
    return fastclip.ClipGroup(parts, policy=policy, **settings), parts, parameters


def test_a_clip_group_follows_a_parameter_to_another_part():
    opt, (first, second), (a, b, _) = clip_group(GlobalNorm(1.0), rollback=fastclip.Rollback(1, after=1))

    def step(scale):
        a.grad, b.grad = torch.full((1,), scale), torch.ones(1)
        opt.step()

    step(1.0)
    first.add_param_group(second.param_groups.pop())
    step(1.0)
    step(1.0)
    assert opt.state[b] is first.state[b]
    before = first.state[b]["momentum_buffer"].clone()
    second.state[b]["momentum_buffer"].fill_(7.0)  # what it has left behind
    step(float("nan"))
    assert [event.kind for event in opt.events] == ["skip", "roll back"]
    assert identical([first.state[b]["momentum_buffer"]], [before])


def test_a_clip_group_refuses_what_is_clipped_already():
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    fastclip.attach(inner)
    for part in (inner, ClippedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0))):
        with pytest.raises(TypeError, match=f"{type(part).__name__} is clipped by fastclip already"):
            fastclip.ClipGroup([part])


def test_a_clip_group_refuses_what_needs_a_closure():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(TypeError, match="LBFGS needs a closure"):
        fastclip.ClipGroup([torch.optim.SGD([a], lr=1.0), torch.optim.LBFGS([b])])


def test_a_clip_group_returns_what_a_closure_returns():
    opt, _, (a, b, _) = clip_group(GlobalNorm(1.0))
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    assert opt.step(lambda: "the loss") == "the loss"


def test_a_clip_group_goes_on_with_a_replaced_parameter():
    opt, _, (a, b, c) = clip_group(GlobalNorm(1.0), rollback=fastclip.Rollback(1, after=1))
    for _ in range(2):
        a.grad, b.grad = torch.ones(1), torch.ones(1)
        opt.step()
    opt.param_groups[0]["params"] = [c]
    c.grad, b.grad = torch.ones(1), torch.ones(1)
    opt.step()
    c.grad = torch.tensor([float("nan")])
    opt.step()
    assert [event.kind for event in opt.events] == ["skip", "roll back"]


def test_names_belong_to_an_object_not_to_a_class():
    model = small_model()
    with pytest.raises(TypeError, match="unknown setting names"):
        fastclip.clipped(torch.optim.SGD, names=model)
    opt = fastclip.clipped(torch.optim.SGD, max_norm=1.0)(model.parameters(), lr=0.1, names=model)
    backward(model, 0)
    opt.step()
    assert opt.last_stats.names[0] == next(iter(model.named_parameters()))[0]


@pytest.mark.parametrize("form", GUARDS)
def test_a_nan_of_a_later_evaluation_raises_also_beside_a_users_found_inf(form):
    p = torch.nn.Parameter(torch.ones(2))
    opt, _ = GUARDS[form](torch.optim.LBFGS([p], lr=0.1, max_iter=4))
    opt.found_inf = torch.tensor(0.0)
    scales = iter([1.0, float("nan")] + [1.0] * 9)

    def closure():
        opt.zero_grad()
        loss = (p.square() * next(scales)).sum()
        loss.backward()
        return loss

    with pytest.raises(fastclip.NonFiniteGradientError) as error:
        opt.step(closure)
    assert bool(p.isfinite().all())
    assert not torch.equal(p, torch.ones(2))
    assert "nothing was written" not in str(error.value)
    assert "LBFGS evaluates its closure several times in a step and has moved the parameters already" in str(
        error.value
    )
