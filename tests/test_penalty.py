"""Weight penalties against their formula, and the gradient that is clipped where it crosses a boundary."""

import math
import sys
from typing import NamedTuple

import pytest
import torch
from small import backward, flat, identical, poison, small_model

import fastclip
import fastclip.backends
from fastclip import ClippedOptimizer, clip_boundary

SIZES = [
    ((3, 2), torch.float32),
    ((5,), torch.float64),
    ((2, 2), torch.bfloat16),
    ((), torch.float32),
    ((4,), torch.float16),
]


def parameters(sizes=SIZES, seed=0):
    """With gradients; some weights are 0, where the derivative of the l1 penalty is taken to be 0."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape, dtype in sizes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        with torch.no_grad():
            p.view(-1)[0] = 0.0 if p.numel() > 1 else 0.75
        p.grad = torch.randn(shape, generator=generator).to(dtype)
        made.append(p)
    return made


def expected(p, l1, l2, convention="torch", scale=1.0):
    """The gradient with the penalty's derivative, in float64."""
    w, two = p.detach().double(), {"torch": 1.0, "keras": 2.0}[convention]
    return p.grad.double() / scale + l1 * torch.sign(w) + two * l2 * w


def close(grad, wanted, scale=1.0):
    eps = torch.finfo(grad.dtype).eps
    torch.testing.assert_close(
        grad.double() / scale, wanted, rtol=4 * eps, atol=4 * eps * max(1.0, float(wanted.abs().max()))
    )


def guarded(params, optimizer=torch.optim.SGD, max_norm=math.inf, lr=0.0, **settings):
    return ClippedOptimizer(optimizer(params, lr=lr), max_norm=max_norm, **settings)


@pytest.mark.parametrize("convention", ["torch", "keras"])
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.3), (0.2, 0.0), (0.2, 0.3), (0.0, 0.0)])
def test_added_to_each_gradient(l1, l2, convention, route):
    params = parameters()
    wanted = [expected(p, l1, l2, convention) for p in params]
    weights = [p.detach().clone() for p in params]
    opt = guarded(params, l1=l1, l2=l2, convention=convention)
    opt.step()
    for p, w, grad in zip(params, weights, wanted, strict=True):
        close(p.grad, grad)
        assert torch.equal(p, w)
    joint = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
    assert float(opt.last_norm) == pytest.approx(joint, rel=1e-6)


def test_torch_convention_is_weight_decay_of_sgd():
    model, twin = small_model(), small_model()
    opt = guarded(model.parameters(), lr=0.1, l2=0.05)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.05)
    for step in range(5):
        for m, o in ((model, opt), (twin, plain)):
            o.zero_grad()
            backward(m, step, scale=1.0)
            o.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("convention", ["torch", "keras"])
def test_it_is_the_derivative_of_the_penalised_loss(convention):
    """torch: l1 * sum|w| + l2 / 2 * sum w^2; Keras' L1L2: l1 * sum|w| + l2 * sum w^2."""
    l1, l2 = 0.02, 0.03
    model, twin = small_model(), small_model()
    opt = guarded(model.parameters(), l1=l1, l2=l2, convention=convention)
    backward(model, 0)
    opt.step()
    half = 0.5 if convention == "torch" else 1.0
    penalty = sum(l1 * p.abs().sum() + half * l2 * p.square().sum() for p in twin.parameters())
    (backward(twin, 0, run=False) + penalty).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_before_the_clip():
    params = parameters([((4,), torch.float32), ((3,), torch.float32)])
    wanted = [expected(p, 0.1, 10.0) for p in params]
    norm = math.sqrt(sum(float(g.square().sum()) for g in wanted))
    opt = guarded(params, max_norm=0.5, l1=0.1, l2=10.0)
    opt.step()
    assert float(opt.last_norm) == pytest.approx(norm, rel=1e-6)
    for p, grad in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.grad.double(), grad * 0.5 / norm, rtol=1e-5, atol=1e-7)


def test_a_groups_own_strengths_come_first():
    a, b, c, d = params = parameters([((3,), torch.float32)] * 4)
    groups = [
        {"params": [a]},
        {"params": [b], "l1": 0.5},
        {"params": [c], "l2": 0.0},
        {"params": [d], "l1": 0, "l2": 0},
    ]
    strengths = [(0.1, 0.2), (0.5, 0.2), (0.1, 0.0), (0.0, 0.0)]
    wanted = [expected(p, *own) for p, own in zip(params, strengths, strict=True)]
    guarded(groups, l1=0.1, l2=0.2).step()
    for p, grad in zip(params, wanted, strict=True):
        close(p.grad, grad)


def test_a_groups_strength_alone_is_enough():
    a, b = parameters([((3,), torch.float32)] * 2)
    wanted, untouched = expected(a, 0.0, 0.4, "keras"), b.grad.clone()
    guarded([{"params": [a], "l2": 0.4}, {"params": [b]}], convention="keras").step()
    close(a.grad, wanted)
    assert torch.equal(b.grad, untouched)


def test_groups_with_a_bound_of_their_own():
    a, b = parameters([((3,), torch.float32)] * 2)
    wanted = [expected(a, 0.0, 5.0), expected(b, 0.0, 5.0)]
    guarded([{"params": [a], "group_max_norm": 0.1}, {"params": [b]}], l2=5.0).step()
    torch.testing.assert_close(a.grad.double(), wanted[0] * 0.1 / wanted[0].norm(), rtol=1e-4, atol=1e-7)
    close(b.grad, wanted[1])


def test_norm_and_penalty_are_as_wide_as_the_widest_group():
    a, b = parameters([((3,), torch.float32), ((3,), torch.float64)])
    opt = guarded([{"params": [a]}, {"params": [b], "group_max_norm": 1.0}], l2=0.1)
    opt.step()
    assert (opt.last_norm.dtype, opt.penalty.dtype) == (torch.float64, torch.float64)


def test_a_weight_without_a_penalty_adds_nothing_to_it():
    """Not even where it is Inf."""
    a, b = (torch.nn.Parameter(torch.tensor([value])) for value in (1.0, math.inf))
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    opt = guarded([{"params": [a], "l2": 2.0}, {"params": [b]}])
    opt.step()
    assert opt.penalty == 1.0


@pytest.mark.parametrize("form", [float, torch.tensor, "on a device"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam-fused"])
def test_scaled_gradients_get_a_scaled_penalty(form, optimizer, monkeypatch):
    """Under AMP the gradients are the scale times too large; the weights are not."""
    if form == "on a device":  # where the host doesn't know the scale
        form, fastclip.backends.forced = torch.tensor, "reference"
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "fastclip" and hasattr(module, "known_to_host"):
                monkeypatch.setattr(module, "known_to_host", lambda tensor: False)
    scale = 1024.0
    sizes = [((3, 2), torch.float32), ((5,), torch.float32)]
    params, twins = parameters(sizes), parameters(sizes)
    for p in params:
        p.grad.mul_(scale)
    make = {"sgd": torch.optim.SGD, "adam-fused": lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True)}[optimizer]
    opt, other = (guarded(ps, make, max_norm=0.5, lr=0.1, l1=0.1, l2=0.3) for ps in (params, twins))
    wanted = math.sqrt(sum(float(expected(p, 0.1, 0.3).square().sum()) for p in twins))
    opt.grad_scale = form(scale)
    opt.step()
    other.step()
    assert float(opt.last_norm) == pytest.approx(wanted, rel=1e-6)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, fastclip.GradScaler])
@pytest.mark.parametrize("unscale", [False, True])
def test_with_a_grad_scaler(scaler, unscale):
    model, twin = small_model(), small_model()
    opt, other = (guarded(m.parameters(), lr=0.05, max_norm=0.5, l1=0.01, l2=0.1) for m in (model, twin))
    scale = scaler("cpu", init_scale=4096.0)
    for step in range(4):
        opt.zero_grad()
        scale.scale(backward(model, step, run=False)).backward()
        if unscale:
            scale.unscale_(opt)
        scale.step(opt)
        scale.update()
        other.zero_grad()
        backward(twin, step)
        other.step()
        assert float(opt.last_norm) == pytest.approx(float(other.last_norm), rel=1e-5)
    torch.testing.assert_close(flat(model), flat(twin))


@pytest.mark.parametrize("missing", [[0], [1], [0, 1], [0, 1, 2]])
def test_parameters_without_a_gradient(missing):
    """They keep having none, also where they are a whole group, as frozen layers are."""
    params = parameters([((3,), torch.float32)] * 3)
    wanted = [expected(p, 0.1, 0.2) for p in params]
    for i in missing:
        params[i].grad = None
    guarded([{"params": params[:2]}, {"params": params[2:]}], l1=0.1, l2=0.2).step()
    for i, (p, grad) in enumerate(zip(params, wanted, strict=True)):
        if i in missing:
            assert p.grad is None
        else:
            close(p.grad, grad)


def test_a_parameter_listed_twice_is_penalised_once():
    p, q = parameters([((3,), torch.float32)] * 2)
    wanted = [expected(p, 0.1, 0.2), expected(q, 0.1, 0.2)]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = guarded([p, q, p], l1=0.1, l2=0.2)
    opt.step()
    close(p.grad, wanted[0])
    close(q.grad, wanted[1])


def test_a_strided_gradient_keeps_its_memory():
    p = torch.nn.Parameter(torch.randn(4, 3))
    memory = torch.randn(3, 4)
    p.grad = memory.t()
    wanted = expected(p, 0.1, 0.2)
    guarded([p], l1=0.1, l2=0.2).step()
    close(memory.t(), wanted)
    assert p.grad.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_sparse_gradients_are_refused(places):
    """Wherever they stand: nothing is written, so the step can be repeated without its sparse group's penalty."""
    dense = parameters([((3,), torch.float32)])[0]
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    groups = [{"params": [p]} for p in (dense, embedding.weight)]
    opt = guarded([groups[i] for i in places], lr=0.1, l2=0.2)
    before, weight = dense.grad.clone(), dense.detach().clone()
    with pytest.raises(TypeError, match="sparse"):
        opt.step()
    assert torch.equal(dense.grad, before)
    assert torch.equal(dense, weight)
    opt.param_groups[places.index(1)]["l2"] = 0.0
    wanted = expected(dense, 0.0, 0.2)
    opt.step()
    close(dense.grad, wanted)


@pytest.mark.parametrize(("key", "value"), [("l1", -1.0), ("l2", math.nan), ("l2", math.inf), ("l1", "much")])
def test_bad_strengths(key, value):
    params = parameters([((3,), torch.float32)] * 2)
    with pytest.raises((ValueError, TypeError), match=key):
        guarded(params, **{key: value})
    opt = guarded([{"params": params[:1]}, {"params": params[1:], key: value}], l2=0.1)
    before = [p.grad.clone() for p in params]
    with pytest.raises((ValueError, TypeError), match=rf"param_groups\[1\]\['{key}'\]"):
        opt.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True))


def test_an_unknown_convention():
    with pytest.raises(ValueError, match="convention must be one of torch, keras"):
        guarded(parameters(), l2=0.1, convention="jax")


def test_a_bad_step_still_does_not_happen():
    model = small_model()
    opt = guarded(model.parameters(), lr=0.1, l1=0.1, l2=0.1)
    backward(model, 0)
    poison(model)
    before = flat(model)
    opt.step()
    assert torch.equal(flat(model), before)
    assert opt.skipped_steps == 1


def test_raise_writes_no_penalty_either():
    model = small_model()
    opt = guarded(model.parameters(), lr=0.1, l2=0.1, nonfinite="raise")
    backward(model, 0)
    poison(model)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(fastclip.NonFiniteGradientError, match="nothing was written"):
        opt.step()
    assert all(
        torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(model.parameters(), before, strict=True)
    )


def test_zero_keeps_the_penalty():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.tensor([math.inf, 1.0])
    guarded([p], l2=0.5, nonfinite="zero").step()
    assert p.grad[1] == 2.0
    assert p.grad.isfinite().all()


def test_with_a_closure_every_evaluation_gets_it():
    model, twin = small_model(), small_model()
    opt = ClippedOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), max_norm=math.inf, l2=0.1)
    plain = torch.optim.LBFGS(twin.parameters(), lr=0.1, max_iter=4)

    def penalised():
        plain.zero_grad()
        loss = backward(twin, 0, scale=1.0)
        for p in twin.parameters():
            p.grad.add_(p.detach() * 0.1)  # alpha= would round once less than the kernels do
        return loss

    def bare():
        opt.zero_grad()
        return backward(model, 0, scale=1.0)

    for _ in range(3):
        assert torch.equal(opt.step(bare), plain.step(penalised))
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("form", ["attach", "clipped"])
def test_the_other_forms_take_it_too(form):
    model = small_model()
    settings = {"max_norm": math.inf, "l1": 0.1, "l2": 0.2, "convention": "keras"}
    if form == "attach":
        opt = torch.optim.SGD(model.parameters(), lr=0.0)
        fastclip.attach(opt, **settings)
    else:
        opt = fastclip.clipped(torch.optim.SGD, **settings)(model.parameters(), lr=0.0)
    backward(model, 0)
    wanted = [expected(p, 0.1, 0.2, "keras") for p in model.parameters()]
    opt.step()
    for p, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad.double(), grad, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_kept_as_its_negative():
    """By torch's bit, as autograd gives it to a parameter of one element; the memory holds the other sign."""
    weights = []
    for l2 in (0.0, 0.5):
        x, y = (torch.nn.Parameter(torch.tensor([value])) for value in (1.0, 2.0))
        bare = torch.optim.SGD([x, y], lr=0.1, weight_decay=0.5 - l2)
        opt = bare if l2 == 0.0 else ClippedOptimizer(bare, max_norm=1e9, l2=l2)
        torch.view_as_real(torch.complex(x, y).conj().resolve_conj()).sum().backward()
        assert y.grad.is_neg()
        opt.step()
        weights.append((x.item(), y.item()))
    assert weights[1] == pytest.approx(weights[0])
    p = torch.nn.Parameter(torch.ones(6))
    p.grad = torch._neg_view(torch.full((6,), 2.0))
    ClippedOptimizer(torch.optim.SGD([p], lr=0.1), max_norm=1e9, l2=0.5).step()
    assert p.tolist() == pytest.approx([1.0 - 0.1 * (-2.0 + 0.5)] * 6)


# ---- clip_boundary


def test_a_gradient_that_two_states_share_counts_for_each():
    """As autograd hands it to those of a sum."""
    h, c = (torch.ones(2, requires_grad=True) for _ in range(2))
    a, b = clip_boundary((h, c), 1.0)
    ((a + b) * torch.tensor([3.0, 4.0])).sum().backward()
    assert float(torch.cat([h.grad, c.grad]).norm()) == pytest.approx(1.0)
    assert torch.equal(h.grad, c.grad)


class State(NamedTuple):
    h: torch.Tensor
    c: torch.Tensor


def through(grad, max_norm, **settings):
    """What comes out of the backward for one gradient."""
    h = torch.zeros_like(grad, requires_grad=True)
    clip_boundary(h, max_norm, **settings).backward(grad)
    return h.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_boundary_is_the_identity(dtype):
    h = torch.randn(3, 4).to(dtype).requires_grad_()
    out = clip_boundary(h, 1.0)
    assert torch.equal(out, h)
    assert (out.dtype, out.shape, out.requires_grad) == (dtype, h.shape, True)
    assert not clip_boundary(h.detach(), 1.0).requires_grad
    with torch.no_grad():
        assert torch.equal(clip_boundary(h, 1.0), h)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_boundary_clips_the_gradient(scale, dtype, norm_type):
    grad = (torch.randn(6, 5) * scale).to(dtype)
    norm = float(torch.linalg.vector_norm(grad.double(), norm_type))
    clipped = through(grad, 0.7, norm_type=norm_type)
    assert clipped.dtype == dtype
    if norm <= 0.7:
        assert torch.equal(clipped, grad)
    else:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(clipped.double(), grad.double() * 0.7 / norm, rtol=2 * eps + 2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_boundary_clips_complex_states(dtype):
    h = torch.zeros(2, dtype=dtype, requires_grad=True)
    (clip_boundary(h, 1.0) * torch.tensor([3.0, 4.0])).sum().real.backward()
    torch.testing.assert_close(h.grad, torch.tensor([0.6, 0.8], dtype=dtype), rtol=2e-6, atol=0)


def test_boundary_under_the_bound_is_bitwise_untouched():
    """Also -0.0, and a norm of exactly the bound."""
    grad = torch.tensor([3.0, -0.0, 4.0])
    assert torch.equal(through(grad, 5.0).view(torch.int32), grad.view(torch.int32))
    assert torch.equal(through(grad, math.inf), grad)
    assert torch.equal(through(torch.zeros(3), 0.0), torch.zeros(3))
    assert torch.equal(through(grad, 0.0), torch.zeros(3))


def test_boundary_of_large_half_precision_gradients():
    """The coefficient is far below what float16 can say; the product isn't."""
    grad = torch.full((1000,), 60000.0, dtype=torch.float16)
    assert float(through(grad, 1e-3).double().norm()) == pytest.approx(1e-3, rel=0.01)


def test_boundary_past_the_range_of_float32():
    assert float(through(torch.full((2,), 3e38), 1.0).norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("make", [lambda h, c: (h, c), State], ids=["tuple", "namedtuple"])
def test_boundary_clips_a_tuple_by_its_joint_norm(make):
    h, c = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    out = clip_boundary(make(h, c), 1.0)
    assert type(out) is type(make(h, c))
    assert torch.equal(out[0], h)
    assert torch.equal(out[1], c)
    grads = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    torch.autograd.backward(out, grads)
    torch.testing.assert_close(h.grad, grads[0] / 5)
    torch.testing.assert_close(c.grad, grads[1] / 5)


@pytest.mark.parametrize("used", [0, 1])
def test_boundary_where_only_one_of_the_tuple_is_used(used):
    pair = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    clip_boundary(pair, 1.0)[used].backward(torch.tensor([6.0, 8.0]))
    torch.testing.assert_close(pair[used].grad, torch.tensor([0.6, 0.8]))
    other = pair[1 - used].grad
    assert other is None or not other.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_boundary_lets_nan_and_inf_through(bad, max_norm):
    """Hidden here, a fault could not be found where all gradients are looked at; nor may it spoil the others."""
    grad = torch.tensor([1.0, bad, 100.0])
    assert identical_with_nan(through(grad, max_norm), grad)


def identical_with_nan(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32)) or (
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0))
    )


@pytest.mark.parametrize("hidden", ["lstm", "gru"])
def test_boundary_between_chunks(hidden):
    """The second chunk's gradient comes into the first one bounded; the second chunk's own is not changed."""
    torch.manual_seed(0)
    net = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[hidden](2, 4)
    chunks = torch.randn(2, 5, 3, 2)

    def run(max_norm):
        _, first = net(chunks[0])
        kept = first if isinstance(first, tuple) else (first,)
        for h in kept:
            h.retain_grad()
        carried = first if max_norm is None else clip_boundary(first, max_norm)
        received = carried if isinstance(carried, tuple) else (carried,)
        for h in received:
            h.retain_grad()
        out, _ = net(chunks[1], carried)
        loss = out.square().sum() * 1e4
        net.zero_grad()
        loss.backward()
        return loss.detach(), [h.grad.clone() for h in kept], [h.grad.clone() for h in received]

    free_loss, free, _ = run(None)
    loss, bounded, arrived = run(0.5)
    assert torch.equal(loss, free_loss)
    assert identical(arrived, free)
    norm = float(fastclip.get_total_norm(free))
    assert norm > 0.5
    for a, b in zip(bounded, free, strict=True):
        torch.testing.assert_close(a, b * (0.5 / norm))
    assert identical(run(2 * norm)[1], free)


def test_boundary_composes_with_the_wrapper():
    """Truncated BPTT as it is used: boundary between chunks, wrapper around the optimizer."""
    torch.manual_seed(0)
    cell, head = torch.nn.LSTM(2, 4), torch.nn.Linear(4, 1)
    params = [*cell.parameters(), *head.parameters()]
    opt = ClippedOptimizer(torch.optim.Adam(params, lr=0.02), max_norm=1.0)
    series = torch.sin(torch.linspace(0, 12, 61)).reshape(-1, 1, 1).expand(-1, 1, 2)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        state, loss = None, 0.0
        for start in range(0, 60, 20):
            out, state = cell(series[start : start + 20], state)
            loss = loss + (head(out) - series[start + 1 : start + 21, :, :1]).square().mean()
            state = clip_boundary(state, 0.1)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert opt.skipped_steps == 0


@pytest.mark.parametrize(
    ("hidden", "max_norm", "settings", "error", "message"),
    [
        (torch.ones(2), -1.0, {}, ValueError, "max_norm"),
        (torch.ones(2), math.nan, {}, ValueError, "max_norm"),
        (torch.ones(2), "big", {}, TypeError, "max_norm"),
        (torch.ones(2), 1.0, {"norm_type": math.nan}, ValueError, "norm_type"),
        ([torch.ones(2)], 1.0, {}, TypeError, "hidden.*list"),
        ((torch.ones(2), None), 1.0, {}, TypeError, "hidden"),
        (None, 1.0, {}, TypeError, "hidden.*NoneType"),
    ],
)
def test_boundary_refuses(hidden, max_norm, settings, error, message):
    with pytest.raises(error, match=message):
        clip_boundary(hidden, max_norm, **settings)


def test_a_boundary_lets_pass_what_has_no_gradient() -> None:
    hidden = torch.ones(2, requires_grad=True)
    out, lengths, mask = fastclip.clip_boundary((hidden, torch.tensor([3, 4]), torch.tensor([True, False])), 1.0)
    assert (lengths.tolist(), mask.tolist()) == ([3, 4], [True, False])
    (out * torch.tensor([3.0, 4.0])).sum().backward()
    assert hidden.grad.tolist() == pytest.approx([0.6, 0.8])
