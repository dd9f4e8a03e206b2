"""A monitor tells what happened, makes no step wait, and never stops a training."""

import atexit
import copy
import csv
import errno
import fcntl
import gc
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from far import go_far, no_waiting

import fastclip
from fastclip import ClippedOptimizer, GradMonitor, policies
from fastclip.backends import cuda
from fastclip.monitoring import records, shipping, sinks
from fastclip.monitoring.found import Found
from fastclip.monitoring.records import decoded, encoded, number, packed, spelled

SIZES = ((4, 3), (4,), (2, 4), (2,))


def model_of(sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def give(parameters, step, factor=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * factor


def norm_of(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def optimizer_of(parameters, max_norm=1.0, **settings):
    return ClippedOptimizer(torch.optim.AdamW(parameters, lr=0.01, fused=True), max_norm, **settings)


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def steps_of(path):
    return [line["step"] for line in lines_of(path) if line["kind"] == "step"]


@pytest.fixture
def told():
    """A list of records and the function that fills it."""
    return []


# --- what a record says


def test_a_record_says_what_happened(told):
    parameters = model_of()
    opt = optimizer_of([("w", parameters[0]), ("b", parameters[1]), ("v", parameters[2]), ("c", parameters[3])])
    expected = []
    with GradMonitor(opt, sinks=told.append, census_every=1) as monitor:
        for step, factor in enumerate((0.01, 1.0, 5.0)):
            give(parameters, step, factor)
            before = [p.grad.clone() for p in parameters]
            opt.observe(torch.tensor(2.0 + step))
            opt.step()
            expected.append((norm_of(before), norm_of([p.grad for p in parameters]), before))
    assert monitor.step == 3
    for step, (record, (before, after, grads)) in enumerate(zip(told, expected, strict=True)):
        assert record.step == step + 1
        assert record.total_norm == pytest.approx(before, rel=1e-6)
        assert record.clipped_norm == pytest.approx(after, rel=1e-5)
        assert record.max_norm == 1.0
        assert record.clipped == (before > 1.0)
        assert record.clip_coef == pytest.approx(min(1.0, 1.0 / before), rel=1e-5)
        assert (record.skipped, record.reason, record.rolled_back) == (False, "", False)
        assert (record.nans, record.infs, record.loss, record.lr) == (0, 0, 2.0 + step, [0.01])
        assert list(record.norms()) == ["w", "b", "v", "c"]
        assert list(record.norms().values()) == pytest.approx([norm_of([g]) for g in grads], rel=1e-6)
        assert record.worst == max(record.norms(), key=record.norms().get)
        assert record.max_abs == pytest.approx(max(float(g.abs().max()) for g in grads))
        assert (record.zeros, record.subnormals) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step(told, bad):
    parameters = model_of()
    opt, events = optimizer_of(parameters), []
    with GradMonitor(opt, sinks=told.append, on_event=events.append, names=zip("abcd", parameters, strict=True)):
        give(parameters, 0)
        parameters[2].grad[0, 0] = bad
        opt.step()
    (record,) = told
    assert (record.skipped, record.clipped, record.clipped_norm, record.clip_coef) == (True, False, None, 1.0)
    assert (record.reason, record.worst) == ("nonfinite", "c")
    assert (record.nans, record.infs) == ((1, 0) if math.isnan(bad) else (0, 1))
    assert [(event.kind, event.tensors) for event in events] == [("non-finite", ("c",)), ("skip", ("c",))]
    assert not np.isfinite(record.tensor_norms[2])
    assert np.isfinite(record.tensor_norms[[0, 1, 3]]).all()


def test_a_step_in_which_nan_became_zero(told):
    parameters = model_of()
    opt, events = optimizer_of(parameters, nonfinite="zero"), []
    with GradMonitor(opt, sinks=told.append, on_event=events.append, names=zip("abcd", parameters, strict=True)):
        give(parameters, 0)
        parameters[2].grad[0, 0] = math.nan
        opt.step()
    (record,) = told
    assert (record.skipped, record.nans, record.infs, record.worst) == (False, 1, 0, "c")
    assert record.clipped_norm == pytest.approx(1.0, rel=1e-5)
    assert np.isfinite(record.tensor_norms).all()
    assert [(event.kind, event.tensors) for event in events] == [("non-finite", ("c",))]


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_inf_in_one_of_several_tensors_is_no_error_in_the_records(nonfinite, told):
    """It is multiplied by 0; warnings are errors here, and would come out of the step."""
    parameters = model_of()
    rule = policies.PerTensorNorm(1.0)
    opt = ClippedOptimizer(torch.optim.SGD(parameters, lr=0.0), policy=rule, nonfinite=nonfinite)
    with GradMonitor(opt, sinks=told.append, buffer=4) as monitor:
        for step in range(6):
            give(parameters, step)
            if step == 3:
                parameters[2].grad[0, 0] = math.inf
            opt.step()
    assert [record.step for record in told] == [1, 2, 3, 4, 5, 6]
    assert list(monitor.lost.values()) == [0]
    assert (told[3].total_norm, told[3].infs) == (math.inf, 1)
    assert told[3].clipped_norm is None if nonfinite == "skip" else math.isnan(told[3].clipped_norm)
    assert 0 < told[4].clipped_norm < told[4].total_norm


def test_a_skip_for_another_reason_blames_no_tensor():
    parameters, events = model_of(), []
    opt = optimizer_of(parameters, nonfinite="zero")
    with GradMonitor(opt, on_event=events.append, names=zip("abcd", parameters, strict=True)):
        give(parameters, 0)
        parameters[2].grad[0, 0] = math.nan
        opt.observe(math.inf)
        opt.step()
    assert [(event.kind, event.tensors) for event in events] == [("non-finite", ("c",)), ("skip", ())]


def test_each_reason_is_told(told):
    parameters = model_of()
    skipper = policies.SkipAboveMedian(factor=2.0)
    opt = ClippedOptimizer(torch.optim.AdamW(parameters, fused=True), policy=skipper, skip_limit=None)
    with GradMonitor(opt, sinks=told.append):
        for step in range(200):
            give(parameters, 0, 1e3 if step == 199 else 1.0)
            opt.step()
        give(parameters, 1)
        opt.observe(math.nan)
        opt.step()
        opt.found_inf = torch.tensor(1.0)
        opt.step()
    assert [record.reason for record in told[-3:]] == ["policy", "loss", "scaler"]
    assert [record.loss is None for record in told[-3:]] == [True, False, True]
    assert not any(record.skipped for record in told[:-3])


def test_a_roll_back_and_a_streak_that_raises(told):
    parameters = model_of()
    opt = optimizer_of(parameters, rollback=fastclip.Rollback(every=1, after=2), skip_limit=4)
    with GradMonitor(opt, sinks=told.append):
        for step in range(6):
            give(parameters, step, math.nan if step >= 3 else 1.0)
            opt.step()
        give(parameters, 0, math.nan)
        with pytest.raises(fastclip.SkipLimitError):
            opt.step()
    assert [record.rolled_back for record in told] == [False] * 4 + [True, False, True]
    assert [record.clipped_norm is None for record in told] == [record.skipped or record.rolled_back for record in told]
    assert [event.kind for event in told[4].events] == ["non-finite", "skip", "roll back"]
    assert told[4].events[-1].reason == "2 bad steps; back to the snapshot of step 3"


def test_what_is_done_to_the_learning_rate_is_told(told):
    parameters = model_of()
    opt = optimizer_of(parameters, backoff=fastclip.SpikeBackoff(0.5, patience=2, recover=2))
    with GradMonitor(opt, sinks=told.append) as monitor:
        monitor.step = 100  # of a resumed run
        for step in range(5):
            give(parameters, step)
            opt.observe(math.nan if step in (1, 2) else 1.0)
            opt.step()
    assert [[(event.step, event.kind) for event in record.events] for record in told] == [
        [],
        [(102, "skip")],
        [(103, "skip"), (103, "lr cut")],
        [],
        [(105, "lr restored")],
    ]
    assert told[1].events[0].reason == "the loss that was observed (nan)"
    assert told[2].events[1].reason == "2 bad steps; factor 0.5"


def test_a_loss_is_told_as_it_was_observed(told):
    """However its memory is used before the step."""
    parameters, loss = model_of(), torch.tensor(2.0)
    opt = optimizer_of(parameters)
    with GradMonitor(opt, sinks=told.append):
        give(parameters, 0)
        opt.observe(loss)
        loss.zero_()
        opt.step()
    assert [record.loss for record in told] == [2.0]


@pytest.mark.parametrize(
    ("policy", "after", "bound"),
    [
        (policies.PerTensorNorm(0.5), lambda grads: norm_of([g * min(1, 0.5 / norm_of([g])) for g in grads]), None),
        (policies.Value(1e3), norm_of, None),
        (policies.Value(0.1), None, None),
        (policies.Unitwise(1e-3), "read", None),
        (policies.GlobalNorm(0.5, norm_type=math.inf), "read", 0.5),
        (policies.Chain(policies.ZScore(), policies.GlobalNorm(0.5)), "read", 0.5),
        (policies.Chain(policies.Unitwise(0.1), policies.GlobalNorm(0.1)), "read", None),
    ],
    ids=lambda value: repr(value) if isinstance(value, policies.Policy) else "",
)
def test_norms_after_other_rules(policy, after, bound, told):
    parameters = model_of()
    opt = ClippedOptimizer(torch.optim.SGD(parameters, lr=0.0), policy=policy)
    with GradMonitor(opt, sinks=told.append, census_every=None):
        give(parameters, 0)
        before = [p.grad.clone() for p in parameters]
        opt.step()
    (record,) = told
    grads = [p.grad for p in parameters]
    if after is None:
        assert (record.clipped, record.clipped_norm) == (True, None)
        assert record.max_abs == pytest.approx(max(float(g.abs().max()) for g in before))  # this rule reads it anyway
    elif after == "read":
        expected = float(fastclip.get_total_norm(grads, policy.norm_type))
        assert record.clipped_norm == pytest.approx(expected, rel=1e-5)
        assert record.clip_coef < 1.0
    else:
        assert record.clipped_norm == pytest.approx(after(before), rel=1e-5)
    assert record.max_norm == (None if bound is None else pytest.approx(bound, rel=1e-5))


def test_groups_with_rules_of_their_own_are_joined(told):
    a, b, c = model_of(((3,), (5,), (7,)))
    groups = [{"params": [a]}, {"params": [b], "group_max_norm": 0.1}, {"params": [c], "lr": 0.5}]
    opt = ClippedOptimizer(torch.optim.SGD(groups, lr=0.01), 1e6)
    with GradMonitor(opt, sinks=told.append, names=[("a", a), ("b", b), ("c", c)]):
        give([a, b, c], 0)
        grads = [p.grad.clone() for p in (a, b, c)]
        opt.step()
        give([a, b, c], 1)
        b.grad = None
        opt.step()
    first, second = told
    assert first.total_norm == pytest.approx(norm_of(grads), rel=1e-6)
    assert first.norms() == pytest.approx({n: norm_of([g]) for n, g in zip("abc", grads, strict=True)}, rel=1e-6)
    assert (first.max_norm, first.lr) == (None, [0.01, 0.01, 0.5])
    assert (list(second.norms()), second.columns, second.max_norm) == (["a", "c"], [0, 2], 1e6)


@pytest.mark.parametrize("kind", ["torch", "fastclip"])
def test_scaled_gradients_are_told_unscaled(kind, told):
    parameters = model_of()
    opt = optimizer_of(parameters)
    scaler = (fastclip.GradScaler if kind == "fastclip" else torch.amp.GradScaler)("cpu", init_scale=1024.0)
    with GradMonitor(opt, sinks=told.append, census_every=1):
        for factor in (1.0, math.inf):
            scaler.scale(torch.ones(1))
            give(parameters, 0, 1024.0 * factor)
            scaler.step(opt)
            scaler.update()
    give(parameters, 0)
    assert told[0].total_norm == pytest.approx(norm_of([p.grad for p in parameters]), rel=1e-5)
    assert told[0].max_abs == pytest.approx(max(float(p.grad.abs().max()) for p in parameters), rel=1e-5)
    assert told[1].skipped
    assert set(told[1].reason.split("+")) <= {"nonfinite", "scaler"}


def test_include_and_every(told):
    parameters = model_of()
    opt = optimizer_of(list(zip(("h.0.weight", "h.0.bias", "h.1.weight", "h.1.bias"), parameters, strict=True)))
    with GradMonitor(opt, sinks=told.append, include=r"weight$", every=3):
        for step in range(10):
            give(parameters, step)
            parameters[1].grad *= 1e3
            opt.step()
    assert [record.step for record in told] == [3, 6, 9]
    assert all(list(record.norms()) == ["h.0.weight", "h.1.weight"] for record in told)
    assert {record.worst for record in told} == {"h.0.bias"}  # of all


def test_parameters_that_come_and_go(told, tmp_path):
    parameters = model_of()
    opt = optimizer_of(parameters[:2])
    path = tmp_path / "run.jsonl"
    with GradMonitor(opt, sinks=[told.append, path], names=zip("abcd", parameters, strict=True), buffer=1):
        give(parameters, 0)
        opt.step()
        opt.add_param_group({"params": parameters[2:]})
        opt.step()
    assert [list(record.norms()) for record in told] == [["a", "b"], ["a", "b", "c", "d"]]
    assert [line["names"] for line in lines_of(path) if line["kind"] == "tensors"] == [["a", "b"], ["a", "b", "c", "d"]]


def test_shares_of_zeros_and_subnormal_numbers(told):
    half = torch.nn.Parameter(torch.zeros(10_000, dtype=torch.float16))
    other = torch.nn.Parameter(torch.zeros(100))
    opt = ClippedOptimizer(torch.optim.SGD([half, other], lr=0.1), 1e6)
    half.grad = torch.ones(10_000, dtype=torch.float16)
    half.grad[::4] = 0.0
    half.grad[1::4] = 1e-6
    other.grad = torch.full((100,), 1e-6)  # far from subnormal in float32
    with GradMonitor(opt, sinks=told.append, census_every=2):
        for _ in range(3):
            opt.step()
    assert [record.zeros for record in told] == [2500 / 10_100, None, 2500 / 10_100]
    assert told[0].subnormals == pytest.approx(2500 / 10_100, rel=0.01)  # counted in a sample


@pytest.mark.parametrize("looked_up", [(3, 7, 7, 900), ()], ids=str)
def test_shares_of_sparse_gradients_are_those_of_dense_ones(looked_up, told):
    for sparse in (False, True):
        table, bias = torch.nn.Embedding(1000, 2, sparse=sparse), torch.nn.Parameter(torch.zeros(4))
        opt = ClippedOptimizer(torch.optim.SGD([*table.parameters(), bias], lr=0.1), 1e6)
        with GradMonitor(opt, sinks=told.append, census_every=1):
            rows = table(torch.tensor(looked_up, dtype=torch.int64))
            ((rows * torch.tensor([1.0, 1e-39])).sum() + bias.sum()).backward()
            opt.step()
    dense, sparse = told
    different = len(set(looked_up))
    assert dense.zeros == sparse.zeros == (2000 - 2 * different) / 2004
    assert dense.subnormals == pytest.approx(different / 2004)
    assert sparse.subnormals == pytest.approx(different / 2004)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_subnormal_shares_against_all_elements(dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 700, 0, 50_000)
    real = torch.zeros((), dtype=dtype).real.dtype
    tiny = torch.finfo(real).smallest_normal
    grads = [
        (torch.rand(n, generator=generator, dtype=torch.float64) * 2 * tiny).to(dtype) for n in (1, 700, 0, 50_000)
    ]
    grads.append(torch.full((300, 200), 1.0).to(dtype).T)
    shares = shipping.subnormal_shares(grads, torch.zeros(1, dtype=torch.float64))
    for grad, share in zip(grads, shares.tolist(), strict=True):
        parts = torch.view_as_real(grad) if grad.is_complex() else grad
        sizes = parts.double().abs()
        exact = float(((sizes > 0) & (sizes < tiny)).double().mean()) if grad.numel() else 0.0
        assert share == pytest.approx(exact, abs=0.03 if grad.numel() > shipping.SAMPLE else 0.0)


def test_lbfgs_tells_each_evaluation(told):
    parameters = model_of()
    opt = ClippedOptimizer(torch.optim.LBFGS(parameters, max_iter=3), 1e6)

    def closure():
        opt.zero_grad()
        loss = sum((p**2).sum() for p in parameters)
        loss.backward()
        return loss

    with GradMonitor(opt, sinks=told.append):
        opt.step(closure)
    assert len(told) == int(opt.steps) > 1


def test_attached_optimizers_are_monitored(told):
    parameters = model_of()
    plain = torch.optim.SGD(parameters, lr=0.1)
    with GradMonitor(fastclip.attach(plain, 1.0), sinks=told.append):
        give(parameters, 0)
        plain.step()
    assert len(told) == 1
    plain.step()
    assert len(told) == 1


def test_training_is_the_same_with_a_monitor(told):
    ends = []
    for watched in (False, True):
        parameters = model_of()
        opt = optimizer_of(parameters)
        monitor = GradMonitor(opt, sinks=told.append, census_every=1) if watched else None
        for step in range(20):
            give(parameters, step, math.nan if step == 7 else 1.0)
            opt.step()
        if monitor is not None:
            monitor.close()
        ends.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_copies_of_the_optimizer_are_not_monitored(told):
    parameters = model_of()
    opt = optimizer_of(parameters)
    with GradMonitor(opt, sinks=told.append):
        for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            for group in twin.param_groups:
                give(group["params"], 0)
            twin.step()
    assert told == []


# --- nothing waits


def waiting_for_copies():
    """But for the monitor's look at what has arrived on the host."""
    return no_waiting(shipping.Shipment.unpack, Found._joined)


@pytest.fixture(params=["reference", *([cuda.name] if cuda.EMULATED else [])])
def far(request, monkeypatch):
    go_far(monkeypatch, request.param)


@pytest.mark.parametrize("policy", ["global_norm", "per_tensor_norm", "unitwise", "zscore", "skip_large"])
@pytest.mark.parametrize("buffer", [1, 5])
def test_far_steps_are_told_and_wait_for_nothing(policy, buffer, far, told, tmp_path):
    parameters = model_of((*SIZES, (80, 60)))
    chosen = {
        "global_norm": policies.GlobalNorm(torch.tensor(1.0)),
        "per_tensor_norm": policies.PerTensorNorm(0.5),
        "unitwise": policies.Unitwise(1e-3),
        "zscore": policies.ZScore(),
        "skip_large": policies.SkipLarge(),
    }[policy]
    opt = ClippedOptimizer(torch.optim.AdamW(parameters, lr=torch.tensor(0.01), fused=True), policy=chosen)
    path = tmp_path / "run.jsonl"
    monitor = GradMonitor(opt, sinks=[path, told.append], census_every=2, buffer=buffer)
    for step in range(12):
        give(parameters, step, math.nan if step == 6 else 1.0)
        with waiting_for_copies():
            opt.observe(torch.tensor(float(step)))
            opt.step()
    monitor.close()
    assert [record.step for record in told] == list(range(1, 13)) == steps_of(path)
    assert [record.skipped for record in told] == [step == 6 for step in range(12)]
    assert [record.loss for record in told] == list(range(12))
    assert told[0].lr == pytest.approx([0.01])
    give(parameters, 3)
    assert told[3].total_norm == pytest.approx(norm_of([p.grad for p in parameters]), rel=1e-6)
    if policy == "global_norm":
        assert all(record.clipped_norm == pytest.approx(1.0, rel=1e-5) for record in told if record.clipped)


def test_a_copy_that_arrives_late_is_told_later_and_in_order(told, monkeypatch):
    arrived = []
    monkeypatch.setattr(shipping.Shipment, "has_arrived", property(lambda self: self in arrived))
    parameters = model_of()
    opt = optimizer_of(parameters)
    monitor = GradMonitor(opt, sinks=told.append, buffer=2)
    for step in range(8):
        give(parameters, step)
        opt.step()
        if step == 5:
            arrived.append(monitor._under_way[0])
    assert [record.step for record in told] == [1, 2]
    monitor.close()
    assert [record.step for record in told] == list(range(1, 9))


def test_nothing_is_held_by_a_monitor_that_waits():
    """A gradient that a record keeps alive would double the memory."""
    import weakref

    parameters = model_of()
    opt = ClippedOptimizer(torch.optim.SGD(parameters, lr=0.1), 1.0)
    with GradMonitor(opt, census_every=1):
        give(parameters, 0)
        grads = [weakref.ref(p.grad) for p in parameters]
        opt.step()
        opt.zero_grad()
        gc.collect()
        assert not any(grad() is not None for grad in grads)


def test_a_slow_run_is_told_of_before_the_buffer_is_full(told, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fastclip.monitor.time.monotonic", lambda: now[0])
    parameters = model_of()
    opt = optimizer_of(parameters)
    with GradMonitor(opt, sinks=told.append):
        for step in range(4):
            now[0] += 0.6
            give(parameters, step)
            opt.step()
        assert len(told) == 4


# --- the file


@pytest.mark.parametrize("value", [0.0, -1.5, 3, math.nan, math.inf, -math.inf])
def test_numbers_survive_json(value):
    back = number(json.loads(json.dumps(spelled(value), allow_nan=False)))
    assert back == value or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize("value", ["nan", "1.0", True, None, [1.0]])
def test_other_spellings_are_refused(value):
    with pytest.raises((ValueError, TypeError)):
        number(value)


def test_packed_norms_keep_what_they_mean():
    norms = np.array([0.0, 1.0, 1e300, 1e-300, math.inf, math.nan, 1e-45])
    back = decoded(encoded(packed(norms)))
    assert back.dtype == np.dtype("<f4")
    assert back[:2].tolist() == [0.0, 1.0]
    assert np.isfinite(back[2])
    assert back[3] > 0
    assert back[4] == math.inf
    assert math.isnan(back[5])
    assert back[6] > 0
    assert encoded(np.array([1.0], np.float32)) == "AACAPw=="  # as documented: little-endian


def test_the_file_is_as_documented(tmp_path):
    path = tmp_path / "run.jsonl"
    parameters = model_of()
    opt = optimizer_of(list(zip("abcd", parameters, strict=True)))
    with GradMonitor(opt, sinks=path):
        for step, factor in enumerate((1.0, math.nan)):
            give(parameters, step, factor)
            parameters[3].grad = None if step == 0 else parameters[3].grad
            opt.step()
    header, tensors, first, second = lines_of(path)
    assert (header["kind"], header["format"], header["version"]) == ("header", "fastclip.monitor", 1)
    assert tensors == {"kind": "tensors", "names": ["a", "b", "c", "d"], "sizes": [12, 4, 8, 2]}
    assert (first["kind"], first["step"], first["columns"]) == ("step", 1, [0, 1, 2])
    give(parameters, 0)
    assert decoded(first["tensor_norms"]) == pytest.approx([norm_of([p.grad]) for p in parameters[:3]], rel=1e-6)
    assert (second["total_norm"], second["skipped"], second["reason"]) == ("NaN", True, "nonfinite")
    assert [event["kind"] for event in second["events"]] == ["non-finite", "skip"]
    assert "columns" not in second


def test_a_table(tmp_path):
    path = tmp_path / "run.csv"
    parameters = model_of()
    opt = optimizer_of([("=cmd()", parameters[0])])
    with GradMonitor(opt, sinks=path):
        for factor in (1.0, math.nan):
            give(parameters, 0, factor)
            opt.step()
    first, second = csv.DictReader(path.read_text().splitlines())
    give(parameters, 0)
    assert float(first["total_norm"]) == pytest.approx(norm_of([parameters[0].grad]), rel=1e-6)
    assert (first["step"], first["clipped"], first["events"], first["worst"]) == ("1", "1", "", "'=cmd()")
    assert (second["total_norm"], second["skipped"], second["events"]) == ("NaN", "1", "non-finite:1 skip:1")


def run_on(parameters, paths, steps, state=None, buffer=3):
    opt = optimizer_of(parameters)
    with GradMonitor(opt, sinks=[*paths], buffer=buffer) as monitor:
        if state is not None:
            monitor.load_state_dict(state)
        for _ in range(steps):
            give(parameters, monitor.step)
            opt.step()
        return monitor.state_dict()


def monitor_of_three_steps(opt):
    monitor = GradMonitor(opt)
    for step in range(3):
        give(opt.param_groups[0]["params"], step)
        opt.step()
    return monitor


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_resuming_appends_without_duplicates(name, tmp_path):
    """The checkpoint is of step 7, the run went on to 12 before it was killed."""
    path, parameters = tmp_path / name, model_of()
    at_7 = run_on(parameters, [path], 7)
    torch.save(at_7, tmp_path / "state.pt")
    run_on(parameters, [path], 5, at_7)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    run_on(parameters, [path], 4, state)
    steps = (
        steps_of(path)
        if name.endswith("jsonl")
        else [int(row["step"]) for row in csv.DictReader(path.read_text().splitlines())]
    )
    assert steps == list(range(1, 12))
    if name.endswith("jsonl"):
        assert [line.get("resumed_at") for line in lines_of(path) if line["kind"] == "header"] == [None, 7, 7]


def test_a_fold_before_the_first_step_leaves_a_file_to_go_on_with(tmp_path):
    path, parameters = tmp_path / "run.jsonl", model_of()
    opt = optimizer_of(parameters)
    with GradMonitor(opt, sinks=path) as monitor:
        monitor.reset(fold="first")
        give(parameters, 0)
        opt.step()
    assert [line["kind"] for line in lines_of(path)] == ["header", "tensors", "fold", "step"]
    with GradMonitor(opt, sinks=path) as monitor:
        assert monitor.step == 1


def test_a_sink_that_cannot_be_closed_stops_no_other(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    class Writer(SummaryWriter):
        def __init__(self):
            pass

        def add_scalar(self, *args, **kwargs):
            pass

        add_text = add_scalar

        def flush(self):
            raise OSError(28, "no space left")

    parameters, path = model_of(), tmp_path / "run.jsonl"
    opt = optimizer_of(parameters)
    monitor = GradMonitor(opt, sinks=[Writer(), path])
    give(parameters, 0)
    opt.step()
    with pytest.warns(RuntimeWarning, match="TensorBoard: OSError: .*no space left"):
        monitor.close()
    with GradMonitor(opt, sinks=path) as monitor:  # which is free again
        assert monitor.step == 1


def test_what_is_no_state_of_a_monitor_is_told():
    monitor = GradMonitor(optimizer_of(model_of()))
    monitor.step = 3
    with pytest.raises(ValueError, match="no state of a GradMonitor: flags, fold, names missing"):
        monitor.load_state_dict({"step": 7})
    assert monitor.step == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"step": None}, "step: expected a number"),
        ({"step": -1}, "step must be a whole number of at least 0"),
        ({"names": 3}, "has no len"),
        ({"flags": None}, "flags: expected a dict, got NoneType"),
        ({"flags": {}}, "flags: count, found, highest, in_block"),
        ({"mean": None}, "flags: mean is no tensor with 4 elements"),
        ({"mean": torch.zeros(3)}, "flags: mean is no tensor with 4 elements"),
        ({"in_block": "many"}, "flags: in_block: expected a number"),
    ],
    ids=str,
)
def test_a_damaged_state_changes_nothing(damage, message):
    monitor = monitor_of_three_steps(optimizer_of(model_of()))
    before = monitor.state_dict()
    ((name, wrong),) = damage.items()
    damaged = before | {"step": 7, name: wrong} if name in before else before | {"flags": before["flags"] | damage}
    if name == "step":
        damaged["flags"] = {key: value + 1 for key, value in before["flags"].items()}
    with pytest.raises(ValueError, match=f"no state of a GradMonitor: .*{message}.*Nothing was changed"):
        monitor.load_state_dict(damaged)
    assert repr(monitor.state_dict()) == repr(before)


def test_a_monitor_that_was_refused_another_optimizer_goes_on(tmp_path):
    parameters, path = model_of(), tmp_path / "run.jsonl"
    opt = optimizer_of(parameters)
    with GradMonitor(opt, sinks=path) as monitor:
        for wrong in (torch.optim.SGD(parameters, lr=0.1), 3):
            with pytest.raises(TypeError, match=r"expected a fastclip\.ClippedOptimizer"):
                monitor.reset("second", wrong)
        give(parameters, 0)
        opt.step()
    assert steps_of(path) == [1]
    assert not any(line["kind"] == "fold" for line in lines_of(path))


def test_a_closed_monitor_leaves_files_alone(tmp_path):
    """Its descriptor may be that of another one by now."""
    parameters = model_of()
    state = run_on(parameters, [tmp_path / "first.jsonl"], 2)
    closed = GradMonitor(optimizer_of(parameters), sinks=tmp_path / "second.jsonl")
    closed.close()
    run_on(parameters, [tmp_path / "third.jsonl"], 5)
    opt = optimizer_of(parameters)
    with GradMonitor(opt, sinks=tmp_path / "third.jsonl"):
        for call in (lambda: closed.load_state_dict(state), closed.reset):
            with pytest.raises(RuntimeError, match="closed: make another"):
                call()
    assert steps_of(tmp_path / "third.jsonl") == [1, 2, 3, 4, 5]


def test_a_file_with_a_damaged_line_cannot_be_cut(tmp_path):
    """As a power cut may leave it; what is resumed goes on, and says what it could not do."""
    path, parameters = tmp_path / "run.jsonl", model_of()
    at_2 = run_on(parameters, [path], 2)
    before = path.stat().st_size
    at_4 = run_on(parameters, [path], 2, at_2)
    run_on(parameters, [path], 2, at_4)
    content = bytearray(path.read_bytes())
    content[before + 5 : before + 25] = bytes(20)
    path.write_bytes(content)
    with GradMonitor(optimizer_of(parameters), sinks=path) as monitor:
        with pytest.warns(RuntimeWarning, match="not JSON"):
            monitor.load_state_dict(at_2)
        assert monitor.step == 2


def test_a_last_record_without_its_step_is_no_file_to_go_on_with(tmp_path):
    path, parameters = tmp_path / "run.jsonl", model_of()
    run_on(parameters, [path], 2)
    with path.open("ab") as file:
        file.write(b'{"kind": "step"}\n')
    with pytest.raises(ValueError, match="a record without its step"):
        GradMonitor(optimizer_of(parameters), sinks=path)


def test_flags_are_resumed_from_a_state_that_lies_elsewhere():
    monitor = monitor_of_three_steps(optimizer_of(model_of()))
    state = monitor.state_dict()
    asked = []

    class Elsewhere(torch.Tensor):
        def numpy(self):
            raise TypeError("can't convert a tensor on an accelerator to numpy")

        def cpu(self):
            asked.append(self.shape)
            return self.as_subclass(torch.Tensor)

    state["flags"] = {name: value.as_subclass(Elsewhere) for name, value in state["flags"].items()}
    monitor.load_state_dict(state)
    assert asked
    monitor.close()


def test_a_resumed_run_flags_as_one_that_went_on(tmp_path):
    ends = []
    for pieces in ((60,), (25, 35)):
        parameters, state, events = model_of(), None, []
        for piece in pieces:
            opt = optimizer_of(parameters)
            monitor = GradMonitor(opt, on_event=lambda event, events=events: events.append(tuple(event)))
            if state is not None:
                monitor.load_state_dict(state)
            for _ in range(piece):
                give(parameters, monitor.step, 1e4 if monitor.step == 50 else 1.0)
                opt.step()
            state = monitor.state_dict()
            monitor.close()
        ends.append((events, {name: value.tolist() for name, value in state["flags"].items()}))
    assert repr(ends[0]) == repr(ends[1])
    assert [event[1] for event in ends[0][0]] == ["exploding"]


def test_without_a_checkpoint_the_steps_go_on(tmp_path):
    path, parameters = tmp_path / "run.jsonl", model_of()
    for _ in range(2):
        run_on(parameters, [path], 3)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]


KILLED = """
import os, signal, sys, torch, fastclip
written, real = 0, os.write
def write(descriptor, content):
    global written
    if written > 3000 and len(content) > 10:
        real(descriptor, bytes(content)[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    written += len(content)
    return real(descriptor, content)
os.write = write if sys.argv[2] == "in a write" else real
parameter = torch.nn.Parameter(torch.zeros(50))
opt = fastclip.ClippedOptimizer(torch.optim.SGD([parameter], lr=0.1), 1.0)
fastclip.GradMonitor(opt, sinks=sys.argv[1], buffer=1)
while True:
    parameter.grad = torch.ones(50)
    opt.step()
    print(int(opt.steps), flush=True)
"""


@pytest.mark.parametrize("when", ["in a write", "at any time"])
def test_a_killed_run_loses_at_most_its_last_line(when, tmp_path):
    path = tmp_path / "run.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), when], stdout=subprocess.PIPE, text=True)
    made = 0
    for line in process.stdout:
        made = int(line)
        if when == "at any time" and made == 40:
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    text = path.read_bytes()
    *whole, rest = text.split(b"\n")
    steps = [content["step"] for content in map(json.loads, whole) if content["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= made
    assert bool(rest) == (when == "in a write")
    run_on(model_of(((50,),)), [path], 3)
    assert steps_of(path) == list(range(1, len(steps) + 4))  # each line is whole again


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_a_file_cut_in_its_first_line_is_begun_anew(name, tmp_path):
    path, parameters = tmp_path / name, model_of()
    run_on(parameters, [path], 2)
    first = path.read_bytes().partition(b"\n")[0]
    for length in (1, len(first) // 2, len(first)):
        path.write_bytes(first[:length])
        run_on(parameters, [path], 2)
        assert path.read_bytes().partition(b"\n")[0][:40] == first[:40]
        assert path.read_bytes().count(b"\n") == (4 if name.endswith("jsonl") else 3)


def test_one_file_has_one_monitor(tmp_path):
    path = tmp_path / "run.jsonl"
    (tmp_path / "link.jsonl").symlink_to(path)
    opts = [optimizer_of(model_of()) for _ in range(2)]
    with pytest.raises(ValueError, match="another GradMonitor of this process writes there"):
        GradMonitor(opts[0], sinks=[path, path])
    with GradMonitor(opts[0], sinks=path):
        for again in (path, tmp_path / "link.jsonl"):
            with pytest.raises(ValueError, match=r"close\(\) it first, or choose another"):
                GradMonitor(opts[1], sinks=again)
        with GradMonitor(opts[1], sinks=tmp_path / "other.jsonl"):
            pass
    GradMonitor(opts[1], sinks=path).close()
    monitor = GradMonitor(opts[1], sinks=path)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    del monitor, opts
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors - 1
    GradMonitor(optimizer_of(model_of()), sinks=path).close()


HOLDING = """
import os, sys, torch, fastclip
parameter = torch.nn.Parameter(torch.zeros(50))
opt = fastclip.ClippedOptimizer(torch.optim.SGD([parameter], lr=0.1), 1.0)
monitor = fastclip.GradMonitor(opt, sinks=sys.argv[1], buffer=1)
parameter.grad = torch.ones(50)
opt.step()
if sys.argv[2] == "fork":
    if os.fork() == 0:
        opt.step()
        print(monitor.lost[sys.argv[1]], flush=True)
        sys.stdin.read()
    os._exit(0)
print("open", flush=True)
sys.stdin.read()
"""


def holding(path, how):
    """A process with a monitor on the file, or with a child that outlives it; ends when its input is closed."""
    arguments = [sys.executable, "-W", "ignore", "-c", HOLDING, str(path), how]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_one_file_has_one_process(name, tmp_path):
    path = tmp_path / name
    with holding(path, "stay") as process:
        assert process.stdout.readline() == "open\n"
        content = path.read_bytes()
        with pytest.raises(ValueError, match=r"another process writes there.*Nothing was written"):
            GradMonitor(optimizer_of(model_of()), sinks=path)
        assert path.read_bytes() == content
        process.kill()
        process.wait()
        with GradMonitor(optimizer_of(model_of()), sinks=path) as monitor:
            assert monitor.step == 1


def test_a_child_that_outlives_a_run_holds_no_file(tmp_path):
    """As the workers of a DataLoader may for a while. What it records itself would stand between its parent's lines."""
    path = tmp_path / "run.jsonl"
    with holding(path, "fork") as process:
        assert process.stdout.readline() == "1\n"  # lost
        assert process.wait() == 0
        with GradMonitor(optimizer_of(model_of()), sinks=path) as monitor:
            assert monitor.step == 1
    assert steps_of(path) == [1]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(error):
        def refuse(*_):
            raise OSError(error, os.strerror(error))

        return refuse

    path = tmp_path / "run.jsonl"
    monkeypatch.setattr(fcntl, "flock", flock(errno.ENOLCK))
    run_on(model_of(), [path], 2)
    monkeypatch.setattr(fcntl, "flock", flock(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        GradMonitor(optimizer_of(model_of()), sinks=path)
    monkeypatch.setattr(sinks, "fcntl", None)  # as on Windows
    run_on(model_of(), [path], 2)
    assert steps_of(path) == [1, 2, 3, 4]


def test_a_pattern_that_is_found_nowhere_is_told():
    opt = optimizer_of(model_of())
    with pytest.warns(
        RuntimeWarning, match=r"include: '0\.wieght' is found in no tensor's name.*the names are param_groups"
    ):
        GradMonitor(opt, include="0.wieght").close()
    GradMonitor(opt, include=r"\[0\]").close()
    with pytest.raises(TypeError, match="include: expected a regular expression, got list"):
        GradMonitor(opt, include=["0"])


def test_a_monitor_that_nobody_holds_tells_of_its_loss(tmp_path, monkeypatch):
    def trained(close):
        parameters = model_of()
        opt = optimizer_of(parameters)
        monitor = GradMonitor(opt, sinks=[tmp_path / "run.jsonl"])
        give(parameters, 0)
        opt.step()
        if close:
            monitor.close()
        del parameters, opt, monitor
        gc.collect()

    trained(close=True)
    let_go = []
    monkeypatch.setattr(atexit, "unregister", let_go.append)
    with pytest.warns(RuntimeWarning, match=r"GradMonitor that nobody had closed is gone.*close\(\)"):
        trained(close=False)
    monkeypatch.undo()
    assert len(let_go) == 1
    atexit.unregister(let_go[0])
    assert steps_of(tmp_path / "run.jsonl") == [1]


def test_the_end_of_a_program_writes_what_is_left(tmp_path):
    path = tmp_path / "run.jsonl"
    program = KILLED.replace("buffer=1", "buffer=1000").replace("while True", "for _ in range(9)")
    subprocess.run([sys.executable, "-c", program, str(path), ""], check=True, capture_output=True)
    assert steps_of(path) == list(range(1, 10))


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b'{"kind":"step","step":1}\n',
        b'{"kind":"header","format":"other","version":1}\n',
        b'{"kind":"header","format":"fastclip.monitor","version":2}\n',
        b"[1]\n",
    ],
)
def test_other_files_are_left_alone(content, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"something else.*Nothing was written"):
        GradMonitor(optimizer_of(model_of()), sinks=path)
    assert path.read_bytes() == content


def test_other_tables_are_left_alone(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        GradMonitor(optimizer_of(model_of()), sinks=path)


# --- sinks that fail


def warned_once(steps):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps()
    (warning,) = [each for each in caught if issubclass(each.category, RuntimeWarning)]
    return str(warning.message)


def test_a_full_disk_never_stops_training(tmp_path):
    path = tmp_path / "run.jsonl"
    path.symlink_to("/dev/full")
    parameters = model_of()
    opt = optimizer_of(parameters)
    monitor = GradMonitor(opt, sinks=path, buffer=2)

    def train():
        for step in range(10):
            give(parameters, step)
            opt.step()

    assert "No space left" in warned_once(train)
    assert opt.steps == 10
    assert monitor.lost == {str(path): 10}
    monitor.close()


def test_a_disk_with_room_again_tells_what_is_missing(tmp_path):
    path = tmp_path / "run.jsonl"
    parameters = model_of()
    opt = optimizer_of(parameters)
    monitor = GradMonitor(opt, sinks=path, buffer=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    count = 0

    def steps(n):
        nonlocal count
        for _ in range(n):
            give(parameters, count)
            opt.step()
            count += 1

    steps(4)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, before[1]))  # half a record fits
        assert "File too large" in warned_once(lambda: steps(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    steps(2)
    monitor.close()
    assert monitor.lost == {str(path): 6}
    assert steps_of(path) == [1, 2, 3, 4, 11, 12]
    assert [line["records"] for line in lines_of(path) if line["kind"] == "lost"] == [6]


def test_functions_that_raise_are_warned_of_once(told):
    def picky(record):
        if record.step != 3:
            raise OSError("no route to host")
        told.append(record)

    parameters = model_of()
    opt = optimizer_of(parameters)
    monitor = GradMonitor(opt, sinks=picky, on_event=lambda event: 1 / 0)

    def train():
        for step in range(5):
            give(parameters, step)
            opt.step()
        monitor.close()

    assert "no route to host" in warned_once(train)
    assert [record.step for record in told] == [3]
    assert sorted(monitor.lost.values()) == [0, 4]


def test_sinks_of_one_name_are_counted_apart():
    parameters = model_of()
    opt = optimizer_of(parameters)
    monitor = GradMonitor(opt, sinks=[lambda record: 1 / 0, lambda record: None, lambda record: None])
    names = list(monitor.lost)

    def train():
        for step in range(5):
            give(parameters, step)
            opt.step()
        monitor.close()

    assert "<lambda>: ZeroDivisionError" in warned_once(train)
    assert names == [names[0], f"{names[0]} 2", f"{names[0]} 3"]
    assert list(monitor.lost.values()) == [5, 0, 0]


def test_an_on_event_that_raises_is_counted():
    parameters = model_of()
    opt = optimizer_of(parameters)
    monitor = GradMonitor(opt, on_event=lambda event: 1 / 0)

    def train():
        give(parameters, 0, math.nan)
        opt.step()
        monitor.close()

    assert "ZeroDivisionError" in warned_once(train)
    assert monitor.lost == {"on_event": 2}


def test_a_user_who_interrupts_is_heard():
    def interrupted(record):
        raise KeyboardInterrupt

    parameters = model_of()
    opt = optimizer_of(parameters)
    GradMonitor(opt, sinks=interrupted, buffer=1)
    give(parameters, 0)
    with pytest.raises(KeyboardInterrupt):
        opt.step()


# --- other people's sinks


def test_tensorboard(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
    parameters = model_of()
    opt = optimizer_of(list(zip("abcd", parameters, strict=True)))
    with SummaryWriter(tmp_path) as writer, GradMonitor(opt, sinks=writer, census_every=2) as monitor:
        for step in range(4):
            give(parameters, step, math.nan if step == 3 else 1.0)
            opt.step()
    assert monitor.lost == {"TensorBoard": 0}
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    scalars = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert [step for step, _ in scalars["fastclip/total_norm"]] == [1, 2, 3, 4]
    assert [value for _, value in scalars["fastclip/skipped"]] == [0, 0, 0, 1]
    assert [step for step, _ in scalars["fastclip/tensor_norms/a"]] == [1, 3]
    give(parameters, 0)
    assert scalars["fastclip/total_norm"][0][1] == pytest.approx(norm_of([p.grad for p in parameters]), rel=1e-6)


def test_wandb_offline(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        import wandb

        run = wandb.init(mode="offline", project="test", dir=str(tmp_path))
    parameters = model_of()
    opt = optimizer_of(parameters)
    with GradMonitor(opt, sinks=run) as monitor:
        for step in range(3):
            run.log({"mine": step})
            give(parameters, step)
            opt.step()
    assert monitor.lost == {"wandb": 0}
    assert run.summary["fastclip/step"] == 3
    give(parameters, 2)
    assert run.summary["fastclip/total_norm"] == pytest.approx(norm_of([p.grad for p in parameters]), rel=1e-6)
    run.finish()


# --- folds, arguments, the end


def test_folds(tmp_path, told):
    path = tmp_path / "run.jsonl"
    monitor = None
    for fold in range(3):
        parameters = model_of()
        opt = optimizer_of(list(zip("abcd", parameters, strict=True)))
        if monitor is None:
            monitor = GradMonitor(opt, sinks=[path, told.append])
        monitor.reset(fold=fold, opt=opt)
        for step in range(4):
            give(parameters, step)
            opt.step()
    monitor.close()
    assert [(record.step, record.fold) for record in told] == [(i + 1, str(i // 4)) for i in range(12)]
    assert [line["fold"] for line in lines_of(path) if line["kind"] == "fold"] == ["0", "1", "2"]
    assert all(list(record.norms()) == ["a", "b", "c", "d"] for record in told)


def test_a_fold_of_another_rule_has_a_header_of_its_own(tmp_path):
    path, parameters = tmp_path / "run.jsonl", model_of()
    first = run_on(parameters, [path], 2)
    opt = optimizer_of(parameters)
    with GradMonitor(opt, sinks=path) as monitor:
        monitor.load_state_dict(first)
        for fold, (max_norm, nonfinite) in enumerate([(1.0, "skip"), (1.0, "skip"), (0.01, "skip"), (0.01, "zero")]):
            monitor.reset(fold, opt=optimizer_of(parameters, max_norm, nonfinite=nonfinite))
            give(parameters, fold)
            monitor._guarded.step()
    headers = [line for line in lines_of(path) if line["kind"] == "header"]
    assert [(header["policy"][:24], header["nonfinite"]) for header in headers] == [
        ("GlobalNorm(max_norm=1, n", "skip"),
        ("GlobalNorm(max_norm=1, n", "skip"),
        ("GlobalNorm(max_norm=0.01", "skip"),
        ("GlobalNorm(max_norm=0.01", "zero"),
    ]
    assert [header.get("resumed_at") for header in headers] == [None, 2, None, None]
    kinds = [line["kind"] for line in lines_of(path)]
    assert kinds == [
        *("header", "tensors", "step", "step"),
        *("header", "tensors", "fold", "step", "tensors", "fold", "step"),
        *("header", "tensors", "fold", "step") * 2,
    ]


def test_a_new_fold_forgets_the_past():
    events = []
    for forget in (False, True):
        parameters = model_of()
        opt = optimizer_of(parameters)
        found = []
        with GradMonitor(opt, on_event=found.append) as monitor:
            for step in range(64):
                give(parameters, step)
                opt.step()
            if forget:
                monitor.reset(fold="next")
            give(parameters, 0, 1e5)
            opt.step()
        events.append([event.kind for event in found])
    assert events == [["exploding"], []]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"sinks": "run.txt"}, ValueError),
        ({"sinks": 3}, TypeError),
        ({"sinks": "no/such/folder/run.jsonl"}, OSError),
        ({"every": 0}, ValueError),
        ({"buffer": 0}, ValueError),
        ({"census_every": 0}, ValueError),
        ({"on_event": 3}, TypeError),
        ({"flags": {"sigmas": 3}}, TypeError),
        ({"include": "("}, ValueError),
        ({"names": ["weight"]}, TypeError),
    ],
)
def test_bad_arguments(settings, error):
    opt = optimizer_of(model_of())
    with pytest.raises(error):
        GradMonitor(opt, **settings)
    assert opt._record.listeners == []


def test_an_unguarded_optimizer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"ClippedOptimizer.*got AdamW"):
        GradMonitor(torch.optim.AdamW(model_of()), sinks=tmp_path / "run.jsonl")


def test_one_that_closes_itself_costs_another_no_step():
    parameters = model_of()
    opt, seen = optimizer_of(parameters), []
    first = GradMonitor(opt, buffer=1, sinks=lambda record: first.close())
    GradMonitor(opt, buffer=1, sinks=lambda record: seen.append(record.step))
    for i in range(3):
        give(parameters, i)
        opt.step()
    assert seen == [1, 2, 3]


def test_closing_twice_and_stepping_afterwards(told):
    parameters = model_of()
    opt = optimizer_of(parameters)
    monitor = GradMonitor(opt, sinks=told.append)
    for _ in range(2):
        monitor.close()
    give(parameters, 0)
    opt.step()
    assert (told, opt._record.listeners) == ([], [])


def test_a_forked_child_writes_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    program = (
        KILLED.replace("buffer=1", "buffer=1000").replace("while True", "for _ in range(3)")
        + "\nif os.fork() == 0:\n    sys.exit(0)\nos.wait()\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", program, str(path), ""], check=True, capture_output=True, env=environment)
    assert steps_of(path) == [1, 2, 3]


def test_every_field_of_a_record_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "monitor.md").read_text()
    for name in (*records.SCALARS, "events", "columns", "tensor_norms", "resumed_at", "header", "tensors", "lost"):
        assert f"`{name}`" in page, name


def test_a_shipment_leaves_from_the_accelerator(monkeypatch):
    """Also where a value of the host comes first: copied here without waiting, the others would be read too early. And
    its event is of the stream of that device, which need not be the current one."""
    far, recorded = torch.device("meta"), []

    class Event:
        def __init__(self, device):
            self.device = device

        def record(self, stream=None):
            recorded.append((self.device, stream))

    class Pinned:
        def __init__(self, values):
            self.values = values

        def copy_(self, values, non_blocking):
            assert non_blocking
            assert self.values is values
            return self

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch, "empty_like", lambda values, **where: Pinned(values))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"stream of {device}")
    leaves = [torch.ones(()), None, torch.ones(3, device=far), 2.0, torch.ones(2, device=far, dtype=torch.float64)]
    sent = shipping.Shipment([SimpleNamespace(leaves=leaves)])
    assert (sent._sent._copy.values.device, len(sent._sent._copy.values)) == (far, 6)
    assert recorded == [(far, "stream of meta")]
