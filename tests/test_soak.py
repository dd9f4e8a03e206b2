"""The soak says what holds, and says so when it doesn't."""

import importlib
import importlib.util
import json

import pytest
import torch

from fastclip import policies

# the installed fastclip.bench, or the source tree's bench/
soak = importlib.import_module("fastclip.bench.soak" if importlib.util.find_spec("fastclip.bench") else "bench.soak")

STEPS, RATE = 130, 0.2
SKIPS_BY_ITSELF = ("SkipLarge", "SkipAboveMedian")


@pytest.mark.parametrize("name", soak.POLICIES)
def test_each_policy_gets_through(name):
    result = soak.run_soak(name, STEPS, seed=1, rate=RATE)
    assert result.passed, soak.table([result])
    assert set(result.faults) == set(soak.FAULTS)
    must = sum(result.faults[fault] for fault in soak.MUST_SKIP)
    if name in SKIPS_BY_ITSELF:
        assert must < result.skipped <= must + result.faults["spike"] + 3
    else:
        assert result.skipped == must
    assert (result.clip_rate > 0) == (name not in SKIPS_BY_ITSELF)
    assert result.final_loss < 1.0  # the mean of the standardised target would be about 1


def test_the_same_seed_gives_the_same_run():
    first, again, other = (soak.run_soak("GlobalNorm", 120, seed=seed, rate=RATE) for seed in (3, 3, 4))
    assert first == again
    assert first.final_loss != other.final_loss


def test_the_faults_meet_what_they_should():
    plan = soak.Plan(200, 0, RATE, 6)
    assert min(plan.faults) >= soak.CLEAN_STEPS
    assert plan.faults[97] == "nan"
    assert len(soak.Plan(4000, 0, RATE, 6).faults) == pytest.approx(4000 * RATE, rel=0.2)
    for fault, bad in (("nan", torch.isnan), ("inf", torch.isinf), ("spike", lambda g: g == soak.SPIKE)):
        grads = [torch.ones(3), torch.ones(2)]
        soak._inject(fault, grads, 1)
        assert bad(grads[1]).any()
        assert torch.equal(grads[0], torch.ones(3))
    soak._inject("zero", grads, 1)
    assert not any(grad.any() for grad in grads)


class Forgetful(policies.ZScore):
    """Its state doesn't travel."""

    def state_dict(self):
        return {}


class Reckless(policies.GlobalNorm):
    """Multiplies by what makes Inf where it should clip."""

    def decide(self, reading):
        return policies.Decision(1e300)


def test_a_policy_that_forgets_is_found_out(monkeypatch):
    monkeypatch.setitem(soak.POLICIES, "forgetful", Forgetful)
    result = soak.run_soak("forgetful", STEPS, rate=RATE)
    assert (result.finite, result.resumed, result.passed) == (True, False, False)


def test_parameters_that_are_not_finite_are_found_out(monkeypatch):
    monkeypatch.setitem(soak.POLICIES, "reckless", Reckless)
    result = soak.run_soak("reckless", 100, rate=RATE)
    assert (result.finite, result.passed) == (False, False)


@pytest.mark.parametrize("lost", ["nan", "inf", "loss"])
def test_a_fault_that_is_not_logged_is_found_out(monkeypatch, lost):
    inject, kept = soak._inject, [fault for fault in soak.FAULTS if fault != lost]
    if lost == "loss":
        monkeypatch.setattr(soak.fastclip.ClippedOptimizer, "observe", lambda self, loss: None)
    else:
        monkeypatch.setattr(soak, "_inject", lambda fault, *rest: inject(fault, *rest) if fault in kept else None)
    result = soak.run_soak("GlobalNorm", STEPS, rate=RATE)
    assert not result.passed
    assert {what.split()[0] for what in result.unlogged} == {lost}
    count, resumed = result.faults[lost], [what for what in result.unlogged if what.endswith("(resumed)")]
    assert len(result.unlogged) - len(resumed) == count
    assert 0 < len(resumed) <= count
    assert f"not in GlobalNorm's event log: {result.unlogged[0]}" in soak.table([result])


def test_the_command_writes_a_table_and_a_record(tmp_path, capsys):
    file = tmp_path / "soak.json"
    assert soak.main(["--steps", "60", "--only", "Norm", "--jobs", "1", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    for head in ("policy", "steps", "faults", "skipped", "clip rate", "final loss", "finite", "resumed bit for bit"):
        assert head in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == ["GlobalNorm", "PerTensorNorm", "Chain(ZScore, GlobalNorm)"]
    assert "3/3" in err
    written = json.loads(file.read_text())
    assert {"date", "versions", "machine", "soaks"} == written.keys()
    assert written["versions"]["torch"] == torch.__version__
    assert [made["passed"] for made in written["soaks"]] == [True] * 3


def test_the_command_fails_when_something_does_not_hold(monkeypatch, capsys):
    monkeypatch.setitem(soak.POLICIES, "reckless", Reckless)
    assert soak.main(["--steps", "10", "--only", "reckless", "--jobs", "1"]) == 1
    assert " NO" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--only", "nothing"], ["--steps", "1"], ["--jobs", "0"]])
def test_bad_arguments(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        soak.main(args)
    assert stopped.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_threads_are_as_before():
    torch.set_num_threads(2)
    soak.run_soak("GlobalNorm", 2)
    assert torch.get_num_threads() == 2
