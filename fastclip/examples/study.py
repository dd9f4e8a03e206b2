"""What the examples share: one training for each variant and seed, a table, a picture, and the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import fastclip
from fastclip.examples import command
from fastclip.examples.extras import extra

# Okabe and Ito: told apart by every kind of colour vision. A seventh variant begins again with dashed lines.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = [(colour, style) for style in ("-", "--") for colour in COLOURS]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        losses, total_norms: one per step, the norm before clipping; they end where the run died. Not all are finite
            where steps were skipped.
        score: the study's measure on unseen data; NaN for a run that died.
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
        """The step, counted from 1, with which the run ended because nothing was left to train: it has no score."""
        return None if math.isfinite(self.score) else len(self.losses)


@dataclass(frozen=True)
class Study:
    """The same training in several variants, each with the same seeds.

    Attributes:
        title: one line, for the picture.
        measure: what ``score`` is, with its unit.
        runs: for each variant one run per seed.
        claims: what these runs show, in sentences whose numbers come from them.
        higher_is_better: of scores.
        baseline: what to compare with, and its score: a forecast without any training, for instance.
        max_norm: the bound, drawn into the picture.
        details: printed below the table: samples, or a table of its own.
        panel: draws what is special to this study into matplotlib axes, which stand beside the others.
    """

    title: str
    measure: str
    runs: Mapping[str, Sequence[Run]]
    claims: Sequence[str]
    higher_is_better: bool = False
    baseline: tuple[str, float] | None = None
    max_norm: float | None = None
    details: str = ""
    panel: Callable[[Any], None] | None = None


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
    """Trains each variant with each of the seeds 0, 1, ...; torch's global generator is left as it was.

    Args:
        train_one: variant and seed to a run. torch's global generator has been seeded: weights that are made first
            are the same for all variants.
    """
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}
    pairs = [(variant, seed) for seed in range(seeds) for variant in variants]
    with one_thread(), extra("tqdm").tqdm(pairs, unit="run", disable=not progress) as bar:
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
    """The plain loop, until the last step or the first loss of a model whose weights aren't finite any more.

    Args:
        next_loss: draws the next batch, and returns its loss with the graph behind it.
        score: judges the trained model on unseen data; called without gradients, and not at all if the run died.
    """
    losses: list[float] = []
    total_norms: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = next_loss()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) and not intact(optimizer):
            total_norms.append(math.nan)
            break
        loss.backward()  # type: ignore[no-untyped-call]
        try:
            total_norms.append(step(optimizer))
        except fastclip.SkipLimitError:  # finite weights, from which no step leads away
            return finished(optimizer, losses, [*total_norms, math.nan], lambda: math.nan)
        if schedule is not None:
            schedule.step()
    return finished(optimizer, losses, total_norms, score)


def step(optimizer: Optimizer) -> float:
    """Steps, and returns the total norm from before it; the wrapped optimizer has measured it already."""
    if isinstance(optimizer, fastclip.ClippedOptimizer):
        optimizer.step()
        return math.nan if optimizer.last_norm is None else float(optimizer.last_norm)
    total_norm = float(fastclip.get_total_norm([p.grad for p in parameters(optimizer) if p.grad is not None]))
    optimizer.step()
    return total_norm


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All that it steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def intact(optimizer: Optimizer) -> bool:
    """Whether all that it steps is finite."""
    return all(bool(p.isfinite().all()) for p in parameters(optimizer))


def finished(optimizer: Optimizer, losses: list[float], total_norms: list[float], score: Callable[[], float]) -> Run:
    """The run that ends here; it gets a score if all its weights are finite."""
    wrapper = optimizer if isinstance(optimizer, fastclip.ClippedOptimizer) else None
    with torch.no_grad():
        reached = score() if intact(optimizer) else math.nan
    return Run(
        losses,
        total_norms,
        score=reached,
        skipped=int(wrapper.skipped_steps) if wrapper else 0,
        clip_rate=float(wrapper.clip_rate) if wrapper else None,
    )


def median_score(runs: Sequence[Run], higher_is_better: bool = False) -> float:
    """Of all runs, those that died counted as the worst; NaN if it lies among them."""
    worst = -math.inf if higher_is_better else math.inf
    middle = statistics.median(run.score if run.died_at is None else worst for run in runs)
    return middle if math.isfinite(middle) else math.nan


def deaths(runs: Sequence[Run]) -> int:
    """How many of the runs died."""
    return sum(run.died_at is not None for run in runs)


def wins(runs: Sequence[Run], others: Sequence[Run], higher_is_better: bool = False) -> int:
    """With how many seeds the first have the better score; one that died is worse than any, and as bad as another."""
    sign = 1 if higher_is_better else -1
    pairs = [
        [sign * run.score if run.died_at is None else -math.inf for run in pair]
        for pair in zip(runs, others, strict=True)
    ]
    return sum(first > second for first, second in pairs)


def verdict(
    runs: Mapping[str, Sequence[Run]],
    first: str,
    second: str,
    higher_is_better: bool = False,
    say: Callable[[float], str] | None = None,
) -> str:
    """Which of two variants is better, seed by seed, and what both reach: a sentence without its first words.

    Args:
        say: spells a score; by default three digits.
    """
    ours, theirs = runs[first], runs[second]
    spelled = [
        "no score" if math.isnan(median) else (say or number)(median)
        for median in (median_score(ours, higher_is_better), median_score(theirs, higher_is_better))
    ]
    won, lost = wins(ours, theirs, higher_is_better), wins(theirs, ours, higher_is_better)
    every = f"with each of {len(ours)} seeds" if len(ours) > 1 else "with the only seed"
    if won == len(ours):
        outcome = f"{first} is better than {second} {every}"
    elif lost == len(ours):
        outcome = f"{first} is worse than {second} {every}"
    else:
        outcome = f"{first} is better than {second} with {won}, worse with {lost} of {len(ours)} seeds"
    died = [f"{name} died with {count}" for name in (first, second) if (count := deaths(runs[name]))]
    return "; ".join([f"{outcome} (median {spelled[0]} against {spelled[1]})", *died])


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header; the first column goes left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "   ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def table(study: Study) -> str:
    """One line for each variant, then what is special to the study, then what it shows."""
    rows = [["", f"{study.measure}, median", "each seed", "died", "skipped", "clip rate"]]
    for variant, runs in study.runs.items():
        rates = [run.clip_rate for run in runs if run.clip_rate is not None]
        rows.append(
            [
                variant,
                number(median_score(runs, study.higher_is_better)),
                " ".join(number(run.score) for run in runs),
                f"{deaths(runs)} of {len(runs)}",
                str(sum(run.skipped for run in runs)),
                f"{statistics.median(rates):.0%}" if rates else "-",
            ]
        )
    if study.baseline is not None:
        rows.append([study.baseline[0], number(study.baseline[1]), "-", "-", "-", "-"])
    return "\n\n".join(part for part in (aligned(rows), study.details, "\n".join(study.claims)) if part)


def figure(width: float, height: float) -> Any:
    """An empty one; without pyplot it draws with Agg and leaves the caller's backend alone."""
    return extra("matplotlib.figure").Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_picture(study: Study, path: Path) -> None:
    """Writes loss and total norm of all runs, step by step, and the score of each, as a PNG."""
    drawn = figure(11, 7)
    mosaic = [["loss", "score"], ["norm", "score" if study.panel is None else "panel"]]
    axes = drawn.subplot_mosaic(mosaic, width_ratios=[3, 1] if study.panel is None else [3, 2])
    _draw_curves(axes["loss"], study, [[run.losses for run in runs] for runs in study.runs.values()])
    _draw_curves(axes["norm"], study, [[run.total_norms for run in runs] for runs in study.runs.values()])
    axes["loss"].set_ylabel("training loss", fontsize=12)
    axes["norm"].set_ylabel("total_norm before clipping", fontsize=12)
    axes["norm"].set_xlabel("step; a dotted line: a run has died there", fontsize=12)
    if study.max_norm is not None:
        axes["norm"].axhline(study.max_norm, color="black", linestyle="--", linewidth=1.2, label="max_norm")
    _draw_scores(axes["score"], study)
    if study.panel is not None:
        study.panel(axes["panel"])
    handles, labels = axes["norm"].get_legend_handles_labels()
    legend = drawn.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=12)
    for line in legend.get_lines():
        line.set(linewidth=3, alpha=1)
    drawn.suptitle(study.title, fontsize=14)
    drawn.savefig(path)


def _draw_curves(axes: Any, study: Study, curves: Sequence[Sequence[Sequence[float]]]) -> None:
    finite = [v for of_variant in curves for values in of_variant for v in values if math.isfinite(v)]
    drawable = [v for v in finite if v > 0]
    # A run that explodes passes 1e30: shown in full, it would press everything else into one line.
    top = min(max(drawable), 1e4 * statistics.median(drawable)) if drawable else 1.0
    bottom = min(finite, default=1.0)
    if bottom < 0:  # a GAN's losses
        axes.set_yscale("symlog")
        axes.set_ylim(max(2 * bottom, -2 * top), 2 * top)
    else:
        axes.set_yscale("log")
        axes.set_ylim(min(drawable, default=1.0) / 2, 2 * top)
    lines = itertools.cycle(LINES)
    for (variant, runs), of_variant in zip(study.runs.items(), curves, strict=True):
        colour, style = next(lines)
        for i, (run, values) in enumerate(zip(runs, of_variant, strict=True)):
            label = variant if i == 0 else None
            axes.plot(range(1, len(values) + 1), values, style, color=colour, label=label, linewidth=1, alpha=0.7)
            if run.died_at is not None:
                axes.axvline(run.died_at, color=colour, linestyle=":", linewidth=1)
    axes.grid(alpha=0.25)


def _draw_scores(axes: Any, study: Study) -> None:
    reached = [run.score for runs in study.runs.values() for run in runs if run.died_at is None]
    # The error of one that has exploded and lives would press all others into one line.
    largest = (
        math.inf if study.higher_is_better or not reached else 10 * statistics.median(map(abs, reached)) or math.inf
    )
    lines, letters = itertools.cycle(LINES), 0
    for i, runs in enumerate(study.runs.values()):
        colour, _ = next(lines)
        # side by side: seeds with the same score would hide each other
        places = [(i + 0.5 * (1 + j) / (1 + len(runs)) - 0.25, run.score) for j, run in enumerate(runs)]
        drawn = [(x, score) for x, score in places if abs(score) <= largest]
        axes.plot(*zip(*drawn, strict=True) if drawn else ([], []), "o", color=colour, alpha=0.8)
        beyond = sum(run.died_at is None for run in runs) - len(drawn)
        missing = [f"{count} {why}" for count, why in ((deaths(runs), "died"), (beyond, "off the scale")) if count]
        letters = max(letters, len(", ".join(missing)))
        axes.annotate(
            ", ".join(missing),
            (i, 0.02 if study.higher_is_better else 0.98),  # on the side of the worst
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="center",
            va="bottom" if study.higher_is_better else "top",
            color=colour,
            fontsize=11,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if missing else None,
        )
    title = study.measure
    if study.baseline is not None:
        name, score = study.baseline
        axes.axhline(score, color="black", linestyle="--", linewidth=1.2)
        title += f"\n(dashed: {name})"
    bottom, top = axes.get_ylim()
    room = 0.04 * letters * (top - bottom)  # no score hides behind these words
    axes.set_ylim(bottom - room * study.higher_is_better, top + room * (not study.higher_is_better))
    steep = 30 if len(study.runs) <= 7 else 75  # many names stand close
    axes.set_xticks(range(len(study.runs)), list(study.runs), rotation=steep, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(study.runs) - 0.5)
    axes.set_title(title, fontsize=12)
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
    parser = command.parser_of(f"fastclip example {name}", doc, f"{name}.png")
    parser.add_argument("--seeds", type=int, help=f"trainings of each variant; default {settings().seeds}")
    args = command.parse(parser, argv, "seeds")
    if not command.ready(("matplotlib", "tqdm", *needs)):
        return 1
    chosen = settings.quick() if args.quick else settings()
    if args.seeds is not None:
        chosen = dataclasses.replace(chosen, seeds=args.seeds)  # type: ignore[type-var]
    study = run(chosen, not args.quick)
    save_picture(study, args.output)
    print(f"{table(study)}\n\nPicture: {args.output}")
    return 0
