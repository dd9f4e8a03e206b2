"""Forecast tomorrow's temperature in Seattle, once with a bare optimizer and once with a wrapped one.

An LSTM reads the last 30 days and forecasts the next day's maximum. It learns from 2012 to 2014 and is judged on
2015. The learning rate is too high for bare SGD: one large step makes the error larger, the larger error makes the
gradient larger, and some twenty steps later the loss is NaN. ``fastclip.ClippedOptimizer`` bounds the length of the
gradient, so the same training at the same learning rate gets through its bad steps. Nothing else differs: initial
weights, batches and schedule are the same. (A smaller learning rate would also help; it has to be found first.)

Run it with ``python -m fastclip.examples.weather``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastclip
from fastclip.examples.extras import extra

FEATURES = ("temp_max", "temp_min", "precipitation", "wind")
TARGET = FEATURES.index("temp_max")
FIRST_VALIDATION_YEAR = 2015

# Okabe and Ito: told apart by every kind of colour vision.
BARE_COLOUR, WRAPPED_COLOUR = "#D55E00", "#0072B2"


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
class History:
    """One run, step by step.

    Attributes:
        losses, total_norms: one per step, the norm before clipping; they end with the first NaN loss.
        steps: optimizer steps asked for.
        skipped: steps that did not happen because a gradient was not finite.
        clip_rate: share of the steps whose gradients were clipped; None if the optimizer does not clip.
        validation_error: mean absolute error in °C.
    """

    losses: list[float]
    total_norms: list[float]
    steps: int
    skipped: int
    clip_rate: float | None
    validation_error: float

    @property
    def nan_step(self) -> int | None:
        """The step, counted from 1, at which the loss was NaN."""
        return len(self.losses) if math.isnan(self.losses[-1]) else None

    @property
    def final_state(self) -> str:
        return f"loss {self.losses[-1]:.2g}" if self.nan_step is None else f"NaN at step {self.nan_step}"


@dataclass(frozen=True)
class ClipTiming:
    """Median microseconds of one call on the model's own gradients, with nothing to clip."""

    torch_us: float
    fastclip_us: float
    tensors: int
    elements: int


@dataclass(frozen=True)
class Results:
    settings: Settings
    bare: History
    wrapped: History
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


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The matrices are too small to share, and the number of threads would change the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- data ----------------------------------------------------------------------------------------------


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


# ---- training ------------------------------------------------------------------------------------------


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


def _step(optimizer: Optimizer, model: nn.Module) -> float:
    """Steps, and returns the total norm from before it; the wrapped optimizer has measured it already."""
    if isinstance(optimizer, fastclip.ClippedOptimizer):
        optimizer.step()
        return math.nan if optimizer.last_norm is None else float(optimizer.last_norm)
    total_norm = float(fastclip.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    optimizer.step()
    return total_norm


def train(
    label: str,
    make_optimizer: Callable[[nn.Module, Settings], Optimizer],
    task: Task,
    settings: Settings,
    progress: bool = True,
) -> History:
    """Trains a new model until the last epoch or the first NaN loss."""
    model = make_model(settings)
    optimizer = make_optimizer(model, settings)
    shuffle = torch.Generator().manual_seed(settings.seed)
    batches = math.ceil(len(task.train_inputs) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    losses: list[float] = []
    total_norms: list[float] = []

    def train_epoch() -> None:
        order = torch.randperm(len(task.train_inputs), generator=shuffle)
        for first in range(0, len(order), settings.batch_size):
            batch = order[first : first + settings.batch_size]
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(task.train_inputs[batch]), task.train_targets[batch])
            losses.append(loss.item())
            if math.isnan(losses[-1]):
                total_norms.append(math.nan)
                return
            loss.backward()  # type: ignore[no-untyped-call]
            total_norms.append(_step(optimizer, model))
            schedule.step()

    bar = extra("tqdm").tqdm(range(settings.epochs), desc=f"{label:8}", unit="epoch", disable=not progress)
    for _ in bar:
        train_epoch()
        if math.isnan(losses[-1]):
            bar.set_postfix_str(f"NaN at step {len(losses)}, stopped")
            break
        bar.set_postfix_str(f"loss {losses[-1]:.3g}")
    bar.close()

    wrapper = optimizer if isinstance(optimizer, fastclip.ClippedOptimizer) else None
    return History(
        losses=losses,
        total_norms=total_norms,
        steps=len(losses) - math.isnan(losses[-1]),
        skipped=int(wrapper.skipped_steps) if wrapper else 0,
        clip_rate=float(wrapper.clip_rate) if wrapper else None,
        validation_error=validation_error(model, task),
    )


# ---- the time that clipping takes ----------------------------------------------------------------------


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
    with _one_thread():
        task = prepare(load_weather(), settings.window)
        return Results(
            settings=settings,
            bare=train("bare", bare_optimizer, task, settings, progress),
            wrapped=train("wrapped", wrapped_optimizer, task, settings, progress),
            persistence_error=persistence_error(task),
            timing=time_clipping(task, settings),
        )


# ---- results -------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """The outcome as aligned text, and below it the time that clipping took."""

    def error(value: float) -> str:
        return "NaN" if math.isnan(value) else f"{value:.2f}" if value < 1e4 else f"{value:.1e}"

    def row(name: str, history: History) -> tuple[str, ...]:
        clip_rate = "-" if history.clip_rate is None else f"{history.clip_rate:.1%}"
        steps, skipped = str(history.steps), str(history.skipped)
        return name, error(history.validation_error), steps, skipped, clip_rate, history.final_state

    rows = [
        ("", "validation MAE in °C", "steps", "skipped", "clip rate", "final state"),
        row("bare", results.bare),
        row("wrapped", results.wrapped),
        ("persistence", error(results.persistence_error), "-", "-", "-", "tomorrow = today"),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("   ".join([first.ljust(widths[0]), *cells, last]))
    lines.insert(1, "-" * max(map(len, lines)))
    timing = results.timing
    return "\n".join(
        [
            *lines,
            "",
            f"Clipping per step: torch {timing.torch_us:.1f} µs, fastclip {timing.fastclip_us:.1f} µs "
            f"(median of {results.settings.timing_calls} calls in turns, 1 thread, nothing to clip;",
            f"{timing.tensors} gradients, {timing.elements:,} elements).",
        ]
    )


def save_picture(results: Results, path: Path) -> None:
    """Writes the loss and the total norm of both runs, step by step, as a PNG."""
    # Figure without pyplot draws with Agg and leaves the caller's backend alone.
    figure = extra("matplotlib.figure").Figure(figsize=(9, 7), dpi=150, layout="constrained")
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
    outcome = "ends in NaN" if bare.nan_step else f"ends at loss {bare.losses[-1]:.2g}"
    figure.suptitle(
        f"Same model, data and learning rate ({settings.lr:g}): bare SGD {outcome},\n"
        f"wrapped it forecasts to {wrapped.validation_error:.2f} °C (persistence: {results.persistence_error:.2f} °C)",
        fontsize=14,
    )
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastclip.examples.weather",
        description="Train a weather forecast at a learning rate that kills the bare optimizer, and wrap it.",
    )
    parser.add_argument("--epochs", type=int, help=f"default {Settings.epochs}, with --quick {Settings.quick().epochs}")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of the weights and the batches; default 0")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer epochs, for a first look")
    args = parser.parse_args(argv)
    if args.epochs is not None and args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if not args.output.resolve().parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.resolve().parent}")
    settings = Settings.quick(args.seed) if args.quick else Settings(seed=args.seed)
    if args.epochs is not None:
        settings = replace(settings, epochs=args.epochs)
    try:
        for module in ("vega_datasets", "tqdm", "matplotlib"):  # before the training, not after it
            extra(module)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    results = run(settings)
    save_picture(results, args.output)
    print(f"\n{table(results)}\n\nPicture: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
