"""Ranks act alike, whatever one of them found and however their tensors are spread."""

import math

import pytest
import torch
import torch.distributed as dist
from far import go_far
from ranks import ranks
from shards import mesh_of, placed, with_grad
from torch.distributed.tensor import Replicate, Shard

import fastclip
from fastclip import policies

COPIES_FALL_APART = (math.nan, math.inf, 1.000001)


def beside_the_plan(value, policy):
    """A layer outside of the tensor-parallel plan: sharded over one dimension, and each of the other has a copy, of
    which one differs."""
    mesh = mesh_of(2, 2)
    inside = with_grad(torch.ones(4, 4), mesh, [Shard(0), Shard(1)])
    outside = with_grad(torch.ones(4), mesh["a"], [Shard(0)])
    if mesh.get_local_rank("b") == 1:
        outside.grad.to_local()[-1:] = value
    opt = fastclip.ClippedOptimizer(torch.optim.SGD([inside, outside], lr=1.0), policy=policy)
    opt.step()
    return int(opt.skipped_steps), float(opt.last_norm), inside.to_local().tolist(), outside.grad.to_local().tolist()


@pytest.mark.parametrize("policy", [policies.GlobalNorm(1.0), policies.PerTensorNorm(0.5)], ids=repr)
@pytest.mark.parametrize("value", COPIES_FALL_APART)
def test_a_copy_on_another_mesh_than_the_others_counts_alike_everywhere(value, policy):
    told = ranks(4).run(beside_the_plan, value, policy)
    skips, norms, insides, outsides = zip(*told, strict=True)
    assert len({repr(norm) for norm in norms}) == 1
    assert set(skips) == ({0} if math.isfinite(value) else {1})
    assert all(inside == insides[0] for inside in insides)
    if math.isfinite(value):
        assert norms[0] == pytest.approx(math.sqrt(20.0), rel=1e-5)
        assert outsides[0] == outsides[2]  # the same factor: only the copy itself still differs


def with_a_gradient_on_one_rank(kind):
    """An expert that got no token on the last rank."""
    mesh = mesh_of(dist.get_world_size())
    shared = torch.nn.Parameter(torch.ones(4))
    if kind == "marked":
        expert = torch.nn.Parameter(torch.ones(4))
        fastclip.mark_sharded(expert, mesh)
        grad = torch.full((4,), 2.0)
    else:
        expert = with_grad(torch.ones(4), mesh, [Shard(0)])
        grad = placed(torch.full((4,), 2.0), mesh, [Shard(0)])
    shared.grad, expert.grad = torch.ones(4), grad if dist.get_rank() == 0 else None
    rule = policies.Chain(policies.PerTensorNorm(3.0), policies.GlobalNorm(1.0))
    norm = fastclip.clip_grads_([shared, expert], rule)
    return float(norm), shared.grad.tolist()


@pytest.mark.parametrize("kind", ["marked", "sharded"])
def test_a_rule_after_one_for_single_tensors_knows_of_gradients_that_others_have(kind):
    (norm, here), (other_norm, there) = ranks(2).run(with_a_gradient_on_one_rank, kind)
    assert norm == other_norm
    assert here == there
    size = min(4.0 if kind == "marked" else math.sqrt(8.0), 3.0)
    assert here == pytest.approx([1.0 / math.hypot(2.0, size)] * 4, rel=1e-5)


def marked_and_sharded():
    """An expert of each rank along one dimension, which fully_shard spreads over the other."""
    mesh = mesh_of(2, 2)
    expert = with_grad(torch.full((4,), 1.0 + mesh.get_local_rank("b")), mesh["a"], [Shard(0)])
    fastclip.mark_sharded(expert, mesh["b"])
    return float(fastclip.clip_grad_norm_([expert], 100.0))


def test_a_mark_counts_beside_what_a_dtensor_says_itself():
    assert ranks(4).run(marked_and_sharded) == pytest.approx([math.sqrt(4 * 1.0 + 4 * 4.0)] * 4, rel=1e-6)


def stages(own):
    """The last stage has settings that the first one lacks."""
    mesh = mesh_of(dist.get_world_size())
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    extra = own if dist.get_rank() == 1 else {}
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], **extra}], lr=1.0)
    opt = fastclip.ClippedOptimizer(optimizer, 1.0, group=mesh)
    first.grad, second.grad = torch.ones(4), torch.ones(4)
    try:
        opt.step()
    except fastclip.RankError as error:
        return str(error), first.tolist(), second.grad.tolist()
    return None


@pytest.mark.parametrize("own", [{"group_max_norm": 0.5}, {"l2": 0.1}], ids=repr)
def test_stages_that_ask_for_other_things_are_told_before_their_vectors_differ(own):
    for rank, (said, weights, grads) in enumerate(ranks(2).run(stages, own)):
        assert "the same number of bounds of their own and penalties" in said
        penalised = rank == 1 and "l2" in own
        assert ("Nothing was written" in said, "penalty is in the gradients already" in said) == (
            not penalised,
            penalised,
        )
        assert weights == [1.0] * 4
        assert grads == pytest.approx([1.1 if penalised else 1.0] * 4)


def later(kind):
    """Lists that went well once; the host can't wait for what goes wrong in the next step."""
    mesh, rank = mesh_of(dist.get_world_size()), dist.get_rank()
    parameters = [with_grad(torch.ones(4, 4), mesh, [Shard(0)]) for _ in range(2)]
    fastclip.clip_grad_norm_(parameters, 1.0)
    fastclip.clip_grad_norm_(parameters[:1], 1.0)
    for parameter in parameters:
        parameter.grad = placed(torch.ones(4, 4), mesh, [Shard(0)])
    chosen = parameters[: 1 + rank] if kind == "differs" else parameters
    with pytest.MonkeyPatch.context() as monkeypatch:
        go_far(monkeypatch, "reference")
        if kind == "fails" and rank == 0:  # several of its elements share their memory
            local = torch.ones(1, 4).expand(2, 4)
            chosen[0].grad = type(chosen[0].grad).from_local(local, mesh, [Shard(0)], run_check=False)
        try:
            norm = float(fastclip.clip_grad_norm_(chosen, 1.0))
        except fastclip.UnsupportedGradientError:
            norm = None
    return norm, [float(p.grad.to_local()[0, 0]) for p in parameters]


@pytest.mark.parametrize("kind", ["differs", "fails"])
def test_where_the_host_cannot_raise_nothing_is_written_and_the_norm_says_so(kind):
    for rank, (norm, grads) in enumerate(ranks(2).run(later, kind)):
        assert grads == [1.0, 1.0]
        assert norm is None if kind == "fails" and rank == 0 else math.isnan(norm)


def across_a_boundary(placement):
    mesh = mesh_of(dist.get_world_size())
    weights = torch.tensor([1.0, 1.0, 2.0, 2.0])
    hidden = placed(torch.ones(4), mesh, [placement]).requires_grad_()
    (fastclip.clip_boundary(hidden, 1.0) * placed(weights, mesh, [placement])).sum().backward()
    return hidden.grad.full_tensor().tolist()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=repr)
def test_a_boundary_clips_by_the_norm_of_all_shards(placement):
    for grad in ranks(2).run(across_a_boundary, placement):
        assert grad == pytest.approx([w / math.sqrt(10.0) for w in (1.0, 1.0, 2.0, 2.0)], rel=1e-6)
