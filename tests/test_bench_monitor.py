"""The measuring of the monitor measures what it says; its numbers are no test's business."""

import math

import pytest
from fastclip.bench import monitor, monitored

from fastclip.report.digest import digest_of


def test_the_run_of_the_picture_is_recorded(tmp_path):
    run = tmp_path / "run.jsonl"
    assert monitored.main([str(run), "--steps", "5"]) == 0
    digest = digest_of(run)
    assert (digest.records, digest.reader.problems()) == (5, [])
    assert len(digest.reader.names) == 4 + 12 * monitored.LAYERS
    assert "h.0.qkv.weight" in digest.reader.names


def test_the_same_run_again(tmp_path):
    norms = []
    for name in ("a", "b"):
        monitored.train(tmp_path / f"{name}.jsonl", 3)
        norms.append(digest_of(tmp_path / f"{name}.jsonl").bins.heat[:3])
    assert (norms[0] == norms[1]).all()


def test_a_run_that_never_was_has_its_spikes(tmp_path):
    path = tmp_path / "run.jsonl"
    monitor.write_run(path, 10_000, 3)
    digest = digest_of(path)
    assert (digest.records, digest.reader.problems()) == (10_000, [])
    assert [tensor.largest_at for tensor in digest.tensors()][9973 % 3] == 9973


def test_every_part_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monitor, "ROUNDS", 2)
    monkeypatch.setattr(monitor, "STEPS", 4)
    monkeypatch.setattr(monitor.importlib.util, "find_spec", lambda name: None)  # other people's aren't measured here
    monkeypatch.setattr(monitor.workloads, "GPT2", monitor.workloads.LSTM)
    short = monitor.report
    monkeypatch.setattr(monitor, "report", lambda folder, steps, tensors: short(folder, 50, tensors))
    assert monitor.main(["host", "step", "report", "long", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {
        line[:57].split(maxsplit=1)[1].strip(): float(line[57:]) for line in lines[1:] if "other processes" not in line
    }
    assert all(math.isfinite(value) for value in told.values())
    assert told["wrapper's step"] > 0
    assert told["page, MB"] > 0


def test_unknown_parts_are_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        monitor.main(["hots"])
    assert "unknown: hots" in capsys.readouterr().err
