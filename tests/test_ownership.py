"""What learns serves one optimizer, or one param group, and says so where it comes from another."""

import copy
import pickle

import pytest
import torch
from small import backward, flat, small_model

import fastclip
from fastclip import ClippedOptimizer
from fastclip.policies import Chain, GlobalNorm

LEARNERS = {
    "policy": lambda: fastclip.policies.ZScore(),
    "schedule": lambda: GlobalNorm(lambda step: 1.0),
    "chain": lambda: Chain(Chain(fastclip.policies.ZScore(), GlobalNorm(1.0)), GlobalNorm(2.0)),
    "backoff": fastclip.SpikeBackoff,
    "rollback": fastclip.Rollback,
    "loss_watch": lambda: fastclip.LossWatch(3.0),
}


@pytest.mark.parametrize("kind", LEARNERS)
def test_what_learns_serves_one_optimizer(kind):
    name = kind if kind in ("backoff", "rollback", "loss_watch") else "policy"
    learner, models = LEARNERS[kind](), [small_model(), small_model()]
    inner, other = (torch.optim.SGD(model.parameters(), lr=0.1) for model in models)
    opt = ClippedOptimizer(inner, **{name: learner})
    blamed = "ZScore" if kind == "chain" else type(learner).__name__
    with pytest.raises(ValueError, match=f"{blamed}: it learns.*given to two"):
        fastclip.attach(other, **{name: learner})
    assert "step" not in vars(other)
    again = ClippedOptimizer(inner, **{name: learner})  # a cell of a notebook that is run once more
    for each in (copy.deepcopy(again), pickle.loads(pickle.dumps(again)) if kind == "backoff" else again):
        each.step()
    del opt, again, each
    guard = fastclip.attach(other, **{name: learner})
    guard.remove()
    fastclip.attach(inner, **{name: learner})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_what_a_copy_learns_with_serves_it_alone(copied):
    opt = copied(ClippedOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.1), policy="ZScore"))
    with pytest.raises(ValueError, match=r"ZScore: it learns.*given to two"):
        ClippedOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.1), policy=opt.policy)


def test_what_an_optimizer_had_may_serve_another():
    def made(policy=None, **settings):
        model = small_model()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "policy": policy}]
        return ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), **settings)

    rule, watch = fastclip.policies.ZScore(), fastclip.LossWatch()
    holder = made(rule, loss_watch=watch)  # this one minds only NaN and Inf, and learns nothing
    holder.param_groups[1]["policy"] = None
    other = made(policy=rule, loss_watch=watch)
    del other
    for _ in range(2):  # each a cycle, which only the garbage collector ends
        inner = torch.optim.SGD(small_model().parameters(), lr=0.1)
        fastclip.attach(inner, policy=rule)
        torch.optim.lr_scheduler.StepLR(inner, 1)
        del inner
    for _ in range(20):  # of no one: the place in memory may be another's
        made(fastclip.policies.ZScore()).param_groups[1]["policy"] = None
        made(policy=fastclip.policies.ZScore())
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        (made(policy=rule), made(rule))
    made(policy=copy.deepcopy(rule))


@pytest.mark.parametrize("kind", LEARNERS)
def test_what_learned_elsewhere_says_so(kind):
    """As in a sweep that makes its policy once."""
    name = kind if kind in ("backoff", "rollback", "loss_watch") else "policy"
    learner = LEARNERS[kind]()

    def run(learner):
        model = small_model()
        opt = ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **{name: learner})
        opt.observe(1.0)
        backward(model, 0)
        opt.step()
        return opt

    ClippedOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.1), **{name: learner})  # it makes no step
    opt = run(learner)
    ClippedOptimizer(opt.inner, **{name: learner})  # around the same one
    del opt
    blamed = "ZScore" if kind == "chain" else type(learner).__name__
    with pytest.warns(RuntimeWarning, match=rf"{blamed}: it goes on with what it has learned.*copy\.deepcopy"):
        run(learner)
    run(copy.deepcopy(learner))
    if kind == "rollback":
        assert learner.snapshot.taken_at == 0


@pytest.mark.parametrize("where", ["another group", "the joint rule", "all"])
def test_a_rule_that_comes_to_a_second_group_later_is_refused(where):
    model, rule = small_model(), fastclip.policies.ZScore()
    first = {
        "params": model[0].parameters(),
        "policy": fastclip.policies.ZScore() if where == "the joint rule" else rule,
    }
    joint = {"policy": rule} if where == "the joint rule" else {}
    opt = ClippedOptimizer(torch.optim.SGD([first], lr=0.1), **joint)
    backward(model, 0)
    opt.step()
    opt.add_param_group({"params": model[2].parameters(), "policy": rule})
    if where == "all":
        for group in opt.param_groups:
            group["policy"] = rule
    before = flat(model)
    with pytest.raises(ValueError, match="ZScore: it learns"):
        opt.step()
    assert torch.equal(flat(model), before)
    opt.param_groups[1]["policy"] = fastclip.policies.ZScore()
    opt.step()


def test_objects_of_a_clipped_class_each_learn_for_themselves():
    """Also with a rule that is given to each, as skorch and hyperparameter searches do."""
    rule, clipped = fastclip.policies.ZScore(), fastclip.clipped(torch.optim.SGD, backoff=fastclip.SpikeBackoff())
    first, second = (clipped(small_model().parameters(), lr=0.1, policy=rule) for _ in range(2))
    assert first.policy is not second.policy


def test_what_learns_serves_one_group():
    model, policy = small_model(), fastclip.policies.ZScore()
    groups = [{"params": part.parameters(), "policy": policy} for part in (model[0], model[2])]
    with pytest.raises(ValueError, match=r"ZScore: it learns.*one param group.*given to two"):
        ClippedOptimizer(torch.optim.SGD(groups, lr=0.1))
    fixed = GlobalNorm(1.0)  # learns nothing
    for group in groups:
        group["policy"] = fixed
    ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), policy=fixed)
