"""Training on several ranks: steps, skips and counts as on one, under every kind of sharding, and after a restart."""

import math
import pickle

import pytest
import torch
import torch.distributed as dist
from far import go_far, no_waiting
from ranks import ranks
from shards import counted, mesh_of, network, placed, sharded, whole, with_grad
from torch.distributed.tensor import Replicate, Shard

import fastclip
from fastclip import policies, ties

pytestmark = pytest.mark.xdist_group("ranks")

OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "loop": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


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
    # the last layer is outside of the tensor-parallel plan: the ranks agree on one of its copies
    again = 1 if kind == "fsdp-tp" else 0
    for *_, joined in results:
        assert len(set(joined)) == groups
        assert len(joined) == groups + again


RULES = {
    "total": lambda: policies.GlobalNorm(1.0),
    "tensors": lambda: policies.Chain(policies.PerTensorNorm(0.3), policies.GlobalNorm(1.0)),
    "units": lambda: policies.Unitwise(0.05),
    "averages": lambda: policies.AdaGC(warmup=2),
}


def train_far_from_the_host(kind, rule):
    model = sharded(kind)
    opt = fastclip.ClippedOptimizer(OPTIMIZERS["fused"](model.parameters()), policy=RULES[rule]())
    train(model, opt, 2)  # the ranks make themselves known to each other, and wait for that
    with pytest.MonkeyPatch.context() as patches:
        go_far(patches, "reference")
        for step in range(2, 5):
            opt.zero_grad()
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            ((model(batch) ** 2).mean() * 100.0).backward()
            with no_waiting(ties._ranks_of):  # a mesh is a tensor on the host
                opt.step()
    return whole(model.parameters())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("world", "kind"), [(2, "fsdp"), (4, "hsdp")])
def test_on_accelerators_no_step_waits(world, kind, rule):
    results = ranks(world).run(train_far_from_the_host, kind, rule)
    for got in results[1:]:
        assert all(map(torch.equal, got, results[0]))


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


def watched_stage():
    """The last rank has no parameters."""
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    opts = [] if dist.get_rank() else [torch.optim.SGD([p], lr=0.1)]
    opt, told = fastclip.ClipGroup(opts, group=mesh_of(dist.get_world_size())), []
    with fastclip.GradMonitor(opt, sinks=told.append):
        opt.step()
    return [(record.total_norm, record.worst) for record in told]


def test_a_monitor_on_a_rank_without_parameters():
    first, last = ranks(2).run(watched_stage)
    assert first == [(5.0, "param_groups[0]['params'][0]")]
    assert last == [(5.0, None)]


def watched_shards():
    mesh = mesh_of(2)
    p = torch.nn.Parameter(placed(torch.ones(4, 2), mesh, [Shard(0)]))
    p.grad, told = placed(torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]), mesh, [Shard(0)]), []
    opt = fastclip.ClippedOptimizer(torch.optim.SGD([p], lr=0.1))
    with fastclip.GradMonitor(opt, sinks=told.append, census_every=1):
        opt.step()
    return [(record.total_norm, record.zeros, record.norms()[record.worst]) for record in told]


def test_a_monitor_looks_at_its_ranks_own_elements():
    assert ranks(2).run(watched_shards) == [[(5.0, 1.0, 0.0)], [(5.0, 0.5, 5.0)]]


def snapshot_of_marked():
    bad = dist.get_rank() == 1
    p = torch.nn.Parameter(torch.full((2,), math.nan if bad else 1.0))
    marked, ties._marked = ties._marked, ties._Marked()
    try:
        fastclip.mark_sharded(p, mesh_of(dist.get_world_size()))
        rollback = fastclip.Rollback(every=1)
        opt = fastclip.ClippedOptimizer(torch.optim.SGD([p], lr=0.1), rollback=rollback)
        p.grad = torch.tensor([3.0, 4.0])
        opt.step()
    finally:
        ties._marked = marked
    return rollback.snapshot.taken_at


def test_no_rank_takes_a_snapshot_where_ones_marked_parameters_are_not_finite():
    assert ranks(2).run(snapshot_of_marked) == [None, None]


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
    with pytest.raises(TypeError, match="expected several of them, got SGD"):
        fastclip.ClipGroup(torch.optim.SGD(model_parameters := [torch.nn.Parameter(torch.ones(1))], lr=0.1))
    (p,) = model_parameters
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
