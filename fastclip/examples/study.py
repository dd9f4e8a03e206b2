"""What the examples share: one training for each variant and seed, a table, a picture, and the command line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import fastclip
from fastclip.examples.extras import extra

# Okabe and Ito: told apart by every kind of colour vision.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        losses, total_norms: one per step, the norm before clipping; they end with the first loss that is not finite.
        score: the study's measure on unseen data.
        skipped: steps that did not happen.
        clip_rate: share of the steps whose gradients were clipped; None if the optimizer does not clip.
    """

    losses: list[float]
    total_norms: list[float]
    score: float
    skipped: int = 0
    clip_rate: float | None = None

    @property
    def died_at(self) -> int | None:
        """The step, counted from 1, whose loss was NaN or Inf."""
        return None if math.isfinite(self.losses[-1]) else len(self.losses)


@dataclass(frozen=True)
class Study:
    """The same training in several variants, each with the same seeds.

    Attributes:
        title: one line, for the picture.
        measure: what ``score`` is, with its unit.
        runs: for each variant one run per seed.
        claims: what these runs show, in sentences whose numbers come from them.
        baseline: what to compare with, and its score: a forecast without any training, for instance.
        max_norm: the bound, drawn into the picture.
    """

    title: str
    measure: str
    runs: Mapping[str, Sequence[Run]]
    claims: Sequence[str]
    baseline: tuple[str, float] | None = None
    max_norm: float | None = None


class Settings(Protocol):
    """A frozen dataclass: everything that all runs share."""

    @property
    def seeds(self) -> int: ...

    @classmethod
    def quick(cls) -> Any: ...


SomeSettings = TypeVar("SomeSettings", bound=Settings)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The examples' matrices are too small to share, and the number of threads would change the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(
    train_one: Callable[[str, int], Run], variants: Sequence[str], seeds: int, progress: bool = True
) -> dict[str, list[Run]]:
    """Trains each variant with each of the seeds 0, 1, ...; torch's global generator is left as it was."""
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}
    pairs = [(variant, seed) for seed in range(seeds) for variant in variants]
    bar = extra("tqdm").tqdm(pairs, unit="run", disable=not progress)
    with one_thread():
        for variant, seed in bar:
            bar.set_description(f"{variant}, seed {seed}")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                runs[variant].append(train_one(variant, seed))
    return runs


def train(
    optimizer: Optimizer,
    next_loss: Callable[[], Tensor],
    steps: int,
    score: Callable[[], float],
    schedule: LRScheduler | None = None,
) -> Run:
    """The plain loop, until the last step or the first loss that is not finite."""
    losses: list[float] = []
    total_norms: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = next_loss()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            total_norms.append(math.nan)
            break
        loss.backward()  # type: ignore[no-untyped-call]
        total_norms.append(step(optimizer))
        if schedule is not None:
            schedule.step()
    return finished(optimizer, losses, total_norms, score)


def step(optimizer: Optimizer) -> float:
    """Steps, and returns the total norm from before it; the wrapped optimizer has measured it already."""
    if isinstance(optimizer, fastclip.ClippedOptimizer):
        optimizer.step()
        return math.nan if optimizer.last_norm is None else float(optimizer.last_norm)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    total_norm = float(fastclip.get_total_norm(grads))
    optimizer.step()
    return total_norm


def finished(optimizer: Optimizer, losses: list[float], total_norms: list[float], score: Callable[[], float]) -> Run:
    """The run that ends here."""
    wrapper = optimizer if isinstance(optimizer, fastclip.ClippedOptimizer) else None
    with torch.no_grad():
        reached = score()
    return Run(
        losses,
        total_norms,
        score=reached,
        skipped=int(wrapper.skipped_steps) if wrapper else 0,
        clip_rate=float(wrapper.clip_rate) if wrapper else None,
    )


def median_score(runs: Sequence[Run]) -> float:
    """Of those that are finite; NaN if none is."""
    return (
        statistics.median(scores) if (scores := [run.score for run in runs if math.isfinite(run.score)]) else math.nan
    )


def deaths(runs: Sequence[Run]) -> int:
    """How many of the runs ended in a loss that is not finite."""
    return sum(run.died_at is not None for run in runs)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def table(study: Study) -> str:
    """One line for each variant, then what the study shows."""
    rows = [("", study.measure + ", median", "each seed", "NaN or Inf", "skipped", "clip rate")]
    for variant, runs in study.runs.items():
        rates = [run.clip_rate for run in runs if run.clip_rate is not None]
        rows.append(
            (
                variant,
                number(median_score(runs)),
                " ".join(number(run.score) for run in runs),
                f"{deaths(runs)} of {len(runs)}",
                str(sum(run.skipped for run in runs)),
                f"{statistics.median(rates):.0%}" if rates else "-",
            )
        )
    if study.baseline is not None:
        rows.append((study.baseline[0], number(study.baseline[1]), "-", "-", "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "   ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", *study.claims])


def save_picture(study: Study, path: Path) -> None:
    """Writes loss and total norm of all runs, step by step, and the score of each, as a PNG."""
    # Figure without pyplot draws with Agg and leaves the caller's backend alone.
    figure = extra("matplotlib.figure").Figure(figsize=(11, 7), dpi=150, layout="constrained")
    axes = figure.subplot_mosaic([["loss", "score"], ["norm", "score"]], width_ratios=[3, 1])
    for (variant, runs), colour in zip(study.runs.items(), COLOURS, strict=False):
        for i, run in enumerate(runs):
            label = variant if i == 0 else None
            for name, values in (("loss", run.losses), ("norm", run.total_norms)):
                axes[name].plot(range(1, len(values) + 1), values, color=colour, label=label, linewidth=1, alpha=0.7)
                if run.died_at is not None:
                    axes[name].axvline(run.died_at, color=colour, linestyle=":", linewidth=1)
    for name, label in (("loss", "training loss"), ("norm", "total_norm before clipping")):
        values = [v for runs in study.runs.values() for run in runs for v in _curves(run)[name] if _drawable(v)]
        axes[name].set_yscale("log")
        if values:
            # A run that explodes passes 1e30: shown in full, it would press everything else into one line.
            low, middle = min(values), statistics.median(values)
            axes[name].set_ylim(low / 2, min(2 * max(values), 1e4 * middle))
        axes[name].set_ylabel(label, fontsize=12)
        axes[name].grid(alpha=0.25)
    if study.max_norm is not None:
        axes["norm"].axhline(study.max_norm, color="black", linestyle="--", linewidth=1.2, label="max_norm")
    axes["norm"].set_xlabel("step; a dotted line: the loss is NaN or Inf", fontsize=12)
    axes["loss"].legend(fontsize=11, loc="upper right")
    _draw_scores(axes["score"], study)
    figure.suptitle(study.title, fontsize=14)
    figure.savefig(path)


def _curves(run: Run) -> dict[str, list[float]]:
    return {"loss": run.losses, "norm": run.total_norms}


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _draw_scores(axes: Any, study: Study) -> None:
    finite = [run.score for runs in study.runs.values() for run in runs if math.isfinite(run.score)]
    for i, ((_, runs), colour) in enumerate(zip(study.runs.items(), COLOURS, strict=False)):
        scores = [run.score for run in runs if math.isfinite(run.score)]
        axes.plot([i] * len(scores), scores, "o", color=colour, alpha=0.7)
        if len(scores) < len(runs):
            lost = f"{len(runs) - len(scores)} NaN"
            axes.annotate(lost, (i, 0.01), xycoords=("data", "axes fraction"), ha="center", color=colour, fontsize=12)
    if study.baseline is not None:
        axes.axhline(study.baseline[1], color="black", linestyle="--", linewidth=1.2)
        axes.annotate(study.baseline[0], (0.02, study.baseline[1]), xycoords=("axes fraction", "data"), fontsize=10)
    if finite and min(finite) > 0 and max(finite) > 100 * min(finite):
        axes.set_yscale("log")
    axes.set_xticks(range(len(study.runs)), list(study.runs), rotation=30, ha="right")
    axes.set_xlim(-0.5, len(study.runs) - 0.5)
    axes.set_title(study.measure, fontsize=12)
    axes.grid(alpha=0.25, axis="y")


def main(
    name: str,
    doc: str | None,
    settings: type[SomeSettings],
    run: Callable[[SomeSettings, bool], Study],
    needs: Sequence[str],
    argv: list[str] | None,
) -> int:
    """The command line of one example; returns its exit status.

    Args:
        name: of the example.
        doc: its docstring, whose first line is the help.
        settings: its settings, with defaults.
        run: settings, and whether to draw a progress bar, to its study.
        needs: modules beyond torch and numpy, looked for before the first step.
        argv: the arguments; None for the process's own.
    """
    parser = argparse.ArgumentParser(prog=f"fastclip example {name}", description=(doc or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="how many seeds each variant is trained with")
    parser.add_argument("--output", type=Path, default=Path(f"{name}.png"), help="the picture; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for a first look")
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if not args.output.resolve().parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.resolve().parent}")
    try:
        for module in ("matplotlib", "tqdm", *needs):  # before the training, not after it
            extra(module)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    chosen = settings.quick() if args.quick else settings()
    if args.seeds is not None:
        chosen = dataclasses.replace(chosen, seeds=args.seeds)  # type: ignore[type-var]
    study = run(chosen, not args.quick)
    save_picture(study, args.output)
    print(f"{table(study)}\n\nPicture: {args.output}")
    return 0
