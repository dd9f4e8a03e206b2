"""The weather example shows what it says: bare SGD dies, the wrapped one learns, and nothing else differs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from fastclip.examples import weather
from fastclip.examples.weather import Results, Settings

for extra in ("vega_datasets", "pandas", "matplotlib", "tqdm"):
    pytest.importorskip(extra, reason="needs torch-fastclip[examples]")


@pytest.fixture(scope="module")
def results() -> Results:
    return weather.run(Settings.quick(), progress=False)


def test_bare_diverges(results: Results) -> None:
    error = results.bare.score
    assert not math.isfinite(error) or error > 2 * results.persistence_error


def test_wrapped_beats_persistence(results: Results) -> None:
    wrapped = results.wrapped
    assert all(map(math.isfinite, wrapped.losses))
    assert wrapped.score < results.persistence_error
    assert wrapped.clip_rate is not None
    assert 0 < wrapped.clip_rate < 1
    assert (wrapped.skipped, wrapped.died_at) == (0, None)


def test_both_runs_start_alike(results: Results) -> None:
    assert results.bare.losses[0] == results.wrapped.losses[0]
    assert results.bare.total_norms[0] == results.wrapped.total_norms[0]


def test_one_entry_per_step(results: Results) -> None:
    bare, wrapped = results.bare, results.wrapped
    data, settings = weather.load_weather(), results.settings
    batches = math.ceil((data.train_days - settings.window) / settings.batch_size)
    assert len(wrapped.losses) == len(wrapped.total_norms) == settings.epochs * batches
    assert len(bare.losses) == len(bare.total_norms) == bare.died_at


def test_same_settings_same_losses(results: Results) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = weather.run(Settings.quick(), progress=False)
    assert list(map(repr, again.bare.losses)) == list(map(repr, results.bare.losses))  # repr: NaN equals itself
    assert again.wrapped.losses == results.wrapped.losses
    assert again.wrapped.total_norms == results.wrapped.total_norms
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_targets_are_the_day_after() -> None:
    days = torch.arange(10.0).unsqueeze(1).expand(10, len(weather.FEATURES))
    inputs, targets = weather.windows(days, window=3)
    assert inputs.shape == (7, 3, len(weather.FEATURES))
    assert torch.equal(targets, inputs[:, :, weather.TARGET] + 1)


def test_validation_days_do_not_leak_into_training() -> None:
    data = weather.load_weather()
    later = data.values.clone()
    later[data.train_days :] += 100.0
    task = weather.prepare(data, window=30)
    changed = weather.prepare(weather.Weather(later, data.train_days), window=30)
    assert torch.equal(task.train_inputs, changed.train_inputs)
    assert torch.equal(task.train_targets, changed.train_targets)
    assert len(task.validation_targets) == len(data.values) - data.train_days


def test_persistence_is_today(results: Results) -> None:
    data = weather.load_weather()
    temperature = data.values[data.train_days - 1 :, weather.TARGET]
    assert results.persistence_error == pytest.approx(float(temperature.diff().abs().mean()), rel=1e-5)


def test_timing_is_of_the_whole_model(results: Results) -> None:
    model = weather.make_model(results.settings)
    timing = results.timing
    assert timing.torch_us > 0
    assert timing.fastclip_us > 0
    assert timing.tensors == len(list(model.parameters()))
    assert timing.elements == sum(p.numel() for p in model.parameters())


def test_main_prints_the_table_and_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    assert weather.main(["--quick", "--epochs", "1", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    for row in ("bare", "wrapped", "persistence", "Clipping per step"):
        assert sum(line.startswith(row) for line in lines) == 1


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert weather.main(["--quick"]) == 1
    message = capsys.readouterr().err
    assert "tqdm" in message
    assert "pip install 'torch-fastclip[examples]'" in message


@pytest.mark.parametrize(
    "argv", [["--epochs", "0"], ["--output", "no/such/folder/demo.png"], ["--seed", "-1"], ["--seed", str(2**32)]]
)
def test_bad_arguments_are_refused_before_training(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        weather.main(argv)
