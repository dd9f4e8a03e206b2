"""The norm of what lies on several ranks: right under every sharding, the same bits everywhere, one collective."""

import itertools
import math

import oracle
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, ranks
from shards import counted, mesh_of, network, placed, sharded, whole, with_grad
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastclip
from fastclip import distributed, policies, ties

pytestmark = pytest.mark.xdist_group("ranks")

WORLDS = (2, 4)
SHAPES = ((5, 3), (8, 4), (1,), (7,), (), (0, 3), (3, 1, 2))
MESHES = {2: [(2,)], 4: [(4,), (2, 2)]}


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


def compiled_over(how):
    torch._dynamo.reset()
    mesh = mesh_of(dist.get_world_size())
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0]) if dist.get_rank() else torch.tensor([12.0, 0.0])
    group = {"group": mesh.get_group(), "mesh": mesh, "pp_mesh": mesh, "marked": None}[how]
    marked, ties._marked = ties._marked, ties._Marked()
    if how == "marked":
        fastclip.mark_sharded(p, mesh)

    def call():
        kwargs = {} if group is None else {"group": group}
        first = fastclip.grad_stats([p], **kwargs).total_norm
        second = fastclip.get_total_norm([p.grad], **kwargs) if group is not None else first
        third = fastclip.clip_grad_norm_([p], 1.0, **({"pp_mesh": mesh} if how == "pp_mesh" else kwargs))
        return first, second, third + 0.0

    try:
        return *torch.compile(call, backend="eager")(), p.grad.clone()
    finally:
        ties._marked = marked


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["group", "mesh", "pp_mesh", "marked"])
def test_a_compiled_call_counts_what_is_on_other_ranks(how):
    """Outside of the graph: its operators know of this rank alone."""
    results = ranks(2).run(compiled_over, how)
    for (*norms, grad), own in zip(results, (12.0, 5.0), strict=True):
        assert [float(norm) for norm in norms] == [pytest.approx(13.0)] * 3
        assert float(grad.norm()) == pytest.approx(own / 13.0)


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
        "bad": int(opt.nonfinite_steps),
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
        assert (result["skipped"], result["bad"], result["found"]) == (0, 1, 1.0)
        assert float(result["norm"]) == pytest.approx(rest, rel=6e-8)
        assert (result["worst"].name, result["worst"].nans, result["worst"].rank) == ("second", 1, 1)
        assert all(result["moved"][: 2 if rank == 0 else 1])
        assert float(result["grads"][0][0, 0]) == pytest.approx(1.0 / rest, rel=1e-5)
        assert result["grads"][1].tolist() == ([pytest.approx(2.0 / rest, rel=1e-5)] if rank == 0 else [0.0])


def checked(kind):
    """What the doctor says of a model whose parameters lie on several ranks, and whether the model runs afterwards."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = torch.device("cpu")
    model = FullyShardedDataParallel(network(), device_id=device) if kind == "fsdp1" else sharded(kind)
    batch = torch.ones(4, 6), torch.zeros(4, 1)
    try:
        fastclip.check(model, batch, torch.nn.MSELoss(), max_seconds=0)
    except fastclip.DoctorError as error:
        return str(error), float(model(batch[0]).detach().sum())
    return "", 0.0


@pytest.mark.parametrize("kind", ["fsdp", "tp", "fsdp1"])
def test_the_doctor_refuses_what_is_sharded_and_leaves_it_whole(kind):
    for message, total in ranks(2).run(checked, kind):
        assert "is sharded" in message
        assert math.isfinite(total)


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
    """Steps on the same random gradients, whole or placed in four ways; the parameters after them, what was seen."""
    ways = {"alone": [None] * 4, "1-D": [[Shard(0)], [Shard(1)], [Replicate()], [Shard(0)]]}
    ways["2-D"] = [[Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(1)], [Shard(0), Replicate()]]
    parameters = []
    for i, way in enumerate(ways[kind]):
        start = torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) if i < 3 else torch.ones(5)
        if way is not None:
            start = distribute_tensor(start, mesh_of(2) if kind == "1-D" else mesh_of(2, 2), way)
        parameters.append(torch.nn.Parameter(start))
    opt = fastclip.ClippedOptimizer(torch.optim.SGD(parameters, lr=0.1), policy=RULES[rule]())
    norms, records = [], []
    monitor = fastclip.GradMonitor(opt, sinks=records.append)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        for parameter in parameters:
            full = torch.randn(parameter.shape, generator=generator) * (1.0 + seed % 3)
            if isinstance(parameter, DTensor):
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
            parameter.grad = full
        opt.step()
        norms.append(opt.last_norm)
    monitor.close()
    return whole(parameters), norms, int(opt.clipped_steps), [(each.total_norm, each.clipped_norm) for each in records]


def all_rules(kind):
    return {rule: steps_by(rule, kind) for rule in RULES}


@pytest.mark.parametrize(("world", "kind"), [(2, "1-D"), (4, "2-D")])
def test_every_rule_decides_as_on_one_process(world, kind):
    for of_rank in ranks(world).run(all_rules, kind):
        for rule, (parameters, norms, clipped, seen) in of_rank.items():
            wanted, wanted_norms, wanted_clipped, wanted_seen = steps_by(rule, "alone")
            assert wanted_clipped > 0
            for got, parameter in zip(parameters, wanted, strict=True):
                torch.testing.assert_close(
                    got, parameter, rtol=1e-5, atol=1e-6, msg=lambda m, rule=rule: f"{rule}: {m}"
                )
            torch.testing.assert_close(torch.stack(norms), torch.stack(wanted_norms), rtol=1e-6, atol=0)
            if rule not in ("Value", "Chain of totals", "Unitwise", "Unitwise in"):  # what a rank clips is its own
                assert clipped == wanted_clipped, rule
            norms_seen, left = zip(*seen, strict=True)
            wanted_norms_seen, wanted_left = zip(*wanted_seen, strict=True)
            assert norms_seen == pytest.approx(wanted_norms_seen, rel=1e-5)
            if "Unitwise" in rule:  # only another read would tell what is left
                assert set(left) == {None}, rule
            elif not RULES[rule]().clamps:
                assert left == pytest.approx(wanted_left, rel=1e-5), rule


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
