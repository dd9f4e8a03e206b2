"""LSTM forecasts of tomorrow's weather and of next month's share prices, with folds in time and an honest rival.

Seattle's temperature has a pattern to learn; share prices, as far as anyone can tell from a hundred months, have none
beyond "as last month". So each score is a ratio: the mean absolute error over that of persistence, which forecasts
what was there last. Below 1 the network knows something; at 1 and above it does not, however well its curve seems to
follow the true one.

``TimeSeriesSplit`` makes the folds: each trains on all that came before its test part, and scales by that training part
alone. A fold begins with a new network; ``GradMonitor.reset(fold=...)`` keeps apart what is told of their gradients.

The learning rates 0.01, 0.03, 0.1, 0.3, 0.6 and 1.2 were tried. Bare SGD is best at 0.6 on the weather and at 0.01 on
the stocks: these are the honest rivals. On the weather it explodes at 1.2, where clipped SGD is as good as at 0.6.

Run it with ``fastclip example forecast``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastclip
from fastclip.examples import study
from fastclip.examples.extras import extra
from fastclip.examples.study import Run, Study, verdict
from fastclip.report.digest import Fold, digest_of

NEEDS = ("vega_datasets", "pandas", "sklearn")
FEATURES = ("temp_max", "temp_min", "precipitation", "wind")
BARE, CLIPPED, RIVAL = "bare", "clipped", "bare, smaller lr"
SYMBOLS = ("AAPL", "AMZN", "IBM", "MSFT")  # those with a price for each of the 123 months


@dataclass(frozen=True)
class Settings:
    """What all runs share.

    Args:
        lr: of the bare and of the clipped runs.
        weather_lr, stocks_lr: smaller ones, of the rivals.
        steps: per fold.
        days, months: that the network looks back.
    """

    seeds: int = 3
    folds: int = 3
    steps: int = 150
    lr: float = 1.2
    weather_lr: float = 0.6
    stocks_lr: float = 0.01
    momentum: float = 0.9
    max_norm: float = 1.0
    hidden: int = 32
    batch_size: int = 32
    days: int = 30
    months: int = 12

    @classmethod
    def quick(cls) -> Settings:
        """The same, cut short."""
        return cls(seeds=2, folds=2, steps=30)


@dataclass(frozen=True)
class Series:
    """Values ``[times, features]``, the first ``targets`` of which are forecast from ``window`` times.

    ``rival_lr`` is a learning rate at which the bare optimizer is at its best. Persistence says that the values stay as
    they are; where they are changes, that there is none.
    """

    values: Tensor
    targets: int
    window: int
    rival_lr: float
    changes: bool = False


@dataclass(frozen=True)
class Task:
    """One fold, standardised by its training part: inputs ``[n, window, features]``, targets ``[n, window, targets]``.

    Of the test's windows only the last target counts: all others have been seen. ``persistence`` is the forecast to
    compare with, and ``units`` what one standardised unit of each target is in its own.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    persistence: Tensor
    units: Tensor


class Forecaster(nn.Module):
    """Reads times, and after each of them forecasts the next."""

    def __init__(self, features: int, hidden: int, targets: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, targets)

    def forward(self, values: Tensor) -> Tensor:
        states, _ = self.lstm(values)
        forecast: Tensor = self.head(states)
        return forecast


def load_series(settings: Settings) -> dict[str, Series]:
    """Seattle's weather, day by day, and the change of the logarithm of four share prices, month by month."""
    data = extra("vega_datasets").data
    days = data.seattle_weather().sort_values("date")[list(FEATURES)].to_numpy()
    prices = data.stocks().pivot(index="date", columns="symbol", values="price").sort_index()[list(SYMBOLS)].to_numpy()
    return {
        "weather": Series(torch.tensor(days, dtype=torch.float32), 1, settings.days, settings.weather_lr),
        "stocks": Series(
            torch.tensor(prices).log().diff(dim=0).float(),
            len(SYMBOLS),
            settings.months,
            settings.stocks_lr,
            changes=True,
        ),
    }


def folds(series: Series, count: int) -> Iterator[Task]:
    """Each fold's test part lies after its training part; a test window may begin before its test part."""
    values, window, wanted = series.values, series.window, slice(series.targets)
    for trained, tested in extra("sklearn.model_selection").TimeSeriesSplit(count).split(values):
        mean, std = values[trained].mean(0), values[trained].std(0)
        scaled = (values[: tested[-1] + 1] - mean) / std
        inputs = scaled[:-1].unfold(0, window, 1).transpose(1, 2)
        targets = scaled[1:, wanted].unfold(0, window, 1).transpose(1, 2)
        # Window i ends at time i + window - 1, so its last target is that of time i + window.
        split = len(trained) - window
        persistence = (0.0 - mean / std)[wanted] if series.changes else inputs[split:, -1, wanted]
        yield Task(inputs[:split], targets[:split], inputs[split:], targets[split:], persistence, std[wanted])


def error(forecast: Tensor, task: Task) -> float:
    """Mean absolute error of the test's last forecasts, in the series' own units."""
    return float(((forecast - task.test_targets[:, -1]).abs() * task.units).mean())


def train_fold(task: Task, model: Forecaster, optimizer: torch.optim.Optimizer, seed: int, settings: Settings) -> Run:
    """One fold's training; its score is the ratio to persistence."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    shuffle = torch.Generator().manual_seed(seed)

    def next_loss() -> Tensor:
        batch = torch.randint(len(task.train_inputs), (settings.batch_size,), generator=shuffle)
        return nn.functional.mse_loss(model(task.train_inputs[batch]), task.train_targets[batch])

    def ratio() -> float:
        return error(model(task.test_inputs)[:, -1], task) / error(task.persistence, task)

    return study.train(optimizer, next_loss, settings.steps, ratio, schedule)


def train_one(
    variant: str, seed: int, settings: Settings, all_series: Mapping[str, Series], record: Path | None
) -> Run:
    """All folds one after the other, each with a new network, until one dies.

    Args:
        record: a file that gets the gradients' records of all folds; of a clipped run.
    """
    name, _, kind = variant.partition(": ")
    series = all_series[name]
    runs: list[Run] = []
    monitor: fastclip.GradMonitor | None = None
    for i, task in enumerate(folds(series, settings.folds), 1):
        model = Forecaster(series.values.shape[1], settings.hidden, series.targets)
        lr = series.rival_lr if kind == RIVAL else settings.lr
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=settings.momentum)
        if kind == CLIPPED:
            optimizer = fastclip.ClippedOptimizer(optimizer, max_norm=settings.max_norm)
            if record is not None:
                monitor = monitor or fastclip.GradMonitor(optimizer, sinks=record, names=model)
                monitor.reset(fold=f"{name}, fold {i}", opt=optimizer, names=model)
        runs.append(train_fold(task, model, optimizer, seed, settings))
        if runs[-1].died_at is not None:
            break
    if monitor is not None:
        monitor.close()
    rates = [run.clip_rate for run in runs if run.clip_rate is not None]
    return Run(
        [loss for run in runs for loss in run.losses],
        [norm for run in runs for norm in run.total_norms],
        score=statistics.mean(run.score for run in runs),
        skipped=sum(run.skipped for run in runs),
        clip_rate=statistics.mean(rates) if rates else None,
    )


def fold_table(found: Mapping[str, Fold]) -> str:
    """How stable each fold of the clipped runs of the first seed was."""
    rows = [("clipped, first seed", "steps", "clip rate", "spikes", "skipped")]
    for name, fold in found.items():
        rows.append((name, str(fold.steps), f"{fold.clipped / fold.steps:.0%}", str(fold.spikes), str(fold.skipped)))
    return study.aligned(rows)


def claims(runs: Mapping[str, Sequence[Run]], settings: Settings) -> list[str]:
    """What the runs show."""
    said = []
    for name, smaller in (("weather", settings.weather_lr), ("stocks", settings.stocks_lr)):
        own = {kind: runs[f"{name}: {kind}"] for kind in (BARE, CLIPPED, RIVAL)}
        medians = {kind: study.median_score(own[kind]) for kind in own}
        alive = {kind: median for kind, median in medians.items() if math.isfinite(median)}
        best = min(alive, key=lambda kind: alive[kind], default=None)
        said.append(f"{name.capitalize()} at lr {settings.lr:g}: {verdict(own, CLIPPED, BARE)}.")
        said.append(f"A smaller learning rate, {smaller:g}: {verdict(own, CLIPPED, RIVAL)}.")
        if best is None:
            said.append("No forecast is left to compare with persistence.")
        else:
            outcome = "beats" if alive[best] < 1 else "does not beat"
            said.append(f"The best of them ({best}) {outcome} persistence: {alive[best]:.2f} of its error.")
    return said


def run(settings: Settings, progress: bool = True) -> Study:
    """All trainings; the same settings give the same losses on the same machine."""
    all_series = load_series(settings)
    variants = [f"{name}: {kind}" for name in all_series for kind in (BARE, CLIPPED, RIVAL)]
    with tempfile.TemporaryDirectory() as folder:

        def one(variant: str, seed: int) -> Run:
            name, _, kind = variant.partition(": ")
            record = Path(folder) / f"{name}.jsonl" if kind == CLIPPED and seed == 0 else None
            return train_one(variant, seed, settings, all_series, record)

        runs = study.compare(one, variants, settings.seeds, progress)
        found: dict[str, Fold] = {}
        for name in all_series:
            found |= digest_of(Path(folder) / f"{name}.jsonl").folds
    return Study(
        title=f"LSTM forecasts in {settings.folds} folds, one after the other, lr {settings.lr:g}",
        measure="error / that of persistence",
        runs=runs,
        claims=claims(runs, settings),
        baseline=("persistence", 1.0),
        max_norm=settings.max_norm,
        details=fold_table(found),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    return study.main("forecast", __doc__, Settings, run, NEEDS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
