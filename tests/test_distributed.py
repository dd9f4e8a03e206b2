"""The norm of what lies on several ranks: right under every sharding, the same bits everywhere, one collective."""

import itertools
import math

import oracle
import pytest
import torch
import torch.distributed as dist
from ranks import ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
from fastclip import policies

pytestmark = pytest.mark.xdist_group("ranks")

WORLDS = (2, 4)
SHAPES = ((5, 3), (8, 4), (1,), (7,), (), (0, 3), (3, 1, 2))
MESHES = {2: [(2,)], 4: [(4,), (2, 2)]}
_meshes = {}


def mesh_of(*shape):
    """Made once: every mesh makes process groups."""
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))
    return _meshes[shape]


class counted(TorchDispatchMode):
    """During the ``with`` block: the groups over which float64 was all-reduced, and how many collectives there were."""

    def __init__(self):
        super().__init__()
        self.groups, self.collectives, self._plain = [], 0, dist.all_reduce

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional") and "wait" not in op.name():
            self.collectives += 1
        return op(*args, **(kwargs or {}))

    def __enter__(self):
        def all_reduce(tensor, *args, group=None, **kwargs):
            if tensor.dtype == torch.float64:
                self.groups.append(group.group_name)
            return self._plain(tensor, *args, group=group, **kwargs)

        dist.all_reduce = all_reduce
        return super().__enter__()

    def __exit__(self, *error):
        dist.all_reduce = self._plain
        return super().__exit__(*error)


def placed(full, mesh, placements):
    """``full`` as a DTensor; what is open in it sums up to ``full``."""
    closed = [Replicate() if p.is_partial() else p for p in placements]
    whole = distribute_tensor(full.clone(), mesh, closed)
    if closed == list(placements):
        return whole
    local, peers = whole.to_local().clone(), 1
    for dim, placement in enumerate(placements):
        if placement.is_partial():
            peers *= mesh.size(dim)
            local *= 1.0 if mesh.get_local_rank(dim) == 0 else 2.0
    share = local / math.prod(2 * mesh.size(d) - 1 for d, p in enumerate(placements) if p.is_partial())
    return DTensor.from_local(share, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def with_grad(full, mesh, placements):
    closed = [Replicate() if p.is_partial() else p for p in placements]
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones_like(full), mesh, closed))
    parameter.grad = placed(full, mesh, placements)
    return parameter


def fulls(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in SHAPES]
    return [full.to(dtype) for full in made]


def possible(full, placements):
    return all(not p.is_shard() or p.dim < full.dim() for p in placements)


def clip_everywhere(shape, norm_type, max_norm):
    mesh, grads = mesh_of(*shape), fulls()
    kinds = [Shard(0), Shard(1), Replicate(), Partial()]
    expected, parameters = [], []
    for placements in itertools.product(kinds, repeat=len(shape)):
        for full in grads:
            if possible(full, placements):
                parameters.append(with_grad(full, mesh, placements))
                expected.append(full)
    plain = torch.nn.Parameter(torch.zeros(4))
    plain.grad = torch.arange(4.0)
    parameters.append(plain)
    expected.append(plain.grad.clone())
    norm = fastclip.clip_grad_norm_(parameters, max_norm, norm_type)
    after = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    return norm, after, expected


def check_clipped(results, norm_type, max_norm):
    norm, after, expected = results[0]
    wanted = oracle.norm(expected, norm_type)
    coef = oracle.coef(wanted, max_norm)
    for other, *_ in results:
        assert torch.equal(other, norm)
    assert float(norm) == pytest.approx(wanted, rel=6e-8)
    for of_rank in results:
        for got, full in zip(of_rank[1], expected, strict=True):
            torch.testing.assert_close(got.double(), full.double() * coef, rtol=5e-7, atol=1e-9)
    return after


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, -math.inf, 0.0, 3.0])
@pytest.mark.parametrize(("world", "shape"), [(w, s) for w in WORLDS for s in MESHES[w]])
def test_every_placement_gives_the_norm_of_the_whole(world, shape, norm_type):
    max_norm = 1e-3
    check_clipped(ranks(world).run(clip_everywhere, shape, norm_type, max_norm), norm_type, max_norm)


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "loop": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    )


def train(model, opt, steps, scaler=None, poison=None, start=0):
    """Every rank sees the same batches, so the mean over ranks is what one process sees."""
    norms = []
    for step in range(start, start + steps):
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        loss = (model(batch) ** 2).mean() * 100.0
        (loss if scaler is None else scaler.scale(loss)).backward()
        if poison is not None:
            poison(step)
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()
        norms.append(opt.last_norm if hasattr(opt, "last_norm") else None)
    return norms


def alone(optimizer="fused", steps=20, **settings):
    model = network()
    opt = fastclip.ClippedOptimizer(OPTIMIZERS[optimizer](model.parameters()), 1.0, **settings)
    norms = train(model, opt, steps)
    assert bool(opt.clipped_steps >= 5)
    return [p.detach() for p in model.parameters()], norms


def whole(tensors):
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def sharded(kind, optimizer="fused"):
    """Model and parameters under some sharding."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, world = network(), dist.get_world_size()
    if kind == "fsdp":
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh_of(world))
        fully_shard(model, mesh=mesh_of(world))
    elif kind == "offload":
        fully_shard(model, mesh=mesh_of(world), offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif kind == "hsdp":
        fully_shard(model, mesh=mesh_of(2, 2))
    elif kind == "ignored":
        fully_shard(model, mesh=mesh_of(world), ignored_params={model[2].weight, model[4].bias})
    elif kind == "tp":
        parallelize_module(model, mesh_of(world), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif kind == "fsdp-tp":
        mesh = mesh_of(2, 2)
        parallelize_module(model, mesh["b"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["a"])
    elif kind == "two meshes":
        fully_shard(model[0], mesh=mesh_of(world))
        fully_shard(model[2], mesh=mesh_of(2, world // 2))
        fully_shard(model[4], mesh=mesh_of(world))
    return model


def train_sharded(kind, optimizer, steps=20):
    model = sharded(kind)
    opt = fastclip.ClippedOptimizer(OPTIMIZERS[optimizer](model.parameters()), 1.0)
    norms = train(model, opt, steps - 1)
    with counted() as count:
        last = train(model, opt, 1, start=steps - 1)
    return whole(model.parameters()), norms + last, count.groups


def check_training(results, optimizer="fused", steps=20):
    parameters, norms = alone(optimizer, steps)
    for got in results:
        for a, b in zip(got[0], parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        for a, b, first in zip(got[1], norms, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=0)
            assert torch.equal(a, first)


# torch can't step DTensors and plain tensors in one fused or foreach call
SHARDINGS = [
    (2, "fsdp", "fused", 1),
    (2, "fsdp", "foreach", 1),
    (2, "fsdp", "momentum", 1),
    (4, "fsdp", "loop", 1),
    (2, "offload", "fused", 1),
    (4, "hsdp", "fused", 2),
    (2, "ignored", "loop", 1),
    (2, "tp", "loop", 1),
    (4, "fsdp-tp", "loop", 2),
    (4, "two meshes", "loop", 3),
]


@pytest.mark.parametrize(("world", "kind", "optimizer", "groups"), SHARDINGS)
def test_twenty_steps_end_where_one_process_ends(world, kind, optimizer, groups):
    results = ranks(world).run(train_sharded, kind, optimizer)
    check_training(results, optimizer)
    for *_, joined in results:
        assert len(joined) == len(set(joined)) == groups


def train_replicated(views):
    model = network()
    replicas = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["fused"](model.parameters()), 1.0)
    with counted() as count:
        norms = train(replicas, opt, 20)
    return whole(model.parameters()), norms, count.groups


@pytest.mark.parametrize("views", [False, True])
def test_ddp_joins_nothing(views):
    results = ranks(2).run(train_replicated, views)
    check_training(results)
    assert all(groups == [] for *_, groups in results)


def train_fsdp1(orig):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(network(), use_orig_params=orig, device_id=torch.device("cpu"))
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["loop"](model.parameters()), 1.0, group=model.process_group)
    norms = train(model, opt, 20)
    try:
        fastclip.clip_grad_norm_(model.parameters(), 1.0)
    except fastclip.RankError as error:
        refused = str(error)
    with FullyShardedDataParallel.summon_full_params(model):
        return whole(model.parameters()), norms, refused


@pytest.mark.parametrize("orig", [True, False])
def test_fsdp1_joins_over_its_group(orig):
    results = ranks(2).run(train_fsdp1, orig)
    if orig:
        check_training(results, "loop")
    _, norms = alone("loop")
    for *_, own, refused in results:
        torch.testing.assert_close(torch.stack(own), torch.stack(norms), rtol=2e-5, atol=0)
        assert "pass group=model.process_group" in refused


def train_zero(inside):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network()
    if inside:
        cls = fastclip.clipped(torch.optim.AdamW, max_norm=1.0)
        opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, lr=0.05, fused=True)
        inner = opt.optim
    else:
        zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.05, fused=True)
        opt = inner = fastclip.ClippedOptimizer(zero, 1.0)
    norms = []
    with counted() as count:
        for step in range(20):
            train(model, opt, 1, start=step)
            norms.append(inner.last_norm)
    return whole(model.parameters()), norms, count.groups


@pytest.mark.parametrize("inside", [True, False])
def test_zero_redundancy_optimizer_steps_by_the_norm_of_all_ranks(inside):
    results = ranks(2).run(train_zero, inside)
    check_training(results)
    for *_, groups in results:
        assert len(groups) == (20 if inside else 0)


def train_stages(borders, dtype):
    """The layers between two borders are this rank's stage; each may have optimizers of its own."""
    model = network().to(dtype)
    layers = [model[0], model[2], model[4]]
    own = layers[borders[dist.get_rank()] : borders[dist.get_rank() + 1]]
    opts = [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in own]
    opt = fastclip.ClipGroup(opts, max_norm=1.0, group=mesh_of(dist.get_world_size()))
    norms = []
    with counted() as count:
        for step in range(5):
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
            model.zero_grad()
            (model(batch) ** 2).mean().mul(100.0).backward()
            opt.step()
            norms.append(opt.last_norm)
            for rank in range(dist.get_world_size()):  # the other stages' parameters, as they are there
                for layer in layers[borders[rank] : borders[rank + 1]]:
                    for parameter in layer.parameters():
                        dist.broadcast(parameter.data, rank)
    norm = fastclip.clip_grad_norm_(
        [p for layer in own for p in layer.parameters()], 1.0, pp_mesh=mesh_of(dist.get_world_size())
    )
    return whole(model.parameters()), norms, count.groups, norm


def test_pipeline_stages_give_the_same_bits_wherever_they_are_cut():
    for dtype in (torch.float32, torch.bfloat16):
        model = network().to(dtype)
        opt = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), 1.0)
        norms = []
        for step in range(5):
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
            model.zero_grad()
            (model(batch) ** 2).mean().mul(100.0).backward()
            opt.step()
            norms.append(opt.last_norm)
        for borders in ((0, 1, 3), (0, 2, 3), (0, 0, 3)):
            for parameters, own, groups, after in ranks(2).run(train_stages, borders, dtype):
                assert all(map(torch.equal, own, norms))
                assert all(map(torch.equal, parameters, whole(model.parameters())))
                assert len(groups) == 5
                assert float(after) == pytest.approx(1.0, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


def poisoned(shape, dim, value, nonfinite):
    """One bad element on the last rank, in a tensor of which other ranks have nothing."""
    mesh = mesh_of(*shape)
    placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
    grads = [torch.ones(4, 3), torch.full((mesh.size(dim),), 2.0), torch.ones(1)]
    parameters = [with_grad(full, mesh, placements) for full in grads]
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        parameters[1].grad.to_local()[-1:] = value
    opt = fastclip.ClippedOptimizer(
        torch.optim.AdamW([("first", parameters[0]), ("second", parameters[1]), ("third", parameters[2])]),
        1.0,
        nonfinite=nonfinite,
    )
    error = None
    try:
        opt.step()
    except fastclip.NonFiniteGradientError as raised:
        error = (str(raised), raised.tensor, raised.index, raised.value)
    stats = opt.last_stats
    return {
        "error": error,
        "skipped": int(opt.skipped_steps),
        "norm": opt.last_norm,
        "worst": None if stats is None else stats.worst(1)[0],
        "found": None if stats is None else float(stats.found_inf),
        "events": [str(event) for event in opt.events],
        "moved": [bool((p.detach().to_local() != 1.0).any()) for p in parameters],
        "grads": [p.grad.to_local() for p in parameters],
        "all": fastclip.grad_stats([p.grad for p in parameters], ["first", "second", "third"]).worst(1)[0],
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("world", "shape"), [(2, (2,)), (4, (2, 2))])
def test_a_bad_element_on_one_rank_skips_the_step_on_all(world, shape, value):
    results = ranks(world).run(poisoned, shape, len(shape) - 1, value, "skip")
    for result in results:
        assert result["skipped"] == 1
        assert result["moved"] == [False] * 3
        assert not math.isfinite(float(result["norm"]))
        assert result["found"] == 1.0
        assert (result["worst"].name, result["worst"].rank) == ("second", world - 1)
        assert (result["all"].name, result["all"].rank) == ("second", world - 1)
        assert len(result["events"]) == 1
        assert f"second on rank {world - 1}" in result["events"][0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_element_on_one_rank_raises_on_all(value):
    results = ranks(2).run(poisoned, (2,), 0, value, "raise")
    messages = [result["error"] for result in results]
    for message, tensor, _, kind in messages:
        assert "second holds " + ("NaN" if math.isnan(value) else "Inf") + " on rank 1" in message
        assert "nothing was written" in message
        assert tensor == "second"
        assert math.isnan(kind) == math.isnan(value)
    assert messages[0][2] == ()
    assert messages[1][2] == (0,)
    assert all(result["moved"] == [False] * 3 for result in results)


def test_a_bad_element_on_one_rank_becomes_0_there_and_all_clip_by_the_rest():
    rest = oracle.norm([torch.ones(4, 3), torch.tensor([2.0]), torch.ones(1)])
    for rank, result in enumerate(ranks(2).run(poisoned, (2,), 0, math.nan, "zero")):
        assert result["skipped"] == 0
        assert float(result["norm"]) == pytest.approx(rest, rel=6e-8)
        assert all(result["moved"][: 2 if rank == 0 else 1])
        assert float(result["grads"][0][0, 0]) == pytest.approx(1.0 / rest, rel=1e-5)
        assert result["grads"][1].tolist() == ([pytest.approx(2.0 / rest, rel=1e-5)] if rank == 0 else [0.0])


def collectives_of(kind):
    """How many of any kind a second clip takes, by group."""
    mesh = mesh_of(2, 2) if kind == "2-D" else mesh_of(dist.get_world_size())
    placements = [Shard(0)] * mesh.ndim
    parameters = [with_grad(full, mesh, placements) for full in fulls()[:2]]
    if kind == "mixed":
        parameters.append(torch.nn.Parameter(torch.ones(3)))
        parameters[-1].grad = torch.ones(3)
    if kind == "replicated":
        parameters = [with_grad(full, mesh, [Replicate()]) for full in fulls()]
    fastclip.clip_grad_norm_(parameters, 1.0)
    with counted() as count:
        fastclip.clip_grad_norm_(parameters, 0.1)
    with counted() as per_tensor:
        fastclip.clip_grads_(parameters, policies.PerTensorNorm(0.01))
        fastclip.clip_grads_(parameters, policies.PerTensorNorm(0.005))
    return count.groups, count.collectives, per_tensor.collectives


@pytest.mark.parametrize(
    ("world", "kind", "groups"),
    [(2, "sharded", 1), (2, "mixed", 1), (2, "replicated", 0), (4, "sharded", 1), (4, "2-D", 2)],
)
def test_one_collective_per_group_and_step(world, kind, groups):
    for joined, collectives, per_tensor in ranks(world).run(collectives_of, kind):
        assert len(joined) == len(set(joined)) == collectives == groups
        assert per_tensor <= 3 * groups  # before the first join of single tensors the ranks compare their lists
