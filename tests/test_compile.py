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


def test_inductor_compiles_the_main_function():
    torch._dynamo.reset()
    eager, traced = parameters(), parameters()
    expected = fastclip.clip_grad_norm_(eager, 0.5)
    compiled = torch.compile(FUNCTIONS["clip_grad_norm_"], fullgraph=True)
    assert torch.equal(compiled(traced), expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, traced, strict=True))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("clip_grad_norm_", ([0, 1], 2.0, 0.5, 1e-6, "propagate")),
        ("clip_grad_value_", ([0, 1], 0.1)),
        ("get_total_norm", ([0, 1], 2.0, False)),
        ("grad_stats", ([0, 1], 2.0, True)),
    ],
)
def test_operators_are_well_formed(operator, arguments):
    grads = [torch.randn(3, 2), torch.randn(4, dtype=torch.float64)]
    torch.library.opcheck(getattr(torch.ops.fastclip, operator).default, (grads, *arguments))


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
