"""Every clipping rule through every way in: functions, groups, AMP, fused steps, checkpoints, accelerators."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from far import far_away
from oracle import INF, NAN, bits, norm, parameter
from ruled import (
    LEARNERS,
    POLICIES,
    SHAPES,
    clipped,
    give,
    identical,
    no_nan_in,
    numbers_of,
    series,
    step_grads,
    use,
    weights,
)
from torch import Tensor

import fastclip
import fastclip.backends
from fastclip import ClippedOptimizer
from fastclip.backends import EMULATED, plan
from fastclip.policies import (
    AdaGC,
    Chain,
    Decision,
    GlobalNorm,
    Percentile,
    Policy,
    Unitwise,
    ZScore,
)
from fastclip.reading import read
from fastclip.tensors import grads_of


@pytest.fixture(params=["cpu", "reference", *(backend.name for backend in EMULATED)])
def backend(request: pytest.FixtureRequest, same_start: None) -> str:
    """Instruction sets differ in kernels, not in rules: one of them will do."""
    use(request.param)
    return request.param


# ---- the ways in ----


def test_adaptive_clip_grad_has_the_signature_of_timm() -> None:
    got = inspect.signature(fastclip.adaptive_clip_grad_).parameters
    defaults = {name: parameter.default for name, parameter in got.items()}
    assert defaults == {"parameters": inspect.Parameter.empty, "clip_factor": 0.01, "eps": 1e-3, "norm_type": 2.0}


def test_adaptive_clip_grad_is_unitwise(backend: str) -> None:
    for args in ((), (0.02,), (0.02, 0.1), (0.02, 0.1, 1.0)):
        params = weights()
        give(params, step_grads(3))
        assert fastclip.adaptive_clip_grad_(iter(params), *args) is None
        factor, eps, p = (*args, *(0.01, 1e-3, 2.0)[len(args) :])
        want = clipped(Unitwise(factor, eps=eps, norm_type=p), step_grads(3), weights())
        assert identical([param.grad for param in params], want)


@pytest.mark.parametrize("name", POLICIES)
def test_the_optimizer_clips_as_the_function_does(backend: str, name: str) -> None:
    params, twins, policy = weights(), weights(), POLICIES[name]()
    opt = ClippedOptimizer(torch.optim.SGD(params, lr=0.1), policy=POLICIES[name]())
    for step in range(10):
        give(params, step_grads(step))
        give(twins, step_grads(step))
        before, skipped = [p.detach().clone() for p in params], int(opt.skipped_steps)
        opt.step()
        total = fastclip.clip_grads_(twins, policy)
        assert torch.equal(opt.last_norm, total)
        assert identical([p.grad for p in params], [p.grad for p in twins])
        if int(opt.skipped_steps) > skipped:
            assert identical(before, [p.detach() for p in params])
        else:
            for p, q in zip(params, twins, strict=True):
                q.data.add_(q.grad, alpha=-0.1)
                assert torch.equal(bits(p), bits(q))
        for p, q in zip(params, twins, strict=True):
            q.data.copy_(p.data)
    assert identical(opt.policy.state_dict(), policy.state_dict())


def test_the_total_norm_comes_back_unclipped(backend: str) -> None:
    for name in POLICIES:
        policy = POLICIES[name]()
        params = weights()
        give(params, step_grads(4))
        want = norm(step_grads(4), policy.norm_type)
        assert float(fastclip.clip_grads_(params, policy)) == pytest.approx(want, rel=1e-6)


def test_nothing_to_clip() -> None:
    for name in POLICIES:
        assert float(fastclip.clip_grads_([parameter(None)], POLICIES[name]())) == 0.0
        assert float(fastclip.clip_grads_([], POLICIES[name]())) == 0.0
    with pytest.raises(TypeError, match="policy"):
        fastclip.clip_grads_([parameter(torch.ones(2))], 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", POLICIES)
def test_a_parameter_without_a_gradient_keeps_its_place(backend: str, name: str) -> None:
    """What a policy knows about a tensor belongs to its parameter, also when others have no gradient for a while."""
    policy, each = POLICIES[name](), None
    per_tensor = name in ("tensor-percentile", "adagc")
    if per_tensor:
        each = [POLICIES[name]() for _ in SHAPES]
        if name == "adagc":
            policy, each = AdaGC(warmup=0), [AdaGC(warmup=0) for _ in SHAPES]
    params = weights()
    for step in range(8):
        give(params, step_grads(step))
        missing = {0: (1, 3), 1: (0,), 4: (2,), 5: (0, 1, 2)}.get(step, ())
        for i in missing:
            params[i].grad = None
        fastclip.clip_grads_(params, policy)
        for i, (p, grad) in enumerate(zip(params, step_grads(step), strict=True)):
            assert (p.grad is None) == (i in missing)
            if each is not None and p.grad is not None:
                (want,) = clipped(each[i], [grad])
                assert torch.equal(bits(p.grad), bits(want))


def test_each_group_has_its_own_rule(backend: str) -> None:
    params, twins = weights(), weights()
    own, joint = AdaGC(warmup=2), Percentile(50)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "policy": own},
        {"params": params[2:3], "group_max_norm": 0.2},
        {"params": params[3:]},
    ]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), policy=joint)
    rules = (Percentile(50), AdaGC(warmup=2), GlobalNorm(0.2))
    for step in range(6):
        give(params, step_grads(step))
        give(twins, step_grads(step))
        opt.step()
        for policy, share in zip(rules, ((0, 3), (1,), (2,)), strict=True):
            fastclip.clip_grads_([twins[i] for i in share], policy)
        assert identical([p.grad for p in params], [p.grad for p in twins])
        assert float(opt.last_norm) == pytest.approx(norm(step_grads(step)), rel=1e-6)
    assert identical(own.state_dict(), rules[1].state_dict())
    assert identical(joint.state_dict(), rules[0].state_dict())


def test_the_last_layer_is_left_out_by_a_rule_of_its_own() -> None:
    params = weights()
    groups = [{"params": params[:2]}, {"params": params[2:], "policy": GlobalNorm(INF)}]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), policy=Unitwise())
    give(params, step_grads(0))
    opt.step()
    assert identical([p.grad for p in params[2:]], step_grads(0)[2:])
    assert identical([p.grad for p in params[:2]], clipped(Unitwise(), step_grads(0)[:2], weights()[:2]))


# ---- gradients that are not finite ----


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("nonfinite", "fault"), [("skip", NAN), ("skip", INF), ("raise", NAN), ("zero", INF), ("propagate", NAN)]
)
def test_the_rule_for_nonfinite_gradients_holds_under_every_policy(name: str, nonfinite: str, fault: float) -> None:
    params, twins = weights(), weights()
    opt = ClippedOptimizer(torch.optim.SGD(params, lr=0.1, momentum=0.9), policy=POLICIES[name](), nonfinite=nonfinite)
    spared = ClippedOptimizer(torch.optim.SGD(twins, lr=0.1, momentum=0.9), policy=POLICIES[name]())
    for step in range(4):
        for own, them in ((params, opt), (twins, spared)):
            give(own, step_grads(step))
            them.step()
    bad = step_grads(0)
    bad[0][1, 1] = fault
    before = copy.deepcopy((opt.inner.state_dict(), [p.detach() for p in params]))
    learned = opt.policy.state_dict()
    give(params, bad)
    if nonfinite == "raise":
        with pytest.raises(fastclip.NonFiniteGradientError, match=r"\(1, 1\)"):
            opt.step()
        assert identical(opt.policy.state_dict(), learned)
    else:
        opt.step()
    unchanged = identical(before, (opt.inner.state_dict(), [p.detach() for p in params]))
    assert no_nan_in(opt.policy.state_dict())
    if nonfinite in ("skip", "raise"):
        assert unchanged
        assert identical([p.grad.nan_to_num(7.0) for p in params], [grad.nan_to_num(7.0) for grad in bad])
    elif nonfinite == "zero":
        bad[0][1, 1] = 0.0
        give(twins, bad)
        spared.step()
        assert identical(opt.state_dict(), spared.state_dict())
        assert identical([p.detach() for p in params], [p.detach() for p in twins])
    elif not unchanged and name != "value":
        assert not bool(params[0].isfinite().all())


# ---- AMP and fused steps ----


def amp_run(name: str, scale: float | None, fused: bool) -> tuple[list[tuple[bool, list[Tensor]]], ClippedOptimizer]:
    """For each of 8 steps whether it was skipped, and parameters and gradients after it."""
    params = weights()
    opt = ClippedOptimizer(torch.optim.SGD(params, lr=0.1, fused=fused), policy=POLICIES[name]())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    found = []
    for step in range(8):
        opt.zero_grad()
        loss = torch.stack([(p * grad).sum() for p, grad in zip(params, step_grads(step), strict=True)]).sum()
        before = int(opt.skipped_steps)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        skipped = int(opt.skipped_steps) > before
        found.append((skipped, [p.detach().clone() for p in params] + [p.grad.clone() for p in params]))
    return found, opt


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_a_scaled_run_is_the_unscaled_one(backend: str, name: str, fused: bool) -> None:
    """The policy sees unscaled norms; a power of two as scale changes no bit, but where a step divides (fused)."""
    (scaled, opt), (plain, other) = amp_run(name, 2.0**10, fused), amp_run(name, None, fused)
    close = {"rtol": 1e-5, "atol": 1e-6} if fused else {"rtol": 0, "atol": 0}
    for (skipped, ours), (also, theirs) in zip(scaled, plain, strict=True):
        assert skipped == also
        shown = len(SHAPES) if skipped else None  # the gradients of a skipped step stay scaled
        torch.testing.assert_close(ours[:shown], theirs[:shown], **close)
    assert torch.equal(opt.last_norm, other.last_norm)
    assert torch.equal(opt.clipped_steps, other.clipped_steps)
    assert identical(opt.policy.state_dict(), other.policy.state_dict())


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("name", POLICIES)
def test_one_number_rides_and_many_are_written(name: str, cls: type[torch.optim.Optimizer]) -> None:
    params, twins = weights(), weights()
    inner, plain = cls(params, lr=0.1, fused=True), cls(twins, lr=0.1, fused=True)
    opt, policy = ClippedOptimizer(inner, policy=POLICIES[name]()), POLICIES[name]()
    riders: list[object] = []
    inner.register_step_pre_hook(lambda inner, args, kwargs: riders.append(getattr(inner, "grad_scale", None)))
    for step in range(8):
        give(params, step_grads(step))
        give(twins, step_grads(step))
        steps, clips = len(riders), int(opt.clipped_steps)
        opt.step()
        if len(riders) == steps:
            continue  # skipped
        reading = read(plan(grads_of(twins)), policy.request())
        decision = policy.decide(reading)
        fastclip.clip_grads_(twins, Fixed(decision, policy))
        plain.step()
        scalar = not isinstance(decision.clip_coef, Tensor) or decision.clip_coef.dim() == 0
        one = scalar and decision.unit_coefs is None and decision.clamp is None
        assert (riders[-1] is not None) == (one and int(opt.clipped_steps) > clips)
        for p, q in zip(params, twins, strict=True):
            # a ride divides by the rounded inverse where clipping multiplies
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            q.data.copy_(p.data)
        plain.load_state_dict(copy.deepcopy(inner.state_dict()))


class Fixed(Policy):
    """Decides what was decided before."""

    def __init__(self, decision: Decision, like: Policy) -> None:
        self.decision, self._like = decision, like
        self.norm_type, self.clamps = like.norm_type, like.clamps

    def request(self):
        return self._like.request()

    def decide(self, reading):
        return self.decision


# ---- saving and loading ----


def training(name: str, where: str, fused: bool) -> tuple[list[torch.nn.Parameter], ClippedOptimizer]:
    params = weights()
    policy = POLICIES[name]()
    if where == "all":
        return params, ClippedOptimizer(torch.optim.AdamW(params, lr=0.1, fused=fused), policy=policy)
    groups = [{"params": params[:3], "policy": policy}, {"params": params[3:]}]
    norm_type = policy.norm_type
    return params, ClippedOptimizer(torch.optim.AdamW(groups, lr=0.1, fused=fused), 0.5, norm_type=norm_type)


def train(params: list[torch.nn.Parameter], opt: ClippedOptimizer, steps: range) -> None:
    for step in steps:
        give(params, step_grads(step))
        opt.step()


@pytest.mark.parametrize("where", ["all", "group"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("middle", "fused"), [(0, False), (2, True), (7, False)])
def test_a_resumed_run_continues_bit_for_bit(name: str, where: str, middle: int, fused: bool) -> None:
    """AutoClip and ZClip keep no state."""
    straight, opt = training(name, where, fused)
    train(straight, opt, range(12))
    first, saved = training(name, where, fused)
    train(first, saved, range(middle))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed, other = training(name, where, fused)
    for p, q in zip(resumed, first, strict=True):
        p.data.copy_(q.data)
    other.load_state_dict(torch.load(file))
    train(first, saved, range(middle, middle + 1))  # what was loaded is not what the saved run goes on to change
    train(resumed, other, range(middle, 12))
    assert all(torch.equal(bits(p), bits(q)) for p, q in zip(resumed, straight, strict=True))
    assert identical(other.state_dict(), opt.state_dict())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deep", "pickle"])
def test_copies_go_on_alone(name: str, copied: Callable[[ClippedOptimizer], ClippedOptimizer]) -> None:
    params, opt = training(name, "all", False)
    train(params, opt, range(5))
    twin = copied(opt)
    known = copy.deepcopy(twin.policy.state_dict())
    train(params, opt, range(5, 12))
    assert identical(twin.policy.state_dict(), known)
    train(twin.param_groups[0]["params"], twin, range(5, 12))
    assert identical(twin.state_dict(), opt.state_dict())
    alone = copied(POLICIES[name]())  # type: ignore[arg-type]
    assert repr(alone) == repr(POLICIES[name]())


@pytest.mark.parametrize("name", [*LEARNERS, "global", "value", "unitwise-value", "schedule"])
def test_another_policys_state_is_refused(name: str) -> None:
    """Half of a foreign state, or one whose keys happen to fit, would only show in the results."""
    everyone = POLICIES | LEARNERS
    policy = everyone[name]()
    for step in range(4):
        clipped(policy, step_grads(step), weights())
    before = policy.state_dict()
    for other, make in LEARNERS.items():
        foreign = make()
        for step in range(5):
            clipped(foreign, step_grads(step), weights())
        if type(foreign) is type(policy) and repr(foreign) == repr(policy):
            continue
        with pytest.raises(ValueError, match=r"polic|window|Chain|GlobalNorm|places"):
            policy.load_state_dict(foreign.state_dict())
        assert identical(policy.state_dict(), before), other


def test_a_chain_loads_all_or_nothing() -> None:
    chain, other = (Chain(ZScore(warmup=2), Percentile(window=5)) for _ in range(2))
    series(other, [1.0, 2.0, 3.0])
    state = other.state_dict()
    state["1"] = {"unknown": torch.zeros(1)}
    before = chain.state_dict()
    with pytest.raises(ValueError, match="Percentile"):
        chain.load_state_dict(state)
    assert identical(chain.state_dict(), before)


def test_an_optimizer_loads_all_or_nothing() -> None:
    params, opt = training("zscore", "all", False)
    train(params, opt, range(3))
    others, foreign = training("percentile", "all", False)
    train(others, foreign, range(6))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="ZScore"):
        opt.load_state_dict(foreign.state_dict())
    assert identical(opt.state_dict(), before)


def test_a_window_of_another_length_is_refused() -> None:
    policy, longer = Percentile(window=5), Percentile(window=6)
    series(policy, [1.0, 2.0])
    before = policy.state_dict()
    with pytest.raises(ValueError, match=r"window of 5.*6"):
        policy.load_state_dict(longer.state_dict())
    assert identical(policy.state_dict(), before)


def test_the_bare_optimizer_takes_the_state(backend: str) -> None:
    for name in ("zscore", "adagc", "chain"):
        for where in ("all", "group"):
            params, opt = training(name, where, False)
            train(params, opt, range(3))
            bare = torch.optim.AdamW([{"params": group["params"]} for group in opt.param_groups], lr=0.1)
            bare.load_state_dict(opt.state_dict())
            assert identical(bare.state_dict()["state"], opt.state_dict()["state"])
            known = opt.policy.state_dict() if where == "all" else opt.param_groups[0]["policy"].state_dict()
            opt.load_state_dict(bare.state_dict())  # what it doesn't tell stays
            policy = opt.policy if where == "all" else opt.param_groups[0]["policy"]
            assert identical(policy.state_dict(), known)


def test_a_state_is_a_copy() -> None:
    for name in LEARNERS:
        policy = LEARNERS[name]()
        clipped(policy, step_grads(0), weights())
        state = policy.state_dict()
        twin = LEARNERS[name]()
        twin.load_state_dict(state)
        kept = copy.deepcopy(state)
        for step in range(1, 5):
            clipped(policy, step_grads(step), weights())
        assert identical(state, kept)
        for tensor in numbers_of(state):
            tensor.fill_(3)
        assert identical(twin.state_dict(), kept)
        known = copy.deepcopy(policy.state_dict())
        for tensor in numbers_of(policy.state_dict()):
            tensor.fill_(3)
        assert identical(policy.state_dict(), known)


# ---- no accelerator at hand: the CPU plays one ----
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("name", POLICIES)
def test_nothing_waits_for_a_device(same_start, name: str, nonfinite: str) -> None:
    """The same coefficients, gradients and state as where the host may look, and nobody looks."""
    use("reference")  # as far_away does: bit by bit the same only from the same backend
    policy, twin = POLICIES[name](), POLICIES[name]()
    for step in range(9):
        params, twins, grads = weights(), weights(), step_grads(step)
        if step in (3, 8):
            grads[1][2] = NAN
        give(params, grads)
        give(twins, grads)
        with far_away():
            probe = copy.deepcopy(policy)
            decision = probe.decide(read(plan(grads_of(params)), probe.request()))
            fastclip.clip_grads_(params, policy, nonfinite=nonfinite)
        probe = copy.deepcopy(twin)
        host = probe.decide(read(plan(grads_of(twins)), probe.request()))
        for ours, theirs in zip(decision[:3], host[:3], strict=True):
            if theirs is None:
                assert ours is None
                continue
            ours, theirs = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        fastclip.clip_grads_(twins, twin, nonfinite=nonfinite)
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)
        assert identical(policy.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", POLICIES)
def test_a_skip_on_a_device_selects_and_never_multiplies_by_0(same_start, name: str) -> None:
    """OLMo-core's factor 0 times NaN is NaN, and 0 times a number is not that number."""
    params, policy = weights(), POLICIES[name]()
    bad = step_grads(0)
    bad[0][1, 1], bad[2][0, 0, 0] = NAN, INF
    give(params, bad)
    with far_away():
        fastclip.clip_grads_(params, policy, nonfinite="skip")
    for p, grad in zip(params, bad, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_run_where_there_are_no_values(name: str) -> None:
    policy = POLICIES[name]()
    params = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in SHAPES]
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        assert fastclip.clip_grads_(params, policy).device.type == "meta"


def test_what_was_learned_follows_the_gradients() -> None:
    """A run that moves to another device, or comes from a checkpoint on one."""
    for name in LEARNERS:
        policy = LEARNERS[name]()
        params = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in SHAPES]
        clipped(policy, step_grads(0), weights())
        for p in params:
            p.grad = torch.zeros_like(p)
        fastclip.clip_grads_(params, policy)
