"""What travels in state dicts, between the wrapper, an attached optimizer and a plain one: what was learned, too."""

import copy
import io

import pytest
import torch
from small import MAKERS, WithoutRate, backward, every_maker, flat, identical, poison, small_model, train
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler

import fastclip
from fastclip import ClippedOptimizer
from fastclip.policies import AdaGC, GlobalNorm, ZScore


@every_maker
def test_views_stay_alive_after_loading(name):
    """``load_state_dict`` rebinds the inner's lists: a captured one would leave a scheduler driving a dead group."""
    model = small_model()
    opt = ClippedOptimizer(MAKERS[name](model.parameters()))
    before = lr_scheduler.ExponentialLR(opt, 0.5)
    train(model, opt, range(2))
    opt.load_state_dict(opt.state_dict())
    for view in ("param_groups", "state", "defaults"):
        assert getattr(opt, view) is getattr(opt.inner, view)
    rate = float(opt.inner.param_groups[0]["lr"])
    before.step()
    assert float(opt.inner.param_groups[0]["lr"]) == pytest.approx(rate * 0.5)
    after = lr_scheduler.ExponentialLR(opt, 0.1)
    train(model, opt, [2])
    rate = float(opt.inner.param_groups[0]["lr"])
    after.step()
    assert float(opt.inner.param_groups[0]["lr"]) == pytest.approx(rate * 0.1)


def test_several_optimizers_have_parameters_of_one_name():
    """Each is called by its place then, in what is saved, too: a checkpoint of other shapes doesn't pass."""

    def group_of(width):
        layers = torch.nn.Linear(width, 2), torch.nn.Linear(2, 1)
        opts = [torch.optim.SGD(layer.named_parameters(), lr=0.1) for layer in layers]
        group = fastclip.ClipGroup(opts, policy=AdaGC())
        layers[1](layers[0](torch.ones(1, width))).sum().backward()
        group.step()
        return group

    group = group_of(5)
    places = [f"param_groups[{i}]['params'][{j}]" for i in range(2) for j in range(2)]
    assert group.last_stats.names == places == list(group.last_stats.to_dict()["tensors"])
    saved = group.state_dict()
    with pytest.raises(ValueError, match=r"has \[2, 5\] there, \[2, 3\] here"):
        group_of(3).load_state_dict(saved)
    group_of(5).load_state_dict(saved)


@every_maker
def test_state_travels_between_plain_and_wrapped(name):
    """Wrapped for three steps, plain for three, wrapped again: one run, to the bit."""
    model, twin = small_model(), small_model()
    wrapped, plain = ClippedOptimizer(MAKERS[name](model.parameters()), 0.5), MAKERS[name](model.parameters())
    again, reference = ClippedOptimizer(MAKERS[name](model.parameters()), 0.5), MAKERS[name](twin.parameters())
    train(model, wrapped, range(3))
    plain.load_state_dict(wrapped.state_dict())
    assert plain.state_dict().keys() == wrapped.state_dict().keys() == {"state", "param_groups"}
    assert identical(plain.state_dict(), wrapped.state_dict())
    train(model, plain, range(3, 6), clip=0.5)
    again.load_state_dict(plain.state_dict())
    train(model, again, range(6, 9))
    train(twin, reference, range(9), clip=0.5)
    close = {"rtol": 1e-5, "atol": 1e-6} if "fused" in name else {"rtol": 0, "atol": 0}  # it divides by the inverse
    torch.testing.assert_close(flat(model), flat(twin), **close)


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_maker
def test_a_policy_that_learns_adds_one_key(name):
    """The plain optimizer ignores it; the wrapper finds it again, for all gradients and for single groups."""

    def make():
        model, asked = small_model(), []
        own = GlobalNorm(lambda step: asked.append(("own", step)) or 1.0)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "policy": own}]
        return model, ClippedOptimizer(MAKERS[name](groups), lambda step: asked.append(("all", step)) or 1.0), asked

    model, opt, _ = make()
    train(model, opt, range(3))
    state = saved_and_loaded(opt.state_dict())
    assert state.keys() == {"state", "param_groups", "fastclip"}
    assert identical(state, opt.state_dict())
    MAKERS[name](
        [{"params": small_model()[0].parameters()}, {"params": small_model()[2].parameters()}]
    ).load_state_dict(state)
    other, resumed, asked = make()
    policy = resumed.param_groups[1]["policy"]
    resumed.load_state_dict(state)
    assert resumed.param_groups[1]["policy"] is policy
    train(other, resumed, [3])
    assert sorted(asked) == [("all", 3), ("own", 3)]


def test_nested_policies_each_get_their_own_state_back():
    asked = []

    def make(model):
        inner = ClippedOptimizer(MAKERS["momentum"](model.parameters()), lambda step: asked.append(("in", step)) or 1.0)
        return ClippedOptimizer(inner, lambda step: asked.append(("out", step)) or 1.0)

    model = small_model()
    opt = make(model)
    backward(model, 0)
    opt.inner.step()
    train(model, opt, range(2))
    resumed = make(model)
    resumed.load_state_dict(saved_and_loaded(opt.state_dict()))
    asked.clear()
    train(model, resumed, [2])
    assert asked == [("out", 2), ("in", 3)]
    plain = MAKERS["momentum"](model.parameters())
    plain.load_state_dict(resumed.state_dict())
    resumed.load_state_dict(plain.state_dict())  # tells nothing: what they know stays
    asked.clear()
    train(model, resumed, [2])
    assert asked == [("out", 3), ("in", 4)]


def test_bounds_of_groups_stay_over_a_plain_checkpoint():
    model = small_model()

    def groups():
        return [{"params": model[0].parameters()}, {"params": model[2].parameters()}]

    own = groups()
    own[1]["group_max_norm"] = 0.25
    opt = ClippedOptimizer(torch.optim.SGD(own, lr=0.1), 0.5)
    opt.load_state_dict(torch.optim.SGD(groups(), lr=0.2).state_dict())
    assert opt.param_groups[0]["lr"] == 0.2
    train(model, opt, [0])
    parts = [fastclip.get_total_norm([p.grad for p in model[i].parameters()]) for i in (0, 2)]
    torch.testing.assert_close(parts, [torch.tensor(0.5), torch.tensor(0.25)])
    other = ClippedOptimizer(torch.optim.SGD(groups(), lr=0.1), 0.5)
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert other.param_groups[1]["group_max_norm"] == 0.25


@pytest.mark.parametrize(
    ("key", "saved", "loaded"), [("max_norm", 0.5, 0.5), ("group_max_norm", 0.5, 0.5), ("group_max_norm", None, 1.0)]
)
def test_a_bound_that_was_saved_goes_before_the_one_here(key, saved, loaded):
    def made(bound):
        return ClippedOptimizer(torch.optim.SGD([{"params": small_model().parameters(), key: bound}], lr=0.1))

    opt = made(1.0)
    opt.load_state_dict(made(saved).state_dict())
    assert opt.param_groups[0][key] == loaded


def test_state_dict_hooks_run_once():
    model = small_model()
    opt, calls = ClippedOptimizer(MAKERS["adamw"](model.parameters())), []
    opt.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    opt.register_state_dict_post_hook(lambda o, s: calls.append("post"))
    opt.register_load_state_dict_pre_hook(lambda o, s: calls.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    opt.load_state_dict(opt.state_dict())
    assert calls == ["pre", "post", "load pre", "load post"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("form", ["wrapper", "attached"])
@every_maker
def test_distributed_checkpoints(name, form):
    """Its rehearsal, a step with zero gradients and no rate, is no step of the training and no state of the guard."""
    model, other, twin = small_model(), small_model(), small_model()

    def make(m, bound):
        inner = MAKERS[name](m.parameters())
        guard = fastclip.attach(inner, bound) if form == "attached" else ClippedOptimizer(inner, bound)
        return (inner if form == "attached" else guard), guard

    (opt, guard), (resumed, fresh) = make(model, 0.5), make(other, lambda step: 0.5)
    plain = MAKERS[name](twin.parameters())
    assert get_optimizer_state_dict(model, opt).keys() == {"state", "param_groups"}
    assert (guard.steps, guard.last_norm) == (0, None)
    opt, guard = make(model, 0.5)  # the rehearsal has counted in Adam's own state
    train(model, opt, range(2))
    other.load_state_dict(model.state_dict())
    opt.zero_grad()
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, opt))
    assert (fresh.steps, fresh.last_norm) == (0, None)
    assert (guard.steps, guard.clipped_steps) == (2, 2)
    assert identical(resumed.state_dict()["state"], opt.state_dict()["state"])
    train(other, resumed, range(2, 4))
    train(twin, plain, range(4), clip=0.5)
    close = {"rtol": 1e-5, "atol": 1e-6} if "fused" in name else {"rtol": 0, "atol": 0}  # it divides by the inverse
    torch.testing.assert_close(flat(other), flat(twin), **close)
    assert fresh.steps == 2


def test_a_warm_up_from_rate_zero_is_no_rehearsal():
    model = small_model()
    opt = ClippedOptimizer(torch.optim.Adam(model.parameters(), lr=0.0), 0.5)
    train(model, opt, range(2))
    assert (opt.steps, opt.clipped_steps) == (2, 2)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_steps_with_zero_gradients_are_steps(rate):
    """Once there is state, or a learning rate, nobody rehearses."""
    model = small_model()
    opt = ClippedOptimizer(torch.optim.Adam(model.parameters(), lr=rate), 0.5)
    if rate == 0.0:
        train(model, opt, [0])
    before = int(opt.steps)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.steps == before + 1
    assert opt.last_norm == 0.0


def test_an_optimizer_without_a_rate_rehearses_nothing():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.zeros(1)
    opt = ClippedOptimizer(WithoutRate([p]))
    opt.step()
    assert opt.steps == 1


def test_a_policy_that_a_group_names_travels_before_the_first_step():
    def made():
        groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
        groups[1]["policy"] = "ZScore"
        return ClippedOptimizer(torch.optim.SGD(groups, lr=0.1))

    opt, fresh = made(), made()
    for _ in range(3):
        for group in opt.param_groups:
            group["params"][0].grad = torch.ones(2)
        opt.step()
    fresh.load_state_dict(opt.state_dict())
    assert int(fresh.param_groups[1]["policy"].count) == 3
    assert made().state_dict()["fastclip"]


# ---- attached ----


def learning(form):
    """A model, its optimizer with a rule for all and one of a group's own, and what tells of its steps."""
    model = small_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "policy": AdaGC(warmup=2)}]
    inner = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    settings = {"policy": ZScore(warmup=2), "backoff": fastclip.SpikeBackoff(patience=1, recover=3)}
    if form == "attached":
        guard = fastclip.attach(inner, **settings)
        return model, inner, guard
    wrapper = ClippedOptimizer(inner, **settings)
    return model, wrapper, wrapper


def trained_with_faults(model, opt, steps):
    for step in steps:
        opt.zero_grad()
        backward(model, step)
        if step == 3:
            poison(model)
        opt.step()


FORMS = ["wrapper", "attached"]


@pytest.mark.parametrize("resumed", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_a_run_resumes_bit_for_bit_in_either_form(first, resumed):
    whole, opt, guard = learning(first)
    trained_with_faults(whole, opt, range(9))
    half, begun, _ = learning(first)
    trained_with_faults(half, begun, range(5))
    again, ends, reports = learning(resumed)
    again.load_state_dict(half.state_dict())
    policy = ends.param_groups[1]["policy"]
    ends.load_state_dict(saved_and_loaded(begun.state_dict()))
    assert ends.param_groups[1]["policy"] is policy
    assert reports.lr_factor == 0.5
    trained_with_faults(again, ends, range(5, 9))
    assert torch.equal(flat(again), flat(whole))
    assert identical(ends.state_dict(), opt.state_dict())
    assert reports.lr_factor == guard.lr_factor == 1.0
    plain = torch.optim.SGD([{"params": whole[0].parameters()}, {"params": whole[2].parameters()}], lr=0.1)
    plain.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_the_state_of_other_tensors_is_refused_before_anything_changes(form):
    model, opt, _ = learning(form)
    trained_with_faults(model, opt, range(3))
    state = opt.state_dict()
    state["fastclip"]["tensors"]["param_groups[1]['params'][0]"] = [7, 7]
    other_model, other, _ = learning(form)
    trained_with_faults(other_model, other, range(2))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"other tensors.*\[7, 7\] there, \[1, 4\] here.*pop\('fastclip'\)"):
        other.load_state_dict(state)
    assert identical(other.state_dict(), before)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_group_learned_needs_a_place(form):
    model, opt, _ = learning(form)
    trained_with_faults(model, opt, range(3))
    _, other, _ = learning(form)
    other.param_groups[1]["policy"] = None
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"the policy of param group 1 has learned \(AdaGC\).*none here.*pop\('fastclip'\)"
    ):
        other.load_state_dict(opt.state_dict())
    assert identical(other.state_dict(), before)


def test_a_refusal_calls_tensors_by_their_names():
    def made(*shapes):
        weights = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        names = list(zip(("mine", "other"), weights, strict=False))
        opt = ClippedOptimizer(torch.optim.SGD(weights, lr=0.1), policy=AdaGC(), names=names)
        opt.step()
        return opt

    for saved, here, told in (
        ([(2, 3)], [(4,)], r"mine has \[2, 3\] there, \[4\] here\."),
        ([(4,)], [(4,), (2,)], r"other has None there, \[2\] here\."),
        ([(4,), (2,)], [(4,)], r"param_groups\[0\]\['params'\]\[1\] has \[2\] there, None here\."),
    ):
        state = {**made(*saved).state_dict(), "param_groups": made(*here).state_dict()["param_groups"]}
        with pytest.raises(ValueError, match=rf"other tensors: {told}"):
            made(*here).load_state_dict(state)


def test_what_is_removed_saves_nothing():
    model, inner, guard = learning("attached")
    trained_with_faults(model, inner, range(3))
    assert "fastclip" in inner.state_dict()
    guard.remove()
    inner.param_groups[1].pop("policy")
    assert inner.state_dict().keys() == {"state", "param_groups"}
    inner.load_state_dict(inner.state_dict())


def test_a_wrapper_around_an_attached_optimizer_keeps_what_both_know():
    def make():
        model, inner, guard = learning("attached")
        return model, guard, ClippedOptimizer(inner, policy=ZScore(warmup=1), nonfinite="propagate")

    model, guard, opt = make()
    trained_with_faults(model, opt, range(3))
    _, inside, again = make()
    again.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert identical(again.state_dict(), opt.state_dict())
    assert identical(inside.policy.state_dict(), guard.policy.state_dict())


class Outer(torch.optim.Optimizer):
    """As optimizers are that wrap another one: no ``Optimizer.__init__``, none of torch's hooks, a state of its own."""

    def __init__(self, inner):
        self.inner, self.rounds = inner, 0

    def __getstate__(self):
        return vars(self)

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def step(self, closure=None):
        self.rounds += 1
        return self.inner.step(closure)

    def state_dict(self):
        return {"rounds": self.rounds, "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict, *, strict=True):
        assert strict is False
        self.rounds = state_dict["rounds"]
        self.inner.load_state_dict(state_dict["inner"])


def test_an_attached_optimizer_may_save_and_load_in_its_own_way():
    def made():
        model = small_model()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "policy": ZScore(warmup=1)}]
        opt = Outer(torch.optim.SGD(groups, lr=0.01))
        return model, opt, fastclip.attach(opt, policy=ZScore(warmup=2))

    model, opt, _ = made()
    train(model, opt, range(3))
    state = saved_and_loaded(opt.state_dict())
    assert state.keys() == {"rounds", "inner", "fastclip"}
    _, fresh, other = made()
    policy = fresh.param_groups[1]["policy"]
    fresh.load_state_dict(state, strict=False)
    assert (fresh.rounds, fresh.param_groups[1]["policy"]) == (3, policy)
    assert identical(fresh.state_dict(), opt.state_dict())
    assert int(policy.count) == int(other.policy.count) == 3
    held_on_to = fresh.state_dict, fresh.load_state_dict
    other.remove()
    assert "fastclip" not in held_on_to[0]()
    held_on_to[1](state, strict=False)
    assert {"state_dict", "load_state_dict", "step"}.isdisjoint(vars(fresh))


def test_a_copy_that_took_the_methods_along_is_its_own():
    class Own(Outer):
        """torch hooks into the step of the class of what it copies, of which nothing else here shall know."""

    opt = Own(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    fastclip.attach(opt, policy=ZScore(warmup=1))
    other = copy.deepcopy(opt)
    other.param_groups[0]["params"][0].grad = torch.ones(2)
    other.step()
    assert (other.rounds, opt.rounds) == (1, 0)
    assert other.state_dict()["rounds"] == 1
    other.load_state_dict({**other.state_dict(), "rounds": 5}, strict=False)
    assert (other.rounds, opt.rounds) == (5, 0)


def test_the_own_state_dict_of_an_attached_object_comes_back():
    model, inner, _ = learning("wrapper")
    inner = inner.inner
    mine = inner.state_dict
    vars(inner)["state_dict"] = lambda: {"mine": mine()}
    guard = fastclip.attach(inner, policy="ZScore")
    train(model, inner, range(2))
    assert inner.state_dict().keys() == {"mine", "fastclip"}
    guard.remove()
    assert inner.state_dict().keys() == {"mine"}


@pytest.mark.parametrize("form", FORMS)
def test_a_groups_policy_goes_before_a_bound_that_was_saved(form):
    model, opt, _ = learning(form)
    saved = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "group_max_norm": 0.5}], lr=0.1
    ).state_dict()
    policy = opt.param_groups[1]["policy"]
    opt.load_state_dict(saved)
    assert opt.param_groups[1]["policy"] is policy
    trained_with_faults(model, opt, range(3))
    assert "group 1" in opt.state_dict()["fastclip"]


def test_none_is_no_rule_of_a_groups_own():
    model = small_model()
    groups = [
        {"params": list(part.parameters()), "policy": None, "group_max_norm": None} for part in (model[0], model[2])
    ]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), 0.5)
    train(model, opt, [0])
    torch.testing.assert_close(fastclip.get_total_norm([p.grad for p in model.parameters()]), torch.tensor(0.5))
    opt.load_state_dict(saved_and_loaded(opt.state_dict()))
    train(model, opt, [0])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_flattened_distributed_checkpoints_of_groups_with_a_policy(form):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, opt, _ = learning(form)
    trained_with_faults(model, opt, range(2))
    saved = get_optimizer_state_dict(model, opt, options=options)
    other, fresh, _ = learning(form)
    policy = fresh.param_groups[1]["policy"]
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert fresh.param_groups[1]["policy"] is policy
    assert identical(fresh.state_dict()["state"], opt.state_dict()["state"])
