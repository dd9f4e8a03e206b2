"""The norm of what lies on several ranks: right under every sharding, the same bits everywhere, one collective."""

import itertools
import math
import pickle

import oracle
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
from fastclip import distributed, policies, ties

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
    whole = distribute_tensor(full.clone(), mesh, closed, src_data_rank=None)
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
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones_like(full), mesh, closed, src_data_rank=None))
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


MAGNITUDES = [
    (torch.float64, 1e200),
    (torch.float64, 1e-200),
    (torch.float32, 1e-30),
    (torch.float32, 1e30),
    (torch.bfloat16, 1.0),
    (torch.complex64, 1e-25),
]


def norms_at(dtype, scale):
    mesh = mesh_of(dist.get_world_size())
    grads = [placed(full, mesh, [Shard(0) if full.dim() else Replicate()]) for full in fulls(dtype, scale)]
    return [fastclip.get_total_norm(grads, p) for p in (2.0, 1.0, math.inf, -2.5, 3.0)]


@pytest.mark.parametrize(("dtype", "scale"), MAGNITUDES, ids=str)
def test_the_norm_is_right_at_every_magnitude(dtype, scale):
    for norms in ranks(2).run(norms_at, dtype, scale):
        for norm, p in zip(norms, (2.0, 1.0, math.inf, -2.5, 3.0), strict=True):
            wanted = oracle.norm(fulls(dtype, scale), p)
            assert float(norm) == pytest.approx(wanted, rel=1e-14 if dtype == torch.float64 else 6e-8)


def empty_shards(norm_type):
    mesh = mesh_of(4)
    parameters = [with_grad(torch.tensor([[3.0, -4.0]]), mesh, [Shard(0)]), with_grad(torch.empty(0), mesh, [Shard(0)])]
    return fastclip.clip_grad_norm_(parameters, 1.0, norm_type), parameters[0].grad.full_tensor()


def test_an_inf_norm_with_empty_shards_doesnt_wait():
    for norm, clipped in ranks(4).run(empty_shards, math.inf):
        assert float(norm) == 4.0
        torch.testing.assert_close(clipped, torch.tensor([[0.75, -1.0]]))


def stats_of_all():
    mesh = mesh_of(2, 2)
    ways = [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Replicate()], [Partial(), Shard(0)]]
    grads = [fulls()[0], fulls()[1], fulls()[1] * 2.0, fulls()[0] * 3.0, torch.arange(4.0)]
    parameters = [with_grad(full, mesh, way) for full, way in zip(grads, ways, strict=False)]
    parameters.append(torch.nn.Parameter(torch.ones(4)))
    parameters[-1].grad = grads[-1].clone()
    before = parameters[3].grad
    stats = fastclip.grad_stats(parameters, list("abcde"), weights=True)
    assert parameters[3].grad is before  # a read writes nothing
    return stats.to_dict(), stats.worst(2), str(stats), [stats.weight_sum_abs, stats.tensor_max_abs, stats.zeros]


def test_statistics_are_those_of_whole_tensors():
    plain = [
        torch.nn.Parameter(torch.ones_like(full)) for full in (*fulls()[:2], fulls()[1], fulls()[0], torch.zeros(4))
    ]
    for p, grad in zip(
        plain, [fulls()[0], fulls()[1], fulls()[1] * 2.0, fulls()[0] * 3.0, torch.arange(4.0)], strict=True
    ):
        p.grad = grad
    expected = fastclip.grad_stats(plain, list("abcde"), weights=True)
    wanted = expected.to_dict()
    results = ranks(4).run(stats_of_all)
    for facts, worst, text, rows in results:
        own_ranks = {name: of.pop("rank") for name, of in facts["tensors"].items()}
        assert own_ranks["e"] == 0
        for name, of in wanted["tensors"].items():
            assert facts["tensors"].pop(name) == {key: pytest.approx(value, rel=1e-6) for key, value in of.items()}
        assert facts.pop("total_norm") == pytest.approx(wanted["total_norm"], rel=6e-8)
        assert facts == {**{k: v for k, v in wanted.items() if k != "total_norm"}, "tensors": {}}
        assert [line.name for line in worst] == [line.name for line in expected.worst(2)]
        assert f"on rank {worst[0].rank}" in text
        for got, of in zip(rows, (expected.weight_sum_abs, expected.tensor_max_abs, expected.zeros), strict=True):
            torch.testing.assert_close(got, of)
    assert len({text for *_, text, _ in results}) == 1


RULES = {
    "PerTensorNorm": lambda: policies.PerTensorNorm(0.5),
    "BlockRMS": lambda: policies.BlockRMS(0.1),
    "AdaGC": lambda: policies.AdaGC(warmup=3),
    "PerTensorPercentile": lambda: policies.PerTensorPercentile(40.0, window=5),
    "Percentile": lambda: policies.Percentile(40.0),
    "ZScore": lambda: policies.ZScore(1.0, warmup=3),
    "Chain": lambda: policies.Chain(policies.PerTensorNorm(2.0), policies.GlobalNorm(1.0)),
    "Chain of totals": lambda: policies.Chain(policies.GlobalNorm(2.0), policies.GlobalNorm(1.0), policies.Value(0.2)),
    "Value": lambda: policies.Value(0.2),
    "Unitwise": lambda: policies.Unitwise(0.02),
    "Unitwise in": lambda: policies.Unitwise(0.02, units="in"),
    "Unitwise tensor": lambda: policies.Unitwise(0.02, units="tensor", norm_type=3.0),
}


def steps_by(rule, kind, seeds=8):
    """Steps on the same random gradients, whole or placed in four ways; the parameters after them."""
    ways = {"alone": [None] * 4, "1-D": [[Shard(0)], [Shard(1)], [Replicate()], [Shard(0)]]}
    ways["2-D"] = [[Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(1)], [Shard(0), Replicate()]]
    parameters = []
    for i, way in enumerate(ways[kind]):
        start = torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) if i < 3 else torch.ones(5)
        if way is not None:
            start = distribute_tensor(start, mesh_of(2) if kind == "1-D" else mesh_of(2, 2), way)
        parameters.append(torch.nn.Parameter(start))
    opt = fastclip.ClippedOptimizer(torch.optim.SGD(parameters, lr=0.1), policy=RULES[rule]())
    norms = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        for parameter in parameters:
            full = torch.randn(parameter.shape, generator=generator) * (1.0 + seed % 3)
            if isinstance(parameter, DTensor):
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
            parameter.grad = full
        opt.step()
        norms.append(opt.last_norm)
    return whole(parameters), norms, int(opt.clipped_steps)


def all_rules(kind):
    return {rule: steps_by(rule, kind) for rule in RULES}


@pytest.mark.parametrize(("world", "kind"), [(2, "1-D"), (4, "2-D")])
def test_every_rule_decides_as_on_one_process(world, kind):
    for of_rank in ranks(world).run(all_rules, kind):
        for rule, (parameters, norms, clipped) in of_rank.items():
            wanted, wanted_norms, wanted_clipped = steps_by(rule, "alone")
            assert wanted_clipped > 0
            for got, parameter in zip(parameters, wanted, strict=True):
                torch.testing.assert_close(
                    got, parameter, rtol=1e-5, atol=1e-6, msg=lambda m, rule=rule: f"{rule}: {m}"
                )
            torch.testing.assert_close(torch.stack(norms), torch.stack(wanted_norms), rtol=1e-6, atol=0)
            if rule not in ("Value", "Chain of totals", "Unitwise", "Unitwise in"):  # what a rank clips is its own
                assert clipped == wanted_clipped, rule


def chained_units():
    parameters = [with_grad(torch.ones(4, 4), mesh_of(2), [Shard(0)])]
    rule = policies.Chain(policies.Unitwise(0.01), policies.GlobalNorm(1.0))
    fastclip.clip_grads_(parameters, rule)


def test_a_chain_after_units_is_refused_alike():
    for error in ranks(2).outcomes(chained_units):
        assert error.name == "RankError"
        assert "Put a rule that looks at the total norm first" in error.message


def test_a_rule_of_ones_own_gets_whole_tensors_unless_it_says_otherwise():
    class Own(policies.GlobalNorm):
        def decide(self, reading):
            return policies.Decision(1.0)

    class Frugal(Own):
        total_only = True

        def decide(self, reading):
            return policies.Decision(1.0)

    class Renamed(policies.GlobalNorm):
        pass

    assert (Own.total_only, Frugal.total_only, Renamed.total_only) == (False, True, True)


def scaled_steps(own_scaler, optimizer):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=mesh_of(2))
    opt = fastclip.ClippedOptimizer(OPTIMIZERS[optimizer](model.parameters()), 1.0)
    scaler = (fastclip.GradScaler if own_scaler else torch.amp.GradScaler)(
        "cpu", init_scale=1024.0, growth_interval=100
    )
    before = None

    def poison(step):
        nonlocal before
        if step == 3:
            before = whole(model.parameters())
            if dist.get_rank() == 1:
                next(model.parameters()).grad.to_local()[-1, -1] = math.inf

    train(model, opt, 3, scaler)
    train(model, opt, 1, scaler, poison, start=3)
    same = all(map(torch.equal, before, whole(model.parameters())))
    norms = train(model, opt, 4, scaler, start=4)
    return same, float(scaler.get_scale()), int(opt.skipped_steps), whole(model.parameters()), norms


@pytest.mark.parametrize("optimizer", ["fused", "foreach", "loop"])
@pytest.mark.parametrize("own_scaler", [True, False])
def test_an_inf_in_one_ranks_shard_lowers_the_scale_on_all(own_scaler, optimizer):
    model = network()
    opt = fastclip.ClippedOptimizer(OPTIMIZERS[optimizer](model.parameters()), 1.0)
    train(model, opt, 3)
    norms = train(model, opt, 4, start=4)
    for same, scale, skipped, parameters, own in ranks(2).run(scaled_steps, own_scaler, optimizer):
        assert same
        assert scale == 512.0
        assert skipped == 1
        for a, b in zip(parameters, whole(model.parameters()), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(torch.stack(own), torch.stack(norms), rtol=1e-5, atol=0)


def experts():
    """Two experts on the ranks of an expert-parallel group each; the rest of the model is on all of them."""
    mesh = mesh_of(2, 2)
    dense, expert = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))
    fastclip.mark_sharded(expert, mesh["b"])
    dense.grad, expert.grad = torch.full((3,), 2.0), torch.full((2, 2), 1.0 + mesh.get_local_rank("b"))
    norm = fastclip.clip_grad_norm_([dense, expert], 1.0)
    sharded = with_grad(torch.full((3,), 2.0), mesh, [Shard(0), Replicate()])
    expert.grad = torch.full((2, 2), 1.0 + mesh.get_local_rank("b"))
    return norm, dense.grad, fastclip.get_total_norm([sharded.grad]), fastclip.clip_grad_norm_([sharded, expert], 10.0)


def test_experts_of_a_group_of_their_own_count_once_each():
    wanted = math.sqrt(3 * 4.0 + 4 * 1.0 + 4 * 4.0)
    for norm, grad, of_dense, mixed in ranks(4).run(experts):
        assert float(norm) == pytest.approx(wanted, rel=6e-8)
        torch.testing.assert_close(grad, torch.full((3,), 2.0 / wanted))
        assert float(of_dense) == pytest.approx(math.sqrt(12.0), rel=6e-8)
        assert float(mixed) == pytest.approx(wanted, rel=6e-8)


def different_lists(case):
    mesh, rank = mesh_of(dist.get_world_size()), dist.get_rank()
    shapes = [(5, 3), (10 + len(case), 4)]  # a list that these ranks haven't met
    parameters = [with_grad(torch.ones(shape), mesh, [Shard(0)]) for shape in shapes]
    if rank == 0 and case == "fewer":
        parameters.pop()
    elif rank == 0 and case == "other shape":
        parameters[1] = with_grad(torch.ones(9, 4), mesh, [Shard(0)])
    elif rank == 0 and case == "also a plain one":
        parameters.append(torch.nn.Parameter(torch.ones(5)))
        parameters[-1].grad = torch.ones(5)
    elif case == "later":
        fastclip.clip_grad_norm_(parameters, 1.0)
        parameters = parameters[: 1 + rank]
    before = [p.grad.to_local().clone() for p in parameters if isinstance(p, DTensor)]
    error = None
    try:
        if case == "single tensors":
            fastclip.clip_grads_(parameters[: 1 + rank], policies.PerTensorNorm(1e-3))
        elif case == "another norm":
            fastclip.clip_grad_norm_(parameters, 1e-3, 2.0 + rank)
        elif case == "unwritable on one":
            if rank == 0:
                parameters[0].grad = DTensor.from_local(
                    torch.ones(1, 3).expand(parameters[0].grad.to_local().shape),
                    mesh,
                    [Shard(0)],
                    run_check=False,
                    shape=parameters[0].shape,
                    stride=parameters[0].stride(),
                )
                before[0] = parameters[0].grad.to_local().clone()
            fastclip.clip_grad_norm_(parameters, 1e-3)
        else:
            fastclip.clip_grad_norm_(parameters, 1e-3)
    except fastclip.FastclipError as raised:
        error = (type(raised).__name__, str(raised))
    grads = [p.grad.to_local() for p in parameters if isinstance(p, DTensor)]
    return error, all(map(torch.equal, grads, before))


@pytest.mark.parametrize(
    "case", ["fewer", "other shape", "also a plain one", "later", "single tensors", "another norm"]
)
def test_ranks_with_different_lists_are_told_so(case):
    for error, untouched in ranks(2).run(different_lists, case):
        assert error[0] == "RankError"
        assert "Pass the same list in the same order on every rank" in error[1]
        assert untouched


def test_ranks_that_agree_go_on():
    for error, untouched in ranks(2).run(different_lists, "nothing is different"):
        assert error is None
        assert not untouched


def test_a_rank_that_cant_go_on_takes_the_others_with_it():
    (own, _), (others, untouched) = ranks(2).run(different_lists, "unwritable on one")
    assert own[0] == "UnsupportedGradientError"
    assert others == ("RankError", "another rank could not read its gradients, and says why there. Nothing was written")
    assert untouched


def lonely_rank(dies):
    import os
    import time

    parameters = [with_grad(full, mesh_of(dist.get_world_size()), [Shard(0)]) for full in fulls()[:2]]
    before = [p.grad.to_local().clone() for p in parameters]
    if dist.get_rank() == 0:
        if dies:
            os._exit(1)
        time.sleep(3600.0)
    try:
        fastclip.clip_grad_norm_(parameters, 1e-3)
    finally:
        assert all(torch.equal(p.grad.to_local(), b) for p, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("dies", [True, False])
def test_nobody_waits_for_ever_for_a_rank_that_is_gone(dies):
    """gloo notices a dead peer at once, and a silent one after the group's timeout."""
    pool = Ranks(2, group_timeout=3.0)
    try:
        (error,) = pool.outcomes(lonely_rank, dies, of=[1])
    finally:
        pool.close()
    assert error.name == "RuntimeError"
    assert dies or "Timed out" in error.message


def without_groups():
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())), _init_backend=False)
    grad = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    return fastclip.get_total_norm([grad])


def test_a_mesh_without_process_groups_is_refused():
    for error in ranks(2).outcomes(without_groups):
        assert error.name == "RankError"
        assert "init_process_group" in error.message


def test_what_is_no_group_is_refused():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    for call in (
        lambda: fastclip.clip_grad_norm_([p], 1.0, group=3),
        lambda: fastclip.clip_grad_norm_([p], 1.0, pp_mesh="pp"),
        lambda: fastclip.grad_stats([p], group=[0, 1]),
        lambda: fastclip.ClippedOptimizer(torch.optim.SGD([p], lr=0.1), group=0),
        lambda: fastclip.mark_sharded([p], None.__class__),
    ):
        with pytest.raises(TypeError, match="group: expected a process group or a mesh of one dimension"):
            call()


def group_arguments():
    mesh = mesh_of(2, 2)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 1.0 + dist.get_rank())
    errors = []
    shared = with_grad(torch.ones(4), mesh["a"], [Shard(0)])
    for q, group, pp_mesh in ((p, mesh, None), (p, mesh["a"], mesh["b"]), (shared, dist.group.WORLD, None)):
        try:
            fastclip.clip_grad_norm_([q], 1.0, group=group, pp_mesh=pp_mesh)
        except (TypeError, ValueError) as error:
            errors.append(str(error))
    return errors, fastclip.clip_grad_norm_([p], math.inf, pp_mesh=mesh["a"])


def test_group_and_pp_mesh_are_one_dimension():
    for rank, (errors, norm) in enumerate(ranks(4).run(group_arguments)):
        assert errors[0] == "group: expected a mesh of one dimension, got 2; take one by its name"
        assert errors[1] == "group and pp_mesh are two names for the same; pass one of them"
        assert errors[2].startswith("group: its ranks hold shares of these very gradients")
        assert float(norm) == pytest.approx(math.sqrt(2 * (1 + rank % 2) ** 2 + 2 * (3 + rank % 2) ** 2))


def checkpoint(folder, load):
    """Four steps, saved on these ranks; or loaded on these, which go on for four more."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = sharded("fsdp")
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["loop"](model.named_parameters()), policy=policies.ZScore(1.0, warmup=2))
    if load:
        train(model, opt, 1, start=50)  # something else to be overwritten
    else:
        train(model, opt, 4)
    steps = int(opt.steps)
    with counted() as count:
        of_model, of_optimizer = get_state_dict(model, opt)
    state = {"model": of_model, "optimizer": of_optimizer}
    if load:
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        dcp.save(state, checkpoint_id=folder)
    assert int(opt.steps) == steps  # no step of torch's own counts
    norms = train(model, opt, 4, start=4)
    return whole(model.parameters()), norms, count.groups


def test_saved_on_two_ranks_and_loaded_on_four(tmp_path):
    saved = ranks(2).run(checkpoint, str(tmp_path / "it"), False)
    loaded = ranks(4).run(checkpoint, str(tmp_path / "it"), True)
    assert (tmp_path / "it").exists()
    for parameters, *_ in (*saved, *loaded):
        for a, b in zip(parameters, saved[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def fresh_checkpoint():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = sharded("fsdp")
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["fused"](model.parameters()), 1.0)
    first = get_optimizer_state_dict(model, opt)  # brings the state into being by a step with zero gradients
    untouched = (int(opt.steps), opt.last_norm)
    train(model, opt, 3)
    saved = get_optimizer_state_dict(model, opt)
    train(model, opt, 2, start=3)
    set_optimizer_state_dict(model, opt, saved)
    again = get_optimizer_state_dict(model, opt)
    same = [
        torch.equal(whole([again["state"][name][key]])[0], whole([value])[0])
        for name, of in saved["state"].items()
        for key, value in of.items()
    ]
    return untouched, all(same), len(same), sorted(first["state"]) == sorted(saved["state"])


def test_optimizer_state_goes_through_torchs_checkpoint_and_back():
    for untouched, same, entries, names in ranks(2).run(fresh_checkpoint):
        assert untouched == (0, None)
        assert same
        assert entries == 18
        assert names


def observed_elsewhere(rule):
    model = sharded("fsdp")
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["fused"](model.parameters()), 1.0)
    train(model, opt, 2)
    before = whole(model.parameters())
    if dist.get_rank() == 1:
        opt.observe(math.nan)
    train(model, opt, 1, start=2)
    return all(map(torch.equal, before, whole(model.parameters()))), int(opt.skipped_steps), opt.events[0].reason


def test_a_loss_that_one_rank_saw_skips_the_step_on_all():
    (a, skipped_a, reason_a), (b, skipped_b, reason_b) = ranks(2).run(observed_elsewhere, "skip")
    assert (a, skipped_a) == (b, skipped_b) == (True, 1)
    assert reason_a == "found by a GradScaler, or by another rank"
    assert reason_b == "the loss that was observed"


def penalised(nonfinite):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=mesh_of(2))
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["loop"](model.parameters()), 1.0, l1=0.01, l2=0.1, nonfinite=nonfinite)
    norms = train(model, opt, 5)
    return whole(model.parameters()), norms, opt.penalty, opt.last_stats.weight_norms.shape


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_penalty_is_that_of_all_shards(nonfinite):
    model = network()
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["loop"](model.parameters()), 1.0, l1=0.01, l2=0.1)
    norms = train(model, opt, 5)
    for parameters, own, penalty, shape in ranks(2).run(penalised, nonfinite):
        torch.testing.assert_close(penalty, opt.penalty, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.stack(own), torch.stack(norms), rtol=1e-5, atol=0)
        assert shape == (6,)
        for a, b in zip(parameters, whole(model.parameters()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def rolled_back():
    model = sharded("fsdp")
    rollback = fastclip.Rollback(every=1, after=2)
    backoff = fastclip.SpikeBackoff(patience=2)
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["loop"](model.parameters()), 1.0, rollback=rollback, backoff=backoff)
    train(model, opt, 3)
    taken = whole(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().mul_(1.5)  # the training goes astray

    def poison(step):
        if dist.get_rank() == 0:
            next(model.parameters()).grad.to_local()[0, 0] = math.nan

    train(model, opt, 2, poison=poison, start=3)
    return [e.kind for e in opt.events], taken, whole(model.parameters()), opt.lr_factor


def test_all_ranks_roll_back_and_cut_the_learning_rate_together():
    results = ranks(2).run(rolled_back)
    for kinds, *_, factor in results:
        assert kinds == results[0][0]
        assert kinds.count("roll back") == 1
        assert factor == 0.5
    assert all(map(torch.equal, results[0][2], results[1][2]))


def copied():
    import copy
    import pickle

    p = torch.nn.Parameter(torch.ones(2))
    opt = fastclip.ClippedOptimizer(torch.optim.SGD([p], lr=1.0), 1.0, group=mesh_of(2))
    norms = []
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        own = other.param_groups[0]["params"][0]
        own.grad = torch.full((2,), 1.0 + dist.get_rank())
        other.step()
        norms.append(other.last_norm)
    nothing = fastclip.ClippedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), group=mesh_of(2))
    nothing.step()
    return norms, int(nothing.steps), nothing.last_norm


def test_a_copy_joins_the_same_group_and_nothing_at_all_is_no_step():
    for norms, steps, norm in ranks(2).run(copied):
        assert [float(own) for own in norms] == [pytest.approx(math.sqrt(10.0))] * 2
        assert (steps, norm) == (0, None)


def test_a_copy_without_its_group_says_so():
    with pytest.raises(fastclip.RankError, match="joins its norm over the process group 'gone'"):
        ties.group_named("gone")


def of_groups():
    """A group with a rule of its own: both rules' norms travel together."""
    mesh = mesh_of(2)
    a, b, c = (with_grad(torch.full((4,), value), mesh, [Shard(0)]) for value in (3.0, 4.0, 0.5))
    sgd = torch.optim.SGD(
        [{"params": [a]}, {"params": [b], "group_max_norm": 2.0}, {"params": [c], "policy": "AdaGC"}], lr=1.0
    )
    opt = fastclip.ClippedOptimizer(sgd, 1.0)
    opt.step()
    for p, value in ((a, 3.0), (b, 4.0), (c, 0.5)):
        p.grad = placed(torch.full((4,), value), mesh, [Shard(0)])
    if dist.get_rank() == 1:
        b.grad.to_local()[0] = math.nan
    with counted() as count:
        opt.step()
    worst = opt.last_stats.worst(1)[0]
    return (
        opt.last_norm,
        whole([a, b, c]),
        count.collectives,
        int(opt.skipped_steps),
        (worst.name, worst.rank),
        opt.events[0].tensors,
    )


def test_groups_with_their_own_rules_share_the_collective():
    for norm, moved, collectives, skipped, worst, tensors in ranks(2).run(of_groups):
        assert math.isnan(float(norm))
        assert [float(p[0]) for p in moved] == [pytest.approx(0.5), pytest.approx(0.0, abs=1e-6), pytest.approx(0.5)]
        assert (collectives, skipped) == (1, 1)
        assert worst == ("param_groups[1]['params'][0]", 1)
        assert "param_groups[1]['params'][0] on rank 1" in tensors


def union():
    """Several optimizers on one rank, fused and not, against one over all their parameters."""
    results = []
    for cut in (False, True):
        model = network()
        layers = [model[0], model[2], model[4]]
        if cut:
            opts = [torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True) for layer in layers]
            opt = fastclip.ClipGroup(opts, max_norm=1.0)
        else:
            opt = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05, fused=True), 1.0)
        norms = train(model, opt, 20)
        results.append((whole(model.parameters()), torch.stack(norms), opt))
    return results


def test_one_norm_over_several_optimizers():
    (parameters, norms, _), (of_group, own, opt) = union()
    assert torch.equal(norms, own)
    for a, b in zip(parameters, of_group, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    saved = opt.state_dict()
    assert [len(of["state"]) for of in saved["optimizers"]] == [2, 2, 2]
    copy = pickle.loads(pickle.dumps(opt))
    copy.load_state_dict(saved)
    assert len(copy.inner.parts) == 3
    assert copy.state[copy.param_groups[1]["params"][0]]["step"] == 20
    with pytest.raises(ValueError, match="the state of 2 optimizers was saved, here are 3"):
        opt.load_state_dict({"optimizers": saved["optimizers"][:2]})
    with pytest.raises(TypeError, match="add_param_group of the one"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(TypeError, match="is clipped by fastclip already"):
        fastclip.ClipGroup([opt])
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="each step would move it twice"):
        fastclip.ClipGroup([torch.optim.SGD([p], lr=0.1), torch.optim.SGD([p], lr=0.1)])


def test_several_optimizers_skip_together_and_follow_a_scheduler():
    model = network()
    opts = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2], model[4])]
    opt = fastclip.ClipGroup(opts, max_norm=1.0, rollback=fastclip.Rollback(every=1, after=1))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    train(model, opt, 1)
    scheduler.step()
    assert [part.param_groups[0]["lr"] for part in opts] == [0.05] * 3
    before = whole(model.parameters())
    train(model, opt, 1, poison=lambda step: model[4].bias.grad.fill_(math.nan), start=1)
    assert all(map(torch.equal, before, whole(model.parameters())))
    assert int(opt.skipped_steps) == 1
    assert [event.kind for event in opt.events] == ["skip", "roll back"]


def stages_of_shards(bad):
    """Two stages, each sharded over two ranks: the norm joins over the shards, then over the stages."""
    mesh = mesh_of(2, 2)
    stage, shards = mesh.get_local_rank("a"), mesh["b"]
    full = torch.arange(6.0).reshape(3, 2) + 1.0 + 10.0 * stage
    parameters = [with_grad(full, shards, [Shard(0)]), *([with_grad(full[0], shards, [Replicate()])] if stage else [])]
    if bad and dist.get_rank() == 3:
        parameters[0].grad.to_local()[-1, -1] = math.inf
    try:
        with counted() as count:
            norm = fastclip.clip_grad_norm_(parameters, 1.0, nonfinite="raise", group=mesh["a"])
            norm = fastclip.clip_grad_norm_(parameters, 1.0, nonfinite="raise", group=mesh["a"])
    except fastclip.NonFiniteGradientError as error:
        return error.tensor, str(error), [p.grad.to_local() for p in parameters]
    return norm, count.collectives


def test_stages_of_shards_join_twice():
    for norm, collectives in ranks(4).run(stages_of_shards, False):
        assert float(norm) == pytest.approx(1.0, rel=1e-5)
        assert collectives in (4, 5)  # the stage with two ways of sharding compares lists once


def test_a_bad_element_of_another_stage_is_named_by_its_rank():
    results = ranks(4).run(stages_of_shards, True)
    assert [tensor for tensor, *_ in results] == ["gradient 0 of rank 3's list"] * 2 + ["parameters[0]"] * 2
    assert all("holds Inf on rank 3" in message for _, message, _ in results)
    for rank, (*_, grads) in enumerate(results):
        assert all(bool((grad >= 1.0).all()) for grad in grads), rank  # nothing was written


def other_functions():
    mesh = mesh_of(2)
    grads = fulls()
    parameters = [with_grad(full, mesh, [Shard(0) if full.dim() else Replicate()]) for full in grads]
    fastclip.clip_grad_value_(parameters, 0.5)
    clamped = whole([p.grad for p in parameters])
    fastclip.clip_grads_with_norm_(parameters, 1.0, 2.0)
    scaled = whole([p.grad for p in parameters])
    described = ""
    try:
        parameters[0].grad.to_local().fill_(math.nan)
        fastclip.get_total_norm([p.grad for p in parameters], error_if_nonfinite=True)
    except fastclip.NonFiniteGradientError as error:
        described = str(error)
    return clamped, scaled, described, fastclip.backends.explain(parameters)


def test_functions_without_a_norm_work_on_the_shares():
    for clamped, scaled, described, explained in ranks(2).run(other_functions):
        for got, half, full in zip(clamped, scaled, fulls(), strict=True):
            assert torch.equal(got, full.clamp(-0.5, 0.5))
            torch.testing.assert_close(half, got * (1.0 / (2.0 + 1e-6)))
        assert described.startswith("the gradient of tensors[0] holds NaN on rank 0")
        assert "serves 7 of 7 gradients" in explained


class Group:
    def __init__(self, *types):
        self._device_types = [torch.device(kind) for kind in types]


def test_a_vector_goes_where_the_group_can_work():
    cpu = torch.device("cpu")
    assert distributed._device_for(Group("cuda", "cpu"), cpu) == cpu
    assert distributed._device_for(Group("cuda"), cpu).type == "cuda"


def test_a_vector_asks_no_gpu_that_is_not_there(monkeypatch):
    """A CUDA build of torch names its accelerator also where there is none, and then raises when it is asked more."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else cuda
    )
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: pytest.fail("no driver"))
    assert distributed._device_for(Group("cuda"), torch.device("cpu")) == cuda


def bad_parameters():
    """A snapshot is taken only of parameters that are finite on all ranks."""
    model = sharded("fsdp")
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["loop"](model.parameters()), 1.0, rollback=fastclip.Rollback(every=1))
    if dist.get_rank() == 0:
        with torch.no_grad():
            next(model.parameters()).to_local()[0, 0] = math.nan
    train(model, opt, 1)
    return opt._ladder.rollback.snapshot.taken_at


def test_no_rank_takes_a_snapshot_of_a_model_with_nan_on_one():
    assert ranks(2).run(bad_parameters) == [None, None]


def test_several_optimizers_under_a_loss_scale():
    results = []
    for scaler in (None, fastclip.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = network()
        opts = [torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True) for layer in (model[0], model[2], model[4])]
        opt = fastclip.ClipGroup(opts, max_norm=1.0)
        norms = train(model, opt, 6, scaler)
        results.append((whole(model.parameters()), torch.stack(norms)))
        assert not any(name in vars(part) for part in opts for name in ("grad_scale", "found_inf"))
    for parameters, norms in results[1:]:
        torch.testing.assert_close(norms, results[0][1], rtol=1e-5, atol=0)
        for a, b in zip(parameters, results[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def penalised_stages():
    """The first rank has no parameters at all."""
    p = torch.nn.Parameter(torch.full((2,), 2.0))
    p.grad = torch.full((2,), 3.0)
    opts = [torch.optim.SGD([p], lr=1.0)] if dist.get_rank() else []
    opt = fastclip.ClipGroup(opts, max_norm=100.0, group=mesh_of(2), l2=0.5)
    opt.step()
    return opt.last_norm, opt.penalty, p.detach()


def test_a_stage_without_parameters_joins_penalties_too():
    results = ranks(2).run(penalised_stages)
    for norm, penalty, _ in results:
        assert float(norm) == pytest.approx(math.sqrt(2 * 4.0**2))
        assert float(penalty) == pytest.approx(0.5 / 2 * 2 * 2.0**2)
    assert torch.equal(results[1][2], torch.full((2,), -2.0))


def patched():
    parameter = with_grad(torch.full((4,), 3.0), mesh_of(2), [Shard(0)])
    with fastclip.patch():
        norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    return type(norm), float(norm), parameter.grad.to_local()


def test_a_patch_serves_sharded_gradients():
    for kind, norm, share in ranks(2).run(patched):
        assert kind is torch.Tensor
        assert norm == 6.0
        torch.testing.assert_close(share, torch.full((2,), 0.5))
