"""Search for a learning rate and a bound of the gradients together, and draw where training is stable.

A recurrent network reads handwritten digits row by row, from the data set that scikit-learn brings along.
``GridSearchCV`` tries every pair of ``lr`` and ``max_norm`` with stratified folds. Accuracy alone would pick a pair
that was lucky; the scorers of :mod:`fastclip.integrations.skorch` put next to it how often the gradient spiked, and how
many steps had to be skipped. The pixels are scaled inside the pipeline, so by each fold's training part alone, and
every fold trains a new network.

Run it with ``fastclip grid-search``; needs ``pip install 'torch-fastclip[examples,integrations]'``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.examples import command, study
from fastclip.examples.extras import extra

EXTRAS = "examples,integrations"
ROWS, COLUMNS, CLASSES = 8, 8, 10  # of a digit; how many digits there are
# What a stable training has: hardly a spike, no skipped step, and in no fold an accuracy as if guessed.
STABLE_SPIKE_RATE, STABLE_ACCURACY = 0.02, 2 / CLASSES
LR, MAX_NORM = "neuralnetclassifier__lr", "neuralnetclassifier__callbacks__clip__max_norm"


@dataclass(frozen=True)
class Settings:
    """What is searched, and what all trainings share.

    Args:
        samples: how many of the 1,797 digits are used.
        folds: each pair of ``lr`` and ``max_norm`` is trained so many times.
    """

    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    max_norms: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, math.inf)
    samples: int = 600
    folds: int = 3
    epochs: int = 10
    hidden: int = 32
    batch_size: int = 32
    momentum: float = 0.9
    seed: int = 0

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """Some seconds: a coarser grid and shorter trainings."""
        return cls(lrs=(0.03, 0.3, 3.0), max_norms=(0.1, 1.0, math.inf), samples=300, folds=2, epochs=6, seed=seed)


@dataclass(frozen=True)
class Results:
    """Means over the folds, ``[lr, max_norm]``.

    Attributes:
        accuracy: on the part of a fold that was not trained on, from 0 to 1.
        worst: the same in the worst of the folds.
        spike_rate: share of the steps whose norm spiked; see :func:`fastclip.integrations.skorch.spike_rate`.
        skipped: steps that did not happen.
        best: the pair of ``lr`` and ``max_norm`` of the highest accuracy.
    """

    settings: Settings
    accuracy: Tensor
    worst: Tensor
    spike_rate: Tensor
    skipped: Tensor
    best: tuple[float, float]

    @property
    def stable(self) -> Tensor:
        """Whether no step was skipped, hardly one spiked, and each fold has learned something."""
        return (self.skipped == 0) & (self.spike_rate <= STABLE_SPIKE_RATE) & (self.worst >= STABLE_ACCURACY)

    def reason(self, i: int, j: int) -> str:
        """Why a pair was not stable; "" if it was."""
        if self.skipped[i, j] > 0:
            return f"{float(self.skipped[i, j]):.0f} skipped"
        if self.spike_rate[i, j] > STABLE_SPIKE_RATE:
            return f"{float(self.spike_rate[i, j]):.0%} spikes"
        return "" if self.stable[i, j] else "not learned"


class Reader(nn.Module):
    """Reads a digit row by row, and says which it is."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.rows = nn.RNN(COLUMNS, hidden, batch_first=True)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        states, _ = self.rows(pixels.reshape(-1, ROWS, COLUMNS))
        logits: Tensor = self.head(states[:, -1])
        return logits


def _extra(module: str) -> Any:
    return extra(module, EXTRAS)


def make_search(settings: Settings, jobs: int = 1) -> Any:
    """The search, not fitted yet: a plain ``sklearn.model_selection.GridSearchCV``."""
    clip = _extra("fastclip.integrations.skorch")
    net = _extra("skorch").NeuralNetClassifier(
        Reader,
        module__hidden=settings.hidden,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=settings.momentum,
        max_epochs=settings.epochs,
        batch_size=settings.batch_size,
        iterator_train__shuffle=True,
        train_split=None,
        # a network that has exploded is a result here, not an error
        callbacks=[("clip", clip.Clip(skip_limit=None))],
        verbose=0,
    )
    selection = _extra("sklearn.model_selection")
    return selection.GridSearchCV(
        _extra("sklearn.pipeline").make_pipeline(_extra("sklearn.preprocessing").MinMaxScaler(), net),
        {LR: list(settings.lrs), MAX_NORM: list(settings.max_norms)},
        scoring={
            "accuracy": "accuracy",
            "neg_spike_rate": clip.neg_spike_rate,
            "neg_skipped_steps": clip.neg_skipped_steps,
        },
        refit=False,
        cv=selection.StratifiedKFold(settings.folds, shuffle=True, random_state=settings.seed),
        n_jobs=jobs,
        error_score="raise",
    )


def load_digits(settings: Settings) -> tuple[Any, Any]:
    """Pixels ``[samples, 64]`` in float32, 0 to 16, and which digit each is."""
    bunch = _extra("sklearn.datasets").load_digits()
    return bunch.data[: settings.samples].astype("float32"), bunch.target[: settings.samples]


def run(settings: Settings | None = None, jobs: int = 1) -> Results:
    """The whole search; with one job the same settings give the same results on the same machine."""
    settings = settings or Settings()
    with study.one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        found = make_search(settings, jobs).fit(*load_digits(settings)).cv_results_
    shape = len(settings.lrs), len(settings.max_norms)
    cells = [(settings.lrs.index(pair[LR]), settings.max_norms.index(pair[MAX_NORM])) for pair in found["params"]]

    def grid(values: Any) -> Tensor:
        made = torch.empty(shape, dtype=torch.float64)
        for cell, value in zip(cells, values, strict=True):
            made[cell] = float(value)
        return made

    folds = [grid(found[f"split{fold}_test_accuracy"]) for fold in range(settings.folds)]
    best = found["params"][int(found["mean_test_accuracy"].argmax())]
    return Results(
        settings=settings,
        accuracy=grid(found["mean_test_accuracy"]),
        worst=torch.stack(folds).amin(0),
        spike_rate=grid(0.0 - found["mean_test_neg_spike_rate"]),
        skipped=grid(0.0 - found["mean_test_neg_skipped_steps"]),
        best=(best[LR], best[MAX_NORM]),
    )


def table(results: Results) -> str:
    """Accuracy of each pair as aligned text; ``!`` behind those that were not stable."""
    settings = results.settings
    lines = [
        "accuracy, ! where training was not stable",
        "lr \\ max_norm" + "".join(f"{m:>8g}" for m in settings.max_norms),
    ]
    for i, lr in enumerate(settings.lrs):
        cells = [
            f"{float(results.accuracy[i, j]):7.2f}{' ' if results.stable[i, j] else '!'}"
            for j in range(len(settings.max_norms))
        ]
        lines.append(f"{lr:<13g}" + "".join(cells))
    lr, max_norm = results.best
    counted = [int(results.stable[:, j].sum()) for j in (0, -1)]
    lines += [
        "",
        f"Best: lr {lr:g} with max_norm {max_norm:g}. Of {len(settings.lrs)} learning rates",
        " and ".join(
            f"{stable} are stable with max_norm {max_norm:g}"
            for stable, max_norm in zip(counted, (settings.max_norms[0], settings.max_norms[-1]), strict=True)
        )
        + ".",
    ]
    return "\n".join(lines)


def save_picture(results: Results, path: Path) -> None:
    """Writes accuracy as a heat map, PNG, with a frame around what was stable and the reason in what was not."""
    figure = study.figure(9, 6.5)
    axes = figure.subplots()
    settings, stable = results.settings, results.stable
    image = axes.imshow(results.accuracy.numpy(), cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
    figure.colorbar(image, ax=axes, label="accuracy on unseen digits")
    for i in range(len(settings.lrs)):
        for j in range(len(settings.max_norms)):
            said = f"{float(results.accuracy[i, j]):.2f}\n{results.reason(i, j)}".rstrip()
            colour = "black" if results.accuracy[i, j] > 0.6 else "white"
            axes.text(j, i, said, ha="center", va="center", color=colour, fontsize=11)
            if stable[i, j]:
                _frame(axes, i, j, stable)
    axes.set_xticks(range(len(settings.max_norms)), [f"{m:g}" for m in settings.max_norms], fontsize=12)
    axes.set_yticks(range(len(settings.lrs)), [f"{lr:g}" for lr in settings.lrs], fontsize=12)
    axes.set_xlabel("max_norm", fontsize=13)
    axes.set_ylabel("learning rate", fontsize=13)
    axes.set_title(
        f"An RNN on digits, {settings.folds} folds: framed where training is stable\n"
        f"(no step skipped, at most {STABLE_SPIKE_RATE:.0%} of the norms spike, all folds learned)",
        fontsize=14,
    )
    figure.savefig(path)


def _frame(axes: Any, i: int, j: int, stable: Tensor) -> None:
    """Lines where a stable cell borders on one that isn't, or on the edge."""
    rows, columns = stable.shape
    for di, dj in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        inside = 0 <= i + di < rows and 0 <= j + dj < columns
        if not inside or not stable[i + di, j + dj]:
            xs = [j + (dj - di) / 2, j + (dj + di) / 2]
            ys = [i + (di - dj) / 2, i + (di + dj) / 2]
            axes.plot(xs, ys, color=study.COLOURS[0], linewidth=3, clip_on=False)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = command.parser_of("fastclip grid-search", __doc__, "grid_search.png")
    parser.add_argument(
        "--seed", type=command.seed, default=Settings.seed, help="of the weights, the batches and the folds"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes; with several the last digits vary")
    args = command.parse(parser, argv, "jobs")
    if not command.ready(("sklearn", "skorch", "matplotlib"), EXTRAS):
        return 1
    results = run(Settings.quick(args.seed) if args.quick else Settings(seed=args.seed), args.jobs)
    save_picture(results, args.output)
    print(f"{table(results)}\n\nPicture: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
