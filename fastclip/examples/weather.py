"""Forecast tomorrow's temperature in Seattle, once with a bare optimizer and once with a wrapped one.

An LSTM reads the last 30 days and forecasts the next day's maximum. It learns from 2012 to 2014 and is judged on
2015. The learning rate is too high for bare SGD: one large step makes the error larger, the larger error makes the
gradient larger, and some twenty steps later the loss is NaN. ``fastclip.ClippedOptimizer`` bounds the length of the
gradient, so the same training at the same learning rate gets through its bad steps. Nothing else differs: initial
weights, batches and schedule are the same. (A smaller learning rate would also help; it has to be found first.)

Run it with ``fastclip demo``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastclip
from fastclip.examples import command, study
from fastclip.examples.extras import extra
from fastclip.examples.study import COLOURS, Run

FEATURES = ("temp_max", "temp_min", "precipitation", "wind")
TARGET = FEATURES.index("temp_max")
FIRST_VALIDATION_YEAR = 2015
BARE_COLOUR, WRAPPED_COLOUR = COLOURS[:2]


@dataclass(frozen=True)
class Settings:
    """Everything that both runs share.

    Args:
        lr: 0.5 and less trains bare SGD as well; from about 1.0 on it blows up with nearly every seed.
        window: days that the model looks back.
        timing_calls: how often each clipping function is called to measure it.
    """

    epochs: int = 8
    seed: int = 0
    lr: float = 1.2
    momentum: float = 0.9
    max_norm: float = 1.0
    window: int = 30
    hidden: int = 64
    layers: int = 2
    batch_size: int = 32
    timing_calls: int = 500

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """A few seconds: the same training, cut short."""
        return cls(epochs=3, seed=seed, timing_calls=50)


@dataclass(frozen=True)
class Weather:
    """Daily weather, ``[days, features]`` in its own units; the first ``train_days`` are for training."""

    values: Tensor
    train_days: int


@dataclass(frozen=True)
class Task:
    """Windows in standardised units: inputs ``[n, window, features]``, targets ``[n, window]``.

    ``degrees`` is what one standardised unit of the target is in °C.
    """

    train_inputs: Tensor
    train_targets: Tensor
    validation_inputs: Tensor
    validation_targets: Tensor
    degrees: float


@dataclass(frozen=True)
class ClipTiming:
    """Median microseconds of one call on the model's own gradients, with nothing to clip."""

    torch_us: float
    fastclip_us: float
    tensors: int
    elements: int


@dataclass(frozen=True)
class Results:
    """Both runs, whose score is the mean absolute error in °C on the validation days."""

    settings: Settings
    bare: Run
    wrapped: Run
    persistence_error: float
    timing: ClipTiming


class Forecaster(nn.Module):
    """Reads days, and after each of them forecasts the next."""

    def __init__(self, features: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, days: Tensor) -> Tensor:
        states, _ = self.lstm(days)
        forecast: Tensor = self.head(states)
        return forecast.squeeze(-1)


def load_weather() -> Weather:
    """Seattle, 2012 to 2015, from the files that vega_datasets brings along."""
    frame = extra("vega_datasets").data.seattle_weather().sort_values("date")
    values = torch.tensor(frame[list(FEATURES)].to_numpy(), dtype=torch.float32)
    return Weather(values, int((frame["date"].dt.year < FIRST_VALIDATION_YEAR).sum()))


def windows(values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Every run of ``window`` days, and for each of its days the target of the day after."""
    inputs = values[:-1].unfold(0, window, 1).transpose(1, 2)
    targets = values[1:, TARGET].unfold(0, window, 1)
    return inputs, targets


def prepare(weather: Weather, window: int) -> Task:
    """Standardises by the training days alone, and splits by time: each validation day is forecast once."""
    train = weather.values[: weather.train_days]
    mean, std = train.mean(0), train.std(0)
    inputs, targets = windows((weather.values - mean) / std, window)
    # Window i ends the day before day i + window, so the first ones have no target later than the training days.
    split = weather.train_days - window
    return Task(inputs[:split], targets[:split], inputs[split:], targets[split:], float(std[TARGET]))


def persistence_error(task: Task) -> float:
    """Mean absolute error in °C of the forecast that tomorrow will be like today."""
    today, tomorrow = task.validation_inputs[:, -1, TARGET], task.validation_targets[:, -1]
    return float((tomorrow - today).abs().mean()) * task.degrees


def make_model(settings: Settings) -> Forecaster:
    """The same weights for the same seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Forecaster(len(FEATURES), settings.hidden, settings.layers)


def bare_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)


def wrapped_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    return fastclip.ClippedOptimizer(bare_optimizer(model, settings), max_norm=settings.max_norm)


def validation_error(model: nn.Module, task: Task) -> float:
    """Mean absolute error in °C of the forecasts that have seen a whole window."""
    with torch.no_grad():
        forecast = model(task.validation_inputs)[:, -1]
    return float((forecast - task.validation_targets[:, -1]).abs().mean()) * task.degrees


def batches(task: Task, settings: Settings) -> Iterator[Tensor]:
    """Of each epoch all windows, in an order of its own."""
    shuffle = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        order = torch.randperm(len(task.train_inputs), generator=shuffle)
        yield from torch.split(order, settings.batch_size)


def train(
    label: str,
    make_optimizer: Callable[[nn.Module, Settings], Optimizer],
    task: Task,
    settings: Settings,
    progress: bool = True,
) -> Run:
    """Trains a new model until the last epoch or the loss is NaN for good."""
    model = make_model(settings)
    optimizer = make_optimizer(model, settings)
    steps = settings.epochs * math.ceil(len(task.train_inputs) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    drawn = batches(task, settings)
    with extra("tqdm").tqdm(total=steps, desc=f"{label:8}", unit="step", mininterval=0.5, disable=not progress) as bar:

        def next_loss() -> Tensor:
            batch = next(drawn)
            bar.update()
            return nn.functional.mse_loss(model(task.train_inputs[batch]), task.train_targets[batch])

        found = study.train(optimizer, next_loss, steps, lambda: validation_error(model, task), schedule)
        bar.set_postfix_str(final_state(found))
    return found


def final_state(found: Run) -> str:
    return f"loss {found.losses[-1]:.2g}" if found.died_at is None else f"NaN at step {found.died_at}"


def time_clipping(task: Task, settings: Settings) -> ClipTiming:
    """torch's clipping function against fastclip's, in turns on the same gradients, which stay below the bound.

    Raises:
        RuntimeError: the two disagree about the norm, so that their times mean nothing.
    """
    model = make_model(settings)
    batch = slice(0, settings.batch_size)
    nn.functional.mse_loss(model(task.train_inputs[batch]), task.train_targets[batch]).backward()  # type: ignore[no-untyped-call]
    parameters = list(model.parameters())
    contestants = (torch.nn.utils.clip_grad_norm_, fastclip.clip_grad_norm_)
    torch_norm, fastclip_norm = (float(clip(parameters, math.inf)) for clip in contestants)
    if not math.isclose(torch_norm, fastclip_norm, rel_tol=1e-5):
        raise RuntimeError(f"torch finds the norm {torch_norm}, fastclip {fastclip_norm}")

    microseconds: tuple[list[float], list[float]] = ([], [])
    warm_up = 20
    for call in range(warm_up + settings.timing_calls):
        # Each goes first in every other round: whoever goes second finds the gradients warm in cache.
        for which in (0, 1) if call % 2 else (1, 0):
            start = time.perf_counter_ns()
            contestants[which](parameters, 2 * torch_norm)
            elapsed = time.perf_counter_ns() - start
            if call >= warm_up:
                microseconds[which].append(elapsed / 1000)
    torch_us, fastclip_us = map(statistics.median, microseconds)
    return ClipTiming(torch_us, fastclip_us, len(parameters), sum(p.numel() for p in parameters))


def run(settings: Settings | None = None, progress: bool = True) -> Results:
    """Both trainings and the measurement; the same settings give the same losses on the same machine."""
    settings = settings or Settings()
    with study.one_thread():
        task = prepare(load_weather(), settings.window)
        return Results(
            settings=settings,
            bare=train("bare", bare_optimizer, task, settings, progress),
            wrapped=train("wrapped", wrapped_optimizer, task, settings, progress),
            persistence_error=persistence_error(task),
            timing=time_clipping(task, settings),
        )


def table(results: Results) -> str:
    """The outcome as aligned text, and below it the time that clipping took."""

    def error(value: float) -> str:
        return "NaN" if math.isnan(value) else f"{value:.2f}" if value < 1e4 else f"{value:.1e}"

    def row(name: str, found: Run) -> tuple[str, ...]:
        clip_rate = "-" if found.clip_rate is None else f"{found.clip_rate:.1%}"
        steps = len(found.losses) - (found.died_at is not None)
        return name, error(found.score), str(steps), str(found.skipped), clip_rate, final_state(found)

    rows = [
        ("", "validation MAE in °C", "steps", "skipped", "clip rate", "final state"),
        row("bare", results.bare),
        row("wrapped", results.wrapped),
        ("persistence", error(results.persistence_error), "-", "-", "-", "tomorrow = today"),
    ]
    timing = results.timing
    return "\n".join(
        [
            study.aligned(rows),
            "",
            f"Clipping per step: torch {timing.torch_us:.1f} µs, fastclip {timing.fastclip_us:.1f} µs "
            f"(median of {results.settings.timing_calls} calls in turns, 1 thread, nothing to clip;",
            f"{timing.tensors} gradients, {timing.elements:,} elements).",
        ]
    )


def save_picture(results: Results, path: Path) -> None:
    """Writes the loss and the total norm of both runs, step by step, as a PNG."""
    figure = study.figure(9, 7)
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True)
    bare, wrapped, settings = results.bare, results.wrapped, results.settings

    for axes, bare_values, wrapped_values in (
        (loss_axes, bare.losses, wrapped.losses),
        (norm_axes, bare.total_norms, wrapped.total_norms),
    ):
        for values, label, colour in (
            (bare_values, "bare SGD", BARE_COLOUR),
            (wrapped_values, "fastclip.ClippedOptimizer(SGD)", WRAPPED_COLOUR),
        ):
            axes.plot(range(1, len(values) + 1), values, color=colour, label=label, linewidth=1.8)
        # The bare run goes up to 1e35 and more: shown in full, it would press everything else into one line.
        axes.set_yscale("log")
        axes.set_ylim(min(filter(math.isfinite, wrapped_values)) / 2, 1e4 * max(filter(math.isfinite, wrapped_values)))
        axes.set_xlim(0, len(wrapped.losses) + 1)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=12)
        nan_step = next((step for step, value in enumerate(bare_values, 1) if math.isnan(value)), None)
        if nan_step is not None:
            axes.axvline(nan_step, color=BARE_COLOUR, linestyle=":", linewidth=1.8)
            axes.annotate(
                f"bare: NaN at step {nan_step},\nhaving passed {max(filter(math.isfinite, bare_values)):.0e}",
                (nan_step, 0.75),
                xycoords=("data", "axes fraction"),
                xytext=(8, 0),
                textcoords="offset points",
                color=BARE_COLOUR,
                fontsize=13,
                va="center",
            )

    norm_axes.axhline(settings.max_norm, color="black", linestyle="--", linewidth=1.4)
    norm_axes.annotate(
        f"max_norm = {settings.max_norm:g}",
        (0.99, settings.max_norm),
        xycoords=("axes fraction", "data"),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        fontsize=13,
    )
    loss_axes.set_ylabel("training loss", fontsize=13)
    norm_axes.set_ylabel("total_norm before clipping", fontsize=13)
    norm_axes.set_xlabel("step", fontsize=13)
    loss_axes.legend(fontsize=12, loc="upper right")
    outcome = "ends in NaN" if bare.died_at else f"ends at loss {bare.losses[-1]:.2g}"
    figure.suptitle(
        f"Same model, data and learning rate ({settings.lr:g}): bare SGD {outcome},\n"
        f"wrapped it forecasts to {wrapped.score:.2f} °C (persistence: {results.persistence_error:.2f} °C)",
        fontsize=14,
    )
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = command.parser_of("fastclip demo", __doc__, "demo.png")
    parser.add_argument("--epochs", type=int, help=f"default {Settings.epochs}, with --quick {Settings.quick().epochs}")
    parser.add_argument(
        "--seed", type=command.seed, default=Settings.seed, help="of the weights and the batches; default 0"
    )
    args = command.parse(parser, argv, "epochs")
    settings = Settings.quick(args.seed) if args.quick else Settings(seed=args.seed)
    if args.epochs is not None:
        settings = replace(settings, epochs=args.epochs)
    if not command.ready(("vega_datasets", "pandas", "tqdm", "matplotlib")):
        return 1
    results = run(settings)
    save_picture(results, args.output)
    print(f"\n{table(results)}\n\nPicture: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
