"""Clip and step by hand against the wrapper, its class form and the attachment, for every optimizer there is.

The tables list what a class needs beyond its defaults, and the reason for each one that is left out. A class that a
later torch brings fails a test until it is in the table; those that other packages bring are tried with their defaults.
"""

import copy
import inspect
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import accelerate
import bitsandbytes.optim
import numpy
import optimi
import pytest
import pytorch_optimizer
import schedulefree
import torch

import fastclip
from fastclip import ClippedOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")

MAX_NORM = 0.5
OUTER = 5.0  # the bound of a guard around another one
# One kind for each step. "big" gets clipped, "small" does not; the "bad" ones hold a NaN: the run without them is the
# reference. One comes first, where optimizers have no state yet.
STEPS = ("bad", "big", "small", "big", "bad", "small", "big", "small")
SCALE = {"bad": 1.0, "big": 1000.0, "small": 1e-4}
GUARDED = ("wrapped", "clipped", "attached")
NESTED = ("wrapper in wrapper", "attached in wrapper")


def small_model():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def wide_model():
    """Its first matrix is large enough for 8-bit state."""
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 4))


def weights(model):
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def biases(model):
    return [parameter for parameter in model.parameters() if parameter.ndim == 1]


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def accelerator():
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Row(NamedTuple):
    """One optimizer, and what it is to be called with."""

    cls: type[torch.optim.Optimizer]
    arguments: dict[str, Any] = {}  # noqa: RUF012
    first: Callable[..., tuple[Any, ...]] = lambda model: (model.parameters(),)  # the unnamed arguments
    model: Callable[[], torch.nn.Module] = small_model
    closure: bool = False  # step needs one
    loss: Callable[[torch.Tensor], Any] = lambda loss: loss  # what the closure is to return
    keywords: Callable[..., dict[str, Any]] = lambda model: {}  # of step
    group: bool = False  # needs a process group

    @property
    def fused(self):
        return self.arguments.get("fused", False)


def parameters_of(opt):
    return [parameter for group in opt.param_groups for parameter in group["params"]]


def dense(tensor):
    return tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()


def poison(parameters):
    """The last one: it is found only by who reads them all."""
    grad = parameters[-1].grad
    (grad._values() if grad.is_sparse else grad).view(-1)[1] = math.nan


def seed(number):
    torch.default_generator.manual_seed(number)
    numpy.random.seed(number)  # noqa: NPY002  # what others draw from
    random.seed(number)


def same(left, right):
    """Bit by bit, through all that a state dict may hold."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        left, right = dense(left), dense(right)
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    if isinstance(left, Mapping):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if not isinstance(left, (str, bytes)) and hasattr(left, "__len__"):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right or (hasattr(left, "__dict__") and same(vars(left), vars(right)))


def guarded(opt, form, accelerator=None):
    """What is to be stepped, and what tells of it."""
    if form == "clipped":
        return opt, opt
    if form in ("attached", "attached in wrapper"):
        guard = fastclip.attach(opt, max_norm=MAX_NORM)
    elif form == "inside":
        guard = opt.optim  # where a ZeroRedundancyOptimizer keeps what it made of a class
    else:
        opt = guard = ClippedOptimizer(opt, max_norm=MAX_NORM)
    if form in NESTED:
        opt = guard = ClippedOptimizer(opt, max_norm=OUTER)
    return opt if accelerator is None else accelerator.prepare(opt), guard


class Run:
    """One training run over STEPS: guarded, or clipped by hand and without the bad ones."""

    def __init__(self, row, form, accelerator=None):
        seed(0)
        self.row, self.form = row, form
        self.bounds = (OUTER, MAX_NORM) if form == "bare twice" else (MAX_NORM,) if form == "bare" else ()
        self.model = row.model()
        cls = fastclip.clipped(row.cls, max_norm=MAX_NORM) if form == "clipped" else row.cls
        self.opt = cls(*row.first(self.model), **copy.deepcopy(row.arguments))
        if not self.bounds:
            self.opt, self.guard = guarded(self.opt, form, accelerator)
        self.start = copy.deepcopy(self.parameters)
        self.grads, self.norms = [], []
        if hasattr(row.cls, "train"):
            self.opt.train()
        for step, kind in enumerate(STEPS):
            if kind == "bad" and not self.bounds:
                before = copy.deepcopy((self.parameters, self.state))
                self.step(step, kind)
                assert same(before, (self.parameters, self.state)), f"{form}, step {step}"
            elif kind != "bad":
                self.step(step, kind)
                self.grads.append(copy.deepcopy([p.grad for p in parameters_of(self.opt)]))
                if not self.bounds:
                    self.norms.append(self.guard.last_norm)
        self.last = copy.deepcopy(self.parameters)
        if hasattr(row.cls, "eval"):  # schedule-free: training goes on at other parameters than those it is about
            self.opt.eval()
            assert not same(self.last, self.parameters)
        self.end = copy.deepcopy((self.last, self.parameters, self.grads, self.state))

    @property
    def state(self):
        if hasattr(self.opt, "consolidate_state_dict"):
            self.opt.consolidate_state_dict()
        return self.opt.state_dict()

    @property
    def parameters(self):
        return list(self.model.parameters())

    def step(self, step, kind):
        @torch.enable_grad()
        def evaluate():
            self.opt.zero_grad()
            loss = self.backward(step, SCALE[kind])
            if kind == "bad":
                poison(parameters_of(self.opt))
            norms = [fastclip.clip_grad_norm_(parameters_of(self.opt), bound) for bound in self.bounds]
            self.norms += norms[:1]
            return self.row.loss(loss)

        by_closure = self.row.closure or self.form == "closure"
        if self.bounds or not by_closure:
            evaluate()  # also before a closure: SAM and its like want a gradient to begin with
        keywords = self.row.keywords(self.model)
        seed(step)  # some draw random numbers
        if by_closure:
            self.opt.step(evaluate, **keywords)
        else:
            self.opt.step(**keywords)

    def backward(self, step, scale):
        generator = torch.Generator().manual_seed(step)
        if isinstance(self.model, torch.nn.Embedding):
            out = self.model(torch.randint(self.model.num_embeddings, (6,), generator=generator))
        else:
            out = self.model(torch.randn(8, self.model[0].in_features, generator=generator))
        loss = (out - torch.randn(out.shape, generator=generator)).square().mean() * scale
        loss.backward()
        return loss.detach()


def check(row, forms=GUARDED, bare=None, exact=None, accelerator=None):
    """Compares runs in these forms with the bare one; ``exact`` or not is by default what the row should give."""
    bare = bare or Run(row, "bare")
    assert not same(bare.start, bare.last), "it does not move: the row checks nothing"
    for form in forms:
        run = Run(row, form, accelerator)
        if not row.fused if exact is None else exact:
            assert same(run.end, bare.end), form
        else:
            # It divides by the inverse of the coefficient, where clipping multiplies by the coefficient. Both are
            # rounded to float32, and so are quotient and product: 4 roundings of 2**-24 at most, as long as the
            # parameters are still the same. At the end they differed by 3 * 2**-25 at most, where the largest are
            # 0.4, and the gradients by 2**-24, where their norm is 0.5.
            torch.testing.assert_close(run.grads[0], bare.grads[0], rtol=2**-22, atol=0, msg=form)
            torch.testing.assert_close(run.grads, bare.grads, rtol=0, atol=2**-20, msg=form)
            torch.testing.assert_close(run.last, bare.last, rtol=0, atol=2**-20, msg=form)
        assert run.guard.skipped_steps == STEPS.count("bad"), form
        if not row.closure:  # else every evaluation counts, here and in the bare run
            torch.testing.assert_close(run.norms, bare.norms, rtol=2**-20 if row.fused else 0, atol=0, msg=form)
            assert (run.guard.steps, run.guard.clipped_steps) == (len(STEPS), STEPS.count("big")), form


def exported_by(module):
    """Names of the optimizer classes in a module."""
    exported = {name: getattr(module, name) for name in dir(module)}
    return {
        name
        for name, cls in exported.items()
        if inspect.isclass(cls)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
        and not inspect.isabstract(cls)
        and (module is torch.optim or not cls.__module__.startswith("torch."))
    }


def each(names, **needs):
    return dict.fromkeys(names.split(), needs)


# What each optimizer of torch is tried with, where its signature has all of the names. Left out: differentiable=True,
# for the wrapper's step is under no_grad; capturable=True without fused=True, which torch refuses on a CPU; and
# foreach=True with a tensor lr, which Adam and AdamW refuse there.
VARIANTS = {
    "default": {},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "maximize": {"maximize": True},
    "weight decay": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "amsgrad foreach": {"amsgrad": True, "foreach": True},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "tensor lr": {"lr": torch.tensor(0.02)},
    "fused": {"fused": True},
    "fused maximize": {"fused": True, "maximize": True},
    "fused weight decay": {"fused": True, "weight_decay": 0.1},
    "fused amsgrad": {"fused": True, "amsgrad": True},
    "fused momentum": {"fused": True, "momentum": 0.9},
    "fused tensor lr": {"fused": True, "lr": torch.tensor(0.02)},
    "fused capturable": {"fused": True, "capturable": True},
    "strong Wolfe": {"line_search_fn": "strong_wolfe"},
}
TORCH = {
    **each("ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD"),
    "LBFGS": {"closure": True, "arguments": {"max_iter": 4}},
    "Muon": {"first": lambda model: (weights(model),)},
    "SparseAdam": {"model": lambda: torch.nn.Embedding(10, 4, sparse=True)},
}


def torchs_rows():
    for name, needs in TORCH.items():
        cls = getattr(torch.optim, name)
        for variant, arguments in VARIANTS.items():
            if arguments.keys() <= inspect.signature(cls).parameters.keys():
                row = Row(cls, **needs)
                yield pytest.param(
                    row._replace(arguments={"lr": 0.02} | row.arguments | arguments), id=f"{name} {variant}"
                )


@pytest.mark.parametrize("row", list(torchs_rows()))
def test_torchs(row):
    check(row, (*GUARDED, "closure"))


def by_kind(model):
    return ([{"params": weights(model), "use_muon": True}, {"params": biases(model), "use_muon": False}],)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def curvature(model):
    return {"hessian": [torch.full_like(parameter, 0.5) for parameter in model.parameters()]}


class SteadyRadius:
    """A schedule of GSAM's radius that stays where it is."""

    def step(self):
        return 0.05


# By package, what a class needs beyond its defaults, or why it is left out; all others are called with their defaults.
OPTIMI = {
    "": {"arguments": {"lr": 0.01}},
    "SGD": {"arguments": {"lr": 0.01, "momentum": 0.9}},
    # left to itself it takes up its Triton kernels wherever triton is installed, with or without a GPU
    "StableAdamW": {"arguments": {"lr": 0.01, "triton": False}},
}

BITSANDBYTES = {
    "": {"model": wide_model},
    **each(
        "LARS LARS8bit LARS32bit PytorchLARS SGD SGD8bit SGD32bit",
        model=wide_model,
        arguments={"lr": 0.01, "momentum": 0.9},
    ),
    "AdEMAMix32bit": "its own step fails on a CPU",
    "PagedAdEMAMix32bit": "its own step fails on a CPU",
}
SCHEDULEFREE = {
    "": {"arguments": {"lr": 0.01}},
    **each(
        "AdamWScheduleFreeClosure RAdamScheduleFreeClosure SGDScheduleFreeClosure",
        arguments={"lr": 0.01},
        closure=True,
    ),
}
PYTORCH_OPTIMIZER = {
    **each("AdaGO AdaMuon Muon MuonClip NorMuon", first=by_kind),
    "DistributedMuon": {"first": by_kind, "group": True},
    "SpectralSphere": {"first": lambda model: (weights(model),), "arguments": {"solver_max_iterations": 4}},
    **each("AdaHessian SophiaH", keywords=curvature),
    "AdaShift": {"arguments": {"keep_num": 2}},
    "AdamMini": {"first": lambda model: (model,)},
    "RAdam": {"arguments": {"degenerated_to_sgd": True}},
    "Ranger21": {"arguments": {"num_iterations": len(STEPS)}},
    "SaRA": {"arguments": {"threshold": 1.0, "lr": 0.01}},
    "AliG": {"arguments": {"max_lr": 0.1}, "closure": True},
    # Sharpness-aware: the gradient at the parameters is clipped, and so is each one where it leads.
    **each(
        "FriendlySAM SAM",
        first=lambda model: (model.parameters(), torch.optim.Adam),
        arguments={"lr": 0.01},
        closure=True,
    ),
    "LookSAM": {
        "first": lambda model: (model.parameters(), torch.optim.SGD),
        "arguments": {"lr": 0.01, "k": 3},
        "closure": True,
    },
    "WSAM": {
        "first": lambda model: (model, model.parameters(), torch.optim.SGD),
        "arguments": {"lr": 0.01},
        "closure": True,
    },
    "GSAM": {
        "first": lambda model: (model.parameters(), sgd(model), model, SteadyRadius()),
        "loss": lambda loss: (None, loss),
        "closure": True,
    },
    "BSAM": {"arguments": {"num_data": 100}, "closure": True},
    # Around another optimizer.
    **each("Lookahead OrthoGrad PCGrad ScheduleFreeWrapper", first=lambda model: (sgd(model),)),
    "TRAC": {"first": lambda model: (sgd(model),), "arguments": {"s_prev": 0.01}},
    # Left out.
    "LOMO": "steps inside backward, parameter by parameter: there is no step to guard",
    "AdaLOMO": "steps inside backward, parameter by parameter: there is no step to guard",
    "DeMo": "needs another package, einops",
    "SafeFP16Optimizer": "has no param_groups, and clips the 16-bit gradients that it keeps to itself",
}
OTHERS = {
    optimi: OPTIMI,
    bitsandbytes.optim: BITSANDBYTES,
    schedulefree: SCHEDULEFREE,
    pytorch_optimizer: PYTORCH_OPTIMIZER,
}


def others_rows():
    for module, table in OTHERS.items():
        for name in sorted(exported_by(module)):
            needs = table.get(name, table.get("", {}))
            if not isinstance(needs, str):
                yield pytest.param(Row(getattr(module, name), **needs), id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("row", list(others_rows()))
def test_others(row, request):
    if row.group:
        request.getfixturevalue("process_group")
    check(row)


def test_every_class_is_accounted_for():
    assert exported_by(torch.optim) == TORCH.keys()
    for module, table in OTHERS.items():
        assert exported_by(module) >= table.keys() - {""}, "a name that the package doesn't have any more"


ADAMS = {name: VARIANTS[name] for name in ("default", "foreach", "fused")}


@pytest.mark.parametrize("arguments", ADAMS.values(), ids=ADAMS)
def test_a_guard_around_a_guard_clips_by_both_bounds(arguments):
    row = Row(torch.optim.AdamW, arguments)
    check(row, NESTED, Run(row, "bare twice"))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
@pytest.mark.parametrize("arguments", ADAMS.values(), ids=ADAMS)
def test_a_parameter_twice_in_a_group(arguments):
    """The fused step divides its gradient twice: here it must not ride, so that it is exact."""
    row = Row(torch.optim.AdamW, arguments, first=lambda model: ([*model.parameters(), model[0].weight],))
    check(row, exact=True)


@pytest.mark.parametrize("form", GUARDED)
def test_a_parameter_in_two_groups_is_refused(form):
    run = Run(Row(torch.optim.SGD, {"momentum": 0.9}, first=by_kind), form)
    run.opt.zero_grad()
    run.backward(0, SCALE["big"])
    run.opt.param_groups[1]["params"].append(run.model[2].weight)  # past the check in torch's add_param_group
    before = copy.deepcopy((run.parameters, [p.grad for p in run.parameters], run.opt.state_dict(), run.guard.steps))
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[2\] is also in param_groups\[0\]"):
        run.opt.step()
    after = (run.parameters, [p.grad for p in run.parameters], run.opt.state_dict(), run.guard.steps)
    assert same(before, after)
    inner = torch.optim.SGD(run.model.parameters())
    inner.param_groups.append({**inner.param_groups[0], "params": [run.model[2].weight]})
    for refuses in (ClippedOptimizer, fastclip.attach):
        with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\] is also in param_groups\[0\]"):
            refuses(inner)


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")  # of torch's own import
@pytest.mark.parametrize("arguments", ADAMS.values(), ids=ADAMS)
def test_zero_redundancy_optimizer(arguments, process_group):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    plain = Row(ZeroRedundancyOptimizer, {"optimizer_class": torch.optim.AdamW, **arguments})
    check(plain, ["wrapped", "attached"])
    clipped = fastclip.clipped(torch.optim.AdamW, max_norm=MAX_NORM)
    check(plain._replace(arguments=plain.arguments | {"optimizer_class": clipped}), ["inside"], Run(plain, "bare"))


def test_accelerates_wrapper_goes_around_ours(accelerator):
    prepared = accelerator.prepare(sgd(small_model()))
    for refuses in (ClippedOptimizer, fastclip.attach):
        with pytest.raises(TypeError, match=r"Put fastclip inside: accelerator\.prepare\(fastclip\.ClippedOptimizer\("):
            refuses(prepared)
    check(Row(torch.optim.AdamW), ["wrapped", "attached"], accelerator=accelerator)
