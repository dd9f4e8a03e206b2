"""A small model, the optimizers that it is stepped with, and what a guarded step has to equal."""

import math

import pytest
import torch

import fastclip
from fastclip.riding import RIDERS


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def backward(model, step, scale=100.0, factor=1.0, run=True):
    """The loss of one batch; ``run`` its backward too."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(8, 5, generator=generator).to(next(model.parameters()).dtype)
    loss = (model(batch) ** 2).mean() * scale * factor
    if run:
        loss.backward()
    return loss


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def poison(model, value=math.nan):
    next(model.parameters()).grad.view(-1)[3] = value


def identical(a, b):
    """Whether two state dicts, or whatever is in them, are bitwise the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


class Lion(torch.optim.Optimizer):
    """An optimizer that isn't torch's: it knows nothing of scalers and riders."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p.sub_(torch.sign(mean.lerp_(p.grad, 0.1)) * group["lr"] + p.grad * 1e-3)


class WithoutRate(torch.optim.Optimizer):
    """Its groups have no ``lr``."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad)


INNERS = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adam-fused-amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, fused=True, amsgrad=True, maximize=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "loop": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False),
    "foreign": Lion,
}
FUSED = [name for name in INNERS if "fused" in name]
SCALERS = {"torch": torch.amp.GradScaler, "fastclip": fastclip.GradScaler}
# size of a gradient, max_norm, p, grad_scale
EXTREMES = {
    "past float32": (1e30, 1e-10, 2.0, None),
    "huge": (1e37, 1.0, 2.0, None),
    "nothing left": (1.0, 0.0, 2.0, None),
    "below float32": (1e-35, 1.0, 2.0, 1e-39),
    "largest element": (3.0, 0.5, math.inf, None),
    "sum of magnitudes": (3.0, 0.5, 1.0, None),
}
MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05), foreach=False),
}
every_maker = pytest.mark.parametrize("name", MAKERS)
every_inner = pytest.mark.parametrize("name", INNERS)
every_fused = pytest.mark.parametrize("name", FUSED)
every_scaler = pytest.mark.parametrize("kind", SCALERS)


def scaler_of(kind, scale=1024.0, **settings):
    return SCALERS[kind]("cpu", init_scale=scale, growth_interval=1000, **settings)


def tolerance(name, active=True):
    """A fused step divides by the inverse of the coefficient, one rounding apart; all else is bitwise."""
    return {"rtol": 1e-5, "atol": 1e-6} if "fused" in name and active else {"rtol": 0, "atol": 0}


def grads(model):
    return [p.grad.clone() for p in model.parameters()]


def reference_step(model, plain, step, max_norm=0.5, **rule):
    """Clip, then step: what every guarded step has to equal."""
    plain.zero_grad()
    backward(model, step)
    norm = fastclip.clip_grad_norm_(model.parameters(), max_norm, **rule)
    plain.step()
    return norm


def scaled_backward(model, opt, scaler, step, factor=1.0):
    opt.zero_grad()
    scaler.scale(backward(model, step, factor=factor, run=False)).backward()


def clean(*optimizers):
    """Nothing of a scaler is left behind."""
    return not any(name in vars(optimizer) for optimizer in optimizers for name in RIDERS)


def train(model, opt, steps, clip=None):
    for step in steps:
        opt.zero_grad()
        backward(model, step)
        if clip is not None:
            fastclip.clip_grad_norm_(model.parameters(), clip)
        opt.step()
