"""The table of frameworks: both ways take turns, end alike, and every step of them is measured."""

import json
import math
import subprocess
import sys
from pathlib import Path

import offline
import pytest
import torch
from fastclip.bench import frameworks
from fastclip.bench.frameworks import Clock, Framework, Settings, Trained

import fastclip


def test_the_command_measures_them_all(tmp_path):
    """In one process, as for the notes; a status of 0 means that both ways of each ended with the same parameters."""
    offline.font_for_ultralytics()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fastclip.bench.frameworks", "--quick", "--json", "rows.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=offline.inherited() | {"PYTHONPATH": str(Path(fastclip.__file__).parents[1])},
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    expected = [(name, case) for name, each in frameworks.FRAMEWORKS.items() for case in each.bounds]
    assert [(row["framework"], row["case"]) for row in rows] == expected
    for row in rows:
        assert row["before_s"] > 0
        assert row["after_s"] > 0
        assert row["ratio"] == pytest.approx(row["before_s"] / row["after_s"])
        assert len(row["seconds"]["before"]) == len(row["seconds"]["after"]) == 3
        assert f"| {row['framework']}: " in result.stdout


@pytest.fixture
def fake(monkeypatch):
    """A framework that says how long it took: 3 s a step of its own, 2 s with fastclip."""
    calls = []

    def use(difference=0.0, missing=0):
        def train(ours, bound, steps):
            calls.append(ours)
            return Trained([2.0 if ours else 3.0] * (steps - missing), [torch.zeros(3) + difference * ours])

        monkeypatch.setitem(frameworks.FRAMEWORKS, "fake", Framework(train, "`a` / `b`", {"clipping": 1.0}))
        return calls

    return use


def test_the_ways_take_turns_and_the_warm_up_is_left_out(fake):
    calls = fake()
    row = frameworks.measure("fake", "clipping", Settings(rounds=3, steps=10))
    assert calls == [False, True, True, False, False, True]
    assert (row["before_s"], row["after_s"], row["ratio"]) == (3.0, 2.0, 1.5)
    assert len(row["seconds"]["before"]) == 3 * (10 - frameworks.WARM_UP)
    assert "| fake: `a` / `b` | clipping | 1 tensors, 0.0M | 3000000 us | 2000000 us |" in frameworks.table([row])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"difference": 1e-3}, "parameters differ"),
        ({"difference": math.nan}, "parameters differ"),
        ({"missing": 1}, "5 clipped"),
    ],
)
def test_a_wrong_result_has_no_times(fake, wrong, message, capsys):
    fake(**wrong)
    assert frameworks.main(["--quick", "--only", "fake"]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "fake" not in said.out


def test_the_clock_leaves_nothing_behind():
    class Base:
        def inherited(self):
            return 1

    class Derived(Base):
        def own(self):
            return 2

    before = dict(vars(Derived))
    with Clock().on(Derived, "inherited", "own") as clock:
        assert (Derived().inherited(), Derived().own()) == (1, 2)
    assert len(clock.seconds) == 2
    assert dict(vars(Derived)) == before


def test_a_framework_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        frameworks.main(["--only", "nosuch"])
    assert "no framework's name contains 'nosuch'; they are: " in capsys.readouterr().err
