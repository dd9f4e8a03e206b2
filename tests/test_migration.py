"""Other people's clipping beside ours, on the same gradients: what docs/migration.md says of each."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import autoclip.torch
import bitsandbytes
import numpy as np
import pytest
import torch
import zclip
from fastclip.bench import torchvision_cpu
from torch import Tensor

import fastclip
from fastclip.policies import Chain, GlobalNorm, Percentile, PerTensorPercentile, Unitwise, ZScore

torchvision_cpu.admit()
import timm.models  # noqa: E402
import timm.utils  # noqa: E402

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
SPIKES = (40, 41, 55, 80)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))


def gradients(steps: int, like: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Of each step one for each parameter, with a norm near 0.6 and some spikes."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        scale = (0.1 if step not in SPIKES else 5.0) * math.exp(0.2 * math.sin(step))
        yield [torch.randn(p.shape, generator=generator) * scale for p in like.parameters()]


def give(to: torch.nn.Module, grads: list[Tensor]) -> list[torch.nn.Parameter]:
    for p, grad in zip(to.parameters(), grads, strict=True):
        p.grad = grad.clone()
    return list(to.parameters())


def flat(of: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in of.parameters()])


def block_of_the_page(name: str) -> Callable[..., object]:
    """A function that the page defines."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"def {name}(" in code]
    namespace = {"torch": torch, "ZScore": ZScore}
    exec(code, namespace)
    return namespace[name]


# ---- ZClip


@pytest.mark.parametrize("cap", [None, 1.0])
def test_zclip_clips_alike_and_its_state_carries_over(cap):
    theirs, ours, taken_over = model(), model(), model()
    their_clip = zclip.ZClip(alpha=0.97, z_thresh=2.5, max_grad_norm=cap, warmup_steps=25)
    rule = ZScore(2.5, alpha=0.97, warmup=25)
    policy = rule if cap is None else Chain(rule, GlobalNorm(cap))
    later, clipped = None, 0
    for step, grads in enumerate(gradients(100, theirs)):
        their_clip.step(give(theirs, grads) and theirs)
        fastclip.clip_grads_(give(ours, grads), policy)
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-4, atol=0)
        clipped += bool(flat(theirs).norm() < 0.99 * torch.cat([g.flatten() for g in grads]).norm())
        if later is not None:
            fastclip.clip_grads_(give(taken_over, grads), later)
            torch.testing.assert_close(flat(taken_over), flat(theirs), rtol=1e-4, atol=0)
        if step == 50:
            carried = block_of_the_page("carried_over")(their_clip)
            later = carried if cap is None else Chain(carried, GlobalNorm(cap))
    assert clipped >= len(SPIKES)


def test_a_nan_switches_zclips_rule_off_and_not_ours():
    theirs, ours = model(), model()
    their_clip, policy = zclip.ZClip(max_grad_norm=None), ZScore()
    for step, grads in enumerate(gradients(80, theirs)):
        if step == 30:
            grads[0][0, 0] = math.nan
        their_clip.step(give(theirs, grads) and theirs)
        fastclip.clip_grads_(give(ours, grads), policy)
        if step in SPIKES:
            whole = torch.cat([g.flatten() for g in grads])
            assert torch.equal(flat(theirs), whole)
            assert flat(ours).norm() < whole.norm() / 2


# ---- AutoClip


def test_the_packages_quantile_is_of_the_norms_before():
    theirs, ours = model(), model()
    inner = torch.optim.SGD(theirs.parameters(), lr=0.0)
    their_opt = autoclip.torch.QuantileClip.as_optimizer(inner, quantile=0.9, history_length=20, global_threshold=True)
    policy, history = Percentile(90, window=20), []
    for grads in gradients(60, theirs):
        norm = float(torch.cat([g.flatten() for g in grads]).double().norm())
        give(theirs, grads)
        their_opt.step()
        bound = np.quantile(history[-20:], 0.9) if history else math.inf
        assert float(flat(theirs).norm()) == pytest.approx(min(norm, bound), rel=1e-5)
        history.append(norm)
        fastclip.clip_grads_(give(ours, grads), policy)
        bound = np.percentile(history[-20:], 90)
        assert float(flat(ours).norm()) == pytest.approx(min(norm, bound), rel=1e-5)


def test_a_nan_stays_in_the_packages_history_and_not_in_ours():
    theirs, ours = model(), model()
    inner = torch.optim.SGD(theirs.parameters(), lr=0.0)
    their_opt = autoclip.torch.QuantileClip.as_optimizer(inner, global_threshold=True)
    policy = Percentile(90, window=1000)
    for step, grads in enumerate(gradients(10, theirs)):
        if step == 3:
            grads[0][0, 0] = math.nan
        give(theirs, grads)
        their_opt.step()
        fastclip.clip_grads_(give(ours, grads), policy)
        if step > 3:
            assert flat(theirs).isnan().all()
            assert flat(ours).isfinite().all()


def test_the_packages_wrapper_clips_before_a_closures_backward_pass():
    p = torch.nn.Parameter(torch.zeros(1))
    norms = []

    class Told(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            norms.append(float(p.grad.norm()))

    def closure_with(norm):
        def closure():
            p.grad = torch.tensor([norm])
            return p.sum()

        return closure

    their_opt = autoclip.torch.QuantileClip.as_optimizer(Told([p], lr=0.0), quantile=0.5)
    for norm in (1.0, 1.0, 100.0):
        their_opt.step(closure_with(norm))
    assert norms[-1] == 100.0


# ---- bitsandbytes


def test_percentile_clipping_has_left_bitsandbytes():
    for name in ("Adam", "Adam8bit", "AdamW", "AdamW8bit", "LAMB", "SGD", "Lion8bit"):
        assert "percentile_clipping" not in inspect.signature(getattr(bitsandbytes.optim, name)).parameters
    assert not hasattr(bitsandbytes.functional, "percentile_clipping")


@pytest.mark.parametrize("percentile", [5, 50, 99])
def test_its_rule_is_ours_once_the_window_is_full(percentile):
    """What bitsandbytes 0.49 did, restated: its kernel needs a GPU. The first norm filled all hundred places."""
    generator = np.random.default_rng(0)
    p = torch.nn.Parameter(torch.zeros(2))
    policy, squares = PerTensorPercentile(percentile), np.zeros(100)
    for step in range(1, 251):
        norm = float(np.float32(np.exp(generator.normal())))
        squares[slice(None) if step == 1 else step % 100] = norm**2
        clip_value = math.sqrt(np.sort(squares)[percentile])
        p.grad = torch.tensor([norm, 0.0])
        fastclip.clip_grads_([p], policy)
        if step > 100:
            assert float(p.grad.norm()) == pytest.approx(min(norm, clip_value), rel=1e-6)


# ---- timm


@pytest.mark.parametrize("clip_factor", [0.01, 0.5])
def test_timms_agc_is_ours(clip_factor):
    theirs = model()
    ours, by_policy = copy.deepcopy(theirs), copy.deepcopy(theirs)
    for grads in gradients(5, theirs):
        timm.utils.dispatch_clip_grad(give(theirs, grads), clip_factor, mode="agc")
        fastclip.adaptive_clip_grad_(give(ours, grads), clip_factor)
        fastclip.clip_grads_(give(by_policy, grads), Unitwise(clip_factor))
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-6, atol=0)
        assert torch.equal(flat(ours), flat(by_policy))


def test_timm_leaves_out_the_last_two_parameters():
    net = model()
    assert timm.models.model_parameters(net, exclude_head=True) == list(net.parameters())[:-2]


def test_timms_scaler_and_ours_make_the_same_steps():
    theirs = model()
    ours = copy.deepcopy(theirs)
    their_opt = torch.optim.SGD(theirs.parameters(), lr=0.1)
    opt = fastclip.ClippedOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), max_norm=0.5)
    their_scaler, scaler = timm.utils.NativeScaler("cpu"), fastclip.GradScaler("cpu")
    for step in range(6):
        x = torch.full((4, 6), math.inf if step == 2 else float(step))
        for net, optimizer in ((theirs, their_opt), (ours, opt)):
            optimizer.zero_grad()
            loss = net(x).pow(2).mean()
            if net is theirs:
                their_scaler(loss, optimizer, clip_grad=0.5, parameters=net.parameters())
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert int(opt.skipped_steps) == 1
    assert their_scaler.state_dict() == scaler.state_dict()
    scaler.load_state_dict(their_scaler.state_dict())
