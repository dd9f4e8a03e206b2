"""The grid search shows what it says: a bound widens the stable region, and no fold leaks into another."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastclip import __main__ as command
from fastclip.examples import grid_search
from fastclip.examples.grid_search import LR, MAX_NORM, Results, Settings

SETTINGS = replace(Settings.quick(), lrs=(0.3, 3.0), max_norms=(0.1, math.inf))


@pytest.fixture(scope="module")
def results() -> Results:
    return grid_search.run(SETTINGS)


def test_a_bound_keeps_a_large_learning_rate_stable(results: Results) -> None:
    assert results.stable.tolist() == [[True, True], [True, False]]
    assert results.accuracy[1, 0] > 0.6
    assert results.accuracy[1, 1] < 0.3
    assert results.best == (3.0, 0.1)


def test_same_settings_same_results(results: Results) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = grid_search.run(SETTINGS)
    for name in ("accuracy", "worst", "spike_rate", "skipped"):
        assert torch.equal(getattr(again, name), getattr(results, name))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_the_worst_fold_is_not_above_the_mean(results: Results) -> None:
    assert (results.worst <= results.accuracy).all()
    assert (results.worst < results.accuracy).any()


def test_pixels_are_scaled_by_the_training_part_alone() -> None:
    """A fold that is judged on brighter digits than it was trained on sees values above 1."""
    from sklearn.base import clone

    pipeline = clone(grid_search.make_search(SETTINGS).estimator).set_params(**{LR: 0.1, MAX_NORM: 1.0})
    pixels, digits = grid_search.load_digits(SETTINGS)
    pipeline.fit(pixels[:200], digits[:200])
    assert pipeline[0].transform(pixels[:200]).max() <= 1.0 + 1e-6
    assert pipeline[0].transform(pixels[200:] * 2).max() > 1.5


def test_an_exploded_training_is_a_result() -> None:
    """Weights that went to infinity: every later step is skipped, and counted."""
    found = grid_search.run(replace(SETTINGS, lrs=(1e38,), max_norms=(math.inf,), epochs=20))
    assert found.skipped[0, 0] > 90  # of 100
    assert found.spike_rate[0, 0] > 0.5
    assert found.reason(0, 0).endswith("skipped")
    assert not found.stable.any()


def test_reasons() -> None:
    grid = torch.zeros(1, 3, dtype=torch.float64)
    found = Results(
        replace(SETTINGS, lrs=(1.0,), max_norms=(1.0, 2.0, 3.0)),
        accuracy=grid + 0.5,
        worst=torch.tensor([[0.5, 0.1, 0.5]]),
        spike_rate=torch.tensor([[0.02, 0.0, 0.03]]),
        skipped=grid,
        best=(1.0, 1.0),
    )
    assert [found.reason(0, j) for j in range(3)] == ["", "not learned", "3% spikes"]
    assert found.stable.tolist() == [[True, False, False]]


def test_the_command_prints_the_table_and_writes_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    monkeypatch.setattr(grid_search, "run", lambda settings, jobs: results)
    picture = tmp_path / "grid.png"
    assert command.main(["grid-search", "--quick", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["lr", "\\", "max_norm", "0.1", "inf"]
    assert lines[3].split()[0] == "3"
    assert lines[3].endswith("!")
    assert "Best: lr 3 with max_norm 0.1. Of 2 learning rates" in lines
    assert "2 are stable with max_norm 0.1 and 1 are stable with max_norm inf." in lines


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "skorch", None)
    assert grid_search.main(["--quick"]) == 1
    message = capsys.readouterr().err
    assert "skorch" in message
    assert "pip install 'torch-fastclip[examples,integrations]'" in message


@pytest.mark.parametrize("argv", [["--jobs", "0"], ["--output", "no/such/folder/grid.png"], ["--seed", "-1"]])
def test_bad_arguments_are_refused_before_the_search(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        grid_search.main(argv)
