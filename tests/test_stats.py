"""GradStats: the facts of one step, by name, readable."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, FLOAT8, INF, NAN, assert_norm, magnitudes, norm, norm_dtype, parameter, randn

import fastclip


def faulty() -> list[torch.Tensor]:
    return [
        torch.tensor([3.0, 0.0, -4.0]),
        torch.tensor([[NAN, 1.0], [INF, 0.0]]),
        torch.tensor([-INF, 0.0]),
        torch.zeros(0),
        torch.tensor(7.0),
    ]


def test_facts_are_right(route: str) -> None:
    stats = fastclip.grad_stats(faulty())
    assert stats.nans.tolist() == [0, 1, 0, 0, 0]
    assert stats.infs.tolist() == [0, 1, 1, 0, 0]
    assert stats.zeros.tolist() == [1, 1, 1, 0, 0]
    assert stats.sizes == [3, 4, 2, 0, 1]
    assert stats.tensor_norms[[0, 2, 3, 4]].tolist() == [5.0, INF, 0.0, 7.0]
    assert math.isnan(stats.tensor_norms[1])
    assert stats.tensor_max_abs[[0, 2, 3, 4]].tolist() == [4.0, INF, 0.0, 7.0]
    assert math.isnan(stats.tensor_max_abs[1])
    assert math.isnan(stats.max_abs)
    assert math.isnan(stats.total_norm)
    assert float(stats.found_inf) == 1.0
    assert (stats.found_inf.dtype, stats.found_inf.dim()) == (torch.float32, 0)
    assert {stats.nans.dtype, stats.infs.dtype, stats.zeros.dtype} == {torch.int64}
    assert stats.names == [f"grads[{i}]" for i in range(5)]


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support:UserWarning")
def test_zeros_of_sparse_gradients_are_those_of_dense_ones(route: str) -> None:
    dense = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    hybrid = torch.sparse_coo_tensor([[1, 2]], dense[1:], (3, 2), check_invariants=True)
    twice = torch.sparse_coo_tensor([[1, 1, 2], [0, 0, 1]], [1.0, 2.0, 4.0], (3, 2), check_invariants=True)
    cancelled = torch.sparse_coo_tensor([[1, 1], [0, 0]], [1.0, -1.0], (3, 2), check_invariants=True)
    nothing = torch.zeros(3, 2).to_sparse()
    compressed = [dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((3, 1))]
    grads = [dense, dense.to_sparse(), hybrid.coalesce(), twice, cancelled, nothing, *compressed]
    stats = fastclip.grad_stats(grads)
    assert stats.zeros.tolist() == [4, 4, 4, 4, 6, 6, 4, 4, 4]
    assert stats.zeros.tolist() == [int((grad.to_dense() == 0).sum()) for grad in grads]
    assert stats.sizes == [6] * len(grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_facts_of_every_dtype(backend: str, dtype: torch.dtype) -> None:
    grads = [randn(size, dtype=dtype) for size in (1, 70, 3000)]
    grads[2][5:100] = 0
    stats = fastclip.grad_stats(grads)
    assert float(stats.found_inf) == 0.0
    for i, grad in enumerate(grads):
        x = magnitudes(grad)
        assert int(stats.zeros[i]) == int((x == 0).sum())
        assert_norm(stats.tensor_max_abs[i], float(x.max()), INF, norm_dtype(dtype))
        assert_norm(stats.tensor_norms[i], norm(grad), 2, norm_dtype(dtype))
    assert_norm(stats.max_abs, norm(grads, INF), INF, norm_dtype(dtype))
    assert_norm(stats.total_norm, norm(grads), 2, norm_dtype(dtype))


@given(st.lists(st.lists(st.floats(width=32) | st.sampled_from([NAN, INF, 0.0, -0.0]), max_size=9), max_size=4))
def test_counts_of_anything(backend: str, lists: list[list[float]]) -> None:
    grads = [torch.tensor(values, dtype=torch.float32) for values in lists]
    stats = fastclip.grad_stats(grads)
    assert stats.nans.tolist() == [int(g.isnan().sum()) for g in grads]
    assert stats.infs.tolist() == [int(g.isinf().sum()) for g in grads]
    assert stats.zeros.tolist() == [int((g == 0).sum()) for g in grads]
    assert bool(stats.found_inf) == any(not bool(g.isfinite().all()) for g in grads)
    counts = stats.to_dict()
    assert counts["zeros"] == int(stats.zeros.sum())
    assert counts["nans"] + counts["infs"] == int(stats.nans.sum() + stats.infs.sum())


def test_extras_are_optional(route: str) -> None:
    stats = fastclip.grad_stats(faulty(), extras=False)
    assert stats.max_abs is None
    assert stats.zeros is None
    assert stats.nans.tolist() == [0, 1, 0, 0, 0]
    assert stats.infs.tolist() == [0, 1, 1, 0, 0]
    facts = stats.to_dict()
    assert "max_abs" not in facts
    assert "zeros" not in facts["tensors"]["grads[0]"]
    assert stats.worst(1)[0].max_abs is None
    assert "1 NaN" in str(stats)


@pytest.mark.parametrize("p", [1.0, INF, 0.0, 3.0])
def test_norm_type_is_kept(route: str, p: float) -> None:
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])]
    stats = fastclip.grad_stats(grads, norm_type=p)
    assert_norm(stats.total_norm, norm(grads, p), p)
    assert_norm(stats.tensor_norms[1], norm(grads[1], p), p)
    assert stats.to_dict()["norm_type"] == stats.norm_type == p


def test_names_follow_their_tensors(route: str) -> None:
    grads = [torch.ones(1), None, torch.ones(8)[::2] * 2, torch.ones(1) * 3]
    for names in (["a", "b", "c", "d"], iter("abcd")):
        stats = fastclip.grad_stats(grads, names)
        assert stats.names == ["a", "c", "d"]
        assert stats.tensor_norms.tolist() == [1.0, 4.0, 3.0]
    assert fastclip.grad_stats(zip("abcd", grads, strict=True)).names == ["a", "c", "d"]
    assert fastclip.grad_stats(grads).names == ["grads[0]", "grads[2]", "grads[3]"]


def test_modules_bring_their_names(route: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1, bias=False))
    model(torch.ones(1, 2)).sum().backward()
    model[0].bias.grad = None
    stats = fastclip.grad_stats(model)
    assert stats.names == ["0.weight", "1.weight"]
    assert fastclip.grad_stats(model.named_parameters()).names == stats.names
    assert fastclip.grad_stats(model.parameters()).names == ["parameters[0]", "parameters[2]"]
    assert_norm(stats.total_norm, norm([model[0].weight.grad, model[1].weight.grad]))


def test_parameters_and_gradients_are_told_apart(route: str) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    assert float(fastclip.grad_stats([p]).total_norm) == 5.0
    assert float(fastclip.grad_stats([p.grad]).total_norm) == 5.0
    assert float(fastclip.grad_stats(p).total_norm) == 5.0
    assert float(fastclip.grad_stats([parameter(None)]).total_norm) == 0.0


def test_a_tied_gradient_counts_once(route: str) -> None:
    grad = torch.tensor([3.0, 4.0])
    stats = fastclip.grad_stats([grad, torch.tensor([12.0]), grad], ["first", "other", "again"])
    assert stats.names == ["first", "other"]
    assert float(stats.total_norm) == 13.0


def test_nothing_is_an_answer_too(route: str) -> None:
    stats = fastclip.grad_stats([])
    assert float(stats.total_norm) == 0.0
    assert float(stats.found_inf) == 0.0
    assert float(stats.max_abs) == 0.0
    assert stats.tensor_norms.shape == (0,)
    assert stats.worst() == []
    assert stats.to_dict()["tensors"] == {}
    assert "0 gradients" in str(stats)


def test_to_dict_holds_plain_numbers(route: str) -> None:
    facts = fastclip.grad_stats(faulty()[::4], ["w", "b"]).to_dict()
    assert facts["total_norm"] == pytest.approx(math.sqrt(74))
    assert (facts["found_inf"], facts["nans"], facts["infs"], facts["max_abs"], facts["zeros"]) == (False, 0, 0, 7.0, 1)
    assert facts["tensors"]["w"] == {"norm": 5.0, "size": 3, "nans": 0, "infs": 0, "max_abs": 4.0, "zeros": 1}
    assert facts["tensors"]["b"]["norm"] == 7.0
    bad = fastclip.grad_stats(faulty()).to_dict()
    assert (bad["found_inf"], bad["nans"], bad["infs"]) == (True, 1, 2)
    assert math.isnan(bad["max_abs"])
    assert isinstance(bad["found_inf"], bool)
    assert isinstance(bad["nans"], int)


def test_worst_is_sorted_by_what_hurts(route: str) -> None:
    stats = fastclip.grad_stats(faulty(), ["five", "nan", "inf", "empty", "seven"])
    assert [w.name for w in stats.worst(10)] == ["nan", "inf", "seven", "five", "empty"]
    assert [w.name for w in stats.worst(2)] == ["nan", "inf"]
    first = stats.worst(1)[0]
    assert (first.nans, first.infs) == (1, 1)
    assert math.isnan(first.norm)
    seven = stats.worst()[2]
    assert (seven.norm, seven.max_abs, seven.nans, seven.infs) == (7.0, 7.0, 0, 0)
    assert stats.worst(0) == []


def test_it_prints_readably(route: str) -> None:
    text = str(fastclip.grad_stats(faulty(), ["five", "nan", "inf", "empty", "seven"]))
    assert "5 gradients, 10 elements" in text
    assert "1 NaN, 2 Inf" in text.splitlines()[0]
    assert text.splitlines()[1].split()[0] == "nan"
    clean = str(fastclip.grad_stats([torch.tensor([3.0, 4.0])] * 1))
    assert "all finite" in clean
    assert "norm 5" in clean
    many = str(fastclip.grad_stats([torch.ones(1) for _ in range(9)]))
    assert "and 4 more" in many


def test_inf_and_overflow_are_told_apart(backend: str) -> None:
    finite = fastclip.grad_stats([torch.full((4,), 1e200, dtype=torch.float64)])
    assert (float(finite.total_norm), float(finite.found_inf), int(finite.infs)) == (2e200, 0.0, 0)
    infinite = fastclip.grad_stats([torch.tensor([INF, 1e200], dtype=torch.float64)])
    assert (float(infinite.total_norm), float(infinite.found_inf), int(infinite.infs)) == (INF, 1.0, 1)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_fp8_gradients_have_statistics(route: str, dtype: torch.dtype) -> None:
    grads = [torch.tensor([3.0, 4.0, 0.0]).to(dtype), torch.tensor([NAN, 1.0]).to(dtype)]
    stats = fastclip.grad_stats(grads)
    assert (float(stats.tensor_norms[0]), stats.nans.tolist(), stats.zeros.tolist()) == (5.0, [0, 1], [1, 0])


@pytest.mark.parametrize(
    ("names", "error", "word"),
    [(["a"], ValueError, "1 names for 2"), ("ab", TypeError, "names"), (["a", "b", "c"], ValueError, "3 names for 2")],
)
def test_bad_names_raise(names: object, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        fastclip.grad_stats([torch.ones(1), torch.ones(1)], names)


@pytest.mark.parametrize("bad", [3.0, "abc", None, [1.0], [("a", 1.0)], [torch.ones(1), "b"], {"a": torch.ones(1)}])
def test_bad_sources_raise(bad: object) -> None:
    with pytest.raises(TypeError, match="grads"):
        fastclip.grad_stats(bad)
