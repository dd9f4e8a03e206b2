"""Flags: each has a formula; here it is worked out for single tensors, by hand."""

import itertools
import math

import numpy as np
import pytest

from fastclip.monitoring.flags import BLOCK, Census, FlagRules, Flags

NAMES = ("h.0.weight", "h.0.bias", "h.1.weight", "h.1.bias", "h.2.weight", "h.2.bias")
SIZES, DIMS = (64, 8, 64, 8, 64, 8), (2, 1, 2, 1, 2, 1)


def flags_of(rules=None, names=NAMES, sizes=SIZES, dims=DIMS):
    flags = Flags(rules or FlagRules())
    flags.know(names, sizes, dims)
    return flags


def usual(count, sizes=SIZES, noise=0.05):
    """Norms of tensors whose elements are alike in size."""
    generator = np.random.default_rng(0)
    return np.sqrt(np.array(sizes, dtype=float)) * np.exp(noise * generator.standard_normal((count, len(sizes))))


def look(flags, norms, bad=None, censuses=None, first=1):
    return flags.look(list(range(first, first + len(norms))), norms, bad or {}, censuses or {})


def told(events):
    return [(event.step, event.kind, event.tensors) for of_step in events for event in of_step]


def test_a_quiet_run_is_not_flagged():
    assert told(look(flags_of(), usual(2000))) == []


@pytest.mark.parametrize(("factor", "flagged"), [(1.7, False), (1.95, True), (1e30, True)])
def test_exploding_by_its_own_history(factor, flagged):
    """The deviation is 0.05, below the floor of 0.1: the bound is exp(6 * 0.1) = 1.82 times the usual."""
    norms = usual(200)
    norms[150] = np.sqrt(SIZES)
    norms[150, 2] *= factor
    assert told(look(flags_of(), norms)) == ([(151, "exploding", ("h.1.weight",))] if flagged else [])


def test_the_reason_tells_the_gravest():
    norms = usual(100, noise=0.0)
    norms[90, [1, 4]] *= [10.0, 100.0]
    ((event,),) = [events for events in look(flags_of(), norms) if events]
    assert event.tensors == ("h.2.weight", "h.0.bias")
    assert event.reason == "norm 800, 46.1 deviations above its usual 8"  # log(100) / 0.1


def test_mean_and_deviation_are_those_of_the_logarithms():
    """Before alpha matters: against numpy, over whole blocks."""
    norms = usual(8 * BLOCK, noise=0.3)
    flags = flags_of(FlagRules(alpha=0.9999))
    look(flags, norms)
    logs = np.log(norms)
    assert flags.history["mean"] == pytest.approx(logs.mean(axis=0), rel=1e-9)
    assert np.sqrt(flags.history["var"]) == pytest.approx(logs.std(axis=0), rel=1e-9)


def test_old_records_are_forgotten():
    norms = np.concatenate([usual(320), 100 * usual(320)])
    flags = flags_of(FlagRules(sigmas=1e6))
    look(flags, norms)
    assert flags.history["mean"] == pytest.approx(np.log(100 * np.sqrt(SIZES)), abs=0.1)


def test_a_spike_does_not_hide_the_next():
    norms = usual(300)
    norms[[200, 201, 230], 0] *= 1e6
    assert [step for step, *_ in told(look(flags_of(), norms))] == [201, 202, 231]


def test_how_many_records_come_at_once_makes_no_difference():
    norms = usual(300)
    norms[[100, 133, 210], [0, 3, 5]] *= 1e3
    norms[250:, 1] *= 1e-6
    norms[150:220, 4] = 0.0
    whole, pieces = flags_of(), flags_of()
    expected = told(look(whole, norms))
    cuts = [0, 1, 2, 40, 41, 104, 240, 300]
    found = [each for a, z in itertools.pairwise(cuts) for each in told(look(pieces, norms[a:z], first=a + 1))]
    assert found == expected
    assert [kind for _, kind, _ in expected] == ["exploding"] * 2 + ["dead", "exploding", "vanishing"]
    for name in whole.history.START:
        assert np.array_equal(whole.history[name], pieces.history[name], equal_nan=True), name


def test_nothing_is_flagged_while_it_warms_up():
    norms = usual(31)
    norms[30, 0] *= 1e9
    norms[30, 2] *= 1e-9
    assert told(look(flags_of(), norms)) == []


def test_vanishing_by_its_own_past_is_told_once_and_again_after_it_was_back():
    norms = usual(400)
    norms[100:150, 3] *= 5e-4
    norms[150:200, 3] *= 5e-3  # not back before it is ten times what made it vanish
    norms[300:310, 3] *= 5e-4
    found = [(step, which) for step, kind, which in told(look(flags_of(), norms)) if kind == "vanishing"]
    assert found == [(101, ("h.1.bias",)), (301, ("h.1.bias",))]


def test_a_slow_fall_is_seen():
    """The running mean falls with the norm; its highest value doesn't."""
    norms = usual(4000, names := SIZES[:1])
    norms *= np.exp(-np.arange(4000) / 500)[:, None]
    (event,) = told(look(flags_of(names=("w",), sizes=names, dims=(2,)), norms))
    assert event[1:] == ("vanishing", ("w",))
    assert 3300 < event[0] < 3600  # 500 * log(1000) = 3454


def test_vanishing_beside_its_neighbours():
    """All layers fall together but one, which was never large: its own past says nothing."""
    norms = usual(100)
    norms[:, 2] *= 5e-4
    events = told(look(flags_of(), norms))
    assert events == [(33, "vanishing", ("h.1.weight",))]
    norms[:, 0] *= 5e-4  # neither it nor the other stands out beside this one
    assert ("h.0.weight",) not in [which for *_, which in told(look(flags_of(), norms))]


def test_neighbours_are_of_the_same_kind():
    """A bias of a hundredth of the weights' elements is nothing remarkable beside other such biases."""
    norms = usual(100)
    norms[:, [1, 3, 5]] *= 1e-4
    assert told(look(flags_of(), norms)) == []


def census_of(nonzero, subnormal=0.0):
    return Census(np.full(6, 1.0) * nonzero, np.full(6, 1.0) * subnormal)


def test_elements_that_become_zero():
    """99% zeros are usual for an embedding; ten times fewer of what is left are not."""
    share = np.array([1.0, 1.0, 0.01, 1.0, 1.0, 1.0])
    fallen = np.array([1.0, 1.0, 0.01, 1.0, 0.05, 1.0])
    censuses = {i: census_of(share) for i in range(0, 100, 10)} | {i: census_of(fallen) for i in (50, 60)}
    assert told(look(flags_of(), usual(100), censuses=censuses)) == [(51, "vanishing", ("h.2.weight",))]


def test_subnormal_elements():
    own = np.zeros(6)
    own[5] = 0.11
    events = look(flags_of(), usual(3), censuses={0: census_of(1.0, own), 1: census_of(1.0, own), 2: census_of(1.0)})
    assert told(events) == [(1, "vanishing", ("h.2.bias",))]
    assert events[0][0].reason == "11.0% of its elements are subnormal"


def test_dead_is_told_once():
    norms = usual(300)
    norms[100:, 2] = 0.0
    norms[150:180, 4] = 0.0  # too short
    assert told(look(flags_of(), norms)) == [(150, "dead", ("h.1.weight",))]


def test_no_gradient_is_not_a_zero_one():
    norms = usual(300)
    norms[100:, 2] = -1.0
    flags = flags_of()
    assert told(look(flags, norms)) == []
    assert flags.history["count"].max() > 2 * flags.history["count"][2]


def test_not_finite_is_told_each_time_and_not_learned():
    norms, clean = usual(200), flags_of()
    look(clean, norms)
    norms[[50, 120], 1] = [math.nan, math.inf]
    bad = {i: np.arange(6) == 1 for i in (50, 120)}
    flags = flags_of()
    assert told(look(flags, norms, bad)) == [(i, "non-finite", ("h.0.bias",)) for i in (51, 121)]
    assert np.isfinite(flags.history["mean"]).all()
    assert flags.history["mean"][1] == pytest.approx(clean.history["mean"][1], abs=0.02)


def test_a_norm_past_float64_squares():
    norms = usual(100)
    norms[60:, 0] = 1e300
    norms[60:, 1] = 1e-300
    flags = flags_of()
    look(flags, norms)
    assert all(np.isfinite(flags.history[name]).all() for name in ("mean", "var"))


@pytest.mark.parametrize(
    "rules", [{"sigmas": 0.0}, {"alpha": 1.0}, {"fraction": -1.0}, {"warmup": 0}, {"dead_after": 0.5}]
)
def test_bad_rules(rules):
    with pytest.raises(ValueError, match=next(iter(rules))):
        FlagRules(**rules)
