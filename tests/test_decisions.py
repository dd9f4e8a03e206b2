"""What a rule asks for, decides and learns is looked at before anything is written."""

import math
import sys

import numpy as np
import pytest
import torch
from small import backward, flat, poison, small_model

import fastclip
from fastclip import ClippedOptimizer
from fastclip.policies import Chain, Decision, GlobalNorm, Policy, Unitwise
from fastclip.types import Request


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", [float, torch.tensor])
def test_a_rule_that_asks_for_no_number_is_told_so(of, value):
    class Broken(Policy):
        def decide(self, reading):
            return Decision(of(value))

    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=Broken(), nonfinite="propagate")
    backward(model, 0)
    before, grads = flat(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"Broken\(\).*clip_coef={value}, though all gradients are finite"):
        opt.step()
    assert torch.equal(flat(model), before)
    assert all(map(torch.equal, grads, [p.grad for p in model.parameters()]))
    poison(model)
    opt.step()  # may be what came of it


@pytest.mark.parametrize(
    ("decision", "request_", "told"),
    [
        (Decision(torch.ones(3)), {}, r"a clip_coef of shape \(3,\) for 4 gradients"),
        (Decision(torch.ones(4, 1)), {}, r"a clip_coef of shape \(4, 1\)"),
        (
            Decision(torch.tensor([0.5, 1.0, math.nan, 1.0])),
            {},
            r"clip_coef=nan for 2\.weight, though all gradients are finite",
        ),
        (Decision("half"), {}, "clip_coef='half', no number"),
        (Decision(None), {}, "clip_coef=None, no number"),
        (Decision(1.0, skip=torch.zeros(2)), {}, r"a skip of shape \(2,\)"),
        (Decision(1.0, unit_coefs=torch.ones(4)), {}, r"unit_coefs, but its request\(\) didn't ask for units"),
        (Decision(1.0, unit_coefs=torch.ones(3)), {"units": "out"}, r"unit_coefs of shape \(3,\) for 7 units"),
        (Decision(1.0, clamp=0.1), {}, "a clamp, which needs clamps = True"),
        (Decision(1.0, clamp=0.1), {"extras": True}, "a clamp, which needs clamps = True"),
        (
            Decision(1.0, unit_coefs=torch.full((7,), math.inf)),
            {"units": "out"},
            "unit_coefs=inf for unit 0 of 0.weight, though all",
        ),
        (Decision(np.float32(math.nan)), {}, "clip_coef=nan, though all"),
        (Decision(-1.0), {}, r"clip_coef=-1\.0, which would turn the gradients around"),
    ],
)
def test_what_a_rule_of_ones_own_gets_wrong_is_told(decision, request_, told):
    class Own(Policy):
        def request(self):
            return Request(2.0, **request_)

        def decide(self, reading):
            return decision

    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=Own(), names=model)
    backward(model, 0)
    before, grads = flat(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"Own\(\): decide\(\) gave {told}"):
        opt.step()
    assert torch.equal(flat(model), before)
    assert all(map(torch.equal, grads, [p.grad for p in model.parameters()]))


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(
    ("asks", "told"),
    [
        (None, r"Own\(\): request\(\) must return a fastclip\.types\.Request, got None"),
        (2.0, r"Own\(\): request\(\) must return a fastclip\.types\.Request, got 2\.0"),
        (Request(units="rows"), "units must be one of out, in, tensor"),
        (Request(units=(0, 0)), "units: expected different dimensions"),
    ],
)
def test_what_is_no_request_is_told(asks, told, chained):
    class Own(Policy):
        def request(self):
            return asks

        def decide(self, reading):
            return Decision()

    model = small_model()
    policy = Chain(Own(), GlobalNorm(1.0)) if chained else Own()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=policy)
    backward(model, 0)
    before, grads = flat(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=told):
        opt.step()
    assert torch.equal(flat(model), before)
    assert all(map(torch.equal, grads, [p.grad for p in model.parameters()]))


def test_a_chain_tells_whose_state_it_was_given():
    policies = fastclip.policies
    chain = Chain(policies.ZScore(), GlobalNorm(1.0))
    with pytest.raises(ValueError, match=r"of its policies ZScore at 0 learns; .* was learned at none"):
        chain.load_state_dict({})
    with pytest.raises(ValueError, match=r"of its policies none learns; .* was learned at 0"):
        Chain(GlobalNorm(1.0), GlobalNorm(1.0)).load_state_dict(chain.state_dict())
    with pytest.raises(ValueError, match=r"AdaGC knows .* it was saved by another policy"):
        Chain(policies.AdaGC(), GlobalNorm(1.0)).load_state_dict(chain.state_dict())


@pytest.mark.parametrize(("layer", "unit"), [(0, 2), (2, 0)], ids=["in the middle", "first of its tensor"])
def test_weights_that_are_damaged_are_named(layer, unit):
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=Unitwise(), names=model)
    backward(model, 0)
    with torch.no_grad():
        model[layer].weight[unit, 1] = math.nan
    grads = [p.grad.clone() for p in model.parameters()]
    told = rf"unit_coefs=nan for unit {unit} of {layer}\.weight, whose weights have the norm nan"
    with pytest.raises(ValueError, match=told):
        opt.step()
    assert all(map(torch.equal, grads, [p.grad for p in model.parameters()]))


class Gives(Policy):
    """Returns what it is made with."""

    def __init__(self, decision, extras=False):
        self.decision, self.extras = decision, extras

    def request(self):
        return Request(2.0, extras=self.extras)

    def decide(self, reading):
        return self.decision

    def __repr__(self):
        return "Gives()"


@pytest.mark.parametrize(
    ("decision", "error", "told"),
    [
        (None, TypeError, "must return a Decision, got NoneType"),
        (Decision(torch.ones(3)), ValueError, r"shape \(3,\) for 4 gradients"),
        (Decision([0.5]), ValueError, r"clip_coef=\[0\.5\], no number"),
        (Decision(skip=torch.zeros(4)), ValueError, r"a skip of shape \(4,\)"),
        (Decision(math.nan), ValueError, "clip_coef=nan, though all"),
        (Decision(clamp=0.01), ValueError, "a clamp, which needs clamps = True"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_chain_names_the_rule_that_went_wrong(decision, error, told, place):
    rules = [GlobalNorm(100.0)]
    rules.insert(place, Gives(decision, extras=True))
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=Chain(*rules))
    backward(model, 0)
    before = flat(model)
    with pytest.raises(error, match=rf"^Gives\(\): decide\(\) .*{told}"):
        opt.step()
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("clamp", [-1.0, math.nan, "1"])
def test_a_clamp_is_a_number_of_at_least_zero(clamp):
    policy = Gives(Decision(clamp=clamp), extras=True)
    policy.clamps = True
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([3.0])
    with pytest.raises(ValueError, match=rf"clamp={clamp!r}, expected a number of at least 0"):
        fastclip.clip_grads_([p], policy)
    assert p.grad.tolist() == [3.0]


@pytest.mark.parametrize("value", [0.5, None])
@pytest.mark.parametrize("chained", [False, True])
def test_what_a_rule_learns_are_tensors(value, chained):
    class Learns(GlobalNorm):
        learned = ("average",)

    rule = Learns(1.0)
    if value is not None:
        rule.average = value
    model = small_model()
    policy = Chain(rule, GlobalNorm(1.0)) if chained else rule
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=policy)
    backward(model, 0)
    with pytest.raises(TypeError, match=rf"Learns\.learned: 'average' must be a tensor, got {value}"):
        opt.step()
    Learns.learned = "average"
    with pytest.raises(TypeError, match=r"Learns\.learned: expected a tuple of names, got 'average'"):
        opt.step()


def test_a_rule_may_make_what_it_learns_at_its_first_step():
    class Late(Policy):
        learned = ("average",)

        def decide(self, reading):
            self.average = reading.totals[0].clone()
            return Decision(1.0)

    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=Late())
    backward(model, 0)
    opt.step()
    assert opt.state_dict()["fastclip"]["all"].keys() == {"policy", "average"}


@pytest.mark.parametrize("skip", [True, torch.tensor(True), torch.tensor(2.0)])
def test_a_rule_that_skips_need_not_know_a_coefficient(skip):
    class Skips(Policy):
        def decide(self, reading):
            return Decision(math.nan, skip=skip)

    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), policy=Skips())
    backward(model, 0)
    opt.step()
    assert opt.skipped_steps == 1


def test_a_rule_may_be_given_its_decide():
    policy = Policy()
    with pytest.raises(TypeError, match=r"Policy is no rule for gradients: it has no decide\(\)"):
        fastclip.clip_grads_([], policy)
    policy.decide = lambda reading: Decision(0.5)
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    fastclip.clip_grads_([p], policy)
    assert p.grad.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("given", ["loss", "found_inf"])
def test_what_only_a_device_knows_is_not_put_down_to_the_rule(monkeypatch, given):
    """The gradients are on the host; what holds the step back is not."""
    model = small_model()
    opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=1.0)
    there = torch.full((), math.nan)

    def known(tensor):
        """All but that number, and answers to questions about it."""
        return tensor.data_ptr() != there.data_ptr() and not (tensor.dtype == torch.bool and tensor.dim() == 0)

    for module in [module for name, module in sys.modules.items() if name.startswith("fastclip.")]:
        if hasattr(module, "known_to_host"):
            monkeypatch.setattr(module, "known_to_host", known)
    backward(model, 0)
    before = flat(model)
    if given == "loss":
        opt.observe(there)
    else:
        opt.found_inf = there
    opt.step()
    assert torch.equal(flat(model), before)
    (event,) = opt.events
    assert event.reason == "found on the device"
