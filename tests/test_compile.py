"""Under torch.compile(fullgraph=True) every function is one operator with the eager result."""

import pytest
import torch

import fastclip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FUNCTIONS = {
    "clip_grad_norm_": lambda ps: fastclip.clip_grad_norm_(ps, 0.5),
    "clip_grad_norm_ untouched": lambda ps: fastclip.clip_grad_norm_(ps, 1e6),
    "clip_grad_norm_ twice": lambda ps: fastclip.clip_grad_norm_([*ps, *ps], 0.5, norm_type=1.0),
    "clip_grad_norm_ skip": lambda ps: fastclip.clip_grad_norm_(ps, 0.5, eps=1e-3, nonfinite="skip"),
    "clip_grad_value_": lambda ps: fastclip.clip_grad_value_(ps, 0.1),
    "get_total_norm": lambda ps: fastclip.get_total_norm([p.grad for p in ps]),
    "get_total_norm one tensor": lambda ps: fastclip.get_total_norm(ps[0].grad, norm_type="inf"),
    "clip_grads_with_norm_": lambda ps: fastclip.clip_grads_with_norm_(ps, 0.5, torch.tensor(2.0)),
    "clip_grads_with_norm_ number": lambda ps: fastclip.clip_grads_with_norm_(ps, 0.5, 2.0),
    "grad_stats": lambda ps: fastclip.grad_stats(ps).tensor_norms,
    "grad_stats weights": lambda ps: fastclip.grad_stats(ps, weights=True).weight_norms,
    "grad_stats names": lambda ps: fastclip.grad_stats(ps, list("abcd"), extras=False).names,
    "no gradients": lambda ps: fastclip.clip_grad_norm_([], 1.0),
}


def parameters():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    model(torch.randn(5, 4)).pow(2).sum().backward()
    return list(model.parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager(name, backend):
    torch._dynamo.reset()
    eager, traced = parameters(), parameters()
    expected = FUNCTIONS[name](eager)
    result = torch.compile(FUNCTIONS[name], fullgraph=True, backend=backend)(traced)
    assert torch.equal(result, expected) if isinstance(expected, torch.Tensor) else result == expected
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, traced, strict=True))


@pytest.mark.parametrize(
    "call",
    [
        lambda ps: fastclip.clip_grads_(ps, fastclip.policies.PerTensorNorm(0.5)),
        lambda ps: fastclip.adaptive_clip_grad_(ps),
    ],
    ids=["clip_grads_", "adaptive_clip_grad_"],
)
def test_a_graph_breaks_at_a_rule(call):
    torch._dynamo.reset()
    eager, traced = parameters(), parameters()
    expected = call(eager)
    assert torch.compile(call, backend="eager")(traced) == expected
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, traced, strict=True))


def test_inductor_compiles_the_main_function():
    torch._dynamo.reset()
    eager, traced = parameters(), parameters()
    expected = fastclip.clip_grad_norm_(eager, 0.5)
    compiled = torch.compile(FUNCTIONS["clip_grad_norm_"], fullgraph=True)
    assert torch.equal(compiled(traced), expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, traced, strict=True))


@pytest.mark.parametrize(
    "operator",
    ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_", "grad_stats", "bounded"],
)
def test_operators_stay_out_of_the_graphs_of_reduce_overhead(operator):
    """While those warm up, what a backend keeps for the next call would come from the memory of the graph."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fastclip, operator).default.tags


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("clip_grad_norm_", ([0, 1], 2.0, 0.5, 1e-6, "propagate")),
        ("clip_grad_value_", ([0, 1], 0.1)),
        ("get_total_norm", ([0, 1], 2.0, False)),
        ("bounded", (0.5, 2.0)),
        ("grad_stats", ([0, 1], 2.0, True, [])),
        ("grad_stats", ([0, 1], 2.0, False, [torch.ones(3, 2), torch.ones(4, dtype=torch.float64)])),
    ],
)
def test_operators_are_well_formed(operator, arguments):
    grads = [torch.randn(3, 2), torch.randn(4, dtype=torch.float64)]
    torch.library.opcheck(getattr(torch.ops.fastclip, operator).default, (grads, *arguments))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_boundary_between_chunks_of_a_sequence_compiles(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    cell, chunks = torch.nn.LSTMCell(3, 4), torch.randn(3, 2, 3) * 10

    def loss():
        state = torch.zeros(2, 4), torch.zeros(2, 4)
        for chunk in chunks:
            state = fastclip.clip_boundary(cell(chunk, state), 1e-3)
        return (state[0] * 100).sum()  # the state of the cell gets no gradient from outside

    def gradients(loss):
        cell.zero_grad()
        loss().backward()
        return [parameter.grad.clone() for parameter in cell.parameters()]

    expected = gradients(loss)
    assert all(map(torch.allclose, gradients(torch.compile(loss, fullgraph=True, backend=backend)), expected))
    assert float(fastclip.get_total_norm(expected)) < 0.1  # it was bounded


def test_names_survive_in_errors_from_a_graph():
    torch._dynamo.reset()
    ps = parameters()
    ps[0].grad = None
    ps[2].grad[0, 1] = float("nan")
    compiled = torch.compile(
        lambda: fastclip.clip_grad_norm_(ps, 1.0, nonfinite="raise"), fullgraph=True, backend="eager"
    )
    with pytest.raises(fastclip.NonFiniteGradientError, match=r"parameters\[2\]"):
        compiled()
    assert torch.is_grad_enabled()


def test_a_norm_of_tensors_that_require_grad():
    torch._dynamo.reset()
    weights = [p.detach().requires_grad_() for p in parameters()]
    compiled = torch.compile(fastclip.get_total_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weights), fastclip.get_total_norm(weights))
    assert not compiled(weights).requires_grad


INNERS = {
    "foreach": lambda ps: torch.optim.AdamW(ps, lr=0.05),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.05, fused=True),
    "loop": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, foreach=False),
}


def optimizer_steps(name, form, backend):
    """Six steps, the bad one left out where nobody guards: parameters, guard, and why the graph broke."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ps = parameters()
    inner, guard = INNERS[name](ps), None
    if form == "clip+step":

        def step():
            fastclip.clip_grad_norm_(ps, 0.5)
            inner.step()

    elif form == "attached":
        guard = fastclip.attach(inner, 0.5)
        step = inner.step
    else:
        guard = fastclip.ClippedOptimizer(inner, 0.5)
        step = guard.step
    compiled = step if backend is None else torch.compile(step, backend=backend)
    generator = torch.Generator().manual_seed(1)
    for number in range(6):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=generator)
        if number == 3 and guard is not None:
            ps[2].grad[0, 1] = float("nan")
        if number != 3 or guard is not None:
            compiled()
    return ps, guard, dict(torch._dynamo.utils.counters["graph_break"])


def as_far_as_torch(name):
    """How near a compiled step has to be to the eager one: compiled, SGD of torch 2.10 and 2.11 rounds otherwise."""
    eager, compiled = (optimizer_steps(name, "clip+step", backend)[0] for backend in (None, "eager"))
    if all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True)):
        return {"rtol": 0, "atol": 0}
    return {"rtol": 1e-6, "atol": 1e-7}


@pytest.mark.parametrize("form", ["wrapper", "attached"])
@pytest.mark.parametrize("name", INNERS)
def test_a_compiled_step_equals_the_eager_one(name, form):
    """The look at the gradients is one break of the graph; all the others are those of clip, then step, compiled."""
    ps, guard, breaks = optimizer_steps(name, form, "eager")
    expected, _, theirs = optimizer_steps(name, "clip+step", "eager")
    # a fused step divides by the inverse of the coefficient, one rounding apart
    close = {"rtol": 1e-5, "atol": 1e-6} if name == "fused" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ps, expected, **close)
    assert (guard.steps, guard.clipped_steps, guard.skipped_steps) == (6, 5, 1)
    assert len(breaks) <= len(theirs) + 1
    if name != "foreach":  # Dynamo takes foreach's capturable road: other arithmetic, with or without clipping
        eager, *_ = optimizer_steps(name, form, None)
        torch.testing.assert_close(ps, eager, **as_far_as_torch(name))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("name", ["fused", "loop"])
def test_a_compiled_step_with_a_closure(name):
    close = as_far_as_torch(name)
    torch._dynamo.reset()
    ps, twins = parameters(), parameters()
    opt = fastclip.ClippedOptimizer(INNERS[name](ps), 0.5)
    eager = fastclip.ClippedOptimizer(INNERS[name](twins), 0.5)

    def closure(of):
        loss = sum(p.pow(2).sum() for p in of)
        for p in of:
            p.grad = 2 * p.detach()
        return loss

    compiled = torch.compile(opt.step, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(lambda: closure(ps)), eager.step(lambda: closure(twins)), **close)
    torch.testing.assert_close(ps, twins, **close)
    assert opt.clipped_steps == 3
